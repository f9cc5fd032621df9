"""unstack: take a tensor of a state dict apart into numbered ones, such as those of experts."""

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

_EXAMPLE = "unstack '**.experts.w1' '**.experts.*.w1.weight'"
#: The most tensors that may come of one edit.
MAX_TENSORS = 100_000


@dataclass(frozen=True, kw_only=True)
class Unstack(Edit):
    """Take each matching tensor apart along an axis, which the parts do not have; their names have its positions."""

    old: str
    new: str
    dim: int = option("--dim", DIM, 0, "The axis; a negative one counts from the end.", metavar="N", shown_default="0")

    name: ClassVar[str] = "unstack"
    summary: ClassVar[str] = "Take tensors of a state dict apart into numbered ones, such as experts."
    effect: ClassVar[str] = (
        "takes each matching tensor of a state dict apart along `--dim` into numbered ones without that axis: NEW has "
        "one `*` or `[0-7]` more than OLD, for the number (of several, the last)"
    )
    in_pytorch: ClassVar[str] = "`torch.unbind(state[key], dim)`"
    examples: ClassVar[tuple[str, ...]] = (
        "modelcli unstack '**.weight' '**.rows.*' -m bare.pth -o out.pth",
        "modelcli unstack '**.weight' '**.columns.[1-2]' --dim 1 -m parallel.pth",
    )
    words: ClassVar[tuple[Operand, ...]] = (
        Operand("old", "The keys to take apart: '**.experts.w1'.", completes=(TENSORS,)),
        Operand("new", "The keys of the parts, with a wildcard for the number: '**.experts.*.w1.weight'."),
    )
    also_called: ClassVar[tuple[str, ...]] = ("unbind",)
    handler: ClassVar[str] = "modelcli.live.surgery.unstack"
    moves_paths: ClassVar[bool] = True

    @classmethod
    def from_operands(cls, words: Sequence[str]) -> Self:
        if len(words) != 2:
            raise RequestError("unstack takes an old and a new name", _EXAMPLE)
        return cls(old=selector(words[0]), new=selector(words[1]))

    def operands(self) -> list[str]:
        return [self.old, self.new]

    def matches(self, model: StateDictModel) -> list[Match]:
        """Return each tensor to take apart, and the names of its parts."""
        place, wildcard = numbered_keys.counting(self.new, self.old, _EXAMPLE)
        captured = selectors.capturing(self.old, model.blueprint, self.name)
        filled = selectors.filling(self.new, self.name)
        texts = {name: own for name in key_surgery.tensor_names(model) if (own := captured(name)) is not None}
        if not texts:
            raise key_surgery.no_tensor(self.old, model.blueprint, str(self))
        key_surgery.require_plain(self, model, texts)
        sizes = {}
        for name in texts:
            shape = model.tensors[name].shape or ()
            sizes[name] = shape[key_surgery.axis_of(self.dim, len(shape), name, shape)]
            if not sizes[name]:
                raise RequestError(f"{name} has the shape {list(shape)}, so nothing would be left of it")
        if sum(sizes.values()) > MAX_TENSORS:
            raise RequestError(
                f"unstack would make {sum(sizes.values()):,} tensors, and the limit is {MAX_TENSORS:,}",
                "name fewer tensors, or a shorter axis with --dim",
            )
        found = []
        for name, own in texts.items():
            numbers = numbered_keys.wanted(wildcard, sizes[name])
            if numbers is None:
                raise RequestError(
                    f"{name} has the shape {list(model.tensors[name].shape or ())}, which makes {sizes[name]} tensors, "
                    f"and {wildcard} takes {numbered_keys.described(wildcard)}",
                    "write * for the numbers from 0, or a range of as many numbers",
                )
            new = tuple(filled([*own[:place], str(number), *own[place:]]) for number in numbers)
            found.append(Match((name,), new))
        return found

    def apply_to_state_dict(self, model: StateDictModel, context: Context) -> Applied[StateDictModel]:
        return key_surgery.carried_out(self, model, self.matches(model), self._parts, context)

    def _parts(self, match: Match, tensors: Sequence[StateDictTensor]) -> list[Result]:
        (tensor,) = tensors
        shape, stride = tensor.shape or (), tensor.stride
        axis = self.dim % len(shape)
        part = replace(tensor, shape=(*shape[:axis], *shape[axis + 1 :]), stride=(*stride[:axis], *stride[axis + 1 :]))
        step = stride[axis] if part.elements else 0
        return [Result([replace(part, offset=tensor.offset + number * step)]) for number in range(len(match.new))]
