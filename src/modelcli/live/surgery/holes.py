"""Fill in `_` in a module expression: from the old module's settings, else from what flows in on a forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from modelcli.edits.applied import Context
from modelcli.errors import ModelcliError, RequestError
from modelcli.language import expressions
from modelcli.language.expressions import HOLE, Call
from modelcli.live import modules, providers
from modelcli.live.meta_models import build_on_meta
from modelcli.live.providers.base import Layout
from modelcli.live.surgery import shapes
from modelcli.live.surgery.layouts import NORM_OVER_CHANNELS, kind_of
from modelcli.live.surgery.settings import UNKNOWN, Unknown, setting
from modelcli.live.trace import Failure, inputs_of
from modelcli.live.walking import modules_in
from modelcli.model.tensors import Shape
from modelcli.wording import counted


class Placeholder(nn.Identity):
    """Takes the place of a new module, so that a forward pass shows what flows in there."""


#: The axis of the input that determines an argument of this name: 1 for channels, -1 for features.
_AXES = {
    "in_features": -1,
    "normalized_shape": -1,
    "input_size": -1,
    "embed_dim": -1,
    "d_model": -1,
    "in_channels": 1,
    "input_channels": 1,
    "num_channels": 1,
    "num_features": 1,
    "num_parameters": 1,
}
#: Modules whose second input axis is the channels, and the number of axes of their input.
_BY_CHANNELS: dict[type[nn.Module], int] = {
    **dict.fromkeys((nn.Conv1d, nn.ConvTranspose1d, nn.MaxPool1d, nn.AvgPool1d), 3),
    **dict.fromkeys((nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d, nn.Upsample), 4),
    **dict.fromkeys((nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.InstanceNorm2d, nn.PixelShuffle), 4),
    **dict.fromkeys((nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d, nn.InstanceNorm1d), 3),
    **dict.fromkeys((nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d, nn.MaxPool3d, nn.AvgPool3d), 5),
    **dict.fromkeys((nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d, nn.InstanceNorm3d), 5),
}
_BY_FEATURES = (nn.Linear, nn.LayerNorm, nn.Embedding, nn.MultiheadAttention, nn.RMSNorm)


def argument_from(name: str, shape: tuple[int, ...]) -> int | None:
    """Return the value that the input shape gives to a constructor argument; None if it gives none."""
    axis = _AXES.get(name)
    return None if axis is None or not -len(shape) <= axis < len(shape) else shape[axis]


def shape_with(name: str, shape: tuple[int, ...], size: int) -> tuple[int, ...] | None:
    """Return the input shape that would give `size` to a constructor argument; None if no axis determines it.

    Args:
        name: the argument.
        shape: the present input shape.
        size: the wanted value of the argument.
    """
    if argument_from(name, shape) is None:
        return None
    axis = _AXES[name] % len(shape)
    return (*shape[:axis], size, *shape[axis + 1 :])


def resolved_calls(
    module: nn.Module, expression: Call, targets: Sequence[tuple[nn.Module, str]], context: Context
) -> list[Call]:
    """Return the expression for each target with every `_` filled in.

    Args:
        module: the model.
        expression: the expression, perhaps with `_`.
        targets: the old modules and their paths.
        context: the inputs of the model, and which names are trusted.

    Raises:
        RequestError: the value of a `_` is not known.
    """
    if not expression.has_hole:
        return [expression] * len(targets)
    flows = _Flows(module, [path for _, path in targets], context)
    return [_Filling(expression, old, path, flows, context).filled(expression) for old, path in targets]


@dataclass(frozen=True)
class _Flow:
    """The input of a module: a tensor on meta, and the axis of its channels, if known."""

    tensor: torch.Tensor
    layout: Layout | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def __str__(self) -> str:
        return f"[{','.join(map(str, self.shape))}]"


class Flows(Protocol):
    """Gives the inputs of modules of a model."""

    context: Context

    def into(self, path: str) -> _Flow | None:
        """Return the input of the module at a path; None if it is not known."""
        ...

    def unknown(self) -> str:
        """Return the part of a message that says why an input is not known."""
        ...


class _Flows:
    """The input of each target in a forward pass, which is made once, when it is first needed."""

    def __init__(self, module: nn.Module, paths: Sequence[str], context: Context) -> None:
        self.context = context
        self._module = module
        self._paths = paths
        self._found: tuple[dict[str, torch.Tensor], Failure | None] | None = None

    def into(self, path: str) -> _Flow | None:
        if self._found is None:
            self._found = inputs_of(self._module, self._paths, self.context.inputs)
        tensor = self._found[0].get(path)
        return None if tensor is None else _Flow(tensor.detach().to("meta"), self._layout_at(path, tensor.dim()))

    def unknown(self) -> str:
        """Return the part of a message that says why an input is not known."""
        if self.context.inputs is None:
            return ", and what flows in is not known without an input size"
        failure = None if self._found is None else self._found[1]
        return ", and no forward pass reached it" if failure is None else f", and {failure.reason}"

    def _layout_at(self, path: str, axes: int) -> Layout | None:
        """Return the layout of the input at a path, judged by the modules before it."""
        before: list[nn.Module] = []
        for name, child in self._module.named_modules():
            if name == path:
                break
            before.append(child)
        return _layout_after(before, axes)


def _layout_after(before: Iterable[nn.Module], axes: int) -> Layout | None:
    """Return the layout of a tensor with `axes` axes after these modules; the last one that determines it decides."""
    for module in reversed(list(before)):
        if (found := _layout_of(module, axes)) is not None:
            return found
    return None


def _layout_of(module: nn.Module, axes: int) -> Layout | None:
    """Return the layout that a module uses for tensors with `axes` axes; None if it does not determine one."""
    for kind, its_axes in _BY_CHANNELS.items():
        if isinstance(module, kind):
            return "channels first" if axes == its_axes else None
    for half in providers.in_use():
        if (layout := half.layout_behind(module, axes)) is not None:
            return layout
    if isinstance(module, _BY_FEATURES) and not _is_by_channels(module):
        return "features last"
    return None


def _is_by_channels(module: nn.Module) -> bool:
    """Whether a layer norm moves the channels of images to the end and back itself, like ConvNeXt's."""
    return isinstance(module, nn.LayerNorm) and kind_of(module) == NORM_OVER_CHANNELS


def works_on_channels(module: nn.Module) -> bool:
    """Whether the second axis of a module's input is its channels."""
    return isinstance(module, _NormBase | nn.GroupNorm | _ConvNd) or _is_by_channels(module)


class _Filling:
    """Fills `_` in one expression at one path: with the old module's attribute of that name, else from its input."""

    def __init__(self, expression: Call, old: nn.Module, path: str, flows: Flows, context: Context) -> None:
        self.expression = expression
        self.old = old
        self.path = path
        self.flows = flows
        self.context = context

    def filled(self, call: Call, inner: _Flow | None = None, *, first: bool = True) -> Call:
        """Return a call, and the calls nested in it, with every `_` filled in.

        Args:
            call: the call.
            inner: its input, if it is not the first module of a `Sequential` in the expression; None if not known.
            first: whether its input is that of the old module.
        """
        if not call.has_hole:
            return call
        kind = modules.find_maker(call.name, trusted=self.context.trusted)
        names = modules.parameter_names(kind)
        if kind is nn.Sequential:
            return self._filled_sequence(call, inner, first=first)
        if len(call.args) > len(names) and "args" not in names:
            raise RequestError(
                f"{call}: {kind.__name__} takes {counted(len(names), 'argument')}", modules.signature_of(kind)
            )
        named = [*zip(call.args, [*names, *[""] * len(call.args)], strict=False)]
        args = tuple(self._value(call, value, name, inner, first=first) for value, name in named)
        values = {key: self._value(call, value, key, inner, first=first) for key, value in call.kwargs.items()}
        return Call(call.name, args, values)

    def _filled_sequence(self, call: Call, flow: _Flow | None, *, first: bool) -> Call:
        """Fill in a `Sequential`, in which the input of each module is the output of the one before it."""
        args: list[Any] = []
        for position, value in enumerate(call.args):
            at_start = first and position == 0
            args.append(self._value(call, value, "", flow, first=at_start))
            if any(map(expressions.holds_hole, call.args[position + 1 :])):
                taken = self._old_input(args[-1]) if at_start else flow
                flow = self._output_of(args[-1], taken)
        return Call(call.name, tuple(args), dict(call.kwargs))

    def _old_input(self, call: Any) -> _Flow | None:
        """Return the input of the old module: from a forward pass, else one that fits the old or the new module."""
        if (flow := self.flows.into(self.path)) is not None:
            return flow
        made = self._made(call)
        for module in (self.old, *(() if made is None else made.modules())):
            if (flow := _as_wide_as(module)) is not None:
                return flow
        return None

    def _output_of(self, call: Any, flow: _Flow | None) -> _Flow | None:
        """Return the output of a module for an input; None if the module refuses it or returns no plain tensor."""
        made = self._made(call)
        if made is None or flow is None:
            return None
        given = flow.tensor.float() if flow.tensor.is_floating_point() else flow.tensor
        try:
            with torch.no_grad(), torch.device("meta"):
                out = made.eval()(given)
        except Exception:
            return None
        if not isinstance(out, torch.Tensor):
            return None
        layout = _layout_after(made.modules(), out.dim())
        return _Flow(out, layout or (flow.layout if out.dim() == given.dim() else None))

    def _made(self, call: Any) -> nn.Module | None:
        """Make a module of the expression on the meta device, to find out its output; None if that fails."""
        if not isinstance(call, Call) or call.has_hole:
            return None
        try:
            return build_on_meta(lambda: modules.make(call, trusted=self.context.trusted), only_if_needed=True)
        except ModelcliError:
            return None  # making the module itself will report the error

    def _value(self, call: Call, value: Any, name: str, inner: _Flow | None, *, first: bool) -> Any:
        if value == HOLE:
            return self._fill(call, name, inner, first=first)
        if isinstance(value, Call):
            return self.filled(value, inner, first=first)
        if expressions.holds_hole(value):
            raise RequestError(f"{self.expression}: _ must be a whole argument, not a part of one", "write the value")
        return value

    def _fill(self, call: Call, name: str, inner: _Flow | None, *, first: bool) -> Any:
        if not first and name in _AXES:
            if inner is not None and (size := self._size(call, name, inner)) is not None:
                return size
            raise RequestError(
                f"{self.expression} at {self.path}: _ for {name} of {call.name} is not known, because the output of "
                "the modules before it is not",
                f"write the value of {name}",
            )
        return self._as_it_was(call, name)

    def _as_it_was(self, call: Call, name: str) -> Any:
        """Return the value of an argument from the old module's settings, else from what flows in."""
        if (value := setting(self.old, name)) is not UNKNOWN:
            return value
        flow = self.flows.into(self.path) if name in _AXES else None
        if flow is not None and (size := self._size(call, name, flow)) is not None:
            return size
        if flow is None and (width := _width_of_children(self.old, name)) is not UNKNOWN:
            return width
        was = "there was no module before"
        if not isinstance(self.old, Placeholder):
            was = f"the old {type(self.old).__name__} has no {name}"
        raise RequestError(
            f"{self.expression} at {self.path}: _ for {name} is not known: {was}"
            + (
                ", and what flows in does not determine it"
                if flow is not None or name not in _AXES
                else self.flows.unknown()
            ),
            f"write the value of {name}" + (", or pass --input-size" if self.context.inputs is None else ""),
        )

    def _size(self, call: Call, name: str, flow: _Flow) -> int | None:
        """Return the size of the input axis that determines an argument.

        Raises RequestError if that axis has another meaning in this input, such as the width of an image.
        """
        size, axes = argument_from(name, flow.shape), flow.tensor.dim()
        if size is None or axes < 3:
            return size
        last = _AXES[name] == -1
        # An image whose layout is not known may have its channels on either axis.
        doubtful = axes >= 4 and flow.layout is None
        if last and (flow.layout == "channels first" or doubtful or (axes >= 4 and works_on_channels(self.old))):
            old = f"the old {type(self.old).__name__} works on channels, and " if works_on_channels(self.old) else ""
            raise RequestError(
                f"{self.expression} at {self.path}: _ for {name} is not known: {old}the last axis of {flow}, which "
                f"flows in, is {'perhaps ' if doubtful and not old else ''}the width of an image, not features",
                _way_out(call, name),
            )
        if not last and flow.layout == "features last" and name in ("in_channels", "input_channels"):
            raise RequestError(
                f"{self.expression} at {self.path}: _ for {name} is not known: {flow} flows in, which has its "
                "features on the last axis, not channels on the second",
                f"write the value of {name}",
            )
        return size


class _KeysFilling(_Filling):
    """Fills `_` for a plain state dict, in which only the shapes of the old tensors are known."""

    def __init__(
        self, expression: Call, shapes: Mapping[str, Shape], path: str, flows: Flows, context: Context
    ) -> None:
        super().__init__(expression, nn.Module(), path, flows, context)
        self.shapes = shapes

    def _as_it_was(self, call: Call, name: str) -> Any:
        kind = modules.find_class(call.name, trusted=self.context.trusted)
        if (told := shapes.argument_told(self.shapes, kind, call, name)) is not None:
            return told
        raise RequestError(
            f"{self.expression} at {self.path}: _ for {name} is not known: a plain state dict records no settings",
            f"pass --arch REFERENCE, or write the value of {name}",
        )


class _NoFlows:
    """Knows no inputs, because a plain state dict has no architecture and cannot run."""

    def __init__(self, context: Context) -> None:
        self.context = context

    def into(self, _path: str) -> _Flow | None:
        return None

    def unknown(self) -> str:
        if self.context.inputs is None:
            return ", and what flows in is not known without an input size"
        return ", and a model without a known architecture cannot run"


def resolved_for_keys(
    expression: Call, targets: Sequence[tuple[nn.Module | Mapping[str, Shape], str]], context: Context
) -> list[Call]:
    """The expression for each target in a checkpoint of unknown architecture, with every `_` filled in.

    A target is a module that an edit has put in, or the shapes of the parameters that are there, and its path.
    """
    if not expression.has_hole:
        return [expression] * len(targets)
    flows = _NoFlows(context)
    calls = []
    for old, path in targets:
        filling = (
            _Filling(expression, old, path, flows, context)
            if isinstance(old, nn.Module)
            else _KeysFilling(expression, old, path, flows, context)
        )
        calls.append(filling.filled(expression))
    return calls


def _way_out(call: Call, name: str) -> str:
    if name == "normalized_shape":
        return "GroupNorm(1,_) normalises over channels and space; or write the value of normalized_shape"
    if call.name == "Linear" and len(call.args) > 1 and isinstance(call.args[1], int):
        return f"Conv2d(_,{call.args[1]},1) works on the channels of an image; or write the value of in_features"
    return f"write the value of {name}"


def _as_wide_as(module: nn.Module) -> _Flow | None:
    """Return an input that fits a module's own sizes, for use if no forward pass shows the real input."""
    if isinstance(features := getattr(module, "in_features", None), int) and features > 0:
        return _Flow(torch.empty(1, features, device="meta"))
    if isinstance(module, _ConvNd) and module.in_channels > 0:
        sides = [_SIDE] * len(module.kernel_size)
        return _Flow(torch.empty(1, module.in_channels, *sides, device="meta"), "channels first")
    return None


#: The pixels along each axis of an image whose real size is not known.
_SIDE = 64


def _width_of_children(old: nn.Module, name: str) -> int | Unknown:
    """Return the input size of the first layer inside a module whose class has this argument; UNKNOWN if none."""
    if name not in _AXES or name not in modules.parameter_names(type(old)):
        return UNKNOWN
    for child in modules_in(old):
        for attribute in ("in_features", "in_channels"):
            if child is not old and isinstance(width := getattr(child, attribute, None), int):
                return width
    return UNKNOWN
