"""The Python API: the functions of `import modelcli`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from modelcli import edits as edit_lines
from modelcli.edits import Edit
from modelcli.errors import RequestError
from modelcli.language.references import Source, parse_input_size
from modelcli.model.blueprint import Blueprint

if TYPE_CHECKING:
    from torch import nn


def load(
    path: str | os.PathLike[str],
    *,
    arch: str | nn.Module | None = None,
    weights: str | None = None,
    key: str | None = None,
    seed: int = 0,
    trust: bool = False,
    tensors_only: bool = False,
    strict: bool = True,
) -> nn.Module:
    """Load a model: its architecture, its weights, its `requires_grad` flags.

    Takes the path of a checkpoint, or any other model reference. A checkpoint that modelcli wrote records its
    architecture; for others `arch` names it, as a reference or as an `nn.Module`, which is filled in place. `weights`
    is the name of pretrained weights or a file, for a reference that is not a checkpoint; `key` names the state dict
    inside a training checkpoint. `seed` determines random values. `trust` allows a record to name Python code of its
    own; `tensors_only` loads only the tensors of a file that contains other objects too.

    Tied parameters are one `Parameter` again; non-persistent buffers and plain tensor attributes are as the
    constructor makes them, or as the library's own loader makes them, whatever an edit has cast. The caller's random
    state does not change.

    Raises AnswerNoError if the checkpoint does not fit (with `strict=False` only if shapes differ),
    RequestError, UnsafeError, FileFormatError.
    """
    from modelcli.live import opening

    text = _reference(path)
    _check_seed(seed)
    reference = arch if isinstance(arch, str) else None
    source = Source(text, weights, reference, key, seed, trust=trust, tensors_only=tensors_only, strict=strict)
    if arch is None or isinstance(arch, str):
        module, live = opening.open_real(source)
        if (base := live.architecture) is not None:
            if live.record is not None:
                base.provider.describe_edits(base, module)
            if live.contents is not None:
                base.provider.after_loading(base, module)
        return module
    return opening.with_arch_instance(source, arch)[0]


def apply(
    model: nn.Module,
    *edits: str | Edit,
    seed: int = 0,
    input_size: str | Sequence[int] | Sequence[Sequence[int]] | None = None,
    check: str = "none",
    also_ema: nn.Module | None = None,
) -> nn.Module:
    """Apply edits to a model, in place: all of them, or none if one is wrong.

    An edit is a line of text, as on the command line, or a dataclass of `modelcli.edits`::

        modelcli.apply(model, "replace classifier.6 Linear(_,10)", Freeze(targets=("features",)))

    Returns the model; after `extract` that is another object, the submodule. Edit number i draws the values that
    `torch.manual_seed(seed * 1000003 + i)` and the plain constructor draw; the caller's random state does not
    change. `input_size` is the shape of the input, batch included, or one shape for each input; it is needed for a
    `_` that the old module does not determine, and for `check`. `apply` runs no forward pass to check the edited model,
    except with `check="same"`: it runs the model before and after the edits in eval mode, on the device of its
    parameters, and demands the same outputs, as `--check same` does.

    `also_ema` is a moving average of the model, which gets the same edits in place, with the same new values: a module
    with the same tensors, or a wrapper that has it as `module`, as `AveragedModel` and timm's `ModelEmaV3` do.

    Create the optimizer afterwards, because edits may replace parameters.

    Raises RequestError, which names the wrong edit (or all lines that cannot be read), how the outputs differ, or that
    `also_ema` has other tensors, and SystemFailureError if a new module does not fit in memory. The model is then
    unchanged: its modules, parameters, values and flags.
    """
    made = edit_lines.parse_all((f"edit {number}", line) for number, line in enumerate(edits, 1))
    _check_seed(seed)
    shapes = None if input_size is None else _shapes(input_size)
    if check not in ("none", "same"):
        raise RequestError(f"unknown check {check!r}", "pass check='same' or check='none'")
    from modelcli.live import opening

    if also_ema is None:
        return opening.edit_instance(model, made, seed=seed, shapes=shapes, same=check == "same")
    return opening.edit_with_average(model, also_ema, made, seed=seed, shapes=shapes, same=check == "same")


def save(model: nn.Module, path: str | os.PathLike[str], *, like: str | os.PathLike[str], force: bool = False) -> None:
    """Write a model after training, with the record of a file that modelcli wrote.

    `model` is the model that `modelcli.load(like)` returned, or another one with the same modules; on any device, also
    in DataParallel or compiled. The reference, the edits and the seed of the record come from the file `like`; values,
    dtypes and `requires_grad` from the model. The end of `path` determines the format: `.pth`, `.safetensors`, or `/`
    for a folder. An existing `path` is replaced only with `force`.

    Raises RequestError if `like` contains no record, if the model has other tensors than the record lists, or if
    `path` exists; SystemFailureError if there is not enough space.
    """
    from modelcli.live import saving

    saving.save(model, path, Path(like), force=force)


def blueprint(
    model: nn.Module | str | os.PathLike[str],
    *,
    input_size: str | Sequence[int] | Sequence[Sequence[int]] | None = None,
    arch: str | None = None,
    key: str | None = None,
) -> Blueprint:
    """Return a model's blueprint: its modules, parameters and buffers with shapes, dtypes, flags and ties; no values.

    Takes a module, or a model reference as on the command line. A checkpoint is read without torch, and nothing in it
    is executed. `totals` of the blueprint are its sums. With `input_size` (batch included, or one shape for each
    input), its `trace` has the output shapes and multiply-accumulates of a forward pass on the meta device. The input
    of a builder, or of a checkpoint that modelcli wrote, is known without it.

    Raises RequestError, FileFormatError.
    """
    shapes = None if input_size is None else _shapes(input_size)
    if isinstance(model, str | os.PathLike):
        from modelcli.commands.look import LookRequest, look
        from modelcli.commands.target import Target

        source = Source(_reference(model), arch=arch, key=key, input_size=shapes)
        return look(LookRequest(Target(source), traced=True)).blueprint
    if arch is not None or key is not None:
        raise RequestError("arch and key are for checkpoints, and the model is a module already")
    from modelcli.live import opening

    return opening.blueprint_of(model, shapes)


def _reference(path: str | os.PathLike[str]) -> str:
    """Return a path as a model reference. A path without a folder does not mean a builder of the same name."""
    text = os.fspath(path)
    if isinstance(path, Path) and not path.is_absolute() and path.parent == Path():
        return f"./{text}"
    return text


def _shapes(given: object) -> tuple[tuple[int, ...], ...]:
    """Return one shape for each input. Raises RequestError for anything that is not a shape."""
    if isinstance(given, str):
        return (parse_input_size(given),)
    several: Sequence[object] = given if isinstance(given, Sequence) else ()
    if all(isinstance(item, int) for item in several):
        several = [several]
    shapes = tuple(tuple(shape) if isinstance(shape, Sequence) else () for shape in several)
    if not shapes or not all(shape and all(type(n) is int and n >= 0 for n in shape) for shape in shapes):
        raise RequestError(f"input_size {given!r} is not a shape", "write (1, 3, 224, 224), batch included")
    return shapes


def _check_seed(seed: int) -> None:
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise RequestError(f"seed {seed!r} is not a whole number from 0 to 2^63 - 1")
