"""The text of a script while it is written: its imports, its statements, and the words of Python for plain values.

Everything that comes from a file or a command line goes in as a literal or as a comment on one line, so that no name
can become a statement.
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

WIDTH = 110
#: As many statements of one kind as stand one below the other; more become a loop.
STATEMENTS = 4
NN = "from torch import nn"
#: What a script imports, defines and assigns itself: nothing of the user's can be called so in it.
_IMPORTS = frozenset({"torch", "nn", "init", "os", "sys", "runpy"})
_HELPERS = frozenset({"keep_weights", "sum_channels", "mean_channels", "cast_views"})
_VARIABLES = frozenset({"model", "state", "checkpoint", "new", "name", "names", "key", "items", "at", "children"})


@functools.cache
def _taken() -> frozenset[str]:
    """All of these, and the names that a script gets from a provider or a format."""
    of_providers = (provider.script_names for provider in (*providers.built_in(), *providers.loaded()))
    of_formats = (format_.script_names for format_ in formats.every())
    return (_IMPORTS | _HELPERS | _VARIABLES | frozenset(dir(builtins))).union(*of_providers, *of_formats)


class InexpressibleError(Exception):
    """Something that plain PyTorch statements do not do; the text says what and why."""


class SourceText:
    """A script that grows. `own` are names of the user's code and what gives them; `notes` say what is left out."""

    def __init__(self) -> None:
        self.imports: set[str] = set()
        self.folders: dict[str, None] = {}
        self.own: dict[str, str] = {}
        self.helpers: dict[str, None] = {}
        self.body: list[str] = []
        self.notes: list[str] = []

    def write(self, *lines: str) -> None:
        self.body += lines

    def paragraph(self, title: str | None = None) -> None:
        """Start a new paragraph, below a comment."""
        if self.body and self.body[-1]:
            self.body.append("")
        if title is not None:
            self.body.append(f"# {on_one_line(title)}")

    def refuse(self, what: str, why: str) -> None:
        """Say that something is not in the script, and stop it there: what it would save is something else."""
        self.notes.append(f"the script stops at {what!r}: {why}")
        self.write(f"# {on_one_line(why)}", f"raise NotImplementedError({quoted(what)})")

    def whole(self) -> str:
        """The whole script."""
        imports = {"import torch"} | self.imports
        lines = []
        if self.folders:
            imports |= {"import sys"}
        standard = [line for line in imports if line.split()[1] in _STANDARD]
        if standard:
            lines += [*sorted(standard), ""]
        lines += _in_order(imports - set(standard))
        if self.folders:
            lines += ["", *(f"sys.path.insert(0, {quoted(folder)})" for folder in self.folders)]
        if self.own:
            run = [line for line in self.own.values() if not line.startswith(("import ", "from "))]
            lines += ["", *_in_order(set(self.own.values()) - set(run)), *sorted(run)]
        for helper in self.helpers:
            lines += ["", "", *helper.splitlines()]
        if self.helpers:
            lines += [""]
        return "\n".join([*lines, "", *self.body]) + "\n"

    def value(self, value: Any) -> str:
        """A plain value as Python writes it, modules as the calls that make them."""
        match value:
            case Call(name=name, args=args, kwargs=kwargs):
                return f"{self.class_of(name)}({self.arguments(args, _written_out(name, kwargs))})"
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
        """The arguments of a call, without its parentheses."""
        return ", ".join([*map(self.value, args), *(f"{key}={self.value(item)}" for key, item in kwargs.items())])

    def class_of(self, dotted: str) -> str:
        """The name of a class in the script, imported there: `nn.Linear`, `ops.Permute`, `nets.Net`."""
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
        """What a module of the user's is called in the script, imported there."""
        first = module.partition(".")[0]
        if self._is_free(first, f"import {first}"):
            self.own[module] = f"import {module}"
            return module
        name = _for_own(module)
        self.own[name] = f"import {module} as {name}"
        return name

    def own_object(self, module: str, name: str) -> str:
        """What a class, function or instance in a module of the user's is called in the script, imported there."""
        line = f"from {module} import {name}"
        if self._is_free(name, line):
            self.own[name] = line
            return name
        other = _for_own(name)
        self.own[other] = f"{line} as {other}"
        return other

    def own_file(self, path: str, name: str) -> str:
        """What the names in a file that cannot be imported are called in the script, a dict; run before the rest.

        `name` is what the file is called.
        """
        self.imports.add("import runpy")
        variable = re.sub(r"\W", "_", name, flags=re.ASCII)
        line = f"runpy.run_path({quoted(path)})"
        if not is_name(variable) or not self._is_free(variable, f"{variable} = {line}"):
            variable = _for_own(variable)
        self.own[variable] = f"{variable} = {line}"
        return variable

    def _is_free(self, name: str, line: str) -> bool:
        """Whether nothing else has a name. A package is there for several of its modules."""
        others = [given for known, given in self.own.items() if known.partition(".")[0] == name]
        return name not in _taken() and all(given == line or given.startswith(f"{line}.") for given in others)


_STANDARD = ("os", "sys", "runpy")


def _for_own(text: str) -> str:
    """A name for something of the user's that cannot have its own."""
    return f"own_{text.replace('.', '_')}"


def _in_order(lines: Iterable[str]) -> list[str]:
    """Imports as isort has them: plain ones first, each kind by its name."""
    return sorted(lines, key=lambda line: (line.startswith("from"), line))


def quoted(text: str) -> str:
    """Text as a literal of Python in ASCII, in double quotes where it has none itself."""
    literal = ascii(text)
    return f'"{literal[1:-1]}"' if literal[0] == "'" and '"' not in literal else literal


def seen(path: Path) -> str:
    """A path as a script has it: from the current folder, with forward slashes."""
    if not path.is_absolute():
        return os.path.normpath(path).replace(os.sep, "/")
    return path.as_posix()


def _written_out(dotted: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a call as plain Python has to give them: see `LiveProvider.arguments_in_script`."""
    package, _, name = dotted.replace(":", ".").rpartition(".")
    owner = owner_of(package) if package and is_known_name(dotted) else None
    return kwargs if owner is None else half_of(owner).arguments_in_script(package, name, kwargs)


def on_one_line(text: str) -> str:
    """Text for a comment: what is not printable is escaped."""
    return "".join(c if c.isprintable() and c.isascii() else c.encode("unicode_escape").decode() for c in text)


def is_name(text: str) -> bool:
    """Whether text can stand after a dot."""
    return text.isascii() and text.isidentifier() and not keyword.iskeyword(text)


def loop(variable: str, values: Sequence[str], *body: str) -> list[str]:
    """A loop over names, which stand in as many lines as they take."""
    names = [quoted(value) for value in values]
    head = f"for {variable} in ({', '.join(names)}{',' if len(names) == 1 else ''}):"
    if len(head) <= WIDTH:
        return [head, *(f"    {line}" for line in body)]
    wrapped = _wrapped(names)
    return [f"for {variable} in (", *wrapped, "):", *(f"    {line}" for line in body)]


def deleted(keys: Sequence[str]) -> list[str]:
    """What takes keys out of `state`."""
    if len(keys) <= STATEMENTS:
        return [f"del state[{quoted(key)}]" for key in keys]
    return loop("key", keys, "del state[key]")


def _wrapped(names: Sequence[str]) -> list[str]:
    """Literals with commas after them, indented, in lines of the script's width."""
    lines: list[str] = []
    for name in names:
        if lines and len(lines[-1]) + len(name) + 2 <= WIDTH:
            lines[-1] += f" {name},"
        else:
            lines.append(f"    {name},")
    return lines


def call(function: str, values: Sequence[str], *arguments: str) -> list[str]:
    """A call of a function with a list and further arguments: on one line, or an item of the list a line."""
    line = f"{function}([{', '.join(values)}], {', '.join(arguments)})"
    if len(line) <= WIDTH:
        return [line]
    return [f"{function}(", "    [", *(f"        {value}," for value in values), "    ],", *_one_by_one(arguments), ")"]


def _one_by_one(arguments: Iterable[str]) -> list[str]:
    return [f"    {argument}," for argument in arguments]


def mapping(variable: str, pairs: Iterable[tuple[str, str]]) -> list[str]:
    """A dict of names, a pair a line."""
    return [f"{variable} = {{", *(f"    {quoted(key)}: {quoted(value)}," for key, value in pairs), "}"]


def dedented(text: str) -> str:
    return textwrap.dedent(text).strip("\n")
