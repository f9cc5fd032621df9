"""The dtypes that `from_pretrained` gives to what it does not read from a file in the dtype of the model.

A class may make a buffer in float32 whatever the dtype of the model, such as the frequencies of rotary embeddings, and
may name modules whose weights are to stay in float32. Which those are is read off the class itself: it is built as
`from_pretrained` builds it, on the meta device and with the dtype of its configuration as the default, and transformers
computes the values of the buffers that no file holds.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from modelcli.live.describe import dtype_name
from modelcli.live.meta_models import seeded
from modelcli.live.providers.huggingface import edited_configuration, vetting
from modelcli.live.sources import named_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

#: The dtypes in which torch makes a tensor where nothing says in which one.
_DEFAULTS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def give(module: PreTrainedModel) -> None:
    """Give the tensors of a loaded model the dtypes that `from_pretrained` gives them, in place.

    Buffers outside the state dict get the values that transformers computes for them as well. Of the other tensors
    only those change that are in the dtype of the model, where transformers keeps them in float32.

    Args:
        module: the model with its values, whose configuration describes it.
    """
    dtype = module.config.dtype
    if dtype not in _DEFAULTS:
        return
    built = _as_transformers_builds_it(module, dtype)
    theirs, kept = named_tensors(built), module.state_dict().keys()
    stays = _kept_in_float32(module, dtype)
    for name, tensor in named_tensors(module).items():
        other = theirs.get(name)
        if other is None or not (tensor.is_floating_point() and other.is_floating_point()):
            continue
        if name not in kept:
            if tensor.shape == other.shape:
                tensor.data = other.detach()  # a cast and one back have rounded the values
        elif tensor.dtype == dtype and (other.dtype == torch.float32 or stays(name)):
            tensor.data = tensor.data.to(torch.float32)


def of_unsaved(module: PreTrainedModel, original: PreTrainedConfig) -> dict[str, str]:
    """The dtypes that `give` leaves the buffers outside the state dict in, by their names.

    Args:
        module: the edited model, on the meta device.
        original: the configuration that it was built from before the edits.
    """
    dtype = edited_configuration.dtype_of(module)
    kept = module.state_dict().keys()
    unsaved = [name for name, tensor in named_tensors(module).items() if _is_unsaved(name, tensor, kept)]
    if dtype not in _DEFAULTS or not unsaved:
        return {}
    with vetting.contained(), seeded(0):
        theirs = named_tensors(_on_meta(type(module), original, dtype))
    return {name: dtype_name(theirs[name].dtype) for name in unsaved if name in theirs}


def _is_unsaved(name: str, tensor: torch.Tensor, kept: Collection[str]) -> bool:
    return name not in kept and tensor.is_floating_point() and not isinstance(tensor, nn.Parameter)


def _as_transformers_builds_it(module: PreTrainedModel, dtype: torch.dtype) -> nn.Module:
    """The model as `from_pretrained` makes it before it reads a file, of whose tensors only such buffers have values
    that the file will not have."""
    with vetting.contained(), seeded(0):
        built: Any = _on_meta(type(module), module.config, dtype)
        kept = built.state_dict(keep_vars=True)
        for name, tensor in named_tensors(built).items():
            if name in kept or isinstance(tensor, nn.Parameter):
                tensor._is_hf_initialized = True  # type: ignore[attr-defined]
                continue
            path, _, own = name.rpartition(".")
            built.get_submodule(path)._buffers[own] = torch.empty_like(tensor, device="cpu")
        built.initialize_weights()
    found: nn.Module = built
    return found


def _on_meta(kind: Any, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model of a class in a dtype, on the meta device."""
    with torch.device("meta"):
        built: PreTrainedModel = kind._from_config(copy.deepcopy(config), dtype=dtype)
    return built


def _kept_in_float32(module: PreTrainedModel, dtype: torch.dtype) -> Any:
    """Whether a key is of the modules that the class wants in float32 while the model has this dtype."""
    from transformers.core_model_loading import build_glob_alternation

    plan = module._get_dtype_plan(dtype)
    if not plan:
        return lambda name: False
    return build_glob_alternation(list(plan))[0].search
