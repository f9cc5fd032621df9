"""Values of files are read without torch, and NumPy is imported only for values. Each test starts a process."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from modelcli.values.dtypes import HELD
from tests.conftest import Cli
from tests.needs import what_torch_has

#: A program that runs each command in a fork and prints which of the packages it imported.
COMMANDS = """
    import json, os, sys
    from modelcli.cli import main

    for line in sys.stdin:
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            sys.stdout = open(os.devnull, "w")
            code = main(line.split())
            there = [name for name in ("torch", "numpy", "ml_dtypes") if name in sys.modules]
            os.write(writer, json.dumps([code, there]).encode())
            os._exit(0)
        os.close(writer)
        print(os.read(reader, 1000).decode(), flush=True)
        os.close(reader)
        os.waitpid(child, 0)
"""


@pytest.fixture
def files(folder: Path) -> None:
    """Create a file of each dtype, files with composite tensors, a folder of shards, and pairs that differ."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(6, 8, generator=generator)
    every = {
        dtype: (numbers * 3).to(torch.complex64 if "complex" in dtype else torch.float32).to(getattr(torch, dtype))
        for dtype in what_torch_has(tuple(sorted(HELD - {"float8_e8m0fnu"})))
    }
    torch.save(every, "every.pth")
    torch.save(every, "legacy.pth", _use_new_zipfile_serialization=False)
    plain = {name: tensor for name, tensor in every.items() if not tensor.is_complex()}
    save_file(plain, "every.safetensors")
    conjugate, negative = (numbers.to(torch.complex64).conj() for _ in range(2))
    views = {"view": numbers.T, "row": numbers[2], "conjugate": conjugate, "negative": negative.imag}
    torch.save({**plain, **views}, "views.pth")
    quantized = torch.quantize_per_tensor(numbers, 0.1, 0, torch.qint8)
    torch.save({"quantized": quantized, "sparse": torch.eye(3).to_sparse(), "w": numbers}, "parts.pth")
    torch.save({name: tensor.to(torch.float32) for name, tensor in plain.items()}, "wide.pth")
    save_file({**plain, "float16": plain["float16"] + 1}, "other.safetensors")


def imported(commands: list[str]) -> list[list[Any]]:
    """Return the exit code of each command, and which of torch, NumPy and ml_dtypes it imported."""
    run = [sys.executable, "-c", textwrap.dedent(COMMANDS)]
    done = subprocess.run(run, input="\n".join(commands), capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:ComplexHalf support")
@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="needs fork")
def test_torch_is_not_imported_for_the_values_of_files(cli: Cli, files: None) -> None:
    cli("save", "shards/", "-m", "every.safetensors", "--max-shard-size", "1kB")
    names = ("every.pth", "legacy.pth", "every.safetensors", "shards/", "views.pth", "parts.pth")
    wanted = {
        **{f"params {name} --stats": 0 for name in names},
        **{f"params {name} --values": 0 for name in names},
        "params every.safetensors --stats --values --json": 0,
        "params every.safetensors --stats --sort std -f csv": 0,
        **{f"check {name} --finite": 0 for name in names},
        **{f"hash {name} --tree": 0 for name in names},
        f"check every.pth --hash sha256:{'0' * 64}": 1,
        "diff every.safetensors other.safetensors": 1,
        "diff every.safetensors wide.pth": 1,
        "diff views.pth every.pth --atol 0.5": 1,
        "check every.safetensors --same-as other.safetensors": 1,
    }
    for words, (code, there) in zip(wanted, imported(list(wanted)), strict=True):
        assert (code, "torch" in there) == (wanted[words], False), words


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:ComplexHalf support")
@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="needs fork")
def test_numpy_is_imported_where_values_are_read_and_nowhere_else(files: None) -> None:
    wanted = {
        "params every.safetensors": [],
        "modules every.pth": [],
        "diff every.safetensors every.pth --no-values": [],
        "diff every.safetensors every.safetensors": [],
        "check every.safetensors --max-params 1M": [],
        "params every.safetensors --stats -s float32": ["numpy"],
        "hash every.safetensors": ["numpy"],
        "params every.safetensors --stats -s bfloat16": ["numpy", "ml_dtypes"],
    }
    for words, (_, there) in zip(wanted, imported(list(wanted)), strict=True):
        assert there == wanted[words], words
