"""New values that a function computes from the old ones, for both kinds of model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from modelcli.checkpoints import read
from modelcli.checkpoints.state_dict_model import model_of
from modelcli.errors import RequestError
from modelcli.live.surgery.changed_values import change_values, change_values_of_keys, dense_tensors


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


def test_conjugated_values_are_changed_as_they_are_seen() -> None:
    model = nn.Module()
    whole = torch.randn(3, dtype=torch.complex64)
    model.register_buffer("conjugate", whole.conj())
    change_values(model, ["conjugate"], lambda values: values * 2)
    assert torch.equal(model.conjugate, whole.conj() * 2)


def test_what_is_not_dense_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))
    model.register_buffer("sparse", torch.eye(2).to_sparse())
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    assert dense_tensors(model) == ["0.weight", "0.bias"]
    weight = model[0].weight.detach().clone()
    change_values(model, names, halved)
    assert torch.equal(model[0].weight, weight * 0.5)
    assert torch.equal(model.sparse.to_dense(), torch.eye(2))


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_keys_that_are_not_dense_are_left_alone(folder: Path) -> None:
    torch.save({"w": torch.ones(2), "sparse": torch.eye(2).to_sparse(), "count": torch.tensor(3)}, "v.pth")
    model = model_of(read(Path("v.pth")))
    assert dense_tensors(model) == ["w", "count"]
    changed = change_values_of_keys(model, ["w", "sparse"], halved)
    assert changed.entries["sparse"] is model.entries["sparse"]
    assert changed.tensors["w"].source != model.tensors["w"].source
    with pytest.raises(RequestError, match="count is int64"):
        change_values_of_keys(model, ["w", "count"], halved)
