"""fuse: fold BatchNorms into the layers before them. `folding` finds out which layers these are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from modelcli.edits.applied import Applied, Change, Context
from modelcli.edits.fuse import Fuse, notes_on, picked_norms, require_some, resolved_line
from modelcli.live.describe import describe
from modelcli.live.script import access_paths
from modelcli.live.script.source_text import NN, STATEMENTS, dedented, quoted
from modelcli.live.script.step import Step
from modelcli.live.sources import computed_tensor, flag_of, real_tensor, require_source, set_flag
from modelcli.live.surgery.core import blueprint_of, brief, count, submodule
from modelcli.live.surgery.folding import Fold, folds, is_norm, tensor_of


def carry_out(module: nn.Module, edit: Fuse, context: Context) -> Applied[nn.Module]:
    norms = picked_norms(edit, blueprint_of(module, context), lambda path: is_norm(submodule(module, path)))
    found, kept = folds(module, norms, context.inputs)
    names = [fold.norm_paths[0] for fold in found]
    require_some(names, kept, edit.expect)
    changes: list[Change] = []
    for fold in found:
        before, size = brief(fold.norm), count(fold.norm) + count(fold.layer)
        _fold(fold)
        new = _left(fold)
        after, other = f"{brief(new)}, folded into {fold.layer_paths[0]}", count(new) + count(fold.layer)
        for path in fold.norm_paths:
            parent, _, name = path.rpartition(".")
            submodule(module, parent)._modules[name] = new
            changes.append(Change(path, edit.name, before, after, size, other))
    line = resolved_line([(fold.norm_paths[0], fold.layer_paths[0]) for fold in found])
    changes[0] = replace(changes[0], resolved=(line,))
    notes = notes_on(names, kept)
    if edit.into and context.inputs is None:
        notes.append("no forward pass shows that these are the layers before them: the input size is not known")
    return Applied(module, changes, notes, context.inputs)


def _left(fold: Fold) -> nn.Module:
    """Return what takes the place of a BatchNorm: an Identity, or the activation that it calls itself."""
    if len(fold.left) == 1:
        return submodule(fold.norm, fold.left[0])
    new = nn.Sequential(*(submodule(fold.norm, name) for name in fold.left)) if fold.left else nn.Identity()
    new.training = fold.norm.training
    return new


# --- values ----------------------------------------------------------------------------------------------------------


def _fold(fold: Fold) -> None:
    """Give a layer the folded weight and bias. On the meta device they are computed when they are needed."""
    layer, norm = fold.layer, fold.norm
    weight, bias, shift = layer._parameters["weight"], layer._parameters.get("bias"), tensor_of(norm, "bias")
    assert weight is not None
    given = _Given.of(fold)
    flags = flag_of(weight), flag_of(next(tensor for tensor in (bias, shift, weight) if tensor is not None))
    for name, made, flag in zip(("weight", "bias"), (given.weight_made(), given.bias_made()), flags, strict=True):
        parameter = nn.Parameter(made, requires_grad=False)
        set_flag(parameter, flag)
        layer._parameters[name] = parameter


@dataclass(frozen=True)
class _Given:
    """The tensors of a layer and of the BatchNorm behind it, as they are before folding."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    mean: torch.Tensor
    var: torch.Tensor
    scale: torch.Tensor | None
    shift: torch.Tensor | None
    eps: float
    linear: bool
    transposed: bool

    @classmethod
    def of(cls, fold: Fold) -> _Given:
        def detached(module: nn.Module, name: str) -> torch.Tensor | None:
            found = tensor_of(module, name)
            return None if found is None else found.detach()

        weight, mean, var = (
            detached(fold.layer, "weight"),
            detached(fold.norm, "running_mean"),
            detached(fold.norm, "running_var"),
        )
        assert weight is not None
        assert mean is not None
        assert var is not None
        bias, scale, shift = (
            detached(fold.layer, "bias"),
            detached(fold.norm, "weight"),
            detached(fold.norm, "bias"),
        )
        eps = float(fold.norm.eps)  # type: ignore[arg-type]
        return cls(weight, bias, mean, var, scale, shift, eps, isinstance(fold.layer, nn.Linear), fold.transposed)

    def weight_made(self) -> torch.Tensor:
        """Return the folded weight."""
        if not self.weight.is_meta:
            return self._folded(self.weight)[0]
        reads = [self.weight, self.mean, self.var, *([] if self.scale is None else [self.scale])]
        compute = partial(_weight_values, self)
        return computed_tensor(self.weight.shape, self.weight.dtype, compute, map(require_source, reads))

    def bias_made(self) -> torch.Tensor:
        """Return the folded bias. The weight decides only its dtype, where there was no bias."""
        dtype = self.weight.dtype if self.bias is None else self.bias.dtype
        if not self.weight.is_meta:
            return self._folded(self.weight)[1]
        reads = [tensor for tensor in (self.bias, self.mean, self.var, self.scale, self.shift) if tensor is not None]
        return computed_tensor(self.mean.shape, dtype, partial(_bias_values, self), map(require_source, reads))

    def without_weight(self) -> torch.Tensor:
        """Return a weight of no elements that folds with the BatchNorm as the layer's does."""
        outputs = self.mean.shape[0]
        return torch.empty((0, outputs) if self.transposed else (outputs, 0), dtype=self.weight.dtype)

    def _folded(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Fold with the functions of torch.nn.utils.fusion."""
        bias, mean, var, scale, shift = (
            None if tensor is None else real_tensor(tensor)
            for tensor in (self.bias, self.mean, self.var, self.scale, self.shift)
        )
        assert mean is not None
        assert var is not None
        with torch.no_grad():
            if self.linear:
                scale = torch.ones_like(mean) if scale is None else scale
                shift = torch.zeros_like(mean) if shift is None else shift
                made = fuse_linear_bn_weights(weight, bias, mean, var, self.eps, scale, shift)
            else:
                made = fuse_conv_bn_weights(weight, bias, mean, var, self.eps, scale, shift, self.transposed)
        return made[0].detach(), made[1].detach()

    def folded(self, *, with_weight: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the contiguous values of the folded weight and bias; without the weight's, that has no elements."""
        weight, bias = self._folded(real_tensor(self.weight) if with_weight else self.without_weight())
        return weight.contiguous(), bias.contiguous()


def _weight_values(given: _Given) -> torch.Tensor:
    return given.folded(with_weight=True)[0]


def _bias_values(given: _Given) -> torch.Tensor:
    return given.folded(with_weight=False)[1]


# --- scripts ---------------------------------------------------------------------------------------------------------


_FUSE_CONV = dedented('''
    def fuse_conv(conv, norm, transpose=False):
        """Fold a BatchNorm into the convolution before it. A bias that is new trains if that of the BatchNorm does."""
        trains = next(each for each in (conv.bias, norm.bias, conv.weight) if each is not None).requires_grad
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias, transpose
        )
        conv.bias.requires_grad_(trains)
''')
_FUSE_LINEAR = dedented('''
    def fuse_linear(linear, norm):
        """Fold a BatchNorm into the linear layer before it. A bias that is new trains if that of the BatchNorm does."""
        mean, var, scale, shift = norm.running_mean, norm.running_var, norm.weight, norm.bias
        trains = next(each for each in (linear.bias, shift, linear.weight) if each is not None).requires_grad
        scale = torch.ones_like(mean) if scale is None else scale
        shift = torch.zeros_like(mean) if shift is None else shift
        linear.weight, linear.bias = fuse_linear_bn_weights(
            linear.weight, linear.bias, mean, var, norm.eps, scale, shift
        )
        linear.bias.requires_grad_(trains)
''')


def script_lines(edit: Fuse, step: Step) -> list[str]:
    model = step.before
    norms = picked_norms(edit, describe(model), lambda path: is_norm(submodule(model, path)))
    lines: list[str] = []
    alike: dict[tuple[str, str], list[Fold]] = {}
    for fold in folds(model, norms, None)[0]:
        one_path = len(fold.norm_paths) == 1 and access_paths.is_plain_assignment(model, fold.norm_paths[0])
        at = "model.get_submodule(norm)" if one_path else access_paths.module_expression(model, fold.norm_paths[0])
        alike.setdefault((_function(fold, step), _new_in_script(fold, at)), []).append(fold)
    for (function, new), group in alike.items():
        if len(group) > STATEMENTS:
            lines += _loop(group, function, new)
            continue
        for fold in group:
            lines += _statements(fold, function, step)
    return lines


def _function(fold: Fold, step: Step) -> str:
    """Return the call that folds a pair, with `{}` for the layer and the BatchNorm; the script gets its function."""
    linear = isinstance(fold.layer, nn.Linear)
    step.script.helpers.setdefault(_FUSE_LINEAR if linear else _FUSE_CONV)
    step.script.imports.add(f"from torch.nn.utils.fusion import fuse_{'linear' if linear else 'conv'}_bn_weights")
    if not fold.left:
        step.script.imports.add(NN)
    if linear:
        return "fuse_linear({}, {})"
    return "fuse_conv({}, {}, transpose=True)" if fold.transposed else "fuse_conv({}, {})"


def _new_in_script(fold: Fold, norm: str) -> str:
    """Return the expression for what takes the place of the BatchNorm of an expression."""
    children = [f"{norm}.get_submodule({quoted(name)})" for name in fold.left]
    if len(children) == 1:
        return children[0]
    made = f"nn.Sequential({', '.join(children)})" if children else "nn.Identity()"
    return made if fold.norm.training else f"{made}.eval()"


def _statements(fold: Fold, function: str, step: Step) -> list[str]:
    first, *others = fold.norm_paths
    layer, norm = (access_paths.module_expression(step.before, path) for path in (fold.layer_paths[0], first))
    lines = [
        function.format(layer, norm),
        access_paths.replace_statement(step.before, first, _new_in_script(fold, norm)),
    ]
    again = access_paths.module_expression(step.after, first)
    return [*lines, *(access_paths.replace_statement(step.before, path, again) for path in others)]


def _loop(group: Sequence[Fold], function: str, new: str) -> list[str]:
    pairs = [f"    ({quoted(fold.layer_paths[0])}, {quoted(fold.norm_paths[0])})," for fold in group]
    calls = function.format("model.get_submodule(layer)", "model.get_submodule(norm)")
    return ["for layer, norm in (", *pairs, "):", f"    {calls}", f"    model.set_submodule(norm, {new})"]
