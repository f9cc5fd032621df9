"""How folders of training runs are read and written, beside the programs of PyTorch, DeepSpeed's layout included.

    make bench

The rows are time (less `import torch`) and the largest resident memory of whole processes: modelcli, `cp`, torch's
`dcp_to_torch_save` and Accelerate's `merge-weights` on the same folder, and folders of 20 GB with holes for the bytes.
Each bound is printed with whether it is met; where one is missed, the exit code is 1.
"""

from __future__ import annotations

import importlib.util
import io
import os
import pickle
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks import bench_reading
from tests.benchmarks.bench_reading import MODELCLI, PYTHON
from tests.benchmarks.bench_writing import little_memory, missed, row

ROUNDS = int(os.environ.get("ROUNDS", "3"))
NBYTES = int(os.environ.get("NBYTES", str(4 * 10**9)))
SPARSE = int(os.environ.get("SPARSE", str(20 * 10**9)))
RANKS = 4
MODULE = "tests.benchmarks.bench_distributed"
ROOT = Path(__file__).resolve().parents[2]

MAKE = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
from torch.distributed.checkpoint import save
state = {f"layers.{n}.weight": torch.randn(5120, 2560) for n in range(int(sys.argv[1]) // (5120 * 2560 * 4))}
save(state, checkpoint_id="in")
"""

DCP_TO_TORCH_SAVE = """
import warnings
warnings.simplefilter("ignore")
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
dcp_to_torch_save("in", "out.pth")
"""

MERGE_WEIGHTS = """
from accelerate.utils import merge_fsdp_weights
merge_fsdp_weights("in", "merged", safe_serialization=True)
"""


def hollow_archive(tensor: Any) -> tuple[bytes, int, bytes]:
    """Return what `torch.save` writes of a tensor of zeros: the bytes before its values, their number, those behind."""
    import torch

    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    data, nbytes = buffer.getvalue(), tensor.nbytes
    start = data.index(bytes(nbytes))
    return data[:start], nbytes, data[start + nbytes :]


def sparse_dcp(folder: Path, nbytes: int, tensors: int = 200) -> None:
    """A folder of `RANKS` ranks with holes for the values: half of its tensors split into rows, half into columns."""
    import torch
    from torch.distributed.checkpoint import metadata as m
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    folder.mkdir()
    side = int((nbytes / tensors / 4) ** 0.5) // RANKS * RANKS
    shapes = {"rows": (side // RANKS, side), "columns": (side, side // RANKS)}
    archives = {kind: hollow_archive(torch.zeros(shape)) for kind, shape in shapes.items()}
    properties = m.TensorProperties.create_from_tensor(torch.zeros(1))
    described: dict[str, Any] = {}
    places: dict[Any, Any] = {}
    files = [(folder / f"__{rank}_0.distcp").open("wb") for rank in range(RANKS)]
    for number in range(tensors):
        kind = "columns" if number % 2 else "rows"
        name, chunks = f"layers.{number}.{kind}", []
        head, hole, tail = archives[kind]
        for rank, file in enumerate(files):
            at = rank * side // RANKS
            offsets = torch.Size((0, at) if number % 2 else (at, 0))
            chunks.append(m.ChunkStorageMetadata(offsets, torch.Size(shapes[kind])))
            start = file.tell()
            file.write(head)
            file.seek(hole, os.SEEK_CUR)
            file.write(tail)
            place = _StorageInfo(f"__{rank}_0.distcp", start, file.tell() - start)
            places[m.MetadataIndex(name, offsets)] = place
        described[name] = m.TensorStorageMetadata(properties, torch.Size((side, side)), chunks)
    for file in files:
        file.close()
    paths = {name: (name,) for name in described}
    (folder / ".metadata").write_bytes(pickle.dumps(m.Metadata(described, paths, places)))


def sparse_deepspeed(home: Path, nbytes: int, tensors: int = 200) -> None:
    """A folder of DeepSpeed ZeRO-3 from `RANKS` ranks, with holes for the values."""
    import torch

    step = home / "global_step500"
    step.mkdir(parents=True)
    (home / "latest").write_text(step.name)
    side = int((nbytes / tensors / 4) ** 0.5)
    shapes = {f"layers.{number}.weight": torch.Size((side, side)) for number in range(tensors)}
    parts = [-(-side * side // RANKS)] * tensors
    empty = {name: torch.empty(0) for name in shapes}
    for rank in range(RANKS):
        names = f"zero_pp_rank_{rank}_mp_rank_00"
        states = {"module": empty, "buffer_names": [], "param_shapes": [shapes], "shared_params": {}, "ds_version": "0"}
        torch.save(states, step / f"{names}_model_states.pt")
        inner = {"zero_stage": 3, "partition_count": RANKS, "fp32_flat_groups": [torch.empty(sum(parts))]}
        with torch.serialization.skip_data():
            torch.save({"optimizer_state_dict": inner}, step / f"{names}_optim_states.pt")


def measure(command: Sequence[str]) -> tuple[float, int]:
    """Seconds, and the largest resident memory in MB, of one run on a settled disk, without what others left."""
    for name in ("out.pth", "out.safetensors", "copy", "back", "merged"):
        path = Path(name)
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
    os.sync()
    seconds, kibibytes = bench_reading.measure(command)
    return seconds, kibibytes // 1024


def compare() -> None:
    """The rows of a folder with values."""
    subprocess.run([*MODELCLI, "save", "in.safetensors", "-m", "in", "-q"], check=True)
    commands: dict[str, tuple[str, ...]] = {
        "import": (PYTHON, "-c", "import torch"),
        "cp": ("sh", "-c", "cp -r in copy && sync copy/*"),
        "out": (*MODELCLI, "save", "out.safetensors", "-m", "in", "-q"),
        "back": (*MODELCLI, "save", "back/", "--format-out", "dcp", "-m", "in.safetensors", "-q"),
        "pth": (*MODELCLI, "save", "out.pth", "-m", "in", "-q"),
        "torch": (PYTHON, "-c", DCP_TO_TORCH_SAVE),
    }
    if importlib.util.find_spec("accelerate"):
        commands["accelerate"] = (PYTHON, "-c", MERGE_WEIGHTS)
    times: dict[str, list[float]] = {name: [] for name in commands}
    memory = dict.fromkeys(commands, 0)
    order = list(commands.items())
    for number in range(ROUNDS + 1):
        order.append(order.pop(0))
        for name, command in order:
            seconds, peak = measure(command)
            if number:
                times[name].append(seconds)
                memory[name] = max(memory[name], peak)
    median = {name: statistics.median(found) for name, found in times.items()}
    base, size = median["import"], f"{NBYTES / 1e9:.3g} GB"
    for name, title in (("out", f"DCP to safetensors, {size} / cp"), ("back", f"safetensors to DCP, {size} / cp")):
        peer, above = median["cp"], memory[name] - memory["import"]
        row(title, median[name], peer, above, ("<= 1.3", median[name] <= 1.3 * peer), little_memory(above))
    for name, title in (("torch", "dcp_to_torch_save / DCP to .pth"), ("accelerate", "merge-weights / to safetensors")):
        if name in median:
            mine = median["pth" if name == "torch" else "out"] - base
            row(f"{title}, {size}", median[name] - base, mine, memory[name] - memory["import"])


def holes() -> None:
    """The rows of folders with holes for their values: a look, and the whole way through to nowhere."""
    base, memory = measure((PYTHON, "-c", "import torch"))
    for kind, make in (("DCP", sparse_dcp), ("DeepSpeed ZeRO-3", sparse_deepspeed)):
        # A process of its own makes it: the largest memory of a child is at least that of its parent at the start.
        words = (PYTHON, "-c", f"from {MODULE} import *; {make.__name__}(Path('holes'), {SPARSE})")
        subprocess.run(words, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        size = f"{SPARSE / 1e9:.3g} GB sparse {kind}"
        for title, *words in (
            ("summary of", "summary", "holes"),
            ("check --finite of", "check", "holes", "--finite"),
        ):
            seconds, peak = measure((*MODELCLI, *words, "-q"))
            row(f"{title} {size} / import torch", seconds, base, peak - memory, little_memory(peak - memory))
        shutil.rmtree("holes")


def main() -> int:
    """Make the folders, run the rows; 1 where a bound was missed."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_FOLDER")) as name:
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.chdir(name)
        print(f"{'':52} {'first':>9} {'second':>9} {'ratio':>7} {'memory':>9}   bound   ({ROUNDS} rounds)")
        holes()
        subprocess.run([PYTHON, "-c", MAKE, str(NBYTES)], check=True)
        compare()
        os.chdir("/")
    for bound in missed:
        print(f"MISSED: {bound}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
