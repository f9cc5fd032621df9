"""References as plain data: the kinds of models that a text can name. `modelcli.resolve` interprets a text."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelcli.errors import ModelcliError, RequestError, SystemFailureError, closest

if TYPE_CHECKING:
    from modelcli.language.expressions import Call  # imported only if needed: the path of a file needs no expressions

#: A longer text is not a path, because no system has longer paths.
MAX_PATH = 4096


@dataclass(frozen=True)
class NamedModel:
    """A model that a provider makes: `alexnet`, `Linear(2,3)`, or with the provider's prefix `timm:resnet50`."""

    call: Call
    prefix: str | None = None

    def __str__(self) -> str:
        text = str(self.call) if self.call.args or self.call.kwargs else self.call.name
        return text if self.prefix is None else f"{self.prefix}:{text}"


@dataclass(frozen=True)
class PythonObject:
    """A class, function or instance in a Python file or an importable module. Loading it runs its code.

    Attributes:
        source: the file or module, as the user wrote it.
        name: the name of the object in it.
        call: the call of the object; None if it is not called.
        file: the path of the file; None for a module.
    """

    source: str
    name: str
    call: Call | None
    file: Path | None = None

    def __str__(self) -> str:
        text = str(self.call) if self.call else self.name
        return f"{self.source}:{text}"

    def relative_to(self, folder: Path, base: Path = Path()) -> str:
        """Return the text of this reference with relative paths as seen from a folder.

        Args:
            folder: the folder.
            base: the folder from which the paths in its arguments are seen now.
        """
        call = None if self.call is None else _moved(self.call, base.resolve(), folder.resolve())
        if self.file is None:
            return str(PythonObject(self.source, self.name, call))
        try:
            path = os.path.relpath(self.file.resolve(), folder.resolve())
        except ValueError:  # another drive on Windows
            path = str(self.file)
        return str(PythonObject(path.replace(os.sep, "/"), self.name, call, self.file))

    def shown_from(self, folder: Path) -> str:
        """Return the text of this reference as seen from a folder, for a message, without reading from the disk."""
        if self.file is None:
            return str(self)
        try:
            path = os.path.relpath(self.file, folder)
        except ValueError:  # another drive on Windows
            path = str(self.file)
        return str(replace(self, source=path.replace(os.sep, "/")))


def _moved(value: Any, base: Path, folder: Path) -> Any:
    """Return a value of a call with each relative path that exists in `base` written as seen from `folder`."""
    from modelcli.language.expressions import Call

    if isinstance(value, Call):
        args = tuple(_moved(item, base, folder) for item in value.args)
        return replace(value, args=args, kwargs={key: _moved(item, base, folder) for key, item in value.kwargs.items()})
    if type(value) in (list, tuple):
        return type(value)(_moved(item, base, folder) for item in value)
    if type(value) is dict:
        return {key: _moved(item, base, folder) for key, item in value.items()}
    if type(value) is not str or not re.search(r"[/\\]|\.\w", value):
        return value  # `resnet18` is a name, even if a folder has the same name
    if "\0" in value or len(value) > MAX_PATH or Path(value).is_absolute() or not exists(base / value):
        return value
    try:
        path = os.path.relpath(base / value, folder).replace(os.sep, "/")
    except ValueError:  # another drive on Windows
        return str(base / value)
    return path


@dataclass(frozen=True)
class CheckpointFile:
    """A file or folder on disk."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)


Reference = NamedModel | PythonObject | CheckpointFile


def exists(path: Path) -> bool:
    """Whether there is a file or folder of this path; False for a path that is too long or not valid."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def missing_file(path: Path, text: str) -> ModelcliError:
    """Return the error for a missing or inaccessible path. Its hint lists files with similar names."""
    folder = path.parent
    try:
        path.stat()
    except PermissionError as error:
        message = f"cannot read {text}: {error.strerror or error}"
        return SystemFailureError(
            message, f"you may not enter {folder} or a folder above it: chmod u+x allows it for your own folders"
        )
    except (OSError, ValueError):
        pass
    if not exists(folder):
        return RequestError(f"no such file: {text}", f"the folder {folder} does not exist")
    try:
        near = closest(path.name, [entry.name for entry in folder.iterdir() if entry.name != path.name])
    except (OSError, ValueError):
        near = []
    return RequestError(f"no such file: {text}", f"{_there(folder, len(near))}: {', '.join(near)}" if near else None)


def _there(folder: Path, count: int) -> str:
    """Return how a list of files in a folder begins: `here are`, `in runs/`."""
    if folder == Path():
        return "here is" if count == 1 else "here are"
    return f"in {folder}{os.sep}"


@dataclass(frozen=True)
class Source:
    """Where a model comes from: everything that decides its architecture and its values.

    Attributes:
        model: the reference.
        weights, arch, key, seed: the values of the options of these names.
        input_size: the shape of each input, batch included.
        input_dtype: the dtypes of the inputs.
        inputs: the texts of inputs that are stated in another way: see `input_texts`.
        folder: the folder from which relative paths are seen.
        strict: whether the keys of a checkpoint must match the architecture.
        trust: whether code that a record names may run.
        tensors_only: whether to drop objects of foreign classes.
        bare_keys: whether to ignore the record of a checkpoint.
    """

    model: str
    weights: str | None = None
    arch: str | None = None
    key: str | None = None
    seed: int | None = None
    input_size: tuple[tuple[int, ...], ...] | None = None
    input_dtype: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    folder: Path = Path()
    strict: bool = True
    trust: bool = False
    tensors_only: bool = False
    bare_keys: bool = False

    def without_input(self) -> Source:
        """Return the same source without the stated inputs."""
        return replace(self, input_size=None, input_dtype=(), inputs=())


#: The units of sizes in bytes: powers of ten, as for disks and Hugging Face; those with an i are powers of two.
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {unit[0]: size for unit, size in _UNITS.items() if len(unit) == 2} | {
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def parse_bytes(text: str) -> int:
    """Return the bytes of `5GB`, `500MB`, `2GiB` or a plain number. Raises RequestError for any other text."""
    match = re.fullmatch(r"\s*(\d{1,12}(?:\.\d{1,6})?)\s*([A-Za-z]*)\s*", text, re.ASCII)
    if match is None or match[2].upper() not in _UNITS or (size := int(float(match[1]) * _UNITS[match[2].upper()])) < 1:
        raise RequestError(f"{text!r} is not a size in bytes", "write 5GB, 500MB or 2GiB")
    return size


#: The units of counts: thousands, millions, billions.
_COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}


def parse_count(text: str) -> int:
    """Return the number of `60M`, `1.5B`, `200K` or a plain number (`60_000_000`). Raises RequestError otherwise."""
    match = re.fullmatch(r"\s*(\d[\d_,]{0,20}(?:\.\d{1,6})?)\s*([A-Za-z]?)\s*", text, re.ASCII)
    if match is None or match[2].upper() not in _COUNTS:
        raise RequestError(f"{text!r} is not a count", "write 60M, 1.5B, 200K or 61100840")
    digits, unit = re.sub("[_,]", "", match[1]), _COUNTS[match[2].upper()]
    return round(float(digits) * unit) if "." in digits else int(digits) * unit


def parse_input_size(text: str) -> tuple[int, ...]:
    """Return the shape of `1,3,224,224` or `1x3x224x224`. Raises RequestError for any other text."""
    pieces = re.split(r"[,x]", text.strip().strip("[]()"))
    if not all(re.fullmatch(r"\s*\d{1,9}\s*", piece, re.ASCII) for piece in pieces):
        raise RequestError(f"input size {text!r} is not a list of whole numbers", "write 1,3,224,224, batch included")
    return tuple(int(piece) for piece in pieces)
