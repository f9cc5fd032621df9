"""Read and change the working recipe `modelcli.toml`: a model reference and a list of edits.

A change keeps the rest of the file as its author wrote it.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit import TOMLDocument
from tomlkit.exceptions import ParseError, TOMLKitError
from tomlkit.items import Array

from modelcli import edits
from modelcli.edits import Edit
from modelcli.errors import RequestError, SystemFailureError, closest
from modelcli.files import atomic, locks
from modelcli.files.open_folder import read_regular
from modelcli.language import input_texts
from modelcli.language.quoting import quoted
from modelcli.language.references import Source, parse_input_size
from modelcli.model.dtypes import INPUT_DTYPES, dtype_called

FILE_NAME = "modelcli.toml"
KEYS = (
    "model",
    "weights",
    "arch",
    "key",
    "strict",
    "tensors_only",
    "bare_keys",
    "trust",
    "seed",
    "input_size",
    "input_dtype",
    "inputs",
    "edits",
)


@dataclass(frozen=True)
class Recipe:
    """A recipe as read from its file.

    Attributes:
        path: the file.
        source: the model and how to open it.
        edits: the edits, in order.
        locations: file and line of each edit, such as `modelcli.toml:5`, for error messages.
    """

    path: Path
    source: Source
    edits: tuple[Edit, ...] = ()
    locations: tuple[str, ...] = field(default=(), compare=False)


def _dtype(text: str) -> str:
    name = dtype_called(text)
    if name not in INPUT_DTYPES:
        near = closest(name, INPUT_DTYPES, 1)
        raise RequestError(f"no dtype {text!r}" + (f", did you mean {near[0]}?" if near else ""))
    return name


def default_path() -> Path:
    """`$MODELCLI_RECIPE`, or `modelcli.toml` in the current folder."""
    return Path(os.environ.get("MODELCLI_RECIPE") or FILE_NAME)


def require(path: Path) -> None:
    """Raise RequestError if the recipe does not exist. For commands that need a recipe and no model."""
    if not path.exists():
        other = "" if path == default_path() else f" --recipe {quoted(str(path))}"
        raise RequestError(f"there is no recipe: {path} does not exist", f"modelcli load MODEL{other} starts one")


def read(path: Path, *, model: str | None = None) -> Recipe:
    """Read a recipe.

    Args:
        path: the file.
        model: the model reference for a recipe that names none.

    Raises:
        RequestError: the file is missing or is not a recipe. The message lists every unknown key and wrong line.
        SystemFailureError: the file cannot be read.
    """
    text = _read_text(path)
    document: dict[str, Any] = _document(path, text).unwrap()
    lines = text.split("\n")
    problems: list[tuple[int, str]] = []

    def report(key: str, what: str, line: int | None = None) -> None:
        problems.append((line or _line_of_key(lines, key), what))

    for key in document:
        if key not in KEYS:
            near = closest(key, KEYS, 1)
            report(key, f"unknown key {key!r}" + (f", did you mean {near[0]}?" if near else ""))
    values = {key: document.get(key) for key in KEYS}
    if "model" not in document and model is None:
        problems.append(
            (1, 'the recipe names no model: add a line such as model = "alexnet", or pass -m MODEL to apply')
        )
    for key in ("model", "weights", "arch", "key"):
        if key in document and not isinstance(values[key], str):
            report(key, f"{key} must be a string, not {values[key]!r}")
    seed = document.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        report("seed", f"seed must be a whole number from 0 to 2^63 - 1, not {seed!r}")
    for key in ("strict", "tensors_only", "bare_keys", "trust"):
        if not isinstance(document.get(key, True), bool):
            report(key, f"{key} must be true or false, not {document[key]!r}")
    sizes: list[tuple[int, ...]] = []
    dtypes: list[str] = []
    for key, example in (("input_size", "1,3,224,224"), ("input_dtype", "float32")):
        for item in _listed(document.get(key), whole=key == "input_size"):
            try:
                if not isinstance(item, str):
                    raise RequestError(f"{key} must be a string like {example!r}, not {item!r}")
                if key == "input_size":
                    sizes.append(parse_input_size(item))
                else:
                    dtypes.append(_dtype(item))
            except RequestError as error:
                report(key, error.message)
    inputs = [item for item in _listed(document.get("inputs"), whole=False) if isinstance(item, str)]
    try:
        input_texts.parse_all(inputs)
        if len(inputs) < len(_listed(document.get("inputs"), whole=False)):
            raise RequestError(f"inputs must be strings like 'x=1,128:int64', not {document['inputs']!r}")
    except RequestError as error:
        report("inputs", error.message)
    parsed: list[Edit] = []
    locations: list[str] = []
    lines_of_edits = document.get("edits", [])
    if not isinstance(lines_of_edits, list):
        report("edits", f"edits must be a list of strings, not {lines_of_edits!r}")
        lines_of_edits = []
    for line, number in zip(lines_of_edits, _lines_of_edits(lines, lines_of_edits), strict=True):
        try:
            if not isinstance(line, str):
                raise RequestError(f"an edit must be a string, not {line!r}")
            parsed.append(edits.parse(line))
            locations.append(f"{path}:{number}")
        except RequestError as error:
            hint = f" ({error.hint})" if error.hint else ""
            report("edits", f"{error.message}{hint}", number)
    if problems:
        raise RequestError(
            "\n".join(f"{path}:{number}: {what}" for number, what in sorted(problems, key=itemgetter(0)))
        )
    named = document.get("model", model)
    assert named is not None
    source = Source(
        model=named,
        weights=values["weights"],
        arch=values["arch"],
        key=values["key"],
        strict=document.get("strict", True),
        tensors_only=document.get("tensors_only", False),
        bare_keys=document.get("bare_keys", False),
        trust=document.get("trust", False),
        seed=document.get("seed"),
        input_size=tuple(sizes) or None,
        input_dtype=tuple(dtypes),
        inputs=tuple(inputs),
        folder=path.parent,
    )
    return Recipe(path, source, tuple(parsed), tuple(locations))


def _listed(value: object, *, whole: bool) -> list[object]:
    """Return the value of a key as a list. With `whole`, a list of only numbers is one item."""
    if value is None:
        return []
    if not isinstance(value, list) or (whole and value and all(isinstance(item, int) for item in value)):
        return [value]
    return list(value)


def _document(path: Path, text: str) -> TOMLDocument:
    try:
        return tomlkit.parse(text)
    except ParseError as error:
        what = str(error).rpartition(" at line ")[0] or str(error)
        if what.endswith(r"'\x00'") and "\0" not in text:  # tomlkit's own mark of the end
            what = "the text ends in the middle of a value"
        elif "Control characters" in what and "u000a" in what:
            what = "a string has no closing quote"
        line = "".join(text.split("\n")[error.line - 1 : error.line]).strip()
        shown = f": {line if len(line) <= 80 else line[:77] + '...'}" if line else ""
        raise RequestError(
            f"{path}:{error.line}: {_in_words(what)}{shown}",
            'the file is TOML, which needs quotes around strings: model = "alexnet", edits = ["freeze features"]',
        ) from None
    except (TOMLKitError, ValueError, RecursionError) as error:
        raise RequestError(f"{path} cannot be read: {error}") from None


def _in_words(what: str) -> str:
    """Reword a message of tomlkit as part of a sentence: `unexpected 'a'`, `unexpected end of the line`."""
    what = what.replace("Unexpected character: '\\n'", "unexpected end of the line").replace("character: ", "")
    return what[:1].lower() + what[1:].removesuffix(".")


def _line_of_key(lines: Sequence[str], key: str) -> int:
    """Return the number of the line that starts a key; 1 if there is none."""
    for number, line in enumerate(lines, 1):
        if re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*[=\].]|\s*\[+\s*{re.escape(key)}", line):
            return number
    return 1


def _lines_of_edits(lines: Sequence[str], listed: Sequence[object]) -> list[int]:
    """Return the line number of each edit. The search goes in order, so two equal edits get two lines."""
    first = _line_of_key(lines, "edits")
    rest, number, found = "\n".join(lines[first - 1 :]), first, []
    for line in listed:
        word = str(line)
        spellings = {f'"{word}"', f"'{word}'", tomlkit.string(word).as_string()}
        if not isinstance(line, str):  # an error, which is reported with its line too
            spellings = {tomlkit.item(line).as_string()} if isinstance(line, int | float) else set()
        positions = [
            (position, len(spelling)) for spelling in spellings if (position := _position(rest, spelling)) >= 0
        ]
        if not positions:
            found.append(first)
            continue
        position, length = min(positions)
        number += rest.count("\n", 0, position)
        found.append(number)
        rest = rest[position + length :]
    return found


def _position(text: str, spelling: str) -> int:
    """Return the position of the first occurrence of `spelling` outside a comment; -1 if there is none."""
    match = re.search(rf"^[^#\n]*?{re.escape(spelling)}", text, re.MULTILINE)
    return match.end() - len(spelling) if match else -1


def _read_text(path: Path) -> str:
    try:
        return read_regular(path, or_pipe=True).decode("utf-8-sig")
    except FileNotFoundError:
        raise RequestError(
            f"no model is given, and there is no {path}",
            "name one with -m MODEL or $MODELCLI_MODEL, or start a recipe: modelcli load alexnet",
        ) from None
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text: {error}") from None
    except IsADirectoryError:
        raise RequestError(f"{path} is a folder, not a recipe") from None
    except ValueError:
        raise RequestError(f"{str(path)!r} cannot be the name of a file") from None
    except OSError as error:
        raise SystemFailureError(f"cannot read {path}: {error.strerror or error}") from None


def start(path: Path, source: Source) -> None:
    """Write a new recipe without edits. Paths in `source` must already be relative to the recipe's folder."""
    document = tomlkit.document()
    document["model"] = source.model
    for key in ("weights", "arch", "key"):
        if (value := getattr(source, key)) is not None:
            document[key] = value
    if not source.strict:
        document["strict"] = False
    for key in ("tensors_only", "bare_keys", "trust"):
        if getattr(source, key):
            document[key] = True
    document["seed"] = source.seed or 0
    for key, value in _input_of(source).items():
        document[key] = value
    document["edits"] = tomlkit.array()
    _write(path, _encoded(path, tomlkit.dumps(document)))


def _input_of(source: Source) -> dict[str, Any]:
    """Return the recipe keys that state the model's inputs."""
    found: dict[str, Any] = {}
    if source.input_size is not None:
        sizes = [",".join(map(str, shape)) for shape in source.input_size]
        found["input_size"] = sizes[0] if len(sizes) == 1 else sizes
    if source.input_dtype:
        found["input_dtype"] = list(source.input_dtype)
    if source.inputs:
        found["inputs"] = list(source.inputs)
    return found


def append(path: Path, added: Sequence[Edit], stated: Source | None = None) -> None:
    """Add edits to the end of a recipe's list. The rest of the file stays as it is.

    Args:
        path: the recipe.
        added: the edits.
        stated: if given, the recipe's inputs become those of `stated`, because the edits were checked with them.
    """
    _write(path, _appended(path, added, stated))


def check_append(path: Path, added: Sequence[Edit]) -> None:
    """Raise the errors that `append` would raise, without writing anything."""
    _appended(path, added)
    atomic.check_target(path, force=True)


def _state_input(document: TOMLDocument, keys: Mapping[str, Any]) -> None:
    """Change the inputs that a recipe states. New keys come before the edits, whose list may be long."""
    for key in ("input_size", "input_dtype", "inputs"):
        if key in document and key not in keys:
            del document[key]
    new = [key for key in keys if key not in document]
    listed = document.pop("edits", None) if new else None
    for key, value in keys.items():
        document[key] = value
    if listed is not None:
        document["edits"] = listed


def _appended(path: Path, added: Sequence[Edit], stated: Source | None = None) -> bytes:
    """Return the text of a recipe, encoded, with edits added and its inputs changed as `append` says."""
    text = _read_text(path)
    document = _document(path, text)
    if stated is not None:
        _state_input(document, _input_of(stated))
    array = document.setdefault("edits", tomlkit.array())
    assert isinstance(array, Array)
    if "\n" in array.as_string():
        for edit in added:
            array.add_line(str(edit), indent="    ")
        if not array.as_string().rstrip("]").endswith("\n"):
            array.add_line(indent="")
    else:
        array.extend(map(str, added))
        array.multiline(True)
    return _encoded(path, tomlkit.dumps(document), like=text)


def remove_last(path: Path, count: int) -> list[str]:
    """Remove the last `count` edits from a recipe's list, and return them in order."""
    text = _read_text(path)
    document = _document(path, text)
    array = document.get("edits")
    taken: list[str] = []
    if isinstance(array, Array):
        taken.extend(str(array.pop()) for _ in range(min(count, len(array))))
        if not array and "#" not in array.as_string():
            document["edits"] = tomlkit.array()
    _write(path, _encoded(path, tomlkit.dumps(document), like=text))
    return taken[::-1]


def _encoded(path: Path, text: str, *, like: str = "") -> bytes:
    """Encode a recipe, with the line endings of `like`."""
    ending = "\r\n" if "\r\n" in like else "\n"
    text = text.replace("\r\n", "\n").replace("\n", ending)
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise RequestError(f"cannot write {path}: a recipe is UTF-8 text, but a name in it is not") from None


def _write(path: Path, data: bytes) -> None:
    """Replace the file in one step, so that an interruption or a full disk leaves the old one."""
    with atomic.replacing(path, force=True, is_locked=True) as (file, _):
        file.write(data)


#: Seconds to wait for another command that uses the same recipe; it may be checking an edit before it records it.
PATIENCE = 600.0


@contextlib.contextmanager
def locked(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Keep other commands from changing a recipe during the block.

    `waiting` is called if another command uses the recipe. Raises SystemFailureError if that takes too long.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locks.held(path, PATIENCE, waiting))
        except TimeoutError:
            raise SystemFailureError(
                f"another command has been using {path} for {PATIENCE:.0f} s, so the recipe is unchanged",
                "wait for that command or end it, then run this one again",
            ) from None
        yield
