"""Write a trained model with the record of the file that its architecture came from."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modelcli import checkpoints, resolve, writing
from modelcli.checkpoints.record import Record
from modelcli.errors import RequestError
from modelcli.language.references import PythonObject, Source
from modelcli.live import planning
from modelcli.live.describe import dtype_name
from modelcli.live.opening import Live
from modelcli.live.sources import is_composite
from modelcli.model.tensors import TensorInfo
from modelcli.wording import counted


def save(model: nn.Module, path: str | os.PathLike[str], like: Path, *, force: bool) -> None:
    """See `modelcli.save`."""
    if not isinstance(model, nn.Module):
        raise RequestError(f"save needs an nn.Module, not {model!r:.40}")
    text = os.fspath(path)
    out, kind = Path(text), writing.format_of(text)
    writing.check_target(out, kind, force=force)
    model = _unwrapped(model)
    state = _on_cpu(model.state_dict())
    record = _record_of(like, out)
    _require_same_tensors(state, record, like)
    live = Live(_Holder(state), Source(str(like)), None)
    plan = planning.plan(live, out, kind, record=_with_flags(record, model, state))
    writing.write(plan, out, writing.WriteOptions(force=force), kind=kind)


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside `torch.compile` and parallel wrappers."""
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


class _Holder(nn.Module):
    """A module with a fixed state dict, so that a model on another device need not be copied as a whole."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        super().__init__()
        self.state = state

    def state_dict(self, *_args: Any, **_kwargs: Any) -> Any:
        return self.state


def _on_cpu(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the state dict on the CPU. Each storage of another device is copied once, so tied tensors stay tied."""
    storages: dict[int, torch.UntypedStorage] = {}
    found: dict[str, Any] = OrderedDict()
    for name, value in state.items():
        if not isinstance(value, torch.Tensor) or value.device.type in ("cpu", "meta"):
            found[name] = value
        elif is_composite(value) or value.is_conj() or value.is_neg():
            found[name] = value.cpu()
        else:
            own = value.untyped_storage()
            if own._cdata not in storages:
                storages[own._cdata] = own.cpu()
            empty = torch.empty(0, dtype=value.dtype)
            found[name] = empty.set_(storages[own._cdata], value.storage_offset(), value.size(), value.stride())
    found._metadata = getattr(state, "_metadata", {})  # type: ignore[attr-defined]
    return found


def _record_of(like: Path, out: Path) -> Record:
    """Return the record of a file, with its Python path relative to the output folder."""
    contents = checkpoints.read(like)
    record = contents.record
    why = None if record is None else resolve.disagreement(record, contents, to_build=True)
    if record is None or why is not None:
        raise RequestError(
            f"{like} contains no record that fits the model" + (f": {why}" if why else ""),
            "pass a file that modelcli wrote as like=, or use torch.save(model.state_dict(), ...)",
        )
    if record.reference is None:
        return record
    reference = resolve.parse_recorded(record.reference, like.parent, trust=False)
    if isinstance(reference, PythonObject):
        return replace(record, reference=reference.relative_to(Path(os.path.realpath(out)).parent))
    return record


def _require_same_tensors(state: Mapping[str, Any], record: Record, like: Path) -> None:
    """Raise RequestError if the model's tensors are not those of the record, because the architecture has changed."""
    listed = {info.name: info for info in record.blueprint.tensors if info.persistent}
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    why = None
    if missing := listed.keys() - tensors.keys():
        why = f"it lacks {counted(len(missing), 'tensor')}, such as {min(missing)}"
    elif extra := tensors.keys() - listed.keys():
        why = f"it has {counted(len(extra), 'tensor')} more, such as {min(extra)}"
    else:
        for name, info in listed.items():
            if info.shape != (shape := tuple(tensors[name].shape)):
                why = f"its {name} is {list(shape)}, but {list(info.shape or ())} in the record"
            elif info.tied_to is not None and not _are_one(tensors[name], tensors[info.tied_to]):
                why = f"its {name} and {info.tied_to} are not tied, but the record says so"
    if why is not None:
        raise RequestError(
            f"the model does not match the record of {like}: {why}",
            "first write the architecture (modelcli replace ... -o new.pth), then pass that file as like=",
        )


def _are_one(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one is other or not one.numel() or is_composite(one) or is_composite(other):
        return True
    views = [(t.untyped_storage()._cdata, t.storage_offset(), t.size(), t.stride()) for t in (one, other)]
    return views[0] == views[1]


def _with_flags(record: Record, model: nn.Module, state: Mapping[str, Any]) -> Record:
    """Return the record with the model's current flags and dtypes."""
    flags = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}

    def now(info: TensorInfo) -> TensorInfo:
        value = state.get(info.name)
        dtype = info.dtype if value is None or is_composite(value) else dtype_name(value.dtype)
        if info.kind != "parameter":
            return replace(info, dtype=dtype)
        return replace(info, dtype=dtype, requires_grad=flags.get(info.name, info.requires_grad))

    blueprint = replace(record.blueprint, tensors=tuple(map(now, record.blueprint.tensors)))
    frozen = tuple(name for name, parameter in model.named_parameters() if not parameter.requires_grad)
    return replace(record, blueprint=blueprint, frozen=frozen)
