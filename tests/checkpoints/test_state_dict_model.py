"""State-dict models of checkpoints of unknown architecture equal what torch loads."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from modelcli import checkpoints
from modelcli.checkpoints.state_dict_model import model_of
from modelcli.errors import RequestError
from modelcli.model.state_dict import StateDictModel
from modelcli.values.state_dict_sources import Sources


def saved(path: Path, state: Any, **how: Any) -> Path:
    torch.save(state, path, **how)
    return path


def values(model: StateDictModel) -> dict[str, torch.Tensor]:
    """Return the tensors of a model, read by torch from the sources of their bytes."""
    sources, found = Sources(), {}
    for name, tensor in model.tensors.items():
        data = torch.frombuffer(bytearray(sources.of(name, tensor).bytes()), dtype=torch.uint8)
        empty = torch.empty(0, dtype=getattr(torch, tensor.dtype))
        assert tensor.shape is not None
        found[name] = empty.set_(data.untyped_storage(), tensor.offset, tensor.shape, tensor.stride)
    return found


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_the_model_has_the_state_dict_of_the_file(tmp_path: Path, legacy: bool) -> None:
    weight = torch.randn(2, 3)
    state: dict[str, Any] = OrderedDict(
        {
            "embed.weight": weight,
            "bn.running_mean": torch.ones(3),
            "bn.num_batches_tracked": torch.tensor(3),
            "head.weight": weight,
            "complex": torch.ones(2, dtype=torch.complex64),
            "deep.er.gain": nn.Parameter(torch.ones(1), requires_grad=False),
            "deep": torch.ones(1),
            "deep._extra_state": {"n": 1},
        }
    )
    model = model_of(checkpoints.read(saved(tmp_path / "m.pth", state, _use_new_zipfile_serialization=not legacy)))
    assert set(model.entries) == set(state)
    assert model.inert["deep._extra_state"].value == {"n": 1}
    found = values(model)
    assert all(torch.equal(found[name], state[name]) for name in found)
    assert model.tensors["head.weight"].identity == model.tensors["embed.weight"].identity
    flags = {name: t.requires_grad for name, t in model.tensors.items() if t.kind == "parameter"}
    assert flags == {"embed.weight": None, "head.weight": None, "complex": None, "deep.er.gain": False, "deep": None}
    assert {name for name, t in model.tensors.items() if t.kind == "buffer"} == {
        "bn.running_mean",
        "bn.num_batches_tracked",
    }
    assert list(model.modules) == ["", "embed", "bn", "head", "deep", "deep.er"]


def test_names_with_leading_and_double_dots_stay_distinct(tmp_path: Path) -> None:
    """A module with an empty name must not be mistaken for the root: `.weight` is not `weight`."""
    names = ("weight", ".weight", "..weight", ".", "", "a.", "a..b", "a.b.")
    path = saved(tmp_path / "m.pth", {name: torch.full((1,), float(index)) for index, name in enumerate(names)})
    found = values(model_of(checkpoints.read(path)))
    assert {name: tensor.item() for name, tensor in found.items()} == {name: index for index, name in enumerate(names)}


def test_names_that_are_too_deep(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pth", {".".join("a" * 1_000): torch.ones(1)})
    with pytest.raises(RequestError, match="nested deeper"):
        model_of(checkpoints.read(path))


def test_keys_are_ordered_by_module(tmp_path: Path) -> None:
    """Modules are in the order of their first keys, each followed by those below it; parameters precede buffers."""
    names = ("b.running_mean", "a.x.weight", "b.weight", "top", "a.weight", "b.c.weight")
    path = saved(tmp_path / "m.pth", {name: torch.ones(1) for name in names})
    model = model_of(checkpoints.read(path))
    assert list(model.modules) == ["", "b", "b.c", "a", "a.x"]
    assert model.keys == ["top", "b.weight", "b.running_mean", "b.c.weight", "a.weight", "a.x.weight"]
    assert [tensor.name for tensor in model.blueprint.tensors] == model.keys


def test_a_cast_is_carried_out_when_bytes_are_read(tmp_path: Path) -> None:
    state = {"w": torch.randn(7, 3), "n": torch.arange(3)}
    model = model_of(checkpoints.read(saved(tmp_path / "m.pth", state)))
    cast = model.with_tensors(lambda tensor: tensor.cast("bfloat16"), ["w"])
    again = cast.with_tensors(lambda tensor: tensor.cast("float64"), ["w"])
    assert cast.tensors["w"].source == model.tensors["w"].source
    assert again.tensors["w"].cast_from == ("float32", "bfloat16")
    assert torch.equal(values(again)["w"], state["w"].bfloat16().double())
    assert model.tensors["w"].dtype == "float32"
