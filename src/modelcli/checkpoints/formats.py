"""The registry of checkpoint formats: one line each, imported when it is asked for.

Other packages register one by the entry point group `modelcli.formats`: an entry point names a subclass of
`checkpoints.format.Format`. Entry points are read where no built-in format recognises a file or a suffix, and where all
formats are listed: in `--help`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from modelcli.checkpoints.format import Candidate, Format
from modelcli.errors import FileFormatError, ModelcliError, RequestError, SystemFailureError, did_you_mean
from modelcli.wording import listed

if TYPE_CHECKING:
    from modelcli.checkpoints.contents import Contents
    from modelcli.plug_ins import PlugIn

#: The built-in formats of files, in the order in which they are tried and listed in help.
_FILES = (
    "modelcli.checkpoints.torch_programs:TorchScript",
    "modelcli.checkpoints.torch_programs:TorchExport",
    "modelcli.checkpoints.torch_pickle:TorchSave",
    "modelcli.checkpoints.safetensors:Safetensors",
    "modelcli.checkpoints.plain_pickle:PlainPickle",
)
#: The built-in formats of folders, in the order in which they are tried.
_FOLDERS = (
    "modelcli.checkpoints.sharded:ShardedFolder",
    "modelcli.checkpoints.distributed:DistributedCheckpoint",
)
#: The same for folders without a file that only describes the others, so that no file alone stands for the folder.
_FOLDERS_WITHOUT_INDEX = (
    "modelcli.checkpoints.distributed:SafetensorsParts",
    "modelcli.checkpoints.deepspeed:DeepSpeedCheckpoint",
    "modelcli.checkpoints.rank_files:RankFiles",
)


@functools.cache
def _made(line: str) -> Format:
    module, _, name = line.partition(":")
    made: Format = getattr(importlib.import_module(module), name)()
    return made


def built_in() -> Iterator[Format]:
    """Yield the formats of modelcli itself; each is imported when it is needed."""
    return map(_made, (*_FILES, *_FOLDERS, *_FOLDERS_WITHOUT_INDEX))


class PlugIns(NamedTuple):
    """The formats of other packages, and what is wrong with those that cannot be used."""

    formats: tuple[Format, ...]
    problems: tuple[str, ...]


@functools.cache
def plug_ins() -> PlugIns:
    """Return the formats of other packages that can be used. Of two with the same name neither can."""
    from collections import Counter

    from modelcli import plug_ins as packages

    found: list[tuple[PlugIn, Format]] = []
    problems: list[str] = []
    for name in packages.registered(packages.FORMATS):
        try:
            if (plug_in := packages.find(packages.FORMATS, name)) is not None:
                found.append((plug_in, _of_package(plug_in)))
        except SystemFailureError as error:
            problems.append(error.message)
    own = {format_.name for format_ in built_in()}
    times = Counter(format_.name for _, format_ in found)
    usable = []
    for plug_in, format_ in found:
        if format_.name in own or times[format_.name] > 1:
            whose = "modelcli" if format_.name in own else "another package"
            problems.append(f"{plug_in.title} is not used: {whose} has a format that is called {format_.name} too")
        else:
            usable.append(format_)
    return PlugIns(tuple(usable), tuple(problems))


def _of_package(plug_in: PlugIn) -> Format:
    """Return the format of another package. Raises SystemFailureError if it is not a complete declaration."""
    loaded = plug_in.load()
    if not isinstance(loaded, type) or not issubclass(loaded, Format):
        raise plug_in.unusable(f"cannot be used: {plug_in.value} is no subclass of modelcli.checkpoints.format.Format")
    try:
        made = loaded()
    except Exception as error:
        raise plug_in.unusable(f"cannot be made: {type(error).__name__}: {error}") from error
    plug_in.require_texts(made, "name", "title", *(["label"] if made.written_suffixes else []))
    plug_in.require_tuples(made, "suffixes", "written_suffixes", "whole_files")
    for suffix in (*made.suffixes, *made.written_suffixes):
        if not suffix.startswith(".") or suffix != suffix.lower() or not _suffix_like(f"w{suffix}"):
            raise plug_in.unusable(f"declares the suffix {suffix!r}, which is not a dot and small letters or digits")
    return made


def forget() -> None:
    """Forget the formats of other packages, so that they are searched for again."""
    from modelcli import plug_ins as packages

    plug_ins.cache_clear()
    packages.forget()


def every() -> Iterator[Format]:
    """Yield all formats: the built-in ones, then those of other packages, which are searched for only then."""
    yield from built_in()
    yield from plug_ins().formats


# --- by name and by suffix -----------------------------------------------------------------------------------------


def named(name: str) -> Format:
    """Return the format with a name as in `--json`. Raises KeyError if there is none."""
    for format_ in every():
        if format_.name == name:
            return format_
    raise KeyError(name)


def has_known_suffix(path: str | Path) -> bool:
    """Whether a name has the suffix of a checkpoint, in upper or lower case: `W.PTH`, `w.pth`."""
    return _by_suffix(Path(path).name, writing=False) is not None


def by_written_suffix(path: str | Path) -> Format | None:
    """Return the format in which a file of this name is written; None if no format uses its suffix."""
    return _by_suffix(Path(path).name, writing=True)


def _by_suffix(name: str, *, writing: bool) -> Format | None:
    lower = name.lower()
    if not _suffix_like(lower):
        return None
    for format_ in every():
        if lower.endswith(format_.written_suffixes if writing else format_.suffixes):
            return format_
    return None


def _suffix_like(name: str) -> bool:
    """Whether a name has any suffix: text, a dot and a word."""
    stem, _, last = name.rpartition(".")
    return bool(stem) and last.replace("_", "").isalnum()


def written() -> list[Format]:
    """Return the formats that can be written as one file, in the order of the help."""
    return [format_ for format_ in every() if format_.written_suffixes]


def folder_format(word: str | None = None) -> Format:
    """Return the format in which folders are written: by default safetensors shards.

    Raises RequestError for a word that names no such format.
    """
    if word is None:
        return _made(_FOLDERS[0])
    known = {format_.folder_word: format_ for format_ in every() if format_.folder_word}
    if word not in known:
        raise RequestError(
            f"unknown format of a folder: {word!r}", did_you_mean(word, known) or f"there are {listed([*known], 6)}"
        )
    return known[word]


def default() -> Format:
    """Return the format that can store everything. A dry run without an output file assumes it."""
    return next(format_ for format_ in built_in() if format_.written_suffixes and format_.holds_values)


def instead() -> str:
    """Return the hint for values that a format cannot store: `write a .pth file`."""
    return f"write a {default().written_suffixes[0]} file"


def written_suffixes() -> str:
    """Return the suffixes that can be written, for help: `.pth, .pt, .ckpt, .bin, .safetensors`."""
    return ", ".join(suffix for format_ in written() for suffix in format_.written_suffixes)


def how_to_name() -> str:
    """Return the suffixes of output files, for a hint: `.pth or .pt (as torch.save writes), .safetensors`."""
    texts = []
    for format_ in written():
        *others, last = format_.written_suffixes
        suffixes = f"{', '.join(others)} or {last}" if others else last
        texts.append(f"{suffixes} ({format_.written_as})" if format_.written_as else suffixes)
    return ", ".join(texts)


def whole_files() -> set[str]:
    """Return the file names under which programs look for all weights of a model in a folder."""
    return {name for format_ in built_in() for name in format_.whole_files}


def is_index(name: str) -> bool:
    """Whether a file of this name describes the contents of its folder."""
    return any(format_.is_index(name) for format_ in every())


def other_indexes(name: str, folder: Path) -> list[str]:
    """Return the indexes of other checkpoints in a folder that was written in the format with this name."""
    own = named(name).written_index
    return sorted(entry.name for entry in folder.iterdir() if entry.name != own and is_index(entry.name))


# --- by content ----------------------------------------------------------------------------------------------------


def of_file(file: Candidate) -> Format:
    """Return the format of a file by its content. Raises FileFormatError if it has none, or two at once."""
    if not file.size:
        raise FileFormatError(
            f"{file.path} is empty", "the program that wrote it may have been interrupted: write or download it again"
        )
    if (found := _first_answer(lambda format_: format_.recognises(file))) is not None:
        _refuse_second_format(file, found[0])
        return found[0]
    from modelcli.checkpoints import unknown_files

    known = unknown_files.Known(
        folder_format().index_pattern, lambda name: by_written_suffix(name) is not None, plug_ins().problems
    )
    raise unknown_files.error(file, known)


_Answer = TypeVar("_Answer")


def _first_answer(question: Callable[[Format], _Answer]) -> tuple[Format, _Answer] | None:
    """The first format that has an answer, with it; None where none has one.

    A format of another package that fails hides no other one: what it raised is raised where no other has an answer.
    """
    for format_ in built_in():
        if answer := question(format_):
            return format_, answer
    failure: Exception | None = None
    for format_ in plug_ins().formats:
        try:
            if answer := question(format_):
                return format_, answer
        except (ModelcliError, MemoryError):
            raise
        except Exception as error:
            failure = failure or error
    if failure is not None:
        raise failure
    return None


def _refuse_second_format(file: Candidate, format_: Format) -> None:
    """Refuse a file that is valid in two formats, because programs differ in which of them they read."""
    if format_.container != "tar" and file.is_tar:
        other = "both a tar archive and another checkpoint"
    elif file.ends_as_zip and not file.is_zip:
        other = "both a checkpoint and a zip archive, which starts later in it"
    else:
        return
    raise FileFormatError(
        f"{file.path} is {other}",
        "programs differ in which of the two they read: ask its author for a file that is only one",
    )


def read_file(file: Candidate, key: str | None = None) -> Contents:
    """Read a file that contains tensors, not an index of other files."""
    try:
        return _read(of_file(file), file, key)
    except FileFormatError:
        found = _first_answer(lambda format_: format_.explain(file.path))
        if found is not None and found[1] is not None:
            raise FileFormatError(*found[1]) from None
        raise


def read_index(format_: Format, file: Candidate, key: str | None = None) -> Contents:
    """Read a folder by the file in it that describes it."""
    return _read(format_, file, key)


def _read(format_: Format, file: Candidate, key: str | None) -> Contents:
    if key is not None and not format_.has_keys:
        raise RequestError(f"--key {key} is for training checkpoints, and {file.path} is {format_.title}")
    return format_.read(file, key)


def index_in(folder: Path) -> tuple[Format | None, Path]:
    """Return the file by which a folder is read, and its format.

    This is an index, or else the only file of weights under a usual name; then the format is None, since the content of
    the file decides it. Raises RequestError if there is no such file, or if there are several.
    """
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise SystemFailureError(f"cannot read {folder}: {error.strerror or error}") from None
    for format_ in built_in():
        if (index := format_.index_in(folder, names)) is not None:
            return format_, index
    whole = [name for name in names if name in whole_files()]
    if len(whole) == 1:
        return None, folder / whole[0]
    if whole:
        choices = listed([str(folder / name) for name in whole], 6)
        raise RequestError(f"{folder} holds {len(whole)} files of weights and no index", f"name one of {choices}")
    for format_ in plug_ins().formats:
        if (index := format_.index_in(folder, names)) is not None:
            return format_, index
    for format_ in every():
        format_.refuse_folder(folder, names)
    files = [name for name in names if by_written_suffix(name) is not None]
    hint = f"name a file in it: {listed(files, 6)}" if files else None
    raise RequestError(f"{folder} is a folder without an index of shards ({folder_format().index_pattern})", hint)


def checkpoint_files(folder: Path, names: set[str]) -> set[str]:
    """Return those of the files in a folder that the checkpoint in it is made of, in whatever format it is."""
    return {name for format_ in every() for name in format_.files_in(folder, names)}


def holds_weights(folder: Path) -> bool:
    """Whether a folder holds a checkpoint under a name that programs look for, damaged or not."""
    names = sorted(entry.name for entry in folder.iterdir())
    return any(name in whole_files() or is_index(name) for name in names)


def index_format(path: Path) -> Format | None:
    """Return the format of the folder that a file describes, by the file's name; None for any other file."""
    return next((format_ for format_ in map(_made, _FOLDERS) if format_.is_index(path.name)), None)
