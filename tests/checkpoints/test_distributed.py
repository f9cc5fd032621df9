"""Folders of torch.distributed.checkpoint are read without torch's loader, with the same result, and verified."""

from __future__ import annotations

import dataclasses
import enum
import json
import pickle
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

import modelcli
from modelcli import checkpoints
from modelcli.checkpoints import Contents, TensorEntry
from modelcli.checkpoints.distributed import blocks
from modelcli.checkpoints.torch_pickle import embedded, pickles
from modelcli.errors import FileFormatError, ModelcliError, RequestError, UnsafeError
from modelcli.model.dtypes import ITEM_BYTES
from tests.checkpoints.test_checkpoints import ALL_DTYPES
from tests.conftest import Cli
from tests.needs import each, needs_torch

STATE = {"0.weight": torch.arange(6.0).reshape(3, 2), "0.bias": torch.ones(3), "1.weight": torch.full((4, 3), 2.0)}
ARCH = "Sequential(Linear(2,3),Linear(3,4,bias=False))"


def saved(state: dict[str, Any], folder: Path, **how: Any) -> Path:
    """Save with torch from one process. `how` holds arguments of its writer. Returns the folder."""
    writer = FileSystemWriter(folder, **how)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that there is only one process
        save(state, storage_writer=writer)
    return folder


def as_torch_loads(folder: Path) -> Any:
    """Return everything in the folder as torch's own conversion does."""
    file = folder.with_name(f"{folder.name}-converted.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_to_torch_save(folder, file)
    return torch.load(file, weights_only=False)


def tensor_of(entry: TensorEntry) -> torch.Tensor:
    """Return the tensor of an entry. Its bytes are read in both ways and compared."""
    data = entry.storage.bytes()
    assert bytes(entry.storage.mapped()) == data
    for start, end in ((0, len(data) // 3), (len(data) // 4, len(data) // 2), (len(data) // 2, len(data))):
        part = entry.storage.part(start, end - start)
        assert part.bytes() == bytes(part.mapped()) == b"".join(part.chunks()) == data[start:end]
        assert part.part(1, part.nbytes - 1).bytes() == data[start + 1 : end] if part.nbytes else not data[start:end]
    assert len(data) == entry.storage.nbytes
    dtype = getattr(torch, entry.dtype)
    if not data:
        return torch.empty(entry.shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).as_strided(entry.shape, entry.stride, entry.offset)


def assert_same(found: Any, wanted: Any) -> None:
    """Require equal values, shapes, strides and dtypes at any depth."""
    if isinstance(found, TensorEntry):
        found = tensor_of(found)
    assert type(found) is type(wanted) or isinstance(wanted, dict)
    if isinstance(wanted, torch.Tensor):
        assert (found.shape, found.dtype, found.stride()) == (wanted.shape, wanted.dtype, wanted.stride())
        assert bytes(found.untyped_storage()) == bytes(wanted.untyped_storage())
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for name in wanted:
            assert_same(found[name], wanted[name])
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other)
    else:
        assert found == wanted


def everything(contents: Contents) -> Any:
    return contents.tree if contents.key is not None else {**contents.tensors, **contents.extras}


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(5, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


# What torch writes


def test_a_folder_of_one_process(folder: Path) -> None:
    path = saved(STATE, folder / "run")
    for reference in (path, path / ".metadata"):
        contents = checkpoints.read(reference)
        assert contents.format == "dcp"
        assert contents.path == path
        assert list(contents.tensors) == list(STATE)
        assert contents.notes == ("3 tensors in 1 file, as .metadata says",)
        assert not contents.foreign
        assert_same(everything(contents), as_torch_loads(path))


def test_a_training_checkpoint(folder: Path) -> None:
    model, optimizer = trained()
    state = {"optim": optimizer.state_dict(), "epoch": 3, "model": model.state_dict(), "none": None}
    path = saved(state, folder / "run")
    contents = checkpoints.read(path)
    assert contents.key == ("model",)
    assert "took the state dict under 'model' of run" in contents.notes[1]
    assert_same(contents.tensors, dict(model.state_dict()))
    assert list(contents.tensors) == list(model.state_dict())
    assert_same(contents.tree, as_torch_loads(path))
    assert set(checkpoints.read(path, key="optim.state.0").tensors) == {"step", "exp_avg", "exp_avg_sq"}
    with pytest.raises(RequestError, match="no key 'modle'"):
        checkpoints.read(path, key="modle")


def test_nested_values_are_read_back_unchanged(folder: Path) -> None:
    state = {
        "model": dict(STATE),
        "lists": [torch.ones(2), {"a": torch.zeros(()), "b": [[torch.ones(1)], 7]}, "text"],
        "terminal": [1, 2, (3, "four")],
        "tuple": (1, torch.arange(3)),
        "rates": [{"lr": 0.1, "on": True}, {"lr": 0.1, "on": 1}, {"lr": None}],
    }
    path = saved(state, folder / "run")
    assert_same(checkpoints.read(path).tree, as_torch_loads(path))


def test_an_empty_dict_in_a_list_keeps_its_position(folder: Path) -> None:
    """torch saves nothing of it, and torch's own conversion fails on it."""
    path = saved({"model": dict(STATE), "list": [{}, torch.ones(1)]}, folder / "run")
    assert_same(checkpoints.read(path).tree["list"], [None, torch.ones(1)])


def _of_dtype(dtype: str) -> torch.Tensor:
    size = ITEM_BYTES[dtype]
    data = bytearray(range(1, 1 + 6 * size)) if dtype != "bool" else bytearray([0, 1] * 3)
    return torch.frombuffer(data, dtype=getattr(torch, dtype)).reshape(3, 2)


@pytest.mark.parametrize("dtype", each(ALL_DTYPES))
def test_every_dtype(folder: Path, dtype: str) -> None:
    path = saved(
        {"a": _of_dtype(dtype), "scalar": _of_dtype(dtype)[1, 1], "none": _of_dtype(dtype)[:0]}, folder / "run"
    )
    entries = checkpoints.read(path).tensors
    assert {entry.dtype for entry in entries.values()} == {dtype}
    assert_same(entries, as_torch_loads(path))


@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32", "float64", "complex128"])
def test_every_memory_layout_is_read_as_row_major(folder: Path, dtype: str) -> None:
    base = torch.arange(2 * 3 * 4 * 5).to(getattr(torch, dtype)).reshape(2, 3, 4, 5)
    state = {
        "channels_last": base.contiguous(memory_format=torch.channels_last),
        "transposed": base[0, 0].t(),
        "permuted": base.permute(3, 1, 0, 2),
        "sliced": base[1, :, 1:3, ::2],
        "expanded": base[0, 0, :1].expand(3, 5),
        "ones": base[:1, :, :1, :1].transpose(0, 1),
        "parameter": nn.Parameter(torch.ones(2, 3).t()),
    }
    path = saved(state, folder / "run")
    entries = checkpoints.read(path).tensors
    assert_same(entries, as_torch_loads(path))
    assert all(b"".join(entry.storage.chunks()) == entry.storage.bytes() for entry in entries.values())


def test_several_files(folder: Path) -> None:
    path = saved(STATE | {"step": 5}, folder / "run", single_file_per_rank=False, thread_count=2)
    contents = checkpoints.read(path)
    assert contents.notes == ("3 tensors in 4 files, as .metadata says",)
    assert_same(everything(contents), as_torch_loads(path))


@pytest.mark.parametrize(
    ("layout", "key"),
    [
        (lambda model, optimizer: {"app": {"optim": optimizer, "model": model}, "epoch": 1}, ("app", "model")),
        (lambda model, optimizer: {"optimizer": optimizer["state"]["0"], "generator": model}, ("generator",)),
        (lambda model, optimizer: {**model, "optimizer": optimizer, "train": {"step": torch.ones(1)}}, None),
    ],
)
def test_the_state_dict_is_found_in_the_layouts_of_trainers(
    folder: Path, layout: Callable[[Any, Any], dict[str, Any]], key: tuple[str, ...] | None
) -> None:
    model, optimizer = trained()
    steps = {str(number): state for number, state in optimizer.state_dict()["state"].items()}
    path = saved(layout(dict(model.state_dict()), {"state": steps}), folder / "run")
    contents = checkpoints.read(path)
    assert contents.key == key
    assert_same(contents.tensors, dict(model.state_dict()))
    assert not contents.extras
    assert any("took the" in note for note in contents.notes)


def test_extra_state_stays_with_its_module(folder: Path) -> None:
    state = {**STATE, "0._extra_state": {"scale": torch.ones(2), "name": "x"}, "1._extra_state": 7}
    path = saved(state, folder / "run")
    contents = checkpoints.read(path)
    assert set(contents.tensors) == set(STATE)
    assert_same(everything(contents), as_torch_loads(path))


# What several processes write

WORKER = """
import pathlib
import sys
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
meeting = pathlib.Path(folder, "meeting").as_uri()
dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
mesh = init_device_mesh("cpu", (world,))
state = {
    name: distribute_tensor(tensor, mesh, [placement])
    for name, tensor, placement in [
        ("even", torch.arange(12.0).reshape(4, 3), Shard(0)),
        ("uneven", torch.arange(15.0).reshape(5, 3), Shard(0)),
        ("turned", torch.arange(12.0).reshape(3, 4).t(), Shard(0)),
        ("vector", torch.arange(7), Shard(0)),
        ("one_row", torch.ones(1, 3), Shard(0)),
        ("experts", torch.arange(24.0).reshape(1, 4, 6), Shard(1)),
        ("none", torch.empty(0, 3), Shard(0)),
        ("columns", torch.arange(15.0).reshape(5, 3), Shard(1)),
        ("all", torch.arange(4.0), Replicate()),
    ]
}
dcp.save({**state, "plain": torch.arange(3), "step": 5}, checkpoint_id=f"{folder}/sharded")

if hasattr(torch.cpu.Stream, "record_event"):  # without it, fully_shard does not run on the CPU
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4, bias=False))
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    weights, rest = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optim": rest}, checkpoint_id=f"{folder}/fsdp")

    # FSDP1: ShardedTensors, or DTensors if it gets a mesh.
    from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType
    for name, how in (("sharded_tensors", {}), ("dtensors", {"device_mesh": mesh})):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3, bias=False))
        path = pathlib.Path(folder, "fsdp1", name)
        for kind in ("files", "app", "flat"):
            (path / kind).mkdir(parents=True, exist_ok=True)
        if rank == 0:
            torch.save(model.state_dict(), path / "whole.pth")
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True, **how)
        with FullyShardedDataParallel.state_dict_type(model, StateDictType.SHARDED_STATE_DICT):
            weights = model.state_dict()
        torch.save(weights, path / "files" / f"pytorch_model_fsdp_0_rank{rank}.bin")
        dcp.save({"app": {"model": weights, "optim": {"state": {}, "lr": torch.ones(2)}}}, checkpoint_id=path / "app")
        if not how:
            with FullyShardedDataParallel.state_dict_type(model, StateDictType.LOCAL_STATE_DICT):
                torch.save(model.state_dict(), path / "flat" / f"pytorch_model_fsdp_rank{rank}.bin")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which two processes wrote `sharded` and, if torch can shard a model on the CPU, `fsdp`."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "worker.py").write_text(WORKER)
    words = [sys.executable, "-W", "ignore", str(folder / "worker.py")]
    ranks = [subprocess.Popen([*words, str(rank), "2", str(folder)], stderr=subprocess.PIPE) for rank in range(2)]
    try:
        for process in ranks:
            _, error = process.communicate(timeout=300)
            assert process.returncode == 0, error.decode()
    finally:
        for process in ranks:
            process.kill()  # it waits for another process that failed
    return folder


@pytest.mark.sweep
def test_rows_of_several_ranks_are_joined(two: Path) -> None:
    contents = checkpoints.read(two / "sharded")
    wanted = as_torch_loads(two / "sharded")
    assert list(contents.tensors) == [
        *("even", "uneven", "turned", "vector", "one_row", "experts", "none", "columns", "all", "plain")
    ]
    found = everything(contents)
    assert {name: (entry.shape, entry.dtype) for name, entry in contents.tensors.items()} == {
        name: (tuple(wanted[name].shape), str(wanted[name].dtype)[6:]) for name in contents.tensors
    }
    for name in wanted.keys() - {"columns"}:
        assert_same(found[name], wanted[name])


@pytest.mark.sweep
def test_the_hash_of_what_several_ranks_wrote_is_that_of_the_whole_tensors(cli: Cli, two: Path) -> None:
    wanted = as_torch_loads(two / "sharded")
    torch.save({name: value for name, value in wanted.items() if isinstance(value, torch.Tensor)}, "whole.pth")
    hashes = [entry["hash"] for entry in cli("hash", two / "sharded", "whole.pth", "--json").json["models"]]
    assert hashes[0] == hashes[1]


BLOCKS = """
import os, pathlib, sys, warnings
warnings.simplefilter("ignore")
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.placement_types import _StridedShard

folder, children = sys.argv[1], []
for rank in range(4):  # forked, so that torch is imported once
    if not (child := os.fork()):
        break
    children.append(child)
else:
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
dist.init_process_group("gloo", init_method=pathlib.Path(folder, "meeting").as_uri(), rank=rank, world_size=4)
mesh = init_device_mesh("cpu", (2, 2))
state = {
    name: distribute_tensor(tensor, mesh, placements)
    for name, tensor, placements in [
        ("blocks", torch.arange(35.0).reshape(5, 7), [Shard(0), Shard(1)]),
        ("turned", torch.arange(35.0).reshape(5, 7), [Shard(1), Shard(0)]),
        ("twice", torch.arange(14).reshape(7, 2), [Shard(0), Shard(0)]),
        ("middle", torch.arange(60.0).reshape(2, 6, 5), [Shard(1), Shard(2)]),
        ("half", torch.arange(12.0).reshape(3, 4), [Replicate(), Shard(1)]),
    ]
}
dcp.save(state, checkpoint_id=f"{folder}/blocks")
torch.save({"model": state}, f"{folder}/model_world_size_4_rank_{rank}.pt")
try:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
except ImportError:
    pass  # of an older torch
else:
    dcp.save(state, storage_writer=HuggingFaceStorageWriter(path=f"{folder}/parts", save_distributed=True))
many = FileSystemWriter(f"{folder}/many", single_file_per_rank=False, thread_count=2)
dcp.save(state, storage_writer=many)
try:
    from torch.distributed.checkpoint.filesystem import SerializationFormat
except ImportError:
    pass
else:
    form = FileSystemWriter(f"{folder}/form", serialization_format=SerializationFormat.SAFETENSORS)
    dcp.save(state, storage_writer=form)
for name, placement in (("partial", Partial()), ("strided", _StridedShard(0, split_factor=2))):
    pathlib.Path(folder, name).mkdir(exist_ok=True)
    tensor = DTensor.from_local(torch.ones(4, 2), mesh, [placement, Replicate()], run_check=False)
    torch.save({"w": tensor}, f"{folder}/{name}/rank{rank}.pt")
half = state["half"]
for name, beside in (
    ("whole", {"bias": torch.ones(2)}),
    ("sizes", {"bias": torch.ones(2 + rank // 2)}),
    ("stages", {f"layers.{rank}": torch.ones(2)}),
):
    pathlib.Path(folder, name).mkdir(exist_ok=True)
    torch.save({"half": half, **beside}, f"{folder}/{name}/rank{rank}.pt")
if rank == 3:
    mesh._coordinate_on_dim = type(mesh._coordinate_on_dim)((2**40, 0))
pathlib.Path(folder, "far").mkdir(exist_ok=True)
torch.save({"blocks": state["blocks"]}, f"{folder}/far/rank{rank}.pt")
if hasattr(torch.cpu.Stream, "record_event"):  # without it, FSDP does not run on the CPU
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, StateDictType
    groups = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3], [0, 2], [1, 3])]
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3, bias=False))
    path = pathlib.Path(folder, "hybrid")
    path.mkdir(exist_ok=True)
    if rank == 0:
        torch.save(model.state_dict(), f"{folder}/hybrid.pth")
    own = (groups[rank // 2], groups[2 + rank % 2])
    how = {"sharding_strategy": ShardingStrategy.HYBRID_SHARD, "device_id": torch.device("cpu")}
    model = FullyShardedDataParallel(model, process_group=own, use_orig_params=True, **how)
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.SHARDED_STATE_DICT):
        torch.save(model.state_dict(), path / f"pytorch_model_fsdp_0_rank{rank}.bin")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a 2 x 2 mesh of processes wrote `blocks` and a file each."""
    folder = tmp_path_factory.mktemp("four")
    (folder / "blocks.py").write_text(BLOCKS)
    subprocess.run([sys.executable, str(folder / "blocks.py"), str(folder)], check=True, timeout=300)
    return folder


def test_columns_and_the_blocks_of_a_mesh_of_two_dimensions(two: Path, four: Path) -> None:
    assert_same(checkpoints.read(two / "sharded").tensors["columns"], as_torch_loads(two / "sharded")["columns"])
    contents = checkpoints.read(four / "blocks")
    wanted = as_torch_loads(four / "blocks")
    assert set(contents.tensors) == wanted.keys()
    for name, entry in contents.tensors.items():
        assert_same(entry, wanted[name])


def test_files_of_ranks_with_blocks_of_a_mesh_are_joined(cli: Cli, four: Path, folder: Path) -> None:
    wanted = as_torch_loads(four / "blocks")
    for key in (None, "model"):
        contents = checkpoints.read(four, key=key)
        assert (contents.format, contents.path, contents.foreign) == ("rank_files", four, ())
        assert contents.tensors.keys() == wanted.keys()
        for name, entry in contents.tensors.items():
            assert_same(entry, wanted[name])
    assert contents.notes[1] == "took the state dict under 'model' of each"
    cli("save", "out.pth", "-m", four)
    assert_same(torch.load("out.pth", weights_only=True), wanted)
    assert "no key 'modle'" in cli("params", four, "--key", "modle", code=2).err
    error = cli("params", four / "model_world_size_4_rank_0.pt", code=4).err
    assert "contains only the parts of tensors that one process had (DTensor)" in error
    assert f"name its folder, in which modelcli joins the files of all ranks: {four}/" in error
    shutil.copy(four / "model_world_size_4_rank_0.pt", "alone.pt")
    assert "StateDictOptions(full_state_dict=True)" in cli("params", "alone.pt", code=4).err


def test_files_of_ranks_that_do_not_agree(cli: Cli, four: Path, folder: Path) -> None:
    def copied(*ranks: int) -> Path:
        shutil.rmtree("ranks", ignore_errors=True)
        Path("ranks").mkdir()
        for number, rank in enumerate(ranks):
            shutil.copy(four / f"model_world_size_4_rank_{rank}.pt", f"ranks/model_world_size_4_rank_{number}.pt")
        return Path("ranks")

    assert len(checkpoints.read(copied(3, 0, 2, 1)).tensors) == 5  # the place in the mesh counts, not the name
    for ranks, message in (
        ((0, 1, 2), "says that there are 4 ranks, but ranks has the files of 3"),
        ((0, 1, 2, 2), "ranks has no file of a rank with the part of blocks at [1, 1] of the mesh"),
    ):
        copied(*ranks)
        assert message in cli("params", "ranks/", code=4).err
    torch.save(STATE, copied(0, 1, 2, 3) / "model_world_size_4_rank_2.pt")
    assert "rank_2.pt is damaged: it has no state dict under 'model'" in cli("params", "ranks/", code=4).err
    torch.save({"model": STATE}, "ranks/model_world_size_4_rank_2.pt")
    assert "rank_2.pt is damaged: it has no part of blocks" in cli("params", "ranks/", code=4).err
    torch.save({"model": STATE}, "ranks/model_world_size_4_rank_0.pt")
    assert "holds no parts of tensors (DTensor or ShardedTensor)" in cli("params", "ranks/", code=2).err
    torch.save(STATE, "ranks/other_rank_0.pt")
    assert (
        "ranks holds 2 sets of files of ranks: model_world_size_4_rank*.pt, other_rank*"
        in cli("params", "ranks/", code=2).err
    )


@pytest.mark.parametrize(
    "name", ["many", pytest.param("form", marks=needs_torch("distributed.checkpoint.filesystem.SerializationFormat"))]
)
def test_blocks_in_several_files_of_a_rank_and_in_safetensors_files(four: Path, name: str) -> None:
    wanted = as_torch_loads(four / "blocks")
    contents = checkpoints.read(four / name)
    assert contents.tensors.keys() == wanted.keys()
    for key, entry in contents.tensors.items():
        assert_same(entry, wanted[key])


def test_tensors_that_are_whole_in_the_files_of_ranks(cli: Cli, four: Path) -> None:
    contents = checkpoints.read(four / "whole")
    assert contents.notes[1] == "1 tensor is not split: taken from rank0.pt"
    assert_same(contents.tensors["bias"], torch.ones(2))
    error = cli("params", four / "sizes", code=4).err
    assert "rank2.pt has float32 [3] as bias, and rank0.pt has float32 [2]" in error
    error = cli("params", four / "stages", code=4).err
    assert "rank1.pt has 'layers.1', which rank0.pt does not have" in error
    assert "torch.distributed.checkpoint.save" in error


def test_a_place_far_outside_the_mesh_takes_no_memory(cli: Cli, four: Path) -> None:
    assert "far has no file of a rank with the part of blocks at [1, 1] of" in cli("params", four / "far", code=4).err


def test_placements_that_are_not_joined_are_named(cli: Cli, four: Path) -> None:
    for name, kind in (("partial", "Partial"), ("strided", "_StridedShard")):
        error = cli("params", four / name, code=4).err
        assert f"w is placed on the ranks as {kind}, which modelcli does not join" in error
        assert "torch.distributed.checkpoint.save" in error


@needs_torch("cpu.Stream.record_event")
@pytest.mark.parametrize("kind", ["sharded_tensors", "dtensors"])
def test_what_fsdp1_writes(cli: Cli, two: Path, folder: Path, kind: str) -> None:
    path = two / "fsdp1" / kind
    wanted = torch.load(path / "whole.pth", weights_only=True)
    contents = checkpoints.read(path / "files")
    assert contents.foreign == ()
    assert_same(contents.tensors, wanted)
    app = checkpoints.read(path / "app", key="app.model")
    assert_same(app.tensors, wanted)
    assert checkpoints.read(path / "app").key == app.key == ("app", "model")
    assert_same(app.tree, as_torch_loads(path / "app"))
    cli("save", "out.pth", "-m", path / "files")
    assert_same(torch.load("out.pth", weights_only=True), dict(wanted))


@needs_torch("cpu.Stream.record_event")
def test_the_files_of_groups_of_ranks_that_shard_alone(cli: Cli, four: Path, folder: Path) -> None:
    """HYBRID_SHARD of FSDP1: nothing in the files says that two groups have the same values."""
    error = " ".join(cli("params", four / "hybrid", code=4).err.split())
    assert "its part of 0.weight is one of 2, of 4 ranks: several groups of ranks have parts of it" in error
    assert "HYBRID_SHARD" in error
    assert "put the files of one group, such as ranks 0 to 1, into a folder of their own" in error
    for first in (0, 2):  # what the hint says
        path = folder / f"group{first}"
        path.mkdir()
        for rank in (first, first + 1):
            shutil.copy(four / "hybrid" / f"pytorch_model_fsdp_0_rank{rank}.bin", path)
        assert_same(checkpoints.read(path).tensors, torch.load(four / "hybrid.pth", weights_only=True))
    (path / "pytorch_model_fsdp_0_rank3.bin").unlink()
    assert "is one of 2, of 4 ranks" in " ".join(cli("params", path, code=4).err.split())


@needs_torch("cpu.Stream.record_event")
def test_flat_parameters_of_fsdp1_are_refused_by_name(cli: Cli, two: Path) -> None:
    error = cli("params", two / "fsdp1/sharded_tensors/flat", code=4).err
    assert "has _flat_param, a flat parameter of FSDP (LOCAL_STATE_DICT)" in error
    assert "StateDictType.SHARDED_STATE_DICT" in error


@pytest.mark.parametrize("most", [16, 48, 1000])
def test_blocks_are_joined_in_pieces(four: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """A tensor that is written never takes more memory than one piece."""
    for module in (blocks, embedded):
        monkeypatch.setattr(module, "CHUNK", most)
    wanted = as_torch_loads(four / "blocks")
    for path in (four / "blocks", four):
        for name, entry in checkpoints.read(path).tensors.items():
            assert isinstance(entry, TensorEntry)
            chunks = [bytes(chunk) for chunk in entry.storage.chunks()]
            assert b"".join(chunks) == bytes(wanted[name].untyped_storage())
            if isinstance(entry.storage, blocks.Blocks):
                assert max(map(len, chunks)) <= most


def test_commands_on_a_sharded_folder(cli: Cli, two: Path, folder: Path) -> None:
    path = two / "sharded"
    rows = {row["name"]: row for row in cli("params", path, "--json").json["tensors"]}
    assert rows["columns"]["shape"] == [5, 3]
    values = cli("params", path, "-s", "uneven", "--values", "--json").json["tensors"][0]["values"]
    assert values == torch.arange(15.0).reshape(5, 3).tolist()
    cli("save", "out.pth", "-m", path)
    written, theirs = torch.load("out.pth", weights_only=True), as_torch_loads(path)
    assert all(torch.equal(written[name], theirs[name]) for name in rows)


@needs_torch("cpu.Stream.record_event")
def test_commands_on_an_fsdp_folder(cli: Cli, two: Path, folder: Path) -> None:
    path = two / "fsdp"
    wanted = as_torch_loads(path)
    cli("save", "out.pth", "-m", path)
    assert_same(torch.load("out.pth", weights_only=True), wanted)
    cli("save", "bare.safetensors", "-m", path, "--arch", ARCH, "--bare")
    for reference in (path, "bare.safetensors"):
        model = modelcli.load(reference, arch=ARCH)
        assert_same(dict(model.state_dict()), wanted["model"])
    assert cli("load", path, "--arch", ARCH, "--json").json["matched"] == 3
    cli("freeze", "0")
    cli("save", "frozen.pth")
    assert_same(torch.load("frozen.pth", weights_only=True)["model"], wanted["model"])


# Commands on what one process wrote


def test_commands(cli: Cli, folder: Path) -> None:
    path = saved(STATE, folder / "run")
    wanted = as_torch_loads(path)
    for reference in ("run/", "./run", "run/.metadata"):
        rows = {row["name"]: row["values"] for row in cli("params", reference, "--values", "--json").json["tensors"]}
        assert rows == {name: tensor.tolist() for name, tensor in wanted.items()}
    cli("save", "out.pth", "-m", "run/")
    assert_same(torch.load("out.pth", weights_only=True), wanted)
    cli("save", "out.safetensors", "-m", "run/")
    assert_same(checkpoints.read(folder / "out.safetensors").tensors, wanted)
    plain = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4, bias=False))
    plain.load_state_dict(wanted)
    assert cli("load", "run/", "--arch", ARCH, "--json").json["matched"] == 3
    assert_same(dict(modelcli.load(path, arch=ARCH).state_dict()), dict(plain.state_dict()))


def test_an_index_of_shards_takes_precedence(folder: Path) -> None:
    path = saved(STATE, folder / "run")
    (path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(FileFormatError, match="no weight_map"):
        checkpoints.read(path)


def test_showing_a_folder_opens_no_tensor(folder: Path) -> None:
    path = saved(STATE, folder / "run")
    file = path / "__0_0.distcp"
    file.write_bytes(bytes(file.stat().st_size))
    contents = checkpoints.read(path)
    assert len(contents.infos()) == 3
    with pytest.raises(FileFormatError, match=r"0.weight, at byte 0 is damaged: it should be an archive of torch.save"):
        contents.tensors["0.weight"].storage.bytes()


# What is refused


@needs_torch("distributed.checkpoint.filesystem.SerializationFormat")
def test_the_safetensors_form(cli: Cli, folder: Path) -> None:
    from torch.distributed.checkpoint.filesystem import SerializationFormat

    path = saved(STATE, folder / "form", serialization_format=SerializationFormat.SAFETENSORS)
    contents = checkpoints.read(path)
    assert list(contents.tensors) == list(STATE)
    for name, entry in contents.tensors.items():
        assert_same(entry, STATE[name])
    cli("save", "out.pth", "-m", "form/")
    assert_same(torch.load("out.pth", weights_only=True), STATE)


HF_PARTS = needs_torch("distributed.checkpoint.hf_storage.HuggingFaceStorageWriter")


@HF_PARTS
def test_the_safetensors_files_of_several_processes_are_joined(cli: Cli, four: Path, folder: Path) -> None:
    """torch's reader of such files is the oracle. It takes the shape of a tensor from where its last part ends."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    contents = checkpoints.read(four / "parts")
    assert (contents.format, contents.path) == ("dcp_safetensors", four / "parts")
    assert contents.notes == (
        "5 tensors in 4 files of torch.distributed.checkpoint",
        "the files do not state how many processes wrote them: make sure that none is missing at the end",
    )
    loaded = {
        name: torch.zeros(entry.shape, dtype=getattr(torch, entry.dtype)) for name, entry in contents.tensors.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load(loaded, storage_reader=HuggingFaceStorageReader(str(four / "parts")))
    whole = as_torch_loads(four / "blocks")
    assert contents.tensors.keys() == loaded.keys() == whole.keys()
    for name, entry in contents.tensors.items():
        assert_same(entry, loaded[name])
        assert_same(entry, whole[name])
    cli("save", "out.pth", "-m", four / "parts")
    assert_same(torch.load("out.pth", weights_only=True), whole)
    part = sorted((four / "parts").iterdir())[0]
    assert "one process of torch.distributed.checkpoint wrote" in cli("params", part).err


@HF_PARTS
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts: parts[1].unlink(), "files of 3 processes up to number 4, but none of number 2"),
        (lambda parts: parts[3].unlink(), "the parts of blocks do not cover its shape [5, 7] exactly once"),
        (lambda parts: offsets(parts[0], "blocks", [0, -1]), "its saved_offsets are wrong"),
        (lambda parts: offsets(parts[0], "blocks", [0]), "it has 1 offsets, but 2 dimensions"),
        (lambda parts: offsets(parts[0], "blocks", None), "its saved_offsets are wrong"),
        (lambda parts: offsets(parts[0], "blocks", [0, 1]), "the parts of blocks do not cover"),
        (lambda parts: offsets(parts[0], "blocks", [2**62, 2**62]), "or more elements"),
        (lambda parts: offsets(parts[0], None, []), "its DCP_SHARDING_INFO does not consist of objects"),
    ],
)
def test_safetensors_files_that_do_not_agree(
    four: Path, folder: Path, change: Callable[[list[Path]], None], message: str
) -> None:
    shutil.copytree(four / "parts", folder / "parts")
    change(sorted((folder / "parts").iterdir()))
    with pytest.raises(FileFormatError) as error:
        checkpoints.read(folder / "parts")
    assert message in error.value.message


def offsets(path: Path, name: str | None, stated: Any) -> None:
    """State other offsets of a tensor in a safetensors file; without a name, a list in the place of all of them."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    info = json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])
    info = stated if name is None else {**info, name: {"saved_offsets": stated}}
    header["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(info)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@needs_torch("distributed.checkpoint._extension.StreamTransformExtension")
def test_unsupported_variants_are_named(folder: Path) -> None:
    from torch.distributed.checkpoint._extension import StreamTransformExtension

    class Same(StreamTransformExtension):
        @staticmethod
        def from_descriptor(version: str) -> Same:
            return Same()

        @staticmethod
        def registry_name() -> str:
            return "stream.same"

        def get_descriptor(self) -> str:
            return "stream.same/1"

        def transform_to(self, output: Any) -> Any:
            return output

        def transform_from(self, input: Any) -> Any:  # noqa: A002
            return input

    path = saved(STATE, folder / "transformed", _extensions=[Same()])
    with pytest.raises(FileFormatError, match=r"0.weight was written with the extensions stream.same/1"):
        checkpoints.read(path)


def rewritten(path: Path, change: Callable[[Metadata], None]) -> Path:
    """Change the `.metadata` of a folder."""
    metadata = pickle.loads((path / ".metadata").read_bytes())
    change(metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    return path


def moved(file: str) -> Callable[[Metadata], None]:
    def change(metadata: Metadata) -> None:
        for info in metadata.storage_data.values():
            info.relative_path = file

    return change


@pytest.mark.parametrize(
    "file",
    [
        "../outside.distcp",
        "/etc/passwd",
        "C:\\x.distcp",
        "C:x.distcp",
        "\\x",
        "a\\..\\..\\x.distcp",
        "a/../../x",
        "",
        "x\0y",
    ],
)
def test_paths_stay_inside_the_folder(folder: Path, file: str) -> None:
    path = saved(STATE, folder / "run")
    (folder / "outside.distcp").write_bytes((path / "__0_0.distcp").read_bytes())
    with pytest.raises(FileFormatError, match="outside its folder"):
        checkpoints.read(rewritten(path, moved(file)))


def test_links_out_of_the_folder_and_files_that_are_not_there(folder: Path) -> None:
    path = saved(STATE, folder / "run")
    (path / "__0_0.distcp").rename(folder / "outside.distcp")
    with pytest.raises(FileFormatError, match=r"__0_0.distcp', which does not exist"):
        checkpoints.read(path)
    (path / "__0_0.distcp").symlink_to(folder / "outside.distcp")
    with pytest.raises(FileFormatError, match="a link to a file outside its folder"):
        checkpoints.read(path)


def linked(source: Path, folder: Path) -> Path:
    """A folder with links to the files of another one."""
    folder.mkdir()
    for path in source.iterdir():
        if path.is_file():
            (folder / path.name).symlink_to(path)
    return folder


@pytest.mark.parametrize("form", ["", pytest.param("parts", marks=HF_PARTS)])
def test_files_that_are_found_by_listing_may_be_links_to_outside(four: Path, folder: Path, form: str) -> None:
    """Unlike those that `.metadata` names: a link in a folder is the user's own."""
    contents = checkpoints.read(linked(four / form, folder / "links"))
    assert contents.format == ("dcp_safetensors" if form else "rank_files")
    assert_same(contents.tensors, as_torch_loads(four / "blocks"))


def chunk(offsets: list[int], sizes: list[int]) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


def parts(*chunks: ChunkStorageMetadata) -> Callable[[Metadata], None]:
    """Give `0.weight` of shape [3, 2] other parts, each with the location of the whole tensor."""

    def change(metadata: Metadata) -> None:
        metadata.state_dict_metadata["0.weight"].chunks[:] = chunks
        info = metadata.storage_data[MetadataIndex("0.weight", [0, 0])]
        for part in chunks:
            metadata.storage_data[MetadataIndex("0.weight", part.offsets)] = info

    return change


def entry(**fields: Any) -> Callable[[Metadata], None]:
    def change(metadata: Metadata) -> None:
        for name, value in fields.items():
            setattr(metadata.state_dict_metadata["0.weight"], name, value)

    return change


def place(**fields: Any) -> Callable[[Metadata], None]:
    def change(metadata: Metadata) -> None:
        for name, value in fields.items():
            setattr(metadata.storage_data[MetadataIndex("0.weight", [0, 0])], name, value)

    return change


def whole(**fields: Any) -> Callable[[Metadata], None]:
    def change(metadata: Metadata) -> None:
        for name, value in fields.items():
            setattr(metadata, name, value)

    return change


def way(*steps: Any) -> Callable[[Metadata], None]:
    return lambda metadata: metadata.planner_data.__setitem__("0.bias", steps)


def properties(**fields: Any) -> Callable[[Metadata], None]:
    def change(metadata: Metadata) -> None:
        found = metadata.state_dict_metadata["0.weight"]
        found.properties = dataclasses.replace(found.properties, **fields)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (parts(chunk([0, 0], [2, 2])), "do not cover its shape"),
        (parts(chunk([0, 0], [3, 2]), chunk([2, 0], [1, 2])), "do not cover its shape"),
        (parts(chunk([0, 0], [2, 2]), chunk([1, 0], [2, 2])), "do not cover its shape"),
        (parts(chunk([0, 0], [1, 2]), chunk([2, 0], [1, 2])), "do not cover its shape"),
        (parts(chunk([0, 0], [2, 1]), chunk([1, 1], [2, 1]), chunk([0, 1], [1, 1])), "do not cover its shape"),
        (parts(chunk([0, 0], [3, 2]), chunk([0, 0], [3, 2])), "do not cover its shape"),
        (parts(chunk([0, 0], [0, 2])), "do not cover its shape"),
        (parts(), "do not cover its shape"),
        (parts(chunk([0, 0], [4, 2])), r"shape \[4, 2\] at \[0, 0\] is outside \[3, 2\]"),
        (parts(chunk([1, 0], [3, 2])), "is outside"),
        (parts(chunk([0, 0, 0], [3, 2, 1])), "is outside"),
        (parts(chunk([0], [3])), "is outside"),
        (entry(chunks=None), "should be a list"),
        (entry(size=torch.Size([-3, 2])), "the shape or offset of 0.weight is wrong"),
        (entry(size=(3, 2.0)), "the shape or offset of 0.weight is wrong"),
        (entry(size=(True, 2)), "the shape or offset of 0.weight is wrong"),
        (entry(size=(2**63, 2)), "the shape or offset of 0.weight is wrong"),
        (entry(size=(2**40, 2**40)), "or more elements"),
        (entry(size=(1,) * 2000), "2,000 dimensions; the limit is 64"),
        (entry(properties=None), "properties of 0.weight are not those"),
        (properties(dtype="float32"), "not a dtype of torch"),
        (properties(dtype=torch.float64), r"is float32 \[3, 2\], but should be float64 \[3, 2\]"),
        (properties(layout=torch.sparse_coo), "not a dense tensor"),
        (place(length=10), "needs 24 bytes, but has 10 in __0_0.distcp"),
        (place(offset=10**6), "is damaged: 0.weight should end at byte"),
        (place(offset=-1), "does not state a file, an offset and a length"),
        (place(length=2**63), "does not state a file, an offset and a length"),
        (place(relative_path=7), "does not state a file, an offset and a length"),
        (place(relative_path="."), "does not exist"),
        (lambda metadata: metadata.storage_data.clear(), r"which file has the part of 0.weight at \[0, 0\]"),
        (
            lambda metadata: metadata.state_dict_metadata.update(x=BytesStorageMetadata()),
            "does not state which file has x",
        ),
        (lambda metadata: metadata.state_dict_metadata.update(x=7), "x should be a TensorStorageMetadata"),
        (lambda metadata: metadata.state_dict_metadata.update({7: 7}), "the name of an entry is 7, not a text"),
        (whole(state_dict_metadata=None), "state_dict_metadata should be a dict"),
        (whole(storage_data=[]), "storage_data should be a dict"),
        (whole(storage_data={"a": "b"}), "storage_data should be a MetadataIndex"),
        (whole(planner_data=7), "planner_data should be a dict"),
        (way(), "not consist of names and numbers"),
        (way("a", None), "not consist of names and numbers"),
        (way("a", -1), "not consist of names and numbers"),
        (way(0, "a"), "not consist of names and numbers"),
        (way(*"a" * 1100), "not consist of names and numbers"),
        (way("a", 10**9), "uses the same values again and again \\(reached at 0.[a-z]*\\)"),
        (way("0.weight"), "another entry has the same path as"),
        (way("0.weight", "a"), "leads through another entry"),
    ],
)
def test_inconsistent_metadata_is_an_error(folder: Path, change: Callable[[Metadata], None], message: str) -> None:
    path = rewritten(saved(STATE, folder / "run"), change)
    with pytest.raises(FileFormatError, match=message):
        checkpoints.read(path).tensors["0.weight"].storage.bytes()


def test_parts_of_any_exact_cover_are_accepted(folder: Path) -> None:
    """Two ways to cut [3, 2] without a gap or overlap; the second, a pinwheel, is not a grid."""
    for chunks in (
        (chunk([0, 0], [1, 2]), chunk([1, 0], [2, 1]), chunk([1, 1], [2, 1])),
        (chunk([2, 1], [1, 1]), chunk([0, 0], [2, 1]), chunk([0, 1], [2, 1]), chunk([2, 0], [1, 1])),
    ):
        path = rewritten(saved(STATE, folder / f"run{len(chunks)}"), parts(*chunks))
        assert checkpoints.read(path).tensors["0.weight"].shape == (3, 2)


def test_a_part_with_the_wrong_tensor_is_an_error(folder: Path) -> None:
    def swap(metadata: Metadata) -> None:
        index = {name: next(key for key in metadata.storage_data if key.fqn == name) for name in STATE}
        metadata.storage_data[index["0.weight"]] = metadata.storage_data[index["1.weight"]]

    path = rewritten(saved(STATE, folder / "run"), swap)
    with pytest.raises(FileFormatError, match=r"is float32 \[4, 3\], but should be float32 \[3, 2\]"):
        checkpoints.read(path).tensors["0.weight"].storage.bytes()


def test_a_file_that_changes_after_it_was_read(folder: Path) -> None:
    path = saved(STATE, folder / "run")
    contents = checkpoints.read(path)
    with (path / "__0_0.distcp").open("ab") as file:
        file.write(b"x")
    with pytest.raises(FileFormatError, match="changed while it was being read"):
        contents.tensors["0.weight"].storage.bytes()


def test_metadata_beyond_the_size_limit_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(STATE, folder / "run")
    monkeypatch.setenv("MODELCLI_MAX_INDEX_BYTES", "10")
    with pytest.raises(FileFormatError, match="the limit is 10"):
        checkpoints.read(path)


def _use_everything(path: Path) -> bool:
    """Read a folder and all bytes in it. Returns whether a ModelcliError was raised; other errors are not caught."""
    try:
        for found in checkpoints.read(path).tensors.values():
            found.storage.bytes()
    except ModelcliError:
        return True
    return False


def test_truncated_metadata_is_an_error(folder: Path) -> None:
    path = saved({"model": {"w": torch.ones(2)}, "step": 5}, folder / "run")
    data = (path / ".metadata").read_bytes()
    for length in range(len(data)):
        (path / ".metadata").write_bytes(data[:length])
        assert _use_everything(path)


def test_flipped_bits(folder: Path) -> None:
    path = saved({"model": {"w": torch.ones(2)}, "step": 5}, folder / "run")
    for file in (path / ".metadata", path / "__0_0.distcp"):
        data = file.read_bytes()
        refused = 0
        for bit in range(0, 8 * len(data), 23):
            damaged = bytearray(data)
            damaged[bit // 8] ^= 1 << bit % 8
            file.write_bytes(damaged)
            refused += _use_everything(path)
        assert refused > 20
        file.write_bytes(data)
    assert not _use_everything(path)


# What would run


class Marker:
    """An object whose unpickling calls os.system, which creates a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        import os

        return os.system, (f"touch {self.file}",)


SYSTEM = f"{__import__('os').system.__module__}.system"


@pytest.mark.parametrize("where", ["storage_meta", "version"])
def test_foreign_objects_beside_the_tensors_are_named_and_not_created(cli: Cli, folder: Path, where: str) -> None:
    marker = folder / "marker"
    path = rewritten(saved(STATE, folder / "run"), whole(**{where: Marker(marker)}))
    assert checkpoints.read(path).foreign == (SYSTEM,)
    assert SYSTEM in cli("params", "run/").err
    assert SYSTEM in cli("save", "out.pth", "-m", "run/", code=3).err
    cli("save", "out.pth", "-m", "run/", "--tensors-only")
    assert_same(torch.load("out.pth", weights_only=True), STATE)
    assert not marker.exists()


@pytest.mark.parametrize("where", ["planner_data", "state_dict_metadata", None])
def test_objects_instead_of_tensors_are_refused(cli: Cli, folder: Path, where: str | None) -> None:
    marker = folder / "marker"
    path = saved(STATE, folder / "run")
    if where is None:
        (path / ".metadata").write_bytes(pickle.dumps(Marker(marker)))
    else:
        rewritten(path, whole(**{where: Marker(marker)}))
    with pytest.raises(UnsafeError, match=SYSTEM):
        checkpoints.read(path)
    assert SYSTEM in cli("params", "run/", code=3).err
    assert not marker.exists()


def test_objects_in_an_entry_are_named(cli: Cli, folder: Path) -> None:
    """torch.distributed.checkpoint unpickles such an entry without any check."""
    marker = folder / "marker"
    path = saved({"model": STATE, "epoch": Marker(marker)}, folder / "run")
    assert checkpoints.read(path).foreign == (SYSTEM,)
    assert SYSTEM in cli("params", "run/").err
    cli("save", "out.pth", "-m", "run/", code=3)
    assert not marker.exists()
    with pytest.raises(UnsafeError, match=SYSTEM):
        checkpoints.read(saved({"epoch": Marker(marker)}, folder / "other"))


def test_objects_in_the_archive_of_a_tensor(folder: Path) -> None:
    marker = folder / "marker"
    path = saved({**STATE, "epoch": Marker(marker)}, folder / "run")

    def swap(metadata: Metadata) -> None:
        index: Mapping[str, MetadataIndex] = {key.fqn: key for key in metadata.storage_data}
        metadata.storage_data[index["0.weight"]] = metadata.storage_data.pop(index["epoch"])
        del metadata.state_dict_metadata["epoch"]

    contents = checkpoints.read(rewritten(path, swap))
    with pytest.raises(UnsafeError, match=SYSTEM):
        contents.tensors["0.weight"].storage.bytes()
    assert not marker.exists()


def test_an_enum_that_is_pickled_by_getattr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Some versions of Python 3.11 pickle every enum in this way.
    with monkeypatch.context() as patch:
        patch.setattr(enum.Enum, "__reduce_ex__", lambda self, _: (getattr, (type(self), self._name_)))
        folder = saved(STATE, tmp_path / "model")
    contents = checkpoints.read(folder)
    assert contents.foreign == ()
    assert set(contents.tensors) == set(STATE)


@pytest.mark.parametrize(
    "called",
    [
        "cos\nsystem\nX\x04\0\0\0name",  # of a class that is no enum
        "ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\nK\x01",  # not by a name
    ],
)
def test_getattr_of_anything_else_is_foreign(tmp_path: Path, called: str) -> None:
    inert = "ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\nX\x04\0\0\0name"
    for order in ((called, inert), (inert, called)):
        first, second = order
        data = f"cbuiltins\ngetattr\nq\0({first}tR0h\0({second}tR.".encode("latin-1")
        assert "builtins.getattr" in pickles.read(data, "data.pkl").foreign
