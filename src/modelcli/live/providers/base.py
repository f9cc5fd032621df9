"""What the torch half of a provider does: build its models, know what they take, and say how a script builds them."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import nn

from modelcli import installed
from modelcli.errors import RequestError, did_you_mean
from modelcli.language.quoting import quoted
from modelcli.language.references import NamedModel, Reference
from modelcli.live import bounds, modules
from modelcli.live.build import Architecture
from modelcli.providers.base import Provider
from modelcli.providers.known_code import runs_known_code
from modelcli.providers.published import PublishedModel

if TYPE_CHECKING:
    from modelcli.checkpoints.plan import Source
    from modelcli.language.expressions import Call
    from modelcli.live.inputs import Inputs
    from modelcli.live.loading import StateDict
    from modelcli.live.mult_adds import Formula
    from modelcli.live.script.source_text import SourceText


#: Where the channels of a tensor lie that has more than two axes: second, as convolutions have them, or last, as
#: linear layers and layer norms have their features.
Layout = Literal["channels first", "features last"]


@dataclass(frozen=True)
class FittedStateDict:
    """A state dict as a provider's library would load it.

    Attributes:
        state: the tensors under the keys of the model.
        notes: what the user should know of the changes.
        optional: the keys that a file may leave out, because the library computes their values itself.
    """

    state: StateDict
    notes: tuple[str, ...] = ()
    optional: frozenset[str] = frozenset()


@dataclass(frozen=True)
class ModelFolder:
    """A model as its library keeps it in a folder.

    Attributes:
        tensors: the state dict under the keys of the library's files, with the sources of the bytes.
        companions: the files beside the weights: the configuration, and what is copied from the model's own folder.
        notes: what the configuration cannot say, and what else the user should know.
    """

    tensors: Mapping[str, torch.Tensor]
    companions: Mapping[str, Source]
    notes: tuple[str, ...] = ()


class LiveProvider:
    """Builds the models of one provider. A subclass overrides `build`, and of the rest what its library has.

    The library is imported when it is first needed, and never by importing this module.
    """

    #: The libraries of compiled operators whose names say whether they multiply; those of others count as unknown.
    operator_libraries: ClassVar[frozenset[str]] = frozenset()

    #: What layers of the library are, by the names of their classes, whose tensors mean the same as those of a kind of
    #: `torch.nn`: see `live.surgery.layouts`. By it values are carried over to another class of the kind.
    layer_kinds: ClassVar[Mapping[str, str]] = {}

    def __init__(self, provider: Provider) -> None:
        self.provider = provider

    # --- its models --------------------------------------------------------------------------------------------------

    def names(self) -> Sequence[str]:
        """The names of its models, as the library itself gives them."""
        return self.provider.names()

    def published(self, name: str) -> PublishedModel:
        """What the library publishes of a model; nothing is built or downloaded for it."""
        return PublishedModel(name)

    def variants(self, name: str) -> list[str]:
        """A model and it with those arguments that its published weights may have been made with: `identify` tries all.

        Each is a name with its arguments, without the prefix.
        """
        return [name]

    def takes(self, reference: Reference) -> bool:
        """Whether a reference without a prefix is for this provider; only built-in ones are asked."""
        return False

    def prepare(self) -> None:
        """Import the library, where that takes longer than building one of its models may take."""

    def require_installed(self) -> None:
        """Raise RequestError where a library of the provider is not installed, with the command that installs it."""
        missing = [package for package in self.provider.packages if installed.folder(package) is None]
        if missing:
            extra = self.provider.extra
            wanted = "pip install " + (quoted(f"modelcli[{extra}]") if extra is not None else " ".join(missing))
            raise RequestError(f"{missing[0]} is not installed, and {self.provider.title or 'this'} needs it", wanted)

    def build(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], weights: str | None) -> nn.Module:
        """Make a model on the current device, on `meta` too where that does.

        Args:
            name: one of `names`.
            args: the positional arguments of the reference, as Python values.
            kwargs: its keyword arguments.
            weights: the name of pretrained weights to load, which may be downloaded; None draws the values at random,
                from torch's generator alone.

        Raises RequestError, or any exception of the library's, which becomes a RequestError.
        """
        raise NotImplementedError

    def build_structure(
        self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], weights: str | None
    ) -> nn.Module:
        """The structure that the model has with these weights; nothing is loaded or downloaded."""
        return self.build(name, args, kwargs, None)

    def weights_named(self, name: str, weights: str, kwargs: Mapping[str, Any]) -> str:
        """The name of a model's weights with `DEFAULT` resolved. Raises RequestError for weights it does not have."""
        names = self.published(name).weights
        if not names:
            raise RequestError(f"{self.reference_to(name)} has no weights by name", "give a file: --weights FILE")
        if weights == "DEFAULT":
            return names[0]
        if weights not in names:
            known = ["DEFAULT", *names]
            hint = f"{did_you_mean(weights, known) or ''} it has {', '.join(known)}".strip()
            raise RequestError(f"{self.reference_to(name)} has no weights {weights!r}", hint)
        return weights

    def parameters(self, name: str) -> Mapping[str, inspect.Parameter]:
        """The arguments that a model takes, by their names, so that wrong ones are told before it is built."""
        return {}

    def architecture(self, reference: Reference, *, weights: str | None, folder: Path, trust: bool) -> Architecture:
        """What a reference names, checked as far as that costs nothing.

        Args:
            reference: the model, of this provider.
            weights: a name of pretrained weights, or None.
            folder: what relative paths in its arguments are seen from.
            trust: whether code may run that no known library vouches for.

        Raises RequestError for names that do not exist and arguments that do not fit, UnsafeError where following the
        reference would run code and `trust` is not given.
        """
        assert isinstance(reference, NamedModel)
        call, text = reference.call, str(reference)
        refuse_hole(reference)
        if not trust and not runs_known_code(reference):
            raise modules.untrusted(text)
        self._require_name(call.name)
        args = [modules.value_of(value, trusted=trust) for value in call.args]
        kwargs = {key: modules.value_of(value, trusted=trust) for key, value in call.kwargs.items()}
        taken = self.parameters(call.name)
        modules.check_flags(taken, kwargs, text)
        named = None if weights is None else self.weights_named(call.name, weights, kwargs)
        signature = f"{call.name}({', '.join(map(_shown, taken.values()))})" if taken else None

        def made(build: Callable[..., nn.Module]) -> Callable[[], nn.Module]:
            def make(*args: Any, **kwargs: Any) -> nn.Module:
                return build(call.name, args, kwargs, named)

            return lambda: modules.construct(make, args, kwargs, text, signature)

        return Architecture(
            reference,
            made(self.build),
            made(self.build_structure),
            self,
            weights=named,
            pretrained=bool(self.published(call.name).weights),
            bounds=bounds.as_typed(text) if runs_known_code(reference) else None,
        )

    def _require_name(self, name: str) -> None:
        if name not in (names := self.names()):
            hint = did_you_mean(name, names) or f"modelcli list '{self.provider.prefix}:*' shows them all"
            raise RequestError(f"{self.provider.name} has no model {name!r}", hint)

    def reference_to(self, name: str) -> str:
        """The reference to a model, which has the prefix: `timm:resnet50`."""
        return name if self.provider.prefix is None else f"{self.provider.prefix}:{name}"

    def fit_state_dict(self, architecture: Architecture, module: nn.Module, state: StateDict) -> FittedStateDict:
        """Give the tensors of a checkpoint the keys and shapes of a model, as the library does while it loads.

        Args:
            architecture: the model, of this provider.
            module: it as it was built, on the meta device or with values.
            state: the state dict of a checkpoint, on the meta device or with values, as `module` is.

        Returns:
            The state dict to load. A tensor on the meta device keeps its source, or gets one that computes it.

        Raises AnswerNoError where the library cannot convert the checkpoint.
        """
        return FittedStateDict(state)

    def model_folder(self, architecture: Architecture, module: nn.Module) -> ModelFolder | None:
        """The folder that the library's own loader takes for this model; None where it has no such form.

        Args:
            architecture: the model as it was opened.
            module: it with its edits, on the meta device.

        Raises RequestError for an edit after which no such folder can be written.
        """
        return None

    def landmarks(self, module: nn.Module) -> Mapping[str, Sequence[str]]:
        """The paths of the modules that the library calls the classifier (`head`) and the first layer (`stem`).

        A model may have several of each, such as auxiliary classifiers. `@head` and `@stem` select them.

        Args:
            module: any model. Edits may have changed it.

        Returns:
            The paths by `head` and `stem`. It is empty for a model of another library, and a word is left out where the
            library does not say. A path that the model no longer has does no harm.
        """
        return {}

    def recorded_reference(self, architecture: Architecture) -> str:
        """The reference that a record in a written file names: one that needs no other file."""
        return str(architecture.reference)

    def before_pass(self, module: nn.Module) -> None:
        """Prepare a copy of any model for a forward pass without values. It is dropped after the pass."""

    def during_pass(self, device: str) -> AbstractContextManager[None]:
        """What surrounds a forward pass of any model. `device` is `meta`, `fake`, or `cpu`, which alone has values."""
        return contextlib.nullcontext()

    # --- what flows in, and what is counted --------------------------------------------------------------------------

    def inputs(self, architecture: Architecture, module: nn.Module) -> Inputs | None:
        """What a model is known to take, batch included: `module` is it as it was built, or as edits have left it."""
        return None

    def layout_behind(self, module: nn.Module, axes: int) -> Layout | None:
        """Where the channels lie of a tensor with so many axes behind a layer of the library; None if it tells nothing.

        By it `_` in an expression knows whether the last axis of an image is its features.
        """
        return None

    def formulas(self) -> Mapping[str, Formula]:
        """The multiply-accumulates of the library's own operators, by their names: `library::operator`."""
        return {}

    # --- downloads ---------------------------------------------------------------------------------------------------

    def downloads(self) -> Iterable[tuple[Any, str]]:
        """The functions of the library that fetch something, each as what holds it and its name there.

        Called while a model is only looked at, they raise DownloadError. torch.hub, urllib and the network itself are
        closed then already, and the library need not be imported for this.
        """
        return ()

    # --- scripts -----------------------------------------------------------------------------------------------------

    def expression(self, text: SourceText, architecture: Architecture, folder: Path) -> str:
        """The Python expression that builds the model in a script; what it needs is imported on the text.

        Args:
            text: the script, for its imports and the words of values.
            architecture: the model, of this provider.
            folder: what relative paths of the reference are seen from.

        Raises InexpressibleError where plain Python statements do not do it; its text says why.
        """
        from modelcli.live.script.source_text import InexpressibleError

        raise InexpressibleError(f"{self.provider.name} does not say how a script builds its models")

    # --- module classes ----------------------------------------------------------------------------------------------

    def find_class(self, package: str, name: str) -> object:
        """What a name in one of the packages that the provider owns stands for, or None.

        `package` is empty for a bare name, which is asked for where the provider declares `classes_from`.
        """
        import importlib

        return getattr(importlib.import_module(package), name, None) if package else None

    def find_function(self, package: str, name: str) -> Callable[..., nn.Module] | None:
        """The function of that name which returns a module and may stand in an expression as a class may, or None.

        It draws its values, and downloads nothing.
        """
        return None

    def class_names(self) -> Sequence[str]:
        """The module classes that expressions may name by their bare names."""
        return ()

    def package_of(self, name: str) -> str | None:
        """The package that a class lies in which goes by its bare name, as an import names it; None if it has none."""
        return None

    def places_of(self, name: str) -> Sequence[str]:
        """Where else the library has classes of this name, as an expression writes them, for a hint."""
        return ()

    def right_name(self, call: Call) -> str | None:
        """How a model is written that was named as Python does, for a hint: `package.models.resnet18`."""
        return None

    def name_in_script(self, package: str, name: str) -> tuple[str, str]:
        """The import that a script needs for a class in one of the provider's packages, and its name behind it."""
        return f"import {package}", f"{package}.{name}"

    def arguments_in_script(self, package: str, name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments of a call in an expression as plain Python has to give them."""
        return kwargs


def _shown(parameter: inspect.Parameter) -> str:
    """An argument as its source has it, also where annotations are kept as text."""
    plain = str(parameter.replace(annotation=parameter.empty))
    if not isinstance(parameter.annotation, str):
        return str(parameter)
    name, equals, default = plain.partition("=")
    return f"{name}: {parameter.annotation}{f' = {default}' if equals else ''}"


def refuse_hole(reference: NamedModel) -> None:
    """Raise RequestError where `_` stands in a reference: there was nothing before that it could stand for."""
    if reference.call.has_hole:
        raise RequestError(
            f"{reference.call}: _ keeps an old argument, but there is no old module", "write the argument out"
        )
