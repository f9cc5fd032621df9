"""Whether a folder of shards is complete: its index, its shards, their headers and its configuration agree.

Nothing but the index, the headers and the texts beside them is read, and torch is not needed. Every fault is listed: a
folder that cannot be opened is what this is asked about.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from modelcli import providers
from modelcli.checkpoints import CompositeEntry, Contents, TensorEntry, formats, named_files
from modelcli.checkpoints.format import Candidate
from modelcli.checkpoints.sharded import reading
from modelcli.errors import ModelcliError, RequestError
from modelcli.providers import configuration
from modelcli.wording import counted, listed

#: Keys that a fault lists.
_MOST_NAMED = 3
#: How the files of a sharded checkpoint are called: which one it is, and how many there are.
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)")

Entry = TensorEntry | CompositeEntry


@dataclass
class Completeness:
    """What was found out about a folder.

    Attributes:
        faults: what is wrong, a sentence each.
        files: the files of weights that were read.
        tensors: the tensors in them, by key.
        compared: the other files that were compared with the tensors.
    """

    faults: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    tensors: dict[str, Entry] = field(default_factory=dict)
    compared: list[str] = field(default_factory=list)

    @property
    def seen(self) -> str:
        """What agrees, in words: `3 files, 41 tensors, config.json`."""
        return ", ".join((counted(len(self.files), "file"), counted(len(self.tensors), "tensor"), *self.compared))


def of_folder(folder: Path) -> Completeness:
    """Compare what the files of a folder say of each other.

    Raises RequestError for a path that is no folder, or a folder without weights.
    """
    if not folder.is_dir():
        raise RequestError(f"--complete is about a folder, and {folder} is none", "name the folder of the shards")
    names = sorted(entry.name for entry in folder.iterdir())
    indexes = [name for name in names if formats.is_index(name)]
    whole = [name for name in names if name in formats.whole_files()]
    if not indexes and not whole:
        hint = listed(names, 6) if names else "it is empty"
        raise RequestError(f"{folder} holds neither an index of shards nor a whole file of weights", hint)
    found = Completeness()
    if indexes and whole:
        found.faults.append(
            f"{indexes[0]} and {whole[0]} both claim to be the weights: programs differ in which they load"
        )
    for index in indexes:
        _compare_index(folder / index, names, found)
    for name in whole if not indexes else ():
        if (contents := _read(folder / name, found)) is not None:
            found.files.append(name)
            found.tensors |= contents.tensors
    if found.files:
        _compare_configuration(folder, found)
    return found


def _compare_index(index: Path, names: list[str], found: Completeness) -> None:
    """Compare an index with the shards that it names, and with the files that are there."""
    try:
        weight_map, _ = reading.index_of(index)
    except ModelcliError as error:
        found.faults.append(error.message)
        return
    found.compared.append(index.name)
    by_file: dict[str, list[str]] = {}
    for key, file in weight_map.items():
        by_file.setdefault(file, []).append(key)
    holders: dict[str, str] = {}
    for file, keys in sorted(by_file.items()):
        try:
            path = named_files.inside(index, file)
        except ModelcliError as error:
            if file in names or "/" in file or "\\" in file:
                found.faults.append(error.message)
            else:
                found.faults.append(
                    f"{file} is missing: {index.name} says that {counted(len(keys), 'tensor')} are in it"
                )
            continue
        if (contents := _read(path, found)) is None:
            continue
        found.files.append(file)
        _compare_keys(index.name, file, keys, contents, holders, found)
        found.tensors |= {key: contents.tensors[key] for key in keys if key in contents.tensors}
    found.faults += _numbering_faults(index.name, by_file, names)


def _compare_keys(
    index: str, file: str, keys: list[str], contents: Contents, holders: dict[str, str], found: Completeness
) -> None:
    """Compare the keys that an index gives to a shard with those that the shard has."""
    held = {*contents.tensors, *contents.extras}
    if missing := [key for key in keys if key not in held]:
        found.faults.append(f"{index} says that {listed(missing, _MOST_NAMED)} is in {file}, and it is not")
    wanted = set(keys)
    if extra := [key for key in contents.tensors if key not in wanted]:
        found.faults.append(f"{file} has {listed(extra, _MOST_NAMED)}, which {index} does not place there")
    twice = [key for key in contents.tensors if key in holders]
    if twice:
        found.faults.append(f"{holders[twice[0]]} and {file} both have {listed(twice, _MOST_NAMED)}")
    holders.update(dict.fromkeys(contents.tensors, file))


def _numbering_faults(index: str, by_file: Mapping[str, object], names: list[str]) -> list[str]:
    """What the numbers in the names of shards say of files that the index does not name."""
    faults = []
    parts = {file: match for file in by_file if (match := _SHARD.fullmatch(file))}
    for match in list(parts.values())[:1]:
        count = int(match["count"])
        absent = [number for number in range(1, count + 1) if _numbered(match, number) not in by_file]
        if absent:
            faults.append(
                f"the names of the shards say that there are {count}, and {index} does not name "
                f"{listed([_numbered(match, number) for number in absent], _MOST_NAMED)}"
            )
        others = [name for name in names if name not in by_file and _is_other_shard(name, match)]
        if others:
            faults.append(f"{listed(others, _MOST_NAMED)} is in the folder, and {index} does not name it")
    return faults


def _numbered(match: re.Match[str], number: int) -> str:
    return f"{match['stem']}-{number:05}-of-{match['count']}{match['suffix']}"


def _is_other_shard(name: str, like: re.Match[str]) -> bool:
    match = _SHARD.fullmatch(name)
    return match is not None and (match["stem"], match["suffix"]) == (like["stem"], like["suffix"])


def _read(path: Path, found: Completeness) -> Contents | None:
    """Read the header of a file; a fault where it cannot be read."""
    try:
        contents = formats.read_file(Candidate(path))
    except ModelcliError as error:
        found.faults.append(error.message)
        return None
    if contents.foreign:
        found.faults.append(f"{path.name} holds objects of {listed(contents.foreign, 3)}: these were not looked at")
    return contents


def _compare_configuration(folder: Path, found: Completeness) -> None:
    """Compare the configuration with the tensors, by the provider whose model the folder holds."""
    shapes = {key: (entry.shape, entry.dtype) for key, entry in found.tensors.items()}
    for provider in providers.with_prefix():
        if provider.recognises(folder):
            try:
                compared, faults = provider.compare_with_tensors(folder, shapes)
            except ModelcliError as error:
                compared, faults = (), (error.message,)
            found.compared += compared
            found.faults += faults
            return
    try:
        if configuration.configuration_in(folder) is not None:
            found.faults.append(f"{configuration.NAME} is of no library that modelcli knows: it was not compared")
    except ModelcliError as error:
        found.faults.append(error.message)
