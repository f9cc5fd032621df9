"""Folders of torch.distributed.checkpoint that modelcli writes are what torch's own `save` writes and `load` reads."""

from __future__ import annotations

import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load

import modelcli
from tests.checkpoints.test_checkpoints import ALL_DTYPES
from tests.checkpoints.test_distributed import as_torch_loads, saved
from tests.conftest import Cli
from tests.needs import each


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))


def loaded(folder: str, like: dict[str, Any]) -> dict[str, Any]:
    """What torch's `load` puts into tensors like these."""
    empty = {name: torch.zeros_like(tensor) for name, tensor in like.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that there is only one process
        load(empty, checkpoint_id=folder)
    return empty


def assert_equal(found: Any, expected: Any) -> None:
    """Require equal values; torch turns the keys of dicts into texts."""
    if isinstance(expected, dict):
        expected = {str(key): value for key, value in expected.items() if value != {}}
        found = {str(key): value for key, value in found.items()}
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_equal(found[key], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    else:
        assert found == expected


@pytest.mark.parametrize("source", ["a.pth", "a.safetensors", "shards/"])
def test_torch_loads_what_is_written_from_any_format(cli: Cli, source: str) -> None:
    state = model().state_dict()
    torch.save(state, "a.pth")
    if source != "a.pth":
        cli("save", source, "-m", "a.pth", "--max-shard-size", "100")
    done = cli("save", "out/", "-m", source, "--format-out", "dcp", "--verify")
    assert done.out.startswith("out/  dcp  9 tensors  ")
    assert_equal(loaded("out", state), dict(state))
    cli("diff", "a.pth", "out/")


def test_the_description_is_that_of_torch(cli: Cli, folder: Path) -> None:
    state = {"model": model().state_dict(), "epoch": 3, "names": ["a", "b"], "scale": torch.tensor(2.0)}
    torch.save(state, "a.pth")
    cli("save", "out/", "-m", "a.pth", "--format-out", "dcp")
    theirs = pickle.loads((saved(state, folder / "theirs") / ".metadata").read_bytes())
    ours = pickle.loads(Path("out/.metadata").read_bytes())
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.planner_data == theirs.planner_data
    assert ours.storage_data.keys() == theirs.storage_data.keys()
    assert [repr(index) for index in sorted(ours.storage_data, key=repr)] == [
        repr(index) for index in sorted(theirs.storage_data, key=repr)
    ]


SHAPES_OF_BYTES = {"a": (3, 32), "b": (0, 32)}


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", each(ALL_DTYPES))
def test_every_dtype(cli: Cli, dtype: str) -> None:
    state = {
        name: torch.zeros(shape, dtype=torch.uint8).view(getattr(torch, dtype))
        for name, shape in SHAPES_OF_BYTES.items()
    }
    torch.save(state, "a.pth")
    cli("save", "out/", "-m", "a.pth", "--format-out", "dcp")
    cli("diff", "a.pth", "out/")
    found = as_torch_loads(Path("out"))
    assert {name: (value.shape, value.dtype) for name, value in found.items()} == {
        name: (value.shape, value.dtype) for name, value in state.items()
    }


def test_a_training_checkpoint_stays_whole(cli: Cli) -> None:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.randn(5, 6)).sum().backward()
    optimizer.step()
    state = {
        "model": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "nothing": {},
        "turned": torch.randn(3, 4).t(),
        "nested": [{"a": torch.ones(2)}, [1, 2]],
    }
    torch.save(state, "a.pth")
    done = cli("save", "out/", "-m", "a.pth", "--format-out", "dcp")
    assert "torch.distributed.checkpoint holds no empty dicts: nothing left out" in done.err
    assert_equal(as_torch_loads(Path("out")), state)
    cli("rename", "0.*", "first.*", "-m", "out/", "-o", "renamed/", "--format-out", "dcp")
    renamed = as_torch_loads(Path("renamed"))
    assert_equal(renamed["optimizer"], state["optimizer"])
    assert list(renamed["model"])[:2] == ["first.weight", "first.bias"]
    cli("save", "back.pth", "-m", "out/")
    again = torch.load("back.pth", weights_only=True)
    assert_equal(again["model"], dict(net.state_dict()))
    resumed = torch.optim.AdamW(net.parameters())
    numbered = {int(key): value for key, value in again["optimizer"]["state"].items()}
    resumed.load_state_dict({**again["optimizer"], "state": numbered})
    assert_equal(resumed.state_dict(), optimizer.state_dict())


def test_files_are_limited_and_tied_tensors_are_written_once(cli: Cli) -> None:
    one = torch.randn(100)
    torch.save({"a": one, "b": torch.randn(100), "again": one, "c": torch.randn(100)}, "a.pth")
    cli("save", "out/", "-m", "a.pth", "--format-out", "dcp", "--max-shard-size", "900")
    data = pickle.loads(Path("out/.metadata").read_bytes()).storage_data
    places = {index.fqn: (info.relative_path, info.offset) for index, info in data.items()}
    assert places["a"] == places["again"]
    assert {file for file, _ in places.values()} == {"__0_0.distcp", "__0_1.distcp"}
    cli("diff", "a.pth", "out/")


def test_the_record_follows_and_is_ignored_after_another_program_wrote(cli: Cli, folder: Path) -> None:
    cli("apply", "-m", "nets.py:Net", "-e", "freeze bn", "-o", "out/", "--format-out", "dcp")
    found = modelcli.load("out/", trust=True)
    assert not found.bn.weight.requires_grad
    assert found.conv1.weight.requires_grad
    saved(dict(found.state_dict()), folder / "theirs")
    for name in (".metadata", "__0_0.distcp"):
        (folder / "out" / name).write_bytes((folder / "theirs" / name).read_bytes())
    told = cli("params", "out/").err
    assert "modelcli.json was ignored: another program has written .metadata since" in told
    Path("out/modelcli.json").write_text("{")
    assert "modelcli.json was ignored: it is no record of modelcli" in cli("params", "out/").err


def test_a_folder_of_this_format_is_replaced_as_a_whole(cli: Cli) -> None:
    state = {"a": torch.ones(100), "b": torch.ones(100)}
    save_file(state, "a.safetensors")
    cli("save", "out/", "-m", "a.safetensors", "--format-out", "dcp", "--max-shard-size", "400")
    assert len(list(Path("out").glob("*.distcp"))) == 2
    assert "exists" in cli("save", "out/", "-m", "a.safetensors", "--format-out", "dcp", code=2).err
    cli("save", "out/", "-m", "a.safetensors", "--format-out", "dcp", "--force")
    assert len(list(Path("out").glob("*.distcp"))) == 1
    cli("save", "out/", "-m", "out/", "--force")
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
    ]
    assert_equal(load_file("out/model-00001-of-00001.safetensors"), state)
    cli("save", "out/", "-m", "out/", "--force", "--format-out", "dcp")
    assert not list(Path("out").glob("*.safetensors*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("save", "out.pth", "-m", "a.pth", "--format-out", "dcp"), "hint: -o out/ --format-out dcp"),
        (("save", "out/", "-m", "a.pth", "--format-out", "dpc"), "dcp"),
        (("freeze", "a", "-m", "a.pth", "--format-out", "dcp"), "hint: -o out/ writes it"),
        (("save", "out/", "-m", "sparse.pth", "--format-out", "dcp"), "holds dense tensors only"),
        (("save", "out/", "-m", "same.pth", "--format-out", "dcp"), "would both be 'a.b'"),
    ],
)
def test_what_is_refused(cli: Cli, words: tuple[str, ...], message: str) -> None:
    torch.save({"a": torch.ones(1)}, "a.pth")
    torch.save({"a": torch.eye(2).to_sparse(), "b": torch.ones(1)}, "sparse.pth")
    torch.save({"state_dict": {"a": torch.ones(1)}, "x": {"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}}, "same.pth")
    told = cli(*words, code=2).err
    assert message.replace("'a.b'", "'x.a.b'") in " ".join(told.split())
    assert not Path("out").exists()


FSDP2 = """
import sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
torch.manual_seed(1)
model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
fully_shard(model, mesh=mesh)
state = model.state_dict()
dcp.load(state, checkpoint_id="in")
model.load_state_dict(state)
whole = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}
dcp.save(model.state_dict(), checkpoint_id="again")
if dist.get_rank() == 0:
    torch.save(whole, "whole.pth")
dist.barrier()
dist.destroy_process_group()
"""


def test_a_model_that_two_ranks_share_loads_it_and_what_they_write_is_read(cli: Cli, folder: Path) -> None:
    """Five rows do not divide by two ranks, and three not either."""
    torch.manual_seed(0)
    state = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)).state_dict()
    torch.save(state, "a.pth")
    cli("save", "in/", "-m", "a.pth", "--format-out", "dcp")
    (folder / "ranks.py").write_text(FSDP2)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "ranks.py"]
    subprocess.run(command, check=True, cwd=folder, capture_output=True, timeout=300)
    assert_equal(torch.load("whole.pth", weights_only=True), dict(state))
    cli("diff", "a.pth", "again/")
    cli("save", "back.safetensors", "-m", "again/")
    assert_equal({name: load_file("back.safetensors")[name] for name in state}, dict(state))
