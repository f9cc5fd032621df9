"""How a plain script builds a model of transformers: from a folder with its weights, or from a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from modelcli.live.script.source_text import InexpressibleError, SourceText, path_in_script, quoted
from modelcli.providers.hub_names import HubModel

if TYPE_CHECKING:
    from modelcli.live.providers.huggingface.configurations import Described


def with_weights(text: SourceText, described: Described, module: nn.Module, place: Path | HubModel) -> str:
    """The expression that loads a model with its own weights.

    Args:
        text: the script, for its imports and the words of values.
        described: what the configuration of the folder describes.
        module: the model as it was opened.
        place: its folder, as the script sees it, or the model of the Hub.

    Raises InexpressibleError where `from_pretrained` gives other dtypes than the file has.
    """
    arguments = [_place(place)]
    found = {tensor.dtype for tensor in module.state_dict().values() if tensor.dtype.is_floating_point}
    if len(found) > 1:
        raise InexpressibleError("its tensors have several dtypes, and from_pretrained gives all of them one")
    other = found - {_dtype_of(described)}
    arguments += [f"dtype={dtype}" for dtype in other]
    if described.overrides:
        arguments += [text.arguments((), dict(described.overrides)), "ignore_mismatched_sizes=True"]
    return f"{_class(text, described)}.from_pretrained({', '.join(arguments)})"


def from_configuration(text: SourceText, described: Described, place: Path | HubModel | None) -> str:
    """The expression that makes a model with values drawn at random.

    Args:
        text: the script, for its imports and the words of values.
        described: what the configuration describes.
        place: where the configuration is, a folder or the Hub; None where the reference names the class and its values.
    """
    model_class = _class(text, described)
    if place is None:
        config_class = described.model_class.config_class.__name__
        text.imports.add(f"from transformers import {config_class}")
        config = f"{config_class}({text.arguments((), _without_what_it_is(described.overrides))})"
    else:
        text.imports.add("from transformers import AutoConfig")
        given = [_place(place)]
        if described.overrides:
            given.append(text.arguments((), dict(described.overrides)))
        config = f"AutoConfig.from_pretrained({', '.join(given)})"
    return f"{model_class}._from_config({config}).eval()"


def _class(text: SourceText, described: Described) -> str:
    name = described.model_class.__name__
    if not described.is_of_transformers:
        raise InexpressibleError(f"{name} is in code that comes with the model")
    text.imports.add(f"from transformers import {name}")
    return name


def _without_what_it_is(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != "auto_class"}


def _place(place: Path | HubModel) -> str:
    """A folder as `from_pretrained` takes it, so that it is no name on the Hub; or the name there and the commit."""
    if isinstance(place, HubModel):
        return f"{quoted(place.repository)}, revision={quoted(place.revision)}"
    shown = path_in_script(place)
    return quoted(shown if place.is_absolute() or shown.startswith("..") else f"./{shown}")


def _dtype_of(described: Described) -> torch.dtype:
    found = described.configuration().dtype
    return found if isinstance(found, torch.dtype) else torch.float32
