"""Which edits changed what is at a path, for an error that is found only after all of them: it names the edit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from modelcli.edits import Edit
from modelcli.live.surgery import Change
from modelcli.model.paths import ancestors


@dataclass
class EditHistory:
    """The edits that changed something at each path, in order: where each was written, and its line."""

    _found: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def add(self, edit: Edit, place: str, changes: Iterable[Change]) -> None:
        """Add what an edit changed. `place` is where it was written: `-e 1`, `modelcli.toml:5`; empty for a command."""
        if not edit.can_break_fit:
            return
        if edit.moves_paths:
            self._found.clear()
        named = f"{place}: {str(edit)!r}" if place else ""
        for path in {change.path for change in changes}:
            self._found[path] = (*self._found.get(path, ()), named)

    def clear(self) -> None:
        self._found.clear()

    def count(self, path: str) -> int:
        """How many edits changed what is at a path."""
        return len(self._of(path))

    def named(self, path: str) -> str:
        """The edits that changed what is at a path: `-e 1: 'replace fc ...', -e 3: ...`; empty for a command."""
        return ", ".join(filter(None, self._of(path)))

    def only(self) -> str:
        """The only edit that changed anything; empty where there are several."""
        named = {name for names in self._found.values() for name in names}
        return named.pop() if len(named) == 1 else ""

    def _of(self, path: str) -> tuple[str, ...]:
        return next((self._found[above] for above in ancestors(path) if above in self._found), ())
