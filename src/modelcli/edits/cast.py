"""cast: floating-point tensors in another dtype."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from modelcli.edits.declaring import TENSORS, Operand, selector
from modelcli.edits.targets import Selecting
from modelcli.errors import RequestError, did_you_mean
from modelcli.model.dtypes import FLOATING, dtype_called


def _dtypes() -> Iterable[str]:
    return sorted(FLOATING)


@dataclass(frozen=True, kw_only=True)
class Cast(Selecting):
    """Convert the floating-point tensors of what matches to another dtype."""

    targets: tuple[str, ...]
    dtype: str

    name: ClassVar[str] = "cast"
    summary: ClassVar[str] = "Convert floating-point tensors to another dtype."
    effect: ClassVar[str] = (
        "converts floating-point tensors; weights with scales beside them (block-scaled fp8, GPTQ, AWQ, "
        "bitsandbytes) are refused, and values that became Inf are counted"
    )
    in_pytorch: ClassVar[str] = "`.to(torch.bfloat16)`"
    examples: ClassVar[tuple[str, ...]] = (
        "modelcli cast . bfloat16 -m best.pth -o half.pth",
        "modelcli cast . half -m squeezenet1_1",
    )
    words: ClassVar[tuple[Operand, ...]] = (
        Operand(
            "targets",
            "Selectors, then the dtype: bfloat16, half.",
            "TARGET... DTYPE",
            several=True,
            completes=(TENSORS,),
            completes_later=(TENSORS, _dtypes),
        ),
    )
    also_called: ClassVar[tuple[str, ...]] = ("to",)
    handler: ClassVar[str] = "modelcli.live.surgery.cast"
    changes_dtype: ClassVar[bool] = True

    @classmethod
    def from_operands(cls, words: Sequence[str]) -> Self:
        if len(words) < 2:
            raise RequestError("cast takes at least one target and a dtype", "cast . bfloat16")
        dtype = dtype_called(words[-1])
        if dtype not in FLOATING:
            near = did_you_mean(dtype, FLOATING) or "one of float32, bfloat16, float16, float64"
            raise RequestError(f"{words[-1]!r} is no floating-point dtype", near)
        return cls(targets=tuple(map(selector, words[:-1])), dtype=dtype)

    def operands(self) -> list[str]:
        return [*self.targets, self.dtype]
