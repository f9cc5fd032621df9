"""Adapt a model to other classes, images or tokens: find the edits that this stands for, and carry them out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from modelcli.commands.applied_edits import apply_each
from modelcli.commands.edit import EditRequest, EditResult, edit
from modelcli.commands.editable import open_editable
from modelcli.commands.look import stdout_is_for_data
from modelcli.commands.target import Target
from modelcli.commands.write import Progress, WriteRequest
from modelcli.edits.adaptation import Adaptation, AdaptationPlan
from modelcli.errors import RequestError

if TYPE_CHECKING:
    from modelcli.live.opening import Live


@dataclass(frozen=True)
class AdaptRequest:
    """An adaptation of a model, and how to write the result."""

    target: Target
    adaptation: Adaptation
    write: WriteRequest


@dataclass(frozen=True)
class Adapted:
    """The result of an adaptation, and its target: a model that takes another input now has that one stated."""

    target: Target
    result: EditResult


@stdout_is_for_data
def adapt(request: AdaptRequest, progress: Progress | None = None) -> Adapted:
    """Carry out the edits that an adaptation stands for. A working recipe gets these edits.

    Raises RequestError for a model that has no such part, and where it is not known which one it is.
    """
    target = request.target
    with target.notes_in_errors():
        planned = _planned(request)
    if planned.inputs is not None:
        texts = planned.inputs.texts if planned.inputs.named else ()
        source = replace(target.source, input_size=planned.inputs.shapes or None, inputs=texts)
        target = replace(target, source=source, restates_input=target.recipe is not None)
    result = edit(EditRequest(target, planned.edits, request.write), progress)
    return Adapted(target, replace(result, notes=(*planned.notes, *result.notes)))


def _planned(request: AdaptRequest) -> AdaptationPlan:
    """Plan the edits on a model that is opened for this alone."""
    target = request.target
    model = open_editable(target.source)
    if model.architecture is None:
        raise RequestError(
            f"adapt needs an architecture, but {target.source.model} records none", "--arch REFERENCE names it"
        )
    apply_each(model, target.edits, target.locations)
    from modelcli.live import adaptation

    return adaptation.plan(cast("Live", model), request.adaptation)
