"""How a model of transformers makes a forward pass without values, and what it takes."""

from __future__ import annotations

from typing import Any

from torch import nn


def prepare(module: nn.Module) -> None:
    """Let every model of transformers in a module compute attention and experts plainly.

    The default attention looks into its mask, and the default experts look which tokens they get: neither works on the
    meta device. The plain ones give the same shapes and multiply-accumulates.
    """
    from transformers import PreTrainedModel

    for child in module.modules():
        if isinstance(child, PreTrainedModel):
            for config in _all_configurations(child.config):
                config._attn_implementation = "eager"
                config._experts_implementation = "batched_mm"


def _all_configurations(config: Any) -> list[Any]:
    """A configuration and those of its parts, such as the text and the image model of a pair."""
    found = [config]
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if part is not None:
            found += _all_configurations(part)
    return found
