"""permute: change the order of the axes of tensors of a state dict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from modelcli.edits import key_surgery
from modelcli.edits.applied import Applied, Context
from modelcli.edits.declaring import TENSORS, Operand, selector
from modelcli.edits.key_surgery import Match, Result
from modelcli.edits.targets import Selecting
from modelcli.errors import RequestError
from modelcli.model.state_dict import StateDictModel, StateDictTensor
from modelcli.wording import counted

_EXAMPLE = "permute '**.c_proj.weight' 1,0"


@dataclass(frozen=True, kw_only=True)
class Permute(Selecting):
    """Put the axes of what matches into another order: axis `dims[0]` becomes the first one."""

    targets: tuple[str, ...]
    dims: tuple[int, ...]

    name: ClassVar[str] = "permute"
    summary: ClassVar[str] = "Change the order of the axes of tensors of a state dict."
    effect: ClassVar[str] = (
        "puts the axes of the matching tensors of a state dict into another order, and their elements with them: `1,0` "
        "transposes a matrix, as between `nn.Linear` and the `Conv1D` of GPT-2"
    )
    in_pytorch: ClassVar[str] = "`state[key].permute(1, 0).contiguous()`"
    examples: ClassVar[tuple[str, ...]] = (
        "modelcli permute '**.weight' 1,0 -m bare.pth -o out.pth",
        "modelcli permute '**.downsample.0.weight' 2,3,1,0 -m best.pth --bare-keys",
    )
    words: ClassVar[tuple[Operand, ...]] = (
        Operand(
            "targets",
            "Selectors of tensors, then the axes in their new order: 1,0.",
            "TARGET... AXES",
            several=True,
            completes=(TENSORS,),
            completes_later=(TENSORS,),
        ),
    )
    also_called: ClassVar[tuple[str, ...]] = ("transpose", "swapaxes", "movedim")
    handler: ClassVar[str] = "modelcli.live.surgery.permute"

    @classmethod
    def from_operands(cls, words: Sequence[str]) -> Self:
        if len(words) < 2:
            raise RequestError("permute takes at least one target and the axes in their new order", _EXAMPLE)
        dims = key_surgery.numbers_of(words[-1], "axes", _EXAMPLE)
        if sorted(dims) != list(range(len(dims))):
            order = key_surgery.numbers_text(reversed(range(len(dims))))
            raise RequestError(
                f"{words[-1]} is no order of axes: {len(dims)} axes are 0 to {len(dims) - 1}, each named once",
                f"{order} reverses them",
            )
        return cls(targets=tuple(map(selector, words[:-1])), dims=dims)

    def operands(self) -> list[str]:
        return [*self.targets, key_surgery.numbers_text(self.dims)]

    def matches(self, model: StateDictModel) -> list[Match]:
        """Return each tensor to change; it keeps its name."""
        return key_surgery.picked(self, model)[0]

    def apply_to_state_dict(self, model: StateDictModel, context: Context) -> Applied[StateDictModel]:
        matches, notes = key_surgery.picked(self, model)
        return key_surgery.carried_out(self, model, matches, self._permuted, context, notes)

    def _permuted(self, match: Match, tensors: Sequence[StateDictTensor]) -> list[Result]:
        (tensor,) = tensors
        shape = tensor.shape or ()
        if len(shape) != len(self.dims):
            order = key_surgery.numbers_text(reversed(range(len(shape))))
            axes = counted(len(shape), "axis", "axes")
            raise RequestError(
                f"{match.old[0]} has the shape {list(shape)}, which is {axes}, not {len(self.dims)}",
                f"name all axes, such as {order}, or leave the tensor out with --except"
                if shape
                else "--except leaves it out",
            )
        stride = tuple(tensor.stride[axis] for axis in self.dims)
        return [Result([replace(tensor, shape=tuple(shape[axis] for axis in self.dims), stride=stride)])]
