"""Module expressions as models: `Sequential(Linear(2,3),ReLU())`, made of the classes that any provider brings."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from modelcli import providers
from modelcli.errors import RequestError
from modelcli.language.references import NamedModel, Reference
from modelcli.live import bounds, modules
from modelcli.live import providers as halves
from modelcli.live.build import Architecture
from modelcli.live.providers.base import LiveProvider
from modelcli.providers.known_code import runs_known_code
from modelcli.providers.torch_nn import WRAPPERS

if TYPE_CHECKING:
    from modelcli.live.script.source_text import SourceText


class LiveTorchNN(LiveProvider):
    """Takes every name that no provider before it knows: its errors are those of names that nothing knows."""

    def takes(self, reference: Reference) -> bool:
        """Whether it has no prefix and is no Python object."""
        return isinstance(reference, NamedModel)

    def architecture(
        self, reference: Reference, *, weights: str | None, folder: Path, trust: bool, remote_code: bool = False
    ) -> Architecture:
        """The call of a class or function. Raises RequestError with the closest names, models among them."""
        assert isinstance(reference, NamedModel)
        call = reference.call
        _require_known(reference, trust=trust)
        if weights is not None:
            raise no_weights(weights)

        def plain() -> nn.Module:
            return modules.make(call, trusted=trust)

        known = runs_known_code(reference)
        held = bounds.as_typed(str(reference)) if known else None
        return Architecture(reference, plain, plain, self, only_if_needed=known, bounds=held)

    def expression(self, text: SourceText, architecture: Architecture, folder: Path) -> str:
        """The expression itself, its classes imported."""
        assert isinstance(architecture.reference, NamedModel)
        return text.value(architecture.reference.call)

    def find_class(self, package: str, name: str) -> object:
        """A class of `torch.nn`, by any name of that package."""
        return None if package in WRAPPERS else getattr(nn, name, None)

    def find_function(self, package: str, name: str) -> Callable[..., nn.Module] | None:
        """A function of `torch.nn.utils.parametrizations` whose first argument is a module, such as `weight_norm`."""
        found = getattr(importlib.import_module(package), name, None) if package in WRAPPERS else None
        if not inspect.isfunction(found) or name.startswith("_"):
            return None
        first = next(iter(inspect.signature(found).parameters.values()), None)
        return found if first is not None and first.name == "module" else None

    def class_names(self) -> Sequence[str]:
        """Every module class of `torch.nn`."""
        return modules.classes_in(nn)

    def package_of(self, name: str) -> str | None:
        """`torch.nn`, where it has the class."""
        return "torch.nn" if hasattr(nn, name) else None

    def name_in_script(self, package: str, name: str) -> tuple[str, str]:
        """`nn.Linear`, as everybody writes it."""
        return "from torch import nn", f"{package.removeprefix('torch.') if package in WRAPPERS else 'nn'}.{name}"


def no_weights(weights: str) -> RequestError:
    """The error where a name of weights is given for what has none by name."""
    return RequestError(
        f"--weights {weights} is for {providers.with_names()}'s builders", "give a file: --weights FILE"
    )


def _require_known(reference: NamedModel, *, trust: bool) -> None:
    """Raise RequestError for a class that nothing knows, with the models that are called nearly so."""
    name = reference.call.name
    try:
        modules.find_class(name, trusted=trust)
    except RequestError as error:
        if "." in name or ":" in name:
            hints = (half.right_name(reference.call) for half in halves.built_in())
            error.hint = next((hint for hint in hints if hint is not None), error.hint)
            raise
        near = nearest_names(name)
        hint = f"did you mean {' or '.join(near)}? modelcli list shows them all" if near else error.hint
        raise RequestError(f"no model is called {name!r}: no builder, no class of torch.nn", hint) from None


def nearest_names(word: str) -> list[str]:
    """The models of built-in providers whose names come near a word, or contain it."""
    from modelcli.errors import closest

    names = [name for half in halves.built_in() for name in half.names()]
    return closest(word, names) or [name for name in names if word.lower() in name][:4]
