"""Assertions about a model, each of which holds or does not: what `check` answers in scripts and CI."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from modelcli import checkpoints, resolve
from modelcli.checkpoints.contents import foreign_names
from modelcli.commands import diff, tensor_values
from modelcli.commands.diff import Progress, Scope
from modelcli.commands.diff_structure import TensorChange
from modelcli.commands.look import Look, LookRequest, built, look, without_record
from modelcli.commands.target import Target
from modelcli.errors import ModelcliError, RequestError, did_you_mean
from modelcli.language import selectors
from modelcli.language.references import CheckpointFile, Source
from modelcli.model.blueprint import Blueprint, from_keys
from modelcli.model.dtypes import FLOATING
from modelcli.model.paths import shown
from modelcli.model.tensors import Shape, TensorInfo
from modelcli.wording import counted, is_or_are, listed

#: Names that a row lists of those that are wrong.
MOST_NAMED = 3
SAFE = "tensors alone"
NOTHING = "nothing"
#: The dtypes of floating-point numbers that have neither NaN nor infinities.
_ALWAYS_FINITE = frozenset({"float4_e2m1fn", "float4_e2m1fn_x2", "float6_e2m3fn", "float6_e3m2fn"})


@dataclass(frozen=True)
class Assertions:
    """What is asserted of a model; None, empty and False stand for what is not.

    `max_params` and `max_bytes` are the most parameters, and the most bytes of parameters and buffers. `frozen`,
    `trainable`, `has` and `absent` are selectors. `dtypes` are those that floating-point tensors may have.
    `output_shapes` are shapes of what the forward pass gives. `same_as` are references, and `without` selectors of
    tensors that may differ from those.
    """

    max_params: int | None = None
    max_bytes: int | None = None
    frozen: tuple[str, ...] = ()
    trainable: tuple[str, ...] = ()
    has: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    finite: bool = False
    safe: bool = False
    output_shapes: tuple[Shape, ...] = ()
    same_as: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    def require_sense(self) -> None:
        """Raise RequestError where nothing is asserted, or what is makes no sense."""
        if self.without and not self.same_as:
            raise RequestError(
                f"--except {self.without[0]} is for --same-as", "--same-as REFERENCE says what all other tensors are"
            )
        if self == Assertions(without=self.without):
            raise RequestError(
                "nothing is asserted", "--max-params 60M, --frozen features, --finite: modelcli check --help lists them"
            )
        for name in self.dtypes:
            if name not in FLOATING:
                raise RequestError(f"no floating-point dtype {name!r}", did_you_mean(name, FLOATING))


@dataclass(frozen=True)
class CheckRequest:
    """A model, and what is asserted of it. Without `cached` it is built anew where it is not a file."""

    target: Target
    assertions: Assertions
    cached: bool = True


@dataclass(frozen=True)
class AssertionResult:
    """Whether one assertion holds.

    Attributes:
        check: the assertion's option, without dashes: `max-params`.
        passed: whether it holds.
        found: what the model has: a number, a shape or words; why nothing could be found out, where that is so.
        wanted: what was asserted, likewise.
        answered: whether anything could be found out.
        on_record: set where only the file's record answers: why nothing else could be asked.
    """

    check: str
    passed: bool
    found: Any
    wanted: Any
    answered: bool = True
    on_record: str | None = None


@dataclass(frozen=True)
class CheckResult:
    """Which assertions about a model hold. `model` is its reference."""

    model: str
    look: Look
    assertions: tuple[AssertionResult, ...]
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return all(result.passed for result in self.assertions)

    def require_answers(self) -> None:
        """Raise RequestError for an assertion of which nothing could be found out."""
        for result in self.assertions:
            if not result.answered:
                raise RequestError(f"--{result.check} cannot be checked: {result.found}")


@dataclass(frozen=True)
class CheckedModel:
    """One of several models: its result, or the error that kept it from being opened."""

    model: str
    result: CheckResult | None = None
    error: ModelcliError | None = None

    @property
    def assertions(self) -> tuple[AssertionResult, ...]:
        """The assertions; for a model that could not be opened, one that says so."""
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
        return () if self.result is None else self.result.look.warnings

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
    """The result for one of several models: one that cannot be opened does not keep the others from being checked."""
    try:
        result = check_it()
    except ModelcliError as error:
        return CheckedModel(model, error=error)
    return CheckedModel(result.model, result)


def check(request: CheckRequest, progress: Progress | None = None) -> CheckResult:
    """Find out which assertions hold. Values are read for `finite`, and for `same_as` where bytes differ.

    Raises RequestError for a selector that picks nothing, except those of `has` and `absent`, for which that is an
    answer.
    """
    target, wanted, cached = request.target, request.assertions, request.cached
    wanted.require_sense()
    needs_values = wanted.finite or bool(wanted.same_as)
    found = look(LookRequest(target, traced=bool(wanted.output_shapes), cached=cached and not needs_values))
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
    names = wanted.same_as
    checks += [_same_as(found, target.source.model, name, wanted.without, progress, notes) for name in names]
    return CheckResult(target.source.model, found, tuple(checks), tuple(notes))


#: The assertions that nothing but a record answers where a file has one.
_ON_RECORD = ("max-bytes", "frozen", "trainable", "absent", "output-shape")


def _rests_on_record(found: Look, row: AssertionResult) -> bool:
    """Whether a file's record decides about an assertion, and not the tensors in the file alone."""
    if found.record is None:
        return False
    if row.check == "max-params":  # the record says which tensors are buffers
        totals = without_record(found).totals
        return totals.params + totals.buffers > int(row.wanted)
    if row.check == "has":
        return not _matches(without_record(found), row.wanted)
    return row.check in _ON_RECORD


def _of_structure(found: Look, wanted: Assertions) -> list[AssertionResult]:
    """The assertions that need no values."""
    unseen = diff.unseen_of(found)
    entries = [*unseen, *diff.extras_of(found)] if wanted.absent else unseen
    return [*_structure(found.blueprint, wanted, unseen, entries), *_outputs(found.blueprint, wanted.output_shapes)]


def _structure(
    blueprint: Blueprint, wanted: Assertions, unseen: Sequence[str], entries: Sequence[str]
) -> Iterator[AssertionResult]:
    """The assertions that a blueprint answers.

    `unseen` are entries of the state dict that it cannot count, and `entries` all those that have no row of their own.
    """
    totals = blueprint.totals
    if wanted.max_params is not None:
        yield _at_most("max-params", totals.params, wanted.max_params, unseen)
    if wanted.max_bytes is not None:
        yield _at_most("max-bytes", totals.param_bytes + totals.buffer_bytes, wanted.max_bytes, unseen)
    for text in wanted.frozen:
        yield _flags(blueprint, text, unseen, trained=False)
    for text in wanted.trainable:
        yield _flags(blueprint, text, unseen, trained=True)
    for text in wanted.has:
        names = _matches(blueprint, text)
        yield AssertionResult("has", bool(names), listed(names or [_nothing(blueprint, text)], MOST_NAMED), text)
    for text in wanted.absent:
        names = _matches(blueprint, text) or _matching(dict.fromkeys(entries), text)
        none = _nothing(blueprint, text)
        yield AssertionResult("absent", not names and none == NOTHING, listed(names or [none], MOST_NAMED), text)
    if wanted.dtypes:
        yield _dtype(blueprint, wanted.dtypes, unseen)


def _at_most(check: str, found: int, most: int, unseen: Sequence[str]) -> AssertionResult:
    """Whether a number is small enough; what could not be counted may make it any larger."""
    if unseen and found <= most:
        return AssertionResult(check, False, f"{found:,} or more: {listed(unseen, MOST_NAMED)} cannot be counted", most)
    return AssertionResult(check, found <= most, found, most)


def _matching(unseen: Collection[str], text: str) -> list[str]:
    """Which entries without a row a selector would pick, or what is in them, if they had one."""
    if not unseen:
        return []
    try:
        found = selectors.select_tensors(from_keys(TensorInfo(name, None, "float32") for name in unseen), [text])
    except RequestError:  # it picks none
        return []
    return [name for name in unseen if name in found]


def _flags(blueprint: Blueprint, text: str, unseen: Sequence[str], *, trained: bool) -> AssertionResult:
    """Whether all parameters that a selector picks are trained, or all are frozen."""
    names = set(selectors.select_tensors(blueprint, [text]))
    parameters = [t for t in blueprint.tensors if t.name in names and t.kind == "parameter" and t.is_differentiable]
    if not parameters:
        raise RequestError(f"{text!r} picks no parameter that could be trained", "modelcli params lists them")
    kind, state = ("trainable", "trained") if trained else ("frozen", "frozen")
    other = "frozen" if trained else "trained"
    wrong = [t.name for t in parameters if t.requires_grad is (not trained)]
    unknown = [t.name for t in parameters if t.requires_grad is None] + _matching(unseen, text)
    if wrong:
        of_all = f"{len(wrong):,} of {counted(len(parameters), 'parameter')}"
        answer = f"{of_all} {is_or_are(len(wrong))} {other}: {listed(wrong, MOST_NAMED)}"
    elif unknown:
        named = listed(unknown, MOST_NAMED)
        answer = f"nothing says whether {named} {is_or_are(len(unknown))} {state}: --arch names the architecture"
    else:
        answer = f"{counted(len(parameters), 'parameter')} {is_or_are(len(parameters))} {state}"
    return AssertionResult(kind, not (wrong or unknown), answer, text)


def _matches(blueprint: Blueprint, text: str) -> list[str]:
    """The modules and tensors that a selector itself names, in the model's order."""
    selector = selectors.parse(text)
    modules = selectors.matched_modules(selector, blueprint)
    if modules:
        return [shown(module.path) for module in blueprint.modules if module.path in modules]
    tensors = selectors.matched_tensors(selector, blueprint)
    return [tensor.name for tensor in blueprint.tensors if tensor.name in tensors]


def _nothing(blueprint: Blueprint, text: str) -> str:
    """What a selector picked that picked nothing: one for a class says nothing where no class is known."""
    if selectors.parse(text).type is not None and all(module.type is None for module in blueprint.modules):
        return "no class is known: --arch names the architecture"
    return NOTHING


def _dtype(blueprint: Blueprint, dtypes: Sequence[str], unseen: Sequence[str]) -> AssertionResult:
    """Whether each floating-point tensor has one of these dtypes; a model without any has none of them."""
    floating = [tensor for tensor in blueprint.tensors if _is_floating(tensor)]
    wrong = [tensor for tensor in floating if tensor.dtype not in dtypes]
    answer = " and ".join(sorted({tensor.dtype for tensor in floating})) or "no floating-point tensor"
    if wrong:
        more = f", and {len(wrong) - 1} more differ" if len(wrong) > 1 else ""
        answer = f"{wrong[0].name} is {wrong[0].dtype}{more}"
    elif unseen:
        answer = f"{listed(unseen, MOST_NAMED)} cannot be looked at"
    return AssertionResult("dtype", bool(floating) and not wrong and not unseen, answer, " or ".join(dtypes))


def _is_floating(tensor: TensorInfo) -> bool:
    return tensor.dtype.startswith(("float", "bfloat"))


def _outputs(blueprint: Blueprint, wanted: Sequence[Shape]) -> Iterator[AssertionResult]:
    """Whether the forward pass gives tensors of these shapes; one that could not be made answers neither yes nor no."""
    trace = blueprint.trace
    for shape in wanted:
        ran = trace.layers.get("") if trace is not None else None
        if trace is None or ran is None or trace.reason is not None:
            reason = trace.reason if trace is not None and trace.reason else "no forward pass was made"
            yield AssertionResult("output-shape", False, reason, list(shape), answered=False)
            continue
        yield AssertionResult("output-shape", list(shape) in _flat(ran.output_shape), ran.output_shape, list(shape))


def _flat(output: Any) -> list[list[int]]:
    """The shapes of all tensors in an output, whatever it is made of."""
    if output is None:
        return []
    if isinstance(output, dict):
        output = list(output.values())
    elif all(isinstance(size, int) for size in output):
        return [list(output)]
    return [shape for item in output for shape in _flat(item)]


def _safe(found: Look, source: Source) -> AssertionResult:
    """Whether the file, if the model comes from one, holds nothing that only running code could load."""
    contents = found.contents
    if contents is not None and (found.live is not None or found.keys is not None):
        contents = checkpoints.read(contents.path, key=source.key)  # as it is, before objects were dropped
    foreign = {} if contents is None else dict.fromkeys(contents.foreign)
    reference = resolve.reference_of(source)
    for path in checkpoints.accounts_beside(reference.path) if isinstance(reference, CheckpointFile) else ():
        # Whoever loads the folder may take this one.
        try:
            foreign |= dict.fromkeys(checkpoints.read(path).foreign)
        except ModelcliError as error:
            return AssertionResult("safe", False, f"{path.name} beside it cannot be looked at: {error.message}", SAFE)
    answer = (
        f"objects of {foreign_names(tuple(foreign), most=MOST_NAMED)}" if foreign else SAFE if contents else "no file"
    )
    return AssertionResult("safe", not foreign, answer, SAFE)


def _finite(found: Look, progress: Progress | None) -> AssertionResult:
    """Whether no tensor has a NaN or an infinity in it; one that cannot be looked at may have."""
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


def _same_as(
    found: Look, model: str, reference: str, without: tuple[str, ...], progress: Progress | None, notes: list[str]
) -> AssertionResult:
    """Whether all tensors are those of another model in shape, dtype and values."""
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
