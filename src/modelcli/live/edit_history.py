"""Which edits made what stands at a path: for what is found to be wrong only after all of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from modelcli.edits import Edit
from modelcli.live.surgery import Change
from modelcli.model.paths import ancestors


@dataclass
class Origins:
    """The edits that did something at each path, in order: where each stands and its line, as an error names it."""

    _found: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def note(self, edit: Edit, place: str, changes: Iterable[Change]) -> None:
        """Take in what an edit did. `place` is where it stands: `-e 1`, `modelcli.toml:5`, nothing for a command."""
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
        """How many edits made what stands at a path."""
        return len(self._of(path))

    def told(self, path: str) -> str:
        """`-e 1: 'replace fc ...', -e 3: ...`: the edits that made what stands at a path; nothing for a command."""
        return ", ".join(filter(None, self._of(path)))

    def only(self) -> str:
        """The one edit that did anything, which is what no longer fits comes of; nothing where there are more."""
        named = {name for names in self._found.values() for name in names}
        return named.pop() if len(named) == 1 else ""

    def _of(self, path: str) -> tuple[str, ...]:
        return next((self._found[above] for above in ancestors(path) if above in self._found), ())
