"""Check the assertions that need only a blueprint: sizes, flags, dtypes, modules and output shapes, but no values."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from modelcli.checkpoints import limits
from modelcli.commands.assertions import AssertionResult, Assertions
from modelcli.errors import RequestError
from modelcli.language import selectors
from modelcli.model.blueprint import Blueprint, from_keys
from modelcli.model.paths import shown
from modelcli.model.tensors import Shape, TensorInfo
from modelcli.wording import counted, is_or_are, listed

#: How many wrong names a row lists.
MOST_NAMED = 3
NOTHING = "nothing"


def structure(
    blueprint: Blueprint, wanted: Assertions, unseen: Sequence[str], entries: Sequence[str]
) -> Iterator[AssertionResult]:
    """Evaluates assertions on a blueprint.

    `unseen` are entries of the state dict that modelcli cannot look at, `entries` all that are not in the blueprint.
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
        names = matches(blueprint, text)
        yield AssertionResult("has", bool(names), listed(names or [_nothing(blueprint, text)], MOST_NAMED), text)
    for text in wanted.absent:
        names = matches(blueprint, text) or _matching(dict.fromkeys(entries), text)
        none = _nothing(blueprint, text)
        yield AssertionResult("absent", not names and none == NOTHING, listed(names or [none], MOST_NAMED), text)
    if wanted.dtypes:
        yield _dtype(blueprint, wanted.dtypes, unseen)


def _at_most(check: str, found: int, most: int, unseen: Sequence[str]) -> AssertionResult:
    """Whether a number is small enough. Fails if something could not be counted."""
    if unseen and found <= most:
        return AssertionResult(check, False, f"{found:,} or more: {listed(unseen, MOST_NAMED)} cannot be counted", most)
    return AssertionResult(check, found <= most, found, most)


def _matching(unseen: Collection[str], text: str) -> list[str]:
    """Return the entries outside the blueprint that a selector would pick."""
    if not unseen:
        return []
    pay = limits.pay_for_modules(unseen, "the modules in the names of the entries")
    try:
        entries = from_keys((TensorInfo(name, None, "float32") for name in unseen), pay=pay)
        found = selectors.select_tensors(entries, [text])
    except RequestError:  # it picks none
        return []
    return [name for name in unseen if name in found]


def _flags(blueprint: Blueprint, text: str, unseen: Sequence[str], *, trained: bool) -> AssertionResult:
    """Whether all parameters that a selector picks are trainable, or all are frozen."""
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
        answer = f"modelcli does not know whether {named} {is_or_are(len(unknown))} {state}: pass --arch REFERENCE"
    else:
        answer = f"{counted(len(parameters), 'parameter')} {is_or_are(len(parameters))} {state}"
    return AssertionResult(kind, not (wrong or unknown), answer, text)


def matches(blueprint: Blueprint, text: str) -> list[str]:
    """Return the modules and tensors that a selector matches, in the model's order."""
    selector = selectors.parse(text)
    modules = selectors.matched_modules(selector, blueprint)
    if modules:
        return [shown(module.path) for module in blueprint.modules if module.path in modules]
    tensors = selectors.matched_tensors(selector, blueprint)
    return [tensor.name for tensor in blueprint.tensors if tensor.name in tensors]


def _nothing(blueprint: Blueprint, text: str) -> str:
    """Return the text for a selector that matches nothing; one for a class cannot match if no class is known."""
    if selectors.parse(text).type is not None and all(module.type is None for module in blueprint.modules):
        return "the file records no classes: pass --arch REFERENCE"
    return NOTHING


def _dtype(blueprint: Blueprint, dtypes: Sequence[str], unseen: Sequence[str]) -> AssertionResult:
    """Whether each floating-point tensor has one of these dtypes. Fails for a model without such tensors."""
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


def outputs(blueprint: Blueprint, wanted: Sequence[Shape]) -> Iterator[AssertionResult]:
    """Whether the output of the forward pass has these shapes. Undecided if no pass was possible."""
    trace = blueprint.trace
    for shape in wanted:
        ran = trace.layers.get("") if trace is not None else None
        if trace is None or ran is None or trace.reason is not None:
            reason = trace.reason if trace is not None and trace.reason else "no forward pass was made"
            yield AssertionResult("output-shape", False, reason, list(shape), answered=False)
            continue
        yield AssertionResult("output-shape", list(shape) in _flat(ran.output_shape), ran.output_shape, list(shape))


def _flat(output: Any) -> list[list[int]]:
    """Return the shapes of all tensors in an output, also inside lists and dicts."""
    if output is None:
        return []
    if isinstance(output, dict):
        output = list(output.values())
    elif all(isinstance(size, int) for size in output):
        return [list(output)]
    return [shape for item in output for shape in _flat(item)]
