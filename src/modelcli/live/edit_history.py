"""Which edits changed what is at a path, for an error that is found only after all of them: it names the edit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from modelcli.edits import Edit
from modelcli.edits.applied import Change
from modelcli.model.paths import ancestors


class AppliedEdit(Protocol):
    """An edit that was carried out, where it is written, and what it changed."""

    @property
    def edit(self) -> Edit: ...

    @property
    def location(self) -> str: ...

    @property
    def changes(self) -> Iterable[Change]: ...


@dataclass(frozen=True)
class EditHistory:
    """The edits that changed something at each path, in order, each as an error names it: its location and its line."""

    by_path: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def count(self, path: str) -> int:
        """How many edits changed what is at a path."""
        return len(self._at(path))

    def named(self, path: str) -> str:
        """The edits that changed what is at a path: `-e 1: 'replace fc ...', -e 3: ...`; empty for a command."""
        return ", ".join(filter(None, self._at(path)))

    def only(self) -> str:
        """The only edit that changed anything; empty where there are several."""
        named = {name for names in self.by_path.values() for name in names}
        return named.pop() if len(named) == 1 else ""

    def _at(self, path: str) -> tuple[str, ...]:
        return next((self.by_path[above] for above in ancestors(path) if above in self.by_path), ())


NO_HISTORY = EditHistory()


def history_of(applied: Iterable[AppliedEdit]) -> EditHistory:
    """The history of edits that were carried out in this order, without those that cannot break the fit."""
    found: dict[str, tuple[str, ...]] = {}
    for each in applied:
        if not each.edit.can_break_fit:
            continue
        if each.edit.moves_paths:
            found.clear()
        named = f"{each.location}: {str(each.edit)!r}" if each.location else ""
        for path in {change.path for change in each.changes}:
            found[path] = (*found.get(path, ()), named)
    return EditHistory(found)
