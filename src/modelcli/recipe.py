"""The working recipe, `modelcli.toml`: a model reference and a list of edits, kept as its author wrote it."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.exceptions import ParseError
from tomlkit.items import Array

from modelcli import edits, references
from modelcli.edits import Edit
from modelcli.errors import RequestError, SystemFailureError, closest

FILE_NAME = "modelcli.toml"
KEYS = ("model", "weights", "arch", "key", "strict", "seed", "input_size", "input_dtype", "edits")


@dataclass(frozen=True)
class Source:
    """Where a model comes from: everything that decides its architecture and its numbers.

    `folder` is what relative paths are seen from. `input_size` holds one shape for each input, batch included.
    """

    model: str
    weights: str | None = None
    arch: str | None = None
    key: str | None = None
    seed: int = 0
    input_size: tuple[tuple[int, ...], ...] | None = None
    input_dtype: tuple[str, ...] = ()
    folder: Path = Path()
    strict: bool = True
    trust: bool = False

    def reference(self) -> references.Reference:
        return references.parse(self.model, self.folder)


@dataclass(frozen=True)
class Recipe:
    """A recipe as read from its file."""

    path: Path
    source: Source
    edits: tuple[Edit, ...] = ()


def parse_input_size(text: str) -> tuple[int, ...]:
    """`1,3,224,224` as a shape; also `1x3x224x224`. Raises RequestError on anything else."""
    pieces = re.split(r"[,x]", text.strip().strip("[]()"))
    if not all(re.fullmatch(r"\s*\d{1,9}\s*", piece, re.ASCII) for piece in pieces):
        raise RequestError(f"input size {text!r} is not a list of whole numbers", "write 1,3,224,224, batch included")
    return tuple(int(piece) for piece in pieces)


def default_path() -> Path:
    """`$MODELCLI_RECIPE`, or `modelcli.toml` in the current folder."""
    return Path(os.environ.get("MODELCLI_RECIPE") or FILE_NAME)


def read(path: Path) -> Recipe:
    """Read a recipe. Raises RequestError that lists every unknown key and bad line at once."""
    text = _read_text(path)
    try:
        document: dict[str, Any] = tomlkit.parse(text).unwrap()
    except ParseError as error:
        raise RequestError(f"{path}: {error}", 'the file is TOML: model = "alexnet", edits = [...]') from None
    lines = text.splitlines()
    problems: list[str] = []

    def report(key: str, what: str, word: str | None = None) -> None:
        problems.append(f"{path}:{_line_of(lines, key, word)}: {what}")

    for key in document:
        if key not in KEYS:
            near = closest(key, KEYS, 1)
            report(key, f"unknown key {key!r}" + (f", did you mean {near[0]}?" if near else ""))
    values = {key: document.get(key) for key in KEYS}
    if "model" not in document:
        problems.append(f'{path}:1: no model: the recipe needs a line like model = "alexnet"')
    for key in ("model", "weights", "arch", "key"):
        if key in document and not isinstance(values[key], str):
            report(key, f"{key} is text, not {values[key]!r}")
    seed = document.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        report("seed", f"seed is a whole number from 0 to 2^63 - 1, not {seed!r}")
    strict = document.get("strict", True)
    if not isinstance(strict, bool):
        report("strict", f"strict is true or false, not {strict!r}")
    sizes: list[tuple[int, ...]] = []
    dtypes: list[str] = []
    for key, convert in (("input_size", sizes), ("input_dtype", dtypes)):
        for item in _listed(document.get(key)):
            try:
                if not isinstance(item, str):
                    raise RequestError(f"{key} is text like '1,3,224,224', not {item!r}")
                convert.append(parse_input_size(item) if key == "input_size" else item)  # type: ignore[arg-type]
            except RequestError as error:
                report(key, error.message)
    parsed: list[Edit] = []
    lines_of_edits = document.get("edits", [])
    if not isinstance(lines_of_edits, list):
        report("edits", f"edits is a list of lines, not {lines_of_edits!r}")
        lines_of_edits = []
    for line in lines_of_edits:
        try:
            if not isinstance(line, str):
                raise RequestError(f"an edit is a line of text, not {line!r}")
            parsed.append(edits.parse(line))
        except RequestError as error:
            hint = f" ({error.hint})" if error.hint else ""
            report("edits", f"{error.message}{hint}", str(line))
    if problems:
        raise RequestError("\n".join(problems))
    source = Source(
        model=document["model"],
        weights=values["weights"],
        arch=values["arch"],
        key=values["key"],
        strict=strict,
        seed=seed,
        input_size=tuple(sizes) or None,
        input_dtype=tuple(dtypes),
        folder=path.parent,
    )
    return Recipe(path, source, tuple(parsed))


def _listed(value: object) -> list[object]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def _line_of(lines: Sequence[str], key: str, word: str | None) -> int:
    """The line that holds an edit, or that starts a key; 1 where neither is found."""
    if word is not None:
        spellings = (word, word.replace("\\", "\\\\").replace('"', '\\"'))
        for number, line in enumerate(lines, 1):
            if any(f'"{spelling}"' in line or f"'{spelling}'" in line for spelling in spellings):
                return number
    for number, line in enumerate(lines, 1):
        if re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*[=\].]|\s*\[+{re.escape(key)}", line):
            return number
    return 1


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RequestError(
            f"no model is given, and there is no {path}",
            "name one with -m MODEL or $MODELCLI_MODEL, or start a recipe: modelcli load alexnet",
        ) from None
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text: {error}") from None
    except IsADirectoryError:
        raise RequestError(f"{path} is a folder, not a recipe") from None


def start(path: Path, source: Source) -> None:
    """Write a new recipe without edits. Paths in `source` are already as seen from the recipe's folder."""
    document = tomlkit.document()
    document["model"] = source.model
    for key in ("weights", "arch", "key"):
        if (value := getattr(source, key)) is not None:
            document[key] = value
    if not source.strict:
        document["strict"] = False
    document["seed"] = source.seed
    if source.input_size is not None:
        sizes = [",".join(map(str, shape)) for shape in source.input_size]
        document["input_size"] = sizes[0] if len(sizes) == 1 else sizes
    if source.input_dtype:
        document["input_dtype"] = list(source.input_dtype)
    document["edits"] = tomlkit.array()
    _write(path, tomlkit.dumps(document))


def append(path: Path, added: Sequence[Edit]) -> None:
    """Add edits to the end of a recipe's list; all else in the file stays as it is."""
    document = tomlkit.parse(_read_text(path))
    array = document.setdefault("edits", tomlkit.array())
    assert isinstance(array, Array)
    lines = [str(line) for line in array.unwrap()]
    for edit in added:
        array.add_line(str(edit), indent="    ") if lines or "\n" in array.as_string() else array.append(str(edit))
        lines.append(str(edit))
    if "\n" not in array.as_string():
        array.multiline(True)
    elif not array.as_string().rstrip("]").endswith("\n"):
        array.add_line(indent="")
    _write(path, tomlkit.dumps(document))


def take_back(path: Path, count: int) -> list[str]:
    """Remove the last `count` edits from a recipe's list, and give them back in order."""
    document = tomlkit.parse(_read_text(path))
    array = document.get("edits")
    taken: list[str] = []
    if isinstance(array, Array):
        taken.extend(str(array.pop()) for _ in range(min(count, len(array))))
        if not array and "#" not in array.as_string():
            document["edits"] = tomlkit.array()
    _write(path, tomlkit.dumps(document))
    return taken[::-1]


def _write(path: Path, text: str) -> None:
    """Replace the file in one step, so that an interrupted run leaves the old one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise SystemFailureError(f"cannot write {path}: {error.strerror or error}") from None
    try:
        with open(handle, "w", encoding="utf-8", newline="\n") as file:  # noqa: PTH123
            file.write(text)
        with contextlib.suppress(OSError):
            mode = path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask()
            os.chmod(name, mode)  # noqa: PTH101
        os.replace(name, path)  # noqa: PTH105
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(name)  # noqa: PTH108
        if isinstance(error, OSError):
            raise SystemFailureError(f"cannot write {path}: {error.strerror or error}") from None
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
