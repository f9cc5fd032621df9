"""How the keys of a part of another model match those of a module: what is reported, refused and told."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from modelcli.edits.applied import Change, Context
from modelcli.edits.graft.source_part import Part, joined_reference
from modelcli.edits.picking import names_of_one, tie_notes
from modelcli.errors import RequestError
from modelcli.language import selectors
from modelcli.language.quoting import quoted
from modelcli.model.blueprint import Blueprint
from modelcli.model.key_report import KeyReport, KeysDoNotMatchError
from modelcli.model.paths import called, joined
from modelcli.model.shared_bytes import Shown, tied
from modelcli.model.state_dict import StateDictTensor
from modelcli.wording import counted, is_or_are, listed

if TYPE_CHECKING:
    from modelcli.edits.graft import Graft


def accept(edit: Graft, part: Part, path: str, report: KeyReport, not_dense: Sequence[str]) -> list[str]:
    """Return the notes on what does not match.

    Args:
        edit: the edit.
        part: the part of the other model.
        path: the path that gets its values.
        report: how the keys match.
        not_dense: keys of both whose tensors are not dense on one side, and so cannot be taken.

    Raises:
        KeysDoNotMatchError: the keys do not match, and the edit does not allow it.
        RequestError: tensors are not dense.
    """
    here = f"{part.text} does not fit {called(path)}"
    if not_dense and not edit.lenient:
        raise RequestError(
            f"{here}: graft takes dense tensors, and {listed(not_dense, 3)} {is_or_are(len(not_dense))} sparse, "
            "quantized, without a shape or no tensor, here or in the source",
            "--no-strict leaves them as they are",
        )
    judged = replace(report, missing=()) if edit.also_init else report
    if not report.matched:
        told = f"{here}: no tensor has the same name and shape; {'; '.join(_differences(report))}"
        raise KeysDoNotMatchError(told, _nothing_matches(edit, part, path, report), report, part.text, path)
    if not edit.lenient and not judged.is_strict:
        hints = []
        if report.missing and not edit.also_init:
            hints.append("--also-init initialises what is missing")
        hints.append("--no-strict takes what matches")
        told = f"{here}: {'; '.join(_differences(judged))}"
        raise KeysDoNotMatchError(told, "; ".join(hints), report, part.text, path)
    notes = []
    if report.unwrapping:
        notes.append(report.unwrapping.note())
    left = [joined(path, name) for name in (*report.missing, *not_dense)]
    if left and not edit.also_init:
        notes.append(f"{listed(left, 5)} {_stays(left)} as before: {part.text} has no values for {_it(left)}")
    for mismatch in report.mismatched[:5]:
        name = joined(path, mismatch.name)
        notes.append(f"{name} is {list(mismatch.found)} in the source and {list(mismatch.expected)} here")
    if more := report.mismatched[5:]:
        notes.append(f"{counted(len(more), 'more tensor')} have other shapes")
    if report.unexpected:
        names = report.unexpected
        notes.append(
            f"{listed(names, 5)} of {part.text} {is_or_are(len(names))} not taken: {called(path)} has no such key"
        )
    return notes


def _differences(report: KeyReport) -> list[str]:
    return report.differences("in the source", "here")


def _stays(names: Sequence[str]) -> str:
    return "stays" if len(names) == 1 else "stay"


def _it(names: Sequence[str]) -> str:
    return "it" if len(names) == 1 else "them"


def _nothing_matches(edit: Graft, part: Part, path: str, report: KeyReport) -> str:
    """Return the hint if no key matches: the parts of the source that have such names, if there are any."""
    if below := [prefix.removesuffix(".") for prefix in report.unwrapping.elsewhere]:
        base = "" if part.opened.part in ("", ".") else part.opened.part
        first = replace(edit, other=joined_reference(part.opened.reference, joined(base, below[0])))
        return f"the source has such tensors below {listed(below, 4)}: {first}"
    return (
        f"modelcli params {quoted(part.opened.reference)} lists the source's tensors, and --rename renames their keys"
    )


def row_of(edit: Graft, part: Part, path: str, blueprint: Blueprint, names: Iterable[str]) -> list[Change]:
    """Return the row of a graft, with the line that repeats it. `names` are the tensors that get values."""
    known = blueprint.by_name
    own = {known[name].identity: known[name] for name in names}
    size = sum(tensor.elements for tensor in own.values() if tensor.kind == "parameter")
    line = str(replace(edit, path=selectors.literal(path)))
    after = f"{counted(len(own), 'tensor')} of {part.text}"
    return [Change(path, edit.name, "as it was", after, size, size, (line,))]


def refuse_shared_bytes(tensors: Mapping[str, Shown], names: Collection[str]) -> None:
    """Raise RequestError for tensors that show bytes of others, which would change with them."""
    picked = set(names)
    for group in tied(tensors):
        chosen = [name for name in group if name in picked]
        if chosen and len({tensors[name].identity for name in group}) > 1:
            first = chosen[0]
            other = next(name for name in group if tensors[name].identity != tensors[first].identity)
            raise RequestError(
                f"{first} and {other} show the same bytes, so {other} would change with it",
                f"untie {selectors.literal(first)}",
            )


def notes_of_values(blueprint: Blueprint, names: Sequence[str], dtypes: Mapping[str, str]) -> list[str]:
    """Return the notes on tied names, and on values that were converted.

    Args:
        blueprint: the model.
        names: the tensors that get values.
        dtypes: the dtype that the values of each have in the source.
    """
    notes = tie_notes(names_of_one(blueprint), names, "changed")
    other = [name for name in names if blueprint.by_name[name].dtype != dtypes[name]]
    if other:
        first = other[0]
        kinds = f"{dtypes[first]} in the source and {blueprint.by_name[first].dtype} here"
        notes.append(f"{listed(other, 3)} {is_or_are(len(other))} {kinds}: the values are converted")
    return notes


def module_at(edit: Graft, blueprint: Blueprint) -> str:
    """Return the path of the one module that the edit names. Raises RequestError for none, or one without tensors."""
    path = selectors.select_one(blueprint, edit.path, edit.name)
    prefix = joined(path, "")
    if not any(tensor.persistent and tensor.name.startswith(prefix) for tensor in blueprint.tensors):
        raise RequestError(f"{called(path)} has no tensors", "name a module that has some: modelcli params lists them")
    return path


def require_same_values(
    context: Context, names: tuple[str, str], sources: tuple[str, str], tensors: Mapping[str, StateDictTensor]
) -> None:
    """Raise RequestError if the source has different values for two names of one tensor.

    Args:
        context: it reads the values, where two tensors of the source are not one.
        names: the two names.
        sources: the names of the source's tensors.
        tensors: these tensors.
    """
    one, two = (tensors[name] for name in sources)
    if one.identity == two.identity:
        return
    assert context.sources is not None
    if not context.sources.have_same_bytes((sources[0], one), (sources[1], two)):
        raise RequestError(
            f"{names[0]} and {names[1]} are one tensor here, and the source has different values for them",
            f"untie {selectors.literal(names[1])}",
        )
