"""split: take tensors of a state dict apart along an axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from modelcli.edits import key_surgery
from modelcli.edits.applied import Applied, Context
from modelcli.edits.base import Edit
from modelcli.edits.declaring import TENSORS, Kind, Operand, option, selector
from modelcli.edits.key_surgery import DIM, Match, Result
from modelcli.errors import RequestError
from modelcli.model.state_dict import StateDictModel, StateDictTensor
from modelcli.model.tensors import Shape

_EXAMPLE = "split '**.qkv.weight' '**.q.weight' '**.k.weight' '**.v.weight'"


def _sizes(flag: str, word: str) -> tuple[int, ...]:
    return key_surgery.numbers_of(word, f"sizes for {flag}", f"{flag} 64,8,8")


#: An option that takes the sizes of the parts.
SIZES = Kind(_sizes, text=key_surgery.numbers_text)


@dataclass(frozen=True, kw_only=True)
class Split(Edit):
    """Take each matching tensor apart along an axis: into equal parts, or parts of the given sizes."""

    old: str
    new: tuple[str, ...]
    dim: int = option("--dim", DIM, 0, "The axis; a negative one counts from the end.", metavar="N", shown_default="0")
    sizes: tuple[int, ...] = option(
        "--sizes", SIZES, (), "The size of each part along the axis.", metavar="N,N,...", shown_default="equal parts"
    )

    name: ClassVar[str] = "split"
    summary: ClassVar[str] = "Split tensors of a state dict into several along an axis."
    effect: ClassVar[str] = (
        "takes each matching tensor of a state dict apart along `--dim`, into equal parts or those of `--sizes`; each "
        "wildcard in a new name stands for what the wildcard in OLD matched"
    )
    in_pytorch: ClassVar[str] = "`torch.split(state[key], sizes, dim)`"
    examples: ClassVar[tuple[str, ...]] = (
        "modelcli split '**.weight' '**.q' '**.k' '**.v' -m bare.pth -o out.pth",
        "modelcli split '**.weight' '**.left' '**.right' --dim 1 --sizes 1,1 -m parallel.pth",
    )
    words: ClassVar[tuple[Operand, ...]] = (
        Operand("old", "The keys to split: '**.qkv.weight'.", completes=(TENSORS,)),
        Operand("new", "The keys of the parts; each wildcard takes what that of OLD matched.", "NEW...", several=True),
    )
    also_called: ClassVar[tuple[str, ...]] = ("chunk", "unfuse")
    handler: ClassVar[str] = "modelcli.live.surgery.split"
    moves_paths: ClassVar[bool] = True

    @classmethod
    def from_operands(cls, words: Sequence[str]) -> Self:
        if len(words) < 3:
            raise RequestError("split takes an old name and at least two new ones", _EXAMPLE)
        if len(set(words[1:])) < len(words) - 1:
            twice = next(word for word in words[1:] if words[1:].count(word) > 1)
            raise RequestError(f"two parts would both be called {twice}", _EXAMPLE)
        old, *new = map(selector, words)
        return cls(old=old, new=tuple(new))

    def operands(self) -> list[str]:
        return [self.old, *self.new]

    def matches(self, model: StateDictModel) -> list[Match]:
        """Return each tensor to split, and the names of its parts."""
        return [Match((name,), tuple(new)) for name, new in key_surgery.matching(self, self.old, self.new, model)]

    def sizes_of(self, name: str, shape: Shape) -> tuple[int, list[int]]:
        """Return the axis and the sizes of the parts of a tensor. Raises RequestError if they do not fit."""
        axis = key_surgery.axis_of(self.dim, len(shape), name, shape)
        count, size = len(self.new), shape[axis]
        if not self.sizes:
            if size % count:
                raise RequestError(
                    f"{name} has the shape {list(shape)}, and {size} cannot be divided into {count} equal parts",
                    f"--sizes says how large each part is: {count} numbers whose sum is {size}",
                )
            return axis, [size // count] * count
        if len(self.sizes) != count or sum(self.sizes) != size:
            raise RequestError(
                f"--sizes {key_surgery.numbers_text(self.sizes)} has {len(self.sizes)} numbers with the sum "
                f"{sum(self.sizes)}, and {name} with the shape {list(shape)} has {size} along axis {axis}",
                f"give {count} numbers whose sum is {size}, one for each new name",
            )
        return axis, list(self.sizes)

    def apply_to_state_dict(self, model: StateDictModel, context: Context) -> Applied[StateDictModel]:
        return key_surgery.carried_out(self, model, self.matches(model), self._parts, context)

    def _parts(self, match: Match, tensors: Sequence[StateDictTensor]) -> list[Result]:
        axis, sizes = self.sizes_of(match.old[0], tensors[0].shape or ())
        found, start = [], 0
        for size in sizes:
            found.append(Result([key_surgery.narrowed(tensors[0], axis, start, size)]))
            start += size
        return found
