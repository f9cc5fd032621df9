"""Check an edited model before it is written, with one forward pass if the architecture is known."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from modelcli.commands.applied_edits import AppliedEdits, apply_each
from modelcli.commands.target import Target
from modelcli.edits import Edit, kind_called
from modelcli.errors import RequestError
from modelcli.language.references import Source
from modelcli.model.blueprint import Blueprint
from modelcli.model.paths import ancestors
from modelcli.model.tensors import Shape
from modelcli.wording import listed

if TYPE_CHECKING:
    from modelcli.commands.editable import Editable
    from modelcli.edits.applied import Change
    from modelcli.live.check import Check
    from modelcli.live.opening import Live
    from modelcli.live.same_outputs import SameOutputs
    from modelcli.live.trace import Traced


@dataclass(frozen=True)
class FitCheck:
    """Whether an edited model still runs.

    Attributes:
        ran: whether a forward pass was made.
        reason: why none was made.
        output_shape: the shape of the output: a list of sizes, or a list or dict of those.
        inputs: the shapes of the inputs; None if they are not known.
        notes: what there is to say besides.
        traced: the pass itself, for the record of the model, if it was made on the meta device.
        same: the comparison with the outputs of the unedited model, if it was asked for.
    """

    ran: bool
    reason: str | None = None
    output_shape: Any = None
    inputs: tuple[Shape, ...] | None = None
    notes: tuple[str, ...] = ()
    traced: Traced | None = None
    same: SameOutputs | None = None


def check_fit(model: Editable, applied: AppliedEdits, target: Target, how: str, *, traced: bool = False) -> FitCheck:
    """Check that an edited model runs if the unedited one did.

    Args:
        model: the edited model.
        applied: the edits that are checked.
        target: the model as it was before these edits.
        how: `meta`, `run` (on the CPU, with values), `same` (as `meta`, and its outputs are those of the unedited
            model) or `none`.
        traced: whether the forward pass is needed for a record.

    Raises RequestError if it no longer runs, and for `same` if its outputs differ or cannot be compared.
    """
    if how == "same":
        return _checked_same(model, applied, target, traced=traced)
    notes: list[str] = []
    reason, found = _why_unchecked(model, how), None
    if reason is None:
        try:
            found = _checked(cast("Live", model), applied, target, how, traced=traced)
        except RequestError as error:
            error.notes = (*model.notes, *applied.notes)
            raise
        reason = found.reason
        notes += found.notes
        if found.ran:
            notes += _not_called_notes(model.describe(), applied.changes, found.called)
    ran = found is not None and found.ran
    inputs = None if model.inputs is None else tuple(tuple(size) for size in model.inputs.all_shapes)
    if not ran and reason and model.source.input_size is not None and how != "none":
        stated = ",".join(map(str, model.source.input_size[0]))
        notes.append(
            f"the check was not made with --input-size {stated}: make sure that it is right and includes the batch"
        )
    if found is None:
        return FitCheck(ran, reason, None, inputs, tuple(notes))
    return FitCheck(ran, reason, found.output_shape, inputs, tuple(notes), found.traced)


def _checked_same(model: Editable, applied: AppliedEdits, target: Target, *, traced: bool) -> FitCheck:
    """Check on the meta device, whose messages say what does not fit, and then compare outputs."""
    from modelcli.commands.same_outputs_check import require_same_outputs

    fits = FitCheck(False) if model.architecture is None else check_fit(model, applied, target, "meta", traced=traced)
    try:
        same = require_same_outputs(model, applied, target)
    except RequestError as error:
        error.notes = tuple(dict.fromkeys((*error.notes, *model.notes, *applied.notes)))
        raise
    notes = fits.notes if fits.ran else ()
    return FitCheck(True, None, same.output_shape, same.inputs, (*notes, *same.notes), fits.traced, same)


def _why_unchecked(model: Editable, how: str) -> str | None:
    """Return why no forward pass is tried; None if one is."""
    if how == "none":
        return "--check none skips it"
    if model.architecture is not None:
        return None
    if model.own_folder is not None:
        return "the weights are quantized, and the class of the configuration has no place for their scales"
    return "the file records no architecture: pass --arch REFERENCE"


def _checked(live: Live, applied: AppliedEdits, target: Target, how: str, *, traced: bool) -> Check:
    from modelcli.live import check as checking
    from modelcli.live import opening
    from modelcli.live.edit_history import history_of

    kinds = {change.path: kind_called(change.action) for change in applied.changes if _can_break_fit(change.action)}
    source, unstated = target.source, target.source.without_input()
    if how == "run":
        added: Sequence[Edit] = [each.edit for each in applied.edits]

        def really(source: Source) -> Any:
            module, unedited = opening.open_real(source, target.edits)
            return module, unedited.inputs

        after, _ = opening.open_real(source, (*target.edits, *added))
        unedited, device = really, "cpu"

        def described() -> Any:
            assert live.architecture is not None
            if not live.architecture.provider.has_descriptions:
                return None
            live.architecture.provider.describe_edits(live.architecture, after)
            return after
    else:

        def on_meta(source: Source) -> Any:
            unedited = opening.open_live(source)
            apply_each(unedited, target.edits, target.locations)
            return unedited.module, unedited.inputs

        after, unedited, device, described = live.module, on_meta, "meta", live.described_copy
    return checking.check(
        partial(unedited, source),
        after,
        live.inputs,
        kinds,
        known=partial(unedited, unstated) if unstated != source else None,
        device=device,
        history=history_of(applied.edits),
        traced=traced,
        described=described,
    )


def _can_break_fit(action: str) -> bool:
    return kind_called(action).can_break_fit


def _not_called_notes(after: Blueprint, changes: Sequence[Change], called: Collection[str]) -> list[str]:
    """Return notes on new modules that the forward pass did not call, since a class only calls the children it knows.

    A module that replaces another may be used without a call (`out_proj` of an attention), or only in train mode.
    """
    reached = {path for name in called for path in ancestors(name)}
    idle: list[tuple[type[Edit], str]] = []
    for change in changes:
        path = change.path
        if path in after.by_path and path not in reached and after.by_path[path].shared_with is None:
            idle.append((kind_called(change.action), path))
    notes = []
    if replaced := [path for kind, path in idle if kind.replaces_module]:
        them = "it" if len(replaced) == 1 else "them"
        notes.append(f"{listed(replaced, 3)} did not run in the forward pass, so the check does not cover {them}")
    placed = [path for kind, path in idle if kind.places_module and not kind.replaces_module]
    return notes + [f"{path} did not run in the forward pass: nothing calls it" for path in placed]


def without_traced(check: FitCheck) -> FitCheck:
    """Return the check without its pass, which is large and not needed to show the result."""
    return replace(check, traced=None)
