"""Statements that change the values of tensors in place, for the edits that use `surgery.changed_values`.

A tensor with several names is changed once, so that tied tensors stay tied and views show the new values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import nn

from modelcli.live.script import access_paths
from modelcli.live.script.grouped_calls import calls_on_each
from modelcli.live.script.source_text import STATEMENTS, InexpressibleError, loop, quoted
from modelcli.live.sources import named_tensors
from modelcli.live.surgery.storages import key_of, shown_by
from modelcli.model.shared_bytes import Shown, tied
from modelcli.model.state_dict import StateDictModel
from modelcli.model.tensors import Shape


class _View(NamedTuple):
    """The part of a storage that a tensor shows. Equal for two tensors that show the same part."""

    storage: object
    offset: int
    shape: Shape
    stride: Shape
    dtype: object

    @property
    def subscript(self) -> str:
        """The index that picks one copy of the elements that an expanded tensor repeats; empty for other tensors.

        torch refuses to change an expanded tensor in place.
        """
        if all(step or size <= 1 for size, step in zip(self.shape, self.stride, strict=True)):
            return ""
        return f"[{', '.join(':' if step else ':1' for step in self.stride)}]"

    @property
    def overlaps_itself(self) -> bool:
        """Whether two elements may be the same bytes, apart from the repetitions along an expanded dimension."""
        end = 1
        for step, size in sorted(zip(self.stride, self.shape, strict=True)):
            if step and size > 1:
                if step < end:
                    return True
                end = step * (size - 1) + end
        return False


def of_model(model: nn.Module, names: Iterable[str], call: str) -> list[str]:
    """Return the statements that change tensors of `model`.

    Args:
        model: the model before the edit.
        names: the names of dense tensors.
        call: the method call on each tensor: `.mul_(0.5)`.

    Raises:
        InexpressibleError: two of the tensors may overlap in memory, so that some elements would change twice.
    """
    tensors = named_tensors(model)
    views = {
        name: _View(
            key_of(tensors[name]),
            int(tensors[name].storage_offset()),
            tuple(tensors[name].shape),
            tuple(tensors[name].stride()),
            tensors[name].dtype,
        )
        for name in names
    }
    distinct = _distinct_tensors(views, shown_by(model))
    lines = [
        f"{access_paths.tensor_expression(model, name)}.data{index}{call}" for name, index in distinct.items() if index
    ]
    parameters = {name for name, _ in nn.Module.named_parameters(model, remove_duplicate=False)}
    for getter, is_parameter in (("get_parameter", True), ("get_buffer", False)):
        plain = [name for name, index in distinct.items() if not index and (name in parameters) == is_parameter]
        lines += calls_on_each(plain, lambda name: access_paths.tensor_expression(model, name), getter, f".data{call}")
    return lines


def of_state_dict(model: StateDictModel, names: Iterable[str], call: str) -> list[str]:
    """Return the statements that change tensors of `state`. Arguments and errors are those of `of_model`."""
    views = {}
    for name in names:
        tensor = model.tensors[name]
        assert tensor.shape is not None
        views[name] = _View(tensor.storage, tensor.offset, tensor.shape, tensor.stride, tensor.dtype)
    distinct = _distinct_tensors(views, model.shown)
    lines = [f"state[{quoted(name)}].data{index}{call}" for name, index in distinct.items() if index]
    plain = [name for name, index in distinct.items() if not index]
    if len(plain) <= STATEMENTS:
        return [*lines, *(f"state[{quoted(name)}].data{call}" for name in plain)]
    return [*lines, *loop("key", plain, f"state[key].data{call}")]


def _distinct_tensors(views: Mapping[str, _View], shown: Mapping[str, Shown]) -> dict[str, str]:
    """Return one name of each distinct tensor that is not empty, with the index of the elements to change."""
    first: dict[_View, str] = {}
    for name, view in views.items():
        if shown[name].storage is not None:  # None for an empty tensor
            first.setdefault(view, name)
    for group in tied({name: shown[name] for name in first.values()}):
        if len(group) > 1:
            raise InexpressibleError(
                f"{group[0]} and {group[1]} lie in one piece of memory, and what both show would change twice"
            )
    for view, name in first.items():
        if view.overlaps_itself:
            raise InexpressibleError(f"elements of {name} are the same bytes, which would change several times")
    return {name: view.subscript for view, name in first.items()}


__all__ = ["of_model", "of_state_dict"]
