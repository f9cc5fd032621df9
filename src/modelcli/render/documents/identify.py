"""The view of `identify`: the models that a checkpoint fits, or nearly fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from modelcli.render.documents.common import SCHEMA
from modelcli.render.views import (
    Column,
    View,
    count,
    shape,
)
from modelcli.wording import listed

if TYPE_CHECKING:
    from modelcli.commands.identify import ConfiguredModel
    from modelcli.model.state_dict_match import Match


#: A row names at most this many of the tensors that do not fit.
_MOST_NAMED = 4


def identify(reference: str, matches: Sequence[Match], configured: ConfiguredModel | None = None) -> View:
    """Return the view of the models that a checkpoint fits or nearly fits, and of what does not fit.

    Args:
        reference: the checkpoint.
        matches: the models.
        configured: what the configuration of a folder says, if that is the match.
    """
    entries = [
        {
            "model": match.model,
            "exact": match.exact,
            "matched": match.matched,
            "missing": list(match.missing),
            "unexpected": list(match.unexpected),
            "mismatched": [
                asdict(item) | {"expected": [*item.expected], "found": [*item.found]} for item in match.mismatched
            ],
        }
        for match in matches
    ]
    described = None if configured is None else {"architecture": configured.architecture, "library": configured.library}
    document: dict[str, Any] = {"schema": SCHEMA, "matches": entries}
    if described is not None:
        document["configuration"] = described
    columns = (
        Column("model", "model", style="cyan"),
        *((Column("architecture", "architecture"), Column("library", "library")) if described is not None else ()),
        Column("exact", "fits", lambda value: "exactly" if value else "nearly"),
        Column("matched", "matched", count, right=True),
        Column("differing", "what does not fit", flexible=True),
    )
    if not matches:
        return View(document, [], columns, body=f"no model that modelcli list shows is close to {reference}")
    rows = [row | (described or {}) for row in entries]
    return View(
        document, [row | {"differing": _unfit(match)} for row, match in zip(rows, matches, strict=True)], columns
    )


def _unfit(match: Match) -> str:
    """Name the first tensors that do not fit; those with another shape come first."""
    parts = [f"{item.name} {shape([*item.found])} not {shape([*item.expected])}" for item in match.mismatched]
    parts += [f"{name} missing" for name in match.missing] + [f"{name} unexpected" for name in match.unexpected]
    return listed(parts, _MOST_NAMED)
