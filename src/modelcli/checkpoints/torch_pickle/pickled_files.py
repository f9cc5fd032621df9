"""Read the pickle of a file that `torch.save` wrote, in either of its formats, for readers of folders of such files."""

from __future__ import annotations

from modelcli.checkpoints.format import Candidate
from modelcli.checkpoints.torch_pickle import legacy_format, pickles, zip_format
from modelcli.checkpoints.torch_pickle.recognition import is_legacy
from modelcli.errors import FileFormatError, SystemFailureError


def pickle_of(file: Candidate) -> pickles.Pickle:
    """Return the pickle of a file. The bytes of tensors are not read.

    Raises FileFormatError if it is not a file that `torch.save` wrote.
    """
    if file.is_zip:
        archive = zip_format.archive_of(file)
        try:
            with file.path.open("rb") as handle:
                return archive.pickled(handle)
        except OSError as error:
            raise SystemFailureError(f"cannot read {file.path}: {error.strerror or error}") from None
    if is_legacy(file.head):
        return legacy_format.pickle_of(file.path)
    raise FileFormatError.damaged(str(file.path), "it should be a file that torch.save wrote")
