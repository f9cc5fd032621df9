"""Edits carried out, checked and written: as files, as recipes, as scripts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from modelcli.commands.editable import Editable, open_editable
from modelcli.commands.look import likeness_of, stdout_is_for_data
from modelcli.commands.recipe_edits import apply_each, apply_recipe
from modelcli.commands.target import Target, notes_of_python
from modelcli.edits import Edit, kind_called
from modelcli.errors import ModelcliError, RequestError
from modelcli.language.references import Source
from modelcli.model.blueprint import Blueprint
from modelcli.model.paths import ancestors
from modelcli.model.totals import Totals
from modelcli.model.wrapper_prefixes import Unwrapping
from modelcli.wording import listed

if TYPE_CHECKING:
    from modelcli.checkpoints.contents import Contents
    from modelcli.checkpoints.storage import FileId
    from modelcli.live.check import Check
    from modelcli.live.opening import Live
    from modelcli.writing import Written


@dataclass(frozen=True)
class Outcome:
    """What editing or saving came to. `output` is None where nothing was written."""

    blueprint: Blueprint
    changes: tuple[Mapping[str, Any], ...]
    before: Totals
    after: Totals
    check: Mapping[str, Any]
    written: Written | None = None
    notes: tuple[str, ...] = ()
    edits: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Writing:
    """Where to and how: `check` is `meta`, `run` or `none`; `bare` drops what stood around the state dict.

    `compact` drops what no tensor shows of a storage.

    `kind` is the format of `out`, told by how its name ends; the rest is what `writing.Care` says.
    """

    out: Path | None = None
    kind: str = "pth"
    force: bool = False
    dry_run: bool = False
    check: str = "meta"
    bare: bool = False
    compact: bool = False
    durable: bool = True
    verify: bool = False
    max_shard_bytes: int | None = None
    report: Callable[[int, int, str], None] | None = None


@stdout_is_for_data
def edit(target: Target, added: Sequence[Edit], how: Writing, places: Sequence[str] = ()) -> Outcome:
    """Apply edits, check the result, and write it where `how` says so; the recipe, if any, gets the edits at the end.

    Nothing is written where anything is wrong. `places` are where edits stand that were read together: an error names
    the one that is wrong.
    """
    with target.noted():
        return _edited(target, added, how, places)


def _edited(target: Target, added: Sequence[Edit], how: Writing, places: Sequence[str]) -> Outcome:
    from modelcli import recipe, writing

    if how.out is not None:
        writing.check_target(how.out, how.kind, force=how.force)
    if target.recipe is not None:
        recipe.check_append(target.recipe, added)

    live = open_editable(target.source, (*target.edits, *added))
    told = len(live.notes)
    apply_recipe(live, target)
    del live.notes[told:]  # what the recipe's edits had to say was said when they were made
    before = live.describe()
    live.forget_changes()
    apply_each(live, added, places or [""] * len(added))
    check = check_fit(live, target, added, how)
    outcome = outcome_of(live, target, before, check, added)
    if how.dry_run:
        return outcome
    if how.out is not None:
        outcome = write(live, outcome, how.out, how)
    if target.recipe is not None:
        try:
            recipe.append(target.recipe, added, target.source if target.restates_input else None)
            notes_of_python(target.recipe, target.source, (*target.edits, *added), own=True)
        except ModelcliError as error:
            if outcome.written is not None:
                error.message += f"; {how.out} was written all the same, and the recipe is as it was"
            raise
        if target.restates_input:
            note = f"{target.recipe} states from now on what this command said of the input"
            outcome = replace(outcome, notes=(*outcome.notes, note))
    return outcome


def check_fit(live: Editable, target: Target, added: Sequence[Edit], how: Writing) -> dict[str, Any]:
    """Check that what `added` made of `target`, which is `live` now, still runs where `target` did."""
    ran, reason, output_shape = False, _unchecked(live, how), None
    if reason is None:
        try:
            result = _checked(cast("Live", live), target, added, how)
        except RequestError as error:
            error.notes = tuple(live.notes)
            raise
        ran, reason, output_shape = result.ran, result.reason, result.output_shape
        live.notes += result.notes
        if ran:
            live.notes += _idle(live, result.called)
    shapes = None if live.inputs is None else [list(size) for size in live.inputs.all_shapes]
    if not ran and reason and live.source.input_size is not None and how.check != "none":
        stated = ",".join(map(str, live.source.input_size[0]))
        live.notes.append(f"the check was not made with --input-size {stated}: is that right, the batch included?")
    return {"ran": ran, "reason": reason, "output_shape": output_shape, "input": shapes}


def _unchecked(live: Editable, how: Writing) -> str | None:
    """Why no forward pass is tried; None where one is."""
    if how.check == "none":
        return "--check none skips it"
    return "no architecture is known: --arch names one" if live.architecture is None else None


def _checked(live: Live, target: Target, added: Sequence[Edit], how: Writing) -> Check:
    from modelcli.live import check as checking
    from modelcli.live import opening

    kinds = {change.path: kind_called(change.action) for change in live.changes if _can_break_fit(change.action)}
    source, unstated = target.source, target.source.without_input()
    if how.check == "run":

        def really(source: Source) -> Any:
            module, unedited = opening.open_real(source, target.edits)
            return module, unedited.inputs

        after, _ = opening.open_real(source, (*target.edits, *added))
        unedited, device = really, "cpu"
    else:

        def on_meta(source: Source) -> Any:
            unedited = opening.open_live(source)
            apply_recipe(unedited, replace(target, source=source))
            return unedited.module, unedited.inputs

        after, unedited, device = live.module, on_meta, "meta"
    return checking.check(
        partial(unedited, source),
        after,
        live.inputs,
        kinds,
        known=partial(unedited, unstated) if unstated != source else None,
        device=device,
        history=live.history,
    )


def _can_break_fit(action: str) -> bool:
    return kind_called(action).can_break_fit


def _idle(live: Editable, called: Collection[str]) -> list[str]:
    """New modules that the forward pass did not come to: a class calls the children that it knows.

    What stands in the place of another may be used otherwise (`out_proj` of an attention), or in train mode alone.
    """
    reached = {path for name in called for path in ancestors(name)}
    there = {module.path: module for module in live.describe().modules}
    idle: list[tuple[type[Edit], str]] = []
    for change in live.changes:
        path = change.path
        if path in there and path not in reached and there[path].shared_with is None:
            idle.append((kind_called(change.action), path))
    replaced = [path for kind, path in idle if kind.replaces_module]
    told = []
    if replaced:
        them = "it" if len(replaced) == 1 else "them"
        names = listed(replaced, 3)
        told.append(f"{names} did not run on the forward pass: the check says nothing of {them}")
    placed = [path for kind, path in idle if kind.places_module and not kind.replaces_module]
    return told + [f"{path} did not run on the forward pass: nothing calls it" for path in placed]


def outcome_of(
    live: Editable, target: Target, before: Blueprint, check: Mapping[str, Any], added: Sequence[Edit]
) -> Outcome:
    after = live.describe()
    changes = tuple(
        {
            "path": change.path,
            "action": change.action,
            "before": change.before,
            "after": change.after,
            "params_before": change.params_before,
            "params_after": change.params_after,
            **({} if change.nbytes is None else {"bytes_before": change.nbytes[0], "bytes_after": change.nbytes[1]}),
        }
        for change in live.changes
    )
    return Outcome(
        after,
        changes,
        before.totals,
        after.totals,
        check,
        notes=tuple(
            dict.fromkeys(
                (*target.notes, *live.notes, *likeness_of(live), *_sum_note(changes, before.totals, after.totals))
            )
        ),
        edits=tuple(map(str, added)),
    )


def _sum_note(changes: Sequence[Mapping[str, Any]], before: Totals, after: Totals) -> list[str]:
    """Why the rows do not add up to what the totals say, where they do not: a row counts all that its module holds."""
    rows, total = sum(row["params_after"] - row["params_before"] for row in changes), after.params - before.params
    if rows == total:
        return []
    return [
        f"the rows add up to {rows:+,} params and the totals to {total:+,}: these count what has several names once"
    ]


def write(live: Editable, outcome: Outcome, out: Path, how: Writing) -> Outcome:
    from modelcli import writing

    plan = live.plan(out, how.kind, bare=how.bare, compact=how.compact)
    size = writing.DEFAULT_SIZE if how.max_shard_bytes is None else how.max_shard_bytes
    reads = _files_of(live.contents) if live.contents is not None and out.exists() else frozenset()
    care = writing.Care(how.force, how.durable, how.verify, how.report, size, reads)
    written = writing.write(plan, out, care, kind=how.kind)
    notes = [*outcome.notes, *plan.notes, *live.lost_values(), *_beside(written)]
    notes += live.drawn_values()
    if live.contents is not None and live.contents.key is not None:
        notes += _around(live, kept=plan.key is not None)
    return replace(outcome, written=written, notes=tuple(notes))


def _beside(written: Written) -> list[str]:
    """Which other checkpoint a folder holds beside the one that was written: a command has to say which it means."""
    from modelcli.checkpoints.sharded import writing as shards

    if written.format != "folder" or not (others := shards.other_indexes(written.path)):
        return []
    return [
        f"{written.reference} holds {listed(others, 3)} as well, which was left as it was: "
        f"{written.reference}{shards.INDEX} names what was written"
    ]


def _files_of(contents: Contents) -> frozenset[FileId]:
    """The files that a model was read from. Of two that edit one of them in its place at once, the second finds that it
    is another one by now: its own edits would undo those of the first."""
    from modelcli.checkpoints import CompositeEntry

    entries = contents.tensors.values()
    parts = (part for each in entries for part in (each.parts if isinstance(each, CompositeEntry) else (each,)))
    return frozenset(file for part in parts for file in part.storage.files())


def _around(live: Editable, *, kept: bool) -> list[str]:
    """What became of the rest of a training checkpoint, and what of it no longer fits."""
    from modelcli.checkpoints.torch_pickle import state_dicts
    from modelcli.live import training_state

    contents = live.contents
    assert contents is not None
    assert contents.key is not None
    beside = [str(name) for name in contents.tree if name != contents.key[0]] if isinstance(contents.tree, dict) else []
    key = state_dicts.key_of(contents.key)
    names = f" ({listed(beside, 4)})" if beside else ""
    rest = f"what {contents.path.name} holds beside {key!r}{names}"
    if not kept:
        return [f"{rest} was left out"]
    outdated = training_state.outdated_optimizer_notes(contents.tree, live.parameters_opened, live.parameters_now)
    changed = not all(kind_called(change.action).changes_flags_only for change in live.changes)
    unwrapping = Unwrapping() if live.report is None else live.report.unwrapping
    if unwrapping:
        parts = listed([repr(part) for part in unwrapping.parts], 6)
        outdated.append(
            f"the keys in {key!r} are written without {parts}, and what wrote the file may ask for it "
            "(an edit without --arch leaves the keys as they are)"
        )
    renamed = training_state.renamed(live.tensors_opened, live.tensors_now)
    copies = training_state.other_state_dict_notes(
        contents, live.describe(), unwrapping=unwrapping, changed=changed, renamed=renamed
    )
    return [f"{rest} was kept; --bare drops it", *outdated, *copies]
