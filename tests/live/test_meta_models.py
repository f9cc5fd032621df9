"""Models on the meta device: what only fills tensors is left out, and what can be wrong is not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from modelcli.errors import RequestError
from modelcli.live import modules
from modelcli.live.meta_models import build_on_meta


class Operators(TorchDispatchMode):
    """Records the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.add(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


def drawn() -> nn.Module:
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.normal_(std=0.02).clamp_(-2, 2)
        layer.bias.zero_()
    return layer


def test_nothing_is_drawn_where_there_are_no_values() -> None:
    with Operators() as seen:
        made = build_on_meta(drawn)
    weight = made.get_parameter("weight")
    assert (weight.is_meta, weight.requires_grad, weight.shape) == (True, True, (2, 3))
    assert not {"aten.normal_", "aten.clamp_", "aten.zero_"} & seen.names
    with Operators() as seen:
        drawn()
    assert {"aten.normal_", "aten.clamp_", "aten.zero_"} <= seen.names  # the names are torch's


def scaled_by_another_tensor() -> nn.Module:
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.mul_(torch.ones(5))
    return layer


def filled_with_gradients() -> nn.Module:
    layer = nn.Linear(3, 2)
    layer.weight.fill_(1)
    return layer


@pytest.mark.parametrize("make", [scaled_by_another_tensor, filled_with_gradients])
def test_what_torch_refuses_is_refused(make: object) -> None:
    with pytest.raises(RuntimeError):
        make()  # type: ignore[operator]
    with pytest.raises(RequestError, match=r"size|leaf"):
        build_on_meta(lambda: modules.construct(make, [], {}, "it"))  # type: ignore[arg-type]
