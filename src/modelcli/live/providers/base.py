"""The base class of a provider's torch half: it builds models, knows their inputs, and writes them in scripts."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import nn

from modelcli.errors import RequestError, did_you_mean
from modelcli.language.references import NamedModel, Reference
from modelcli.live import bounds, modules
from modelcli.live.build import Architecture
from modelcli.providers.base import Provider
from modelcli.providers.known_code import runs_known_code
from modelcli.providers.published import PublishedModel

if TYPE_CHECKING:
    from modelcli.checkpoints import Contents
    from modelcli.checkpoints.plan import Source
    from modelcli.language.expressions import Call
    from modelcli.live.inputs import Inputs
    from modelcli.live.loading import StateDict
    from modelcli.live.mult_adds import Formula
    from modelcli.live.resizing import Resizing
    from modelcli.live.script.source_text import SourceText


#: The axis of the channels in a tensor with more than two axes: the second, as in convolutions, or the last, as in
#: linear layers and layer norms.
Layout = Literal["channels first", "features last"]


@dataclass(frozen=True)
class FittedStateDict:
    """A state dict as a provider's library would load it.

    Attributes:
        state: the tensors under the keys of the model.
        notes: what the user should know of the changes.
        optional: the keys that a file may leave out, because the library computes their values itself.
        left_out: the keys of the model whose values the library leaves to be drawn, though the file has some for them.
    """

    state: StateDict
    notes: tuple[str, ...] = ()
    optional: frozenset[str] = frozenset()
    left_out: frozenset[str] = frozenset()


@dataclass(frozen=True)
class ModelFolder:
    """A model as its library keeps it in a folder.

    Attributes:
        tensors: the state dict under the keys of the library's files, with the sources of the bytes.
        companions: the files beside the weights: the configuration, and what is copied from the model's own folder.
        notes: what the configuration cannot say, and what else the user should know.
        whole_for: the name of the library where it reads all weights from one file, and knows no shards; else empty.
    """

    tensors: Mapping[str, torch.Tensor]
    companions: Mapping[str, Source]
    notes: tuple[str, ...] = ()
    whole_for: str = ""


@dataclass(frozen=True)
class ClassLayer:
    """A layer whose width depends on the number of classes.

    Attributes:
        path: its path in the model.
        outputs: how many outputs it gets.
        weight: the scheme of `init` that its library draws the weight by; None for that of the layer's own class.
        bias: the scheme for its bias; None for that of the layer's own class.
    """

    path: str
    outputs: int
    weight: str | None = None
    bias: str | None = None


@dataclass(frozen=True)
class ClassLayers:
    """What decides the number of classes of a model, where it is more than the width of its classifier.

    Attributes:
        before: the number of classes that the model has.
        layers: the layers that are replaced.
        settings: a path, the name of an attribute, and its new value.
    """

    before: int
    layers: tuple[ClassLayer, ...]
    settings: tuple[tuple[str, str, int], ...] = ()


class LiveProvider:
    """Builds the models of one provider. A subclass overrides `build`, and other methods as its library needs.

    The library is imported when it is first needed, not when this module is imported.
    """

    #: The libraries whose operators' names show whether they multiply; other operators are reported as uncounted.
    operator_libraries: ClassVar[frozenset[str]] = frozenset()

    #: The kind of the library's layers, by class name, if their tensors mean the same as those of a kind of `torch.nn`
    #: (see `live.surgery.layouts`). `--keep-weights` copies values between classes of one kind.
    layer_kinds: ClassVar[Mapping[str, str]] = {}

    #: The library's classes whose `forward` is that of a BatchNorm in eval mode, by full name, and the children that it
    #: calls behind the normalisation, in order. `fuse` folds these and leaves the children.
    batch_norms: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    def __init__(self, provider: Provider) -> None:
        self.provider = provider

    # --- its models --------------------------------------------------------------------------------------------------

    def names(self) -> Sequence[str]:
        """Return the names of its models, as the library lists them."""
        return self.provider.names()

    def published(self, name: str) -> PublishedModel:
        """Return what the library publishes about a model. Nothing is built or downloaded."""
        return PublishedModel(name)

    def variants(self, name: str) -> list[str]:
        """Return a model without and with the arguments of its published weights; `identify` tries all of them.

        Each is a name with its arguments, without the prefix.
        """
        return [name]

    def takes(self, reference: Reference) -> bool:
        """Whether a reference without a prefix belongs to this provider. Only built-in providers are asked."""
        return False

    def prepare(self) -> None:
        """Import the library, so that the import does not count against the time limit of a build."""

    def require_installed(self) -> None:
        """Raise RequestError where a library of the provider is not installed, with the command that installs it."""
        if missing := self.provider.missing_packages:
            raise RequestError(
                f"{missing[0]} is not installed, and {self.provider.title or 'this'} needs it",
                self.provider.install_command,
            )

    def build(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], weights: str | None) -> nn.Module:
        """Build a model on the current device, which may be `meta`.

        Args:
            name: one of `names`.
            args: the positional arguments of the reference, as Python values.
            kwargs: its keyword arguments.
            weights: the name of pretrained weights to load, which may be downloaded; None draws random values with
                torch's generator.

        Raises RequestError. Other exceptions of the library become a RequestError.
        """
        raise NotImplementedError

    def build_structure(
        self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], weights: str | None
    ) -> nn.Module:
        """Build the model as it is with these weights, without loading or downloading them."""
        return self.build(name, args, kwargs, None)

    def weights_named(self, name: str, weights: str, kwargs: Mapping[str, Any]) -> str:
        """Return the name of a model's weights with `DEFAULT` resolved. Raises RequestError for unknown weights."""
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
        """Return the arguments that a model takes, by name, so that wrong ones are reported before building it."""
        return {}

    def architecture(
        self, reference: Reference, *, weights: str | None, folder: Path, trust: bool, remote_code: bool = False
    ) -> Architecture:
        """Return the architecture of a reference, checked as far as possible without building it.

        Args:
            reference: the model, of this provider.
            weights: a name of pretrained weights, or None.
            folder: relative paths in its arguments are relative to this folder.
                trust: whether code outside known libraries may run.

        Raises RequestError for unknown names and wrong arguments, UnsafeError if following the reference would run code
        and `trust` is not given.
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
        """Return the reference to a model, with the prefix: `timm:resnet50`."""
        return name if self.provider.prefix is None else f"{self.provider.prefix}:{name}"

    def remote_contents(self, reference: NamedModel, folder: Path) -> Contents | None:
        """What the weights of a model contain that is on another machine, by their headers; None for any other model.

        Args:
            reference: the model, pinned: see `Provider.pinned`.
            folder: what relative paths in it are seen from.
        """
        return None

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

    def model_folder(self, architecture: Architecture, module: nn.Module, folder: Path | None) -> ModelFolder | None:
        """The folder that the library's own loader takes for this model; None where it has no such form.

        Args:
            architecture: the model as it was opened.
            module: it with its edits, on the meta device.
            folder: the folder of the library's model that it was opened from, whose other files are copied, if any.

        Raises RequestError for an edit after which no such folder can be written.
        """
        return None

    @property
    def has_descriptions(self) -> bool:
        """Whether its models say of themselves what they are: see `describe_edits`."""
        return type(self).describe_edits is not LiveProvider.describe_edits

    def describe_edits(self, architecture: Architecture, module: nn.Module) -> None:
        """Make an edited model say of itself what it is now, where it carries a configuration; nothing by default.

        Args:
            architecture: the model as it was opened.
            module: it with its edits and its values, which is changed in place.
        """

    def script_of_edits(self, text: SourceText, architecture: Architecture, module: nn.Module) -> list[str]:
        """Return the statements that do to `model` in a script what `describe_edits` does; nothing by default.

        Args:
            text: the script, for its imports and the words of values.
            architecture: the model as it was opened.
            module: it with its edits, on the meta device.
        """
        return []

    def after_loading(self, architecture: Architecture, module: nn.Module) -> None:
        """Do to a model what the library's own loader does besides giving it the values of a file; nothing by default.

        Args:
            architecture: the model as it was opened.
            module: it with its edits and the values of a file, which is changed in place. `describe_edits` was called.
        """

    def dtypes_of_unsaved(self, architecture: Architecture, module: nn.Module) -> Mapping[str, str]:
        """The dtypes in which `after_loading` leaves buffers outside the state dict, by their names; none by default.

        It is asked about a model whose dtypes an edit has changed, so it may build the model anew. A name that is left
        out keeps the dtype that it has, and one that the model no longer has does no harm.

        Args:
            architecture: the model as it was opened.
            module: it with its edits, on the meta device.
        """
        return {}

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

    def class_layers(self, module: nn.Module, number: int) -> ClassLayers | None:
        """What gives a model another number of classes, where the width of `head` alone does not.

        Args:
            module: any model. Edits may have changed it.
            number: the wanted number of classes.

        Returns:
            The layers and settings; None for other models.
        """
        return None

    def outputs_beyond_classes(self, module: nn.Module) -> int:
        """How many outputs the classifier (`head`) has beyond one for each class: 1 where one is for none of them.

        Args:
            module: a model of which `landmarks` names the classifier.
        """
        return 0

    def resizing(self, module: nn.Module, what: str, size: int) -> Resizing | None:
        """How the library gives a model another size, and carries its values over.

        Args:
            module: any model. Edits may have changed it.
            what: `image_size`, `in_channels` or `vocab_size`.
            size: the new size.

        Returns:
            How; None for a model of another library, and where the library has no way.

        Raises RequestError for a size that the model cannot have.
        """
        return None

    def why_not_resized(self, module: nn.Module, what: str, size: int) -> str | None:
        """Why the library cannot give a model another size, as a sentence; None where it does not say.

        Args: as `resizing` has them. It is asked only where `resizing` knows no way, so it may build the model anew.
        """
        return None

    def recorded_reference(self, architecture: Architecture) -> str:
        """The reference that a record in a written file names: one that needs no other file."""
        return str(architecture.reference)

    def before_pass(self, module: nn.Module) -> None:
        """Prepare a copy of any model for a forward pass without values. It is dropped after the pass."""

    def during_pass(self, module: nn.Module, device: str) -> AbstractContextManager[None]:
        """Return a context for each forward pass of any model.

        Args:
            module: the model that makes the pass. A model of another library gets a context that does nothing.
            device: `meta`, `fake` or `cpu`; only `cpu` has values.
        """
        return contextlib.nullcontext()

    # --- inputs and multiply-accumulates -----------------------------------------------------------------------------

    def inputs(self, architecture: Architecture, module: nn.Module) -> Inputs | None:
        """Return the known inputs of a model, batch included. `module` is the model as built or as edited."""
        return None

    def further_inputs(self, module: nn.Module) -> Collection[str] | None:
        """Return the names of inputs that a model takes by the `**kwargs` of its `forward`; None if it may be any name.

        `module` is any model. Edits may have changed it.
        """
        return None

    def layout_behind(self, module: nn.Module, axes: int) -> Layout | None:
        """Return the axis of the channels after a layer of the library, for a tensor with `axes` axes; None if unknown.

        `_` in an expression uses it to decide whether the last axis of an image is its features.
        """
        return None

    def formulas(self) -> Mapping[str, Formula]:
        """Return the multiply-accumulate formulas of the library's own operators, by name: `library::operator`."""
        return {}

    # --- downloads ---------------------------------------------------------------------------------------------------

    def downloads(self) -> Iterable[tuple[Any, str]]:
        """Return the functions of the library that download, each as the object that has it and its name there.

        While a model is only shown, these functions raise DownloadError. torch.hub, urllib and sockets are blocked too,
        and the library need not be imported for this.
        """
        return ()

    # --- scripts -----------------------------------------------------------------------------------------------------

    def expression(self, text: SourceText, architecture: Architecture, folder: Path) -> str:
        """Return the Python expression that builds the model in a script, and add the imports to the script.

        Args:
            text: the script, which gets the imports and writes values.
            architecture: the model, of this provider.
            folder: relative paths of the reference are relative to this folder.

        Raises InexpressibleError if plain Python statements cannot build it; its text says why.
        """
        from modelcli.live.script.source_text import InexpressibleError

        raise InexpressibleError(f"{self.provider.name} does not say how a script builds its models")

    def expression_with_weights(
        self, text: SourceText, architecture: Architecture, module: nn.Module, folder: Path
    ) -> str | None:
        """The Python expression that loads a model with the weights of its own folder, as the library does.

        None where the library has no such call: then the script builds the model and loads its state dict.

        Args:
            text: the script, for its imports and the words of values.
            architecture: the model, of this provider.
            module: it as it was opened, on the meta device.
            folder: the folder with its files, as the script sees it.
        """
        return None

    def expression_with_file(self, text: SourceText, architecture: Architecture, contents: Contents) -> str | None:
        """The Python expression that loads a model with the checkpoint in a file, which its library adapts to it.

        None where the checkpoint fits as it is: then the script builds the model and loads its state dict.

        Args:
            text: the script, for its imports and the words of values.
            architecture: the model, of this provider.
            contents: the checkpoint.

        Raises InexpressibleError where the library has no such call; its text says why.
        """
        return None

    # --- module classes ----------------------------------------------------------------------------------------------

    def find_class(self, package: str, name: str) -> object:
        """Return the object with this name in one of the provider's packages, or None.

        `package` is empty for a bare name, if the provider declares `classes_from`.
        """
        import importlib

        return getattr(importlib.import_module(package), name, None) if package else None

    def find_function(self, package: str, name: str) -> Callable[..., nn.Module] | None:
        """Return the function of that name that an expression may call like a class, or None.

        It returns a module with random values, and downloads nothing.
        """
        return None

    def class_names(self) -> Sequence[str]:
        """Return the module classes that expressions may name without their package."""
        return ()

    def package_of(self, name: str) -> str | None:
        """Return the package of a class that expressions may name without it; None if there is no such class."""
        return None

    def places_of(self, name: str) -> Sequence[str]:
        """Return other classes of this name in the library, as an expression writes them, for a hint."""
        return ()

    def right_name(self, call: Call) -> str | None:
        """Return the reference for a model that was named as in Python (`package.models.resnet18`), for a hint."""
        return None

    def name_in_script(self, package: str, name: str) -> tuple[str, str]:
        """Return the import that a script needs for a class of the provider's packages, and the imported name."""
        return f"import {package}", f"{package}.{name}"

    def arguments_in_script(self, package: str, name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the keyword arguments of a call in an expression as plain Python needs them."""
        return kwargs


def _shown(parameter: inspect.Parameter) -> str:
    """Return an argument as in its source, also if annotations are stored as text."""
    plain = str(parameter.replace(annotation=parameter.empty))
    if not isinstance(parameter.annotation, str):
        return str(parameter)
    name, equals, default = plain.partition("=")
    return f"{name}: {parameter.annotation}{f' = {default}' if equals else ''}"


def refuse_hole(reference: NamedModel) -> None:
    """Raise RequestError for `_` in a reference, where there is no old module."""
    if reference.call.has_hole:
        raise RequestError(
            f"{reference.call}: _ keeps an old argument, but there is no old module", "write the argument out"
        )
