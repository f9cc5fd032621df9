"""concat: join tensors of a state dict along an axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from modelcli.edits import key_surgery
from modelcli.edits.applied import Applied, Context
from modelcli.edits.base import Edit
from modelcli.edits.declaring import TENSORS, Operand, option, selector
from modelcli.edits.key_surgery import DIM, Match, Result
from modelcli.errors import RequestError
from modelcli.model.state_dict import StateDictModel, StateDictTensor

_EXAMPLE = "concat '**.q.weight' '**.k.weight' '**.v.weight' '**.qkv.weight'"


@dataclass(frozen=True, kw_only=True)
class Concat(Edit):
    """Join tensors to one called `new`: those whose names match `old`, in order, with the same texts for wildcards."""

    old: tuple[str, ...]
    new: str
    dim: int = option("--dim", DIM, 0, "The axis; a negative one counts from the end.", metavar="N", shown_default="0")

    name: ClassVar[str] = "concat"
    summary: ClassVar[str] = "Join tensors of a state dict to one along an axis."
    effect: ClassVar[str] = (
        "joins tensors of a state dict along `--dim` to one, in the order in which they are named, wherever the "
        "wildcards of all of them match the same"
    )
    in_pytorch: ClassVar[str] = "`torch.cat([state[key] for key in old], dim)`"
    examples: ClassVar[tuple[str, ...]] = (
        "modelcli concat layer1.0.conv1.weight layer1.0.conv2.weight both.weight -m best.pth --bare-keys -o out.pth",
        "modelcli concat 'layer?.1.conv1.*' 'layer?.1.conv2.*' 'layer?.1.both.*' -m best.pth --bare-keys",
    )
    words: ClassVar[tuple[Operand, ...]] = (
        Operand(
            "names",
            "The keys to join, in order, then the key of the result: '**.q' '**.k' '**.v' '**.qkv'.",
            "OLD... NEW",
            several=True,
            completes=(TENSORS,),
            completes_later=(TENSORS,),
        ),
    )
    also_called: ClassVar[tuple[str, ...]] = ("cat", "concatenate")
    handler: ClassVar[str] = "modelcli.live.surgery.concat"
    moves_paths: ClassVar[bool] = True

    @classmethod
    def from_operands(cls, words: Sequence[str]) -> Self:
        if len(words) < 3:
            raise RequestError("concat takes at least two old names and a new one", _EXAMPLE)
        *old, new = map(selector, words)
        return cls(old=tuple(old), new=new)

    def operands(self) -> list[str]:
        return [*self.old, self.new]

    def matches(self, model: StateDictModel) -> list[Match]:
        """Return the tensors to join, and the name of each result. Raises RequestError where one is missing."""
        first, *rest = self.old
        there = set(key_surgery.tensor_names(model))
        found = []
        for name, (*others, new) in key_surgery.matching(self, first, [*rest, self.new], model):
            for other in others:
                if other not in there:
                    raise RequestError(
                        f"{name} is there, but {other} is not, so they cannot be joined to {new}",
                        "name fewer tensors, or with wildcards that match only where all are there",
                    )
            found.append(Match((name, *others), (new,)))
        used = {name for match in found for name in match.old}
        for pattern in rest:
            for name, (wanted,) in key_surgery.matching(self, pattern, [first], model):
                if name not in used:
                    raise RequestError(
                        f"{name} is there, but {wanted} is not, so they cannot be joined",
                        "name fewer tensors, or with wildcards that match only where all are there",
                    )
        return found

    def apply_to_state_dict(self, model: StateDictModel, context: Context) -> Applied[StateDictModel]:
        return key_surgery.carried_out(self, model, self.matches(model), self._joined, context)

    def _joined(self, match: Match, tensors: Sequence[StateDictTensor]) -> list[Result]:
        shape = tensors[0].shape or ()
        axis = key_surgery.axis_of(self.dim, len(shape), match.old[0], shape)
        key_surgery.alike(self, match.old, tensors, axis)
        return [Result(tensors, axis)]
