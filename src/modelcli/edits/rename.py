"""rename: tensor keys under other names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from modelcli.edits.base import Edit
from modelcli.edits.declaring import TENSORS, Operand, selector
from modelcli.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class Rename(Edit):
    """Rename tensor keys: what the wildcards of `old` capture, those of `new` put back in the same order.

    Where there are several ways to share a name out, the first wildcard takes as much as it can, then the second.
    """

    old: str
    new: str

    name: ClassVar[str] = "rename"
    summary: ClassVar[str] = "Rename the keys of tensors."
    effect: ClassVar[str] = "renames tensor keys; what wildcards capture comes back in order: `rename 'module.**' '**'`"
    in_pytorch: ClassVar[str] = "key surgery on a state dict"
    examples: ClassVar[tuple[str, ...]] = (
        "modelcli rename 'module.**' '**' -m parallel.pth -o plain.pth",
        "modelcli rename 'head.*' 'classifier.*' -m bare.pth -o out.pth",
    )
    words: ClassVar[tuple[Operand, ...]] = (
        Operand("old", "The keys as they are: 'module.**'.", completes=(TENSORS,)),
        Operand("new", "As they shall be; what wildcards captured comes back in order: '**'."),
    )
    also_called: ClassVar[tuple[str, ...]] = ("mv", "move")
    handler: ClassVar[str] = "modelcli.live.surgery.rename"
    moves_paths: ClassVar[bool] = True

    @classmethod
    def from_operands(cls, words: Sequence[str]) -> Self:
        if len(words) != 2:
            raise RequestError("rename takes an old and a new name", "rename 'module.**' '**'")
        return cls(old=selector(words[0]), new=selector(words[1]))

    def operands(self) -> list[str]:
        return [self.old, self.new]
