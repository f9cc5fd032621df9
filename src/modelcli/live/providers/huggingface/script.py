"""How a plain script builds a model of transformers: from a folder with its weights, or from a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from modelcli.live.script.source_text import InexpressibleError, SourceText, quoted, seen

if TYPE_CHECKING:
    from modelcli.live.providers.huggingface.configurations import Described


def from_folder(text: SourceText, described: Described, module: nn.Module, folder: Path) -> str:
    """The expression that loads a model with the weights of its folder.

    Args:
        text: the script, for its imports and the words of values.
        described: what the configuration of the folder describes.
        module: the model as it was opened.
        folder: the folder, as the script sees it.

    Raises InexpressibleError where `from_pretrained` gives other dtypes than the file has.
    """
    arguments = [_path(folder)]
    found = {tensor.dtype for tensor in module.state_dict().values() if tensor.dtype.is_floating_point}
    if len(found) > 1:
        raise InexpressibleError("its tensors have several dtypes, and from_pretrained gives all of them one")
    other = found - {_dtype_of(described)}
    arguments += [f"dtype={dtype}" for dtype in other]
    if described.overrides:
        arguments += [text.arguments((), dict(described.overrides)), "ignore_mismatched_sizes=True"]
    return f"{_class(text, described)}.from_pretrained({', '.join(arguments)})"


def from_configuration(text: SourceText, described: Described, folder: Path | None) -> str:
    """The expression that makes a model with values drawn at random.

    Args:
        text: the script, for its imports and the words of values.
        described: what the configuration describes.
        folder: the folder with the configuration; None where the reference names the class and all values.
    """
    model_class = _class(text, described)
    if folder is None:
        config_class = described.model_class.config_class.__name__
        text.imports.add(f"from transformers import {config_class}")
        config = f"{config_class}({text.arguments((), _without_what_it_is(described.overrides))})"
    else:
        text.imports.add("from transformers import AutoConfig")
        given = [_path(folder)]
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


def _path(folder: Path) -> str:
    """A folder as `from_pretrained` takes it, so that it is no name on the Hub."""
    shown = seen(folder)
    return quoted(shown if folder.is_absolute() or shown.startswith("..") else f"./{shown}")


def _dtype_of(described: Described) -> torch.dtype:
    found = described.configuration().dtype
    return found if isinstance(found, torch.dtype) else torch.float32
