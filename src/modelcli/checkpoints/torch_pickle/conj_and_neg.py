"""The values of tensors that torch conjugates or negates lazily: `x.conj()` copies nothing and sets a flag.

torch.save writes the values of `x` and the flag. This module applies the flag, as `resolve_conj` and `resolve_neg` do:
it flips the sign bits of the values, one piece of the file at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from modelcli.checkpoints.storage import CHUNK, FileId, Storage, Windows, gathered, is_in_sequence
from modelcli.errors import FileFormatError

#: The bytes of one real number of each dtype whose sign is the highest bit of the last byte.
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
    """The bytes of a storage with the signs of imaginary parts (`conj`) or of all values (`neg`) flipped.

    The object stands for `nbytes` bytes from `start`, which may be inside an element. For a dtype without a sign bit,
    reading the bytes raises FileFormatError.
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
            yield _flipped(self, self.start + start, min(CHUNK, self.nbytes - start))

    def bytes(self) -> bytes:
        return b"".join(self.chunks())

    def mapped(self, _windows: Windows | None = None) -> memoryview:
        """The bytes in memory of their own."""
        return gathered(self)

    def part(self, start: int, nbytes: int) -> Resolved:
        return Resolved(self.whole, self.dtype, self.conj, self.neg, self.start + start, nbytes)


def _flipped(resolved: Resolved, start: int, nbytes: int) -> bytes:
    """Return `nbytes` bytes from `start`, which may be inside an element."""
    pattern = _sign_bits(resolved)
    shift = start % len(pattern)
    repeated = pattern * (nbytes // len(pattern) + 2)
    mask = int.from_bytes(repeated[shift : shift + nbytes], "little")
    data = resolved.whole.part(start, nbytes).bytes()
    return (int.from_bytes(data, "little") ^ mask).to_bytes(nbytes, "little")


def _sign_bits(resolved: Resolved) -> bytes:
    """Return the mask of the sign bits to flip in one element."""
    size = _REALS.get(resolved.dtype)
    if size is None:
        path = next((path for path, _ in resolved.files()), "the file")
        raise FileFormatError(
            f"{path}: a tensor of dtype {resolved.dtype} is stored with a neg flag, which modelcli cannot apply",
            "load it with torch, and save tensor.resolve_neg()",
        )
    flip, keep = bytes(size - 1) + b"\x80", bytes(size)
    if "complex" not in resolved.dtype:
        return flip if resolved.neg else keep
    return (flip if resolved.neg else keep) + (flip if resolved.neg != resolved.conj else keep)


def with_flags(storage: Storage, dtype: str, *, conj: bool, neg: bool) -> Storage:
    """Return a storage with the values of a conjugated or negated tensor of `dtype` in it. Nothing is read yet."""
    return Resolved(storage, dtype, conj, neg, 0, storage.nbytes) if conj or neg else storage
