"""Programs with their weights in one archive: TorchScript (`torch.jit.save`) and `torch.export.save`.

Their tensors are shown, and can be written as a checkpoint. Their code is not looked at, let alone run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from modelcli.checkpoints.format import Candidate, Format

if TYPE_CHECKING:
    from modelcli.checkpoints.contents import Contents

#: How records are called that exported programs have and checkpoints have not.
_EXPORTED = ("archive_format", "serialized_exported_program.json")


class TorchScript(Format):
    """A program of `torch.jit.save`. It is read only."""

    name = "jit"
    title = "a program with one state dict"
    container = "zip"

    def recognises(self, file: Candidate) -> bool:
        return any(name.endswith("/constants.pkl") and name.count("/") == 1 for name in file.records)

    def read(self, file: Candidate, key: str | None) -> Contents:
        from modelcli.checkpoints.torch_programs import torchscript

        return torchscript.read(file)


class TorchExport(Format):
    """A program of `torch.export.save`. It is read only."""

    name = "pt2"
    title = "a program with one state dict"
    suffixes = (".pt2",)
    container = "zip"

    def recognises(self, file: Candidate) -> bool:
        return any(name.endswith((*_EXPORTED, "constants.pkl")) for name in file.records)

    def read(self, file: Candidate, key: str | None) -> Contents:
        from modelcli.checkpoints.torch_programs import torch_export

        return torch_export.read(file)
