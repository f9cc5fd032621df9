"""Tensors of files on another machine, of which only the headers were read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from modelcli.checkpoints.contents import Contents
from modelcli.checkpoints.entries import CompositeEntry, TensorEntry
from modelcli.checkpoints.safetensors import reading
from modelcli.checkpoints.storage import FileId, Span, Storage, Windows
from modelcli.errors import FileFormatError, RequestError
from modelcli.model.tensors import value_class


@value_class
class RemoteBytes:
    """Bytes that are not on this machine: the `nbytes` from `offset` of the data in a file.

    `download_command` is the command that downloads the file.
    """

    file: Path
    offset: int
    nbytes: int
    download_command: str

    def files(self) -> Iterable[FileId]:
        """No files of this machine."""
        return ()

    def chunks(self) -> Iterator[bytes | memoryview]:
        """Raise RequestError that says how to download them."""
        self._refuse()

    def bytes(self) -> bytes:
        """Raise RequestError that says how to download them."""
        self._refuse()

    def mapped(self, windows: Windows | None = None) -> memoryview:
        """Raise RequestError that says how to download them."""
        self._refuse()

    def part(self, start: int, nbytes: int) -> RemoteBytes:
        return replace(self, offset=self.offset + start, nbytes=nbytes)

    def _refuse(self) -> NoReturn:
        raise RequestError(
            f"the values in {self.file} are not on this machine: only its header was read",
            f"{self.download_command} downloads them",
        )


def contents_of(file: Path, header: Mapping[str, Any], nbytes: int | None, download_command: str) -> Contents:
    """The contents of a safetensors file on another machine.

    Args:
        file: what messages call it.
        header: its header as JSON values.
        nbytes: its size; None where it is not known.
        download_command: the command that downloads it.

    Raises FileFormatError where the header breaks a rule of the format, or describes more bytes than the file has.
    """
    described = max((_end(info) for name, info in header.items() if name != "__metadata__"), default=0)
    if nbytes is not None and nbytes < 8 + described:
        raise FileFormatError.damaged(
            str(file), f"its header describes {described:,} bytes of tensors, but the file has {nbytes:,}"
        )
    found = reading.contents_of(file, dict(header), 0, (described, 0, 0))
    away: dict[int, RemoteBytes] = {}  # tied tensors have one storage object

    def moved(entry: TensorEntry) -> TensorEntry:
        storage = entry.storage
        assert isinstance(storage, Span)
        if id(storage) not in away:
            away[id(storage)] = RemoteBytes(file, storage.offset, storage.nbytes, download_command)
        remote: Storage = away[id(storage)]
        return replace(entry, storage=remote)

    tensors: dict[str, TensorEntry | CompositeEntry] = {
        name: moved(entry)
        if isinstance(entry, TensorEntry)
        else replace(entry, parts=tuple(moved(part) for part in entry.parts))
        for name, entry in found.tensors.items()
    }
    return replace(found, tensors=tensors, is_remote=True)


def _end(info: Any) -> int:
    """Where the bytes of a tensor end, as its entry in a header says; 0 for an entry that is not valid."""
    try:
        return int(info["data_offsets"][1])
    except (TypeError, KeyError, IndexError, ValueError, OverflowError):
        return 0
