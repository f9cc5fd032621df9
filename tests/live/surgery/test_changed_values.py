"""New values computed from old ones equal torch's in-place operation, on meta models and models with values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from modelcli.checkpoints import read
from modelcli.checkpoints.state_dict_model import model_of
from modelcli.errors import RequestError
from modelcli.live.describe import describe
from modelcli.live.meta_models import build_on_meta
from modelcli.live.sources import Lazy, real_tensor, tag_drawn
from modelcli.live.surgery.changed_values import change_values, change_values_of_keys, dense_tensors


class Views(nn.Module):
    """Tensors that share storages in every way: tied, adjacent, overlapping, strided, expanded."""

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
def test_changed_values_equal_an_in_place_operation(names: list[str], make: Callable[[], nn.Module]) -> None:
    expected = drawn()
    with torch.no_grad():
        for tensor in {id(t): t for t in (expected.state_dict(keep_vars=True)[name] for name in names)}.values():
            target = tensor[:1] if tensor.stride()[:1] == (0,) else tensor  # torch does not write to expanded tensors
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
def test_shared_bytes_are_changed_once(make: Callable[[], nn.Module]) -> None:
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
    assert sizes == [1]  # one zero, which tests whether torch supports the operation for this dtype
    sizes.clear()
    from modelcli.live.sources import require_source

    made = b"".join(require_source(meta.weight).chunks())
    assert made == expected.numpy().tobytes()
    assert len(sizes) > 1
    assert max(sizes) * 4 <= 8 * 1024 * 1024


# --- what cannot change ---------------------------------------------------------------------------------------------


def halved(values: torch.Tensor) -> torch.Tensor:
    return values * 0.5


def test_a_dtype_is_refused_before_anything_changes() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("count", torch.tensor(3))
    model.register_buffer("small", torch.ones(2).to(torch.float8_e4m3fn))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RequestError, match=r"count is int64, .*: its new values would be float32"):
        change_values(model, ["weight", "count"], halved)
    with pytest.raises(RequestError, match=r"small is float8_e4m3fn, .*: torch says: .*not implemented"):
        change_values(model, ["weight", "small"], lambda values: values.clamp(0, 1))
    with pytest.raises(TypeError, match="values of shape"):
        change_values(model, ["weight"], lambda values: values.sum())
    for name, value in model.state_dict().items():
        assert value.view(-1).view(torch.uint8).equal(before[name].view(-1).view(torch.uint8))


def test_conjugated_values_are_resolved_before_the_change() -> None:
    model = nn.Module()
    whole = torch.randn(3, dtype=torch.complex64)
    model.register_buffer("conjugate", whole.conj())
    change_values(model, ["conjugate"], lambda values: values * 2)
    assert torch.equal(model.conjugate, whole.conj() * 2)


def test_tensors_that_are_not_dense_are_unchanged() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))
    model.register_buffer("sparse", torch.eye(2).to_sparse())
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    assert dense_tensors(model) == ["0.weight", "0.bias"]
    weight = model[0].weight.detach().clone()
    change_values(model, names, halved)
    assert torch.equal(model[0].weight, weight * 0.5)
    assert torch.equal(model.sparse.to_dense(), torch.eye(2))


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_keys_of_tensors_that_are_not_dense_are_unchanged(folder: Path) -> None:
    torch.save({"w": torch.ones(2), "sparse": torch.eye(2).to_sparse(), "count": torch.tensor(3)}, "v.pth")
    model = model_of(read(Path("v.pth")))
    assert dense_tensors(model) == ["w", "count"]
    changed = change_values_of_keys(model, ["w", "sparse"], halved)
    assert changed.entries["sparse"] is model.entries["sparse"]
    assert changed.tensors["w"].source != model.tensors["w"].source
    with pytest.raises(RequestError, match="count is int64"):
        change_values_of_keys(model, ["w", "count"], halved)
