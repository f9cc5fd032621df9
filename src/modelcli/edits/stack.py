"""stack: put numbered tensors of a state dict, such as those of experts, into one along a new axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from modelcli.edits import key_surgery, numbered_keys
from modelcli.edits.applied import Applied, Context
from modelcli.edits.base import Edit
from modelcli.edits.declaring import TENSORS, Operand, option, selector
from modelcli.edits.key_surgery import DIM, Match, Result
from modelcli.errors import RequestError
from modelcli.language import selectors
from modelcli.model.state_dict import StateDictModel, StateDictTensor

_EXAMPLE = "stack '**.experts.*.w1.weight' '**.experts.w1'"


@dataclass(frozen=True, kw_only=True)
class Stack(Edit):
    """Put tensors whose names differ in a number into one along a new axis, in the order of the numbers."""

    old: str
    new: str
    dim: int = option(
        "--dim", DIM, 0, "The new axis; a negative one counts from the end.", metavar="N", shown_default="0"
    )

    name: ClassVar[str] = "stack"
    summary: ClassVar[str] = "Put numbered tensors of a state dict, such as experts, into one."
    effect: ClassVar[str] = (
        "puts tensors of a state dict whose keys differ in a number into one along a new axis: OLD has one `*` or "
        "`[0-7]` more than NEW, for the number (of several, the last)"
    )
    in_pytorch: ClassVar[str] = "`torch.stack([state[key] for key in old], dim)`"
    examples: ClassVar[tuple[str, ...]] = (
        "modelcli stack 'layer1.*.conv1.weight' layer1.conv1.weight -m best.pth --bare-keys -o out.pth",
        "modelcli stack 'layer1.*.bn[1-2].bias' 'layer1.*.bias' --dim 1 -m best.pth --bare-keys",
    )
    words: ClassVar[tuple[Operand, ...]] = (
        Operand("old", "The keys to put into one: '**.experts.*.w1.weight'.", completes=(TENSORS,)),
        Operand("new", "The key of the result, without the wildcard for the number: '**.experts.w1'."),
    )
    handler: ClassVar[str] = "modelcli.live.surgery.stack"
    moves_paths: ClassVar[bool] = True

    @classmethod
    def from_operands(cls, words: Sequence[str]) -> Self:
        if len(words) != 2:
            raise RequestError("stack takes an old and a new name", _EXAMPLE)
        return cls(old=selector(words[0]), new=selector(words[1]))

    def operands(self) -> list[str]:
        return [self.old, self.new]

    def matches(self, model: StateDictModel) -> list[Match]:
        """Return the tensors of each result in the order of their numbers. Raises RequestError where one is missing."""
        place, wildcard = numbered_keys.counting(self.old, self.new, _EXAMPLE)
        captured = selectors.capturing(self.old, model.blueprint, self.name)
        filled = selectors.filling(self.new, self.name)
        groups: dict[str, dict[int, str]] = {}
        for name in key_surgery.tensor_names(model):
            if (texts := captured(name)) is None:
                continue
            number = numbered_keys.number_of(texts[place], name, wildcard)
            group = groups.setdefault(filled([*texts[:place], *texts[place + 1 :]]), {})
            if number in group:
                raise RequestError(f"{group[number]} and {name} would both be number {number}")
            group[number] = name
        if not groups:
            raise key_surgery.no_tensor(self.old, model.blueprint, str(self))
        found = []
        for new, group in groups.items():
            numbers = numbered_keys.wanted(wildcard, len(group))
            for number in numbers if numbers is not None else sorted(group):
                if numbers is None or number not in group:
                    there = numbered_keys.told(sorted(group))
                    raise RequestError(
                        f"{group[min(group)]} and its like have the numbers {there}, and {wildcard} takes "
                        f"{numbered_keys.described(wildcard)}",
                        "rename gives tensors other numbers, and [0-7] in the place of * takes only these",
                    )
            assert numbers is not None
            found.append(Match(tuple(group[number] for number in numbers), (new,)))
        return found

    def apply_to_state_dict(self, model: StateDictModel, context: Context) -> Applied[StateDictModel]:
        return key_surgery.carried_out(self, model, self.matches(model), self._stacked, context)

    def _stacked(self, match: Match, tensors: Sequence[StateDictTensor]) -> list[Result]:
        shape = tensors[0].shape or ()
        axis = key_surgery.axis_of(self.dim, len(shape) + 1, match.old[0], shape)
        key_surgery.alike(self, match.old, tensors, None)
        return [Result([_with_axis(tensor, axis) for tensor in tensors], axis)]


def _with_axis(tensor: StateDictTensor, axis: int) -> StateDictTensor:
    """Return a tensor with one more axis of size 1, as `tensor.unsqueeze(axis)`."""
    shape, stride = tensor.shape or (), tensor.stride
    return replace(tensor, shape=(*shape[:axis], 1, *shape[axis:]), stride=(*stride[:axis], 1, *stride[axis:]))
