"""From a reference to an architecture: what to construct, for real or on the meta device."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from modelcli.errors import RequestError, UnsafeError
from modelcli.language import references
from modelcli.language.expressions import Call
from modelcli.language.quoting import quoted
from modelcli.language.references import CheckpointFile, NamedModel, PythonObject
from modelcli.live import bounds, downloads, memory, modules, python_objects, zoo
from modelcli.live.bounds import Bounds
from modelcli.live.meta_models import build_on_meta, meta_twin, seeded
from modelcli.live.sources import Lazy, tag_drawn
from modelcli.live.walking import require_methods
from modelcli.providers import known_code


@dataclass(frozen=True)
class Architecture:
    """A model that can be constructed. `weights` is the resolved name of torchvision's weights, if any.

    `construct` is the plain constructor, with those weights; `without_weights` gives the same structure and neither
    downloads nor loads. `instance` is set where the reference names a module that exists already. `bounds` are what
    building may take. Relative paths in its arguments are seen from `folder`. `loads` are the calls by which the
    constructor was seen to load weights itself.
    """

    reference: references.Reference
    construct: Callable[[], nn.Module]
    without_weights: Callable[[], nn.Module]
    weights: str | None = None
    builder: str | None = None
    instance: nn.Module | None = None
    is_torch_class: bool = False
    bounds: Bounds | None = None
    folder: Path = Path()
    loads: list[str] = field(default_factory=list, compare=False)

    def on_meta(self, seed: int) -> nn.Module:
        """The architecture on the meta device; its numbers are those that `real(seed)` gives, when asked for."""
        if self.instance is not None:
            return meta_twin(require_methods(self.instance), keep_values=True)
        module = build_on_meta(self.without_weights, only_if_needed=self.is_torch_class, bounds=self.bounds)
        needed = memory.bytes_of(module)  # what a storage holds is never collected where the storage is in it
        tag_drawn(module, Lazy(lambda: self.real(seed, needed=needed)))
        return module

    def real(self, seed: int, *, needed: int = 0, weights: bool = True) -> nn.Module:
        """The plain constructor's module, as after `torch.manual_seed(seed)`; without `weights`, nothing is downloaded.

        Raises SystemFailureError before anything is allocated where `needed` bytes are not to be had.
        """
        memory.require(needed, str(self.reference))
        if self.instance is not None:
            return copy.deepcopy(self.instance)
        with seeded(seed), downloads.loads_noted() as loads:
            module = self.construct() if weights else self.without_weights()
        self.loads.extend(loads)
        return module


def architecture(
    reference: references.Reference, *, weights: str | None, folder: Path, trust: bool = True
) -> Architecture:
    """What a reference names, checked as far as that costs nothing.

    Raises RequestError for names that do not exist and arguments that do not fit, UnsafeError where following it
    would run code and `trust` is not given.
    """
    match reference:
        case NamedModel(call=call):
            if call.name in zoo.builder_names():
                return _builder(reference, weights, trust)
            return _expression(reference, weights, trust)
        case PythonObject():
            if not trust:
                raise UnsafeError(
                    f"the checkpoint names {reference.told_from(Path())}, and to follow that runs its code",
                    "--trust (trust=True in Python) follows it; --arch names the whole architecture instead, with all "
                    "that was edited",
                )
            if weights is not None:
                raise RequestError(f"--weights {weights} is for torchvision's builders", "give a file: --weights FILE")
            return _python_object(reference, folder)
        case CheckpointFile():
            raise RequestError(
                f"{reference} is a checkpoint, not an architecture", "--arch takes alexnet or nets.py:Net"
            )


def _builder(reference: NamedModel, weights: str | None, trust: bool) -> Architecture:
    call = reference.call
    if call.has_hole:
        raise RequestError(f"{call}: _ stands for what was there before, and nothing was", "write the argument out")
    values = {key: modules.value_of(value, trusted=trust) for key, value in call.kwargs.items()}
    kwargs = zoo.arguments(call.name, call.args, values, weights)
    build, signature = zoo.constructor(call.name), zoo.signature(call.name)
    modules.check_flags({taken.name: taken for taken in zoo.parameters_of(call.name)}, values, str(reference))

    def plain() -> nn.Module:
        try:
            return modules.construct(build, [], kwargs, str(reference), signature)
        except modules.ConstructorError as error:
            if kwargs["weights"] is not None and isinstance(error.error, ValueError) and call.kwargs:
                error.hint = (
                    f"{kwargs['weights']} fits {call.name} as it is: "
                    f"-m {call.name} --weights {quoted(kwargs['weights'])}, and replace what is to have another size"
                )
            raise

    def without_weights() -> nn.Module:
        with zoo.architecture_only():
            return plain()

    held = bounds.as_typed(str(reference)) if known_code.runs_known_code(reference) else None
    return Architecture(reference, plain, without_weights, kwargs["weights"], builder=call.name, bounds=held)


def _expression(reference: NamedModel, weights: str | None, trust: bool) -> Architecture:
    call = reference.call
    try:
        modules.find_class(call.name, trusted=trust)
    except RequestError as error:
        near = zoo.nearest_names(call.name)
        if "." in call.name or ":" in call.name:
            error.hint = _by_its_name(call) or error.hint
            raise
        hint = f"did you mean {' or '.join(near)}? modelcli list shows them all" if near else error.hint
        raise RequestError(f"no model is called {call.name!r}: no builder, no class of torch.nn", hint) from None
    if weights is not None:
        raise RequestError(f"--weights {weights} is for torchvision's builders", "give a file: --weights FILE")

    def plain() -> nn.Module:
        return modules.make(call, trusted=trust)

    installed = known_code.runs_known_code(reference)
    held = bounds.as_typed(str(reference)) if installed else None
    return Architecture(reference, plain, plain, is_torch_class=installed, bounds=held)


def _by_its_name(call: Call) -> str | None:
    """A model of torchvision's by its name alone, where it was named as Python does: `torchvision.models.resnet18`."""
    package, _, name = call.name.rpartition(".")
    if package.split(".")[0] not in ("torchvision", "models") or name not in zoo.builder_names():
        return None
    return f"torchvision's models go by their names: {NamedModel(replace(call, name=name))}"


def _python_object(reference: PythonObject, folder: Path) -> Architecture:
    value = python_objects.find(reference, folder)
    text = str(reference)
    if isinstance(value, nn.Module) and reference.call is None:
        return Architecture(reference, lambda: value, lambda: value, instance=value)
    if not callable(value) or (reference.call is None and isinstance(value, nn.Module)):
        what = (
            f"the Python module {value.__name__}"
            if isinstance(value, ModuleType)
            else f"of type {type(value).__name__}"
        )
        raise RequestError(f"{text} is {what}, not an nn.Module, its class, or a function that returns one")
    call = reference.call or Call(reference.name)
    if call.has_hole:
        raise RequestError(f"{call}: _ stands for what was there before, and nothing was", "write the argument out")
    args = [modules.value_of(item, trusted=True) for item in call.args]
    kwargs = {key: modules.value_of(item, trusted=True) for key, item in call.kwargs.items()}
    modules.check_arguments(value, args, kwargs, text)

    home = folder.resolve()  # the current folder may be another when it is built
    imported_from = reference.file.parent.resolve() if reference.file else home

    def plain() -> nn.Module:
        with python_objects.running_user_code(text, imported_from), contextlib.chdir(home):
            return modules.construct(value, args, kwargs, text)

    return Architecture(reference, plain, plain, folder=home)


class Bare(nn.Module):
    """A module of a checkpoint without an architecture: it has a path and tensors, and no known type.

    `origin` is its path in the file, wherever edits have moved it; None for one that stands for none there. `version`
    is that of the class that a new module had before its keys were renamed: its state dict says it.
    """

    def __init__(self, origin: str | None = None) -> None:
        super().__init__()
        self.origin = origin
        self.version: int | None = None

    def forward(self, *_args: Any) -> torch.Tensor:
        raise NotImplementedError("a checkpoint without an architecture cannot run")
