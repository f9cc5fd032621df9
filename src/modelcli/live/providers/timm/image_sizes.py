"""Why a model of timm cannot be given another image size: which tensors timm makes anew for it."""

from __future__ import annotations

from typing import Any

import torch

from modelcli.live.providers.timm import saving
from modelcli.live.providers.timm.building import TimmModel
from modelcli.live.providers.timm.loading import PretrainedCall
from modelcli.wording import counted, listed


def why_not(module: Any, size: int) -> str | None:
    """Which tensors timm builds otherwise for another image size, and carries no values over for, as a sentence.

    Args:
        module: the model, on the meta device.
        size: the height and the width of the images.

    Returns:
        None where timm adapts all of them as it loads a checkpoint.
    """
    name, arguments = saving.recorded_call(module)
    name = name.partition(".")[0]
    try:
        call = PretrainedCall.of(TimmModel(name, {**arguments, "img_size": size}, f"timm:{name}"))
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"timm does not build {name} for it: {first}"
    old, new = module.state_dict(), call.model.state_dict()
    other = [key for key in new if key in old and old[key].shape != new[key].shape]
    values = {key: torch.zeros_like(tensor, device="cpu") if key in other else tensor for key, tensor in old.items()}
    try:
        adapted = call.run(call.model, values).tensors
    except Exception:  # it has no function for these tensors
        adapted = {}
    left = [key for key in other if key not in adapted or adapted[key].shape != new[key].shape]
    if not left:
        return None
    return (
        f"timm builds {name} for it with another {listed(left, 2)}: it has no function that carries the values of "
        f"{counted(len(left), 'tensor')} over"
    )
