"""New values computed from old ones are those of torch's operation in place, on a live model and on a real one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from modelcli.live.describe import describe
from modelcli.live.meta_models import build_on_meta
from modelcli.live.sources import Lazy, real_tensor, tag_drawn
from modelcli.live.surgery.changed_values import change_values


class Views(nn.Module):
    """Tensors that share storages in every way: tied, side by side, overlapping, strided, expanded."""

    def __init__(self) -> None:
        super().__init__()
        self.alone = nn.Parameter(torch.randn(3, 5))
        self.tied = self.alone
        both = torch.randn(10)
        self.left, self.right = nn.Parameter(both[:4]), nn.Parameter(both[4:])
        grid = torch.randn(4, 6)
        self.register_buffer("grid", grid)
        self.register_buffer("column", grid[:, 1])
        self.register_buffer("turned", torch.randn(2, 3).t())
        self.register_buffer("wide", torch.randn(1, 3).expand(4, 3))
        self.register_buffer("narrow", torch.randn(7).to(torch.bfloat16))
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("empty", torch.empty(0, 2))


def drawn() -> Views:
    torch.manual_seed(5)
    return Views()


def on_meta() -> nn.Module:
    module = build_on_meta(Views)
    tag_drawn(module, Lazy(drawn))
    return module


def values(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: real_tensor(tensor).clone() for name, tensor in module.state_dict(keep_vars=True).items()}


def doubled(tensor: torch.Tensor) -> torch.Tensor:
    return tensor * 2 + 1


@pytest.mark.parametrize("make", [drawn, on_meta])
@pytest.mark.parametrize(
    "names",
    [
        ["alone"],
        ["tied", "alone"],
        ["left"],
        ["right", "left"],
        ["column"],
        ["turned"],
        ["wide"],
        ["narrow"],
        ["empty"],
    ],
    ids="+".join,
)
def test_as_in_place(names: list[str], make: Callable[[], nn.Module]) -> None:
    expected = drawn()
    with torch.no_grad():
        for tensor in {id(t): t for t in (expected.state_dict(keep_vars=True)[name] for name in names)}.values():
            target = tensor[:1] if tensor.stride()[:1] == (0,) else tensor  # torch writes to no expanded tensor
            target.copy_(doubled(target.clone()))
    module = make()
    before = describe(module)
    change_values(module, names, doubled)
    found = values(module)
    assert found.keys() == values(expected).keys()
    for name, value in values(expected).items():
        assert torch.equal(found[name], value), name
    assert describe(module).tensors == before.tensors


@pytest.mark.parametrize("make", [drawn, on_meta])
def test_bytes_that_several_show_change_once(make: Callable[[], nn.Module]) -> None:
    module = make()
    change_values(module, ["grid", "column"], doubled)
    expected = doubled(drawn().grid)
    assert torch.equal(values(module)["grid"], expected)
    assert torch.equal(values(module)["column"], expected[:, 1])


def test_a_large_tensor_is_read_in_pieces() -> None:
    module = nn.Linear(1500, 2000)
    expected = doubled(module.weight.detach().clone())
    sizes = []

    def noted(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return doubled(tensor)

    meta = build_on_meta(lambda: nn.Linear(1500, 2000))
    tag_drawn(meta, Lazy(lambda: module))
    change_values(meta, ["weight"], noted)
    assert not sizes
    from modelcli.live.sources import require_source

    made = b"".join(require_source(meta.weight).chunks())
    assert made == expected.numpy().tobytes()
    assert len(sizes) > 1
    assert max(sizes) * 4 <= 8 * 1024 * 1024
