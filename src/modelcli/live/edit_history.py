"""Which edits changed each path. The check that runs after all edits uses this to name the edit at fault."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from modelcli.edits import Edit, parse
from modelcli.edits.applied import Change
from modelcli.language import selectors
from modelcli.language.expressions import Call, Hole
from modelcli.language.quoting import command
from modelcli.model.paths import ancestors, joined


class AppliedEdit(Protocol):
    """An edit that was carried out, its location (such as `-e 1`), and what it changed."""

    @property
    def edit(self) -> Edit: ...

    @property
    def location(self) -> str: ...

    @property
    def changes(self) -> Iterable[Change]: ...


@dataclass(frozen=True)
class EditHistory:
    """The edits that changed each path.

    Attributes:
        by_path: the edits in order. Each is the text that an error shows: its location and its line.
        placing: the last edit that put a new module at each path, as the lines that it was resolved to.
    """

    by_path: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    placing: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def count(self, path: str) -> int:
        """Return how many edits changed the module at a path, or the nearest changed module above it."""
        return len(self._at(path))

    def edits_at(self, path: str) -> str:
        """Return the edits that `count` counts: `-e 1: 'replace fc ...', -e 3: ...`; empty for a single command."""
        return ", ".join(filter(None, self._at(path)))

    def only_edit(self) -> str:
        """Return the only edit that changed anything; empty if there are several."""
        edits = {edit for edits in self.by_path.values() for edit in edits}
        return edits.pop() if len(edits) == 1 else ""

    def placing_another(self, path: str, module: Call) -> str | None:
        """Return the line that puts another module at a path, in the way of the edit that put one there.

        The line has that edit's options, such as `--after`. None if no edit put a module there.
        """
        edit = self._placing(path)
        return None if edit is None else command(edit.with_module(module).all_words())

    def holds_old(self, place: str, path: str) -> bool | None:
        """Whether a module inside the new one at `place` was there before, as what `_` stands for in a wrapper.

        None if the expression does not tell, because a class builds its children itself.
        """
        edit = self._placing(place)
        part: object = None if edit is None else edit.modules()[0]
        if not any(isinstance(hole, Hole) for hole in _arguments_of(part)):
            return False
        for name in path.removeprefix(joined(place, "")).split("."):
            if isinstance(part, Hole):
                break
            known = isinstance(part, Call) and part.name == "Sequential" and name.isdecimal()
            if not isinstance(part, Call) or not known or int(name) >= len(part.args):
                return None
            part = part.args[int(name)]
        return isinstance(part, Hole)

    def _placing(self, path: str) -> Edit | None:
        """Return the edit that put a module at a path, as it was resolved."""
        edits = [parse(line) for line in self.placing.get(path, ())]
        named = (edit for edit in edits if selectors.literal(path) in edit.all_words())
        return next(named, edits[0] if edits else None)

    def _at(self, path: str) -> tuple[str, ...]:
        return next((self.by_path[above] for above in ancestors(path) if above in self.by_path), ())


def _arguments_of(part: object) -> Iterator[object]:
    """Yield the arguments of a call, and those of the calls in it."""
    if isinstance(part, Call):
        for value in (*part.args, *part.kwargs.values()):
            yield value
            yield from _arguments_of(value)


NO_HISTORY = EditHistory()


def history_of(applied: Iterable[AppliedEdit]) -> EditHistory:
    """Return the history of edits that were carried out in this order, without those that cannot break the fit."""
    by_path: dict[str, tuple[str, ...]] = {}
    placing: dict[str, tuple[str, ...]] = {}
    for one in applied:
        if not one.edit.can_break_fit:
            continue
        if one.edit.moves_paths:
            by_path.clear()
            placing.clear()
        text = f"{one.location}: {str(one.edit)!r}" if one.location else ""
        lines = tuple(line for change in one.changes for line in change.resolved)
        for path in {change.path for change in one.changes}:
            by_path[path] = (*by_path.get(path, ()), text)
            if one.edit.places_module:
                placing[path] = lines
    return EditHistory(by_path, placing)
