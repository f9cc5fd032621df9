"""Plan an adaptation: which edits it stands for, and which input the model takes afterwards.

What the library of a model calls its classifier and its first layer is known from its provider. For models of other
classes, they are the last and the first layer with weights that a forward pass runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from torch import nn

from modelcli.edits import Edit, from_words
from modelcli.edits.adaptation import Adaptation, AdaptationPlan
from modelcli.errors import RequestError
from modelcli.language import expressions, selectors
from modelcli.language.quoting import command
from modelcli.live import trace
from modelcli.live.adaptation import resized_calls
from modelcli.live.adaptation.resized_calls import INPUTS, OUTPUTS
from modelcli.live.inputs import Inputs, how_to_state_input
from modelcli.live.providers import class_layers_of, resizing_of, why_not_resized
from modelcli.live.providers.base import ClassLayers, LiveProvider
from modelcli.live.surgery.core import brief, submodule
from modelcli.wording import counted, listed

if TYPE_CHECKING:
    from modelcli.live.opening import Live


def plan(live: Live, wanted: Adaptation) -> AdaptationPlan:
    """Find the edits that an adaptation stands for. The model is not changed.

    Raises RequestError where the model has no such part, or nobody knows which one it is.
    """
    return _Planning(live, wanted).plan()


@dataclass
class _Planning:
    """The plan of one adaptation while it is made."""

    live: Live
    wanted: Adaptation
    edits: list[Edit] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def plan(self) -> AdaptationPlan:
        wanted = self.wanted
        inputs = self.live.inputs
        if inputs is not None and inputs.as_list:
            self._refuse_detection()
        if wanted.classes is not None:
            self._classes(wanted.classes)
        if wanted.in_channels is not None and not self._resized("in_channels", wanted.in_channels):
            inputs = self._in_channels(wanted.in_channels, inputs)
        if wanted.image_size is not None and not self._resized("image_size", wanted.image_size):
            inputs = self._image_size(wanted.image_size, inputs)
        if wanted.vocab_size is not None and not self._resized("vocab_size", wanted.vocab_size):
            self._vocabulary(wanted.vocab_size)
        stated = None if inputs == self.live.inputs or inputs is None else inputs
        return AdaptationPlan(tuple(self.edits), tuple(self.notes), stated)

    @property
    def _model(self) -> str:
        return self.live.source.model

    @property
    def _module(self) -> nn.Module:
        return self.live.module

    def _refuse_detection(self) -> None:
        """Raise RequestError for what a detection model decides itself, or no library says of it."""
        sizes = {"--in-channels": self.wanted.in_channels, "--image-size": self.wanted.image_size}
        if option := next((option for option, size in sizes.items() if size is not None), None):
            raise RequestError(
                f"{option}: {self._model} is a detection model, which scales and normalises its images itself",
                f"leave {option} out: the arguments of its builder decide both",
            )
        if self.wanted.classes is not None and class_layers_of(self._module, self.wanted.classes) is None:
            raise RequestError(
                f"--classes: {self._model} is a detection model, and no library says which of its layers decide the "
                "number of classes",
                "replace its predictors by their paths: modelcli modules shows them",
            )

    # --- the classifier ----------------------------------------------------------------------------------------------

    def _classes(self, number: int) -> None:
        """Plan the replacement of each classifier."""
        if (found := class_layers_of(self._module, number)) is not None:
            self._class_layers(found, number)
            return
        base = self.live.architecture
        width = number + (0 if base is None else base.provider.outputs_beyond_classes(self._module))
        for path in self._paths("head", "--classes", f"Linear(_,{width})"):
            old = submodule(self._module, path)
            before = resized_calls.size(old, OUTPUTS)
            if before is None:
                raise RequestError(
                    f"the classifier {path} is {brief(old)}, and adapt replaces Linear and convolutions only",
                    f"replace it yourself: {command(['replace', selectors.literal(path), f'Linear(_,{width})'])}",
                )
            if before == width:
                self.notes.append(f"{path} has {counted(number, 'class', 'classes')} already")
            else:
                self._replace(path, old, OUTPUTS, width)

    def _class_layers(self, found: ClassLayers, number: int) -> None:
        """Plan the replacement of the layers that decide the classes together, drawn as their library draws them."""
        if found.before == number:
            self.notes.append(f"{self._model} has {counted(number, 'class', 'classes')} already")
            return
        for layer in found.layers:
            self._replace(layer.path, submodule(self._module, layer.path), OUTPUTS, layer.outputs)
            if layer.weight is None:
                continue
            target, bias = (layer.path, ["--bias", layer.bias]) if layer.bias else (f"{layer.path}.weight", [])
            self.edits.append(from_words("init", [selectors.literal(target), layer.weight, *bias]))
        for path, name, value in found.settings:
            self.edits.append(from_words("set", [selectors.literal(path), f"{name}={value}"]))
        self.notes.append(f"the {counted(number, 'class', 'classes')} include the background, as num_classes does")

    # --- the first layer ---------------------------------------------------------------------------------------------

    def _in_channels(self, number: int, inputs: Inputs | None) -> Inputs | None:
        """Plan the replacement of the first convolution. Returns what the model takes afterwards."""
        for path in self._paths("stem", "--in-channels", f"Conv2d({number},_,_)"):
            old = submodule(self._module, path)
            before = resized_calls.size(old, INPUTS)
            if before is None or isinstance(old, nn.Linear):
                raise RequestError(
                    f"the first layer {path} is {brief(old)}: that is no convolution, which has input channels",
                    "name the layer that takes the channels: replace PATH MODULE",
                )
            if getattr(old, "groups", 1) != 1:
                raise RequestError(
                    f"the first layer {path} has its channels in {old.groups} groups: their weights cannot be summed",
                    f"replace it without its weights: {command(['replace', selectors.literal(path), 'MODULE'])}",
                )
            if before == number:
                self.notes.append(f"{path} takes {counted(number, 'channel')} already")
                continue
            self._replace(path, old, INPUTS, number, "--keep-weights=sum")
            inputs = None if inputs is None else _with_channels(inputs, before, number)
        return inputs

    # --- sizes that a library changes itself -------------------------------------------------------------------------

    def _resized(self, what: str, size: int) -> bool:
        """Plan that the library of the model gives it another size. Returns whether the library can."""
        found = resizing_of(self._module, what, size)
        if found is None:
            return False
        if found.before in (size, (size, size)):
            self.notes.append(f"{what} of {self._model} is {size:,} already")
        else:
            self.edits.append(from_words("resize", [".", f"{what}={size}"]))
        return True

    def _image_size(self, size: int, inputs: Inputs | None) -> Inputs | None:
        """Find out whether the model takes images of another size as it is. Returns what it takes then."""
        if inputs is None:
            raise RequestError(
                f"--image-size: no library says how {self._model} takes another size, and its input is not known",
                f"{how_to_state_input(self._module)}: a model of convolutions may take any size",
            )
        resized = _with_image_size(inputs, size)
        if resized is None:
            shapes = listed([str(list(shape)) for shape in inputs.all_shapes], 4)
            raise RequestError(
                f"--image-size: {self._model} takes no images, but {shapes}",
                "leave --image-size out",
            )
        # The edited model is checked before anything is written; here the question is the size alone.
        assert self.live.inputs is not None
        seen = trace.trace(self._module, _with_image_size(self.live.inputs, size))
        if seen.trace.reason is not None:
            why = why_not_resized(self._module, "image_size", size)
            told = why or f"no library says how to change that: {seen.trace.reason}"
            raise RequestError(
                f"--image-size: {self._model} does not take images of {size}x{size} as it is, and {told}",
                self._built_for(size, draws=why is not None),
            )
        self.notes.append(f"{self._model} takes images of {size}x{size} as it is: no edit is needed")
        return resized

    def _built_for(self, size: int, *, draws: bool) -> str:
        """What to do about a model that is built for one image size; `draws` says that it has new values then."""
        if self._model.startswith("timm:") and draws:
            return f"timm may build it for that size with new values: timm:NAME(img_size={size})"
        if self._model.startswith("timm:"):
            return f"timm may build it for that size and adapt a checkpoint to it: timm:NAME(img_size={size})"
        return "name the model with that size among its arguments, if it takes one"

    def _vocabulary(self, size: int) -> None:
        """Plan the rows of the embedding that runs first, and of the last layer if it has as many."""
        if self._library_names_layers or self.live.describe().landmarks:
            raise RequestError(
                f"--vocab-size: {type(self._module).__name__} of {self._model} has no embedding of tokens that its "
                "library names",
                f"name the embedding: {command(['resize', 'PATH', f'vocab_size={size}'])}",
            )
        example = command(["resize", "PATH", f"vocab_size={size}"])
        layers = self._layers("--vocab-size", "the embedding of the tokens", example)
        embedding = submodule(self._module, layers[0])
        if not isinstance(embedding, nn.Embedding):
            raise RequestError(
                f"--vocab-size: the first layer {layers[0]} is {brief(embedding)}, and no embedding of tokens",
                f"name the embedding: {example}",
            )
        if embedding.num_embeddings == size:
            self.notes.append(f"{layers[0]} has {size:,} rows already")
            return
        last = submodule(self._module, layers[-1])
        is_output = isinstance(last, nn.Linear) and last.out_features == embedding.num_embeddings
        paths = [layers[0], *(layers[-1:] if is_output else ())]
        self.edits.append(from_words("resize", [*map(selectors.literal, paths), f"vocab_size={size}"]))

    # --- layers ------------------------------------------------------------------------------------------------------

    def _replace(self, path: str, old: nn.Module, names: tuple[str, ...], number: int, *options: str) -> None:
        call = resized_calls.with_size(old, names, number)
        self.edits.append(from_words("replace", [selectors.literal(path), expressions.to_text(call), *options]))

    def _paths(self, word: str, option: str, example: str) -> Sequence[str]:
        """Return the paths of the classifier (`head`) or of the first layer (`stem`).

        Raises RequestError where neither the library nor a forward pass tells.
        """
        known = self.live.describe().landmarks
        if word in known:
            return known[word]
        what = "the classifier" if word == "head" else "the first layer"
        example = command(["replace", "PATH", example])
        if known or self._library_names_layers:
            raise RequestError(
                f"{option}: the library of {self._model} does not say which module of {type(self._module).__name__} is "
                f"{what}; it may have none",
                f"name the module: {example}",
            )
        layers = self._layers(option, what, example)
        return layers[-1:] if word == "head" else layers[:1]

    @property
    def _library_names_layers(self) -> bool:
        """Whether the provider of the model says of its models which module is the classifier."""
        base = self.live.architecture
        return base is not None and type(base.provider).landmarks is not LiveProvider.landmarks

    def _layers(self, option: str, what: str, example: str) -> Sequence[str]:
        """Return the layers with weights that a forward pass runs, in their order."""
        if self.live.inputs is None:
            raise RequestError(
                f"{option}: no library says which layer of {self._model} is {what}, and no forward pass can show it, "
                "because the input is not known",
                f"{how_to_state_input(self._module)}, or name the layer: {example}",
            )
        found, failure = self._ran
        if failure is not None:
            raise RequestError(
                f"{option}: no library says which layer of {self._model} is {what}, and {failure.reason}",
                f"name the layer: {example}",
            )
        if not found:
            raise RequestError(f"{option}: no layer of {self._model} with weights runs", f"name the layer: {example}")
        return found

    @cached_property
    def _ran(self) -> tuple[list[str], trace.Failure | None]:
        assert self.live.inputs is not None
        return trace.layers_that_ran(self._module, self.live.inputs)


def _with_channels(inputs: Inputs, before: int, after: int) -> Inputs:
    """Return the inputs with another number of channels, those that have the old one in their second axis."""

    def changed(shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[0], after, *shape[2:]) if len(shape) > 2 and shape[1] == before else shape

    named = tuple(item if item.shape is None else replace(item, shape=changed(item.shape)) for item in inputs.named)
    return replace(inputs, shapes=tuple(map(changed, inputs.shapes)), named=named)


def _with_image_size(inputs: Inputs, size: int) -> Inputs | None:
    """Return the inputs with images of another size; None if nothing there is an image."""

    def changed(shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[:-2], size, size) if len(shape) > 3 else shape

    named = tuple(item if item.shape is None else replace(item, shape=changed(item.shape)) for item in inputs.named)
    if not any(len(shape) > 3 for shape in inputs.all_shapes):
        return None
    return replace(inputs, shapes=tuple(map(changed, inputs.shapes)), named=named)
