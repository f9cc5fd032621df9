"""The formats of programs with their weights: TorchScript (`torch.jit.save`) and `torch.export.save`.

modelcli shows their tensors and can write them as a checkpoint. It does not run the programs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from modelcli.checkpoints.format import Candidate, Format

if TYPE_CHECKING:
    from modelcli.checkpoints.contents import Contents

#: The names of records that exported programs have and checkpoints do not have.
_EXPORTED = ("archive_format", "serialized_exported_program.json")


class TorchScript(Format):
    """A program that `torch.jit.save` wrote. modelcli reads but does not write this format."""

    name = "jit"
    title = "a program with one state dict"
    container = "zip"

    def recognises(self, file: Candidate) -> bool:
        return any(name.endswith("/constants.pkl") and name.count("/") == 1 for name in file.records)

    def read(self, file: Candidate, key: str | None) -> Contents:
        from modelcli.checkpoints.torch_programs import torchscript

        return torchscript.read(file)


class TorchExport(Format):
    """A program that `torch.export.save` wrote. modelcli reads but does not write this format."""

    name = "pt2"
    title = "a program with one state dict"
    suffixes = (".pt2",)
    container = "zip"

    def recognises(self, file: Candidate) -> bool:
        return any(name.endswith((*_EXPORTED, "constants.pkl")) for name in file.records)

    def read(self, file: Candidate, key: str | None) -> Contents:
        from modelcli.checkpoints.torch_programs import torch_export

        return torch_export.read(file)
