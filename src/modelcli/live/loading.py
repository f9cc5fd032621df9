"""A checkpoint's tensors into an architecture: by PyTorch's own `load_state_dict`, on the meta device or for real."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modelcli import checkpoints
from modelcli.blueprint import Shape
from modelcli.checkpoints import Contents, LegacyFileError, Span, TensorEntry
from modelcli.checkpoints.torch_zip import STATE_DICT_KEYS
from modelcli.errors import AnswerNoError, FileFormatError, RequestError, UnsafeError
from modelcli.live.build import Bare
from modelcli.live.sources import Value, is_lazy, real_storage
from modelcli.live.twins import tagged

#: What wrappers put before every key: DataParallel, torch.compile, Lightning.
WRAPPER_PREFIXES = ("module.", "_orig_mod.", "model.")


@dataclass(frozen=True)
class Mismatch:
    """A tensor whose shape in the file is not that in the architecture."""

    name: str
    expected: Shape
    found: Shape


@dataclass(frozen=True)
class LoadReport:
    """How a checkpoint's keys fit an architecture's. `prefix` was stripped from every key."""

    matched: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[Mismatch, ...] = ()
    prefix: str = ""

    @property
    def is_strict(self) -> bool:
        return not (self.missing or self.unexpected or self.mismatched)

    def refusal(self, contents: Contents, architecture: str, *, strict: bool) -> AnswerNoError | None:
        """The error for a load that PyTorch would refuse as well; shapes that differ are refused in any case."""
        path = contents.path
        if self.is_strict or (not strict and not self.mismatched):
            return None
        parts = [
            f"{m.name} is {list(m.found)} in the file and {list(m.expected)} in the architecture"
            for m in self.mismatched[:3]
        ]
        for word, names in (("missing", self.missing), ("unexpected", self.unexpected)):
            if names:
                parts.append(f"{word}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}")
        if contents.record is not None:
            hint = f"{path.name} says itself which model it is: leave --arch out"
        elif strict and not self.mismatched:
            hint = "modelcli load --no-strict takes what fits"
        else:
            hint = f"--arch takes arguments too: --arch '{architecture.partition('(')[0]}(num_classes=10)'"
        return AnswerNoError(f"{path} does not fit {architecture}: {'; '.join(parts)}", hint)


@dataclass
class StateDict:
    """A checkpoint's tensors as torch's, on meta with their sources, or real and mapped."""

    tensors: dict[str, torch.Tensor]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    extras: Mapping[str, Any] = field(default_factory=dict)


def read(path: Path, key: str | None) -> Contents:
    """Read a checkpoint; torch's format from before 1.6 through torch itself."""
    try:
        return checkpoints.read(path, key=key)
    except LegacyFileError as legacy:
        return _read_legacy(legacy.path, key)


def _read_legacy(path: Path, key: str | None) -> Contents:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if "weights_only" in str(error).lower() or "unsupported global" in str(error).lower():
            raise UnsafeError(
                f"{path} holds objects that only running code could load",
                "save model.state_dict() where the model was made, and use that file",
            ) from None
        raise FileFormatError(f"{path} is damaged: {error}") from None
    keys: tuple[str, ...] = ()
    value = tree
    candidates = [key] if key else ["", *STATE_DICT_KEYS]
    for candidate in candidates:
        value = tree.get(candidate) if candidate and isinstance(tree, dict) else tree
        if isinstance(value, dict) and any(isinstance(item, torch.Tensor) for item in value.values()):
            keys = (candidate,) if candidate else ()
            break
    else:
        raise RequestError(f"{path} holds no state dict" + (f" under {key!r}" if key else ""), "--key names it")
    shared: dict[int, Value] = {}
    entries = {name: _entry(item, shared) for name, item in value.items() if isinstance(item, torch.Tensor)}
    notes: tuple[str, ...] = (f"{path.name} is in torch's old format: it was read into memory",)
    if keys:
        notes += (f"took the state dict under {keys[0]!r} of {path.name}",)
    metadata = getattr(value, "_metadata", None) or {}
    return Contents(path, "pth", entries, metadata=dict(metadata), notes=notes)


def _entry(tensor: torch.Tensor, shared: dict[int, Value]) -> TensorEntry:
    """A tensor in memory as an entry whose storage is a value; one for each storage, so that ties stay."""
    storage: Any = Value(tensor.untyped_storage())
    storage = shared.setdefault(storage.storage._cdata, storage)
    return TensorEntry(
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        stride=tuple(tensor.stride()),
        offset=int(tensor.storage_offset()),
        storage=storage,
        requires_grad=tensor.requires_grad,
        is_parameter=isinstance(tensor, nn.Parameter),
    )


def on_meta(contents: Contents) -> StateDict:
    """The tensors of a checkpoint on the meta device, each knowing where its bytes are."""
    return _state_dict(contents, lambda span: tagged(span.nbytes, span), "meta")


def mapped(contents: Contents) -> StateDict:
    """The tensors of a checkpoint for real: mapped, so that pages are read when they are used."""
    return _state_dict(contents, real_storage, "cpu")


def _state_dict(contents: Contents, storage_of: Callable[[Span], torch.UntypedStorage], device: str) -> StateDict:
    storages: dict[Span, torch.UntypedStorage] = {}
    tensors = {}
    for name, entry in contents.tensors.items():
        if entry.storage not in storages:
            storages[entry.storage] = storage_of(entry.storage)
        empty = torch.empty(0, dtype=getattr(torch, entry.dtype), device=device)
        tensors[name] = empty.set_(storages[entry.storage], entry.offset, entry.shape, entry.stride)
    return StateDict(tensors, contents.metadata, contents.extras)


def foreign_prefix(keys: set[str], own: set[str]) -> str:
    """What wrappers put before every key of a file, as the architecture's own keys show."""
    prefix = ""
    while keys and not keys & own:
        found = next((p for p in WRAPPER_PREFIXES if all(key.startswith(p) for key in keys)), None)
        if found is None or any(key.startswith(found) for key in own):
            break
        keys = {key.removeprefix(found) for key in keys}
        prefix += found
    return prefix


def compare(module: nn.Module, state: StateDict) -> tuple[StateDict, LoadReport]:
    """How the keys fit, and the state dict without foreign prefixes. The module is not changed."""
    own: dict[str, Any] = module.state_dict(keep_vars=True)
    prefix = foreign_prefix(set(state.tensors), set(own))
    if prefix:
        strip = len(prefix)
        metadata = {k[strip:] if k.startswith(prefix) else k: v for k, v in state.metadata.items()}
        state = StateDict({k[strip:]: v for k, v in state.tensors.items()}, metadata, state.extras)
    mismatched = tuple(
        Mismatch(name, tuple(own[name].shape), tuple(tensor.shape))
        for name, tensor in state.tensors.items()
        if isinstance(own.get(name), torch.Tensor) and not is_lazy(own[name]) and not _same_shape(own[name], tensor)
    )
    return state, LoadReport(0, mismatched=mismatched, prefix=prefix)


def _same_shape(own: torch.Tensor, found: torch.Tensor) -> bool:
    return own.shape == found.shape or (own.dim() == 0 and tuple(found.shape) == (1,))


def load(module: nn.Module, state: StateDict) -> LoadReport:
    """Put a checkpoint's tensors in the place of the module's own; what does not match stays as it was.

    The tensors themselves are taken, not their values. Parameters that were tied are tied again, flags stay the
    module's.
    """
    ties = _ties(module)
    state, found = compare(module, state)
    wrong = {mismatch.name for mismatch in found.mismatched}
    own = module.state_dict(keep_vars=True)
    given: Any = _WithMetadata({name: t for name, t in state.tensors.items() if name not in wrong})
    given.update({name: value for name, value in state.extras.items() if name in own})
    given._metadata = dict(state.metadata)
    keys = module.load_state_dict(given, strict=False, assign=True)
    _tie_again(module, ties, set(given))
    loaded = {name for group in ties for name in group if set(group) & set(given)}
    missing = tuple(name for name in keys.missing_keys if name not in wrong and name not in loaded)
    unexpected = (*keys.unexpected_keys, *(name for name in state.extras if name not in own))
    matched = sum(name in own for name in given)
    return LoadReport(matched, missing, tuple(unexpected), found.mismatched, found.prefix)


class _WithMetadata(dict[str, Any]):
    """A dict that can carry `_metadata`, as a state dict does."""

    _metadata: dict[str, Any]


def _ties(module: nn.Module) -> list[list[str]]:
    groups: dict[int, list[str]] = defaultdict(list)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        groups[id(parameter)].append(name)
    return [names for names in groups.values() if len(names) > 1]


def _tie_again(module: nn.Module, ties: list[list[str]], loaded: set[str]) -> None:
    """One `Parameter` for each group again: the last that was loaded, as copying in order would leave it."""
    for names in ties:
        last = [name for name in names if name in loaded]
        if last:
            parameter = module.get_parameter(last[-1])
            for name in names:
                path, _, own = name.rpartition(".")
                module.get_submodule(path)._parameters[own] = parameter


def bare_module(contents: Contents) -> nn.Module:
    """A tree of modules of unknown type, as the key names of a checkpoint say."""
    root = Bare()
    state = on_meta(contents)
    infos = contents.infos()
    made: dict[str, torch.Tensor] = {}
    for name, tensor in state.tensors.items():
        info = infos[name]
        path, _, own = name.rpartition(".")
        owner: nn.Module = root
        for step in path.split(".") if path else []:
            owner = owner._modules.setdefault(step, Bare())  # type: ignore[assignment]
        if info.tied_to is not None:
            made[name] = made[info.tied_to]
        elif info.kind == "parameter":
            trained = info.requires_grad is not False and tensor.dtype.is_floating_point
            made[name] = nn.Parameter(tensor, requires_grad=trained)
        else:
            made[name] = tensor
        if isinstance(made[name], nn.Parameter):
            owner._parameters[own] = made[name]  # type: ignore[assignment]
        else:
            owner._buffers[own] = made[name]
    return root


__all__ = [
    "LoadReport",
    "Mismatch",
    "StateDict",
    "bare_module",
    "compare",
    "load",
    "mapped",
    "on_meta",
    "read",
]
