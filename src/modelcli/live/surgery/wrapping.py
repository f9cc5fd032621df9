"""Call a wrapper with an old module: on the meta device, with the sources that the values of the result have."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from modelcli.edits.applied import Context
from modelcli.errors import RequestError
from modelcli.language import expressions
from modelcli.language.expressions import Call, Hole
from modelcli.live import bounds, memory, modules
from modelcli.live.meta_models import meta_copy, moved_to_meta, real_copy, seeded
from modelcli.live.modules import ConstructorError
from modelcli.live.sources import Drawn, Lazy, is_composite, is_lazy, named_tensors, source_of, tag
from modelcli.live.surgery.core import is_meta
from modelcli.live.surgery.new_modules import Placement, placement_of, refuse_device
from modelcli.live.surgery.snapshot import restoring
from modelcli.live.walking import modules_in, require_methods
from modelcli.model.paths import shown
from modelcli.providers.known_code import names_known_code


@dataclass(frozen=True)
class _Filled(Call):
    """A call in which the old module stands in the place of `_`. Its text still has `_`."""

    text: str = ""

    def __str__(self) -> str:
        return self.text


def filled(call: Call, old: object) -> Call:
    """Return a call with `old` in the place of `_`, in nested calls too."""

    def value(given: Any) -> Any:
        match given:
            case Hole():
                return old
            case Call() if given.has_hole:
                return filled(given, old)
            case tuple():
                return tuple(map(value, given))
            case list():
                return list(map(value, given))
            case dict():
                return {key: value(item) for key, item in given.items()}
            case _:
                return given

    kwargs = {key: value(item) for key, item in call.kwargs.items()}
    return _Filled(call.name, tuple(map(value, call.args)), kwargs, str(call))


def wrapped(
    module: nn.Module, call: Call, targets: Sequence[tuple[nn.Module, str]], context: Context
) -> list[nn.Module]:
    """Return what a wrapper makes of each module of a model, all drawn from one generator, in order.

    The old modules may be changed, as by a parametrization. In a model on the meta device, tensors of an old module
    keep their sources, and the others are made when they are needed: with the values of the old module if the wrapper
    reads them.

    Args:
        module: the model.
        call: the wrapper, with one `_`.
        targets: the old modules and their paths.
        context: the seed, and whether code outside the known libraries may run.

    Raises:
        RequestError: the wrapper cannot be called so. The message names the path.
    """
    refuse_device([call])
    own_dtype = expressions.gives(call, "dtype")
    placements = [placement_of(module, old, path, own_dtype=own_dtype) for old, path in targets]
    held = bounds.as_typed(str(call)) if names_known_code(call) else None
    if is_meta(module):
        series = _Series(context.seed)
        made = [
            _on_meta(module, _Wrapper(call, old, path, placement, context, held), series)
            for (old, path), placement in zip(targets, placements, strict=True)
        ]
        memory.require(sum(map(memory.bytes_of, made)), str(call))
        return made
    made = []
    with seeded(context.seed):
        for (old, path), placement in zip(targets, placements, strict=True):
            wrapper = _Wrapper(call, old, path, placement, context, held)
            before = _Before(old)
            with bounds.enforced(held):
                new = wrapper.call_with(old)
            made.append(before.placed(new, placement))
    return made


@dataclass(frozen=True)
class _Wrapper:
    """A wrapper for one module of a model."""

    call: Call
    old: nn.Module
    path: str
    placement: Placement
    context: Context
    held: bounds.Bounds | None

    def call_with(self, old: nn.Module) -> nn.Module:
        """Call it with a module. Raises RequestError with the path if that fails."""
        try:
            return require_methods(modules.make(filled(self.call, old), trusted=self.context.trusted))
        except RequestError as error:
            error.message = f"{shown(self.path)}: {error.message}"
            raise


class _Before:
    """A module as it is before a wrapper is called with it."""

    def __init__(self, old: nn.Module) -> None:
        self.parts = {id(part): part for part in modules_in(old)}
        self.tensors = {id(tensor): tensor for tensor in named_tensors(old).values()}
        plain = [tensor for tensor in self.tensors.values() if _has_storage(tensor)]
        self.storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in plain}
        self.dtypes = {tensor.dtype for tensor in plain}

    def owns(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is one of the old module's, or shows the bytes of one."""
        if not _has_storage(tensor):
            return id(tensor) in self.tensors
        return tensor.untyped_storage()._cdata in self.storages

    def placed(self, new: nn.Module, placement: Placement) -> nn.Module:
        """Give what is new in the result of a wrapper the mode, the dtype and the device of the old module.

        If the old module has tensors of the dtype that torch draws in, beside others, what is new keeps its dtype.
        """
        for part in modules_in(new):
            if id(part) not in self.parts:
                part.training = placement.training
        default = torch.get_default_dtype()
        dtype = None if default in self.dtypes else placement.dtype
        for tensor in named_tensors(new).values():
            if self.owns(tensor) or not _has_storage(tensor):
                continue
            if dtype is not None and tensor.dtype == default:
                tensor.data = tensor.data.to(dtype)
            if placement.device is not None and not tensor.is_meta:
                tensor.data = tensor.data.to(placement.device)
        return new


def _has_storage(tensor: torch.Tensor) -> bool:
    return not (is_lazy(tensor) or is_composite(tensor) or hasattr(tensor, "__tensor_flatten__"))


# --- on the meta device ----------------------------------------------------------------------------------------------


def _on_meta(module: nn.Module, wrapper: _Wrapper, series: _Series) -> nn.Module:
    """Call a wrapper with a module on the meta device; what is new is made when it is needed."""
    before = _Before(wrapper.old)
    template = meta_copy(wrapper.old)
    new, watch = _called(wrapper, before)
    before.placed(new, wrapper.placement)
    if watch.written:
        _refuse_views(module, before, watch.written, wrapper)
    tensors: list[str] = []

    def build() -> nn.Module:
        old = real_copy(template, values=watch.reads)
        again = _Before(old)
        return _only(again.placed(wrapper.call_with(old), wrapper.placement), tensors)

    lazy = series.add(build)
    for name, tensor in named_tensors(new).items():
        if not (_has_storage(tensor) and tensor.is_meta):
            continue
        if tensor.untyped_storage()._cdata in watch.written:
            tensor.data = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")
        elif before.owns(tensor) or source_of(tensor) is not None:
            continue
        tag(tensor, Drawn(lazy, name, tensor.untyped_storage().nbytes()))
        tensors.append(name)
    return new


def _called(wrapper: _Wrapper, before: _Before) -> tuple[nn.Module, _Watch]:
    """Call a wrapper on the meta device, then, if it needs values of its own, with these on the CPU.

    Each attempt begins with the old module as it was.
    """
    restore = restoring(wrapper.old)
    for everything_on_meta in (True, False):
        watch = _Watch(before.storages)
        where = torch.device("meta") if everything_on_meta else contextlib.nullcontext()
        try:
            with seeded(0), bounds.enforced(wrapper.held), watch, where:
                new = wrapper.call_with(wrapper.old)
            return moved_to_meta(new), watch
        except ConstructorError as error:
            restore()
            if not (everything_on_meta and error.may_need_values):
                raise
    raise AssertionError("the last attempt returns or raises")


def _refuse_views(module: nn.Module, before: _Before, written: Collection[int], wrapper: _Wrapper) -> None:
    """Refuse a wrapper that writes into bytes that a tensor outside the old module shows."""
    for name, tensor in named_tensors(module).items():
        is_outside = _has_storage(tensor) and id(tensor) not in before.tensors
        if is_outside and tensor.untyped_storage()._cdata in written:
            raise RequestError(
                f"{wrapper.call} writes into a tensor of {shown(wrapper.path)}, and {name} shows the same values",
                "let it make a new tensor",
            )


def _only(module: nn.Module, names: Collection[str]) -> nn.Module:
    """Take all tensors but these out of a module, so that their memory is free."""
    tensors = named_tensors(module)
    kept = {id(tensors[name]) for name in names if name in tensors}
    for part in modules_in(module):
        tables: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        for table in tables:
            for name, tensor in table.items():
                if id(tensor) not in kept:
                    table[name] = None
    return module


class _Series:
    """Builds that draw from one generator, one after the other. Each is done by itself when it is needed."""

    def __init__(self, seed: int) -> None:
        self.builds: list[Callable[[], nn.Module]] = []
        with seeded(seed):
            self.states = [torch.default_generator.get_state()]

    def add(self, build: Callable[[], nn.Module]) -> Lazy:
        number = len(self.builds)
        self.builds.append(build)
        return Lazy(lambda: self._built(number))

    def _built(self, number: int) -> nn.Module:
        """Do a build with the generator as the builds before it leave it."""
        for earlier in range(len(self.states) - 1, number):
            self._run(earlier)
        return self._run(number)

    def _run(self, number: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.set_state(self.states[number])
            made = self.builds[number]()
            if len(self.states) == number + 1:
                self.states.append(torch.default_generator.get_state())
        return made


class _Watch(TorchDispatchMode):
    """Notes whether an operation reads the values of some storages, and into which of them one writes."""

    def __init__(self, storages: Collection[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages = storages
        self.reads = False
        self.written: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket not in _WITHOUT_VALUES and not _gives_views(func):
            for number, argument in enumerate(func._schema.arguments):
                value = args[number] if number < len(args) else kwargs.get(argument.name)
                for item in value if isinstance(value, list | tuple) else (value,):
                    if isinstance(item, torch.Tensor) and _has_storage(item):
                        storage = item.untyped_storage()._cdata
                        if storage in self.storages:
                            self.reads = True
                            if argument.alias_info is not None and argument.alias_info.is_write:
                                self.written.add(storage)
        return func(*args, **kwargs)


def _gives_views(func: Any) -> bool:
    """Whether an operation gives nothing but views of what it takes, and so looks at no values."""
    results = [result.alias_info for result in func._schema.returns]
    return bool(results) and all(info is not None and not info.is_write for info in results)


_ATEN = torch.ops.aten
#: Operations that look at the shape of a tensor alone; set_ lets a tensor show other bytes.
_WITHOUT_VALUES = {
    _ATEN.set_, _ATEN.empty_like, _ATEN.zeros_like, _ATEN.ones_like, _ATEN.full_like, _ATEN.rand_like,
    _ATEN.randn_like, _ATEN.new_empty, _ATEN.new_zeros, _ATEN.new_ones, _ATEN.new_full, _ATEN.new_empty_strided,
}  # fmt: skip
