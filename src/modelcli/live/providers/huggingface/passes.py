"""How a model of transformers makes a forward pass without values."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from modelcli.live import signatures
from modelcli.live.inputs import tensors_in
from modelcli.live.providers.huggingface import vetting
from modelcli.live.providers.huggingface.configurations import parts_of
from modelcli.live.walking import modules_in

#: The variable by which transformers leaves out checks that look into tensors, such as that the text has as many
#: tokens of an image as the image has features.
_NO_CHECKS = "TRANSFORMERS_DISABLE_TORCH_CHECK"


def prepare(module: nn.Module) -> None:
    """Let every model of transformers in a module compute attention and experts plainly.

    The default attention looks into its mask, and the default experts look which tokens they get: neither works on the
    meta device. The plain ones give the same shapes and multiply-accumulates.
    """
    for child in _models_in(module):
        for config in parts_of(child.config):
            config._attn_implementation = "eager"
            config._experts_implementation = "batched_mm"


def has_model(module: nn.Module) -> bool:
    """Whether a model of transformers is in a module, or is it."""
    return next(_models_in(module), None) is not None


def _models_in(module: nn.Module) -> Iterator[Any]:
    """The models of transformers in a module, whose class may be anybody's."""
    from transformers import PreTrainedModel

    return (child for child in modules_in(module) if isinstance(child, PreTrainedModel))


class SmallValuesKnown(TorchDispatchMode):
    """Lets a pass on the meta device take some tensors with values, such as the sizes of images.

    What is computed of these alone has values. What meets a tensor on the meta device is moved there.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        flat = [value for value in pytree.arg_tree_leaves(*args, **kwargs) if isinstance(value, torch.Tensor)]
        if any(tensor.is_meta for tensor in flat) and not all(tensor.is_meta for tensor in flat):
            args, kwargs = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        return func(*args, **kwargs)


@contextlib.contextmanager
def without_checks_of_values() -> Iterator[None]:
    """In the block transformers does not look into tensors to check them."""
    from transformers import masking_utils

    before, is_tracing = os.environ.get(_NO_CHECKS), getattr(masking_utils, "is_tracing", None)
    os.environ[_NO_CHECKS] = "1"
    masking_utils.is_tracing = lambda *_args: True  # then a mask is made without a look into it
    try:
        yield
    finally:
        masking_utils.is_tracing = is_tracing
        if before is None:
            os.environ.pop(_NO_CHECKS, None)
        else:
            os.environ[_NO_CHECKS] = before


@contextlib.contextmanager
def surrounded(device: str) -> Iterator[None]:
    """What surrounds a pass on this device: `meta`, `fake` or `cpu`."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(vetting.without_logs())
        if device != "cpu":
            stack.enter_context(without_checks_of_values())
        if device == "meta":
            stack.enter_context(SmallValuesKnown())  # type: ignore[no-untyped-call]
        yield


def image_tokens(model: Any, shape: tuple[int, ...] | None, grid: tuple[int, int, int]) -> int | None:
    """How many features a model of text and images makes of an image, each of which takes the place of a token.

    None where the model makes none: it takes more than an image, or looks into its values.

    Args:
        model: the model, on the meta device.
        shape: the shape of `pixel_values`.
        grid: the patches of the image in time, height and width, for models that take it as patches.
    """
    if shape is None:
        return 0
    given: dict[str, Any] = {"pixel_values": torch.empty(shape, device="meta")}
    if "image_grid_thw" in signatures.of(model.get_image_features).parameters:
        merged = getattr(getattr(model.config, "vision_config", None), "spatial_merge_size", 1)
        return int(grid[0] * grid[1] * grid[2] // merged**2)
    try:
        with torch.no_grad(), torch.device("meta"), without_checks_of_values():
            made = model.get_image_features(**given)
    except Exception:  # whatever its class says
        return None
    found = list(tensors_in(getattr(made, "pooler_output", made)))
    return sum(int(tensor.shape[:-1].numel()) for tensor in found)
