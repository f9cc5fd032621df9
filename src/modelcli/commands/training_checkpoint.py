"""Let the rest of a training checkpoint follow the edits of its model: its optimizers; and say what does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from modelcli.checkpoints import Contents, formats, shapes
from modelcli.checkpoints.entries import TensorEntry
from modelcli.checkpoints.optimizers import Optimizer, optimizers_in, with_values
from modelcli.checkpoints.plan import PlannedTensor
from modelcli.checkpoints.torch_pickle import state_dicts
from modelcli.checkpoints.torch_pickle.inert_values import OrderedDict
from modelcli.commands import other_state_dicts
from modelcli.edits import kind_called
from modelcli.errors import RequestError
from modelcli.model.parameter_origins import OldParameters
from modelcli.model.wrapper_prefixes import Unwrapping
from modelcli.wording import is_or_are, listed

if TYPE_CHECKING:
    from modelcli.commands.editable import Editable
    from modelcli.commands.write import WriteRequest
    from modelcli.edits.applied import Change
    from modelcli.model.state_dict import StateDictTensor
    from modelcli.writing import Plan


def followed(
    model: Editable, contents: Contents, plan: Plan, changes: Sequence[Change], request: WriteRequest
) -> tuple[Plan, list[str]]:
    """Return the plan with optimizers that follow the edits, and notes on the rest of a training checkpoint.

    Args:
        model: the edited model.
        contents: the training checkpoint that it comes from.
        plan: the plan for the model, with the tree of the checkpoint if that is kept.
        changes: what the edits changed.
        request: how the model is written. With `also_ema`, other state dicts of the same model get the same edits.
    """
    assert contents.key is not None
    beside = [str(name) for name in contents.tree if name != contents.key[0]] if isinstance(contents.tree, dict) else []
    names = f" ({listed(beside, 4)})" if beside else ""
    rest = f"the rest of {contents.path.name}{names}"
    if plan.key is None:
        return plan, [f"{rest} was left out"]
    trained = None if request.also_ema else other_state_dicts.trained_beside(contents)
    new, notes = _optimizers(model, contents) if trained is None else ({}, _of_the_model(contents, trained))
    copies: dict[int, Any] = {}
    if request.also_ema:
        for copy in other_state_dicts.copies_of(contents):
            copies[id(copy.value)] = other_state_dicts.edited(model, contents, copy, request)
        new |= copies
    if new:
        plan = replace(plan, tree=with_values(plan.tree, new))
    unwrapping = Unwrapping() if model.report is None else model.report.unwrapping
    if unwrapping:
        parts = listed([repr(part) for part in unwrapping.parts], 6)
        notes.append(
            f"the keys in {state_dicts.key_of(contents.key)!r} were written without {parts}, which the program that "
            "wrote the file may expect (without --arch, an edit leaves the keys as they are)"
        )
    others = other_state_dicts.other_state_dict_notes(
        contents,
        model.describe(),
        unwrapping=unwrapping,
        changed=not all(kind_called(change.action).changes_flags_only for change in changes),
        renamed=other_state_dicts.renamed(model.tensors_opened, model.tensors_now),
        edited=copies.keys(),
    )
    return plan, [f"{rest} was kept; --bare drops it", *notes, *others]


def require_copies(model: Editable, request: WriteRequest) -> None:
    """Raise RequestError if `also_ema` is set and there is no state dict that would get the same edits."""
    contents = model.contents
    if not request.also_ema:
        return
    if contents is None or contents.key is None:
        raise RequestError(
            f"--also-ema: {model.source.model} is no training checkpoint, so there is no copy of the model",
            "leave --also-ema out",
        )
    if request.bare or not formats.named(request.format).holds_values:
        raise RequestError(
            "--also-ema edits copies of the model in a training checkpoint, but only the state dict is written",
            "leave --also-ema out" + (" or --bare" if request.bare else f", or {formats.instead()}"),
        )
    if not other_state_dicts.copies_of(contents):
        key = state_dicts.key_of(contents.key)
        raise RequestError(
            f"--also-ema: {contents.path.name} contains no other state dict with the keys and shapes of {key}",
            "leave --also-ema out; --key names one state dict to edit alone",
        )


def _optimizers(model: Editable, contents: Contents) -> tuple[dict[int, Any], list[str]]:
    """Return the new state dicts of optimizers, by the `id` of the old ones, and notes."""
    optimizers = optimizers_in(contents.tree, contents.key or ())
    if not optimizers:
        return {}, []
    from modelcli.checkpoints.optimizer_parameters import identified
    from modelcli.writing import optimizers as following

    old, now = OldParameters(model.parameters_opened), model.parameters_now
    is_same = following.is_unchanged(old, now)
    arrange = _arranging(old)
    new: dict[int, Any] = {}
    notes: list[str] = []
    for optimizer in optimizers:
        if is_same and optimizer.names is None:
            continue
        known = optimizer.fault or identified(optimizer, old.opened, from_keys=model.architecture is None)
        if isinstance(known, str):
            if not is_same or list(old.opened) != list(now):
                notes.append(_unknown(optimizer, known))
            continue
        found = following.followed(optimizer, known, old, now, arrange)
        notes += found.notes
        if found.value is not None:
            new[id(optimizer.value)] = found.value
    return new, notes


def _of_the_model(contents: Contents, trained: str) -> list[str]:
    """Return the note on optimizers if an average of the model is edited alone."""
    places = [optimizer.place for optimizer in optimizers_in(contents.tree, contents.key or ())]
    if not places:
        return []
    return [f"{listed(places, 4)} {is_or_are(len(places))} as before: that is for the parameters of {trained}"]


def _unknown(optimizer: Optimizer, why: str) -> str:
    return f"the state in {optimizer.place} is as it was and may not fit: {why}; create the optimizer again"


def _arranging(old: OldParameters) -> Any:
    """Return the function that arranges tensors of an optimizer's state as a parameter is arranged."""
    from modelcli.writing.optimizers import CannotFollowError

    def arrange(made: StateDictTensor, state: Mapping[str, TensorEntry]) -> TensorEntry:
        from modelcli.values import arranged_state
        from modelcli.values.state_dict_sources import Sources

        try:
            return arranged_state.arranged(made, state, old, Sources())
        except arranged_state.CannotArrangeError as error:
            raise CannotFollowError(str(error)) from None

    return arrange


def row_major(tree: Any) -> Any:
    """Return the values around a state dict with each tensor row-major, for a format that holds no views."""
    if isinstance(tree, OrderedDict):
        ordered = OrderedDict({name: row_major(value) for name, value in tree.items()})
        ordered.state = tree.state
        return ordered
    if isinstance(tree, dict):
        return {name: row_major(value) for name, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(map(row_major, tree))
    if not isinstance(tree, TensorEntry):
        return tree
    from modelcli.values.row_major import row_major as elements_of

    return PlannedTensor(tree.shape, tree.dtype, shapes.row_major(tree.shape), 0, elements_of(tree))
