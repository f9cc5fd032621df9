"""The format of pickles that `torch.save` did not write: state dicts of `pickle.dump`, and NumPy arrays by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modelcli.checkpoints.format import Candidate, Format

if TYPE_CHECKING:
    from modelcli.checkpoints.contents import Contents


class PlainPickle(Format):
    """A pickle that contains its values, as detectron2 writes them. modelcli reads but does not write this format."""

    name = "pickle"
    title = "a pickle that torch.save did not write"
    suffixes = (".pkl", ".pickle")
    has_keys = True

    def recognises(self, file: Candidate) -> bool:
        """Whether the file starts like a pickle of protocol 2 to 5."""
        return file.head.startswith(b"\x80") and file.head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")

    def read(self, file: Candidate, key: str | None) -> Contents:
        from modelcli.checkpoints.plain_pickle import reading

        return reading.read(file.path, key)
