"""How `replace --keep-weights` gives the old values of a tensor another shape before they are copied.

The words are those of `edits.kept_weights`:

- `sum`, `mean`: the input channels of a convolution (see `input_channels`).
- `repeat`: every axis along which the new tensor is larger, but those of a kernel. Nothing is rescaled.
- `interpolate`: the kernels of a two-dimensional convolution, as timm's `resample_patch_embed` does, so that the new
  kernel answers to an enlarged image as the old one answered to the image (FlexiViT, arXiv:2212.08013). And position
  embeddings: those of a grid as `vision_transformer.interpolate_embeddings` does (bicubic, corners aligned, a class
  token kept), those of a line linearly, with the first and the last position kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from modelcli.edits.kept_weights import INTERPOLATE, MEAN, REPEAT, SUM
from modelcli.errors import RequestError
from modelcli.live.script.source_text import NN, SourceText, dedented
from modelcli.live.sources import computed_tensor, is_lazy, real_tensor, require_source
from modelcli.live.surgery import input_channels

Shape = tuple[int, ...]


class ValueRule(Protocol):
    """How the old values of a tensor get another shape."""

    @property
    def function(self) -> str:
        """The name of the function that does it in a script."""

    @property
    def argument(self) -> object:
        """What that function takes for the tensor, a plain value."""

    def shape(self, before: Shape) -> Shape:
        """Return the shape of the new values."""

    def applied(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the new values. On the meta device they are computed when needed."""

    def told(self, before: Shape) -> str:
        """Say what happens to a tensor of this shape."""


def rule_for(
    name: str, before: torch.Tensor, new: nn.Module, how: str, *, transposed: bool = False
) -> ValueRule | None:
    """Return the rule for a tensor of a new module; None if the word of `--keep-weights` does not apply to it.

    Args:
        name: the tensor's path in the new module.
        before: the old tensor.
        new: the new module.
        how: the word.
        transposed: whether the axes of the old tensor are swapped when it is copied.

    Raises RequestError where the values would get another meaning.
    """
    path, _, own = name.rpartition(".")
    holder = new.get_submodule(path)
    after: torch.Tensor | None = holder._parameters.get(own)
    if how in (SUM, MEAN):
        return input_channels.rule_for(name, before, new, how)
    if is_lazy(before):
        return None
    shape = tuple(before.shape[::-1] if transposed else before.shape)
    if after is None:
        after = holder._buffers.get(own)
    if after is None or is_lazy(after) or after.dim() != len(shape) or shape == tuple(after.shape) or 0 in shape:
        return None
    if how == REPEAT:
        return _repeat(shape, after, holder, name, transposed=transposed)
    if how == INTERPOLATE and before.is_floating_point():
        return _kernel(shape, after, holder, own) or _positions(shape, after, holder, own, name)
    return None


def _computed(tensor: torch.Tensor, shape: Shape, compute: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Return what is computed of a tensor; on the meta device when it is needed, as a whole."""
    old = tensor.detach()
    if not old.is_meta:
        return compute(old)
    return computed_tensor(shape, old.dtype, lambda: compute(real_tensor(old)), [require_source(old)])


def _in_float(compute: Callable[[torch.Tensor], torch.Tensor], values: torch.Tensor) -> torch.Tensor:
    """Compute in float32, or in float64 for such values, and give the dtype back."""
    made = compute(values if values.dtype == torch.float64 else values.float())
    return made.to(values.dtype).contiguous()


def _sizes(shape: Shape) -> str:
    return "x".join(map(str, shape))


# --- repeat ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Repeated:
    """The values again and again along each axis, up to `full`. `transposed`: the old tensor has its axes swapped."""

    full: Shape
    transposed: bool = False

    function: ClassVar[str] = "repeat_values"

    @property
    def argument(self) -> Shape:
        return self.full[::-1] if self.transposed else self.full

    def shape(self, _before: Shape) -> Shape:
        return self.full

    def applied(self, tensor: torch.Tensor) -> torch.Tensor:
        return _computed(tensor, self.full, partial(repeated, shape=self.full))

    def told(self, before: Shape) -> str:
        return f"{_sizes(before)} repeated to {_sizes(self.full)}"


def repeated(values: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Return the values as often along each axis as it takes to fill the shape."""
    times = [math.ceil(size / had) for size, had in zip(shape, values.shape, strict=True)]
    return values.repeat(times)[tuple(map(slice, shape))].contiguous()


def _repeat(shape: Shape, after: torch.Tensor, holder: nn.Module, name: str, *, transposed: bool) -> Repeated | None:
    """Return the rule where an axis is larger; where one is smaller, the overlap is kept.

    Raises RequestError for a table with a row for padding, which would be among the others too.
    """
    plain = 2 if isinstance(holder, _ConvNd) and len(shape) > 2 else len(shape)
    full = (*map(max, after.shape[:plain], shape[:plain]), *shape[plain:])
    if full == shape:
        return None
    if isinstance(holder, nn.Embedding) and holder.padding_idx is not None and full[0] != shape[0]:
        raise RequestError(
            f"--keep-weights={REPEAT} would repeat row {holder.padding_idx} of {name}, which is for padding",
            "leave --keep-weights out",
        )
    return Repeated(full, transposed)


# --- interpolate: kernels --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ResampledKernels:
    """The kernels of a convolution resampled to a height and a width."""

    size: tuple[int, int]

    function: ClassVar[str] = "resample_kernels"

    @property
    def argument(self) -> Shape:
        return self.size

    def shape(self, before: Shape) -> Shape:
        return (*before[:2], *self.size)

    def applied(self, tensor: torch.Tensor) -> torch.Tensor:
        return _computed(tensor, self.shape(tuple(tensor.shape)), partial(resampled_kernels, size=self.size))

    def told(self, before: Shape) -> str:
        return f"kernels resampled from {_sizes(before[2:])} to {_sizes(self.size)}"


def resampled_kernels(weight: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return the weight `[out, in, height, width]` of a convolution with kernels of another size.

    It is timm's `resample_patch_embed`: `w @ pinv(B)`, with `B` the matrix of a bicubic, antialiased resize of images
    of the old size to the new one. Computed in float32 at least.
    """

    def resampled(values: torch.Tensor) -> torch.Tensor:
        height, width = values.shape[2:]
        basis = torch.eye(height * width, dtype=values.dtype, device=values.device).reshape(-1, 1, height, width)
        images = functional.interpolate(basis, size=size, mode="bicubic", antialias=True, align_corners=False)
        resize = images.squeeze(1).permute(1, 2, 0).reshape(size[0] * size[1], height * width)
        kernels: torch.Tensor = values.reshape(*values.shape[:2], -1) @ torch.linalg.pinv(resize)
        return kernels.reshape(*values.shape[:2], *size)

    return _in_float(resampled, weight)


def _kernel(shape: Shape, after: torch.Tensor, holder: nn.Module, own: str) -> ResampledKernels | None:
    if not isinstance(holder, _ConvNd) or isinstance(holder, _ConvTransposeNd) or own != "weight" or len(shape) != 4:
        return None
    size = (int(after.shape[2]), int(after.shape[3]))
    return ResampledKernels(size) if shape[2:] != size else None


# --- interpolate: positions ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InterpolatedGrid:
    """Position embeddings of a square grid for another side. `kept` are positions before it: 1 for a class token."""

    kept: int
    side: int

    function: ClassVar[str] = "interpolate_grids"

    @property
    def argument(self) -> Shape:
        return (self.kept, self.side)

    def shape(self, before: Shape) -> Shape:
        return (*before[:-2], self.kept + self.side**2, before[-1])

    def applied(self, tensor: torch.Tensor) -> torch.Tensor:
        compute = partial(interpolated_grid, kept=self.kept, side=self.side)
        return _computed(tensor, self.shape(tuple(tensor.shape)), compute)

    def told(self, before: Shape) -> str:
        side = math.isqrt(before[-2] - self.kept)
        kept = ", class token kept" if self.kept else ""
        return f"positions interpolated from a grid of {side}x{side} to {self.side}x{self.side}{kept}"


@dataclass(frozen=True)
class InterpolatedLine:
    """Position embeddings of a line for another length. The first `kept` stay: those up to the padding."""

    kept: int
    length: int

    function: ClassVar[str] = "interpolate_lines"

    @property
    def argument(self) -> Shape:
        return (self.kept, self.length)

    def shape(self, before: Shape) -> Shape:
        return (*before[:-2], self.length, before[-1])

    def applied(self, tensor: torch.Tensor) -> torch.Tensor:
        compute = partial(interpolated_line, kept=self.kept, length=self.length)
        return _computed(tensor, self.shape(tuple(tensor.shape)), compute)

    def told(self, before: Shape) -> str:
        kept = f", the first {self.kept} kept" if self.kept else ""
        return f"positions interpolated along a line from {before[-2]} to {self.length}{kept}"


def interpolated_grid(positions: torch.Tensor, kept: int, side: int) -> torch.Tensor:
    """Return position embeddings `[..., kept + n * n, width]` for another side, as `interpolate_embeddings` does.

    The first `kept` stay; the others are interpolated as an image: bicubic, corners aligned, in float32 at least.
    """

    def interpolated(values: torch.Tensor) -> torch.Tensor:
        width = values.shape[-1]
        rows = values.reshape(1, -1, width)
        before = math.isqrt(rows.shape[1] - kept)
        image = rows[:, kept:].permute(0, 2, 1).reshape(1, width, before, before)
        image = functional.interpolate(image, size=side, mode="bicubic", align_corners=True)
        made = torch.cat([rows[:, :kept], image.reshape(1, width, side * side).permute(0, 2, 1)], dim=1)
        return made.reshape(*values.shape[:-2], -1, width)

    return _in_float(interpolated, positions)


def interpolated_line(positions: torch.Tensor, kept: int, length: int) -> torch.Tensor:
    """Return position embeddings `[..., n, width]` for another length, in float32 at least.

    The first `kept` stay; the others are interpolated linearly with both ends where they were.
    """

    def interpolated(values: torch.Tensor) -> torch.Tensor:
        rows = values.reshape(1, -1, values.shape[-1])
        line = rows[:, kept:].permute(0, 2, 1)
        line = functional.interpolate(line, size=length - kept, mode="linear", align_corners=True)
        made = torch.cat([rows[:, :kept], line.permute(0, 2, 1)], dim=1)
        return made.reshape(*values.shape[:-2], length, values.shape[-1])

    return _in_float(interpolated, positions)


def _positions(
    shape: Shape, after: torch.Tensor, holder: nn.Module, own: str, name: str
) -> InterpolatedGrid | InterpolatedLine | None:
    """Return the rule for position embeddings: the weight of an Embedding, or a parameter `[1, positions, width]`.

    A parameter `[positions, width]` counts if its name says so. Raises RequestError for what is no plain sequence of
    positions: a table of relative ones, or a grid that is not square.
    """
    is_table = isinstance(holder, nn.Embedding) and own == "weight"
    is_own = not type(holder).__module__.startswith("torch.nn") and isinstance(after, nn.Parameter)
    is_row = is_own and (shape[:-2] == (1,) == tuple(after.shape[:-2]) or (len(shape) == 2 and "pos" in own))
    if len(shape) < 2 or not (is_table or is_row) or shape[-2] == after.shape[-2]:
        return None
    before, length = shape[-2], int(after.shape[-2])
    if "relative" in own:
        raise RequestError(
            f"--keep-weights={INTERPOLATE} cannot carry over {name}: a table of relative positions is no sequence",
            "leave --keep-weights out",
        )
    if _side(before - 1) and (side := _side(length - 1)):
        return InterpolatedGrid(1, side)
    if isinstance(holder, nn.Embedding):
        kept = 0 if holder.padding_idx is None else holder.padding_idx + 1
        return InterpolatedLine(kept, length) if kept < min(before, length) else None
    if _side(before) and (side := _side(length)):
        return InterpolatedGrid(0, side)
    for kept in (1, 0):
        if (side := _side(before - kept)) and side > 1:
            grid = f"a grid of {side}x{side}" + (" and a class token" if kept else "")
            raise RequestError(
                f"--keep-weights={INTERPOLATE} cannot carry over {name}: its {before} positions are {grid}, and "
                f"{length} positions are no such grid",
                f"{(side + 1) ** 2 + kept} positions are",
            )
    return InterpolatedLine(0, length)


def _side(positions: int) -> int:
    """Return the side of a square grid with this number of positions; 0 if it is none."""
    side = math.isqrt(positions) if positions > 0 else 0
    return side if side * side == positions else 0


# --- scripts ---------------------------------------------------------------------------------------------------------


def in_script(script: SourceText, state: str, rules: dict[str, ValueRule]) -> str:
    """Return the expression for a state dict whose tensors have gone through their rules.

    Args:
        script: gets the functions that the expression calls.
        state: the expression for the old state dict.
        rules: the rule of each tensor, by its name.
    """
    arguments: dict[str, dict[str, Any]] = {}
    for name, rule in rules.items():
        arguments.setdefault(rule.function, {})[name] = rule.argument
    for function, given in arguments.items():
        script.helpers.setdefault(_HELPERS[function])
        if function not in ("repeat_values", *input_channels.FUNCTIONS):
            script.imports.add(NN)
        state = f"{function}({state}, {given!r})"
    return state


_HELPERS = {
    **input_channels.FUNCTIONS,
    "repeat_values": dedented('''
        def repeat_values(old, shapes):
            """Repeat the values of tensors in a state dict along each axis, up to these shapes."""
            for name, shape in shapes.items():
                times = [-(-size // had) for size, had in zip(shape, old[name].shape)]
                old = {**old, name: old[name].repeat(times)[tuple(map(slice, shape))]}
            return old
    '''),
    "resample_kernels": dedented('''
        def resample_kernels(old, sizes):
            """Give the kernels of convolutions in a state dict another size, as timm's resample_patch_embed does."""
            for name, size in sizes.items():
                weight = old[name] if old[name].dtype == torch.float64 else old[name].float()
                height, width = weight.shape[2:]
                basis = torch.eye(height * width, dtype=weight.dtype).reshape(-1, 1, height, width)
                images = nn.functional.interpolate(basis, size=size, mode="bicubic", antialias=True)
                resize = images.squeeze(1).permute(1, 2, 0).reshape(size[0] * size[1], height * width)
                kernels = weight.reshape(*weight.shape[:2], -1) @ torch.linalg.pinv(resize)
                old = {**old, name: kernels.reshape(*weight.shape[:2], *size).to(old[name].dtype)}
            return old
    '''),
    "interpolate_grids": dedented('''
        def interpolate_grids(old, sides):
            """Interpolate position embeddings of square grids, as vision_transformer.interpolate_embeddings does.

            `sides` are the number of positions before the grid, which stay, and the new side of the grid.
            """
            for name, (kept, side) in sides.items():
                values = old[name] if old[name].dtype == torch.float64 else old[name].float()
                width = values.shape[-1]
                rows = values.reshape(1, -1, width)
                before = int((rows.shape[1] - kept) ** 0.5)
                image = rows[:, kept:].permute(0, 2, 1).reshape(1, width, before, before)
                image = nn.functional.interpolate(image, size=side, mode="bicubic", align_corners=True)
                made = torch.cat([rows[:, :kept], image.reshape(1, width, side * side).permute(0, 2, 1)], dim=1)
                old = {**old, name: made.reshape(*values.shape[:-2], -1, width).to(old[name].dtype)}
            return old
    '''),
    "interpolate_lines": dedented('''
        def interpolate_lines(old, lengths):
            """Interpolate position embeddings linearly to other lengths, behind the first ones, which stay."""
            for name, (kept, length) in lengths.items():
                values = old[name] if old[name].dtype == torch.float64 else old[name].float()
                rows = values.reshape(1, -1, values.shape[-1])
                line = rows[:, kept:].permute(0, 2, 1)
                line = nn.functional.interpolate(line, size=length - kept, mode="linear", align_corners=True)
                made = torch.cat([rows[:, :kept], line.permute(0, 2, 1)], dim=1)
                old = {**old, name: made.reshape(*values.shape[:-2], length, -1).to(old[name].dtype)}
            return old
    '''),
}
