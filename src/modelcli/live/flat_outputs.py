"""Flatten the output of a module, which may be nested in any way, into named tensors and plain values."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch

#: How deep an output is followed. What is deeper is named and not compared.
_DEPTH = 16


@dataclasses.dataclass(frozen=True)
class FlatOutput:
    """The leaves of an output.

    Attributes:
        values: the tensors and plain values, by the path to each: `logits`, `boxes.0`; empty for a lone tensor.
        unread: what can be compared by no rule, such as a function: the path, and the name of its class.
    """

    values: Mapping[str, Any]
    unread: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """The bytes of the tensors."""
        return sum(value.nbytes for value in self.values.values() if isinstance(value, torch.Tensor))


def flatten(output: Any, *, copied: bool = False) -> FlatOutput:
    """Flatten an output: tensors, lists, tuples, mappings, and the attributes of other objects.

    Args:
        output: what a module returned.
        copied: whether to copy the tensors, because the model may write into them afterwards.
    """
    values: dict[str, Any] = {}
    unread: list[str] = []
    for path, leaf in _leaves(output, "", 0, ()):
        if isinstance(leaf, torch.Tensor):
            dense = _dense(leaf)
            values[path] = dense.clone() if copied and dense is leaf else dense
        elif leaf is None or isinstance(leaf, bool | int | float | complex | str | bytes | torch.dtype | torch.device):
            values[path] = leaf
        else:
            unread.append(f"{path or 'the output'} ({type(leaf).__name__})")
    return FlatOutput(values, tuple(unread))


def _leaves(item: Any, path: str, depth: int, above: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
    parts = _parts(item)
    if parts is None or depth == _DEPTH or id(item) in above:
        if id(item) not in above:  # an object that contains itself has shown all that it has
            yield path, item
        return
    for name, part in parts.items():
        yield from _leaves(part, f"{path}.{name}" if path else name, depth + 1, (*above, id(item)))


def _parts(item: Any) -> dict[str, Any] | None:
    """Return what a value contains, by name; None for one that contains nothing that can be named."""
    if isinstance(item, torch.Tensor):
        return {str(number): part for number, part in enumerate(item.unbind())} if item.is_nested else None
    if isinstance(item, Mapping):
        return {str(key): value for key, value in item.items()}
    if isinstance(item, tuple) and hasattr(item, "_fields"):
        return {name: getattr(item, name) for name in item._fields}
    if isinstance(item, list | tuple):
        return {str(number): value for number, value in enumerate(item)}
    if isinstance(item, torch.nn.Module | type) or callable(item):
        return None
    attributes = getattr(item, "__dict__", None)
    return {str(name): value for name, value in attributes.items()} if attributes else None


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor with a value for each element, for one that is sparse or quantized."""
    if tensor.is_quantized:
        return tensor.dequantize()
    return tensor if tensor.layout is torch.strided else tensor.to_dense()
