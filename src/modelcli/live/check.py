"""The check before writing: does the edited model still run on the input that it is known to take?"""

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
from modelcli.live.edit_history import Origins
from modelcli.live.operator_rules import OperatorError
from modelcli.live.rules import Misfit, MisfitError
from modelcli.live.surgery import argument_from, brief, shape_with
from modelcli.model.paths import joined, shown
from modelcli.wording import listed

if TYPE_CHECKING:
    from modelcli.live.inputs import Inputs


@dataclass(frozen=True)
class Check:
    """Whether a forward pass was made, why not where it was not, the shape that came out, what was called in it, and
    what the pass could not tell."""

    ran: bool
    reason: str | None = None
    output_shape: Any = None
    called: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()


#: Gives a model and what it takes.
Subject = Callable[[], "tuple[nn.Module, Inputs | None]"]


def check(
    before: Subject,
    after: nn.Module,
    inputs: Inputs | None,
    edited: Mapping[str, type[Edit]],
    *,
    known: Subject | None = None,
    device: str = "meta",
    origins: Origins | None = None,
) -> Check:
    """Run `after` on meta under the rules for operators, or on the CPU.

    The unedited model is run only where `after` fails, to see whether it fails as well. On the CPU both are real.

    Args:
        before: gives the unedited model and its input: the stated one, where one was stated.
        after: the edited model.
        inputs: what it takes.
        edited: which edits did something at which paths, without those that cannot break the fit.
        known: gives the unedited model and the input that it is known to take by itself, where another one was stated.
        device: `meta` or `cpu`.
        origins: which edits those were.

    Raises RequestError that names the module that no longer fits, what flows in, what it expects and the nearest fix.
    Where no input is known, or the unedited model fails in the same way on every input that is known, the check was not
    possible, and the reason says why.
    """
    if inputs is None:
        return Check(False, "no input size is known: --input-size gives it, batch included")
    if device == "meta" and (stored := _storage_dtype(after)) is not None:
        return Check(False, f"{stored} is a dtype to store numbers in: no module of torch.nn computes with it")
    watch, seen = _pass(after, inputs, device)
    if seen.failure is None:
        called = frozenset(seen.output_shapes)
        return Check(True, None, trace.shape_of(seen.output), called, _not_told(watch, seen, edited))
    if seen.failure.needs_numbers:
        return Check(False, f"{seen.failure.reason}; --check run runs it with real ones")
    unedited, runs_elsewhere = _failure_as_it_was(before, known, inputs, device)
    if unedited is not None and not runs_elsewhere and _is_same(unedited, seen.failure):
        return Check(False, f"the model cannot run as it was: {unedited.reason}")
    origins = origins or Origins()
    refusal = _refusal(after, inputs, seen.failure, watch, edited, origins)
    refusal.message = _where(seen.failure.path, watch, origins) + refusal.message
    if unedited is not None:
        refusal.message += _also_fails(unedited, inputs, elsewhere=runs_elsewhere)
        if _is_same(unedited, seen.failure):
            sizes = " and ".join(",".join(map(str, shape)) for shape in inputs.shapes)
            refusal.hint = (
                f"is the input {sizes} right, the batch included? leave --input-size and --input-dtype "
                "(in a recipe input_size, input_dtype) out, or mend them"
            )
    raise refusal


def _failure_as_it_was(
    before: Subject, known: Subject | None, inputs: Inputs, device: str
) -> tuple[trace.Failure | None, bool]:
    """How the unedited model fails on the stated input, and whether it runs on the one that it is known to take."""
    model, given = before()
    failure = _pass(model, given or inputs, device)[1].failure
    if failure is None or known is None:
        return failure, False
    model, given = known()
    return failure, given is not None and _pass(model, given, device)[1].failure is None


def _is_same(unedited: trace.Failure, failure: trace.Failure) -> bool:
    """Whether two passes end alike: in one place for one reason. An edit may have moved what fails to another path."""
    if _kind_of(unedited.error) != _kind_of(failure.error):
        return False
    return unedited.path == failure.path or str(unedited.error) == str(failure.error)


def _kind_of(error: Exception) -> tuple[Any, ...]:
    """What kind of failure an error is: what it is about, without the numbers in it."""
    if isinstance(error, MisfitError):
        return MisfitError, error.misfit.argument, error.misfit.dtype is not None
    return type(error), re.sub(r"\d+", "", str(error))


def _also_fails(unedited: trace.Failure, inputs: Inputs, *, elsewhere: bool) -> str:
    """What there is to say of an unedited model that fails on the stated input as well."""
    if not elsewhere:
        return f"; before the edit {unedited.reason}"
    sizes = " and ".join(",".join(map(str, shape)) for shape in inputs.shapes)
    return f"; the model as it was does not take the stated input ({sizes}): {unedited.reason}"


def _not_told(watch: _Watch, seen: trace.Pass, edited: Mapping[str, type[Edit]]) -> tuple[str, ...]:
    """What a pass that ran on meta does not tell: where a kernel is missing, and whether new tables are long enough."""
    if seen.rules is None:
        return ()
    notes = [f"{reason}: whether it fits was not checked" for reason in seen.rules.unchecked.values()]
    places = [path for path, kind in edited.items() if kind.places_module]
    looked_up = {table.untyped_storage()._cdata for table in seen.rules.tables}
    for name, tensor in watch.subject.named_parameters():
        if tensor.untyped_storage()._cdata in looked_up and any(_is_below(name, place) for place in places):
            looks = "which rows are looked up is not known without values, so that their range was not checked"
            notes.append(f"{name} has {tensor.shape[0]} rows: {looks}; --check run looks them up")
    return tuple(notes)


def _is_below(path: str, place: str) -> bool:
    return not place or path == place or path.startswith(f"{place}.")


def _storage_dtype(module: nn.Module) -> str | None:
    """The dtype of the first parameter that is floating-point and takes a byte: the meta device would run it."""
    dtypes = (parameter.dtype for parameter in module.parameters())
    return next((dtype_name(dtype) for dtype in dtypes if dtype.is_floating_point and dtype.itemsize == 1), None)


class _Watch:
    """Remembers where what flows into a module came from: the input itself, or the leaf that gave it, where that is
    sure."""

    def __init__(self, subject: nn.Module, given: Sequence[Any]) -> None:
        self.subject = subject
        self.given = given
        self.last: tuple[str, nn.Module, Any] | None = None
        self._inputs: set[str] = set()
        self._came_from: dict[str, tuple[str, nn.Module]] = {}

    def visit(self, _module: nn.Module, path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Look at what flows into a module on its way."""
        flows = (*args, *kwargs.values())
        self._inputs.discard(path)
        self._came_from.pop(path, None)
        if any(value is given for value in flows for given in self.given):
            self._inputs.add(path)
        if self.last is not None and any(value is self.last[2] for value in flows):
            self._came_from[path] = self.last[:2]

    def takes_input(self, path: str) -> bool:
        """Whether the input of the model itself flowed into a module when it was called last."""
        return path in self._inputs

    def came_from(self, path: str) -> tuple[str, nn.Module] | None:
        """The leaf whose output flowed into a module when it was called last."""
        return self._came_from.get(path)

    def leave(self, module: nn.Module, path: str, output: Any) -> None:
        """Keep what the last leaf gave."""
        if not module._modules:
            self.last = (path, module, output)


def _pass(module: nn.Module, inputs: Inputs, device: str) -> tuple[_Watch, trace.Pass]:
    given = inputs.tensors(device)
    subject = trace.twin_or_itself(module) if device == "meta" else module
    watch = _Watch(subject, list(given))
    return watch, trace.run(subject, given, device=device, visit=watch.visit, leave=watch.leave)


def _refusal(
    after: nn.Module,
    inputs: Inputs,
    failure: trace.Failure,
    watch: _Watch,
    edited: Mapping[str, type[Edit]],
    origins: Origins,
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
    settled = origins.count(path) > 1  # `_` takes what an edit before gave: the number itself is told
    fix, touched = _fix(module, path, misfit, edited, settled=settled), _is_touched(path, edited)
    if touched and is_input:
        fix = _stated(module, misfit, inputs) or fix
    if touched and (is_input or watch.last is None):
        fix += _other_size(after, module, misfit, inputs)
    return RequestError(message, fix)


def _stated(module: nn.Module, misfit: Misfit, inputs: Inputs) -> str | None:
    """Where the dtype that does not fit is the one that was stated for the input, what to state instead."""
    if misfit.dtype is None or misfit.dtype not in inputs.dtypes:
        return None
    return (
        f"the input is stated to be {misfit.dtype}: leave --input-dtype (input_dtype in a recipe) out, or "
        f"--input-dtype {floating_dtype(module)}; --check none writes it all the same"
    )


def _other_size(after: nn.Module, module: nn.Module, misfit: Misfit, inputs: Inputs) -> str:
    """The input that a module would fit which takes the model's own: images in grey, more features. It was tried."""
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
    return f"; or --input-size {','.join(map(str, other))}, if that is what it is to take"


def _where(path: str, watch: _Watch, origins: Origins) -> str:
    """`-e 1: 'replace fc ...': ` of each edit that made the module which fails, or what flows into it."""
    leaf = watch.came_from(path)
    before = "" if leaf is None else origins.told(leaf[0])
    told = origins.told(path) or before or origins.only()
    return f"{told}: " if told else ""


def _named(path: str, module: nn.Module) -> str:
    return f"{path} {type(module).__name__}" if path else f"the model itself ({type(module).__name__})"


def _last_that_ran(watch: _Watch) -> str:
    """The neighbour before: the leaf that ran last, whose output may or may not be what flows in."""
    return "" if watch.last is None else f" (after {shown(watch.last[0])} {brief(watch.last[1])})"


def _next(model: nn.Module, path: str) -> str:
    """The neighbour behind, where a Sequential says which one that is."""
    above, _, name = path.rpartition(".")
    holder = model.get_submodule(above)
    if isinstance(holder, nn.Sequential):
        for here, (follower, child) in pairwise(holder.named_children()):
            if here[0] == name:
                return f"; behind it comes {joined(above, follower)} {brief(child)}"
    return ""


def _way_out(after: nn.Module, path: str, error: Exception, edited: Mapping[str, type[Edit]]) -> str:
    """What to do where the code of a module fails: it may ask for a child that was taken out."""
    there = dict(after.named_modules())
    gone = [place for place in edited if place and place not in there]
    if gone and isinstance(error, AttributeError | KeyError | IndexError):
        asks = f"{_named(path, after.get_submodule(path))} asks for what was taken out"
        return f"{asks}: replace {quoted(gone[0])} Identity keeps its name, and hands on what flows in"
    if isinstance(error, OperatorError) and error.mixed and (dtype := _cast_to(after, edited)) is not None:
        return f"cast . {dtype} casts the whole model; --check none writes it all the same"
    return _edited_elsewhere(edited)


def _cast_to(after: nn.Module, edited: Mapping[str, type[Edit]]) -> str | None:
    """The dtype that an edit gave to a part of the model alone."""
    places = [path for path, kind in edited.items() if kind.changes_dtype and path]
    for name, tensor in (*after.named_parameters(), *after.named_buffers()):
        if tensor.dtype.is_floating_point and any(_is_below(name, place) for place in places):
            return dtype_name(tensor.dtype)
    return None


def _fix(module: nn.Module, path: str, misfit: Misfit, edited: Mapping[str, type[Edit]], *, settled: bool) -> str:
    """The nearest edit that would make it fit."""
    touched = _is_touched(path, edited)
    if misfit.dtype is not None:
        if touched:
            whole = f"cast . {floating_dtype(module)} casts the whole model"
            if "" in edited:
                whole = f"the model's own code makes {misfit.dtype} of what flows in there"
            return f"{whole}; --check none writes it all the same"
        return f"cast {quoted(path)} {misfit.dtype} as well, or cast . {misfit.dtype}, which is the whole model"
    if misfit.argument is not None and misfit.value is not None:
        place, inner = _placed_above(path, edited), _with(module, misfit.argument, misfit.value)
        if place is not None and inner is not None:
            return f"write {inner} for {brief(module)} inside the module that goes to {shown(place)}"
        text = None if settled else _with_hole(module, misfit.argument)
        if text is not None:
            if touched:
                return (
                    f"{_again(path, edited)} {quoted(text)} takes {misfit.argument}={misfit.value} from what flows in"
                )
            return (
                f"replace {quoted(path)} {quoted(text)} as well, which takes {misfit.argument}={misfit.value}; "
                f"or keep the size that {listed([*map(shown, edited)], 3)} gave before"
            )
        if (text := _with(module, misfit.argument, misfit.value)) is not None:
            return f"{_again(path, edited)} {quoted(text)}"
        return f"it would have to have {misfit.argument}={misfit.value}"
    if touched:
        return "--check none writes it all the same"
    return _edited_elsewhere(edited)


def _edited_elsewhere(edited: Mapping[str, type[Edit]]) -> str:
    if not edited:
        return "--check none writes it all the same"
    return f"what was edited: {listed([*map(shown, edited)], 3)}; --check none writes it all the same"


def _is_touched(path: str, edited: Mapping[str, type[Edit]]) -> bool:
    return any(_is_below(path, place) for place in edited)


def _placed_above(path: str, edited: Mapping[str, type[Edit]]) -> str | None:
    """The path of the new module that a module is a part of: by itself no edit can name it, before that is written."""
    placed = [place for place, kind in edited.items() if kind.places_module]
    return next((place for place in placed if path != place and _is_below(path, place)), None)


def _again(path: str, edited: Mapping[str, type[Edit]]) -> str:
    """The words of the edit that put a module at a path, up to the module."""
    kind = edited.get(path)
    return kind.again(path) if kind is not None and kind.places_module else f"replace {quoted(path)}"


def _with_hole(module: nn.Module, argument: str) -> str | None:
    """The module's own expression with `_` for one argument, where `_` would give the right value."""
    return None if argument_from(argument, (1, 1, 1, 1)) is None else _with(module, argument, HOLE)


def _with(module: nn.Module, argument: str, value: Any) -> str | None:
    """The module's own expression with another value for one argument; None where it has no such expression."""
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
