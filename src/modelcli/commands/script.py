"""The same work as a plain PyTorch script."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from modelcli.commands.apply import Batch
from modelcli.commands.edit import Writing, check_fit
from modelcli.commands.look import stdout_is_for_data
from modelcli.commands.recipe_edits import apply_recipe
from modelcli.commands.target import Target, without_edits
from modelcli.errors import RequestError

if TYPE_CHECKING:
    from modelcli.live.scripting import Script


@stdout_is_for_data
def script(batch: Batch, out: Path, kind: str, *, bare: bool) -> Script:
    """The same work as a plain PyTorch script: see `live.scripting.script`. A note says where it would not run."""
    from modelcli.live import scripting

    edits = (*batch.target.edits, *batch.edits)
    places = (*batch.target.places, *batch.places)
    made = scripting.script(batch.target.source, edits, places, out, kind, bare=bare)
    made = replace(made, notes=(*batch.target.notes, *made.notes))
    if not edits:
        return made
    misfit = _misfit(replace(batch.target, edits=edits, places=places))
    return made if misfit is None else replace(made, notes=(*made.notes, misfit))


def _misfit(target: Target) -> str | None:
    """What the check before writing would refuse in an edited model."""
    from modelcli.live import opening

    live = opening.open_live(target.source)
    apply_recipe(live, target)
    try:
        check_fit(live, without_edits(target), target.edits, Writing())
    except RequestError as error:
        return f"the edited model does not fit, and modelcli itself would not write it: {error.message}"
    return None
