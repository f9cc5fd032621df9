"""Statements that put tensors made of others into `state`, in the places of those."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from modelcli.edits.key_surgery import Match
from modelcli.live.script.source_text import STATEMENTS, WIDTH, loop, quoted
from modelcli.live.script.state import State
from modelcli.model.state_dict import StateDictModel

#: Gives a view memory of its own, in row-major order.
OWN = ".clone(memory_format=torch.contiguous_format)"


def of_one(matches: Sequence[Match], model: StateDictModel, state: State, parts: str) -> list[str]:
    """Return the statements that take tensors apart.

    Args:
        matches: the tensors, and the names of their parts.
        model: the model before the edit.
        state: the state dict; the new keys are recorded in it.
        parts: the expression for the parts of `value`.
    """
    _record(matches, state)
    return [
        *_names((match.old[0], match.new) for match in matches),
        "made = {}",
        "for key, value in state.items():",
        "    if key in names:",
        f"        parts = {parts}",
        f"        made |= {{name: part{OWN} for name, part in zip(names[key], parts)}}",
        "    else:",
        "        made[key] = value",
        "state = made",
        *_ties(matches, model),
    ]


def of_several(matches: Sequence[Match], model: StateDictModel, state: State, made: str) -> list[str]:
    """Return the statements that join tensors. `made` is the expression for one of the list `parts`."""
    _record(matches, state)
    return [
        *_names((match.old[0], (*match.new, *match.old)) for match in matches),
        "made, below = {}, {key for _, *old in names.values() for key in old}",
        "for key, value in state.items():",
        "    if key in names:",
        "        new, *old = names[key]",
        "        parts = [state[name] for name in old]",
        f"        made[new] = {made}",
        "    elif key not in below:",
        "        made[key] = value",
        "state = made",
        *_ties(matches, model),
    ]


def in_place(matches: Sequence[Match], model: StateDictModel, call: str) -> list[str]:
    """Return the statements that give tensors other elements under their own names.

    Args:
        matches: the tensors.
        model: the model before the edit.
        call: what makes the new tensor of the old one: `.permute(1, 0)`.
    """
    ties = _ties(matches, model)
    seen: set[int] = set()
    names = []
    for name in (match.old[0] for match in matches):
        if model.tensors[name].identity not in seen:
            seen.add(model.tensors[name].identity)
            names.append(name)
    if len(names) <= STATEMENTS:
        return [*(f"state[{quoted(name)}] = state[{quoted(name)}]{call}{OWN}" for name in names), *ties]
    return [*loop("key", names, f"state[key] = state[key]{call}{OWN}"), *ties]


def _names(pairs: Iterable[tuple[str, Sequence[str]]]) -> list[str]:
    """Return the statement that assigns `names`, which has the names of a tuple for each key."""
    lines = []
    for key, names in pairs:
        line = f"    {quoted(key)}: ({', '.join(map(quoted, names))}{',' if len(names) == 1 else ''}),"
        if len(line) <= WIDTH:
            lines.append(line)
        else:
            lines += [f"    {quoted(key)}: (", *(f"        {quoted(name)}," for name in names), "    ),"]
    return ["names = {", *lines, "}"]


def _record(matches: Sequence[Match], state: State) -> None:
    """Record the new keys, each set of them in the place of the first old one."""
    firsts = {match.old[0]: match.new for match in matches}
    gone = {name for match in matches for name in match.old}
    found: list[str] = []
    for name in state.names:
        found += firsts.get(name, () if name in gone else (name,))
    state.names = found


def _ties(matches: Sequence[Match], model: StateDictModel) -> list[str]:
    """Return the statements that tie new tensors that are made of the same old ones."""
    first: dict[tuple[int, ...], Match] = {}
    lines = []
    for match in matches:
        other = first.setdefault(tuple(model.tensors[name].identity for name in match.old), match)
        if other is not match:
            lines += [
                f"state[{quoted(new)}] = state[{quoted(old)}]" for new, old in zip(match.new, other.new, strict=True)
            ]
    return lines
