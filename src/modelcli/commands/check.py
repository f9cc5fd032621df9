"""Check assertions about a model: the command `check`, for scripts and CI."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from modelcli import checkpoints, resolve
from modelcli.checkpoints.contents import foreign_names
from modelcli.commands import check_structure, completeness, content_hash, diff, tensor_values
from modelcli.commands.assertions import AssertionResult, Assertions
from modelcli.commands.check_structure import MOST_NAMED
from modelcli.commands.diff import Progress, Scope
from modelcli.commands.diff_structure import TensorChange
from modelcli.commands.look import Look, LookRequest, built, look, without_record
from modelcli.commands.same_output_as import same_output_as
from modelcli.commands.target import Target
from modelcli.errors import ModelcliError, RequestError
from modelcli.language.references import CheckpointFile, Source
from modelcli.wording import counted, is_or_are, listed

SAFE = "only tensors"
#: The dtypes of floating-point numbers that have neither NaN nor infinities.
_ALWAYS_FINITE = frozenset({"float4_e2m1fn", "float4_e2m1fn_x2", "float6_e2m3fn", "float6_e3m2fn"})


@dataclass(frozen=True)
class CheckRequest:
    """A model and the assertions about it. Without `cached`, a model that is not a file is built anew."""

    target: Target
    assertions: Assertions
    cached: bool = True


@dataclass(frozen=True)
class CheckResult:
    """The result of each assertion about a model.

    Attributes:
        model: its reference.
        look: the model; None where the assertions are about its files alone, and nothing was opened.
        assertions: a result for each, or for each fault.
        notes: what the user should know.
    """

    model: str
    look: Look | None
    assertions: tuple[AssertionResult, ...]
    notes: tuple[str, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        return () if self.look is None else self.look.warnings

    @property
    def class_name(self) -> str | None:
        """The class of the model; None where it is not known or was not asked for."""
        return None if self.look is None else self.look.blueprint.root.type

    @property
    def passed(self) -> bool:
        return all(result.passed for result in self.assertions)

    def require_answers(self) -> None:
        """Raise RequestError if an assertion could not be decided."""
        for result in self.assertions:
            if not result.answered:
                raise RequestError(f"--{result.check} cannot be checked: {result.found}")


@dataclass(frozen=True)
class CheckedModel:
    """One of several models: its result, or the error that opening it raised."""

    model: str
    result: CheckResult | None = None
    error: ModelcliError | None = None

    @property
    def assertions(self) -> tuple[AssertionResult, ...]:
        """The results of the assertions; for a model that could not be opened, a failed one named `open`."""
        if self.result is not None:
            return self.result.assertions
        assert self.error is not None
        return (AssertionResult("open", False, self.error.message, "a model"),)

    @property
    def notes(self) -> tuple[str, ...]:
        if self.result is not None:
            return self.result.notes
        return (self.error.hint,) if self.error is not None and self.error.hint else ()

    @property
    def warnings(self) -> tuple[str, ...]:
        return () if self.result is None else self.result.warnings

    @property
    def exit_code(self) -> int:
        if self.result is None:
            return 0 if self.error is None else self.error.exit_code
        try:
            self.result.require_answers()
        except ModelcliError as unanswered:
            return unanswered.exit_code
        return 0 if self.result.passed else 1


def checked(model: str, check_it: Callable[[], CheckResult]) -> CheckedModel:
    """Return the result for one of several models. If it cannot be opened, the result has the error instead."""
    try:
        result = check_it()
    except ModelcliError as error:
        return CheckedModel(model, error=error)
    return CheckedModel(result.model, result)


def check(request: CheckRequest, progress: Progress | None = None) -> CheckResult:
    """Evaluate assertions. Values are read for `finite` and `content_hash`, and for `same_as` if bytes differ.

    Raises RequestError for a selector that matches nothing, except those of `has` and `absent`, and for a tensor that
    cannot be hashed.
    """
    target, wanted, cached = request.target, request.assertions, request.cached
    wanted.require_sense()
    of_files = _of_files(target.source, wanted)
    if wanted == Assertions(complete=wanted.complete, arch_check=wanted.arch_check, without=wanted.without):
        return CheckResult(target.source.model, None, tuple(of_files))
    needs_values = wanted.finite or bool(wanted.same_as) or wanted.content_hash is not None
    traced, cached = bool(wanted.output_shapes), cached and not needs_values
    found = look(LookRequest(target, traced=traced, cached=cached, of_files=True, values=needs_values))
    notes = list(found.notes)
    checks = _of_structure(found, wanted)
    if any(_rests_on_record(found, row) for row in checks):
        found, basis = built(target, found, traced=bool(wanted.output_shapes))
        notes = list(found.notes)
        checks = _of_structure(found, wanted)
        if basis is not None:
            by_record = [_rests_on_record(found, row) for row in checks]
            checks = [
                replace(row, passed=row.passed and not wanted.safe, on_record=basis) if alone else row
                for row, alone in zip(checks, by_record, strict=True)
            ]
    if wanted.safe:
        checks.append(_safe(found, target.source))
    if wanted.finite:
        checks.append(_finite(found, progress))
    if wanted.content_hash is not None:
        checks.append(_hash(found, target.source.model, wanted.content_hash, progress, notes))
    names = wanted.same_as
    checks += [_same_as(found, target.source.model, name, wanted.without, progress, notes) for name in names]
    for name in wanted.same_output_as:
        checks.append(same_output_as(target, name, wanted.rtol, wanted.atol, notes))
    return CheckResult(target.source.model, found, (*of_files, *checks), tuple(notes))


def _of_files(source: Source, wanted: Assertions) -> list[AssertionResult]:
    """The assertions about the files of a folder, which may be one that cannot be opened: a row for each fault."""
    rows: list[AssertionResult] = []
    if wanted.complete:
        found = completeness.of_folder(_folder_of(source))
        expected = "all files agree"
        rows += [AssertionResult("complete", False, fault, expected) for fault in found.faults]
        rows += [] if found.faults else [AssertionResult("complete", True, found.seen, expected)]
    if wanted.arch_check:
        rows += _arch_check(source)
    return rows


def _folder_of(source: Source) -> Path:
    """The folder that a reference names. Raises RequestError for a model that is no folder."""
    reference = resolve.reference_of(source)
    if isinstance(reference, CheckpointFile):
        return reference.path
    resolve.require_downloaded(reference, source)
    if (folder := resolve.own_folder(reference, source)) is not None:
        return folder
    raise RequestError(f"--complete is about a folder, and {reference} is none", "name the folder of the shards")


def _arch_check(source: Source) -> list[AssertionResult]:
    """Whether the configuration of a folder builds a model with its keys and shapes: a row for each difference."""
    from modelcli.live import downloads, opening

    expected = "the keys and shapes that the configuration builds"
    with downloads.forbidden():
        live = opening.open_live(source, report_only=True)
    if live.report is None or live.contents is None:
        return [AssertionResult("arch-check", False, "no weights were found", expected, answered=False)]
    report = live.report
    rows = [
        *(f"{name} is missing" for name in report.missing),
        *(f"{name} is not in the model" for name in report.unexpected),
        *(f"{m.name} is {list(m.found)} and the configuration builds {list(m.expected)}" for m in report.mismatched),
    ]
    if not rows:
        return [AssertionResult("arch-check", True, f"{counted(report.matched, 'key')} match", expected)]
    return [AssertionResult("arch-check", False, row, expected) for row in rows]


#: The assertions that only the record of a file can answer, if the file has one.
_ON_RECORD = ("max-bytes", "frozen", "trainable", "absent", "output-shape")


def _rests_on_record(found: Look, row: AssertionResult) -> bool:
    """Whether an assertion is decided by the file's record, not only by its tensors."""
    if found.record is None:
        return False
    if row.check == "max-params":  # the record says which tensors are buffers
        totals = without_record(found).totals
        return totals.params + totals.buffers > int(row.wanted)
    if row.check == "has":
        return not check_structure.matches(without_record(found), row.wanted)
    return row.check in _ON_RECORD


def _of_structure(found: Look, wanted: Assertions) -> list[AssertionResult]:
    """The assertions that need no values."""
    unseen = diff.unseen_of(found)
    entries = [*unseen, *diff.extras_of(found)] if wanted.absent else unseen
    return [
        *check_structure.structure(found.blueprint, wanted, unseen, entries),
        *check_structure.outputs(found.blueprint, wanted.output_shapes),
    ]


def _safe(found: Look, source: Source) -> AssertionResult:
    """Whether the model's file, if there is one, contains nothing that could only be loaded by running code."""
    contents = found.contents
    is_opened = found.live is not None or found.keys is not None
    if contents is not None and is_opened and not contents.is_remote:  # safetensors hold tensors alone
        contents = checkpoints.read(contents.path, key=source.key)  # as it is, before objects were dropped
    foreign = {} if contents is None else dict.fromkeys(contents.foreign)
    reference = resolve.reference_of(source)
    for path in checkpoints.other_entry_points(reference.path) if isinstance(reference, CheckpointFile) else ():
        # A program that loads the folder may load this file.
        try:
            foreign |= dict.fromkeys(checkpoints.read(path).foreign)
        except ModelcliError as error:
            return AssertionResult("safe", False, f"{path.name} beside it cannot be looked at: {error.message}", SAFE)
    answer = (
        f"objects of {foreign_names(tuple(foreign), most=MOST_NAMED)}" if foreign else SAFE if contents else "no file"
    )
    return AssertionResult("safe", not foreign, answer, SAFE)


def _finite(found: Look, progress: Progress | None) -> AssertionResult:
    """Whether all values are finite. This fails if there are tensors that modelcli cannot look at."""
    names = [tensor.name for tensor in found.blueprint.tensors if tensor.dtype not in _ALWAYS_FINITE]
    report = progress or (lambda _done, _total, _doing: None)
    statistics = tensor_values.not_finite(found, names, lambda done, total: report(done, total, "reading"))
    wrong = {name: numbers for name, numbers in statistics.items() if numbers["nan"] or numbers["inf"]}
    unseen = [*(name for name in names if name not in statistics), *diff.unseen_of(found)]
    if found.contents is not None:
        unseen += found.contents.hidden
    if wrong:
        name, numbers = next(iter(wrong.items()))
        counts = [f"{numbers[key]:,} {word}" for key, word in (("nan", "NaN"), ("inf", "Inf")) if numbers[key]]
        more = f", and {counted(len(wrong) - 1, 'more tensor')}" if len(wrong) > 1 else ""
        answer = f"{name}: {' and '.join(counts)}{more}"
    elif unseen:
        answer = f"{listed(unseen, MOST_NAMED)} cannot be looked at"
    else:
        answer = f"{counted(len(found.blueprint.tensors), 'tensor')} without NaN or Inf"
    return AssertionResult("finite", not (wrong or unseen), answer, "no NaN, no Inf")


def _hash(found: Look, model: str, wanted: str, progress: Progress | None, notes: list[str]) -> AssertionResult:
    """Whether the hash of all tensors is the wanted one."""
    result = content_hash.of_look(found, model, (), progress)
    notes += [note for note in result.notes if note not in notes]
    return AssertionResult("hash", result.digest == wanted, result.digest, wanted)


def _same_as(
    found: Look, model: str, reference: str, without: tuple[str, ...], progress: Progress | None, notes: list[str]
) -> AssertionResult:
    """Whether all tensors equal those of another model in shape, dtype and values."""
    other = diff.open_side(Source(reference), values=True)
    # The notes of the model itself are among `notes` already.
    names = (model, reference)
    compared = diff.compare(other, found, names[::-1], Scope(without=without, modules=False), progress)
    notes += [note for note in compared.notes if note not in {f"{model}: {own}" for own in found.notes}]
    differing: dict[str, list[TensorChange]] = {}
    for change in compared.tensors:
        if change.change != "trainable":
            differing.setdefault(change.name, []).append(change)
    wanted = f"{reference} except {', '.join(without)}" if without else reference
    if differing:
        named = [f"{name} ({', '.join(c.change for c in changes)})" for name, changes in differing.items()]
        number = counted(len(differing), "tensor")
        answer = f"{number} {'differs' if len(differing) == 1 else 'differ'}: {listed(named, MOST_NAMED)}"
        return AssertionResult("same-as", False, answer, wanted)
    equal = compared.equal + len({change.name for change in compared.tensors})
    return AssertionResult("same-as", True, f"{counted(equal, 'tensor')} {is_or_are(equal)} equal", wanted)
