"""modelcli below torchrun, with gloo: several ranks edit what several other ranks have written and will read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modelcli.files.atomic import TEMPORARY
from tests.conftest import Cli
from tests.ranks.test_failures import FAULTS

FSDP = Path(__file__).with_name("fsdp.py")

pytestmark = pytest.mark.skipif(os.name == "nt", reason="torchrun of Windows has no gloo by default")


def torchrun(folder: Path, ranks: int, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), *map(str, words)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def _fsdp(folder: Path, ranks: int, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, FSDP, str(ranks), *words], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_sharded_model_is_edited_and_loaded_by_other_numbers_of_ranks(folder: Path):
    _fsdp(folder, 2, "save", "in")
    words = ["apply", "-e", "cast ** bfloat16", "-e", "rename ** net.**", "-m", "in/"]
    how = ["--format-out", "dcp", "--max-shard-size", "100B"]
    edited = torchrun(folder, 4, "-m", "modelcli", *words, "-o", "out/", *how)
    assert edited.returncode == 0, edited.stderr
    assert edited.stdout.count("written: out/") == 1
    assert len(list((folder / "out").glob("*.distcp"))) >= 4
    assert _fsdp(folder, 3, "compare", "out", "bfloat16", "net.") == "equal\n"


@pytest.mark.sweep  # test_failures has the same without torchrun, which takes seconds to start
def test_a_rank_that_is_killed_ends_the_launch(cli: Cli, folder: Path):
    torch.save({f"w{number}": torch.randn(100, 100) for number in range(9)}, folder / "in.pth")
    cli("save", "out/", "-m", "in.pth")
    before = load_file(folder / "out" / "model-00001-of-00001.safetensors")
    failed = torchrun(
        folder, 2, "-m", "modelcli", "cast", "**", "half", "-m", "in.pth", "-o", "out/", "--force",
        "--max-shard-size", "25KB",
        PYTHONPATH=os.pathsep.join([str(FAULTS), os.environ.get("PYTHONPATH", "")]),
        RANK_FAULTS=json.dumps({"1": {"run": "import os; os.kill(os.getpid(), 9)"}}),
    )  # fmt: skip
    assert failed.returncode == 1
    assert failed.stderr.count(f"error: rank 1 on {os.uname().nodename} died") == 1
    assert failed.stdout == ""
    after = load_file(folder / "out" / "model-00001-of-00001.safetensors")
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not list(folder.glob(f".*{TEMPORARY}"))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what a parent was started with")
def test_a_process_below_a_rank_works_by_itself(cli: Cli, folder: Path):
    """A training program that torchrun has started may start modelcli: that is no rank."""
    torch.save({"w": torch.zeros(2)}, folder / "in.pth")
    program = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-m', 'modelcli', *sys.argv[1:]]))"
    launched = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    found = subprocess.run(
        [sys.executable, "-c", program, "params", "in.pth"],
        cwd=folder, env={**os.environ, **launched}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert found.returncode == 0
    assert found.stdout == cli("params", "in.pth").out
