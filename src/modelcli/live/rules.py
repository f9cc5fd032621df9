"""Rules for the inputs of each `torch.nn` module, because the meta device accepts shapes that the CPU rejects.

A rule is a function of a module and its input tensor that returns a `Misfit`, or None if the input fits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from modelcli.live.describe import dtype_name
from modelcli.wording import counted


@dataclass(frozen=True)
class Misfit:
    """An input that does not fit a module.

    Attributes:
        flows: the shape and dtype of the input, as text.
        expects: what the module expects, as text.
        argument: the constructor argument that determines it, if one does.
        value: the value of that argument that would fit.
        dtype: the floating-point dtype of the parameters that would fit, if the dtype is wrong.
    """

    flows: str
    expects: str
    argument: str | None = None
    value: int | None = None
    dtype: str | None = None


class RefusedError(RuntimeError):
    """Ends a forward pass on meta where the CPU would fail too, so another device would not help.

    It is a RuntimeError like torch's own errors, so a `forward` that catches those catches this one.
    """


class MisfitError(RefusedError):
    """The input of a module does not fit it."""

    def __init__(self, misfit: Misfit) -> None:
        super().__init__(f"{misfit.flows} flows in, it expects {misfit.expects}")
        self.misfit = misfit


class Explainer:
    """Applies the rules to the input of each module of a forward pass, to explain a failure of the module.

    The rules only explain. The operators decide whether a module runs (see `operator_rules`), because a rule cannot
    know what `forward` does with the input first. For the classes in `_DECIDED_HERE` the rules decide.
    """

    def __init__(self, *, on_meta: bool = True) -> None:
        self.on_meta = on_meta
        self._misfits: dict[str, Misfit] = {}

    def visit(self, module: nn.Module, path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Record what does not fit at a path. Raises MisfitError if the rule decides."""
        self._misfits.pop(path, None)
        if (misfit := check(module, args, kwargs)) is None:
            return
        self._misfits[path] = misfit
        if self.on_meta and type(module) in _DECIDED_HERE:
            raise MisfitError(misfit)

    def explained(self, path: str, error: Exception) -> Exception:
        """Return a MisfitError if a rule explains the failure of the module; else the error itself."""
        misfit = self._misfits.get(path)
        return error if misfit is None else MisfitError(misfit)


Rule = Callable[[Any, torch.Tensor], Misfit | None]


def check(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Misfit | None:
    """Apply the rules of the module's class, or of the closest base class that has rules, to the first input tensor.

    The rules of a base class do not apply to a subclass that overrides `forward`.

    Args:
        module: the module.
        args: the positional arguments of its call.
        kwargs: the keyword arguments.
    """
    flow = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
    if flow is None:
        return None
    for kind in type(module).__mro__:
        if kind in RULES:
            own: Any = kind
            if type(module).forward is not own.forward and not type(module).__module__.startswith("torch.nn."):
                return None  # its own forward may do anything with the input
            for rule in RULES[kind]:
                if (misfit := rule(module, flow)) is not None:
                    return misfit
            return None
    return None


def text_of(tensor: torch.Tensor) -> str:
    """Return shape and dtype as text: `[1,4096] float32`."""
    return f"[{','.join(map(str, tensor.shape))}] {dtype_name(tensor.dtype)}"


def _last_axis(attribute: str) -> Rule:
    def rule(module: Any, flow: torch.Tensor) -> Misfit | None:
        wanted = getattr(module, attribute)
        if flow.dim() and flow.shape[-1] == wanted:
            return None
        found = flow.shape[-1] if flow.dim() else None
        return Misfit(text_of(flow), f"[*,{wanted}]", attribute, found)

    return rule


def _channels(attribute: str, spatial: int | None = None) -> Rule:
    """Check the channels on axis 1, or on axis 0 for an input without batch (`spatial` + 1 dimensions)."""

    def rule(module: Any, flow: torch.Tensor) -> Misfit | None:
        wanted = getattr(module, attribute)
        axis = 0 if spatial is not None and flow.dim() == spatial + 1 else 1
        if flow.dim() > axis and flow.shape[axis] == wanted:
            return None
        found = flow.shape[axis] if flow.dim() > axis else None
        return Misfit(text_of(flow), counted(wanted, "channel"), attribute, found)

    return rule


def _dims(*allowed: int) -> Rule:
    def rule(_module: Any, flow: torch.Tensor) -> Misfit | None:
        if flow.dim() in allowed:
            return None
        words = " or ".join(map(str, allowed))
        return Misfit(text_of(flow), f"{words} dimensions, not {flow.dim()}")

    return rule


def _at_least(dims: int) -> Rule:
    def rule(_module: Any, flow: torch.Tensor) -> Misfit | None:
        if flow.dim() >= dims:
            return None
        return Misfit(text_of(flow), f"at least {dims} dimensions, not {flow.dim()}")

    return rule


def _same_dtype(module: Any, flow: torch.Tensor) -> Misfit | None:
    own = next((p.dtype for p in module.parameters() if p.dtype.is_floating_point or p.dtype.is_complex), None)
    return None if own is None or flow.dtype == own else _dtype_misfit(own, flow)


def _dtype_misfit(own: torch.dtype, flow: torch.Tensor) -> Misfit:
    mended = dtype_name(flow.dtype) if flow.dtype.is_floating_point else None
    return Misfit(text_of(flow), f"{dtype_name(own)}, the dtype of its parameters", dtype=mended)


def _norm_dtype(module: Any, flow: torch.Tensor) -> Misfit | None:
    """Check the dtype of a normalisation: parameters in float32 also accept half precision, but not the reverse."""
    tensors = (*module.parameters(), *module.buffers())
    own = next((tensor.dtype for tensor in tensors if tensor.dtype.is_floating_point), None)
    if not flow.dtype.is_floating_point:
        return Misfit(text_of(flow), f"{dtype_name(own or torch.float32)}")
    if own is None or flow.dtype == own:
        return None
    if own == torch.float32 and flow.dtype in (torch.float16, torch.bfloat16):
        return None
    return _dtype_misfit(own, flow)


def _floating(_module: Any, flow: torch.Tensor) -> Misfit | None:
    if flow.dtype.is_floating_point or flow.dtype.is_complex:
        return None
    return Misfit(text_of(flow), "floating-point values")


def _indices(_module: Any, flow: torch.Tensor) -> Misfit | None:
    if flow.dtype in (torch.int32, torch.int64):
        return None
    return Misfit(text_of(flow), "int64 or int32 indices; --input-dtype int64 gives them")


def _axis(attribute: str = "dim") -> Rule:
    def rule(module: Any, flow: torch.Tensor) -> Misfit | None:
        axis = getattr(module, attribute)
        rank = max(flow.dim(), 1)
        if axis is None or -rank <= axis < rank:
            return None
        return Misfit(text_of(flow), f"an axis {axis}, but there are {flow.dim()} axes", attribute, -1)

    return rule


def _flatten_axes(module: Any, flow: torch.Tensor) -> Misfit | None:
    rank = max(flow.dim(), 1)
    for attribute in ("start_dim", "end_dim"):
        axis = getattr(module, attribute)
        if not -rank <= axis < rank:
            return Misfit(text_of(flow), f"an axis {axis} to flatten, but there are {flow.dim()} axes", attribute)
    return None


def _normalized_shape(module: Any, flow: torch.Tensor) -> Misfit | None:
    wanted = tuple(module.normalized_shape)
    if flow.dim() >= len(wanted) and tuple(flow.shape[-len(wanted) :]) == wanted:
        return None
    found = flow.shape[-1] if len(wanted) == 1 and flow.dim() else None
    return Misfit(text_of(flow), f"[*,{','.join(map(str, wanted))}]", "normalized_shape", found)


def _glu(module: Any, flow: torch.Tensor) -> Misfit | None:
    if (misfit := _axis()(module, flow)) is not None:
        return misfit
    if not flow.dim():
        return Misfit(text_of(flow), "at least 1 dimension")
    size = flow.shape[module.dim]
    return None if size % 2 == 0 else Misfit(text_of(flow), f"an even size at axis {module.dim}, not {size}")


def _prelu(module: Any, flow: torch.Tensor) -> Misfit | None:
    wanted = module.num_parameters
    if wanted == 1 or (flow.dim() > 1 and flow.shape[1] == wanted):
        return None
    found = flow.shape[1] if flow.dim() > 1 else 1
    return Misfit(text_of(flow), counted(wanted, "channel"), "num_parameters", found)


def _pixel_shuffle(module: Any, flow: torch.Tensor) -> Misfit | None:
    square = module.upscale_factor**2
    if flow.dim() < 3:
        return Misfit(text_of(flow), f"at least 3 dimensions, not {flow.dim()}")
    channels = flow.shape[-3]
    return None if channels % square == 0 else Misfit(text_of(flow), f"a multiple of {square} channels, not {channels}")


def _pixel_unshuffle(module: Any, flow: torch.Tensor) -> Misfit | None:
    factor = module.downscale_factor
    if flow.dim() < 3:
        return Misfit(text_of(flow), f"at least 3 dimensions, not {flow.dim()}")
    if flow.shape[-1] % factor or flow.shape[-2] % factor:
        return Misfit(text_of(flow), f"a height and width divisible by {factor}")
    return None


def _channel_shuffle(module: Any, flow: torch.Tensor) -> Misfit | None:
    if flow.dim() < 3:
        return Misfit(text_of(flow), f"more than 2 dimensions, not {flow.dim()}")
    if flow.shape[1] % module.groups:
        return Misfit(text_of(flow), f"a multiple of {module.groups} channels (its groups), not {flow.shape[1]}")
    return None


def _recurrent(module: Any, flow: torch.Tensor) -> Misfit | None:
    return _dims(2, 3)(module, flow) or _last_axis("input_size")(module, flow)


def _cell(module: Any, flow: torch.Tensor) -> Misfit | None:
    return _dims(1, 2)(module, flow) or _last_axis("input_size")(module, flow)


def _attention(module: Any, flow: torch.Tensor) -> Misfit | None:
    return _dims(2, 3)(module, flow) or _last_axis("embed_dim")(module, flow)


def _instance_norm(spatial: int) -> Rule:
    channels = _channels("num_features", spatial)

    def rule(module: Any, flow: torch.Tensor) -> Misfit | None:
        return channels(module, flow) if module.affine or module.track_running_stats else None

    return rule


def _group_norm(module: Any, flow: torch.Tensor) -> Misfit | None:
    return _at_least(2)(module, flow) or _channels("num_channels")(module, flow)


def _mean_or_spatial(dims: int) -> Rule:
    """An adaptive average with output size 1 is a mean, which accepts any tensor with at least `dims` axes."""

    def rule(module: Any, flow: torch.Tensor) -> Misfit | None:
        size = module.output_size
        to_one = size == 1 or tuple(size if isinstance(size, list | tuple) else ()) == (1,) * dims
        return (_at_least(dims) if to_one else _dims(dims + 1, dims + 2))(module, flow)

    return rule


def _max_pool_dtype(module: Any, flow: torch.Tensor) -> Misfit | None:
    """Integers are accepted only with `return_indices`, which uses another kernel."""
    return None if module.return_indices else _floating(module, flow)


def _conv(dims: int) -> tuple[Rule, ...]:
    return _dims(dims + 1, dims + 2), _channels("in_channels", dims), _same_dtype


def _spatial(dims: int) -> tuple[Rule, ...]:
    return (_dims(dims + 1, dims + 2),)


#: The modules for which the CPU runs other operators than the meta device: it has its own kernel for MaxPool1d.
_DECIDED_HERE = frozenset({nn.MaxPool1d})

_BATCH_NORM = (_channels("num_features"), _norm_dtype)

#: The rules of each class. A class without an entry has those of its closest base class.
RULES: Mapping[type, tuple[Rule, ...]] = {
    nn.Linear: (_last_axis("in_features"), _same_dtype),
    nn.Bilinear: (_last_axis("in1_features"), _same_dtype),
    nn.Conv1d: _conv(1),
    nn.Conv2d: _conv(2),
    nn.Conv3d: _conv(3),
    nn.ConvTranspose1d: _conv(1),
    nn.ConvTranspose2d: _conv(2),
    nn.ConvTranspose3d: _conv(3),
    nn.BatchNorm1d: (_dims(2, 3), *_BATCH_NORM),
    nn.BatchNorm2d: (_dims(4), *_BATCH_NORM),
    nn.BatchNorm3d: (_dims(5), *_BATCH_NORM),
    nn.SyncBatchNorm: (_at_least(2), *_BATCH_NORM),
    nn.InstanceNorm1d: (_dims(2, 3), _instance_norm(1), _norm_dtype),
    nn.InstanceNorm2d: (_dims(3, 4), _instance_norm(2), _norm_dtype),
    nn.InstanceNorm3d: (_dims(4, 5), _instance_norm(3), _norm_dtype),
    nn.GroupNorm: (_group_norm, _norm_dtype),
    nn.LayerNorm: (_normalized_shape, _norm_dtype),
    nn.RMSNorm: (_normalized_shape, _floating),
    nn.LocalResponseNorm: (_at_least(3),),
    nn.Embedding: (_indices,),
    nn.EmbeddingBag: (_indices, _dims(1, 2)),
    nn.RNNBase: (_recurrent, _same_dtype),
    nn.RNNCellBase: (_cell, _same_dtype),
    nn.MultiheadAttention: (_attention, _same_dtype),
    nn.Softmax: (_axis(), _floating),
    nn.LogSoftmax: (_axis(), _floating),
    nn.Softmin: (_axis(), _floating),
    nn.Softmax2d: (_dims(3, 4), _floating),
    nn.GLU: (_glu, _floating),
    nn.PReLU: (_prelu, _same_dtype),
    nn.Flatten: (_flatten_axes,),
    nn.PixelShuffle: (_pixel_shuffle,),
    nn.PixelUnshuffle: (_pixel_unshuffle,),
    nn.ChannelShuffle: (_channel_shuffle,),
    nn.MaxPool1d: (*_spatial(1), _max_pool_dtype),
    nn.MaxPool2d: _spatial(2),
    nn.MaxPool3d: _spatial(3),
    nn.AvgPool1d: _spatial(1),
    nn.AvgPool2d: _spatial(2),
    nn.AvgPool3d: _spatial(3),
    nn.AdaptiveAvgPool1d: (*_spatial(1), _floating),
    nn.AdaptiveAvgPool2d: (_mean_or_spatial(2), _floating),
    nn.AdaptiveAvgPool3d: (_mean_or_spatial(3), _floating),
    nn.AdaptiveMaxPool1d: (*_spatial(1), _floating),
    nn.AdaptiveMaxPool2d: (*_spatial(2), _floating),
    nn.AdaptiveMaxPool3d: (*_spatial(3), _floating),
}
