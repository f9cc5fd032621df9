"""The values of tensors that torch conjugates or negates lazily: `x.conj()` copies nothing and sets a bit.

torch.save writes the values of `x` and the bit. Here the bit is resolved, as `resolve_conj` and `resolve_neg` do: the
sign bits of the values are flipped, a piece of the file at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from modelcli.checkpoints.storage import CHUNK, FileId, Storage, Windows, gathered, is_in_sequence
from modelcli.errors import FileFormatError

#: The bytes of one real number of each dtype whose sign is one bit, the last of its last byte.
_REALS = {
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "complex32": 2,
    "bcomplex32": 2,
    "complex64": 4,
    "complex128": 8,
}


@dataclass(frozen=True, slots=True)
class Resolved:
    """The bytes of a storage with signs flipped: of imaginary parts (`conj`), of all values (`neg`), or of both.

    These are the `nbytes` from `start`, wherever in an element that is. A dtype without a sign bit is refused when the
    bytes are asked for.
    """

    whole: Storage
    dtype: str
    conj: bool
    neg: bool
    start: int
    nbytes: int

    @property
    def in_sequence(self) -> bool:
        return is_in_sequence(self.whole)

    def files(self) -> Iterable[FileId]:
        return self.whole.files()

    def chunks(self) -> Iterator[bytes]:
        for start in range(0, self.nbytes, CHUNK):
            yield _turned(self, self.start + start, min(CHUNK, self.nbytes - start))

    def bytes(self) -> bytes:
        return b"".join(self.chunks())

    def mapped(self, _windows: Windows | None = None) -> memoryview:
        """The bytes in memory of their own."""
        return gathered(self)

    def part(self, start: int, nbytes: int) -> Resolved:
        return Resolved(self.whole, self.dtype, self.conj, self.neg, self.start + start, nbytes)


def _turned(of: Resolved, start: int, nbytes: int) -> bytes:
    """So many bytes from a start on, which may lie inside an element."""
    pattern = _pattern(of)
    shift = start % len(pattern)
    repeated = pattern * (nbytes // len(pattern) + 2)
    mask = int.from_bytes(repeated[shift : shift + nbytes], "little")
    data = of.whole.part(start, nbytes).bytes()
    return (int.from_bytes(data, "little") ^ mask).to_bytes(nbytes, "little")


def _pattern(of: Resolved) -> bytes:
    """The sign bits to turn in one element."""
    size = _REALS.get(of.dtype)
    if size is None:
        path = next((path for path, _ in of.files()), "the file")
        raise FileFormatError(
            f"{path}: a tensor of dtype {of.dtype} is negated only when it is read, which is not done here",
            "save tensor.resolve_neg() instead",
        )
    turned, same = bytes(size - 1) + b"\x80", bytes(size)
    if "complex" not in of.dtype:
        return turned if of.neg else same
    return (turned if of.neg else same) + (turned if of.neg != of.conj else same)


def resolved(storage: Storage, dtype: str, *, conj: bool, neg: bool) -> Storage:
    """The bytes of a storage as a conjugated or negated tensor of `dtype` in it has them; nothing is read yet."""
    return Resolved(storage, dtype, conj, neg, 0, storage.nbytes) if conj or neg else storage
