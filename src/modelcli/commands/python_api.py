"""The Python API: what `import modelcli` gives."""

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

    Takes the path of a checkpoint (or any other model reference). A checkpoint that modelcli wrote says which model
    it is; for others `arch` names the architecture, as a reference or as an `nn.Module`, which is filled in place.
    `weights` is the name of pretrained weights or a file, for a reference that is no checkpoint; `key` the state dict
    inside a training checkpoint. `seed` decides the values of what has no weights. `trust` follows a record that names
    Python code of its own; `tensors_only` takes the tensors of a file that holds more than these.

    Tied parameters are one `Parameter` again; non-persistent buffers and plain tensor attributes are what the
    constructor makes them. The caller's random generator is left as it was.

    Raises AnswerNoError where the checkpoint does not fit (with `strict=False` only where shapes differ),
    RequestError, UnsafeError, FileFormatError.
    """
    from modelcli.live import opening

    text = _reference(path)
    _check_seed(seed)
    reference = arch if isinstance(arch, str) else None
    source = Source(text, weights, reference, key, seed, trust=trust, tensors_only=tensors_only, strict=strict)
    if arch is None or isinstance(arch, str):
        return opening.open_real(source)[0]
    return opening.with_arch_instance(source, arch)[0]


def apply(
    model: nn.Module,
    *edits: str | Edit,
    seed: int = 0,
    input_size: str | Sequence[int] | Sequence[Sequence[int]] | None = None,
) -> nn.Module:
    """Carry out edits on a model, in place: all of them, or none where one is wrong.

    An edit is a line of text, as on the command line, or a dataclass of `modelcli.edits`::

        modelcli.apply(model, "replace classifier.6 Linear(_,10)", Freeze(targets=("features",)))

    Gives the model back, which is another object after `extract`: the submodule. Edit number i draws what
    `torch.manual_seed(seed * 1000003 + i)` and the plain constructor draw; the caller's random generator is left as
    it was. `input_size` is the shape of the input, batch included, or one shape for each input; a `_` may need it
    that the module which was there does not answer. Nothing is run to check that the edited model still fits.

    An optimizer knows the parameters that a model had: make it afterwards.

    Raises RequestError that names the edit and what is wrong with it (of lines that cannot be read, all at once),
    SystemFailureError where a new module does not fit in memory. The model is then as it was: its modules, its
    parameters, their values and flags.
    """
    made = edit_lines.parse_all((f"edit {number}", line) for number, line in enumerate(edits, 1))
    _check_seed(seed)
    shapes = None if input_size is None else _shapes(input_size)
    from modelcli.live import opening

    return opening.edit_instance(model, made, seed=seed, shapes=shapes)


def save(model: nn.Module, path: str | os.PathLike[str], *, like: str | os.PathLike[str], force: bool = False) -> None:
    """Write a model with the record of a file that modelcli wrote: what training changes are values and flags.

    `model` is what `modelcli.load(like)` gave, trained since, or another of the same modules; on any device, in
    DataParallel or compiled as well. `like` is the file whose record goes along: the reference, the edits, the seed.
    Values, dtypes and `requires_grad` are those of the model. How `path` ends says the format: `.pth`, `.safetensors`,
    or `/` for a folder. With `force` it may exist.

    Raises RequestError where `like` carries no record, where the model has other tensors than it lists, and where
    `path` exists; SystemFailureError where there is no room.
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
    """What a model is made of: its modules, parameters and buffers with shapes, dtypes, flags and ties; no numbers.

    Takes a module, or a model reference as on the command line: a checkpoint is looked at without torch, and nothing
    in it is executed. `totals` of what comes back is what it adds up to. With `input_size` (batch included, or one
    shape for each input) its `trace` says what a forward pass on the meta device gives: output shapes,
    multiply-accumulates. A builder knows its own input, and so does a checkpoint that modelcli wrote.

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
    """A path as a model reference: one without a folder is no builder's name."""
    text = os.fspath(path)
    if isinstance(path, Path) and not path.is_absolute() and path.parent == Path():
        return f"./{text}"
    return text


def _shapes(given: object) -> tuple[tuple[int, ...], ...]:
    """One shape for each input. Raises RequestError for what is none."""
    if isinstance(given, str):
        return (parse_input_size(given),)
    several: Sequence[object] = given if isinstance(given, Sequence) else ()
    if all(isinstance(item, int) for item in several):
        several = [several]
    shapes = tuple(tuple(shape) if isinstance(shape, Sequence) else () for shape in several)
    if not shapes or not all(shape and all(type(n) is int and n >= 0 for n in shape) for shape in shapes):
        raise RequestError(f"input_size {given!r} is no shape", "write (1, 3, 224, 224), batch included")
    return shapes


def _check_seed(seed: int) -> None:
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise RequestError(f"seed {seed!r} is not a whole number from 0 to 2^63 - 1")
