"""A program that saves an FSDP2 model with `torch.distributed.checkpoint`, or loads one and compares it, on gloo.

    fsdp.py 2 save FOLDER
    fsdp.py 3 compare FOLDER DTYPE PREFIX

It starts so many ranks, which make the same model from a seed. `compare` loads a checkpoint of it whose values were
cast to DTYPE and whose keys begin with PREFIX, each rank its shards, and demands that the whole tensors are equal. The
ranks are forked: each would need seconds to import torch.
"""

from __future__ import annotations

import multiprocessing
import socket
import sys
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(33, 50), nn.LayerNorm(50), nn.Sequential(nn.Linear(50, 7, bias=False)))


def run(rank: int, size: int, port: int, what: str, folder: str, *more: str) -> None:
    warnings.filterwarnings("ignore")
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", port, size, is_master=rank == 0
    )
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    sharded = model()
    if what == "compare":
        sharded.to(getattr(torch, more[0]))
    for module in sharded.children():
        fully_shard(module, mesh=mesh)
    state = sharded.state_dict()
    assert all(isinstance(value, DTensor) for value in state.values())
    if what == "save":
        save(state, checkpoint_id=folder)
    else:
        dtype, prefix = getattr(torch, more[0]), more[1]
        for value in state.values():
            value.to_local().zero_()
        load({f"{prefix}{name}": value for name, value in state.items()}, checkpoint_id=folder)
        for name, value in model().state_dict().items():
            assert torch.equal(state[name].full_tensor(), value.to(dtype)), name
        if dist.get_rank() == 0:
            print("equal")
    dist.destroy_process_group()


def main() -> None:
    size = int(sys.argv[1])
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    forking = multiprocessing.get_context("fork")
    ranks = [forking.Process(target=run, args=(rank, size, port, *sys.argv[2:])) for rank in range(size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in ranks))


if __name__ == "__main__":
    main()
