"""rename: rename tensor keys."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from modelcli.edits.applied import Applied, Change, Context
from modelcli.edits.base import Edit
from modelcli.edits.declaring import TENSORS, Operand, selector
from modelcli.edits.key_names import check_names
from modelcli.errors import RequestError
from modelcli.language import selectors
from modelcli.language.quoting import quoted
from modelcli.model.blueprint import Blueprint
from modelcli.model.paths import parent_of
from modelcli.model.state_dict import StateDictModel, StateDictModule, StateDictTensor, of_entries


@dataclass(frozen=True, kw_only=True)
class Rename(Edit):
    """Rename tensor keys: the wildcards of `new` stand for what those of `old` matched, in the same order.

    If a name matches in several ways, the first wildcard takes as much as it can, then the second.
    """

    old: str
    new: str

    name: ClassVar[str] = "rename"
    summary: ClassVar[str] = "Rename the keys of tensors."
    effect: ClassVar[str] = (
        "renames tensor keys; each wildcard in NEW stands for what the wildcard in OLD matched: "
        "`rename 'module.**' '**'`"
    )
    in_pytorch: ClassVar[str] = "key surgery on a state dict"
    examples: ClassVar[tuple[str, ...]] = (
        "modelcli rename 'module.**' '**' -m parallel.pth -o plain.pth",
        "modelcli rename 'head.*' 'classifier.*' -m bare.pth -o out.pth",
    )
    words: ClassVar[tuple[Operand, ...]] = (
        Operand("old", "The old keys: 'module.**'.", completes=(TENSORS,)),
        Operand("new", "The new keys; each wildcard takes what the wildcard in OLD matched: '**'."),
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

    def new_names(self, model: StateDictModel) -> dict[str, str | None]:
        """The new name of each key; None for one that is not meant."""
        beside = {name for name in model.inert if _is_beside(name, model)}
        return names_given(self, model.blueprint, model.keys, beside)

    def apply_to_state_dict(self, model: StateDictModel, context: Context) -> Applied[StateDictModel]:
        blueprint = model.blueprint
        new_names = self.new_names(model)
        names, moved = renaming(self, blueprint, new_names, root_type=blueprint.root.type)
        found: dict[str, StateDictModule] = {}
        holders = {name: _holders(name, new) for name, new in names.items()}
        topmost = _topmost(holders.values())
        for path, new_path in topmost:  # where tensors differ, the first one decides
            if new_path not in found and (old := model.modules.get(path)) is not None:
                found[new_path] = old if old.info is None else StateDictModule(None, old.version)
        unknown = StateDictModule(None)
        renamed = of_entries(
            {new: model.entries[name] for name, new in names.items()}, lambda path: found.get(path, unknown)
        )
        changes = _renaming_changes(self, model.tensors, names, moved, holders, topmost)
        return Applied(renamed, changes, [], context.inputs)


#: The path of a module before and after a rename.
PathPair = tuple[str, str]
#: The number of changes that fill a screen; more become one change.
_ROWS = 20


def _is_beside(name: str, model: StateDictModel) -> bool:
    entry = model.inert[name]
    return entry.info(name, name) is None and "." not in name and not name.endswith("_extra_state")


def names_given(
    edit: Rename, blueprint: Blueprint, keys: Iterable[str], beside: Collection[str]
) -> dict[str, str | None]:
    """The new name of each key of a state dict; None for one that is not meant."""
    renamed = selectors.renaming(edit.old, edit.new, blueprint)
    return {name: None if name != edit.old and name in beside else renamed(name) for name in keys}


def renaming(
    edit: Rename, blueprint: Blueprint, new_names: Mapping[str, str | None], *, root_type: str | None
) -> tuple[dict[str, str], list[str]]:
    """The name of each key after a rename, and the keys that get another one. Raises RequestError where none does."""
    if all(new is None for new in new_names.values()):
        selector = selectors.parse(edit.old)
        if selectors.matched_modules(selector, blueprint):
            old, new = (_all_below(name.removeprefix(".")) for name in (edit.old, edit.new))
            raise RequestError(
                f"{edit.old!r} is a module, not a key", f"rename {quoted(old)} {quoted(new)} renames all its keys"
            )
        raise selectors.no_match(selector, blueprint, "tensors")
    names = {name: name if new is None else new for name, new in new_names.items()}
    moved = [name for name, new in names.items() if new != name]
    if not moved:
        raise RequestError(f"rename {edit.old} {edit.new} would change no key")
    check_names(names.items(), moved)
    if root_type is not None:
        raise RequestError(
            f"{root_type} cannot load a state dict where {moved[0]} is called {names[moved[0]]}",
            "--bare-keys ignores the file's record, renames the keys, and writes them without a record; "
            "in a model, replace, add and extract change where modules are",
        )
    return names, moved


def _holders(name: str, new: str) -> PathPair | None:
    """Return the old and the new path of the module that holds a tensor, if the rename keeps its module; else None."""
    (path, _, own), (new_path, _, new_own) = name.rpartition("."), new.rpartition(".")
    return (path, new_path) if own == new_own or path == new_path else None


def _above(path: str, new_path: str) -> PathPair | None:
    """Return the old and the new path of a module's parent, if the rename keeps its parent; else None."""
    (above, _, own), (new_above, _, new_own) = path.rpartition("."), new_path.rpartition(".")
    return (above, new_above) if path and new_path and own == new_own else None


def _topmost(holders: Iterable[PathPair | None]) -> dict[PathPair, PathPair]:
    """Return the topmost moved module for each of these modules, and for each moved module above them."""
    found: dict[PathPair, PathPair] = {}
    for pair in dict.fromkeys(holders):
        walked = []
        while pair is not None and pair not in found:
            walked.append(pair)
            pair = _above(*pair)
        if walked:
            top = walked[-1] if pair is None else found[pair]
            for below in walked:
                found[below] = top
    return found


def _renaming_changes(
    edit: Rename,
    tensors: Mapping[str, StateDictTensor],
    names: Mapping[str, str],
    moved: Sequence[str],
    holders: Mapping[str, PathPair | None],
    topmost: Mapping[PathPair, PathPair],
) -> list[Change]:
    """Return a change for each module that moves and each key that moves alone, or one change for all keys.

    Args:
        edit: the edit.
        tensors: the tensors by their old names.
        names: the new name of each key.
        moved: the keys that get another name.
        holders: what `_holders` says of each key.
        topmost: what `_topmost` says of them.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name in moved:
        pair = holders[name]
        if pair is None or pair[0] == pair[1]:
            groups.setdefault((name, names[name]), []).append(name)
        elif (top := topmost[pair]) in groups:
            groups[top].append(name)
        else:
            groups[top] = [name]
    if len(groups) > _ROWS:
        changes = [_renamed("", edit.old, edit.new, moved, tensors)]
    else:
        changes = []
        for (old, new), below in groups.items():
            if len(below) == 1:
                changes.append(_renamed(parent_of(below[0]), below[0], names[below[0]], below, tensors))
            else:
                changes.append(_renamed(old, _all_below(old), _all_below(new), below, tensors))
    return [replace(changes[0], resolved=(str(edit),)), *changes[1:]]


def _all_below(path: str) -> str:
    return f"{path}.**" if path else "**"


def _renamed(
    path: str, before: str, after: str, names: Sequence[str], tensors: Mapping[str, StateDictTensor]
) -> Change:
    picked = [tensors[name] for name in names if name in tensors]
    own = {tensor.identity: tensor for tensor in picked if tensor.kind == "parameter"}
    size = sum(tensor.elements for tensor in own.values())
    return Change(path, "rename", before, after if len(names) == 1 else f"{after} ({len(names)} keys)", size, size)
