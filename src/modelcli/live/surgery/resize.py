"""resize: give a model another image size, number of channels or vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from modelcli.edits.applied import Applied, Change, Context
from modelcli.edits.resize import IMAGE_SIZE, IN_CHANNELS, VOCAB_SIZE, Resize
from modelcli.errors import RequestError
from modelcli.language import selectors
from modelcli.live import memory, resizing
from modelcli.live.describe import describe, dtype_name
from modelcli.live.inputs import Inputs
from modelcli.live.providers import resizing_of
from modelcli.live.resizing import ResizedTensor, Resizing
from modelcli.live.script import access_paths
from modelcli.live.script.source_text import InexpressibleError
from modelcli.live.script.step import Step
from modelcli.live.sources import is_composite, is_lazy
from modelcli.live.surgery import token_rows
from modelcli.live.surgery.core import blueprint_of, brief, count, submodule
from modelcli.model.blueprint import Blueprint
from modelcli.model.paths import joined


def carry_out(module: nn.Module, edit: Resize, context: Context) -> Applied[nn.Module]:
    paths = selectors.select_modules(blueprint_of(module, context), edit.targets)
    path, found = _resizing(module, edit, paths)
    line = str(replace(edit, targets=tuple(selectors.literal(path) if path else "." for path in paths)))
    part = submodule(module, path)
    params = count(part)
    resized = resizing.carry_out(part, found, context.seed)
    memory.require(memory.bytes_of(module), str(edit))
    changes = [_change(edit, path, tensor) for tensor in resized]
    if not changes:
        before, after = (f"{edit.what}={size}" for size in (_text(found.before), edit.size))
        changes = [Change(path, edit.name, before, after, params, params)]
    inputs = context.inputs if path or context.inputs is None else _inputs(context.inputs, edit, found.before)
    return Applied(module, [replace(changes[0], resolved=(line,)), *changes[1:]], [], inputs)


def _resizing(module: nn.Module, edit: Resize, paths: Sequence[str]) -> tuple[str, Resizing]:
    """Return the path of what is resized, and how: as its library does it, or rows of single modules.

    Raises RequestError where no library knows how, and the targets are no modules with a row for each token.
    """
    if len(paths) == 1:
        path = paths[0]
        found = resizing_of(submodule(module, path), edit.what, edit.size)
        if found is not None:
            if found.before in (edit.size, (edit.size, edit.size)):
                raise RequestError(f"{edit.what} of {path or 'the model'} is {edit.size} already", "leave the edit out")
            return path, found
    if edit.what != VOCAB_SIZE:
        kinds = ", ".join(type(submodule(module, path)).__name__ for path in paths[:3])
        raise RequestError(
            f"no library says how to give {kinds} another {edit.what}",
            "replace and its --keep-weights change single layers",
        )
    return "", _rows(module, edit, paths)


def _rows(module: nn.Module, edit: Resize, paths: Sequence[str]) -> Resizing:
    """Return how single modules get another number of rows. Raises RequestError for modules without such rows."""
    sizes = set()
    for path in paths:
        part = submodule(module, path)
        if not isinstance(part, nn.Embedding | nn.Linear):
            raise RequestError(
                f"{path or 'the model'} is {brief(part)}: only Embedding and Linear have a row for each token",
                "name these modules, the embedding first: resize embed head vocab_size=32000",
            )
        for name in ("weight", "bias"):
            _require_plain(joined(path, name), part, name)
        sizes.add(int(part.weight.shape[0]))
    if len(sizes) > 1:
        raise RequestError(
            f"{', '.join(paths)} have {', '.join(map(str, sorted(sizes)))} rows: they do not have one for each token",
            "resize each by itself",
        )
    size = sizes.pop()
    if size == edit.size:
        raise RequestError(f"{', '.join(paths)} has {size} rows already", "leave the edit out")
    return Resizing(size, partial(_with_rows, paths=tuple(paths), rows=edit.size))


#: The dtypes in which new rows can be drawn.
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _require_plain(shown: str, module: nn.Module, name: str) -> None:
    """Raise RequestError for a tensor whose rows cannot be kept: lazy, sparse, quantized, computed from others."""
    if name == "bias" and "bias" in module._parameters and module._parameters["bias"] is None:
        return
    tensor = module._parameters.get(name)
    if tensor is None:
        if name == "weight" or hasattr(module, name):
            raise RequestError(f"{shown} is no parameter of its own", "undo what computes it first")
        return
    if is_lazy(tensor) or is_composite(tensor):
        raise RequestError(f"the rows of {shown} cannot be kept: it has no plain values", "replace the module instead")
    if tensor.dtype not in _DTYPES:
        raise RequestError(
            f"new rows of {shown} cannot be drawn as {dtype_name(tensor.dtype)}", f"cast it first: cast {shown} float32"
        )


def _with_rows(module: nn.Module, *, paths: Sequence[str], rows: int) -> None:
    token_rows.resize([submodule(module, path) for path in paths], rows)


def _change(edit: Resize, path: str, tensor: ResizedTensor) -> Change:
    was, now = tensor.before, tensor.after
    before = 0 if was is None or not tensor.is_parameter else _elements(was)
    after = _elements(now) if tensor.is_parameter else 0
    return Change(joined(path, tensor.name), edit.name, "" if was is None else _shape(was), _shape(now), before, after)


def _shape(shape: Sequence[int]) -> str:
    return f"[{','.join(map(str, shape))}]"


def _elements(shape: Sequence[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _text(size: int | tuple[int, int]) -> str:
    return "x".join(map(str, size)) if isinstance(size, tuple) else str(size)


def _inputs(inputs: Inputs, edit: Resize, before: int | tuple[int, int]) -> Inputs:
    """Return what the model takes afterwards: images of another size, or with other channels."""
    sides = before if isinstance(before, tuple) else (before, before)

    def changed(shape: tuple[int, ...]) -> tuple[int, ...]:
        if edit.what == IMAGE_SIZE and len(shape) > 2 and shape[-2:] == sides:
            return (*shape[:-2], edit.size, edit.size)
        if edit.what == IN_CHANNELS and len(shape) > 2 and shape[-3] == before:
            return (*shape[:-3], edit.size, *shape[-2:])
        return shape

    named = tuple(item if item.shape is None else replace(item, shape=changed(item.shape)) for item in inputs.named)
    return replace(inputs, shapes=tuple(map(changed, inputs.shapes)), named=named)


def script_lines(edit: Resize, step: Step) -> list[str]:
    blueprint: Blueprint = describe(step.before)
    path, found = _resizing(step.before, edit, selectors.select_modules(blueprint, edit.targets))
    if found.statements is None:
        raise InexpressibleError(f"plain Python has no function that does {edit}")
    lines = found.statements(step.script, access_paths.module_expression(step.before, path))
    return [*(step.seed_statements() if found.draws else []), *lines]
