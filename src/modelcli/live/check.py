"""Check, before writing, that the edited model still runs on its known input."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from torch import nn

from modelcli.edits import Edit
from modelcli.errors import RequestError
from modelcli.language import expressions
from modelcli.language.expressions import HOLE, Call
from modelcli.language.quoting import quoted
from modelcli.live import modules, trace
from modelcli.live.describe import dtype_name, floating_dtype
from modelcli.live.edit_history import NO_HISTORY, EditHistory
from modelcli.live.mult_adds import MultAdds
from modelcli.live.operator_rules import OperatorError
from modelcli.live.rules import Misfit, MisfitError
from modelcli.live.surgery import argument_from, brief, shape_with
from modelcli.model.paths import joined, shown
from modelcli.wording import listed

if TYPE_CHECKING:
    from modelcli.live.inputs import Inputs


@dataclass(frozen=True)
class Check:
    """The result of the check.

    Attributes:
        ran: whether the forward pass ran to its end.
        reason: why no pass was possible; None if it ran.
        output_shape: the shape of the output, as in `LayerTrace`.
        called: the paths of the modules that the pass called.
        notes: what the pass could not check.
        traced: the pass itself, for a record, if it was asked for and ran on the meta device.
    """

    ran: bool
    reason: str | None = None
    output_shape: Any = None
    called: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    traced: trace.Traced | None = None


#: A function that makes a model and returns it with its inputs.
MakeModel = Callable[[], "tuple[nn.Module, Inputs | None]"]


def check(
    before: MakeModel,
    after: nn.Module,
    inputs: Inputs | None,
    edited: Mapping[str, type[Edit]],
    *,
    known: MakeModel | None = None,
    device: str = "meta",
    history: EditHistory = NO_HISTORY,
    traced: bool = False,
    described: Callable[[], nn.Module | None] = lambda: None,
) -> Check:
    """Run `after` on the meta device under the operator rules, or on the CPU.

    If `after` fails, run the unedited model as well, to see whether it fails in the same way. The check is not possible
    if no input is known, or if the unedited model fails in the same way on every known input; `reason` says so.

    Args:
        before: makes the unedited model and its input: the stated one, if the user stated one.
        after: the edited model, with values if `device` is `cpu`.
        inputs: the input of `after`.
        edited: the kind of the edit at each path, without edits that cannot break the fit.
        known: makes the unedited model and its own known input, if the user stated another one.
        device: `meta` or `cpu`.
        history: the edits at each path, for messages.
        traced: whether the result needs the pass itself.
        described: makes `after` say of itself what edits made, for a class that goes by its configuration in a forward
            pass; it is called if `after` fails. It returns None where there is nothing to say.

    Raises:
        RequestError: the edited model fails. The message names the module, what flows in, what it expects, and the
            closest fix.
    """
    if inputs is None:
        return Check(False, "the input size is not known: pass --input-size, batch included")
    if device == "meta" and (stored := _storage_dtype(after)) is not None:
        return Check(False, f"{stored} is only for storage: no module of torch.nn computes with it")
    counter = MultAdds() if traced and device == "meta" else None
    watch, seen = _pass(after, inputs, device, counter)
    if seen.failure is not None and (other := described()) is not None:
        counting = None if counter is None else MultAdds()
        watching, ran = _pass(other, inputs, device, counting)
        if ran.failure is None:
            watch, seen, counter = watching, ran, counting
    if seen.failure is None:
        found = None if counter is None else trace.traced(trace.Ran(seen, watch.subject), inputs, counter)
        called = frozenset(seen.output_shapes)
        return Check(True, None, trace.shape_of(seen.output), called, _unchecked_notes(watch, seen, edited), found)
    if seen.failure.needs_values:
        return Check(False, f"{seen.failure.reason}; --check run makes the pass with values")
    unedited, runs_elsewhere = _failure_before_edit(before, known, inputs, device)
    if unedited is not None and not runs_elsewhere and _is_same(unedited, seen.failure):
        return Check(False, f"the model cannot run before the edit either: {unedited.reason}")
    refusal = _refusal(after, inputs, seen.failure, watch, edited, history)
    refusal.message = _where(seen.failure.path, watch, history) + refusal.message
    if unedited is not None:
        refusal.message += _also_fails(unedited, inputs, elsewhere=runs_elsewhere)
        if _is_same(unedited, seen.failure):
            sizes = " and ".join(",".join(map(str, shape)) for shape in inputs.shapes)
            refusal.hint = (
                f"is the input {sizes}, batch included, right? remove --input-size and --input-dtype "
                "(input_size and input_dtype in a recipe), or correct them"
            )
    raise refusal


def _failure_before_edit(
    before: MakeModel, known: MakeModel | None, inputs: Inputs, device: str
) -> tuple[trace.Failure | None, bool]:
    """Return the failure of the unedited model on the stated input, and whether it runs on its own known input."""
    model, given = before()
    failure = _pass(model, given or inputs, device)[1].failure
    if failure is None or known is None:
        return failure, False
    model, given = known()
    return failure, given is not None and _pass(model, given, device)[1].failure is None


def _is_same(unedited: trace.Failure, failure: trace.Failure) -> bool:
    """Whether two passes fail for the same reason. The path may differ, because an edit can move a module."""
    if _kind_of(unedited.error) != _kind_of(failure.error):
        return False
    return unedited.path == failure.path or str(unedited.error) == str(failure.error)


def _kind_of(error: Exception) -> tuple[Any, ...]:
    """Return what identifies the kind of an error, without the numbers in its message."""
    if isinstance(error, MisfitError):
        return MisfitError, error.misfit.argument, error.misfit.dtype is not None
    return type(error), re.sub(r"\d+", "", str(error))


def _also_fails(unedited: trace.Failure, inputs: Inputs, *, elsewhere: bool) -> str:
    """Return the part of the message that says that the unedited model fails on the stated input too."""
    if not elsewhere:
        return f"; before the edit {unedited.reason}"
    sizes = " and ".join(",".join(map(str, shape)) for shape in inputs.shapes)
    return f"; before the edit the model does not take the stated input either ({sizes}): {unedited.reason}"


def _unchecked_notes(watch: _Watch, seen: trace.Pass, edited: Mapping[str, type[Edit]]) -> tuple[str, ...]:
    """Return notes on what a pass on meta cannot check: operators without a CPU kernel, and index ranges."""
    if seen.rules is None:
        return ()
    notes = [f"{reason}, so the check skipped it" for reason in seen.rules.unchecked.values()]
    placed = [path for path, kind in edited.items() if kind.places_module]
    looked_up = {table.untyped_storage()._cdata for table in seen.rules.tables}
    for name, tensor in watch.subject.named_parameters():
        if tensor.untyped_storage()._cdata in looked_up and any(_is_below(name, place) for place in placed):
            notes.append(
                f"{name} has {tensor.shape[0]} rows, and the check has no index values, so it did not check that they "
                "are in range; --check run does"
            )
    return tuple(notes)


def _is_below(path: str, place: str) -> bool:
    return not place or path == place or path.startswith(f"{place}.")


def _storage_dtype(module: nn.Module) -> str | None:
    """Return the dtype of the first float8 parameter, if any. (The meta device would run such a model.)"""
    dtypes = (parameter.dtype for parameter in module.parameters())
    return next((dtype_name(dtype) for dtype in dtypes if dtype.is_floating_point and dtype.itemsize == 1), None)


class _Watch:
    """Records whether the input of each module is the model's own input, or the output of which leaf module.

    It records only what it knows for certain: that the same object left one module and reached the next.
    """

    def __init__(self, subject: nn.Module, given: Sequence[Any]) -> None:
        self.subject = subject
        self.given = given
        self.last: tuple[str, nn.Module, Any] | None = None
        self._inputs: set[str] = set()
        self._came_from: dict[str, tuple[str, nn.Module]] = {}

    def visit(self, _module: nn.Module, path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Record where the arguments of a module come from. Called before the module runs."""
        flows = (*args, *kwargs.values())
        self._inputs.discard(path)
        self._came_from.pop(path, None)
        if any(value is given for value in flows for given in self.given):
            self._inputs.add(path)
        if self.last is not None and any(value is self.last[2] for value in flows):
            self._came_from[path] = self.last[:2]

    def takes_input(self, path: str) -> bool:
        """Whether the model's own input went into the module at its last call."""
        return path in self._inputs

    def came_from(self, path: str) -> tuple[str, nn.Module] | None:
        """Return the leaf module whose output went into the module at its last call, if known."""
        return self._came_from.get(path)

    def leave(self, module: nn.Module, path: str, output: Any) -> None:
        """Record the output of the last leaf module. Called after the module ran."""
        if not module._modules:
            self.last = (path, module, output)


def _pass(module: nn.Module, inputs: Inputs, device: str, counter: MultAdds | None = None) -> tuple[_Watch, trace.Pass]:
    given = inputs.tensors(device)
    subject = trace.meta_copy_if_possible(module) if device == "meta" else module
    watch = _Watch(subject, list(given))
    return watch, trace.run(subject, given, device=device, visit=watch.visit, leave=watch.leave, counter=counter)


def _refusal(
    after: nn.Module,
    inputs: Inputs,
    failure: trace.Failure,
    watch: _Watch,
    edited: Mapping[str, type[Edit]],
    history: EditHistory,
) -> RequestError:
    path = failure.path
    module = after.get_submodule(path)
    if not isinstance(failure.error, MisfitError):
        reason = failure.reason.partition(": ")[2]
        return RequestError(
            f"{_named(path, module)} cannot run after the edit: {reason}{_last_that_ran(watch)}",
            _way_out(after, path, failure.error, edited),
        )
    misfit = failure.error.misfit
    is_input, leaf = watch.takes_input(path), watch.came_from(path)
    came_from = "" if is_input else _last_that_ran(watch)
    if leaf is not None:
        came_from = f" (from {shown(leaf[0])} {brief(leaf[1])})"
    message = (
        f"{shown(path)} {brief(module)} does not fit: {misfit.flows} flows in{came_from}, "
        f"it expects {misfit.expects}{_next(after, path)}"
    )
    settled = history.count(path) > 1  # `_` would keep an earlier edit's value, so the fix states the value itself
    fix, touched = _fix(module, path, misfit, edited, history, settled=settled), _is_touched(path, edited)
    if touched and is_input:
        fix = _stated(module, misfit, inputs) or fix
    if touched and (is_input or watch.last is None):
        fix += _other_size(after, module, misfit, inputs)
    return RequestError(message, fix)


def _stated(module: nn.Module, misfit: Misfit, inputs: Inputs) -> str | None:
    """Return the fix if the dtype that does not fit is the one that the user stated for the input; else None."""
    if misfit.dtype is None or misfit.dtype not in inputs.dtypes:
        return None
    return (
        f"you stated {misfit.dtype} as the dtype of the input: remove --input-dtype (input_dtype in a recipe), or pass "
        f"--input-dtype {floating_dtype(module)}; --check none writes the model anyway"
    )


def _other_size(after: nn.Module, module: nn.Module, misfit: Misfit, inputs: Inputs) -> str:
    """Return the part of the hint that names another input size (grey images, more features), if it has been tried."""
    argument, own = misfit.argument, getattr(module, misfit.argument or "", None)
    sizes = inputs.shapes[0] if inputs.shapes else ()
    if argument is None or not sizes or not isinstance(own, int) or argument_from(argument, sizes) != misfit.value:
        return ""
    other = shape_with(argument, sizes, own)
    if other is None:
        return ""
    tried = replace(inputs, shapes=(tuple(other), *inputs.shapes[1:]))
    if _pass(after, tried, "meta")[1].failure is not None:
        return ""
    return f"; or pass --input-size {','.join(map(str, other))}, if that is the input you want"


def _where(path: str, watch: _Watch, history: EditHistory) -> str:
    """Return `-e 1: 'replace fc ...': ` for the edit that made the failing module, or the module before it."""
    leaf = watch.came_from(path)
    before = "" if leaf is None else history.edits_at(leaf[0])
    edits = history.edits_at(path) or before or history.only_edit()
    return f"{edits}: " if edits else ""


def _named(path: str, module: nn.Module) -> str:
    return f"{path} {type(module).__name__}" if path else f"the model itself ({type(module).__name__})"


def _last_that_ran(watch: _Watch) -> str:
    """Return ` (after PATH MODULE)` for the leaf that ran last, whose output may or may not be what flows in."""
    return "" if watch.last is None else f" (after {shown(watch.last[0])} {brief(watch.last[1])})"


def _next(model: nn.Module, path: str) -> str:
    """Return the part of the message that names the next module, if the module is in a Sequential."""
    above, _, name = path.rpartition(".")
    holder = model.get_submodule(above)
    if isinstance(holder, nn.Sequential):
        for here, (follower, child) in pairwise(holder.named_children()):
            if here[0] == name:
                return f"; the next module is {joined(above, follower)} {brief(child)}"
    return ""


def _way_out(after: nn.Module, path: str, error: Exception, edited: Mapping[str, type[Edit]]) -> str:
    """Return the hint for an error in a module's own code, which may use a child that an edit removed."""
    there = dict(after.named_modules())
    gone = [place for place in edited if place and place not in there]
    if gone and isinstance(error, AttributeError | KeyError | IndexError):
        asks = f"{_named(path, after.get_submodule(path))} uses a module that the edit removed"
        return f"{asks}: replace {quoted(gone[0])} Identity keeps its name and passes its input through"
    if isinstance(error, OperatorError) and error.mixed and (dtype := _cast_to(after, edited)) is not None:
        return f"cast . {dtype} casts the whole model; --check none writes the model anyway"
    return _edited_elsewhere(edited)


def _cast_to(after: nn.Module, edited: Mapping[str, type[Edit]]) -> str | None:
    """Return the dtype to which an edit cast only a part of the model; None if there is no such edit."""
    cast = [path for path, kind in edited.items() if kind.changes_dtype and path]
    for name, tensor in (*after.named_parameters(), *after.named_buffers()):
        if tensor.dtype.is_floating_point and any(_is_below(name, place) for place in cast):
            return dtype_name(tensor.dtype)
    return None


def _fix(
    module: nn.Module,
    path: str,
    misfit: Misfit,
    edited: Mapping[str, type[Edit]],
    history: EditHistory,
    *,
    settled: bool,
) -> str:
    """Return the closest edit that would make the module fit."""
    touched = _is_touched(path, edited)
    if misfit.dtype is not None:
        if touched:
            whole = f"cast . {floating_dtype(module)} casts the whole model"
            if "" in edited:
                whole = f"the model's own code converts this input to {misfit.dtype}"
            return f"{whole}; --check none writes the model anyway"
        return f"cast {quoted(path)} {misfit.dtype} too, or the whole model with cast . {misfit.dtype}"
    if misfit.argument is not None and misfit.value is not None:
        place, inner = _placed_above(path, edited), _with(module, misfit.argument, misfit.value)
        if place is not None and inner is not None:
            is_old = history.holds_old(place, path)
            if is_old is False:
                return f"write {inner} instead of {brief(module)} inside the new module at {shown(place)}"
            was = "was there before and " if is_old else ""
            return (
                f"{path} {brief(module)} {was}takes {misfit.expects}: change what the new module at {shown(place)} "
                "does before it"
            )
        text = None if settled else _with_hole(module, misfit.argument)
        if text is not None:
            if touched:
                return f"{_again(path, text, history)} takes {misfit.argument}={misfit.value} from what flows in"
            return (
                f"replace {quoted(path)} {quoted(text)} too, which takes {misfit.argument}={misfit.value}; "
                f"or keep the former output size of {listed([*map(shown, edited)], 3)}"
            )
        if (text := _with(module, misfit.argument, misfit.value)) is not None:
            return _again(path, text, history)
        return f"it needs {misfit.argument}={misfit.value}"
    if touched:
        return "--check none writes the model anyway"
    return _edited_elsewhere(edited)


def _edited_elsewhere(edited: Mapping[str, type[Edit]]) -> str:
    if not edited:
        return "--check none writes the model anyway"
    return f"edited modules: {listed([*map(shown, edited)], 3)}; --check none writes the model anyway"


def _is_touched(path: str, edited: Mapping[str, type[Edit]]) -> bool:
    return any(_is_below(path, place) for place in edited)


def _placed_above(path: str, edited: Mapping[str, type[Edit]]) -> str | None:
    """Return the path of the new module that contains this one, if any; an edit can only name that one."""
    placed = [place for place, kind in edited.items() if kind.places_module]
    return next((place for place in placed if path != place and _is_below(path, place)), None)


def _again(path: str, text: str, history: EditHistory) -> str:
    """Return the line that puts this module at a path: the edit that put one there with another module, or replace."""
    return history.placing_another(path, expressions.parse(text)) or f"replace {quoted(path)} {quoted(text)}"


def _with_hole(module: nn.Module, argument: str) -> str | None:
    """Return the module's own expression with `_` for one argument, if `_` would give the right value."""
    return None if argument_from(argument, (1, 1, 1, 1)) is None else _with(module, argument, HOLE)


def _with(module: nn.Module, argument: str, value: Any) -> str | None:
    """Return the module's own expression with another value for one argument; None if it has no such expression."""
    try:
        call = expressions.parse(brief(module))
        names = modules.parameter_names(type(module))
    except (RequestError, ValueError):
        return None
    if argument not in names:
        return None
    args, kwargs = list(call.args), dict(call.kwargs)
    position = names.index(argument)
    if position < len(args):
        args[position] = value
    else:
        kwargs[argument] = value
    return expressions.to_text(Call(call.name, tuple(args), kwargs))
