"""Compare the bytes of two tensors of state-dict models in pieces."""

from __future__ import annotations

from collections.abc import Iterator

from modelcli.model.state_dict import StateDictTensor
from modelcli.values.state_dict_sources import Sources


def have_same_bytes(one: tuple[str, StateDictTensor], two: tuple[str, StateDictTensor]) -> bool:
    """Whether two tensors, each with its name, have the same dtype, shape and bytes, read in row-major order."""
    first, second = one[1], two[1]
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    sources = Sources()
    left, right = (_pieces(sources, *each) for each in (one, two))
    have, against = b"", b""
    while True:
        have, against = have or next(left, b""), against or next(right, b"")
        if not have or not against:
            return not have and not against
        size = min(len(have), len(against))
        if have[:size] != against[:size]:
            return False
        have, against = have[size:], against[size:]


def _pieces(sources: Sources, name: str, tensor: StateDictTensor) -> Iterator[bytes]:
    for piece in sources.row_major(name, tensor).chunks():
        yield bytes(piece)
