"""Writing checkpoints from a plan: for each tensor, where its bytes come from. No torch, no weights in memory.

A layout is worked out first (which bytes lie where, how large it will be); then it is written beside the target,
read back, and put in its place in one step.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from modelcli.checkpoints.plan import Plan, PlannedStorage, PlannedTensor, Source, Written
from modelcli.checkpoints.safetensors import writing as safetensors
from modelcli.checkpoints.sharded import writing as shards
from modelcli.checkpoints.sharded.writing import DEFAULT_SIZE
from modelcli.checkpoints.storage import FileId, require_unchanged
from modelcli.checkpoints.torch_pickle import writing as torch_zip
from modelcli.errors import RequestError, SystemFailureError
from modelcli.files import atomic
from modelcli.writing.output import Output, Report, checksums_in

__all__ = [
    "DEFAULT_SIZE",
    "FOLDER",
    "Care",
    "Plan",
    "PlannedStorage",
    "PlannedTensor",
    "Source",
    "Written",
    "check_target",
    "format_of",
    "holds_pickles",
    "write",
]

FOLDER = "folder"


@dataclass(frozen=True)
class Care:
    """How carefully a checkpoint is written.

    `force` replaces what exists; with `durable` it is on the disk when the command ends; with `verify` every byte is
    read back and compared. `report` is told of the bytes that are written and read back, `max_shard_bytes` is for
    folders. `reads` are files that have to be unchanged when the new one takes its place, as those have to be that
    bytes are copied from.
    """

    force: bool = False
    durable: bool = True
    verify: bool = False
    report: Report | None = None
    max_shard_bytes: int = DEFAULT_SIZE
    reads: frozenset[FileId] = frozenset()


def format_of(path: str | Path) -> str:
    """`pth`, `safetensors` or `folder`, told by how the name ends; a folder that exists is one without a slash, too.

    Raises RequestError for any other.
    """
    text = str(path)
    if not text:
        raise RequestError("the path to write is empty: ''", "name a file, such as out.pth, or a folder: out/")
    if text.endswith(("/", os.sep)):
        return FOLDER
    match Path(text).suffix.lower():
        case ".pth" | ".pt" | ".ckpt" | ".bin":
            return "pth"
        case ".safetensors":
            return "safetensors"
    if Path(text).is_dir():
        return FOLDER
    raise RequestError(
        f"{text} does not say which format to write",
        "end it in .pth, .pt, .ckpt or .bin (as torch.save writes), .safetensors, or / (a folder of shards)",
    )


def holds_pickles(kind: str) -> bool:
    """Whether a format holds more than tensors."""
    return kind == "pth"


def check_target(path: Path, kind: str | None = None, *, force: bool) -> None:
    """Refuse, before any work is done, a target that cannot be written. Raises RequestError or SystemFailureError."""
    kind = kind or format_of(path)
    atomic.check_target(path, force=force, folder=kind == FOLDER)


def write(plan: Plan, path: Path, care: Care | None = None, *, kind: str | None = None) -> Written:
    """Write a plan to a sibling of `path`, read it back, then put it in the place of `path` in one step.

    `kind` is the format, by default what the name ends in (a `Path` has lost its trailing slash).

    Raises SystemFailureError before a byte is written where there is no room for all of them.
    """
    kind, care = kind or format_of(path), care or Care()
    nbytes = _write_folder(plan, path, care) if kind == FOLDER else _write_file(plan, path, kind, care)
    return Written(path, kind, len(plan.tensors) + len(plan.composites), nbytes)


def _write_file(plan: Plan, path: Path, kind: str, care: Care) -> int:
    layout: torch_zip.Layout | safetensors.Layout
    if kind == "pth":
        layout, verify_header = torch_zip.layout(plan), torch_zip.verify_header
    else:
        layout, verify_header = safetensors.layout(plan), safetensors.verify_header
    atomic.require_space(path, layout.nbytes)
    outputs: list[Output] = []
    replacing = atomic.replacing(
        path, force=care.force, durable=care.durable, require_unchanged=lambda: _require_unchanged(outputs, care)
    )
    with replacing as (file, temporary):
        with Output(file, layout.nbytes, care.report, durable=care.durable) as output:
            outputs.append(output)
            layout.write(output)
        _require_size(path, file.fileno(), layout.nbytes)
        verify_header(plan, temporary)
        if care.verify:
            _compare(file, temporary, layout.parts(), layout.nbytes, care.report)
    return layout.nbytes


def _write_folder(plan: Plan, path: Path, care: Care) -> int:
    folder = shards.layout(plan, care.max_shard_bytes)
    atomic.require_space(path, folder.nbytes)
    done, outputs = 0, list[Output]()
    replacing = atomic.replacing_folder(
        path,
        force=care.force,
        durable=care.durable,
        superseded=shards.superseded,
        require_unchanged=lambda: _require_unchanged(outputs, care),
    )
    with replacing as temporary:
        for name, layout in folder.shards.items():
            with (temporary / name).open("xb+", buffering=0) as file:
                with Output(file, folder.nbytes, _after(care.report, done), durable=care.durable) as output:
                    outputs.append(output)
                    layout.write(output)
                _require_size(path / name, file.fileno(), layout.nbytes)
                if care.verify:
                    _compare(file, temporary / name, layout.parts(), folder.nbytes, _after(care.report, done))
            done += layout.nbytes
        (temporary / shards.INDEX).write_bytes(folder.index)
        shards.verify_headers(folder, temporary)
    return folder.nbytes


def _after(report: Report | None, done: int) -> Report | None:
    """A report of one file among several, of which `done` bytes are written."""
    return None if report is None else lambda more, total, doing: report(done + more, total, doing)


def _require_unchanged(outputs: Iterable[Output], care: Care) -> None:
    """Raise FileFormatError where a file that was read is another one by now: its edits would be lost, or half there.

    That is asked at the end of all: a source of the first shard may change while the last is written.
    """
    for output in outputs:
        output.require_unchanged_sources()
    for path, identity in sorted(care.reads):
        require_unchanged(path, identity)


def _require_size(path: Path, handle: int, nbytes: int) -> None:
    if (found := os.fstat(handle).st_size) != nbytes:
        raise SystemFailureError(f"cannot write {path}: {found:,} of {nbytes:,} bytes are there")


def _compare(
    file: BinaryIO, path: Path, parts: Iterable[tuple[int, Source]], total: int, report: Report | None
) -> None:
    """Read every byte back, and compare it with its source, and with the checksum that an archive states of it.

    Raises SystemFailureError where one differs.
    """
    atomic.leave_to_disk(file)
    done, stated = 0, checksums_in(file, str(path))
    for offset, source in parts:
        file.seek(offset)
        expected = found = 0
        for chunk in source.chunks():
            expected = zlib.crc32(chunk, expected)
            found = zlib.crc32(file.read(len(chunk)), found)
            done += len(chunk)
            if report is not None:
                report(done, total, "verifying")
        if expected != found:
            raise SystemFailureError(
                f"byte {offset:,} and the {source.nbytes:,} from there were not written as they were read",
                "the disk may be failing: nothing was changed",
            )
        if found != stated.get((offset, source.nbytes), found):
            raise SystemFailureError(
                f"byte {offset:,} and the {source.nbytes:,} from there do not have the checksum that is stated of them",
                "the file they come from is damaged, as python -m zipfile -t shows: nothing was changed",
            )
