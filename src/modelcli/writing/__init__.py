"""Writing checkpoints from a plan: for each tensor, where its bytes come from. No torch, no weights in memory.

A layout is worked out first (which bytes lie where, how large it will be); then it is written beside the target,
read back, and put in its place in one step.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import BinaryIO

from modelcli import interrupts, ranks
from modelcli.checkpoints import formats
from modelcli.checkpoints.format import Format, RecordTooLargeError
from modelcli.checkpoints.layout import FolderLayout, Layout
from modelcli.checkpoints.plan import Plan, PlannedStorage, PlannedTensor, Source, Written
from modelcli.checkpoints.storage import FileId, require_unchanged
from modelcli.errors import ModelcliError, RequestError, SystemFailureError
from modelcli.files import atomic
from modelcli.files.checksum_lists import is_list
from modelcli.language.quoting import quoted
from modelcli.ranks import Group
from modelcli.wording import counted, is_or_are
from modelcli.writing import journal, shares, source_checksums
from modelcli.writing.journal import Journal, Resume
from modelcli.writing.output import Output, Report, checksums_in

__all__ = [
    "DEFAULT_SIZE",
    "Plan",
    "PlannedStorage",
    "PlannedTensor",
    "Source",
    "WriteOptions",
    "Written",
    "check_target",
    "default_format",
    "format_of",
    "holds_values",
    "holds_views",
    "is_folder",
    "write",
]

#: As large as Hugging Face's programs make shards.
DEFAULT_SIZE = 5_000_000_000


@dataclass(frozen=True)
class WriteOptions:
    """How a checkpoint is written.

    Attributes:
        force: replace what exists.
        durable: wait until the file is on the disk.
        verify: compare the files that bytes are read from with the checksums that are stated of them; then read every
            byte back, and compare.
        report: called with the bytes that were written and read back so far.
        max_shard_bytes: the most that a shard of a folder holds.
        reads: files that have to be unchanged when the new one replaces the old one, besides those that bytes are
            copied from.
        described_by: files that say where the bytes are, such as an index; they are compared with checksums, too.
        group: the ranks that write a folder together. A file is written by rank 0 alone.
        when_written: called on each rank when all ranks have written their files of a folder.
        resume: goes on with an interrupted run of the same work, and keeps what is complete of this one if it is
            interrupted; None for neither. Only for folders.
    """

    force: bool = False
    durable: bool = True
    verify: bool = False
    report: Report | None = None
    max_shard_bytes: int = DEFAULT_SIZE
    reads: frozenset[FileId] = frozenset()
    described_by: frozenset[FileId] = frozenset()
    group: Group = field(default_factory=ranks.current)
    when_written: Callable[[], None] = lambda: None
    resume: Resume | None = None


def format_of(path: str | Path, folder: str | None = None) -> str:
    """The name of the format that a file is written in, by how its name ends; a folder that exists is one, too.

    Args:
        path: the file or folder.
        folder: the word for the format of a folder (`--format-out`); None for the usual one.

    Raises RequestError for a name that no format is written under, and for a format of folders with a file.
    """
    text = str(path)
    if not text:
        raise RequestError("the path to write is empty: ''", "name a file, such as out.pth, or a folder: out/")
    if folder is not None:
        format_ = formats.folder_format(folder)
        if not text.endswith(("/", os.sep)) and (formats.has_known_suffix(text) or not Path(text).is_dir()):
            raise RequestError(
                f"{format_.title} is a folder, and {text} is the name of a file",
                f"-o {quoted(Path(text).stem or text)}/ --format-out {folder}",
            )
        return format_.name
    if text.endswith(("/", os.sep)):
        return formats.folder_format().name
    if (found := formats.by_written_suffix(text)) is not None:
        return found.name
    if Path(text).is_dir():
        return formats.folder_format().name
    hint = f"end it in {formats.how_to_name()}, or / (a folder of shards)"
    raise RequestError(f"{text} does not say which format to write", "; ".join([hint, *formats.plug_ins().problems]))


def holds_values(kind: str) -> bool:
    """Whether a format holds Python values besides tensors, and a training checkpoint around a state dict."""
    return formats.named(kind).holds_values


def holds_views(kind: str) -> bool:
    """Whether tensors can be views into one storage in a format; else each is written by itself, row-major."""
    return formats.named(kind).holds_views


def is_folder(kind: str) -> bool:
    """Whether a format is one of folders."""
    return formats.named(kind).is_folder


def default_format() -> str:
    """The format that holds all that can be written: that of a dry run without a file."""
    return formats.default().name


def check_target(path: Path, kind: str | None = None, *, force: bool) -> None:
    """Refuse a target that cannot be written, before any work is done. Raises RequestError or SystemFailureError."""
    is_folder = formats.named(kind or format_of(path)).is_folder
    atomic.check_target(path, force=force, folder=is_folder)


def write(plan: Plan, path: Path, options: WriteOptions | None = None, *, kind: str | None = None) -> Written:
    """Write a plan beside `path`, read it back, then replace `path` in one step.

    Args:
        plan: the tensors and where their bytes come from.
        path: the file or folder to write.
        options: how to write it.
        kind: the name of the format; by default the suffix of `path` determines it. (A `Path` has no trailing slash.)

    Returns:
        What was written.

    Raises:
        SystemFailureError: there is not enough space (found before a byte is written), or the system failed.
    """
    format_, options = formats.named(kind or format_of(path)), options or WriteOptions()
    options.group.rest_unless(format_.is_folder)
    write_plan = _write_folder if format_.is_folder else _write_file
    try:
        nbytes, notes = write_plan(plan, path, format_, options)
    except RecordTooLargeError as error:  # known from the layout, before anything is written
        nbytes, notes = write_plan(replace(plan, record=""), path, format_, options)
        notes = (f"{path} carries no record of its edits and flags: {error.message}", *notes)
    tensors = len(plan.tensors) + len(plan.composites)
    return Written(path, format_.name, tensors, nbytes, is_folder=format_.is_folder, notes=notes)


def _write_file(plan: Plan, path: Path, format_: Format, options: WriteOptions) -> tuple[int, tuple[str, ...]]:
    """Write a plan as a file; its size, and notes for the user. Where there are several ranks, rank 0 does this."""
    layout, report = format_.layout(plan), _report_of(options)
    notes = _check_sources([layout], options, ranks.ALONE)
    atomic.require_space(path, layout.nbytes)
    outputs: list[Output] = []
    replacing = atomic.replacing(
        path,
        force=options.force,
        durable=options.durable,
        require_unchanged=lambda: _require_unchanged(outputs, options),
    )
    with replacing as (file, temporary):
        with Output(file, layout.nbytes, report, durable=options.durable) as output:
            outputs.append(output)
            layout.write(output)
        _require_size(path, file.fileno(), layout.nbytes)
        with _named(path, temporary):
            format_.verify(plan, temporary)
        if options.verify:
            _compare(file, path, layout.parts(), layout.nbytes, report)
    return layout.nbytes, notes


def _write_folder(plan: Plan, path: Path, format_: Format, options: WriteOptions) -> tuple[int, tuple[str, ...]]:
    """Write a plan as a folder; the size of its files, and notes for the user.

    Several ranks write it together, into one new folder. Rank 0 makes that, writes what is not a shard, and puts the
    folder in its place when all ranks have written their shards and found their sources unchanged.
    """
    folder, group = format_.folder_layout(plan, options.max_shard_bytes), options.group
    shares.require_same(folder, group)
    notes = _check_sources(folder.files.values(), options, group)
    share = _Share(folder, shares.own_files(folder, group), path, options)
    if group.rank:
        _write_share(share)
        return folder.nbytes, (*notes, *folder.notes)
    resumes = options.resume is not None
    atomic.require_space(path, folder.nbytes, resumes=resumes)
    replacing = atomic.replacing_folder(
        path,
        force=options.force,
        durable=options.durable,
        superseded=partial(_superseded, format_),
        require_unchanged=lambda: _require_all_unchanged(share),
        adopts=share.adopts if resumes else None,
        keeps=partial(_keeps, len(folder.files)) if resumes else lambda _folder, _error: False,
    )
    with replacing as temporary, _stopping_others(group):
        book = share.journal_in(temporary)
        if book is not None:
            book.start(folder.files)
        told = {"name": Path(os.path.realpath(temporary)).name, "inode": temporary.stat().st_ino}
        group.broadcast("folder", json.dumps(told).encode())
        _write_files(share, temporary, book)
        taken_over = sum(map(int, group.exchange("written", str(len(share.taken_over)).encode())))
        options.when_written()
        with _named(path, temporary):
            format_.verify_folder(plan, folder, temporary)
        if book is not None:
            book.remove()
    return folder.nbytes, (*notes, *_notes_on_interrupted(share, taken_over), *folder.notes)


@contextlib.contextmanager
def _named(path: Path, temporary: Path) -> Iterator[None]:
    """Let errors of the block name what the user does, not the temporary file or folder that will be it."""
    try:
        yield
    except ModelcliError as error:
        error.message = error.message.replace(str(temporary), str(path))
        error.args = (error.message,)
        raise


def _superseded(format_: Format, folder: Path) -> set[str]:
    """Return the names of the files in a folder that the new ones replace, and of lists with their checksums."""
    return {*format_.superseded(folder), *(entry.name for entry in folder.iterdir() if is_list(entry.name))}


@dataclass
class _Share:
    """What one rank writes of a folder.

    Attributes:
        folder: the layout of the folder.
        names: the files that this rank writes.
        path: the folder that is replaced, for errors.
        options: how to write.
        outputs: what wrote each file.
        taken_over: the files that an interrupted run has completed.
        others: folders of interrupted runs that were not taken over.
    """

    folder: FolderLayout
    names: Collection[str]
    path: Path
    options: WriteOptions
    outputs: list[Output] = field(default_factory=list)
    taken_over: list[str] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)

    @cached_property
    def work(self) -> journal.Work:
        assert self.options.resume is not None
        return journal.work_of(self.folder, self.options.resume.text)

    def adopts(self, found: Path) -> bool:
        """Whether a temporary folder is that of an interrupted run of the same work."""
        if not (is_same := journal.is_of(found, self.work)):
            self.others.append(found)
        return is_same

    def journal_in(self, temporary: Path) -> Journal | None:
        resume = self.options.resume
        return None if resume is None else Journal(temporary, self.work, resume)

    def require_unchanged(self) -> None:
        """Raise FileFormatError if a source file of this rank has changed meanwhile."""
        files = [self.work.sources[name] for name in self.taken_over]
        _require_unchanged(self.outputs, replace(self.options, reads=self.options.reads.union(*files)))


def _notes_on_interrupted(share: _Share, taken_over: int) -> list[str]:
    """Return what there is to say of interrupted runs: what was taken over, or that nothing was."""
    if taken_over:
        files = counted(len(share.folder.files), "file")
        return [f"{taken_over} of {files} {is_or_are(taken_over)} from the interrupted run"]
    if not share.others:
        return []
    return [
        f"everything was written anew: what an interrupted run left beside {share.path} was made without --resume, or "
        "of another model, by other edits or with other options"
    ]


def _keeps(count: int, folder: Path, error: BaseException) -> bool:
    """Whether to keep the temporary folder of an interrupted run. The user hears how another run goes on with it."""
    found = journal.complete_in(folder)
    if not found or not journal.is_kept_after(error):
        return False
    text = f"{found} of {counted(count, 'file')} {is_or_are(found)} kept: the same command with --resume continues"
    if isinstance(error, SystemFailureError):
        error.notes = (*error.notes, text)
    elif isinstance(error, OSError):
        error.add_note(text)
    else:
        interrupts.advice.append(text)
    return True


def _check_sources(layouts: Iterable[Layout], options: WriteOptions, group: Group) -> tuple[str, ...]:
    """Compare the files that some layouts take bytes from with their checksums, if the user wants it; return notes.

    Raises FileFormatError if one differs.
    """
    if not options.verify:
        return ()
    sources = {source for layout in layouts for _, source in layout.parts()}
    files = {file for source in sources for file in source.files()}
    if not files:
        return ()
    return tuple(source_checksums.check(files | options.described_by, _report_of(options), group))


def _write_share(share: _Share) -> None:
    """Write the files of another rank than 0 into the folder that rank 0 has made."""
    group = share.options.group
    told = json.loads(group.broadcast("folder"))
    target = Path(os.path.realpath(share.path))
    with atomic.failing_as(share.path):
        made = atomic.temporary_beside(target, told["name"])
    if share.options.resume is None:
        group.if_left_alone(lambda: atomic.remove_of_dead(target, made))
    with atomic.shared_folder(made, told["inode"], share.path) as temporary:
        _write_files(share, temporary, share.journal_in(temporary))
        group.exchange("written", str(len(share.taken_over)).encode())
        share.options.when_written()
        group.broadcast("replacing")
        share.require_unchanged()
        group.exchange("unchanged", b"")


def _write_files(share: _Share, temporary: Path, book: Journal | None) -> None:
    """Write a share of the files of a folder into `temporary`, but those that the journal knows to be complete."""
    options, total = share.options, share.folder.nbytes
    done, report = 0, _report_of(options)
    options.group.moved(0, total)
    for name in share.names:
        layout, target, after = share.folder.files[name], share.path / name, _after(report, done)
        read = _reading(after, total)
        is_there = book is not None and book.has(name, layout, read)
        with (temporary / name).open("rb+" if is_there else "xb+", buffering=0) as file:
            if is_there:
                share.taken_over.append(name)
                if after is not None:
                    after(layout.nbytes, total, "writing")
            else:
                with Output(file, total, after, durable=options.durable) as output:
                    share.outputs.append(output)
                    layout.write(output)
                _require_size(target, file.fileno(), layout.nbytes)
            if options.verify:
                _compare(file, target, layout.parts(), total, after)
            if book is not None and not is_there:
                book.add(name, file, read)
            elif options.group.rank and options.durable:  # rank 0 cannot flush what another machine's system holds
                os.fsync(file.fileno())
        done += layout.nbytes


def _report_of(options: WriteOptions) -> Report | None:
    """Return the report function, which also tells the other ranks that this one gets on."""
    group, report = options.group, options.report
    if group.size == 1:
        return report

    def told(done: int, total: int, doing: str) -> None:
        everywhere = group.moved(done, total)
        if report is not None:
            report(min(everywhere, total), total, doing)

    return told


@contextlib.contextmanager
def _stopping_others(group: Group) -> Iterator[None]:
    """Stop the other ranks if the block raises, before the folder in which they write is removed."""
    try:
        yield
    except BaseException:
        group.stop_others()
        raise


def _require_all_unchanged(share: _Share) -> None:
    """Raise FileFormatError if a source file of this rank has changed; let the other ranks look at theirs."""
    share.options.group.broadcast("replacing")
    share.require_unchanged()
    share.options.group.exchange("unchanged", b"")


def _after(report: Report | None, done: int) -> Report | None:
    """Return the report function for one file of several, of which `done` bytes have been written."""
    return None if report is None else lambda more, total, doing: report(done + more, total, doing)


def _reading(report: Report | None, total: int) -> Callable[[int], None]:
    """Return what is told of the bytes of a file that are read for its checksum, of `total` in all files."""
    return lambda nbytes: None if report is None else report(nbytes, total, "checking")


def _require_unchanged(outputs: Iterable[Output], options: WriteOptions) -> None:
    """Raise FileFormatError if a source file has changed meanwhile, because the result might mix old and new bytes.

    This is checked at the very end, because a source of the first shard may change while the last one is written.
    """
    for output in outputs:
        output.require_unchanged_sources()
    for path, identity in sorted(options.reads):
        require_unchanged(path, identity)


def _require_size(path: Path, handle: int, nbytes: int) -> None:
    if (found := os.fstat(handle).st_size) != nbytes:
        raise SystemFailureError(f"cannot write {path}: {found:,} of {nbytes:,} bytes are there")


def _compare(
    file: BinaryIO, path: Path, parts: Iterable[tuple[int, Source]], total: int, report: Report | None
) -> None:
    """Read every byte back and compare it with its source, and with the checksum in the archive.

    Args:
        file: the file that was written.
        path: the name that it will have, for errors.
        parts: the offset of each source.
        total: the bytes of all files, for the report.
        report: called with the bytes that were compared so far.

    Raises SystemFailureError if a byte or a checksum differs.
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
                f"the {source.nbytes:,} bytes of {path} from byte {offset:,} on were not written as they were read",
                "the disk may be failing: nothing was changed",
            )
        if found != stated.get((offset, source.nbytes), found):
            raise SystemFailureError(
                f"the {source.nbytes:,} bytes of {path} from byte {offset:,} on do not match their checksum",
                "their source file is damaged, as python -m zipfile -t shows: nothing was changed",
            )
