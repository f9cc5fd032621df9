"""The bytes of a storage for a tensor that is not tied to any other tensor of these bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from modelcli.checkpoints.storage import FileId, Span, Storage, Windows, gathered, is_in_sequence


class Copied:
    """A storage with the bytes of another one. It equals itself alone, so it is written and loaded by itself."""

    def __init__(self, original: Storage) -> None:
        self.original = original
        self._parts: dict[tuple[int, int], Copied] = {(0, original.nbytes): self}

    @property
    def nbytes(self) -> int:
        return self.original.nbytes

    @property
    def in_sequence(self) -> bool:
        return is_in_sequence(self.original)

    def files(self) -> Iterable[FileId]:
        return self.original.files()

    def chunks(self) -> Iterator[bytes | memoryview]:
        return self.original.chunks()

    def bytes(self) -> bytes:
        return self.original.bytes()

    def mapped(self, windows: Windows | None = None) -> memoryview:
        """Return the bytes as writable memory that the original does not use."""
        if isinstance(self.original, Span):
            return self.original.mapped()  # in a mapping of `windows`, both would be the same memory
        return gathered(self.original)

    def part(self, start: int, nbytes: int) -> Storage:
        """Return `nbytes` of the bytes, from `start` on; the same object each time."""
        if (start, nbytes) not in self._parts:
            self._parts[start, nbytes] = Copied(self.original.part(start, nbytes))
        return self._parts[start, nbytes]


class Rearranged(Copied):
    """The bytes of a tensor that is made of others.

    Args:
        original: the bytes.
        begins_at: the place in a file of the first of them, if there is one; only the path and the offset count. Among
            copied tensors, a writer puts this one there.
    """

    def __init__(self, original: Storage, begins_at: Span | None) -> None:
        super().__init__(original)
        self.begins_at = begins_at
