"""Another image size, number of channels or vocabulary for a model of transformers."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from modelcli.edits.kept_weights import SUM
from modelcli.errors import RequestError
from modelcli.live.meta_models import build_on_meta
from modelcli.live.providers.huggingface.configurations import parts_of
from modelcli.live.providers.huggingface.embeddings import with_tokens
from modelcli.live.resizing import Resizing
from modelcli.live.script import access_paths
from modelcli.live.script.source_text import InexpressibleError
from modelcli.live.sources import named_tensors
from modelcli.live.surgery.input_channels import adapted

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from modelcli.live.script.source_text import SourceText

#: What a configuration calls these sizes.
_ENTRIES = {"image_size": "image_size", "in_channels": "num_channels"}
_INTERPOLATE = "interpolate_pos_encoding"
#: The dimensions of position embeddings with one for a batch, as they are interpolated.
_WITH_BATCH = 3
#: How many statements of a script a resize may take.
_MOST_LINES = 16


def resizing(model: PreTrainedModel, what: str, size: int) -> Resizing | None:
    """How transformers gives a model another size; None where its configuration has no such entry."""
    if what == "vocab_size":
        return _vocabulary(model, size)
    entry = _ENTRIES[what]
    values = [getattr(part, entry) for part in parts_of(model.config) if _is_size(getattr(part, entry, None))]
    if not values:
        return None
    before = values[-1] if isinstance(values[-1], int) else (int(values[-1][0]), int(values[-1][1]))
    change = _ConfigurationChange(type(model), model.config, entry, size)
    statements = None if what == "in_channels" else partial(change.statements, model)
    return Resizing(before, change.carry_out, statements)


def _is_size(value: object) -> bool:
    is_pair = isinstance(value, Sequence) and len(value) == 2 and all(isinstance(each, int) for each in value)
    return type(value) is int or is_pair


# --- the vocabulary --------------------------------------------------------------------------------------------------


def _vocabulary(model: PreTrainedModel, size: int) -> Resizing | None:
    """By `resize_token_embeddings`, which draws new rows around the mean of the old ones."""
    if (found := with_tokens(model)) is None:
        return None
    path, embedding = found

    def resize(module: Any) -> None:
        _give_own_configuration(module)
        part = module.get_submodule(path)
        is_on_meta = part.get_input_embeddings().weight.is_meta
        with _without_advice():
            part.resize_token_embeddings(size, mean_resizing=not is_on_meta)  # the mean of values takes values

    def statements(_text: SourceText, place: str) -> list[str]:
        return [f"{place}{f'.{path}' if path else ''}.resize_token_embeddings({size})"]

    return Resizing(embedding.weight.shape[0], resize, statements, draws=True)


@contextmanager
def _without_advice() -> Iterator[None]:
    """Drop the advice that transformers logs: it is about arguments that nobody has given."""
    logger = logging.getLogger("transformers.modeling_utils")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _give_own_configuration(module: PreTrainedModel) -> PreTrainedConfig:
    """Give a model and its modules a copy of their configuration, which may be changed. Returns it."""
    old = parts_of(module.config)
    config: PreTrainedConfig = copy.deepcopy(module.config)
    new = {id(part): own for part, own in zip(old, parts_of(config), strict=True)}
    for child in module.modules():
        if (own := new.get(id(vars(child).get("config")))) is not None:
            child.config = own
    return config


# --- images ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _ConfigurationChange:
    """Another value of an entry of the configuration, and what the class builds otherwise with it."""

    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    entry: str
    size: int

    @cached_property
    def _old(self) -> nn.Module:
        return build_on_meta(lambda: self.model_class(copy.deepcopy(self.config)))

    @cached_property
    def _new(self) -> nn.Module:
        config = copy.deepcopy(self.config)
        _set(config, self.entry, self.size)
        return build_on_meta(lambda: self.model_class(copy.deepcopy(config)))

    def carry_out(self, module: nn.Module) -> None:
        """Give a model the attributes and the tensors that the class has with the other value."""
        model: Any = module
        old, new = named_tensors(self._old), named_tensors(self._new)
        present = named_tensors(module)
        for name, tensor in new.items():
            if name in old and name in present and old[name].shape != tensor.shape:
                self._resize_tensor(module, name, present[name], tensor)
        _set(_give_own_configuration(model), self.entry, self.size)
        for path, name, value in list(self._attributes(module)):
            setattr(module.get_submodule(path), name, value)

    def statements(self, module: nn.Module, text: SourceText, place: str) -> list[str]:
        """What `carry_out` does, as statements for the model at a place of a script, but for the configuration.

        Raises InexpressibleError where these are too many to be read.
        """

        def expression(path: str) -> str:
            return place + access_paths.module_expression(module, path).removeprefix("model")

        lines = []
        old, new, present = named_tensors(self._old), named_tensors(self._new), named_tensors(module)
        for name, tensor in new.items():
            if name not in old or name not in present or old[name].shape == tensor.shape:
                continue
            path, _, own = name.rpartition(".")
            if isinstance(present[name], nn.Parameter):
                tokens = f"torch.empty(1, {tensor.shape[-2]}, {tensor.shape[-1]})"
                at = expression(self._holder_of(module, name, present[name], tensor))
                made = f"{at}.{_INTERPOLATE}({tokens}, {self.size}, {self.size}).detach()"
                if tensor.dim() != _WITH_BATCH:
                    made += f".reshape({', '.join(map(str, tensor.shape))})"
                lines.append(f"{expression(path)}.{own}.data = {made}")
            else:
                shape = ", ".join(map(str, tensor.shape))
                lines.append(f"{expression(path)}.{own} = torch.arange({tensor.shape[-1]}).expand({shape})")
        for path, name, value in self._attributes(module):
            lines.append(f"{expression(path)}.{name} = {text.value(value)}")
        if len(lines) > _MOST_LINES:
            raise InexpressibleError(f"{self.entry}={self.size} changes {len(lines)} tensors and attributes")
        return lines

    def _attributes(self, module: nn.Module) -> Iterator[tuple[str, str, Any]]:
        """The plain attributes that the class sets otherwise: the path of each one's module, its name and its value."""
        news = dict(self._new.named_modules(remove_duplicate=False))
        mine = dict(module.named_modules(remove_duplicate=False))
        for path, child in self._old.named_modules(remove_duplicate=False):
            for name, value in vars(child).items():
                changed = vars(news[path]).get(name)
                if isinstance(value, _PLAIN) and changed != value and path in mine and name in vars(mine[path]):
                    yield path, name, changed

    def _resize_tensor(self, module: nn.Module, name: str, old: torch.Tensor, new: torch.Tensor) -> None:
        """Put a tensor of the new shape in the place of an old one."""
        path, _, own = name.rpartition(".")
        holder = module.get_submodule(path)
        if not isinstance(old, nn.Parameter):
            holder._buffers[own] = self._buffer(name, old, new)
            return
        if self.entry == "num_channels":
            values = _with_channels(name, old, new)
        else:
            values = self._interpolated(module, name, old, new)
        holder._parameters[own] = nn.Parameter(values, requires_grad=old.requires_grad)

    def _buffer(self, name: str, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """A buffer of the new shape. Raises RequestError if its values are not known."""
        if old.is_meta:
            return torch.empty_like(new)
        count = new.shape[-1]
        is_counting = old.dtype == torch.int64 and torch.equal(old.flatten(), torch.arange(old.numel()))
        if is_counting and new.numel() == count:
            return torch.arange(count).expand(new.shape)
        raise self._refusal(name, old, new)

    def _interpolated(self, module: nn.Module, name: str, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """Position embeddings for the other size, as the model's own class interpolates them for a larger image."""
        holder: Any = module.get_submodule(self._holder_of(module, name, old, new))
        if old.is_meta:
            return torch.empty_like(new, device="meta")
        tokens = new.shape[-2]
        found: torch.Tensor = getattr(holder, _INTERPOLATE)(
            torch.empty((1, tokens, new.shape[-1]), dtype=old.dtype), self.size, self.size
        )
        return found.detach().reshape(new.shape).to(old.dtype)

    def _holder_of(self, module: nn.Module, name: str, old: torch.Tensor, new: torch.Tensor) -> str:
        """The path of the module that interpolates a parameter. Raises RequestError if none does."""
        path = name
        while path:
            path = path.rpartition(".")[0]
            if hasattr(type(module.get_submodule(path)), _INTERPOLATE):
                return path
        raise self._refusal(name, old, new)

    def _refusal(self, name: str, old: torch.Tensor, new: torch.Tensor) -> RequestError:
        return RequestError(
            f"{self.model_class.__name__} with {self.entry}={self.size} has {name} of shape {list(new.shape)} in the "
            f"place of {list(old.shape)}, and transformers has no function that carries its values over",
            f"build it so, which draws these values anew: hf:FOLDER({self.entry}={self.size})",
        )


_PLAIN = (bool, int, float, str, tuple, list)


def _set(config: PreTrainedConfig, entry: str, size: int) -> None:
    """Set an entry in every part of a configuration that has it."""
    for part in parts_of(config):
        value = getattr(part, entry, None)
        if _is_size(value):
            pair = (size, size) if isinstance(value, tuple) else [size, size]
            setattr(part, entry, size if isinstance(value, int) else pair)


def _with_channels(name: str, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """The weight of a convolution for another number of channels. Raises RequestError for tensors of other kinds."""
    expected = (old.shape[0], new.shape[1] if new.dim() > 1 else 0, *old.shape[2:])
    if old.dim() < 3 or tuple(new.shape) != expected:
        raise RequestError(
            f"{name} would change from {list(old.shape)} to {list(new.shape)}, which no sum over channels does",
            "replace that layer by itself",
        )
    return torch.empty_like(new, device="meta") if old.is_meta else adapted(old.detach(), new.shape[1], SUM)
