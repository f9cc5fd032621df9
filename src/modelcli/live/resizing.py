"""Give a model another image size, number of channels or vocabulary with its library's own functions.

A function of the library changes a module in place. On the meta device it first changes a copy without values, which
shows what has another shape afterwards. The values are computed when they are needed: by the same function, on a copy
in which only the tensors that change have values.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from modelcli.errors import RequestError
from modelcli.live.describe import walk
from modelcli.live.meta_models import meta_copy, seeded
from modelcli.live.sources import (
    AnySource,
    computed_tensor,
    flag_of,
    named_tensors,
    real_tensor,
    set_flag,
    source_of,
)
from modelcli.live.surgery.core import submodule
from modelcli.live.walking import modules_in

if TYPE_CHECKING:
    from modelcli.live.script.source_text import SourceText


@dataclass(frozen=True)
class Resizing:
    """How a library gives one of its models another size.

    Attributes:
        before: the size that the model has now: one number, or height and width.
        resize: changes a copy of the model in place. It runs without values too, and draws from torch's generator.
        statements: returns the same as statements of a script, for the expression that names the model there; None
            where plain Python has none.
        draws: whether `resize` draws values.
    """

    before: int | tuple[int, int]
    resize: Callable[[nn.Module], None]
    statements: Callable[[SourceText, str], list[str]] | None = None
    draws: bool = False

    def carry_out(self, module: nn.Module, seed: int) -> None:
        """Resize a copy of the model. Raises RequestError where the library cannot, in the library's words."""
        with seeded(seed), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # which are for whoever wrote the library
            try:
                self.resize(module)
            except (AssertionError, ValueError, TypeError, RuntimeError, NotImplementedError) as error:
                first = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise RequestError(f"{type(module).__name__} cannot be resized: {first}", "try another size") from error


@dataclass(frozen=True)
class ResizedTensor:
    """A tensor that has another shape, or is new: its name, and its shapes; the old one is None for a new tensor."""

    name: str
    before: tuple[int, ...] | None
    after: tuple[int, ...]
    is_parameter: bool


def carry_out(module: nn.Module, resizing: Resizing, seed: int) -> list[ResizedTensor]:
    """Resize a model, on the meta device or with values.

    Args:
        module: the model, which is changed in place; its old tensors are not written to.
        resizing: what the library does.
        seed: that of the values that are drawn.

    Returns:
        The tensors of the state dict that have another shape, tied ones once.
    """
    copy = meta_copy(module)
    before = _State.of(copy)
    resizing.carry_out(copy, seed)
    after = _State.of(copy)
    changed = [name for name, tensor in after.tensors.items() if not before.has(name, tensor)]
    if all(tensor.is_meta for tensor in named_tensors(module).values()):
        values = _Values(meta_copy(module), resizing, seed, tuple(changed))
        _take_tensors(module, copy, changed, values)
        _take_attributes(module, before, after)
    else:
        resizing.carry_out(module, seed)
    return _resized(copy, before, changed)


def _resized(copy: nn.Module, before: _State, changed: Sequence[str]) -> list[ResizedTensor]:
    """Describe the tensors of the state dict that have another shape, each under its first name."""
    tensors, kept = named_tensors(copy), copy.state_dict().keys()
    found: dict[int, ResizedTensor] = {}
    for name in changed:
        tensor, was = tensors[name], before.shapes.get(name)
        if name in kept and was != tuple(tensor.shape):
            resized = ResizedTensor(name, was, tuple(tensor.shape), isinstance(tensor, nn.Parameter))
            found.setdefault(id(tensor), resized)
    return list(found.values())


@dataclass(frozen=True)
class _State:
    """The tensors and attributes of a model at one time."""

    tensors: Mapping[str, torch.Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    attributes: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(cls, module: nn.Module) -> _State:
        tensors = named_tensors(module)
        attributes = {path: _attributes(child) for path, child in walk(module)}
        return cls(tensors, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, attributes)

    def has(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether a tensor was the same object of the same shape."""
        return self.tensors.get(name) is tensor and self.shapes[name] == tuple(tensor.shape)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that its class gives it: no tensors, no modules, nothing of torch's own."""
    plain = vars(nn.Module())
    return {
        name: value
        for name, value in vars(module).items()
        if name not in plain and not isinstance(value, torch.Tensor | nn.Module)
    }


@dataclass(frozen=True)
class _Values:
    """The new values of the tensors that change, computed together when the first one is needed.

    `module` is a copy of the model before it was resized: its tensors keep the sources of their bytes.
    """

    module: nn.Module
    resizing: Resizing
    seed: int
    names: Sequence[str]

    def of(self, name: str) -> torch.Tensor:
        """The contiguous values of a tensor."""
        return self._all[name].detach().contiguous()

    def reads(self) -> list[AnySource]:
        """The sources of the old values."""
        tensors = named_tensors(self.module)
        found = (source_of(tensors[name]) for name in self.names if name in tensors)
        return [source for source in found if source is not None]

    @cached_property
    def _all(self) -> dict[str, torch.Tensor]:
        made = self._computed(set(self.names))
        if any(made[name].is_meta for name in self.names):  # buffers that are made where other tensors are
            made = self._computed(set(named_tensors(self.module)))
        return {name: made[name] for name in self.names}

    def _computed(self, with_values: Collection[str]) -> dict[str, torch.Tensor]:
        """Resize a copy in which the tensors of these names have values."""
        copy = meta_copy(self.module)
        _give_values(copy, with_values)
        self.resizing.carry_out(copy, self.seed)
        return named_tensors(copy)


def _give_values(module: nn.Module, names: Collection[str]) -> None:
    """Give tensors of a model on the meta device their values. Tied ones stay tied."""
    made: dict[int, torch.Tensor] = {}
    wanted = {id(tensor) for name, tensor in named_tensors(module).items() if name in names}
    for child in modules_in(module):
        for table in _tables(child):
            for own, tensor in table.items():
                if tensor is None or id(tensor) not in wanted or source_of(tensor) is None:
                    continue
                if id(tensor) not in made:
                    values = real_tensor(tensor).clone()
                    made[id(tensor)] = nn.Parameter(values, False) if isinstance(tensor, nn.Parameter) else values
                table[own] = made[id(tensor)]


def _take_tensors(module: nn.Module, copy: nn.Module, changed: Sequence[str], values: _Values) -> None:
    """Give a model the tensors that a resized copy has, with sources that compute them. Ties are those of the copy."""
    old, new, reads = named_tensors(module), named_tensors(copy), values.reads()
    made: dict[int, torch.Tensor] = {}
    for name in changed:
        tensor = new[name]
        if id(tensor) not in made:
            computed = computed_tensor(tensor.shape, tensor.dtype, partial(values.of, name), reads)
            made[id(tensor)] = _like(tensor, computed, old.get(name))
        path, _, own = name.rpartition(".")
        _table(submodule(module, path), isinstance(tensor, nn.Parameter))[own] = made[id(tensor)]
    for name in old.keys() - new.keys():
        path, _, own = name.rpartition(".")
        _table(submodule(module, path), isinstance(old[name], nn.Parameter))[own] = None
    for path, child in walk(copy):
        submodule(module, path)._non_persistent_buffers_set = set(child._non_persistent_buffers_set)


def _like(tensor: torch.Tensor, computed: torch.Tensor, old: torch.Tensor | None) -> torch.Tensor:
    """A parameter or a buffer, as in the resized copy; a parameter has the flag of the old one."""
    if not isinstance(tensor, nn.Parameter):
        return computed
    made = nn.Parameter(computed, requires_grad=False)
    set_flag(made, flag_of(old) if isinstance(old, nn.Parameter) else tensor.requires_grad)
    return made


def _take_attributes(module: nn.Module, before: _State, after: _State) -> None:
    """Set the attributes that resizing has changed."""
    for path, attributes in after.attributes.items():
        child, were = submodule(module, path), before.attributes.get(path, {})
        for name, value in attributes.items():
            if name not in were or not _is_same(were[name], value):
                vars(child)[name] = value


def _is_same(one: object, other: object) -> bool:
    return one is other or (isinstance(one, _PLAIN) and isinstance(other, _PLAIN) and one == other)


#: Values that are compared, and not only their identity.
_PLAIN = (bool, int, float, str, tuple, list, dict)


def _tables(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    return module._parameters, module._buffers


def _table(module: nn.Module, is_parameter: bool) -> dict[str, Any]:
    return _tables(module)[0 if is_parameter else 1]
