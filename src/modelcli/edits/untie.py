"""untie: give a tensor under one name, or a view of shared bytes, its own copy."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from modelcli.edits.applied import Applied, Change, Context
from modelcli.edits.base import Edit
from modelcli.edits.declaring import Operand, selector
from modelcli.edits.tie import NAMES, picked, plain_tensor, require_plain
from modelcli.errors import RequestError
from modelcli.language import selectors
from modelcli.model.blueprint import Blueprint
from modelcli.model.shared_bytes import Shown, tied
from modelcli.model.state_dict import StateDictModel, StateDictTensor
from modelcli.wording import listed


@dataclass(frozen=True, kw_only=True)
class Untie(Edit):
    """Give each of `names` its own copy of a tensor that it shares with other names."""

    names: tuple[str, ...]

    name: ClassVar[str] = "untie"
    summary: ClassVar[str] = "Give a tied tensor its own copy under these names."
    effect: ClassVar[str] = "gives a tied tensor its own copy, with the same values, under each of these names"
    in_pytorch: ClassVar[str] = "`model.head.weight = nn.Parameter(model.head.weight.detach().clone())`"
    example: ClassVar[str] = "untie head.weight"
    examples: ClassVar[tuple[str, ...]] = (
        "modelcli untie head.weight -m nets.py:Tied -o apart.pth",
        "modelcli untie head.weight -m nets.py:Tied",
    )
    words: ClassVar[tuple[Operand, ...]] = (NAMES,)
    also_called: ClassVar[tuple[str, ...]] = ("unshare", "detach", "separate")
    handler: ClassVar[str] = "modelcli.live.surgery.untie"
    can_break_fit: ClassVar[bool] = False

    @classmethod
    def from_operands(cls, words: Sequence[str]) -> Self:
        if not words:
            raise RequestError("untie takes at least one name of a tensor", cls.example)
        return cls(names=tuple(map(selector, words)))

    def operands(self) -> list[str]:
        return list(self.names)

    def apply_to_state_dict(self, model: StateDictModel, context: Context) -> Applied[StateDictModel]:
        found = untying(self, model.blueprint, model.shown)
        identity = model.next_identity
        entries = dict(model.entries)
        for number, name in enumerate(found.names, identity):
            entries[name] = _copy(plain_tensor(model, name), number)
        changed = StateDictModel(entries, model.modules, described_modules=model.module_infos)
        return Applied(changed, [*found.changes], [], context.inputs)


def _copy(tensor: StateDictTensor, number: int) -> StateDictTensor:
    return replace(tensor, identity=number, copied=number)


@dataclass(frozen=True)
class Untying:
    """The names that get their own tensors, with the rows."""

    names: tuple[str, ...]
    changes: tuple[Change, ...]


def untying(edit: Untie, blueprint: Blueprint, shown: Mapping[str, Shown]) -> Untying:
    """Find the names that get their own tensors.

    Args:
        edit: the edit.
        blueprint: the model's blueprint.
        shown: the bytes of each tensor, which tell what is tied.

    If all names of a tensor are picked, the first one keeps it. Raises RequestError for a tensor that shares nothing.
    """
    groups: dict[str, list[str]] = {name: group for group in tied(shown) for name in group if len(group) > 1}
    infos = picked(edit.names, blueprint)
    chosen = {info.name for info in infos}
    kept: set[Hashable] = set()
    names: list[str] = []
    changes: list[Change] = []
    for info in infos:
        require_plain(info, edit.name)
        if (group := groups.get(info.name)) is None:
            raise RequestError(
                f"{info.name} is tied to no other tensor", "modelcli params shows the tied tensors of a model"
            )
        if chosen.issuperset(group) and group[0] not in kept:
            kept.add(group[0])
            continue
        names.append(info.name)
        others = [name for name in group if name != info.name]
        size = info.elements if info.kind == "parameter" else 0
        changes.append(Change(info.name, edit.name, f"tied to {listed(others, 3)}", "a tensor of its own", 0, size))
    line = str(Untie(names=tuple(map(selectors.literal, names))))
    return Untying(tuple(names), (replace(changes[0], resolved=(line,)), *changes[1:]))
