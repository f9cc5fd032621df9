"""tie: make parameters of the same shape one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from modelcli.edits.applied import Applied, Change, Context
from modelcli.edits.base import Edit
from modelcli.edits.declaring import TENSORS, Operand, selector
from modelcli.errors import RequestError
from modelcli.language import selectors
from modelcli.model.blueprint import Blueprint
from modelcli.model.state_dict import StateDictModel, StateDictTensor
from modelcli.model.tensors import TensorInfo

#: The words of tie and untie: names of tensors.
NAMES = Operand(
    "names",
    "Names of tensors: embed.weight.",
    "NAME...",
    several=True,
    completes=(TENSORS,),
    completes_later=(TENSORS,),
)


@dataclass(frozen=True, kw_only=True)
class Tie(Edit):
    """Make tensors one: all of `names` become the first one, with its values and its `requires_grad`."""

    names: tuple[str, ...]

    name: ClassVar[str] = "tie"
    summary: ClassVar[str] = "Make tensors of the same shape one; the first one's values are kept."
    effect: ClassVar[str] = "makes tensors of the same shape one, as embeddings and output layers often are"
    in_pytorch: ClassVar[str] = "`model.head.weight = model.embed.weight`"
    examples: ClassVar[tuple[str, ...]] = (
        "modelcli tie layer1.0.conv1.weight layer1.0.conv2.weight -m resnet18 -o tied.pth",
        "modelcli tie 0.weight 2.weight -m 'Sequential(Linear(4,4),ReLU(),Linear(4,4))'",
    )
    words: ClassVar[tuple[Operand, ...]] = (NAMES,)
    also_called: ClassVar[tuple[str, ...]] = ("share", "alias")
    handler: ClassVar[str] = "modelcli.live.surgery.tie"
    can_break_fit: ClassVar[bool] = False

    @classmethod
    def from_operands(cls, words: Sequence[str]) -> Self:
        if len(words) < 2:
            raise RequestError("tie takes at least two names of tensors", "tie embed.weight head.weight")
        return cls(names=tuple(map(selector, words)))

    def operands(self) -> list[str]:
        return list(self.names)

    def apply_to_state_dict(self, model: StateDictModel, context: Context) -> Applied[StateDictModel]:
        found = tying(self, model.blueprint)
        first, *others = (plain_tensor(model, name) for name in found.names)
        entries = dict(model.entries)
        gone = {tensor.identity for tensor in others}
        for name, tensor in model.tensors.items():
            if tensor.identity in gone:
                entries[name] = first
        changed = StateDictModel(entries, model.modules, described_modules=model.module_infos)
        return Applied(changed, [*found.changes], [*found.notes], context.inputs)


@dataclass(frozen=True)
class Tying:
    """The tensors that become one, with the rows and notes of that."""

    names: tuple[str, ...]
    changes: tuple[Change, ...]
    notes: tuple[str, ...]


def tying(edit: Tie, blueprint: Blueprint) -> Tying:
    """Find the tensors to tie. Raises RequestError if they cannot be one, or are one already."""
    infos = picked(edit.names, blueprint)
    first = infos[0]
    for info in infos:
        require_plain(info, edit.name)
        if (info.shape, info.dtype) != (first.shape, first.dtype):
            raise RequestError(
                f"{first.name} is {first.dtype} {list(first.shape or ())} and {info.name} is {info.dtype} "
                f"{list(info.shape or ())}: only tensors of one shape and dtype can be tied",
                "cast changes dtypes, resize and replace --keep-weights change shapes",
            )
        if info.kind != first.kind:
            raise RequestError(f"{first.name} is a {first.kind} and {info.name} is a {info.kind}", "name tensors alike")
    others = [info for info in infos[1:] if info.identity != first.identity]
    if not others:
        raise RequestError(f"{', '.join(info.name for info in infos)} are one tensor already", "leave the edit out")
    line = str(Tie(names=tuple(selectors.literal(info.name) for info in (first, *others))))
    changes: list[Change] = []
    for info in others:
        size = info.elements if info.kind == "parameter" else 0
        resolved = (line,) if not changes else ()
        changes.append(Change(info.name, edit.name, "a tensor of its own", f"is {first.name}", size, 0, resolved))
    notes = [f"the values of {first.name} are kept; those of {', '.join(info.name for info in others)} are dropped"]
    flags = [info.name for info in others if info.requires_grad is not first.requires_grad]
    if flags and first.requires_grad is not None:
        state = "trainable" if first.requires_grad else "frozen"
        notes.append(f"{', '.join(flags)} {'is' if len(flags) == 1 else 'are'} {state} now, as {first.name} is")
    return Tying((first.name, *(info.name for info in others)), tuple(changes), tuple(notes))


def picked(names: Sequence[str], blueprint: Blueprint) -> list[TensorInfo]:
    """Return the tensors that selectors pick, those of the first selector first, each once.

    Raises RequestError for a selector that picks no tensor.
    """
    found: dict[str, TensorInfo] = {}
    for text in names:
        for name in selectors.select_tensors(blueprint, [text]):
            found.setdefault(name, blueprint.by_name[name])
    return list(found.values())


def require_plain(info: TensorInfo, edit: str) -> None:
    """Raise RequestError for a tensor without a shape, or one that is sparse or quantized."""
    if info.shape is None or info.layout != "strided" or info.dtype.startswith("q"):
        what = "has no shape yet" if info.shape is None else "is no dense tensor"
        raise RequestError(f"{info.name} {what}, and {edit} takes dense tensors", "name other tensors")


def plain_tensor(model: StateDictModel, name: str) -> StateDictTensor:
    """Return a tensor of a state-dict model. Raises RequestError for a part of an entry, which edits leave as it is."""
    tensor = model.tensors.get(name)
    if tensor is None:
        raise RequestError(f"{name} is a part of an entry that is no tensor", "name whole tensors")
    return tensor
