"""New modules for an edit: `_` filled in, made on meta or for real, with the dtype and mode of what is around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from modelcli import expressions, references
from modelcli.blueprints import ancestors, counted
from modelcli.errors import RequestError
from modelcli.expressions import HOLE, Call
from modelcli.live import bounds, memory, modules
from modelcli.live.build import Bare
from modelcli.live.sources import Lazy, is_lazy, named_tensors, tag_drawn
from modelcli.live.surgery import shapes
from modelcli.live.surgery.core import Context, is_meta, submodule
from modelcli.live.trace import Failure, flowing_into
from modelcli.live.twins import build_on_meta, seeded


class Placeholder(nn.Identity):
    """Stands where a new module will be, so that a forward pass tells what flows in there."""


def resolved_calls(
    module: nn.Module, expression: Call, targets: Sequence[tuple[nn.Module, str]], context: Context
) -> list[Call]:
    """The expression for each target (the module that is there, and its path) with every `_` filled in."""
    if not expression.has_hole:
        return [expression] * len(targets)
    holes = _Holes(module, expression, [path for _, path in targets], context)
    return [holes.filled(expression, old, path) for old, path in targets]


class _Holes:
    """Fills `_`: with the old module's attribute of that name, else with what flows in there on a forward pass."""

    def __init__(self, module: nn.Module, expression: Call, paths: Sequence[str], context: Context) -> None:
        self.module = module
        self.expression = expression
        self.paths = paths
        self.context = context
        self.flows: tuple[dict[str, torch.Tensor], Failure | None] | None = None

    def filled(self, call: Call, old: nn.Module, path: str) -> Call:
        """A call, nested ones included, as it is to be made in place of `old`."""
        if not call.has_hole:
            return call
        kind = modules.find_class(call.name, trusted=self.context.trusted)
        names = modules.parameter_names(kind)
        if len(call.args) > len(names) and "args" not in names:
            raise RequestError(
                f"{call}: {kind.__name__} takes {counted(len(names), 'argument')}", modules.signature_of(kind)
            )
        named = [*zip(call.args, [*names, *[""] * len(call.args)], strict=False)]
        args = tuple(self._value(call, value, name, old, path) for value, name in named)
        values = {key: self._value(call, value, key, old, path) for key, value in call.kwargs.items()}
        return Call(call.name, args, values)

    def _value(self, call: Call, value: Any, name: str, old: nn.Module, path: str) -> Any:
        if value == HOLE:
            return self._fill(call, name, old, path)
        if isinstance(value, Call):
            return self.filled(value, old, path)
        if expressions.holds_hole(value):
            raise RequestError(
                f"{self.expression}: _ stands for a whole argument, not for a part of one", "write it out"
            )
        return value

    def _fill(self, call: Call, name: str, old: nn.Module, path: str) -> Any:
        if isinstance(old, Bare):
            kind = modules.find_class(call.name, trusted=self.context.trusted)
            if (told := shapes.argument_told(old, kind, call, name)) is not None:
                return told
            raise RequestError(
                f"{self.expression} at {path}: _ for {name} is not known: the file does not say what was there",
                f"--arch names its architecture; or write {name} out",
            )
        if (value := attribute(old, name)) is not None:
            return value
        if self.flows is None:
            self.flows = flowing_into(self.module, self.paths, self.context.inputs)
        flows, failure = self.flows
        flow = flows.get(path)
        if name == "normalized_shape" and flow is not None:
            self._refuse_width(old, path, tuple(flow.shape))
        if flow is not None and (size := argument_from(name, tuple(flow.shape))) is not None:
            return size
        was = "nothing was there before"
        if not isinstance(old, Placeholder):
            was = f"the old {type(old).__name__} has no {name}"
        raise RequestError(
            f"{self.expression} at {path}: _ for {name} is not known: {was}"
            + (", and what flows in does not tell" if flow is not None else self._unreached(failure)),
            f"write {name} out" + (", or give --input-size" if self.context.inputs is None else ""),
        )

    def _refuse_width(self, old: nn.Module, path: str, shape: tuple[int, ...]) -> None:
        """Refuse the last axis of an image, its width, in the place of a module that goes by the channels."""
        if isinstance(old, _BY_CHANNELS) and len(shape) >= 4:
            raise RequestError(
                f"{self.expression} at {path}: _ for normalized_shape is not known: the old {type(old).__name__} goes "
                f"by channels, but the last axis of [{','.join(map(str, shape))}], which flows in, is none: it "
                "would be normalised over, and the model tied to that size",
                "GroupNorm(1,_) normalises over channels and space; or write normalized_shape out",
            )

    def _unreached(self, failure: Failure | None) -> str:
        """Why nothing is known to flow into a place."""
        if self.context.inputs is None:
            return ", and what flows in is not known: no input size is"
        return ", and no forward pass reached it" if failure is None else f", and {failure.reason}"


def attribute(old: nn.Module, name: str) -> Any:
    """The old module's value for a constructor argument, where it is a plain one, and known."""
    value = getattr(old, name, None)
    if name == "bias" and (value is None or isinstance(value, torch.Tensor)):
        return value is not None if "bias" in old._parameters else None
    if type(value) is int and value == 0 and any(map(is_lazy, old.parameters())):
        return None  # a lazy module does not know its sizes yet
    if isinstance(value, torch.Size):
        return tuple(value)
    return value if isinstance(value, bool | int | float | str | tuple | list) else None


#: Modules that normalise or convolve over channels, which are the second axis.
_BY_CHANNELS = (_NormBase, nn.GroupNorm, _ConvNd)

#: Which axis of what flows in gives an argument of this name. Channels are the second axis, features the last.
_AXES = {
    "in_features": -1,
    "normalized_shape": -1,
    "input_size": -1,
    "embed_dim": -1,
    "d_model": -1,
    "in_channels": 1,
    "num_channels": 1,
    "num_features": 1,
    "num_parameters": 1,
}


def argument_from(name: str, shape: tuple[int, ...]) -> int | None:
    """The value that a constructor argument takes from the shape of what flows in, or None where it takes none."""
    axis = _AXES.get(name)
    return None if axis is None or not -len(shape) <= axis < len(shape) else shape[axis]


def shape_with(name: str, shape: tuple[int, ...], size: int) -> tuple[int, ...] | None:
    """The shape with another size along the axis that gives a constructor argument of this name."""
    if argument_from(name, shape) is None:
        return None
    axis = _AXES[name] % len(shape)
    return (*shape[:axis], size, *shape[axis + 1 :])


def maker(
    module: nn.Module, calls: Sequence[Call], context: Context, targets: Sequence[tuple[nn.Module, str]]
) -> Callable[[], list[nn.Module]]:
    """What makes the new modules of one edit: all drawn from one generator, in order."""
    if any(expressions.gives(call, "device") for call in calls):
        raise RequestError(
            f"{calls[0]}: device has no place here, since a module goes where the model is", "leave device out"
        )
    # A dtype that the expression itself states is taken at its word.
    own_dtype = any(expressions.gives(call, "dtype") for call in calls)
    places = [_place(module, old, path, own_dtype=own_dtype) for old, path in targets]

    def settled(news: Sequence[nn.Module]) -> list[nn.Module]:
        return [place.settle(new) for place, new in zip(places, news, strict=True)]

    def for_real() -> list[nn.Module]:
        with seeded(context.seed):
            made = [modules.make(call, trusted=context.trusted) for call in calls]
        return settled(made)

    def on_meta() -> list[nn.Module]:
        made = settled([_on_meta(call, path, context) for call, (_, path) in zip(calls, targets, strict=True)])
        memory.require(sum(map(memory.bytes_of, made)), str(calls[0]))
        holder = nn.ModuleList(made)
        tag_drawn(holder, Lazy(lambda: nn.ModuleList(for_real())))
        return made

    def in_two_steps() -> list[nn.Module]:
        on_meta()  # finds wrong arguments and sizes before anything is allocated
        return for_real()

    return on_meta if is_meta(module) else in_two_steps


def _on_meta(call: Call, path: str, context: Context) -> nn.Module:
    """A new module on the meta device. An error says where it was to be put."""
    try:
        installed = all(map(references.is_installed_name, expressions.names_in(call)))
        held = bounds.as_typed(str(call)) if installed else None
        return build_on_meta(lambda: modules.make(call, trusted=context.trusted), only_if_needed=True, bounds=held)
    except RequestError as error:
        error.message = f"{path}: {error.message}"
        raise


@dataclass(frozen=True)
class _Place:
    """What a new module is to be like: the mode of what was there; the dtype and device of tensors near by, if any."""

    training: bool
    dtype: torch.dtype | None = None
    device: torch.device | None = None

    def settle(self, new: nn.Module) -> nn.Module:
        """The new module, like this; one that is on meta, or goes among modules there, stays on the device it is on."""
        tensors = named_tensors(new).values()
        if self.dtype is not None and any(t.is_floating_point() and t.dtype != self.dtype for t in tensors):
            new = new.to(self.dtype)
        if self.device is not None and any(not t.is_meta for t in tensors):
            new = new.to(self.device)
        return new.train(self.training)


def _place(module: nn.Module, old: nn.Module, path: str, *, own_dtype: bool) -> _Place:
    """The place of an old module: it decides by its first floating-point tensor, else its nearest relative does."""
    for above in ancestors(path):
        relative = submodule(module, above)
        for tensor in (*old.parameters(), *old.buffers(), *relative.parameters()):
            # Of relatives: a dtype that takes a byte stores what was there, and nothing new is made in it.
            if tensor.dtype.is_floating_point and (tensor.dtype.itemsize > 1 or above == path):
                device = None if tensor.is_meta else tensor.device
                return _Place(old.training, None if own_dtype else tensor.dtype, device)
    return _Place(old.training)
