"""Writing checkpoints from a plan: for each tensor, where its bytes come from. No torch, no weights in memory."""

from __future__ import annotations

from pathlib import Path

from modelcli import atomic
from modelcli.errors import RequestError
from modelcli.writing import safetensors, torch_zip
from modelcli.writing.plan import Plan, PlannedStorage, PlannedTensor, Source, Written

__all__ = ["Plan", "PlannedStorage", "PlannedTensor", "Source", "Written", "check_target", "format_of", "write"]

_WRITERS = {"pth": torch_zip.write, "safetensors": safetensors.write}
_VERIFIERS = {"pth": torch_zip.verify, "safetensors": safetensors.verify}


def format_of(path: str | Path) -> str:
    """`pth` or `safetensors`, told by the suffix. Raises RequestError for any other."""
    text = str(path)
    match Path(text).suffix.lower():
        case ".pth" | ".pt":
            return "pth"
        case ".safetensors":
            return "safetensors"
    if text.endswith(("/", "\\")):
        raise RequestError(f"{text}: folders of shards cannot be written yet", "write one .safetensors or .pth file")
    raise RequestError(f"{text} does not say which format to write", "end it in .pth, .pt (torch.save) or .safetensors")


def check_target(path: Path, *, force: bool) -> None:
    """Refuse, before any work is done, a target that cannot be written. Raises RequestError or SystemFailureError."""
    format_of(path)
    atomic.check_target(path, force=force)


def write(plan: Plan, path: Path, *, force: bool) -> Written:
    """Write the plan to a sibling of `path`, read its header back, then put it in the place of `path` in one step."""
    kind = format_of(path)
    with atomic.replacing(path, force=force) as (file, temporary):
        _WRITERS[kind](plan, file)
        file.flush()
        _VERIFIERS[kind](plan, temporary)
        nbytes = temporary.stat().st_size
    return Written(path, kind, len(plan.tensors) + len(plan.composites), nbytes)
