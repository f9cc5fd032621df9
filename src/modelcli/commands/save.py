"""The working recipe carried out, checked and written."""

from __future__ import annotations

from modelcli.commands.edit import Outcome, Writing, check_fit, outcome_of, write
from modelcli.commands.editable import open_editable
from modelcli.commands.look import stdout_is_for_data
from modelcli.commands.recipe_edits import apply_recipe
from modelcli.commands.target import Target, without_edits


@stdout_is_for_data
def save(target: Target, how: Writing) -> Outcome:
    """Apply the recipe's edits, check the result and write it."""
    with target.noted():
        return _saved(target, how)


def _saved(target: Target, how: Writing) -> Outcome:
    from modelcli import writing

    assert how.out is not None
    writing.check_target(how.out, how.kind, force=how.force)

    live = open_editable(target.source, target.edits)
    before = live.describe()
    apply_recipe(live, target)
    if target.edits:
        check = check_fit(live, without_edits(target), target.edits, how)
    else:
        check = {"ran": False, "reason": "nothing was edited", "output_shape": None, "input": None}
    outcome = outcome_of(live, target, before, check, target.edits)
    return outcome if how.dry_run else write(live, outcome, how.out, how)
