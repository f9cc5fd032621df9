"""Compare two models by the names of their modules and tensors.

Values are compared by their bytes first, without NumPy; if bytes differ, `values.differences` computes by how much.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from modelcli import checkpoints, ranks, resolve
from modelcli.checkpoints import CompositeEntry, TensorEntry
from modelcli.checkpoints.byte_comparison import ByteComparison, have_same_order, nbytes_of
from modelcli.checkpoints.limits import Budget
from modelcli.checkpoints.torch_pickle import value_digests
from modelcli.commands import diff_structure, tensor_values
from modelcli.commands.diff_structure import Comparison, TensorChange
from modelcli.commands.look import Look, LookRequest, look, stdout_is_for_data
from modelcli.commands.target import Target
from modelcli.errors import RequestError
from modelcli.language.quoting import command
from modelcli.language.references import CheckpointFile, Source
from modelcli.model import state_dict_match
from modelcli.ranks.shared_work import shared
from modelcli.wording import listed

#: How many times the bytes of a file may be read, because tensors may be views of the same bytes.
_TIMES = 16

#: Called with the bytes compared so far, the bytes in total, and the kind of work.
Progress = Callable[[int, int, str], None]
Entry = TensorEntry | CompositeEntry


@dataclass(frozen=True)
class Scope:
    """What to compare: what `selected` picks in either model (everything if empty) except what `without` picks.

    `modules` compares modules too, and `values` compares values: differences of two elements `a` and `b` up to
    `atol + rtol * |b|` are ignored, as in `torch.isclose`.
    """

    selected: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    modules: bool = True
    values: bool = True
    atol: float = 0.0
    rtol: float = 0.0


@dataclass(frozen=True)
class DiffRequest:
    """The two models to compare, and what to compare. Notes call the models by `names`."""

    one: Source
    other: Source
    names: tuple[str, str]
    scope: Scope = Scope()


def diff(request: DiffRequest, progress: Progress | None = None) -> Comparison:
    """Open two models and compare them: see `compare`."""
    _require_tolerances(request.scope)
    one, other = open_sides(request.one, request.other, values=request.scope.values)
    found = compare(one, other, request.names, request.scope, progress)
    return replace(found, warnings=(*one.warnings, *other.warnings))


def open_sides(one: Source, other: Source, *, values: bool) -> tuple[Look, Look]:
    """Open both models. A key given once applies to the sides that are training checkpoints, if any is."""
    if one.key is not None and one.key == other.key:
        keyed = [source for source in (one, other) if is_training_checkpoint(source)]
        if len(keyed) == 1:
            one, other = (source if source is keyed[0] else replace(source, key=None) for source in (one, other))
    return open_side(one, values=values), open_side(other, values=values)


def is_training_checkpoint(source: Source) -> bool:
    """Whether a file contains more than one state dict, as far as opening it without a key shows."""
    reference = resolve.reference_of(source)
    try:
        return isinstance(reference, CheckpointFile) and checkpoints.read(reference.path).key is not None
    except RequestError:
        return True  # it holds none that is found by itself


def open_side(source: Source, *, values: bool) -> Look:
    """Open a model to compare. `arch` and `key` apply only to checkpoints, `weights` only to other models, so that one
    set of options can be for both sides."""
    if isinstance(resolve.reference_of(source), CheckpointFile):
        source = replace(source, weights=None)
    else:
        source = replace(source, arch=None, key=None)
    return look(LookRequest(Target(source), cached=not values, of_files=True, values=values))


@stdout_is_for_data
def compare(
    one: Look, other: Look, names: tuple[str, str], scope: Scope = Scope(), progress: Progress | None = None
) -> Comparison:
    """Compare two models. The order is that of the first one, followed by what only the second one has.

    Notes call the models by `names`. Non-persistent buffers are compared if both models have their
    values: a file does not hold them, and the class of the model makes them again.
    Raises RequestError for a selector that matches nothing in either model, and if nothing is left to compare.
    """
    notes = list(_notes(one, other, names, scope))
    extras = extras_of(one), extras_of(other)
    found = diff_structure.structure(
        one.blueprint,
        other.blueprint,
        scope.selected,
        scope.without,
        modules=scope.modules,
        extras=(tuple(extras[0]), tuple(extras[1])),
    )
    tensors = {name: list(changes) for name, changes in found.tensors.items()}
    if scope.values:
        differing, unknown = _values(entries(one), entries(other), found.comparable, scope, progress or _silent)
        made_anew = _non_persistent(one, other).intersection(unknown)
        unknown = [name for name in unknown if name not in made_anew]
        tensors = {name: changes for name, changes in tensors.items() if name not in made_anew or changes}
        notes += _not_compared_notes(unknown)
        for name, largest in differing.items():
            tensors[name].append(TensorChange(name, "values", max_abs_diff=largest))
        for name in unknown:
            tensors[name].append(TensorChange(name, "not compared"))
    changes = tuple(change for several in tensors.values() for change in several)
    changes += tuple(_extra_changes(extras[0], extras[1], found.extras, found.tensors, values=scope.values))
    changes += tuple(TensorChange(name, "not compared") for name in _unseen(one, other, scope, found.extras))
    return Comparison(found.modules, changes, sum(not several for several in tensors.values()), tuple(notes))


def _non_persistent(*sides: Look) -> set[str]:
    """The names of tensors that no model has in its state dict."""
    tensors = [tensor for side in sides for tensor in side.blueprint.tensors]
    return {tensor.name for tensor in tensors} - {tensor.name for tensor in tensors if tensor.persistent}


def _silent(_done: int, _total: int, _doing: str) -> None:
    """Ignore progress reports."""


def _notes(one: Look, other: Look, names: tuple[str, str], scope: Scope) -> Iterable[str]:
    """Return notes on the choices that were made, and on what cannot be compared."""
    for found, name in zip((one, other), names, strict=True):
        yield from (f"{name}: {note}" for note in found.notes)
    wrapped = [
        state_dict_match.unwrapped(state_dict_match.shapes_of(found.blueprint.tensors))[1] for found in (one, other)
    ]
    for name, mine, theirs in ((names[0], wrapped[0], wrapped[1]), (names[1], wrapped[1], wrapped[0])):
        if mine and not theirs and mine.everywhere:
            prefix = mine.prefix
            line = command(["modelcli", "rename", f"{prefix}**", "**"])
            yield f"every name in {name} begins with {prefix!r}: {line} removes it"
        elif mine and not theirs:
            parts = listed(mine.parts, 6)
            yield f"a wrapper added {parts} to names in {name}, so these names differ"
    typed = [found.blueprint.root.type is not None for found in (one, other)]
    if scope.modules and any(typed) and not all(typed):
        bare = names[typed.index(False)]
        yield f"{bare} records no architecture, so modules were not compared, only tensors: pass --arch REFERENCE"
    silent = [found.blueprint.totals.trainable_params is None for found in (one, other)]
    if scope.modules and any(silent) and not all(silent):
        yield f"nothing says in {names[silent.index(True)]} which parameters are trained: that is not compared"
    ties = [{t.name: t.identity for t in found.blueprint.tensors} for found in (one, other)]
    for number, (own, others) in enumerate(((ties[0], ties[1]), (ties[1], ties[0]))):
        parted = [name for name, first in own.items() if first != name and _are_parted(name, first, others)]
        if parted:
            tied = f"{parted[0]} and {own[parted[0]]}"
            more = f", and {len(parted) - 1} more like them" if len(parted) > 1 else ""
            yield f"{tied} are one tensor in {names[number]}, and two in {names[1 - number]}{more}"


def _are_parted(name: str, first: str, others: Mapping[str, str]) -> bool:
    return name in others and first in others and others[name] != others[first]


# --- values --------------------------------------------------------------------------------------------------------


def entries(found: Look) -> Mapping[str, Entry]:
    """Return the source of each tensor's values, without tensors that have no values."""
    return tensor_values.entries_of(found)


def _unseen(one: Look, other: Look, scope: Scope, chosen: Collection[str]) -> list[str]:
    """Return the chosen entries that modelcli cannot look at in either model; the models may differ in them."""
    entries = {*extras_of(one), *extras_of(other)}
    return [
        name
        for name in dict.fromkeys((*unseen_of(one), *unseen_of(other)))
        if (name in chosen if name in entries else not scope.selected)
    ]


def extras_of(found: Look) -> Mapping[str, Any]:
    """Return the entries of a model's state dict that are not tensors, as inert values."""
    if found.keys is not None:
        return found.keys.extras()
    if found.live is not None:
        from modelcli.live import apart

        return apart.of(found.live.module).extras
    return {} if found.contents is None else found.contents.extras


def unseen_of(found: Look) -> Sequence[str]:
    """Return the entries of a model's state dict that may contain tensors that modelcli cannot look at."""
    if found.keys is not None:
        return found.keys.unseen()
    if found.live is not None:
        from modelcli.live import apart

        return apart.of(found.live.module).unseen
    return () if found.contents is None else found.contents.unseen


def _extra_changes(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    names: Sequence[str],
    tensors: Collection[str],
    *,
    values: bool,
) -> Iterator[TensorChange]:
    """Compare the entries that are not tensors. Tensors inside them have changes of their own."""
    for name in names:
        if name not in before or name not in after:
            if any(tensor.startswith(f"{name}[") for tensor in tensors):
                continue  # the tensors in it are added or removed
            change: Literal["added", "removed"] = "removed" if name in before else "added"
            left, right = (value_digests.brief(side[name]) if name in side else None for side in (before, after))
            yield TensorChange(name, change, left, right)
        elif values and value_digests.digest_of(before[name]) != value_digests.digest_of(after[name]):
            yield TensorChange(name, "values", value_digests.brief(before[name]), value_digests.brief(after[name]))


@dataclass
class _Work:
    """The progress of a comparison, in bytes of the first model."""

    total: int
    report: Progress
    done: int = 0
    begun: int = 0

    def read(self, nbytes: int) -> None:
        """Report that `nbytes` more bytes of the current tensor have been compared."""
        self.begun += nbytes
        self.report(self.done + self.begun, self.total, "comparing")

    def left_at(self, nbytes: int) -> None:
        """Finish the current tensor: all of its bytes are done, or none if it will be read again."""
        self.done, self.begun = self.done + nbytes, 0
        self.report(self.done, self.total, "comparing")


def _values(
    before: Mapping[str, Entry], after: Mapping[str, Entry], names: Sequence[str], scope: Scope, progress: Progress
) -> tuple[dict[str, float | None], list[str]]:
    """Return the largest difference of each tensor whose values are not close, and the names of those left out."""
    pairs = {name: (before[name], after[name]) for name in names if name in before and name in after}
    sizes, group = [nbytes_of(left) for left, _ in pairs.values()], ranks.current()

    def of_part(part: Mapping[str, tuple[Entry, Entry]]) -> dict[str, float | None]:
        return _differing(
            part, _Work(sum(sizes), lambda done, total, doing: progress(group.moved(done, total), total, doing)), scope
        )

    without = [name for name in names if name not in pairs or _is_half_composite(*pairs[name])]
    differing = shared(pairs, list(pairs), sizes, of_part, group)
    return {name: differing[name] for name in names if name in differing}, without


def _differing(pairs: Mapping[str, tuple[Entry, Entry]], work: _Work, scope: Scope) -> dict[str, float | None]:
    """Return the largest difference of each tensor whose values are not close; None where it is not known."""
    work.left_at(0)
    verdicts = _by_bytes(pairs, work)
    differing: dict[str, float | None] = {name: None for name, same in verdicts.items() if not same}
    unsure = {
        name: (left, right)
        for name, (left, right) in pairs.items()
        if name not in verdicts and isinstance(left, TensorEntry) and isinstance(right, TensorEntry)
    }
    if unsure:
        from modelcli.values import differences

        for name, found in differences.compared(unsure, work.read, scope.rtol).items():
            if found.beyond is None or not found.beyond <= scope.atol:
                differing[name] = found.largest
    return differing


def _not_compared_notes(without: Sequence[str]) -> list[str]:
    if not without:
        return []
    more = f" and {len(without) - 1} more" if len(without) > 1 else ""
    return [f"the values of {without[0]}{more} were not compared: one side has none"]


def _by_bytes(pairs: Mapping[str, tuple[Entry, Entry]], work: _Work) -> dict[str, bool]:
    """Return whether tensors are equal, if comparing bytes decides it.

    Equal bytes mean equal values. Different bytes may be equal values too (`-0.0`, NaNs): such tensors are left out,
    except quantized and sparse ones, which are compared only by their parts.
    """
    storages = {id(part.storage): part.storage for pair in pairs.values() for entry in pair for part in _parts(entry)}
    nbytes = sum(storage.nbytes for storage in storages.values())
    budget = Budget("what the tensors of both models view", nbytes, times=_TIMES)
    found: dict[str, bool] = {}
    known: dict[object, bool] = {}
    with ByteComparison() as files:
        for name, (left, right) in pairs.items():
            if isinstance(left, CompositeEntry) and isinstance(right, CompositeEntry):
                budget.spend(nbytes_of(left), name)
                found[name] = files.same_parts(left, right, work.read)
            elif (
                isinstance(left, TensorEntry)
                and isinstance(right, TensorEntry)
                and left.dtype == right.dtype
                and have_same_order(left, right)
            ):
                views = left.view, right.view
                if views not in known:
                    budget.spend(nbytes_of(left), name)
                    known[views] = files.same(left, right, work.read)
                if known[views]:
                    found[name] = True
            work.left_at(nbytes_of(left) if name in found else 0)
    return found


def _is_half_composite(one: Entry, other: Entry) -> bool:
    """Whether one of two tensors consists of parts (quantized, sparse), and the other is a plain one."""
    return isinstance(one, CompositeEntry) != isinstance(other, CompositeEntry)


def _parts(entry: Entry) -> Sequence[TensorEntry]:
    """Return the views of storages that an entry consists of."""
    return entry.parts if isinstance(entry, CompositeEntry) else (entry,)


def _require_tolerances(scope: Scope) -> None:
    """Raise RequestError for an invalid tolerance."""
    if math.isnan(scope.atol) or scope.atol < 0:
        raise RequestError(
            f"--atol {scope.atol} is not a limit that differences can have", "a number of 0 or more, such as 1e-6"
        )
    if not 0 <= scope.rtol < math.inf:
        raise RequestError(
            f"--rtol {scope.rtol} is not a limit for relative differences", "a number of 0 or more, such as 1e-3"
        )
