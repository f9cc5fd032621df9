"""What the configuration of an edited model has to say, so that `from_pretrained` builds it.

Each value that edits may have changed is read off the edited model. Whether a number belongs to a list of layers, or to
the classifier, is found by building the class with another value and looking at what changes: names of configurations
differ from model to model, and what they build does not lie. The result is built as well, and what then still differs
is what a configuration cannot say.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from modelcli.live.describe import configuration, dtype_name
from modelcli.live.meta_models import build_on_meta
from modelcli.live.providers.huggingface.configurations import named_parts, parts_of
from modelcli.live.providers.huggingface.embeddings import input_embedding, output_embedding, with_tokens
from modelcli.live.script import access_paths
from modelcli.live.sources import named_tensors
from modelcli.wording import listed

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from modelcli.live.script.source_text import SourceText

#: How many modules a note names.
_MOST_NAMED = 4
#: What the configuration of a backbone says of its outputs.
_OF_STAGES = frozenset({"stage_names", "out_features", "out_indices"})


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


@dataclass(frozen=True)
class _Place:
    """Where a configuration states a number: a value of it, or an item of a list of numbers."""

    config: PreTrainedConfig
    name: str
    index: int | None = None

    def with_value(self, number: int) -> Any:
        """The value of the configuration with another number in this place."""
        if self.index is None:
            return number
        return [number if index == self.index else each for index, each in enumerate(vars(self.config)[self.name])]


@contextlib.contextmanager
def _undone(config: PreTrainedConfig) -> Iterator[Callable[[], None]]:
    """Give a configuration its values back afterwards, unless what is given out is called."""
    before = vars(config).copy()
    kept = False

    def keep() -> None:
        nonlocal kept
        kept = True

    try:
        yield keep
    finally:
        if not kept:
            vars(config).clear()
            vars(config).update(before)


def script_lines(text: SourceText, module: PreTrainedModel, original: PreTrainedConfig) -> list[str]:
    """The statements that do to `model` in a script what `put_into` does.

    Args:
        text: the script, for its imports and the words of values.
        module: the edited model, whose configuration is the original one.
        original: the configuration that it was built from before the edits.
    """
    edited = of(module, original)
    has_labels = "num_labels" in edited.changed
    lines = [f"model.config.num_labels = {edited.config.num_labels}"] if has_labels else []
    parts = parts_of(edited.config)
    for (prefix, before), after in zip(named_parts(original), parts, strict=True):
        for name, value in vars(after).items():
            if any(value is part for part in parts):  # its own values follow
                continue
            if (has_labels and name in ("id2label", "label2id")) or vars(before).get(name, edited) == value:
                continue
            shown = str(value) if isinstance(value, torch.dtype) else text.value(value)
            lines.append(f"model.config.{prefix}{name} = {shown}")
    if has_labels and hasattr(module, "num_labels"):
        lines.append(f"model.num_labels = {edited.config.num_labels}")
    for path in edited.lists:
        if any(hasattr(child, "layer_idx") for layer in _lists(module)[path] for child in layer.modules()):
            lines += [
                f"for number, layer in enumerate({access_paths.module_expression(module, path)}):",
                "    for part in layer.modules():",
                '        if hasattr(part, "layer_idx"):',
                "            part.layer_idx = number",
            ]
    return lines


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
        """The number of layers, the lists with a value for each, and what goes by their numbers."""
        theirs = _lists(self.built)
        for path, own in _lists(self.module).items():
            if path not in theirs or len(own) == len(theirs[path]):
                continue
            before = len(theirs[path])
            for place in self._counts(before):
                if self._makes_list(path, place, own, before):
                    self._set_layers(place, own, before)
                    self.lists.append(path)
                    if (numbers := _numbers_before(own, before)) is not None:
                        self._numbers_of_layers(place.config, numbers, before)
                    break

    def _counts(self, value: int) -> Iterator[_Place]:
        """Where the configuration and its parts have this value, also in a list of them; `layer` in the name first."""
        for config in parts_of(self.config):
            for name in sorted(vars(config), key=lambda name: "layer" not in name):
                found = vars(config)[name]
                if type(found) is int and found == value:
                    yield _Place(config, name)
                elif isinstance(found, list) and all(type(each) is int for each in found):  # a number for each stage
                    yield from (_Place(config, name, index) for index, each in enumerate(found) if each == value)

    def _makes_list(self, path: str, place: _Place, own: Sequence[nn.Module], before: int) -> bool:
        """Whether another value in this place gives the list at this path the length that it has after the edits."""
        with _undone(place.config):
            try:
                self._set_layers(place, own, before, told=False)
                return len(_lists(self._build(self.config)).get(path, ())) == len(own)
            except Exception:  # the class refuses the value
                return False

    def _set_layers(self, place: _Place, layers: Sequence[nn.Module], before: int, *, told: bool = True) -> None:
        config = place.config
        self._set(config, place.name, place.with_value(len(layers)), told=told)
        numbers = _numbers_before(layers, before)
        for own, value in list(vars(config).items()):
            if own != place.name and "layer" in own and numbers is not None and _has_one_for_each(value, before):
                self._set(config, own, [value[number] for number in numbers], told=False)
        self._set_stages(config, told=told)

    def _set_stages(self, config: PreTrainedConfig, *, told: bool) -> None:
        """The outputs of a backbone, which it names by its layers: those that are left, else the last."""
        if not isinstance(getattr(config, "stage_names", None), list):
            return
        values = {key: value for key, value in config.to_dict().items() if key not in _OF_STAGES}
        made: Any = type(config).from_dict(values)
        if made.stage_names == config.stage_names:
            return
        own: Any = config
        before = own.out_features
        own.stage_names = made.stage_names
        own.out_features = [name for name in before if name in made.stage_names] or made.stage_names[-1:]
        if told and own.out_features != before:
            self.changed.append(f"{self._prefix(config)}out_features")

    def _numbers_of_layers(self, config: PreTrainedConfig, numbers: Sequence[int], before: int) -> None:
        """Entries that go by the numbers of layers, which have moved, and whose names do not say so.

        An entry such as the first layer that is a mixture of experts is one of them if the value that it then has now
        builds more of the edited model.
        """
        differing = self._count_of_differences()
        original = vars(self._original_of(config)).copy()
        for name, value in original.items():
            for moved in _moved(value, numbers, before):
                if not differing:
                    return
                if moved == vars(config).get(name):
                    continue
                with _undone(config) as keep:
                    setattr(config, name, moved)
                    found = self._count_of_differences()
                    if found < differing:
                        differing = found
                        self.changed.append(self._prefix(config) + name)
                        keep()

    def _original_of(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The same part of the original configuration."""
        pairs = zip(parts_of(self.config), parts_of(self.original), strict=True)
        return next(before for own, before in pairs if own is config)

    def _count_of_differences(self) -> float:
        """How much the configuration builds otherwise than the edited model is; without end where it builds nothing."""
        try:
            built = self._build(_read_again(self.config))
        except Exception:  # the class refuses a value
            return math.inf
        return len(self._differences(built)) + len(_other_modules(self.module, built))

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
        found = with_tokens(self.module)
        rows = None if found is None else _rows(found[1])
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
        beyond = {plain[key][0] - before for key in heads & plain.keys()}  # a class for none of the labels
        if len(widths) == len(beyond) == 1 and (labels := widths.pop() - beyond.pop()) not in (0, before):
            self._set(self.config, "num_labels", labels)

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
        most = dtype_of(self.module)
        if most is not None and self.config.dtype != most:
            self.changed.append("dtype")
            for part in parts_of(self.config):
                part.dtype = most

    # --- what is left ------------------------------------------------------------------------------------------------

    def _left(self) -> list[str]:
        """Notes on what the configuration builds otherwise than the edited model is."""
        if self.changed:
            try:
                _read_again(self.config)
            except Exception as error:  # whatever its class says
                return [
                    f"from_pretrained refuses this config.json ({_in_one_line(error)}): modelcli.load builds the model"
                ]
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


def dtype_of(module: nn.Module) -> torch.dtype | None:
    """The dtype of most elements of the floating-point parameters; None for a model without any."""
    elements: dict[torch.dtype, int] = {}
    for tensor in {id(tensor): tensor for tensor in module.parameters()}.values():
        if tensor.dtype.is_floating_point:
            elements[tensor.dtype] = elements.get(tensor.dtype, 0) + tensor.numel()
    return max(elements, key=elements.__getitem__) if elements else None


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of the state dict."""
    kept = module.state_dict().keys()
    return {name: tuple(tensor.shape) for name, tensor in named_tensors(module).items() if name in kept}


def _lists(module: nn.Module) -> dict[str, list[nn.Module]]:
    """The children of each list of modules, by its path."""
    lists = (nn.ModuleList, nn.Sequential)
    return {path: list(child.children()) for path, child in module.named_modules() if isinstance(child, lists)}


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


def _read_again(config: PreTrainedConfig) -> PreTrainedConfig:
    """A configuration as transformers reads it from the file that is written of it."""
    document = json.loads(config.to_json_string(use_diff=True))
    made: PreTrainedConfig = type(config).from_dict(type(config)._decode_special_floats(document))
    return made


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _has_one_for_each(value: Any, layers: int) -> bool:
    """Whether a value of a configuration may have an item for each of so many layers."""
    return isinstance(value, list) and len(value) == layers


def _moved(value: Any, numbers: Sequence[int], before: int) -> Iterator[Any]:
    """What the value of an entry that goes by the numbers of layers may be after the edits.

    A single number may be that of the layer before which something ends, and so one more than the last has. A list of
    as many items as there were layers has one for each; one of numbers may name layers.
    """
    if type(value) is int and 0 < value <= before:
        yield sum(number < value for number in numbers)
    if _has_one_for_each(value, before):
        yield value
        yield [value[number] for number in numbers]
    if isinstance(value, list) and value and all(type(each) is int and 0 <= each < before for each in value):
        yield [numbers.index(each) for each in value if each in numbers]


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
        elif (own := type_before_parametrizations(child)) is not (before := type_before_parametrizations(other)):
            found[path] = f"{own.__name__} in the place of {before.__name__}"
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
