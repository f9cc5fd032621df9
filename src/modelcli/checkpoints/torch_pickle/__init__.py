"""What `torch.save` writes: a zip archive or, before torch 1.6, pickles in a row; and pickles as inert values."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from modelcli.checkpoints.format import Candidate, Format, ScriptLine
from modelcli.checkpoints.torch_pickle.names import SUFFIXES
from modelcli.checkpoints.torch_pickle.recognition import is_legacy

if TYPE_CHECKING:
    from modelcli.checkpoints.contents import Contents
    from modelcli.checkpoints.layout import Layout
    from modelcli.checkpoints.plan import Plan

#: The suffix of the files that DeepSpeed writes with `torch.save`.
DEEPSPEED_SUFFIX = ".pt"


class TorchSave(Format):
    """A state dict, or a whole training checkpoint, that `torch.save` wrote."""

    name = "pth"
    title = "a file that torch.save wrote"
    label = "torch.save"
    suffixes = SUFFIXES
    written_suffixes = (".pth", ".pt", ".ckpt", ".bin")
    written_as = "as torch.save writes"
    whole_files = (
        "pytorch_model.bin",
        "adapter_model.bin",
        "diffusion_pytorch_model.bin",
        "open_clip_pytorch_model.bin",
    )
    container = "zip"
    holds_values = True
    holds_views = True
    has_keys = True

    def recognises(self, file: Candidate) -> bool:
        if file.is_zip:
            return any(name == "data.pkl" or name.endswith("/data.pkl") for name in file.records)
        return is_legacy(file.head)

    def read(self, file: Candidate, key: str | None) -> Contents:
        if file.is_zip:
            from modelcli.checkpoints.torch_pickle import zip_format

            return zip_format.read(file, key)
        from modelcli.checkpoints.torch_pickle import legacy_format

        return legacy_format.read(file.path, key)

    def layout(self, plan: Plan) -> Layout:
        from modelcli.checkpoints.torch_pickle import writing

        return writing.layout(plan)

    def verify(self, plan: Plan, path: Path) -> None:
        from modelcli.checkpoints.torch_pickle import writing

        writing.verify(plan, path)

    def script_reads(self, path: str) -> ScriptLine:
        return ScriptLine(f'torch.load({path}, map_location="cpu", weights_only=True)')

    def script_writes(self, path: str, value: str) -> ScriptLine:
        return ScriptLine(f"torch.save({value}, {path})")
