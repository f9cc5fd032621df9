"""Find the entries of a live model's state dict that are not parameters or buffers.

A module may write anything into its state dict: quantized modules write packed weights, others an `_extra_state`. This
module converts each such entry to inert values, as reading a file does, and names the tensors in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from modelcli.checkpoints import CompositeEntry, TensorEntry
from modelcli.checkpoints.entries import info_of
from modelcli.checkpoints.limits import Budget
from modelcli.checkpoints.torch_pickle.nested_tensors import tensors_within
from modelcli.errors import ModelcliError
from modelcli.live import composites
from modelcli.live.inert import inert_of
from modelcli.live.sources import is_composite, is_lazy, named_tensors
from modelcli.live.walking import modules_in
from modelcli.model.tensors import TensorInfo
from modelcli.wording import counted, listed

#: The budget for looking through values; they are in memory already, or a reader has limited them.
_PLENTY = 1 << 40


@dataclass
class Apart:
    """The entries of a state dict that are not parameters or buffers.

    Attributes:
        tensors: the tensors, by name; `params` shows each of them.
        extras: the entries that are not tensors.
        unseen: the entries that modelcli cannot look at.
    """

    tensors: dict[str, TensorEntry | CompositeEntry] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)
    unseen: list[str] = field(default_factory=list)


def of(module: nn.Module) -> Apart:
    """Return the entries of a module's state dict that are in no module's parameters or buffers."""
    found = Apart()
    if not any(map(writes_more, modules_in(module))):
        return found
    try:
        state: Mapping[str, Any] = module.state_dict(keep_vars=True)
    except Exception:  # the class may be the user's own, and need values that the meta device does not have
        found.unseen.append("what the model's own state_dict() writes")
        return found
    own = named_tensors(module)
    for name, value in state.items():
        if name not in own and not (isinstance(value, torch.Tensor) and is_lazy(value)):
            _take(found, name, value)
    inner, unseen = tensors_within(found.extras, state, "the model", Budget("the model", _PLENTY))
    found.tensors |= inner
    found.unseen += unseen
    return found


def writes_more(module: nn.Module) -> bool:
    """Whether a module may write more than its parameters and buffers into a state dict."""
    kind = type(module)
    return (
        kind._save_to_state_dict is not nn.Module._save_to_state_dict
        or kind.get_extra_state is not nn.Module.get_extra_state
        or kind.state_dict is not nn.Module.state_dict
        or bool(module._state_dict_hooks)
    )


def _take(found: Apart, name: str, value: Any) -> None:
    if isinstance(value, CompositeEntry | TensorEntry):
        found.tensors[name] = value
        return
    try:
        if isinstance(value, torch.Tensor) and is_composite(value):
            entry = composites.held(name, value)
        elif isinstance(value, torch.Tensor):
            entry = composites.as_read(composites.planned_here(value)) if not value.is_meta else None
        else:
            found.extras[name] = composites.as_read(inert_of(name, value, composites.planned_here))
            return
    except ModelcliError:
        entry = None
    if entry is None:
        found.unseen.append(name)
    else:
        found.tensors[name] = entry


def rows(module: nn.Module) -> list[TensorInfo]:
    """Return these tensors for a blueprint. Whether they are trainable is not known."""
    found = of(module)
    infos = []
    first: dict[object, str] = {}
    for name, entry in found.tensors.items():
        info = info_of(name, entry, first.setdefault(entry.view or name, name))
        if not info.shape and not info.dtype.startswith("q"):
            info = replace(info, kind="buffer")  # a scale or a zero point
        infos.append(replace(info, requires_grad=None))
    return infos


def may_write_more(module: nn.Module) -> bool:
    """Whether the state dict of a module may hold more than what is in the tables of its modules."""
    return any(map(writes_more, modules_in(module)))


def inner_of(name: str, value: Any) -> list[tuple[TensorInfo, object]]:
    """The tensors in an entry that is no tensor, each with what is equal for two that are the same."""
    found = Apart()
    _take(found, name, value)
    inner, _ = tensors_within(found.extras, (), "the model", Budget("the model", _PLENTY))
    rows: list[tuple[TensorInfo, object]] = []
    for inner_name, entry in inner.items():
        info = info_of(inner_name, entry, inner_name)
        if not info.shape and not info.dtype.startswith("q"):
            info = replace(info, kind="buffer")  # a scale or a zero point
        rows.append((replace(info, requires_grad=None), entry.view))
    return rows


def note_of(module: nn.Module) -> list[str]:
    """Return notes about tensors that PyTorch does not list, and about entries that modelcli cannot look at."""
    found = of(module)
    notes = []
    if found.tensors:
        notes.append(
            f"{counted(len(found.tensors), 'tensor')} of its state dict, such as {next(iter(found.tensors))}, "
            "are packed inside modules: PyTorch's parameters() does not list them, but the totals include them"
        )
    if found.unseen:
        notes.append(f"{listed(found.unseen, 3)} cannot be looked at, so the totals leave it out")
    return notes
