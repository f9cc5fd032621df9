"""A checkpoint's tensors into an architecture: by PyTorch's own `load_state_dict`, on the meta device or for real."""

from __future__ import annotations

import collections
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modelcli.checkpoints import CompositeEntry, Contents, Storage, TensorEntry
from modelcli.checkpoints.limits import NESTING, Budget, room_for_nesting
from modelcli.checkpoints.storage import Windows
from modelcli.checkpoints.torch_pickle.composite_tensors import entry_of, makes_tensor
from modelcli.checkpoints.torch_pickle.pickles import Global, Opaque, OrderedDict
from modelcli.errors import AnswerNoError, RequestError
from modelcli.language.quoting import quoted
from modelcli.live import composites
from modelcli.live.build import Bare
from modelcli.live.meta_models import tagged
from modelcli.live.sources import dtype_of, is_composite, is_lazy, named_tensors, real_storage, set_flag
from modelcli.model import wrapper_prefixes
from modelcli.model.paths import ancestors, parent_of
from modelcli.model.state_dict_match import Mismatch
from modelcli.model.wrapper_prefixes import Unwrapping
from modelcli.wording import listed

#: How deep modules may lie in one another: PyTorch recurses into them, some frames for each level.
MAX_MODULE_DEPTH = 200


@dataclass(frozen=True)
class LoadReport:
    """How a checkpoint's keys fit an architecture's. `unwrapping` is what was taken out of them for that.

    `overruled` are names of tied tensors that the file holds apart, each with the name whose numbers both have now.
    """

    matched: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[Mismatch, ...] = ()
    unwrapping: Unwrapping = Unwrapping()
    overruled: tuple[tuple[str, str], ...] = ()

    @property
    def is_strict(self) -> bool:
        return not (self.missing or self.unexpected or self.mismatched)

    def refusal(
        self, contents: Contents, architecture: str, *, strict: bool, follows_record: bool = False
    ) -> AnswerNoError | None:
        """The error for a load that PyTorch would refuse as well; shapes that differ are refused in any case.

        `follows_record` says that the file itself names the architecture.
        """
        path = contents.path
        if not self.matched and self.missing:
            strict = True  # nothing of the file would be in the model: that is no load
        if self.is_strict or (not strict and not self.mismatched):
            return None
        parts = [
            f"{m.name} is {list(m.found)} in the file and {list(m.expected)} in the architecture"
            for m in self.mismatched[:3]
        ]
        for word, names in (("missing", self.missing), ("unexpected", self.unexpected)):
            if names:
                parts.append(f"{word}: {listed(names, 3)}")
        if follows_record:
            hint = f"the record in {path.name} is not that of its tensors: --arch names the architecture instead"
        elif contents.record is not None and contents.record.reference is not None:
            hint = f"{path.name} says itself which model it is: leave --arch out"
        elif strict and not self.mismatched:
            hint = "modelcli load --no-strict takes what matches"
            if not self.matched:
                hint = self._nothing_matches(path, architecture)
        else:
            form = quoted(f"{architecture.partition('(')[0]}(...)")
            hint = f"give --arch the arguments that the file was made with: {form}"
        return AnswerNoError(f"{path} does not fit {architecture}: {'; '.join(parts)}", hint)

    def _nothing_matches(self, path: Path, architecture: str) -> str:
        """What to say where not one key is in both: what was looked for, and where the names stand nevertheless."""
        name = architecture.partition("(")[0]
        if below := [prefix.removesuffix(".") for prefix in self.unwrapping.elsewhere]:
            out = quoted(f"{below[0]}.pth")
            command = f"modelcli extract {quoted(below[0])} -m {quoted(str(path))} -o {out}"
            return f"tensors of {name} stand below {listed(below, 4)} in the file: {command} takes that one out"
        told = f"no tensor of the file has a name and shape of {name}'s, below a prefix or not"
        return f"{told}: modelcli identify may know the file"


@dataclass
class StateDict:
    """A checkpoint's tensors as torch's, on meta with their sources, or real and mapped; what gives each of its other
    entries (quantized and sparse tensors, and what is no tensor) as a real value."""

    tensors: dict[str, torch.Tensor]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    extras: Mapping[str, Callable[[], Any]] = field(default_factory=dict)


def on_meta(contents: Contents) -> StateDict:
    """The tensors of a checkpoint on the meta device, each knowing where its bytes are."""
    return _state_dict(contents, lambda storage: tagged(storage.nbytes, storage), "meta")


def mapped(contents: Contents) -> StateDict:
    """The tensors of a checkpoint for real: mapped, so that pages are read when they are used."""
    return _state_dict(contents, partial(real_storage, windows=Windows()), "cpu")


def _state_dict(contents: Contents, storage_of: Callable[[Storage], torch.UntypedStorage], device: str) -> StateDict:
    storages: dict[Storage, torch.UntypedStorage] = {}

    def tensor(entry: TensorEntry) -> torch.Tensor:
        if entry.storage not in storages:
            storages[entry.storage] = storage_of(entry.storage)
        empty = torch.empty(0, dtype=dtype_of(entry.dtype), device=device)
        return empty.set_(storages[entry.storage], entry.offset, entry.shape, entry.stride)

    tensors = {name: tensor(entry) for name, entry in contents.tensors.items() if isinstance(entry, TensorEntry)}
    extras = {
        name: partial(_real_value, name, value, tensor)
        for name, value in (*contents.tensors.items(), *contents.extras.items())
        if name not in tensors
    }
    return StateDict(tensors, contents.metadata, extras)


def _real_value(name: str, value: Any, tensor: Callable[[TensorEntry], torch.Tensor], depth: int = 0) -> Any:
    """An inert value as what `torch.load(weights_only=True)` makes of it: an `_extra_state` is given to its module."""
    if depth > NESTING.value:
        raise RequestError(f"{name} is nested deeper than {NESTING.value}, or holds itself")

    def real(item: Any) -> Any:
        return _real_value(name, item, tensor, depth + 1)

    match value:
        case TensorEntry():
            return tensor(value)
        case CompositeEntry():
            return composites.real(name, value)
        case Opaque() if makes_tensor(value):
            return composites.real(name, entry_of(value, name, Budget(name, 0)))
        case OrderedDict():
            return collections.OrderedDict((key, real(item)) for key, item in value.items())
        case dict():
            return {key: real(item) for key, item in value.items()}
        case list() | tuple():
            return type(value)([real(item) for item in value])
        case Global(module="torch", name=dtype) if isinstance(getattr(torch, dtype, None), torch.dtype):
            return getattr(torch, dtype)
        case Opaque(call=Global() as call) if (make := _MAKERS.get(call.name)) is not None:
            return make(*real((value.appended,) if value.how == "set" else value.args))
        case Opaque() | Global():
            named = value if isinstance(value, Global) else value.call
            what = named.dotted if isinstance(named, Global) else "an object"
            raise RequestError(f"{name} is made by {what}, which only a real load can do")
    return value


#: What is made again from its arguments: names on the readers' allow-list, each without effects.
_MAKERS: Mapping[str, Callable[..., Any]] = {
    "encode": lambda text, encoding="latin1": text.encode(encoding),
    "set": set,
    "bytearray": lambda *args: args[0].encode(args[1]) if len(args) == 2 else bytearray(*args),
    "complex": complex,
    "Counter": collections.Counter,
    "Size": torch.Size,
    "device": torch.device,
    "_get_layout": lambda name: _layout(name),
}


def _layout(name: str) -> torch.layout:
    found = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, torch.layout):
        raise RequestError(f"torch {torch.__version__} has no layout {name}")
    return found


def compare(module: nn.Module, state: StateDict) -> tuple[StateDict, LoadReport]:
    """How the keys fit, and the state dict without what wrappers put into them. The module is not changed."""
    own: dict[str, Any] = module.state_dict(keep_vars=True)
    found = {name: tuple(tensor.shape) for name, tensor in state.tensors.items()} | dict.fromkeys(state.extras)
    unwrapping = wrapper_prefixes.fit(found, {name: _shape(value) for name, value in own.items()})
    if unwrapping:
        state = _unwrapped(state, unwrapping)
    mismatched = tuple(
        Mismatch(name, tuple(own[name].shape), tuple(tensor.shape))
        for name, tensor in state.tensors.items()
        if isinstance(own.get(name), torch.Tensor) and not is_lazy(own[name]) and not _same_shape(own[name], tensor)
    )
    return state, LoadReport(0, mismatched=mismatched, unwrapping=unwrapping)


def _shape(value: Any) -> tuple[int, ...] | None:
    """The shape of an entry of a state dict; None where it has none (yet)."""
    return tuple(value.shape) if isinstance(value, torch.Tensor) and not is_lazy(value) else None


def _unwrapped(state: StateDict, unwrapping: Unwrapping) -> StateDict:
    """A state dict with what wrappers put into its keys taken out, and out of the paths of its metadata."""
    # A wrapper has an entry for itself and one for what it wraps, which is that of the deeper path.
    metadata = {}
    for path in sorted(state.metadata, key=lambda path: path.count(".") + bool(path)):
        if (inner := unwrapping.path(path)) is not None:
            metadata[inner] = state.metadata[path]
    tensors = {unwrapping.key(name): value for name, value in state.tensors.items() if name not in unwrapping.dropped}
    extras = {unwrapping.key(name): value for name, value in state.extras.items()}
    return StateDict(tensors, metadata, extras)


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
    with room_for_nesting():
        given.update({name: value() for name, value in state.extras.items() if name in own})
    given._metadata = dict(state.metadata)
    try:
        keys = module.load_state_dict(given, strict=False, assign=True)
    except RuntimeError as error:
        # A whole number in the place of a trained parameter, or what a module's own hook refuses.
        raise AnswerNoError(f"PyTorch refuses the state dict: {' '.join(str(error).split())}") from None
    overruled = _tie_again(module, ties, given)
    loaded = {name for group in ties for name in group if set(group) & set(given)}
    empty = {name for name, value in own.items() if name.endswith("_extra_state") and _is_empty(value)}
    missing = tuple(name for name in keys.missing_keys if name not in wrong | loaded | empty)
    unexpected = (*keys.unexpected_keys, *(name for name in state.extras if name not in own))
    matched = sum(name in own for name in given)
    return LoadReport(matched, missing, tuple(unexpected), found.mismatched, found.unwrapping, overruled)


def _is_empty(value: Any) -> bool:
    """Whether an `_extra_state` says nothing: safetensors files leave it out, and nothing is missing without it."""
    return value is None or (isinstance(value, str | bytes | dict | list | tuple | set | bytearray) and not value)


class _WithMetadata(dict[str, Any]):
    """A dict that can carry `_metadata`, as a state dict does."""

    _metadata: dict[str, Any]


def _ties(module: nn.Module) -> list[list[str]]:
    groups: dict[int, list[str]] = defaultdict(list)
    for name, tensor in named_tensors(module).items():
        groups[id(tensor)].append(name)
    return [names for names in groups.values() if len(names) > 1]


def _tie_again(module: nn.Module, ties: list[list[str]], loaded: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """One tensor for each group again: the last that was loaded, as copying in order would leave it.

    Gives the names of others that the file holds apart, each with that of the last.
    """
    overruled = []
    for names in ties:
        last = [name for name in names if name in loaded]
        if last:
            places = {name: _place(loaded[name]) for name in last}
            overruled += [(name, last[-1]) for name in last if places[name] != places[last[-1]]]
            tensor = named_tensors(module)[last[-1]]
            for name in names:
                path, _, own = name.rpartition(".")
                owner = module.get_submodule(path)
                table: dict[str, Any] = owner._parameters if own in owner._parameters else owner._buffers
                table[own] = tensor
    return tuple(overruled)


def _place(tensor: torch.Tensor) -> tuple[int, int]:
    """Equal for two tensors of a state dict that begin at the same byte; what is no view of bytes is itself alone."""
    if is_composite(tensor):
        return id(tensor), 0
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


def bare_module(contents: Contents) -> nn.Module:
    """A tree of modules of unknown type, as the key names of a checkpoint say."""
    if any(name.count(".") > MAX_MODULE_DEPTH for name in (*contents.tensors, *contents.extras)):
        raise RequestError(
            f"the names in {contents.path} are nested deeper than {MAX_MODULE_DEPTH}: they can only be shown"
        )
    state = on_meta(contents)
    infos = contents.infos()
    made: dict[str, Any] = {}
    for name, tensor in state.tensors.items():
        info = infos[name]
        if info.tied_to is not None:
            made[name] = made[info.tied_to]
        elif info.kind == "parameter":
            made[name] = nn.Parameter(tensor, requires_grad=False)
            set_flag(made[name], info.requires_grad)
        else:
            made[name] = tensor
    rest = {name: value for name, value in contents.tensors.items() if name not in made}
    root = bare_tree(made | rest | dict(contents.extras))
    for path, module in root.named_modules():
        assert isinstance(module, Bare)
        module.origin = path
    return root


def bare_tree(entries: Mapping[str, Any]) -> Bare:
    """The tree of modules of unknown type with these entries of a state dict: parameters, buffers, and what is no
    tensor. It is at most `MAX_MODULE_DEPTH` deep."""
    root = Bare()
    for name, value in entries.items():
        path, own = _split(name)
        owner: nn.Module = root
        for step in path.split(".") if path else []:
            owner = owner._modules.setdefault(step, Bare())  # type: ignore[assignment]
        if isinstance(value, nn.Parameter):
            owner._parameters[own] = value
        elif isinstance(value, torch.Tensor):
            owner._buffers[own] = value
        else:
            owner.register_state_dict_post_hook(composites.Kept(own, value))
    return root


def metadata_of(module: nn.Module, contents: Contents) -> dict[str, Any]:
    """The `_metadata` of a file for a bare tree that edits may have changed: each entry goes where its module goes.

    The entry of a module without tensors goes with the module above it; a new module of a known type has its own.
    """
    if not contents.metadata:
        return {}
    in_file = {path for name in (*contents.tensors, *contents.extras) for path in ancestors(parent_of(name))}
    places: dict[str, list[str]] = defaultdict(list)
    known: dict[str, Any] = {}
    taken = set()
    for path, child in module.named_modules(remove_duplicate=False):
        taken.add(path)
        version = child.version if isinstance(child, Bare) else child._version
        if version is not None:
            known[path] = {"version": version}
        elif isinstance(child, Bare) and child.origin is not None:
            places[child.origin].append(path)
    found: dict[str, Any] = {path: entry for path, entry in contents.metadata.items() if not path}
    for path, entry in contents.metadata.items():
        above = next((above for above in ancestors(path) if above in in_file), "")
        for place in places[above]:
            moved = ".".join(part for part in (place, path[len(above) :].removeprefix(".")) if part)
            if above == path or moved not in taken:
                found[moved] = entry
    return found | known


def _split(name: str) -> tuple[str, str]:
    """The path of the module that holds a key, and its own name; a leading dot belongs to that, as in `.weight`."""
    if name.startswith("."):
        return "", name  # a module without a name could not be told from the root
    path, _, own = name.rpartition(".")
    return path, own


__all__ = [
    "LoadReport",
    "Mismatch",
    "StateDict",
    "bare_module",
    "bare_tree",
    "compare",
    "load",
    "mapped",
    "metadata_of",
    "on_meta",
]
