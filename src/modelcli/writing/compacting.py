"""Find storages of which the tensors use only a part, and plan a file without the unused bytes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from modelcli.checkpoints import shapes
from modelcli.checkpoints.plan import PlannedTensor, Source
from modelcli.model.dtypes import ITEM_BYTES
from modelcli.model.tensors import Shape

#: A note reports unused bytes if there are at least so many, or at least as many as used bytes.
_NOTE_FROM = 1_000_000


def unused_bytes_note(tensors: Mapping[str, PlannedTensor]) -> str | None:
    """Return the note for storages that are much larger than what the tensors use of them; else None."""
    held = shown = 0
    spans: dict[tuple[Shape, Shape, str], int] = {}  # the bytes from first to last: 100,000 tensors have few shapes
    for names in _by_source(tensors).values():
        tensor = tensors[names[0]]
        held += tensor.source.nbytes
        if len(names) > 1:
            shown += sum(end - start for start, end, _ in _runs(tensors, names))
            continue
        alike = (tensor.shape, tensor.stride, tensor.dtype)
        if (nbytes := spans.get(alike)) is None:
            nbytes = spans[alike] = shapes.extent(tensor.shape, tensor.stride) * ITEM_BYTES[tensor.dtype]
        shown += nbytes
    if held - shown < min(_NOTE_FROM, max(shown, 1)):
        return None
    return (
        f"the tensors use {shown:,} of the {held:,} bytes that are written: they are slices of larger storages, "
        "which are written whole, as torch.save does; --compact writes only what they use"
    )


def compacted(tensors: Mapping[str, PlannedTensor], row_major: Callable[[str], Source]) -> dict[str, PlannedTensor]:
    """Return the same tensors, each in a storage of only the bytes that it uses.

    Tied tensors stay tied. Tensors that share bytes keep one storage unless separate storages would be smaller.

    Args:
        tensors: the planned tensors, by name.
        row_major: gives the bytes of a contiguous copy of the named tensor.
    """
    found: dict[str, PlannedTensor] = {}
    for names in _by_source(tensors).values():
        for start, end, inside in _runs(tensors, names):
            apart = {tensors[name].view: name for name in reversed(inside)}
            if sum(_used_bytes(tensors[name]) for name in apart.values()) < end - start:
                found |= _each_by_itself(tensors, row_major, inside)
                continue
            whole: Any = tensors[inside[0]].source
            source = whole.part(start, end - start)
            for name in inside:
                offset = tensors[name].offset - start // ITEM_BYTES[tensors[name].dtype] if end else 0
                found[name] = replace(tensors[name], source=source, offset=offset)
    return {name: found[name] for name in tensors}


def _each_by_itself(
    tensors: Mapping[str, PlannedTensor], row_major: Callable[[str], Source], names: Sequence[str]
) -> dict[str, PlannedTensor]:
    sources: dict[object, Any] = {}
    made = {}
    for name in names:
        tensor = tensors[name]
        if tensor.view not in sources:
            sources[tensor.view] = row_major(name)
        made[name] = replace(tensor, source=sources[tensor.view], stride=shapes.row_major(tensor.shape), offset=0)
    return made


def _used_bytes(tensor: PlannedTensor) -> int:
    return prod(tensor.shape) * ITEM_BYTES[tensor.dtype]


def _by_source(tensors: Mapping[str, PlannedTensor]) -> dict[object, list[str]]:
    """Return the names of the tensors in each storage."""
    found: dict[object, list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        found[tensor.source].append(name)
    return found


def _runs(tensors: Mapping[str, PlannedTensor], names: Sequence[str]) -> list[tuple[int, int, list[str]]]:
    """Return the used ranges of one storage: first byte, end, and the names of the tensors that use the range."""
    found: list[tuple[int, int, list[str]]] = []
    for start, end, name in sorted((*_byte_span(tensors[name]), name) for name in names):
        if found and start < found[-1][1]:
            first, last, inside = found.pop()
            found.append((first, max(last, end), [*inside, name]))
        elif found and start == end == found[-1][0] == found[-1][1]:
            found[-1][2].append(name)
        else:
            found.append((start, end, [name]))
    return [(_aligned(start, tensors, inside), end, inside) for start, end, inside in found]


def _byte_span(tensor: PlannedTensor) -> tuple[int, int]:
    """Return the range of bytes (start, end) that a tensor uses in its storage."""
    item, last = ITEM_BYTES[tensor.dtype], shapes.extent(tensor.shape, tensor.stride)
    return (tensor.offset * item, (tensor.offset + last) * item) if last else (0, 0)


def _aligned(start: int, tensors: Mapping[str, PlannedTensor], names: Sequence[str]) -> int:
    """Round a start down to a multiple of the element size of every tensor in the range."""
    return start - start % max(ITEM_BYTES[tensors[name].dtype] for name in names)
