"""What a checkpoint format declares: its suffixes, how its files are recognised, and how they are read and written.

A format is one module, or one package, of `checkpoints` and one line in its registry, `checkpoints.formats`. The
declaration imports nothing heavy: a reader and a writer are imported when the first file is read or written with them.
"""

from __future__ import annotations

import stat
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from modelcli.errors import RequestError, SystemFailureError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from modelcli.checkpoints.contents import Contents
    from modelcli.checkpoints.layout import FolderLayout, Layout
    from modelcli.checkpoints.plan import Plan
    from modelcli.checkpoints.storage import Identity
    from modelcli.checkpoints.zip_archives.directory import Entry

#: How much of a file's start is looked at: the magic of a tar archive stands at byte 257.
_HEAD_BYTES = 512
#: How many bytes the end of a zip archive takes that has no comment.
_ZIP_END = 22
_ZIP_STARTS = (b"PK\x03\x04", b"PK\x05\x06")


class Candidate:
    """A file whose format is to be found out: its path, its size, its first 512 bytes (`head`) and its last 22 (`end`).

    `identity` is its (size, mtime, inode): what tells later whether it is still the same file. Raises RequestError for
    what is no regular file, SystemFailureError where it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if not stat.S_ISREG((status := path.stat()).st_mode):
                raise RequestError(
                    f"{path} is a device or a pipe, and a checkpoint is a file", "save it to a file first"
                )
            self.size = status.st_size
            self.identity: Identity = (status.st_size, status.st_mtime_ns, status.st_ino)
            with path.open("rb") as file:
                self.head = file.read(_HEAD_BYTES)
                file.seek(max(self.size - _ZIP_END, 0))
                self.end = file.read(_ZIP_END)
        except OSError as error:
            raise SystemFailureError(f"cannot read {path}: {error.strerror or error}") from None

    @property
    def is_zip(self) -> bool:
        """Whether it starts as a zip archive does."""
        return self.head.startswith(_ZIP_STARTS)

    @property
    def ends_as_zip(self) -> bool:
        """Whether it ends as a zip archive without a comment does."""
        return self.end.startswith(_ZIP_STARTS[1])

    @property
    def is_tar(self) -> bool:
        """Whether it starts with a header of a tar archive: what counts is its checksum, as for Python's `tarfile`.

        A name of up to 100 bytes stands first in it, which may be the start of any other format.
        """
        block = self.head
        if len(block) < _HEAD_BYTES:
            return False
        stated = block[148:156]
        try:
            is_binary = stated[0] == 0x80
            wanted = int.from_bytes(stated[1:]) if is_binary else int(stated.partition(b"\0")[0].strip() or b"0", 8)
        except ValueError:
            return False
        counted = block[:148] + b" " * 8 + block[156:]
        signed = sum(counted) - 256 * sum(byte > 127 for byte in counted)
        return wanted in (sum(counted), signed)

    @cached_property
    def records(self) -> Mapping[str, Entry]:
        """The records of a zip archive by name; none of a file that is no archive.

        Raises FileFormatError for an archive that is damaged or ambiguous.
        """
        if not self.is_zip:
            return {}
        from modelcli.checkpoints.zip_archives import directory

        try:
            with self.path.open("rb") as file:
                return directory.read(file, self.size, str(self.path))
        except OSError as error:
            raise SystemFailureError(f"cannot read {self.path}: {error.strerror or error}") from None


class RecordTooLargeError(RequestError):
    """A format cannot hold a record as large as this one; it can hold the tensors alone."""


class ScriptLine(NamedTuple):
    """A line of a PyTorch script that needs no modelcli: an expression or a statement, and the imports it needs."""

    text: str
    imports: tuple[str, ...] = ()


class Format:
    """A checkpoint format. Subclass it, set the attributes, and override what the format can do.

    A format that is only read needs `name`, `title`, `recognises` and `read`; one that is written as well `label`,
    `written_suffixes`, `layout` and `verify`.

    A subclass holds no state: `checkpoints.formats` makes one instance of it.
    """

    #: As `--json` and `Contents.format` have it: `safetensors`.
    name: ClassVar[str]
    #: What a file of it is, in a sentence: `a safetensors file`.
    title: ClassVar[str]
    #: What messages call it where it cannot hold something: `safetensors`.
    label: ClassVar[str]
    #: How the names of its files end, in small letters and with the dot. Content decides what a file is; suffixes say
    #: that a word on the command line is a file, and what completion offers.
    suffixes: ClassVar[tuple[str, ...]] = ()
    #: The suffixes under which it is written, most usual first; none where it is only read.
    written_suffixes: ClassVar[tuple[str, ...]] = ()
    #: Which program writes such files, for help: `as torch.save writes`.
    written_as: ClassVar[str] = ""
    #: The names under which programs look for all weights of a model in a folder: `model.safetensors`.
    whole_files: ClassVar[tuple[str, ...]] = ()
    #: Whether it is a folder of files, not one file.
    is_folder: ClassVar[bool] = False
    #: The word of `--format-out` by which a folder is written in it; empty where it is only read, and for files.
    folder_word: ClassVar[str] = ""
    #: Whether tensors are read in the order in which they were written.
    keeps_order: ClassVar[bool] = True
    #: How the file is called that says what a folder of it holds, as a pattern: `*.index.json`.
    index_pattern: ClassVar[str] = ""
    #: The name of that file in a folder that modelcli writes.
    written_index: ClassVar[str] = ""
    #: `zip` or `tar` where its files are such archives. A file that starts as a tar archive is refused without `tar`,
    #: and one that ends as a zip archive and does not start as one is always refused.
    container: ClassVar[str | None] = None
    #: Whether it holds Python values besides tensors, and a training checkpoint around a state dict.
    holds_values: ClassVar[bool] = False
    #: Whether two tensors can be views into one storage, with strides of their own; else each is written row-major.
    holds_views: ClassVar[bool] = False
    #: Whether it can hold several state dicts, of which `--key` names one.
    has_keys: ClassVar[bool] = False

    # --- reading -------------------------------------------------------------------------------------------------

    def recognises(self, file: Candidate) -> bool:
        """Whether a file is of this format, by its content (of a folder's index: by its name)."""
        return False

    def read(self, file: Candidate, key: str | None) -> Contents:
        """Read what a file holds; no tensor's bytes are touched.

        Args:
            file: what `recognises` said yes to.
            key: the state dict in a training checkpoint; always None where `has_keys` is not set.

        Raises FileFormatError where the file is damaged, UnsafeError where only running code could read it. Any other
        exception is reported as a fault of the package that the format belongs to.
        """
        raise NotImplementedError

    def index_in(self, folder: Path, names: Sequence[str]) -> Path | None:
        """The file by which a folder of this format is read, None for another folder. `names` are those in it, sorted.

        Raises RequestError where the folder holds several.
        """
        return None

    def files_in(self, folder: Path, names: set[str]) -> set[str]:
        """Those of the files in a folder that a checkpoint of this format in it is made of."""
        return set()

    def is_index(self, name: str) -> bool:
        """Whether a file of this name is what programs read a folder of this format by."""
        return False

    def refuse_folder(self, folder: Path, names: Sequence[str]) -> None:
        """Raise RequestError for a folder that cannot be read, where this format knows what it is and what to do."""

    def explain(self, path: Path) -> tuple[str, str] | None:
        """What a file is that could not be read, and what to do about it; None where this format does not know it."""
        return None

    # --- writing -------------------------------------------------------------------------------------------------

    def layout(self, plan: Plan) -> Layout:
        """A file as it will be. Raises RequestError for what the format cannot hold."""
        raise NotImplementedError

    def verify(self, plan: Plan, path: Path) -> None:
        """Read the start of a written file back. Raises SystemFailureError where it is not what `plan` says.

        `path` is beside the target, and its name has no suffix of the format. Turn a FileFormatError of your reader
        into a SystemFailureError.
        """
        raise NotImplementedError

    def folder_layout(self, plan: Plan, max_bytes: int) -> FolderLayout:
        """A folder as it will be, with at most `max_bytes` of tensors in a file. Raises as `layout` does."""
        raise NotImplementedError

    def verify_folder(self, plan: Plan, layout: FolderLayout, path: Path) -> None:
        """Read the index and the start of every file of a written folder back. Raises as `verify` does."""
        raise NotImplementedError

    def superseded(self, folder: Path) -> set[str]:
        """The names of the files in a folder that give way to the checkpoint that is written there."""
        return set()

    # --- scripts -------------------------------------------------------------------------------------------------

    #: Why no script reads such a file, where `script_reads` gives None.
    unread_by_scripts: ClassVar[str] = "torch.load does not read it: modelcli save makes a checkpoint of it first"
    #: Names that a script gets from the imports of its lines: nothing of the user's can be called so there.
    script_names: ClassVar[frozenset[str]] = frozenset()

    def script_reads(self, path: str) -> ScriptLine | None:
        """An expression that gives what a file holds: a dict of tensors, or what `--key` looks into.

        `path` is a Python literal. None where no line of a script can read such a file.
        """
        return None

    def script_writes(self, path: str, value: str) -> ScriptLine | None:
        """A statement that writes a dict of tensors to a file; `path` is a literal and `value` an expression.

        None where no line of a script can write such a file.
        """
        return None
