"""References: the text that names a model, and which kind it is. Nothing is imported or opened to find that out."""

from __future__ import annotations

import ast
import functools
import os
import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import Any

from modelcli import installed
from modelcli.errors import ModelcliError, RequestError, SystemFailureError, UnsafeError, closest
from modelcli.language import expressions
from modelcli.language.expressions import Call
from modelcli.wording import listed

#: No system has longer paths: longer text is none.
MAX_PATH = 4096
#: How files of checkpoints end, in small letters: `has_checkpoint_suffix` takes any.
CHECKPOINT_SUFFIXES = frozenset(
    {".pth", ".pt", ".safetensors", ".ckpt", ".bin", ".tar", ".pkl", ".pickle", ".pt2", ".distcp"}
)


def has_checkpoint_suffix(path: str | Path) -> bool:
    """Whether a name ends as those of checkpoints do, in capitals or small letters: `W.PTH`, `w.pth`."""
    return Path(path).suffix.lower() in CHECKPOINT_SUFFIXES


@dataclass(frozen=True)
class Installed:
    """A torchvision builder or a module expression: `alexnet`, `resnet18(num_classes=10)`, `Linear(2,3)`."""

    call: Call

    @property
    def runs_only_installed_code(self) -> bool:
        """Whether it names nothing but torch's and torchvision's own: no code of the user's decides what it is."""
        return all(map(is_installed_name, expressions.names_in(self.call)))

    def __str__(self) -> str:
        return expressions.to_text(self.call) if self.call.args or self.call.kwargs else self.call.name


@dataclass(frozen=True)
class PythonObject:
    """A class, function or instance in a file or an importable module. `call` is None where nothing is called.

    To follow one runs its code.
    """

    source: str
    name: str
    call: Call | None
    file: Path | None = None

    def __str__(self) -> str:
        text = expressions.to_text(self.call) if self.call else self.name
        return f"{self.source}:{text}"

    def relative_to(self, folder: Path, base: Path = Path()) -> str:
        """The text of this reference as seen from a folder; paths in its arguments are seen from `base` now."""
        call = None if self.call is None else _moved(self.call, base.resolve(), folder.resolve())
        if self.file is None:
            return str(PythonObject(self.source, self.name, call))
        try:
            path = os.path.relpath(self.file.resolve(), folder.resolve())
        except ValueError:  # another drive on Windows
            path = str(self.file)
        return str(PythonObject(path.replace(os.sep, "/"), self.name, call, self.file))

    def told_from(self, folder: Path) -> str:
        """The text of this reference as seen from a folder, for a message: nothing on the disk is looked at for it."""
        if self.file is None:
            return str(self)
        try:
            path = os.path.relpath(self.file, folder)
        except ValueError:  # another drive on Windows
            path = str(self.file)
        return str(replace(self, source=path.replace(os.sep, "/")))


def _moved(value: Any, base: Path, folder: Path) -> Any:
    """A value of a call with its relative paths, those that exist as seen from `base`, as seen from `folder`."""
    if isinstance(value, Call):
        args = tuple(_moved(item, base, folder) for item in value.args)
        return replace(value, args=args, kwargs={key: _moved(item, base, folder) for key, item in value.kwargs.items()})
    if type(value) in (list, tuple):
        return type(value)(_moved(item, base, folder) for item in value)
    if type(value) is dict:
        return {key: _moved(item, base, folder) for key, item in value.items()}
    if type(value) is not str or not re.search(r"[/\\]|\.\w", value):
        return value  # `resnet18` is a name, though a folder may be called so
    if "\0" in value or len(value) > MAX_PATH or Path(value).is_absolute() or not _exists(base / value):
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


#: Where torchvision has its models, and the modules that they are made of.
MODELS = "torchvision.models"


def is_installed_name(dotted: str) -> bool:
    """Whether a name is one that `torch.nn`, `torchvision.ops`, `torchvision.models` or torch itself has by that name.

    Only such a name may be followed for a file's sake: it is looked up in what is loaded, and imports nothing.
    """
    package, _, name = dotted.replace(":", ".").rpartition(".")
    is_model = package == MODELS or package.startswith(f"{MODELS}.")
    return (is_model or package in ("", "torch", "nn", "torch.nn", "torchvision.ops")) and bool(name)


Reference = Installed | PythonObject | CheckpointFile


def recorded(text: str, folder: Path, *, trust: bool) -> Reference:
    """The reference that a record in a file in `folder` holds.

    Without `trust` no path that it names is looked at: the name of a file on another machine would be asked for there.
    With it a Python file is looked for, but only by a path from `folder`. Raises RequestError for what is no reference,
    UnsafeError for a checkpoint, and for Python code at a path that does not start from the folder.
    """
    reference = _parsed(text, folder, look=False)
    if isinstance(reference, CheckpointFile):
        raise UnsafeError(f"a record may not name another file as its architecture, and it names {text}", _ARCH)
    if isinstance(reference, PythonObject) and reference.file is not None:
        if _is_absolute(reference.source):
            raise UnsafeError(f"a record may not name code outside its folder, and it names {reference.source}", _ARCH)
        if trust:
            return parse(text, folder)
    return reference


_ARCH = "--arch names the architecture instead"


def _is_absolute(path: str) -> bool:
    """Whether a path starts at a root, at a drive, or on another machine, on any system."""
    return path.startswith(("/", "\\")) or bool(PureWindowsPath(path).drive)


def parse(text: str, folder: Path | None = None) -> Reference:
    """Tell what a reference is. Relative paths are seen from `folder`, by default the current one.

    In this order: a bare word is a builder or a class of `torch.nn`; an existing path; `file.py:Class(...)` or
    `module:name`; a builder or a module expression. Raises RequestError for what is none of these.
    """
    return _parsed(text, folder or Path(), look=True)


def _parsed(text: str, folder: Path, *, look: bool) -> Reference:
    """The same; without `look` by the text alone: no path in it is looked at, and one with a suffix is a file."""
    if not text.strip():
        raise RequestError("an empty model reference", "name one: alexnet, nets.py:Net(3,2), best.pth")
    path = folder / text
    if _is_bare_word(text) and (not look or not _exists(path) or _is_installed_model(text)):
        return Installed(Call(text))
    if look and "\0" not in text and len(text) < MAX_PATH and _exists(path):
        if path.suffix == ".py" and path.is_file():
            raise _names_no_class(text, path)
        return CheckpointFile(path)
    if (split := _split_object(text, folder, look=look)) is not None:
        return _installed_object(*split) or _python_object(*split, folder, look=look)
    if not look and (has_checkpoint_suffix(text) or re.search(r"[/\\]", text.partition("(")[0])):
        return CheckpointFile(path)
    if has_checkpoint_suffix(text) or text.endswith(("/", os.sep, ".toml")):
        raise missing_file(path, text)
    if Path(text).suffix == ".py" and "(" not in text:
        raise missing_file(path, text)
    if re.search(r"[/\\]", text.partition("(")[0]):
        raise missing_file(path, text)
    if re.fullmatch(r"[\w.+-]+", text) and not re.fullmatch(r"[A-Za-z_][\w.]*", text, re.ASCII):
        return Installed(Call(text))  # `bert-base-uncased`: no expression, and no model of that name either
    call = expressions.parse(text)
    # Parentheses may stand around `module:build(3)`.
    return _parsed(str(call), folder, look=look) if ":" in call.name else Installed(call)


def _is_bare_word(text: str) -> bool:
    return re.fullmatch(r"[A-Za-z_]\w*", text, re.ASCII) is not None


@functools.cache
def _is_installed_model(word: str) -> bool:
    """Whether a word is a builder of torchvision's or a class of `torch.nn`: then a file of that name needs a path.

    Their sources are read, which takes some 30 ms, so this is asked only where there is such a file.
    """
    return word in installed.builder_names() or word in installed.module_names()


def hidden_file_note(text: str, folder: Path) -> str | None:
    """What to tell where a bare word is a builder, and a file or folder of the same name lies there as well."""
    if not _is_bare_word(text) or not _exists(folder / text) or not _is_installed_model(text):
        return None
    what = "folder" if (folder / text).is_dir() else "file"
    return f"{text} is the model of that name; the {what} that is called so too is named by ./{text}"


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that is too long, or that no file can have
        return False


def _split_object(text: str, folder: Path, *, look: bool) -> tuple[str, str] | None:
    """Cut `nets.py:Net(3)` at its colon; a drive letter's colon is none, nor one inside the arguments.

    A file that exists is cut off first: folders may have colons and parentheses in their names.
    """
    for match in re.finditer(r"\.py:", text[:MAX_PATH]):
        if not look or _exists(folder / text[: match.end() - 1]):
            return text[: match.end() - 1], text[match.end() :]
    start = 2 if re.match(r"[A-Za-z]:[\\/]", text) else 0
    colon = text.find(":", start)
    parenthesis = text.find("(")
    if colon < 0 or 0 <= parenthesis < colon:
        return None
    return text[:colon], text[colon + 1 :]


def _installed_object(source: str, target: str) -> Installed | None:
    """A class of torch's or torchvision's own that is written with a colon: `torchvision.ops:MLP(4,[4,4])`."""
    name = target.partition("(")[0].strip()
    if source.split(".")[0] not in ("torch", "torchvision") or not is_installed_name(f"{source}:{name}"):
        return None
    if not re.fullmatch(r"[A-Z]\w*", name, re.ASCII):  # what begins otherwise is a function
        return None
    call = expressions.parse(target)
    return Installed(Call(f"{source}.{name}", call.args, call.kwargs))


def _python_object(source: str, target: str, folder: Path, *, look: bool) -> PythonObject:
    call = None
    if "(" in target:
        call = expressions.parse(target)
        name = call.name
    else:
        name = target.strip()
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name, re.ASCII):
        raise RequestError(
            f"{name!r} after the colon of {source}: is not a name",
            "write nets.py:Net(3,2) or package.module:build()",
        )
    if source.endswith(".py"):
        path = folder / source
        if look and not _exists(path):
            raise missing_file(path, source)
        return PythonObject(source, name, call, path)
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", source, re.ASCII):
        raise RequestError(
            f"{source!r} before the colon is neither a Python file nor an importable module",
            "write nets.py:Net(3,2) or package.module:build()",
        )
    return PythonObject(source, name, call)


def names_a_file(text: str, folder: Path) -> bool:
    """Whether the value of `--weights` is a path, as seen from `folder`, and not a name of torchvision's.

    It is one where it has a separator or the suffix of a checkpoint, or where a file or folder is called so and no
    weights are.
    """
    if has_checkpoint_suffix(text) or "/" in text or "\\" in text:
        return True
    return text not in ("none", "DEFAULT") and _exists(folder / text) and text not in installed.weights_names()


def names_a_model(text: str) -> bool:
    """Whether text in the place of a recipe names a model: a checkpoint, Python, or what is no file at all."""
    path = Path(text)
    if len(text) < MAX_PATH and "\0" not in text and _exists(path):
        return path.is_dir() or has_checkpoint_suffix(path) or path.suffix == ".py"
    try:
        return path.suffix != ".toml" and not isinstance(parse(text), CheckpointFile)
    except (RequestError, SystemFailureError):
        return has_checkpoint_suffix(path)


def missing_file(path: Path, text: str) -> ModelcliError:
    """The error for a path that is not there, with the names near it that are, or that may not be looked at."""
    folder = path.parent
    try:
        path.stat()
    except PermissionError as error:
        told = f"cannot read {text}: {error.strerror or error}"
        return SystemFailureError(told, f"{folder}, or a folder above it, is not open to you: chmod u+x opens your own")
    except (OSError, ValueError):
        pass
    if not _exists(folder):
        return RequestError(f"no such file: {text}", f"the folder {folder} does not exist")
    try:
        near = closest(path.name, [entry.name for entry in folder.iterdir() if entry.name != path.name])
    except (OSError, ValueError):
        near = []
    return RequestError(f"no such file: {text}", f"{_there(folder, len(near))}: {', '.join(near)}" if near else None)


def _there(folder: Path, count: int) -> str:
    """How a list of files begins that lie in a folder: `here are`, `in runs/`."""
    if folder == Path():
        return "here is" if count == 1 else "here are"
    return f"in {folder}{os.sep}"


def _names_no_class(text: str, path: Path) -> RequestError:
    """`nets.py` alone: list the classes in it, read without running them."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return RequestError(f"{text} is not valid Python: {error}")
    names = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    if not names:
        return RequestError(f"{text} names no class, and the file has none", f"write {text}:build(...)")
    classes = listed([f"{text}:{name}" for name in names], 12)
    return RequestError(f"{text} names a file, not a class in it", f"classes in it: {classes}")


@dataclass(frozen=True)
class Source:
    """Where a model comes from: everything that decides its architecture and its numbers.

    `folder` is what relative paths are seen from. `input_size` holds one shape for each input, batch included, and
    `inputs` the texts of those that are stated otherwise: see `input_texts`.
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

    def reference(self) -> Reference:
        return parse(self.model, self.folder)

    def reference_folder(self) -> Path:
        """The folder that a record in this model's file sees paths from."""
        return (self.folder / self.model).parent

    def without_input(self) -> Source:
        """The same source without what was stated of its input."""
        return replace(self, input_size=None, input_dtype=(), inputs=())


#: What a size in bytes may end in, as disks and Hugging Face count: in powers of ten, those with an i in powers of two.
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {unit[0]: size for unit, size in _UNITS.items() if len(unit) == 2} | {
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def parse_bytes(text: str) -> int:
    """`5GB`, `500MB`, `2GiB` or a plain number as bytes. Raises RequestError on anything else."""
    match = re.fullmatch(r"\s*(\d{1,12}(?:\.\d{1,6})?)\s*([A-Za-z]*)\s*", text, re.ASCII)
    if match is None or match[2].upper() not in _UNITS or (size := int(float(match[1]) * _UNITS[match[2].upper()])) < 1:
        raise RequestError(f"{text!r} is no size in bytes", "write 5GB, 500MB or 2GiB")
    return size


#: What a count may end in: thousands, millions, billions.
_COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}


def parse_count(text: str) -> int:
    """`60M`, `1.5B`, `200K` or a plain number (`60_000_000`). Raises RequestError on anything else."""
    match = re.fullmatch(r"\s*(\d[\d_,]{0,20}(?:\.\d{1,6})?)\s*([A-Za-z]?)\s*", text, re.ASCII)
    if match is None or match[2].upper() not in _COUNTS:
        raise RequestError(f"{text!r} is no count", "write 60M, 1.5B, 200K or 61100840")
    digits, unit = re.sub("[_,]", "", match[1]), _COUNTS[match[2].upper()]
    return round(float(digits) * unit) if "." in digits else int(digits) * unit


def parse_input_size(text: str) -> tuple[int, ...]:
    """`1,3,224,224` as a shape; also `1x3x224x224`. Raises RequestError on anything else."""
    pieces = re.split(r"[,x]", text.strip().strip("[]()"))
    if not all(re.fullmatch(r"\s*\d{1,9}\s*", piece, re.ASCII) for piece in pieces):
        raise RequestError(f"input size {text!r} is not a list of whole numbers", "write 1,3,224,224, batch included")
    return tuple(int(piece) for piece in pieces)
