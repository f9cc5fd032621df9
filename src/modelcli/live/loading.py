"""Load a checkpoint's tensors into an architecture with PyTorch's `load_state_dict`, on meta or with values."""

from __future__ import annotations

import collections
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from modelcli.checkpoints import CompositeEntry, Contents, Storage, TensorEntry, formats
from modelcli.checkpoints.limits import NESTING, Budget, room_for_nesting
from modelcli.checkpoints.storage import Windows
from modelcli.checkpoints.torch_pickle.composite_tensors import entry_of, makes_tensor
from modelcli.checkpoints.torch_pickle.inert_values import Global, Opaque, OrderedDict
from modelcli.errors import AnswerNoError, RequestError
from modelcli.language.quoting import quoted
from modelcli.live import composites
from modelcli.live.meta_models import tagged
from modelcli.live.sources import dtype_of, is_composite, is_lazy, named_tensors, real_storage
from modelcli.model import wrapper_prefixes
from modelcli.model.key_report import KeyReport
from modelcli.model.state_dict_match import Mismatch
from modelcli.model.wrapper_prefixes import Unwrapping
from modelcli.wording import listed

if TYPE_CHECKING:
    from modelcli.live.build import Architecture

#: How deep modules may be nested: PyTorch recurses into them, with several stack frames per level.
MAX_MODULE_DEPTH = 200


@dataclass(frozen=True)
class LoadReport(KeyReport):
    """How the keys of a checkpoint fit an architecture, and whether that refuses the load."""

    def refusal(
        self, contents: Contents, architecture: str, *, strict: bool, follows_record: bool = False
    ) -> AnswerNoError | None:
        """Return the error if the load is refused, as PyTorch would; None if it is accepted.

        Args:
            contents: the checkpoint.
            architecture: the reference of the architecture.
            strict: whether missing and unexpected keys are errors; other shapes always are.
            follows_record: whether the file's own record names the architecture.
        """
        path = contents.path
        if not self.matched and self.missing:
            strict = True  # nothing would be loaded
        if self.is_strict or (not strict and not self.mismatched):
            return None
        told = "; ".join(self.differences("in the file", "in the architecture"))
        if follows_record:
            hint = f"the record in {path.name} does not match its tensors: pass --arch REFERENCE"
        elif contents.record is not None and contents.record.reference is not None:
            hint = f"{path.name} records its own architecture: remove --arch"
        elif strict and not self.mismatched:
            hint = "modelcli load --no-strict loads what matches"
            if not self.matched:
                hint = self._nothing_matches(path, architecture)
        else:
            form = quoted(f"{architecture.partition('(')[0]}(...)")
            hint = f"pass --arch with the arguments that the file was made with: {form}"
        return AnswerNoError(f"{path} does not fit {architecture}: {told}", hint)

    def _nothing_matches(self, path: Path, architecture: str) -> str:
        """Return the hint if no key matches: the prefixes under which the file has the names, if there are any."""
        name = architecture.partition("(")[0]
        if below := [prefix.removesuffix(".") for prefix in self.unwrapping.elsewhere]:
            out = quoted(f"{below[0]}{formats.default().written_suffixes[0]}")
            command = f"modelcli extract {quoted(below[0])} -m {quoted(str(path))} -o {out}"
            return f"the file has tensors of {name} below {listed(below, 4)}: {command} extracts them"
        return f"no tensor of the file has a name and shape of {name}, with or without a prefix: try modelcli identify"


@dataclass
class StateDict:
    """A checkpoint's state dict for torch.

    Attributes:
        tensors: the plain tensors, on meta with their sources, or real and mapped.
        metadata: its `_metadata`.
        extras: for each other entry (quantized and sparse tensors, other values) a function that makes the real value.
    """

    tensors: dict[str, torch.Tensor]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    extras: Mapping[str, Callable[[], Any]] = field(default_factory=dict)


def on_meta(contents: Contents) -> StateDict:
    """Return the tensors of a checkpoint on the meta device, with the sources of their bytes."""
    return _state_dict(contents, lambda storage: tagged(storage.nbytes, storage), "meta")


def mapped(contents: Contents) -> StateDict:
    """Return the tensors of a checkpoint with values, mapped so that pages are read when they are used."""
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
    """Convert an inert value to what `torch.load(weights_only=True)` returns for it."""
    if depth > NESTING.value:
        raise RequestError(f"{name} is nested deeper than {NESTING.value}, or contains itself")

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
            raise RequestError(f"{name} is made by {what}, which modelcli does not run")
    return value


#: The functions that recreate a value from its arguments. The readers allow their names, and none has side effects.
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
    """Compare a state dict's keys and shapes with a module's, without changing the module.

    Returns the state dict without the names that wrappers added, and the report, in which only `mismatched` and
    `unwrapping` are set.
    """
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
    """Return the shape of a state dict entry; None if it has none (yet)."""
    return tuple(value.shape) if isinstance(value, torch.Tensor) and not is_lazy(value) else None


def _unwrapped(state: StateDict, unwrapping: Unwrapping) -> StateDict:
    """Remove the names that wrappers added from the keys of a state dict and the paths of its metadata."""
    # The wrapper and the wrapped module both have a metadata entry; that of the deeper path is the wrapped module's.
    metadata = {}
    for path in sorted(state.metadata, key=lambda path: path.count(".") + bool(path)):
        if (inner := unwrapping.path(path)) is not None:
            metadata[inner] = state.metadata[path]
    tensors = {unwrapping.key(name): value for name, value in state.tensors.items() if name not in unwrapping.dropped}
    extras = {unwrapping.key(name): value for name, value in state.extras.items()}
    return StateDict(tensors, metadata, extras)


def _same_shape(own: torch.Tensor, found: torch.Tensor) -> bool:
    return own.shape == found.shape or (own.dim() == 0 and tuple(found.shape) == (1,))


def load(module: nn.Module, state: StateDict, optional: frozenset[str] = frozenset()) -> LoadReport:
    """Replace the module's tensors by those of a checkpoint; tensors that do not match stay.

    Keys in `optional` do not count as missing.

    The module gets the tensors themselves, not copies of their values. Tied parameters are tied again, and the module
    keeps its flags. Raises AnswerNoError if PyTorch refuses the state dict.
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
        # For example an integer tensor for a trained parameter, or an error of a module's own hook.
        raise AnswerNoError(f"PyTorch refuses the state dict: {' '.join(str(error).split())}") from None
    overruled = _tie_again(module, ties, given)
    loaded = {name for group in ties for name in group if set(group) & set(given)}
    empty = {name for name, value in own.items() if name.endswith("_extra_state") and _is_empty(value)}
    missing = tuple(name for name in keys.missing_keys if name not in wrong | loaded | empty | optional)
    unexpected = (*keys.unexpected_keys, *(name for name in state.extras if name not in own))
    matched = sum(name in own for name in given)
    return LoadReport(matched, missing, tuple(unexpected), found.mismatched, found.unwrapping, overruled)


def _is_empty(value: Any) -> bool:
    """Whether an `_extra_state` is empty. safetensors files leave it out, and it then does not count as missing."""
    return value is None or (isinstance(value, str | bytes | dict | list | tuple | set | bytearray) and not value)


def load_values(architecture: Architecture, module: nn.Module, contents: Contents) -> LoadReport:
    """Load a checkpoint's values into a real module of this architecture, as its library does: see `load`."""
    fitted = architecture.provider.fit_state_dict(architecture, module, mapped(contents))
    return load(module, fitted.state, fitted.optional)


class _WithMetadata(dict[str, Any]):
    """A dict that can have a `_metadata` attribute, like a state dict."""

    _metadata: dict[str, Any]


def _ties(module: nn.Module) -> list[list[str]]:
    groups: dict[int, list[str]] = defaultdict(list)
    for name, tensor in named_tensors(module).items():
        groups[id(tensor)].append(name)
    return [names for names in groups.values() if len(names) > 1]


def _tie_again(module: nn.Module, ties: list[list[str]], loaded: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Tie each group again to the last tensor that was loaded, which is the result of copying in order.

    Returns the names of tensors that the file stores separately, each with the name of the last one.
    """
    overruled = []
    for names in ties:
        last = [name for name in names if name in loaded]
        if last:
            starts = {name: _start_of(loaded[name]) for name in last}
            overruled += [(name, last[-1]) for name in last if starts[name] != starts[last[-1]]]
            tensor = named_tensors(module)[last[-1]]
            for name in names:
                path, _, own = name.rpartition(".")
                owner = module.get_submodule(path)
                table: dict[str, Any] = owner._parameters if own in owner._parameters else owner._buffers
                table[own] = tensor
    return tuple(overruled)


def _start_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Return a key that is equal for two tensors that begin at the same byte; unique for a composite tensor."""
    if is_composite(tensor):
        return id(tensor), 0
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


__all__ = [
    "LoadReport",
    "Mismatch",
    "StateDict",
    "compare",
    "load",
    "mapped",
    "on_meta",
]
