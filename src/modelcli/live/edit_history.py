"""Which edits changed each path. The check that runs after all edits uses this to name the edit at fault."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from modelcli.edits import Edit
from modelcli.edits.applied import Change
from modelcli.model.paths import ancestors


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
    """The edits that changed each path, in order. Each is the text that an error shows: its location and its line."""

    by_path: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

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

    def _at(self, path: str) -> tuple[str, ...]:
        return next((self.by_path[above] for above in ancestors(path) if above in self.by_path), ())


NO_HISTORY = EditHistory()


def history_of(applied: Iterable[AppliedEdit]) -> EditHistory:
    """Return the history of edits that were carried out in this order, without those that cannot break the fit."""
    by_path: dict[str, tuple[str, ...]] = {}
    for one in applied:
        if not one.edit.can_break_fit:
            continue
        if one.edit.moves_paths:
            by_path.clear()
        text = f"{one.location}: {str(one.edit)!r}" if one.location else ""
        for path in {change.path for change in one.changes}:
            by_path[path] = (*by_path.get(path, ()), text)
    return EditHistory(by_path)
