"""The text of a script under construction: its imports, its statements, and plain values as Python literals.

Text from a file or a command line becomes a literal, or a comment on one line, so that it can never become a statement.
"""

from __future__ import annotations

import builtins
import functools
import keyword
import os
import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from modelcli import providers
from modelcli.checkpoints import formats
from modelcli.language.expressions import Call, Name
from modelcli.live import modules
from modelcli.live.providers import half_of
from modelcli.model.dtypes import ITEM_BYTES
from modelcli.providers import owner as owner_of
from modelcli.providers.known_code import is_known_name

#: The maximum width of a line, in characters.
WIDTH = 110
#: More than this many statements of one kind become a loop.
STATEMENTS = 4
NN = "from torch import nn"
#: The names that a script itself imports, defines and assigns. A user's module or class gets another name.
_IMPORTS = frozenset({"torch", "nn", "init", "copy", "os", "sys", "runpy"})
_HELPERS = frozenset(
    {
        "read_source",
        "keep_weights",
        "sum_channels",
        "mean_channels",
        "repeat_values",
        "resample_kernels",
        "interpolate_grids",
        "interpolate_lines",
        "cast_views",
        "fuse_conv",
        "fuse_linear",
        "fuse_conv_bn_weights",
        "fuse_linear_bn_weights",
    }
)
_VARIABLES = frozenset(
    {
        "model",
        "state",
        "checkpoint",
        "new",
        "name",
        "names",
        "key",
        "items",
        "at",
        "children",
        "child",
        "number",
        "kept",
        "below",
        "place",
        "old",
        "made",
        "value",
        "parts",
        "part",
        "layer",
        "norm",
    }
)


@functools.cache
def _reserved_names() -> frozenset[str]:
    """Return these names, Python's builtins, and the names that providers and formats use in scripts."""
    of_providers = (provider.script_names for provider in (*providers.built_in(), *providers.loaded()))
    of_formats = (format_.script_names for format_ in formats.every())
    return (_IMPORTS | _HELPERS | _VARIABLES | frozenset(dir(builtins))).union(*of_providers, *of_formats)


class InexpressibleError(Exception):
    """Plain PyTorch statements cannot express something. The message says what and why."""


class SourceText:
    """A script under construction.

    Attributes:
        imports: import statements for libraries.
        folders: folders that the script adds to `sys.path`.
        own: for each name of a user's code, the statement that defines it.
        helpers: the source of helper functions.
        body: the lines below the imports and helpers.
        notes: notes for the user on what the script leaves out.
    """

    def __init__(self) -> None:
        self.imports: set[str] = set()
        self.folders: dict[str, None] = {}
        self.own: dict[str, str] = {}
        self.helpers: dict[str, None] = {}
        self.body: list[str] = []
        self.notes: list[str] = []

    def write(self, *lines: str) -> None:
        self.body += lines

    def inner(self) -> SourceText:
        """Return a text for the body of a function in this script. Its imports, helpers and notes are this script's."""
        found = SourceText()
        found.imports, found.folders, found.own = self.imports, self.folders, self.own
        found.helpers, found.notes = self.helpers, self.notes
        return found

    def paragraph(self, title: str | None = None) -> None:
        """Start a new paragraph, with `title` as a comment above it."""
        if self.body and self.body[-1]:
            self.body.append("")
        if title is not None:
            self.body.append(f"# {on_one_line(title)}")

    def refuse(self, what: str, why: str) -> None:
        """Make the script stop with an error at something that it cannot do, so that it saves no wrong result.

        Args:
            what: the line of the edit, or the step, that is not in the script.
            why: the reason.
        """
        self.notes.append(f"the script stops at {what!r}: {why}")
        self.write(f"# {on_one_line(why)}", f"raise NotImplementedError({quoted(what)})")

    def text(self) -> str:
        """Return the text of the whole script."""
        imports = {"import torch"} | self.imports
        lines = []
        if self.folders:
            imports |= {"import sys"}
        standard = [line for line in imports if line.split()[1] in _STANDARD]
        if standard:
            lines += [*sorted(standard), ""]
        lines += _sorted_imports(imports - set(standard))
        if self.folders:
            lines += ["", *(f"sys.path.insert(0, {quoted(folder)})" for folder in self.folders)]
        if self.own:
            run = [line for line in self.own.values() if not line.startswith(("import ", "from "))]
            lines += ["", *_sorted_imports(set(self.own.values()) - set(run)), *sorted(run)]
        for helper in self.helpers:
            lines += ["", "", *helper.splitlines()]
        if self.helpers:
            lines += [""]
        return "\n".join([*lines, "", *self.body]) + "\n"

    def value(self, value: Any) -> str:
        """Return the Python expression of a plain value; a nested module becomes its constructor call."""
        match value:
            case Call(name=name, args=args, kwargs=kwargs):
                return f"{self.class_of(name)}({self.arguments(args, _explicit_keywords(name, kwargs))})"
            case Name(dotted=dotted):
                short = dotted.removeprefix("torch.")
                return f"torch.{short}" if short in ITEM_BYTES else self.class_of(dotted)
            case tuple():
                return "(" + ", ".join(map(self.value, value)) + ("," if len(value) == 1 else "") + ")"
            case list():
                return "[" + ", ".join(map(self.value, value)) + "]"
            case dict():
                return "{" + ", ".join(f"{self.value(key)}: {self.value(item)}" for key, item in value.items()) + "}"
            case str():
                return quoted(value)
        return repr(value)

    def arguments(self, args: Iterable[Any], kwargs: dict[str, Any]) -> str:
        """Return the arguments of a call, without its parentheses."""
        return ", ".join([*map(self.value, args), *(f"{key}={self.value(item)}" for key, item in kwargs.items())])

    def class_of(self, dotted: str) -> str:
        """Import a class in the script. Returns its name there: `nn.Linear`, `ops.Permute`, `nets.Net`."""
        if not is_known_name(dotted):
            package, _, name = dotted.partition(":") if ":" in dotted else dotted.rpartition(".")
            self.folders.setdefault(".")
            return f"{self.own_module(package)}.{name}"
        package, name = modules.full_name(dotted)
        owner = owner_of(package)
        assert owner is not None
        line, found = half_of(owner).name_in_script(package, name)
        self.imports.add(line)
        return found

    def own_module(self, module: str) -> str:
        """Import a user's Python module in the script. Returns its name there."""
        first = module.partition(".")[0]
        if self._is_free(first, f"import {first}"):
            self.own[module] = f"import {module}"
            return module
        name = _replacement_name(module)
        self.own[name] = f"import {module} as {name}"
        return name

    def own_object(self, module: str, name: str) -> str:
        """Import a class, function or instance of a user's Python module in the script. Returns its name there."""
        line = f"from {module} import {name}"
        if self._is_free(name, line):
            self.own[name] = line
            return name
        other = _replacement_name(name)
        self.own[other] = f"{line} as {other}"
        return other

    def own_file(self, path: str, name: str) -> str:
        """Make the script run a Python file that cannot be imported because of its name, before everything else.

        Args:
            path: the path of the file.
            name: its name without the suffix.

        Returns:
            The variable in the script that holds the file's names, a dict.
        """
        self.imports.add("import runpy")
        variable = re.sub(r"\W", "_", name, flags=re.ASCII)
        line = f"runpy.run_path({quoted(path)})"
        if not is_name(variable) or not self._is_free(variable, f"{variable} = {line}"):
            variable = _replacement_name(variable)
        self.own[variable] = f"{variable} = {line}"
        return variable

    def _is_free(self, name: str, line: str) -> bool:
        """Whether a name is free, or already defined by the same statement or by a module of the same package."""
        others = [given for known, given in self.own.items() if known.partition(".")[0] == name]
        return name not in _reserved_names() and all(given == line or given.startswith(f"{line}.") for given in others)


_STANDARD = ("copy", "os", "sys", "runpy")


def _replacement_name(text: str) -> str:
    """Return another name for a user's module or object whose own name is not free."""
    return f"own_{text.replace('.', '_')}"


def _sorted_imports(lines: Iterable[str]) -> list[str]:
    """Sort imports as isort does: `import` lines before `from` lines, each by name."""
    return sorted(lines, key=lambda line: (line.startswith("from"), line))


def quoted(text: str) -> str:
    """Return text as a Python literal in ASCII, in double quotes unless the text contains some."""
    literal = ascii(text)
    return f'"{literal[1:-1]}"' if literal[0] == "'" and '"' not in literal else literal


def path_in_script(path: Path) -> str:
    """Return a path as a script writes it: relative to the current folder if `path` is, with forward slashes."""
    if not path.is_absolute():
        return os.path.normpath(path).replace(os.sep, "/")
    return path.as_posix()


def _explicit_keywords(dotted: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of a call that plain Python needs: see `LiveProvider.arguments_in_script`."""
    package, _, name = dotted.replace(":", ".").rpartition(".")
    owner = owner_of(package) if package and is_known_name(dotted) else None
    return kwargs if owner is None else half_of(owner).arguments_in_script(package, name, kwargs)


def on_one_line(text: str) -> str:
    """Return text for a comment, with every character outside printable ASCII escaped."""
    return "".join(c if c.isprintable() and c.isascii() else c.encode("unicode_escape").decode() for c in text)


def is_name(text: str) -> bool:
    """Whether text can be an attribute name after a dot."""
    return text.isascii() and text.isidentifier() and not keyword.iskeyword(text)


def loop(variable: str, values: Sequence[str], *body: str) -> list[str]:
    """Return a loop over text values, with the list of values wrapped at WIDTH."""
    names = [quoted(value) for value in values]
    head = f"for {variable} in ({', '.join(names)}{',' if len(names) == 1 else ''}):"
    if len(head) <= WIDTH:
        return [head, *(f"    {line}" for line in body)]
    wrapped = _wrapped(names)
    return [f"for {variable} in (", *wrapped, "):", *(f"    {line}" for line in body)]


def delete_statements(keys: Sequence[str]) -> list[str]:
    """Return the statements that delete keys of `state`."""
    if len(keys) <= STATEMENTS:
        return [f"del state[{quoted(key)}]" for key in keys]
    return loop("key", keys, "del state[key]")


def _wrapped(names: Sequence[str]) -> list[str]:
    """Return literals with commas after them, in indented lines of at most WIDTH characters."""
    lines: list[str] = []
    for name in names:
        if lines and len(lines[-1]) + len(name) + 2 <= WIDTH:
            lines[-1] += f" {name},"
        else:
            lines.append(f"    {name},")
    return lines


def call(function: str, values: Sequence[str], *arguments: str) -> list[str]:
    """Return a call of a function with a list and further arguments, on one line if it fits, else an item in each."""
    line = f"{function}([{', '.join(values)}], {', '.join(arguments)})"
    if len(line) <= WIDTH:
        return [line]
    return [f"{function}(", "    [", *(f"        {value}," for value in values), "    ],", *_one_by_one(arguments), ")"]


def _one_by_one(arguments: Iterable[str]) -> list[str]:
    return [f"    {argument}," for argument in arguments]


def dict_statement(variable: str, pairs: Iterable[tuple[str, str]]) -> list[str]:
    """Return the statement that assigns a dict of strings, one pair on each line."""
    return [f"{variable} = {{", *(f"    {quoted(key)}: {quoted(value)}," for key, value in pairs), "}"]


def dedented(text: str) -> str:
    return textwrap.dedent(text).strip("\n")
