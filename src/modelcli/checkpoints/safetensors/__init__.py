"""The safetensors format: eight bytes with the length of a JSON header, the header, the tensors' bytes without gaps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from modelcli.checkpoints.format import Candidate, Format, ScriptLine

if TYPE_CHECKING:
    from modelcli.checkpoints.contents import Contents
    from modelcli.checkpoints.layout import Layout
    from modelcli.checkpoints.plan import Plan

SUFFIX = ".safetensors"


def looks_like(head: bytes) -> bool:
    """Whether bytes start like a safetensors file: with a plausible length, then a JSON object."""
    return len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") >= 2


class Safetensors(Format):
    """A file of tensors and short texts."""

    name = "safetensors"
    title = "a safetensors file"
    label = "safetensors"
    suffixes = (SUFFIX,)
    written_suffixes = (SUFFIX,)
    whole_files = (
        "model.safetensors",
        "adapter_model.safetensors",
        "diffusion_pytorch_model.safetensors",
        "open_clip_model.safetensors",
    )

    script_names = frozenset({"load_file", "save_file"})

    def recognises(self, file: Candidate) -> bool:
        return looks_like(file.head)

    def read(self, file: Candidate, key: str | None) -> Contents:
        from modelcli.checkpoints.safetensors import reading

        return reading.read(file.path)

    def layout(self, plan: Plan) -> Layout:
        from modelcli.checkpoints.safetensors import writing

        return writing.layout(plan)

    def verify(self, plan: Plan, path: Path) -> None:
        from modelcli.checkpoints.safetensors import writing

        writing.verify(plan, path)

    def script_reads(self, path: str) -> ScriptLine:
        return ScriptLine(f"load_file({path})", ("from safetensors.torch import load_file",))

    def script_writes(self, path: str, value: str) -> ScriptLine:
        return ScriptLine(f"save_file({value}, {path})", ("from safetensors.torch import save_file",))
