"""Write an edited model, with what its training checkpoint contains around it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from modelcli import ranks, resolve
from modelcli.checkpoints.storage import identity_of
from modelcli.errors import ModelcliError
from modelcli.language.references import CheckpointFile, PythonObject
from modelcli.wording import listed

if TYPE_CHECKING:
    from modelcli.checkpoints.contents import Contents
    from modelcli.checkpoints.storage import FileId
    from modelcli.commands.editable import Editable
    from modelcli.edits.applied import Change
    from modelcli.live.trace import Traced
    from modelcli.writing import Written

#: Called with the bytes done, the bytes in total, and the kind of work.
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class WriteRequest:
    """How to check and write a result.

    Attributes:
        out: the file or folder; None to write nothing.
        format: the format of `out`, which the end of its name determines.
        force: replace a file that exists.
        dry_run: change nothing anywhere.
        check: `meta`, `run`, `same` or `none`: see `fit_check`.
        bare: write only the state dict of a training checkpoint.
        compact: write only the bytes of each storage that tensors use.
        durable: wait until the data is on the disk.
        verify: compare the files that are read with the checksums beside them, and read every byte back.
        resume: go on with an interrupted run of the same work, and keep what is complete of this one.
        max_shard_bytes: the maximum size of a shard; None for the usual size.
        also_ema: make the same edits in other state dicts of the same model in a training checkpoint.
    """

    out: Path | None = None
    format: str = "pth"
    force: bool = False
    dry_run: bool = False
    check: str = "meta"
    bare: bool = False
    compact: bool = False
    durable: bool = True
    verify: bool = False
    resume: bool = False
    max_shard_bytes: int | None = None
    also_ema: bool = False


@dataclass(frozen=True)
class WriteResult:
    """What was written, and notes."""

    written: Written
    notes: tuple[str, ...]


def write(
    model: Editable,
    changes: Sequence[Change],
    request: WriteRequest,
    traced: Traced | None = None,
    progress: Progress | None = None,
) -> WriteResult:
    """Write an edited model. `traced` is a forward pass of it, if there is one already."""
    from modelcli import writing
    from modelcli.checkpoints import formats
    from modelcli.writing.journal import Resume

    assert request.out is not None
    plan = model.plan(request.out, request.format, bare=request.bare, compact=request.compact, traced=traced)
    around: list[str] = []
    if model.contents is not None and model.contents.key is not None:
        from modelcli.commands import training_checkpoint

        plan, around = training_checkpoint.followed(model, model.contents, plan, changes, request)
    if plan.tree is not None and not formats.named(request.format).holds_views:
        from modelcli.commands import training_checkpoint

        plan = replace(plan, tree=training_checkpoint.row_major(plan.tree))
    size = writing.DEFAULT_SIZE if request.max_shard_bytes is None else request.max_shard_bytes
    reads = _files_of(model.contents) if model.contents is not None and request.out.exists() else frozenset()
    options = writing.WriteOptions(
        request.force,
        request.durable,
        request.verify,
        progress,
        size,
        reads,
        _described_by(model) if request.verify else frozenset(),
        when_written=lambda: _share_what_was_seen(model),
    )
    if request.resume:
        options = replace(options, resume=Resume(_identity_of_work(model, request), model.watches))
    written = writing.write(plan, request.out, options, kind=request.format)
    ranks.current().rest_unless(False)
    notes = [
        *_alone_note(written),
        *plan.notes,
        *written.notes,
        *model.overflow_notes(),
        *_other_checkpoints(written),
        *model.random_value_notes(),
        *around,
    ]
    return WriteResult(written, tuple(notes))


def _share_what_was_seen(model: Editable) -> None:
    """Let each rank know what the others have met in the values that they wrote, for the notes of rank 0."""
    if ranks.current().size == 1:
        return
    watches = model.watches()
    own = [number for number, watch in enumerate(watches) if watch.seen]
    for seen in ranks.current().exchange("values", json.dumps(own).encode()):
        for number in json.loads(seen):
            watches[number].seen = True


def _alone_note(written: Written) -> list[str]:
    """Return a note if several ranks were there and one had to write all, because the output is one file."""
    if written.is_folder or (size := ranks.current().size) == 1:
        return []
    return [f"rank 0 wrote {written.path} alone, because it is one file: {size} ranks share a folder/ of shards"]


def _other_checkpoints(written: Written) -> list[str]:
    """Return a note if the folder contains another checkpoint too, because commands must then name one of them."""
    from modelcli.checkpoints import formats

    if not written.is_folder or not (others := formats.other_indexes(written.format, written.path)):
        return []
    return [
        f"{written.reference} also contains {listed(others, 3)}, which is unchanged: "
        f"{written.reference}{formats.named(written.format).written_index} lists what was written"
    ]


def _identity_of_work(model: Editable, request: WriteRequest) -> str:
    """Return what decides the bytes of the result besides its plan: the model, the edits, options, and code."""
    source = model.source
    parts: list[object] = [source, model.seed, [str(edit) for edit in model.carried_out], request.format]
    parts += [request.bare, request.compact, request.also_ema]
    for text in (source.model, source.arch):
        if text is not None and isinstance(named := resolve.parse(text, source.folder), PythonObject) and named.file:
            parts.append(identity_of(named.file))
    return repr(parts)


def _described_by(model: Editable) -> frozenset[FileId]:
    """Return the index of the shards of a model, or the description of its folder, if it was read from a folder."""
    from modelcli.checkpoints import formats

    contents = model.contents
    if contents is None or contents.is_remote or not contents.path.is_dir():
        return frozenset()
    reference = resolve.reference_of(model.source)
    if isinstance(reference, CheckpointFile) and reference.path.is_file():
        paths = [reference.path]
    else:
        try:
            paths = [formats.index_in(contents.path)[1]]
        except ModelcliError:  # several, of which the model's library prefers one
            paths = [path for path in contents.path.iterdir() if formats.is_index(path.name)]
    return frozenset((path, identity_of(path)) for path in paths if formats.index_format(path) is not None)


def _files_of(contents: Contents) -> frozenset[FileId]:
    """Return the files that a model was read from.

    If two commands edit a file in place at the same time, the second finds that the file has changed and stops, because
    it would undo the edits of the first.
    """
    from modelcli.checkpoints import CompositeEntry
    from modelcli.checkpoints.storage import Span

    entries = contents.tensors.values()
    parts = (part for each in entries for part in (each.parts if isinstance(each, CompositeEntry) else (each,)))
    found: set[FileId] = set()
    last = None
    for part in parts:
        storage = part.storage
        if isinstance(storage, Span):
            if storage.path is last:  # one of 100,000 in the same file
                continue
            last = storage.path
        found.update(storage.files())
    return frozenset(found)
