"""Write the same work as a plain PyTorch script."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from modelcli.commands.applied_edits import apply_each
from modelcli.commands.apply import Batch
from modelcli.commands.editable import open_editable, opened_keys
from modelcli.commands.fit_check import check_fit
from modelcli.commands.look import stdout_is_for_data
from modelcli.commands.target import Target, without_edits
from modelcli.errors import RequestError

if TYPE_CHECKING:
    from modelcli.live.scripting import Script


@dataclass(frozen=True)
class ScriptRequest:
    """Edits of a model, and the file that the script writes in this format.

    With `bare` the script keeps only the state dict of a training checkpoint.
    """

    batch: Batch
    out: Path
    format: str
    bare: bool = False


@stdout_is_for_data
def script(request: ScriptRequest) -> Script:
    """Return the script: see `live.scripting.script`. A note says if the edited model would not run."""
    from modelcli.live import scripting

    batch = request.batch
    edits = (*batch.target.edits, *batch.edits)
    locations = (*batch.target.locations, *batch.locations)
    source = batch.target.source
    keys = opened_keys(source)
    made = scripting.script(source, edits, locations, request.out, request.format, bare=request.bare, keys=keys)
    made = replace(made, notes=(*batch.target.notes, *made.notes))
    if not edits:
        return made
    misfit = _misfit(replace(batch.target, edits=edits, locations=locations))
    return made if misfit is None else replace(made, notes=(*made.notes, misfit))


def _misfit(target: Target) -> str | None:
    """Return a note if the check before writing would refuse the edited model."""
    live = open_editable(target.source)
    applied = apply_each(live, target.edits, target.locations)
    try:
        check_fit(live, applied, without_edits(target), "meta")
    except RequestError as error:
        return f"the edited model does not fit, and modelcli itself would not write it: {error.message}"
    return None
