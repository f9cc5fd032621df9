"""Random inputs for every parser: each gives a result or one error within a time limit. `make fuzz` runs a million."""

from __future__ import annotations

import contextlib
import importlib
import io
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from modelcli import checkpoints
from modelcli.checkpoints.torch_pickle import pickles
from modelcli.checkpoints.torch_pickle.inert_values import Global
from modelcli.checkpoints.zip_archives import directory as zip_directory
from modelcli.errors import ModelcliError
from tests import hostile
from tests.fuzz import languages, limits, reading, running
from tests.fuzz.running import run
from tests.fuzz.target import Target

with tempfile.TemporaryDirectory() as _folder:
    NAMES = [target.name for target in reading.every(Path(_folder))]
    LANGUAGES = [target.name for target in languages.every(Path(_folder))]


def target_of(folder: Path, name: str) -> Target:
    every = (target for targets in (languages.every, reading.every) for target in targets(folder))
    return next(target for target in every if target.name == name)


@pytest.mark.parametrize("name", NAMES)
def test_thousands_of_damaged_inputs(tmp_path: Path, name: str) -> None:
    assert run(target_of(tmp_path, name), 1_000, seed=1) == []


@pytest.mark.parametrize("name", LANGUAGES)
def test_thousands_of_generated_texts(tmp_path: Path, name: str) -> None:
    """No text runs or imports what it names, or exceeds the limits on time and memory."""
    assert run(target_of(tmp_path, name), 2_500, seed=1) == []
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", LANGUAGES)
def test_enough_of_the_generated_texts_are_valid(tmp_path: Path, name: str) -> None:
    """Otherwise the fuzzer would only test the first error."""
    target = target_of(tmp_path, name)
    draw = random.Random(1)
    good = 0
    for _ in range(300):
        with contextlib.suppress(ModelcliError):
            target.run(target.made(draw))
            good += 1
    assert good >= 25


def test_the_fuzzer_reports_hangs_open_files_and_exceptions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "canary.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(running, "SECONDS", 0.5)

    def hangs(_data: bytes) -> None:
        while True:
            pass

    def opens(_data: bytes) -> None:
        (tmp_path / "made").write_bytes(b"")

    def raises(_data: bytes) -> None:
        raise ValueError("no")

    def of(parser: Callable[[bytes], object]) -> str:
        target = Target("made", parser, [], [], nasty=[b"canary"], forbidden=limits.EVALUATING)
        return " and ".join(running.run(target, 0, seed=0))

    assert "ValueError: no" in of(raises)
    assert "no end in 0.5 s" in of(hangs)
    assert "import canary" in of(lambda _: importlib.import_module("canary"))
    assert "open " in of(opens)
    assert "exec " in of(lambda _: exec("1"))
    if sys.platform == "linux":
        assert "MemoryError" in of(lambda _: bytearray(2 << 30))


@pytest.mark.parametrize("name", NAMES + LANGUAGES)
def test_the_seed_inputs_are_valid(tmp_path: Path, name: str) -> None:
    """Otherwise every input would be rejected at its first byte."""
    target = target_of(tmp_path, name)
    read = 0
    for seed in target.seeds:
        try:
            read += target.run(seed) is not None
        except ModelcliError:
            continue
    assert read


def small_files() -> dict[str, bytes]:
    """Return a small file of each kind, written by torch and safetensors."""
    state = {"a": torch.ones(2, 2), "b": torch.ones(2, dtype=torch.bfloat16)}
    found = {}
    for name, new in (("zip", True), ("old", False)):
        out = io.BytesIO()
        torch.save(state, out, _use_new_zipfile_serialization=new)
        found[name] = out.getvalue()
    found["safetensors"] = save(state)
    found["index"] = b'{"weight_map": {"a": "s.safetensors", "b": "s.safetensors"}}'
    return found


def look(path: Path) -> None:
    with contextlib.suppress(ModelcliError):
        checkpoints.read(path).bare_blueprint()


@pytest.mark.parametrize("kind", small_files())
def test_every_truncation_and_every_flipped_bit(tmp_path: Path, kind: str) -> None:
    data = small_files()[kind]
    (tmp_path / "s.safetensors").write_bytes(small_files()["safetensors"])
    path = tmp_path / ("made.index.json" if kind == "index" else "made.pth")
    with path.open("wb", buffering=0) as file:
        for position in range(len(data)):
            for bit in range(8):
                file.seek(position)
                file.write(bytes([data[position] ^ 1 << bit]))
                if position == bit == 0:
                    file.write(data[1:])
                look(path)
            file.seek(position)
            file.write(data[position : position + 1])
    for length in range(len(data)):
        path.write_bytes(data[:length])
        look(path)


@pytest.mark.parametrize("kind", ["pickle in the zip"])
def test_every_flipped_bit_behind_a_valid_crc(tmp_path: Path, kind: str) -> None:
    data = small_files()["zip"]
    entry = zip_directory.read(io.BytesIO(data), len(data), kind)["archive/data.pkl"]
    pickled = data[entry.offset : entry.offset + entry.nbytes]
    path = tmp_path / "made.pth"
    for position in range(len(pickled)):
        for bit in range(8):
            flipped = bytearray(pickled)
            flipped[position] ^= 1 << bit
            path.write_bytes(hostile.archive(bytes(flipped), {"data/0": bytes(16), "data/1": bytes(4)}))
            look(path)


@pytest.mark.parametrize("seed", reading._saved(), ids=["now", "before 1.6"])
def test_reading_a_tensor_in_one_step_equals_running_its_opcodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: bytes
) -> None:
    """`_TENSOR` matches a whole tensor. Every damaged input gives the same value, or none, as opcode by opcode."""
    span = checkpoints.Span(tmp_path / "x", 0, 8, (0, 0, 0))
    in_one_step = pickles._Machine._saved_tensor
    taken = []

    def spy(machine: Any, found: Any) -> Any:
        taken.append(in_one_step(machine, found))
        return taken[-1]

    monkeypatch.setattr(pickles._Machine, "_saved_tensor", spy)

    def outcome(data: bytes) -> object:
        try:
            read = pickles.read(data, "made", lambda _key, _dtype: span)
        except ModelcliError:
            return None
        return read.value if isinstance(read.value, dict) and not _holds_opaque(read.value) else type(read.value)

    for position in range(len(seed)):
        for change in (seed[position] ^ 1, seed[position] ^ 0x80, 0, 0x4B, 0x68):
            data = bytearray(seed)
            data[position] = change
            quick = outcome(bytes(data))
            with monkeypatch.context() as patch:
                patch.setattr(pickles, "_REBUILD", Global("never", "matched"))
                assert outcome(bytes(data)) == quick, bytes(data)
    assert sum(made is not None for made in taken) > 1000


def _holds_opaque(value: dict[object, object]) -> bool:
    return any(not isinstance(item, checkpoints.TensorEntry) for item in value.values())
