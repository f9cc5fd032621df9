"""What the configuration of an edited model has to say, so that `from_pretrained` builds it.

Each value that edits may have changed is read off the edited model. Whether a number belongs to a list of layers, or to
the classifier, is found by building the class with another value and looking at what changes: names of configurations
differ from model to model, and what they build does not lie. The result is built as well, and what then still differs
is what a configuration cannot say.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from modelcli.live.describe import configuration, dtype_name
from modelcli.live.meta_models import build_on_meta
from modelcli.live.providers.huggingface.configurations import named_parts, parts_of
from modelcli.live.providers.huggingface.embeddings import input_embedding, output_embedding
from modelcli.live.sources import named_tensors
from modelcli.wording import listed

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

#: How many modules a note names.
_MOST_NAMED = 4


@dataclass(frozen=True)
class EditedConfiguration:
    """The configuration of an edited model.

    Attributes:
        config: the configuration.
        changed: the names of the values that are new in it.
        notes: what it cannot say.
        lists: the paths of the lists of layers whose lengths it says anew.
    """

    config: PreTrainedConfig
    changed: tuple[str, ...]
    notes: tuple[str, ...]
    lists: tuple[str, ...] = ()

    def changes_from(self, current: PreTrainedConfig) -> list[str]:
        """What is new against another configuration of the model, as texts such as `num_labels: 3 -> 10`."""
        found = []
        for name in dict.fromkeys(self.changed):
            before, after = _value_in(current, name), _value_in(self.config, name)
            if before != after and before is not None:
                found.append(f"{name}: {_shown(before)} -> {_shown(after)}")
        return found


def _value_in(config: PreTrainedConfig, name: str) -> Any:
    """A value of a configuration or of a part of it (`text_config.vocab_size`); None where it has none."""
    value: Any = config
    for entry in name.split("."):
        value = getattr(value, entry, None)
    return value


def _shown(value: Any) -> str:
    return dtype_name(value) if isinstance(value, torch.dtype) else str(value)


def of(module: PreTrainedModel, original: PreTrainedConfig) -> EditedConfiguration:
    """Find the configuration that builds an edited model.

    Args:
        module: the edited model, on the meta device.
        original: the configuration that it was built from before the edits.
    """
    return _Search(module, original).result()


def put_into(module: PreTrainedModel, original: PreTrainedConfig) -> None:
    """Change the configuration of an edited model to the one that builds it, which its parts share.

    Layers get the numbers that they have in their lists now, as `from_pretrained` gives them.

    Args:
        module: the edited model.
        original: the configuration that it was built from before the edits.
    """
    edited = of(module, original)
    for own, before, after in zip(parts_of(module.config), parts_of(original), parts_of(edited.config), strict=True):
        for name, value in vars(after).items():
            if name not in vars(before) or vars(before)[name] != value:
                setattr(own, name, value)
    if "num_labels" in edited.changed and hasattr(module, "num_labels"):
        module.num_labels = edited.config.num_labels
    for path in edited.lists:
        for number, layer in enumerate(_lists(module)[path]):
            for child in layer.modules():
                if isinstance(getattr(child, "layer_idx", None), int):
                    vars(child)["layer_idx"] = number


class _Search:
    """The search for the configuration of one model."""

    def __init__(self, module: PreTrainedModel, original: PreTrainedConfig) -> None:
        self.module = module
        self.original = original
        self.config = copy.deepcopy(original)
        self.changed: list[str] = []
        self.lists: list[str] = []

    def result(self) -> EditedConfiguration:
        """Try each kind of change, and say what is left."""
        self._images()
        if self._differences(self.built):
            self._layers()
            self._vocabulary()
            self._labels()
        self._ties()
        self._dtype()
        return EditedConfiguration(self.config, tuple(self.changed), tuple(self._left()), tuple(self.lists))

    @cached_property
    def built(self) -> PreTrainedModel:
        """The model as the original configuration builds it."""
        return self._build(self.original)

    def _build(self, config: PreTrainedConfig) -> PreTrainedModel:
        kind = type(self.module)
        made: Any = build_on_meta(lambda: kind(copy.deepcopy(config)))
        found: PreTrainedModel = made
        return found

    def _differences(self, built: nn.Module) -> list[str]:
        """The keys that only one of the two models has, or that have another shape in it."""
        own, theirs = _shapes(self.module), _shapes(built)
        return [key for key in {**own, **theirs} if own.get(key) != theirs.get(key)]

    def _set(self, config: PreTrainedConfig, name: str, value: Any, *, told: bool = True) -> None:
        if told:
            self.changed.append(self._prefix(config) + name)
        setattr(config, name, value)

    def _prefix(self, config: PreTrainedConfig) -> str:
        """What stands before the names of the values of a part: `text_config.`; nothing for the whole configuration."""
        return next((prefix for prefix, part in named_parts(self.config) if part is config), "")

    # --- layers ------------------------------------------------------------------------------------------------------

    def _layers(self) -> None:
        """The number of layers, and the lists with a value for each."""
        theirs = _lists(self.built)
        for path, own in _lists(self.module).items():
            if path not in theirs or len(own) == len(theirs[path]):
                continue
            for config, name in self._counts(len(theirs[path])):
                if self._makes_list(path, config, name, len(own)):
                    self._set_layers(config, name, own, len(theirs[path]))
                    self.lists.append(path)
                    break

    def _counts(self, value: int) -> Iterator[tuple[PreTrainedConfig, str]]:
        """The entries of the configuration and of its parts that have this value, those with `layer` in it first."""
        for config in parts_of(self.config):
            names = [name for name, found in vars(config).items() if type(found) is int and found == value]
            for name in sorted(names, key=lambda name: "layer" not in name):
                yield config, name

    def _makes_list(self, path: str, config: PreTrainedConfig, name: str, length: int) -> bool:
        """Whether another value of an entry gives the list at this path the length that it has after the edits."""
        before = vars(config).copy()
        try:
            self._set_layers(config, name, _lists(self.module)[path], getattr(config, name), told=False)
            return len(_lists(self._build(self.config)).get(path, ())) == length
        except Exception:  # the class refuses the value
            return False
        finally:
            vars(config).clear()
            vars(config).update(before)

    def _set_layers(
        self, config: PreTrainedConfig, name: str, layers: Sequence[nn.Module], before: int, *, told: bool = True
    ) -> None:
        self._set(config, name, len(layers), told=told)
        numbers = _numbers_before(layers, before)
        for own, value in list(vars(config).items()):
            if isinstance(value, list) and len(value) == before and numbers is not None:
                self._set(config, own, [value[number] for number in numbers], told=False)

    # --- images, vocabulary and labels ------------------------------------------------------------------------------

    def _images(self) -> None:
        """The size of images and their channels, which an edit has stated in the model's own configuration."""
        parts = zip(parts_of(self.config), parts_of(self.built.config), parts_of(self.module.config), strict=True)
        for config, built, own in parts:
            for name in ("image_size", "num_channels"):
                if (value := getattr(own, name, None)) != getattr(built, name, None):
                    self._set(config, name, value)

    def _vocabulary(self) -> None:
        """The rows of the input embedding."""
        rows = _rows(input_embedding(self.module))
        config = self.config.get_text_config()
        if rows is not None and isinstance(getattr(config, "vocab_size", None), int) and config.vocab_size != rows:
            self._set(config, "vocab_size", rows)

    def _labels(self) -> None:
        """The width of the classifier: of those layers that the number of labels changes."""
        before = getattr(self.config, "num_labels", None)
        if not isinstance(before, int):
            return
        other = copy.deepcopy(self.config)
        other.num_labels = before + 1
        try:
            plain, wider = _shapes(self._build(self.config)), _shapes(self._build(other))
        except Exception:  # the class refuses the value
            return
        heads = {key for key in wider if plain.get(key) != wider[key]}
        own = _shapes(self.module)
        widths = {own[key][0] for key in heads if own.get(key)}
        if len(widths) == 1 and (width := widths.pop()) != before:
            self._set(self.config, "num_labels", width)

    # --- ties and dtype ----------------------------------------------------------------------------------------------

    def _ties(self) -> None:
        """Whether the output embedding is the input embedding."""
        inputs, outputs = input_embedding(self.module), output_embedding(self.module)
        one, other = getattr(inputs, "weight", None), getattr(outputs, "weight", None)
        if one is None or other is None:
            return
        for config in {id(part): part for part in (self.config, self.config.get_text_config())}.values():
            if getattr(config, "tie_word_embeddings", None) not in (None, one is other):
                self._set(config, "tie_word_embeddings", one is other)

    def _dtype(self) -> None:
        """The dtype of most elements, where that is another one than before."""
        elements: dict[torch.dtype, int] = {}
        for tensor in {id(tensor): tensor for tensor in self.module.parameters()}.values():
            if tensor.dtype.is_floating_point:
                elements[tensor.dtype] = elements.get(tensor.dtype, 0) + tensor.numel()
        if not elements:
            return
        most = max(elements, key=elements.__getitem__)
        if self.config.dtype != most:
            self.changed.append("dtype")
            for part in parts_of(self.config):
                part.dtype = most

    # --- what is left ------------------------------------------------------------------------------------------------

    def _left(self) -> list[str]:
        """Notes on what the configuration builds otherwise than the edited model is."""
        built = self._build(self.config) if self.changed else self.built
        modules = _other_modules(self.module, built)
        keys = [key for key in self._differences(built) if not key.startswith(tuple(f"{path}." for path in modules))]
        named = [*(f"{path} ({what})" for path, what in modules.items()), *keys]
        if not named:
            return []
        own, theirs = _shapes(self.module), _shapes(built)
        fits = all(own[key] == theirs[key] for key in own.keys() & theirs.keys())
        does = "builds the old ones" if fits else "refuses the weights, whose shapes are other ones"
        return [
            f"config.json cannot say what {listed(named, _MOST_NAMED)} {'is' if len(named) == 1 else 'are'} now: "
            f"from_pretrained {does}, and modelcli.load builds the new ones"
        ]


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of the state dict."""
    kept = module.state_dict().keys()
    return {name: tuple(tensor.shape) for name, tensor in named_tensors(module).items() if name in kept}


def _lists(module: nn.Module) -> dict[str, list[nn.Module]]:
    """The children of each list of modules, by its path."""
    return {path: list(child.children()) for path, child in module.named_modules() if isinstance(child, nn.ModuleList)}


def _rows(embedding: nn.Module | None) -> int | None:
    weight = getattr(embedding, "weight", None)
    return int(weight.shape[0]) if isinstance(weight, torch.Tensor) and weight.dim() == 2 else None


def _numbers_before(layers: Sequence[nn.Module], before: int) -> list[int] | None:
    """The number that each layer had before the edits, as transformers' layers know it themselves; None if not."""
    found: list[int] = []
    for layer in layers:
        numbers = [getattr(child, "layer_idx", None) for child in layer.modules()]
        own = {number for number in numbers if isinstance(number, int) and 0 <= number < before}
        if len(own) != 1:
            return None
        found.append(own.pop())
    return found


def _other_modules(module: nn.Module, built: nn.Module) -> dict[str, str]:
    """The outermost modules that are of another class, or print another configuration, than those that were built."""
    theirs = dict(built.named_modules(remove_duplicate=False))
    found: dict[str, str] = {}
    for path, child in module.named_modules(remove_duplicate=False):
        other = theirs.get(path)
        if any(path.startswith(f"{above}.") for above in found):
            continue
        if other is None:
            found[path] = f"{type(child).__name__}, which is new"
        elif type(child) is not type(other):
            found[path] = f"{type(child).__name__} in the place of {type(other).__name__}"
        elif not isinstance(child, nn.ModuleList) and configuration(child) != configuration(other):
            found[path] = f"{type(child).__name__}({configuration(child)})"
    gone = [path for path in theirs if path not in dict(module.named_modules(remove_duplicate=False))]
    outermost = [path for path in gone if not any(path.startswith(f"{above}.") for above in gone if above != path)]
    return found | dict.fromkeys(outermost, "removed")


def names_to_leave_out(module: PreTrainedModel) -> set[str]:
    """The names of tied tensors that `save_pretrained` leaves out: those that the class itself ties to another."""
    ties: Mapping[str, str] = getattr(module, "all_tied_weights_keys", None) or {}
    tensors = named_tensors(module)
    return {name for name, other in ties.items() if name in tensors and tensors[name] is tensors.get(other)}
