"""Let the state dict of an optimizer follow the edits of a model.

The result is what `torch.optim` loads into an optimizer that is made for the edited model:
`torch.optim.Adam(model.parameters()).load_state_dict(...)`, or of its trained parameters, or with the same groups.

- State follows values. A parameter that was renamed or moved keeps its state. One that is made of the elements of old
  ones (`split`, `concat`, `permute`) gets their state arranged in the same way: tensors of the parameter's shape, such
  as `exp_avg`, as the parameter, and scalars such as `step` as they are. A copy (`slice`, `untie`) gets a copy.
- A parameter with values that no old one had (a new module, `init`, `replace --keep-weights`) has no state: the
  optimizer starts it anew. So does one whose state cannot be arranged, such as the rows and columns of Adafactor.
- Removed parameters are out, and so are those that an edit froze. New ones are in, and so are those that an edit made
  trainable, unless the optimizer had them.
- Ids are numbered anew, group by group, in the order of `model.parameters()`.
- Groups and their settings stay, also empty ones, because `load_state_dict` compares the number of groups. A new
  parameter joins the group of the one whose name it takes, else that of the nearest one before it with as many axes (so
  that biases come to biases), else of the nearest one after it, else the last group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from modelcli.checkpoints.copied import Copied
from modelcli.checkpoints.entries import TensorEntry
from modelcli.checkpoints.optimizer_parameters import Known, identified, joint_shape
from modelcli.checkpoints.optimizers import Optimizer, shapes_in
from modelcli.model.dtypes import ITEM_BYTES
from modelcli.model.parameter_origins import Held, OldParameters, Origin
from modelcli.model.state_dict import StateDictTensor
from modelcli.wording import is_or_are, listed

_NAMES = 4


class CannotFollowError(Exception):
    """The state of a parameter cannot be arranged as the parameter was. Its text is the reason."""


#: Returns the tensors in the state of old parameters, arranged as an edited parameter is arranged.
#: Args: the parameter, and for each old parameter by name its tensor of the state. Raises CannotFollowError.
Arrange = Callable[[StateDictTensor, Mapping[str, TensorEntry]], TensorEntry]


@dataclass(frozen=True)
class Followed:
    """An optimizer after the edits: its new state dict, or None if it is the same; and notes."""

    value: Mapping[str, Any] | None
    notes: list[str]


@dataclass(frozen=True)
class _Member:
    """A parameter of the optimizer now.

    Attributes:
        name: its name.
        held: the parameter.
        old: the parameters of the optimizer that it takes the place of; none for one that is new in it.
        origin: where its values come from.
    """

    name: str
    held: Held
    old: tuple[str, ...]
    origin: Origin | None


def is_unchanged(old: OldParameters, now: Mapping[str, Held]) -> bool:
    """Whether the parameters, their order, their values and their flags are what they were. Names do not count."""
    if len(now) != len(old.opened):
        return False
    return all(
        old.same(held) == before
        and old.origin(name, held) == Origin((before,))
        and not _is_frozen_now(old, (before,), held)
        and not _is_trained_now(old, (before,), held)
        for before, (name, held) in zip(old.opened, now.items(), strict=True)
    )


def _is_frozen_now(old: OldParameters, names: Sequence[str], held: Held) -> bool:
    return held.requires_grad is False and any(old.opened[name].requires_grad is not False for name in names)


def _is_trained_now(old: OldParameters, names: Sequence[str], held: Held) -> bool:
    return held.requires_grad is True and all(old.opened[name].requires_grad is not True for name in names)


def followed(
    optimizer: Optimizer, known: Known, old: OldParameters, now: Mapping[str, Held], arrange: Arrange
) -> Followed:
    """Return an optimizer's state dict for the edited model.

    Args:
        optimizer: the optimizer, which has no fault.
        known: its parameters.
        old: the parameters of the model as it was opened.
        now: the parameters of the edited model, in the order of `model.parameters()`.
        arrange: arranges tensors of the state as an edited parameter is arranged.
    """
    if not optimizer.groups:
        return Followed(None, [])
    group_of = {name: number for number, names in enumerate(known.groups) for name in names}
    members, frozen = _members(old, now, group_of)
    groups = _in_groups(members, known, old, now)
    states = _States(optimizer, known, old, arrange)
    is_list_same = [[member.origin for member in group] for group in groups] == [
        [Origin((name,)) for name in names] for names in known.groups
    ]
    state: dict[Any, Any] = {}
    if not optimizer.is_by_name:  # what an optimizer of one's own keeps beside the parameters
        state |= {key: value for key, value in optimizer.state.items() if type(key) is not int}
    made: list[Mapping[str, Any]] = []
    count = 0
    for group, own in zip(optimizer.groups, groups, strict=True):
        names = [known.written(member.name) for member in own]
        ids: list[Any] = names if optimizer.is_by_name else list(range(count, count + len(own)))
        count += len(own)
        for number, member in zip(ids, own, strict=True):
            if (entry := states.of(member, is_list_same=is_list_same)) is not None:
                state[number] = entry
        made.append({**group, "params": ids} | ({"param_names": names} if "param_names" in group else {}))
    is_same = (
        [group["params"] for group in made] == optimizer.ids
        and [group.get("param_names") for group in made] == [group.get("param_names") for group in optimizer.groups]
        and state.keys() == optimizer.state.keys()
        and all(state[key] is value for key, value in optimizer.state.items())
    )
    if is_same:
        return Followed(None, [])
    told = _told(optimizer, members, frozen, states, _joined_groups(members, group_of))
    if known.is_assumed:
        told.append(f"its {len(made)} groups were taken to have the parameters in the order of the model")
    told += _beside(optimizer)
    note = f"the state in {optimizer.place} follows the edits"
    return Followed({**optimizer.value, "state": state, "param_groups": made}, ["; ".join([note, *told])])


def is_outdated(optimizer: Optimizer, old: OldParameters, now: Mapping[str, Held], *, from_keys: bool) -> bool:
    """Whether the edits of a model change its optimizer, or may do so. Arguments as in `identified` and `followed`."""
    is_same = is_unchanged(old, now)
    if is_same and (optimizer.names is None or list(old.opened) == list(now)):
        return False
    known = optimizer.fault or identified(optimizer, old.opened, from_keys=from_keys)
    if isinstance(known, str):
        return True
    return followed(optimizer, known, old, now, lambda _, state: next(iter(state.values()))).value is not None


# --- which parameters ------------------------------------------------------------------------------------------------


def _members(
    old: OldParameters, now: Mapping[str, Held], group_of: Mapping[str, int]
) -> tuple[list[_Member], list[str]]:
    """Return the optimizer's parameters in the order of the model, and the names of those that an edit froze."""
    members: list[_Member] = []
    frozen: list[str] = []
    for name, held in now.items():
        origin, same = old.origin(name, held), old.same(held)
        before = (same,) if same is not None else origin.names if origin is not None else ()
        inside = tuple(parameter for parameter in before if parameter in group_of)
        if not before:
            if held.requires_grad is not False:
                members.append(_Member(name, held, (), origin))
        elif inside and _is_frozen_now(old, before, held):
            frozen.append(name)
        elif inside or _is_trained_now(old, before, held):
            members.append(_Member(name, held, inside, origin))
    return members, frozen


def _in_groups(
    members: Sequence[_Member], known: Known, old: OldParameters, now: Mapping[str, Held]
) -> list[list[_Member]]:
    """Return the parameters of each group in the order in which it has them afterwards."""
    places = {name: place for place, name in enumerate(old.opened)}
    group_of = {name: number for number, names in enumerate(known.groups) for name in names}
    found = _groups_of(members, group_of)
    groups: list[list[_Member]] = [[] for _ in known.groups]
    for member in members:
        groups[found[member.name]].append(member)
    in_order = all([places[name] for name in names] == sorted(places[name] for name in names) for names in known.groups)
    if not in_order:  # an order of the program's own: what is new comes last
        at = {name: place for names in known.groups for place, name in enumerate(names)}
        for group in groups:
            group.sort(key=lambda member: at[member.old[0]] if member.old else len(at))
    return groups


def _groups_of(members: Sequence[_Member], group_of: Mapping[str, int]) -> dict[str, int]:
    """Return the number of the group of each parameter, by its name now."""
    last = max(group_of.values(), default=0)
    found: dict[str, int] = {}
    for member in members:
        if member.old:
            found[member.name] = group_of[member.old[0]]
        elif member.name in group_of:
            found[member.name] = group_of[member.name]
    for backwards in (False, True):
        by_axes: dict[int, int] = {}
        added: dict[str, int] = {}
        for member in reversed(members) if backwards else members:
            axes = len(member.held.shape or ())
            if member.name in found:
                by_axes[axes] = found[member.name]
            elif axes in by_axes:
                added[member.name] = by_axes[axes]
        found |= added
    return {member.name: found.get(member.name, last) for member in members}


def _joined_groups(members: Sequence[_Member], group_of: Mapping[str, int]) -> list[str]:
    """Return the names of parameters that are made of parameters of several groups."""
    return [member.name for member in members if len({group_of[name] for name in member.old}) > 1]


# --- their state -----------------------------------------------------------------------------------------------------


class _States:
    """The states of the parameters, each arranged as its parameter.

    Attributes:
        dropped: the reasons why a parameter lost state that it had, by name.
        without: the names of parameters that are in the optimizer anew, without state.
    """

    def __init__(self, optimizer: Optimizer, known: Known, old: OldParameters, arrange: Arrange) -> None:
        self._old = old
        self._arrange = arrange
        self._entries = {
            name: optimizer.state[own]
            for ids, names in zip(optimizer.ids, known.groups, strict=True)
            for own, name in zip(ids, names, strict=True)
            if own in optimizer.state
        }
        self._joint = joint_shape(known.groups, old.opened)
        self._used: set[str] = set()
        self.dropped: dict[str, str] = {}
        self.without: list[str] = []

    def of(self, member: _Member, *, is_list_same: bool) -> Any:
        """Return the state of a parameter; None if it has none. `is_list_same`: the others are where they were."""
        origin = member.origin
        had = [name for name in (*member.old, member.name) if self._entries.get(name)]
        if not member.old:
            self.without.append(member.name)
        if origin is None or not member.old:
            if had and member.old:
                self.dropped[member.name] = "its values are new"
            return None
        there = [name for name in origin.names if self._entries.get(name)]
        if not there:
            return self._entries.get(origin.names[0]) if origin.made is None else None
        try:
            if len(there) < len(origin.names):
                missing = next(name for name in origin.names if name not in there)
                raise CannotFollowError(f"{missing} has none")
            if origin.made is not None:
                return self._arranged(origin)
            return self._whole(origin.names[0], is_list_same=is_list_same)
        except CannotFollowError as error:
            self.dropped[member.name] = str(error)
            return None

    def _whole(self, name: str, *, is_list_same: bool) -> Any:
        """Return the state of an old parameter for one with all its elements; from the second time on, as a copy."""
        entry = self._entries[name]
        if not is_list_same and self._joint in shapes_in(entry) and self._old.opened[name].shape != self._joint:
            raise CannotFollowError("it is one vector of all parameters")
        if name not in self._used:
            self._used.add(name)
            return entry
        if not isinstance(entry, dict):
            raise CannotFollowError(f"it is a {type(entry).__name__}")
        return {key: _separate(key, value) for key, value in entry.items()}

    def _arranged(self, origin: Origin) -> dict[Any, Any]:
        assert origin.made is not None
        entries = {name: self._entries[name] for name in origin.names}
        first = entries[origin.names[0]]
        for name, entry in entries.items():
            if not isinstance(entry, dict):
                raise CannotFollowError(f"that of {name} is a {type(entry).__name__}")
            if entry.keys() != first.keys():
                raise CannotFollowError(f"{origin.names[0]} and {name} have different state")
        return {key: self._value(key, {name: entry[key] for name, entry in entries.items()}, origin) for key in first}

    def _value(self, key: Any, values: Mapping[str, Any], origin: Origin) -> Any:
        assert origin.made is not None
        if all(self._has_own_shape(key, name, value) for name, value in values.items()):
            return self._arrange(origin.made, values)
        first, *others = values.values()
        for name, value in values.items():
            if not _is_scalar(value):
                shape = f" {list(value.shape)}" if hasattr(value, "shape") else ""
                own = list(self._old.opened[name].shape or ())
                raise CannotFollowError(f"{key}{shape} has not the shape {own} of {name}")
        if any(not _is_equal(first, other) for other in others):
            raise CannotFollowError(f"{key} is not the same for {listed(list(values), 2)}")
        return _separate(key, first)

    def _has_own_shape(self, key: Any, name: str, value: Any) -> bool:
        """Whether a value has an element for each element of its parameter; `step` of a scalar has not."""
        shape = self._old.opened[name].shape
        return isinstance(value, TensorEntry) and value.shape == shape and not (shape == () and key == "step")


def _is_scalar(value: Any) -> bool:
    if isinstance(value, TensorEntry):
        return prod(value.shape) == 1 and len(value.shape) < 2
    return value is None or isinstance(value, bool | int | float | str)


def _is_equal(one: Any, other: Any) -> bool:
    """Whether two scalars are equal; NaN is equal to itself."""
    if not (isinstance(one, TensorEntry) and isinstance(other, TensorEntry)):
        return type(one) is type(other) and (one == other or repr(one) == repr(other))
    return (one.dtype, one.shape) == (other.dtype, other.shape) and _bytes_of(one) == _bytes_of(other)


def _bytes_of(scalar: TensorEntry) -> bytes:
    size = ITEM_BYTES[scalar.dtype]
    return bytes(scalar.storage.part(scalar.offset * size, size).bytes())


def _separate(key: Any, value: Any) -> Any:
    """Return a value of the state whose memory no other parameter shares: optimizers change it in place."""
    if isinstance(value, TensorEntry):
        return replace(value, storage=Copied(value.storage))
    if not _is_scalar(value):
        raise CannotFollowError(f"{key} is a {type(value).__name__}, which modelcli does not copy")
    return value


# --- notes -----------------------------------------------------------------------------------------------------------


def _told(
    optimizer: Optimizer,
    members: Sequence[_Member],
    frozen: Sequence[str],
    states: _States,
    regrouped: Sequence[str],
) -> list[str]:
    told = []
    if states.without:
        told.append(f"{listed(states.without, _NAMES)} {is_or_are(len(states.without))} new in it, without state")
    if frozen:
        told.append(f"{listed(frozen, _NAMES)} {is_or_are(len(frozen))} frozen and out of it")
    reasons: dict[str, list[str]] = {}
    for name, why in states.dropped.items():
        reasons.setdefault(why, []).append(name)
    told += [
        f"the state of {listed(names, _NAMES)} was dropped and starts anew: {why}"
        for why, names in [*reasons.items()][:3]
    ]
    if len(reasons) > 3:
        left = [name for names in [*reasons.values()][3:] for name in names]
        told.append(f"so was that of {listed(left, _NAMES)}")
    if regrouped:
        told.append(f"{listed(regrouped, _NAMES)} joined the group of the first of several that it is made of")
    if not members:
        told.append("it has no parameters left")
    return told


def _beside(optimizer: Optimizer) -> list[str]:
    """Return the note on entries beside `state` and `param_groups`: what they say of parameters is not known."""
    names = [
        str(key)
        for key, value in optimizer.value.items()
        if key not in ("state", "param_groups") and isinstance(value, dict | list | tuple | TensorEntry) and value
    ]
    return [f"{listed(names, _NAMES)} beside it {is_or_are(len(names))} as before"] if names else []


__all__ = ["Arrange", "CannotFollowError", "Followed", "followed", "is_outdated", "is_unchanged"]
