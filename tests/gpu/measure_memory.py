"""Measure `torch.cuda.max_memory_allocated` of real steps, and write a table that the tests compare with.

    python tests/gpu/measure_memory.py

It needs a machine with one CUDA GPU, torch 2.6 or later, torchvision, transformers and modelcli, runs unattended for
about ten minutes, and writes `measured_memory.json` beside itself: the names of the GPU and the versions, and for each
case the peak that was measured and the one that `modelcli memory` estimates. A case that fails (out of memory, a
package that is missing) is listed with its error. Each model has a process of its own. Between its cases all memory is
given back, but for the workspace of cuBLAS that belongs to the thread of the backward pass: cases of inference come
first, and those of training need it anyway.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TABLE = HERE / "measured_memory.json"


@dataclass(frozen=True)
class Measured:
    """A model to measure.

    Attributes:
        name: a builder of torchvision, or a function in `measured_models.py`.
        batch: the batch size.
        head: the path of its classifier.
        tokens: how many tokens a language model gets; None for images of 224 by 224.
    """

    name: str
    batch: int
    head: str
    tokens: int | None = None


@dataclass(frozen=True)
class Case:
    """A kind of step: an optimizer or None, whether autocast to bfloat16 is on, whether all but the head is frozen."""

    name: str
    optimizer: str | None
    autocast: bool = False
    head_only: bool = False


MODELS = (
    Measured("alexnet", 128, "classifier.6"),
    Measured("vgg11", 32, "classifier.6"),
    Measured("squeezenet1_1", 64, "classifier.1"),
    Measured("resnet18", 64, "fc"),
    Measured("resnet50", 32, "fc"),
    Measured("mobilenet_v2", 64, "classifier.1"),
    Measured("mobilenet_v3_large", 64, "classifier.3"),
    Measured("efficientnet_b0", 32, "classifier.1"),
    Measured("densenet121", 32, "classifier"),
    Measured("regnet_y_1_6gf", 32, "fc"),
    Measured("convnext_tiny", 32, "classifier.2"),
    Measured("vit_b_16", 32, "heads.head"),
    Measured("swin_t", 32, "head"),
    Measured("bert", 16, "classifier", tokens=128),
    Measured("llama", 4, "lm_head", tokens=512),
)

CASES = (
    Case("inference", None),
    Case("inference, autocast", None, autocast=True),
    Case("sgd", "sgd"),
    Case("adamw", "adamw"),
    Case("adamw, autocast", "adamw", autocast=True),
    Case("adamw, head only", "adamw", head_only=True),
)


def words_of(model: Measured, case: Case) -> list[str]:
    """Return the command line that estimates a case, in a folder with `measured_models.py` and a recipe."""
    words = ["memory", "--batch", str(model.batch), "--json"]
    if model.tokens is not None:
        words += ["--input", f"input_ids=1,{model.tokens}:int64"]
    if case.optimizer is not None:
        words += ["--train", case.optimizer]
    if case.autocast:
        words += ["--amp", "bfloat16"]
    return words


def estimate(model: Measured, case: Case) -> dict[str, Any]:
    """Return the document of `modelcli memory`. The current folder gets a recipe."""
    from modelcli.cli import main

    Path("modelcli.toml").unlink(missing_ok=True)
    reference = model.name
    if model.tokens is not None:
        Path("measured_models.py").write_bytes((HERE / "measured_models.py").read_bytes())
        reference = f"measured_models.py:{model.name}"
    frozen = [["freeze", ".", "--except", model.head]] if case.head_only else []
    out = io.StringIO()
    for words in (["load", reference], *frozen, words_of(model, case)):
        out = io.StringIO()
        errors = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            code = main(words)
        if code:
            raise RuntimeError(f"modelcli {' '.join(words)}: {errors.getvalue()}")
    found: dict[str, Any] = json.loads(out.getvalue())
    return found


def measure(model: Measured, case: Case, device: str = "cuda") -> dict[str, int]:
    """Return the peak and what was reserved in the third of three steps on the GPU.

    With `device="cpu"` the same steps are made without measuring anything, to try the script where there is no GPU.
    """
    import torch
    from torch.nn import functional

    on_gpu = device == "cuda"
    gc.collect()
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if on_gpu:
        if clear is not None:
            clear()
        torch.cuda.empty_cache()
    left = torch.cuda.memory_allocated() if on_gpu else 0
    torch.manual_seed(0)
    made = _build(model)
    if case.head_only:
        made.requires_grad_(False)
        made.get_submodule(model.head).requires_grad_(True)
    made.train(case.optimizer is not None).to(device)
    inputs: dict[str, Any] = {}
    if model.tokens is None:
        args: tuple[Any, ...] = (torch.randn(model.batch, 3, 224, 224, device=device),)
        targets = torch.zeros(model.batch, dtype=torch.int64, device=device)
    else:
        args = ()
        inputs = {"input_ids": torch.zeros(model.batch, model.tokens, dtype=torch.int64, device=device)}
        count = model.batch * model.tokens if model.name == "llama" else model.batch
        targets = torch.zeros(count, dtype=torch.int64, device=device)
    optimizer = None
    if case.optimizer is not None:
        kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[case.optimizer]
        optimizer = kind([p for p in made.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        autocast = torch.autocast(device, torch.bfloat16) if case.autocast else contextlib.nullcontext()
        if optimizer is None:
            with torch.no_grad(), autocast:
                output = made(*args, **inputs)
            del output
            return
        optimizer.zero_grad(set_to_none=True)
        with autocast:
            output = made(*args, **inputs)
            logits = getattr(output, "logits", output)
            loss = functional.cross_entropy(logits.float().flatten(0, -2), targets)
        loss.backward()
        optimizer.step()

    for number in range(3):
        if number == 2 and on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        step()
    if not on_gpu:
        return {}
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return {
        "allocated": torch.cuda.max_memory_allocated(),
        "left": left,
        "reserved": torch.cuda.max_memory_reserved(),
        "used": total - free,
    }


def _build(model: Measured) -> Any:
    if model.tokens is not None:
        import importlib.util

        spec = importlib.util.spec_from_file_location("measured_models", HERE / "measured_models.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return getattr(module, model.name)()
    import torchvision

    return torchvision.models.get_model(model.name, weights=None)


def one_model(name: str) -> None:
    """Measure the cases of one model, and print a line of JSON for each."""
    model = next(model for model in MODELS if model.name == name)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["MODELCLI_CACHE"] = folder
        for case in CASES:
            row: dict[str, Any] = {"model": name, "batch": model.batch, "tokens": model.tokens, "case": case.name}
            try:
                row |= measure(model, case)
                row["estimated"] = estimate(model, case)["peak_bytes"]
                row["ratio"] = round(row["estimated"] / row["allocated"], 4)
            except Exception as error:  # the other cases are still worth measuring
                row["error"] = f"{type(error).__name__}: {error}"
            print(f"ROW {json.dumps(row)}", flush=True)
        os.chdir(HERE)


def machine() -> dict[str, Any]:
    """Return what the table says about the machine."""
    import torch
    import torchvision

    found: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "memory": torch.cuda.get_device_properties(0).total_memory,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "made": time.strftime("%Y-%m-%d"),
    }
    with contextlib.suppress(ImportError):
        import transformers

        found["transformers"] = transformers.__version__
    return found


def _run(name: str) -> tuple[str, str]:
    """Measure one model in a process of its own, and return what it printed on standard output and standard error."""
    command = [sys.executable, __file__, "--one", name]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        try:
            subprocess.run(command, stdout=out, stderr=errors, check=False, timeout=300)
        except subprocess.TimeoutExpired:
            errors.write("it took more than 300 s")
        out.seek(0)
        errors.seek(0)
        return out.read(), errors.read()


def main() -> int:
    """Measure all models, and write the table."""
    parser = argparse.ArgumentParser(description="Measure the memory of steps on a GPU.")
    parser.add_argument("--out", type=Path, default=TABLE, help="the table to write")
    parser.add_argument("--models", nargs="*", default=[model.name for model in MODELS], help="only these models")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one_model(options.one)
        return 0
    import torch

    if not torch.cuda.is_available():
        print("there is no CUDA GPU in this machine, and the table is about one", file=sys.stderr)
        return 1
    rows: list[dict[str, Any]] = []
    for name in options.models:
        out, errors = _run(name)
        found = [json.loads(line[4:]) for line in out.splitlines() if line.startswith("ROW ")]
        if len(found) < len(CASES):  # it ended early: what it said last tells why
            found.append({"model": name, "case": "the rest", "error": errors[-500:]})
        rows += found
        for row in found:
            print(
                f"{row['model']:20} {row['case']:22} {row.get('allocated')} {row.get('estimated')} {row.get('ratio')}"
            )
        table = {**machine(), "cases": [asdict(case) for case in CASES], "rows": rows}
        options.out.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    near = [abs(row["ratio"] - 1) <= 0.1 for row in rows if "ratio" in row]
    print(f"{sum(near)} of {len(near)} within 10%; {sum('error' in row for row in rows)} failed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
