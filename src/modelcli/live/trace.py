"""Make forward passes and record shapes, sizes, multiply-accumulates, and the input of each module.

A pass runs on the meta device; if that device cannot run the model, it runs elsewhere: see `on_some_device`.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from modelcli.errors import ModelcliError
from modelcli.live import memory, providers, rules
from modelcli.live.calls import Call, Calls
from modelcli.live.describe import walk
from modelcli.live.fake_kernels import MissingKernels, without_log
from modelcli.live.inputs import Arguments, how_to_state_input, tensors_in
from modelcli.live.meta_models import fake_copy, meta_copy, seeded
from modelcli.live.mult_adds import MultAdds
from modelcli.live.operator_rules import OperatorRules
from modelcli.model.blueprint import LayerTrace, Trace
from modelcli.wording import listed

if TYPE_CHECKING:
    from modelcli.live.inputs import Inputs


#: Python's message about a call with missing arguments.
_MISSING = re.compile(r"missing \d+ required (?:positional|(keyword-only)) arguments?: (.*)")


@dataclass
class Failure:
    """The failure of a forward pass: the path of the innermost module that was running, and its exception."""

    path: str
    error: Exception
    device: str = "meta"

    @property
    def _cause(self) -> tuple[Exception, str]:
        """The original error, and its first line."""
        error = self.error
        while isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
            error = error.__cause__
        return error, (str(error) or type(error).__name__).strip().splitlines()[0]

    @property
    def needs_values(self) -> bool:
        """Whether the pass may have failed only because the meta device has no values."""
        _, text = self._cause
        if self.device == "cpu":
            return False
        return re.search(r"\bmeta\b|register_meta|aten::|data.dependent|fake tensor", text, re.IGNORECASE) is not None

    @property
    def may_run_elsewhere(self) -> bool:
        """Whether the same pass may run on another device: the arguments fit `forward`, and no module rule failed.

        This includes an operator that the CPU refuses (see `operator_rules`), because the model may call another one
        there.
        """
        error, text = self._cause
        wrong_call = isinstance(error, TypeError) and not self.path and "argument" in text
        return not wrong_call and not isinstance(error, rules.MisfitError)

    @property
    def is_out_of_memory(self) -> bool:
        """Whether memory was not sufficient."""
        error, text = self._cause
        return isinstance(error, MemoryError) or "allocate memory" in text

    @property
    def text(self) -> str:
        """What went wrong, without the place."""
        error, text = self._cause
        if self.needs_values:
            operation = re.search(r"(?:aten::|torch\.)\w+", text)
            named = f" ({operation[0]})" if operation else ""
            text = f"it needs values, which the meta device does not have{named}"
        if isinstance(error, TypeError) and not self.path and (missing := _MISSING.search(text)):
            by_keyword, names = missing.groups()
            first = names.split(",")[0].split(" ")[0].strip("'")
            how = f"pass --input {first}=SHAPE[:DTYPE] for a tensor, --input {first}==VALUE for another value"
            text = f"its forward also needs {names}{' by keyword' if by_keyword else ''}: {how}"
        return text

    @property
    def reason(self) -> str:
        """One line that says where and why the pass failed."""
        return f"the forward pass ended in {self.path or 'the model itself'}{self.line}: {self.text}"

    @property
    def line(self) -> str:
        """` (nets.py:12)`: the last line of the user's own code that ran; empty if none ran."""
        frames = traceback.extract_tb(self._cause[0].__traceback__) or traceback.extract_tb(self.error.__traceback__)
        own = [frame for frame in frames if not _is_of_a_library(frame.filename)]
        return f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""


def _is_of_a_library(filename: str) -> bool:
    """Whether a traceback's file belongs to an installed package, to Python or to modelcli, or is not a file."""
    path = Path(filename)
    if filename.startswith("<") or not {"site-packages", "dist-packages"}.isdisjoint(path.parts):
        return True
    return path.is_relative_to(_HERE) or path.is_relative_to(_STANDARD_LIBRARY)


#: Where modelcli and Python's standard library are.
_HERE = Path(__file__).parent.parent
_STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))


@dataclass
class Pass:
    """The observations of one forward pass. A shared module counts under the path through which it was called.

    Attributes:
        output_shapes: the output shape of each module that ran, by path.
        macs: the multiply-accumulates of each module, by path; None for a further path of a module that ran.
        output: the output of the model.
        failure: where and why the pass failed; None if it ran to its end.
        rules: the operator rules of the pass; None if it was made without them.
        device: `meta`, `cpu` or `fake`.
        unseen: the modules inside scripted modules that ran; whether they ran is not known.
        leaf_bytes: the bytes of the outputs of modules that have parameters and called no other module.
        output_bytes: the bytes of the outputs of all modules.
    """

    output_shapes: dict[str, Any] = field(default_factory=dict)
    macs: dict[str, int | None] = field(default_factory=dict)
    output: Any = None
    failure: Failure | None = None
    rules: OperatorRules | None = None
    device: str = "meta"
    unseen: tuple[str, ...] = ()
    leaf_bytes: int = 0
    output_bytes: int = 0


@dataclass(frozen=True)
class Traced:
    """A forward pass as plain data, and the module that ran: its lazy parameters have their shapes now."""

    trace: Trace
    module: nn.Module


Visitor = Callable[[nn.Module, str, tuple[Any, ...], Mapping[str, Any]], None]
Leaver = Callable[[nn.Module, str, Any], None]


@dataclass
class _Listener:
    """Records each call in `seen`, and passes it to the explainer and the caller's functions."""

    seen: Pass
    explainer: rules.Explainer
    visit: Visitor | None
    leave: Leaver | None
    counter: MultAdds | None

    def begins(self, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        call.started = self.counter.total if self.counter is not None else 0
        self.explainer.visit(call.module, call.path, args, kwargs)
        if self.visit is not None:
            self.visit(call.module, call.path, args, kwargs)

    def ends(self, call: Call, output: Any) -> None:
        total = self.counter.total if self.counter is not None else 0
        self.seen.macs[call.path] = (self.seen.macs.get(call.path) or 0) + total - call.started
        self.seen.output_shapes.setdefault(call.path, shape_of(output))
        nbytes = sum({id(tensor): _bytes_of(tensor) for tensor in tensors_in(output)}.values())
        self.seen.output_bytes += nbytes
        if not call.inside and _has_parameters(call.module):
            self.seen.leaf_bytes += nbytes
        if self.leave is not None:
            self.leave(call.module, call.path, output)


def _has_parameters(module: nn.Module) -> bool:
    return any(
        child._parameters and any(p is not None for p in child._parameters.values()) for _, child in walk(module)
    )


def run(
    module: nn.Module,
    inputs: Sequence[Any] | Arguments,
    *,
    device: str = "meta",
    mode: str = "eval",
    visit: Visitor | None = None,
    leave: Leaver | None = None,
    counter: MultAdds | None = None,
    modes: Sequence[AbstractContextManager[Any]] = (),
    judged: bool = True,
) -> Pass:
    """Make one forward pass without gradients. Only the module's own `forward` changes the module.

    Args:
        module: the model, on `device`.
        inputs: the arguments of `forward`.
        device: `meta`, `cpu` or `fake`. For `fake`, `modes` must begin with the `FakeTensorMode` of the tensors.
        mode: `eval` or `train`.
        visit: called before each module runs, with its path and arguments; may raise.
        leave: called after each module ran, with its path and output.
        counter: counts the multiply-accumulates.
        modes: context managers, such as dispatch modes, entered in this order around the call.
        judged: whether a pass without values fails where the CPU would fail (see `operator_rules`). Without it, a pass
            may succeed that would fail on the CPU.

    Returns:
        The observations; an exception of the pass is in `failure`.
    """
    judged = judged and device != "cpu"
    given = inputs if isinstance(inputs, Arguments) else Arguments(tuple(inputs))
    seen = Pass(rules=OperatorRules() if judged else None, device=device)
    explainer = rules.Explainer(on_meta=judged)
    calls = Calls(module, _Listener(seen, explainer, visit, leave, counter))
    with contextlib.ExitStack() as stack:
        stack.enter_context(settings_of_passes())
        stack.enter_context(torch.no_grad())
        if device == "meta":
            stack.enter_context(torch.device("meta"))
        inner = list(modes)
        if device == "fake" and inner:
            stack.enter_context(inner.pop(0))
            stack.enter_context(MissingKernels())  # type: ignore[no-untyped-call]
        if counter is not None:
            stack.enter_context(counter)
            if seen.rules is not None:
                seen.rules.answered = counter.count
        for each in (*inner, *filter(None, [seen.rules])):
            stack.enter_context(each)
        for half in providers.in_use():
            stack.enter_context(half.during_pass(module, device))
        try:
            module.train(mode == "train")
            with calls.watched():
                seen.output = module(*given.args, **given.kwargs)
            _require_result(seen.output)
        except Exception as error:
            seen.failure = _explained(Failure(calls.failed_in or "", error, device), explainer)
    _fill_in(seen, calls)
    return seen


def _explained(failure: Failure, explainer: rules.Explainer) -> Failure:
    """Explain a failure by the rules for `torch.nn` modules, if one of them applies."""
    if failure.needs_values:
        return failure
    explained = explainer.explained(failure.path, failure.error)
    return replace(failure, error=explained.with_traceback(failure.error.__traceback__))


def _require_result(output: Any) -> None:
    """Raise TypeError if calling `forward` ran nothing, because it is a generator or an async function."""
    if inspect.iscoroutine(output):
        output.close()
        raise TypeError("forward is an async function, so calling it runs nothing")
    if isinstance(output, Iterator):
        raise TypeError(
            f"forward returns a {type(output).__name__}, which runs nothing until something iterates over it"
        )


def _fill_in(seen: Pass, calls: Calls) -> None:
    """Add the other paths of modules that ran, and list the modules inside scripted ones."""
    unseen: list[str] = []
    for key, paths in calls.paths.items():
        if key not in calls.ran:
            continue
        first = next((path for path in paths if path in seen.output_shapes), None)
        for path in paths:
            if first is not None and path not in seen.output_shapes:
                seen.output_shapes[path], seen.macs[path] = seen.output_shapes[first], None
        if isinstance(calls.modules[key], torch.jit.ScriptModule):
            every = [path for group in calls.paths.values() for path in group]
            unseen += [
                path for path in every for above in paths if path.startswith(f"{above}." if above else "") and path
            ]
    seen.unseen = tuple(path for path in dict.fromkeys(unseen) if path not in seen.output_shapes)


@contextlib.contextmanager
def settings_of_passes() -> Iterator[None]:
    """Set up torch for forward passes: no warnings, the same random numbers, and every module of a model is called."""
    with _quiet(), seeded(0), _plain_attention(), _not_compiled():
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Make attention call its submodules; the fused path skips them and their hooks."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextlib.contextmanager
def _not_compiled() -> Iterator[None]:
    """Run modules made by `torch.compile` eagerly. Does nothing if nothing was compiled."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def shape_of(output: Any) -> Any:
    """Return the shape of an output: a list of ints, or a list or dict of those; None for anything but tensors."""
    if isinstance(output, torch.Tensor):
        return [int(size) for size in output.shape]
    if isinstance(output, Mapping):
        return {str(key): shape_of(value) for key, value in output.items() if not _is_cache(value)}
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return {name: shape_of(getattr(output, name)) for name in output._fields}
    if isinstance(output, list | tuple):
        shapes = [shape_of(value) for value in output]
        return shapes[0] if len(shapes) == 1 and isinstance(shapes[0], list) else shapes
    return None


def _is_cache(part: Any) -> bool:
    """Whether a part of an output is an object that keeps tensors for the next call: it is no output that flows on."""
    return not isinstance(part, torch.Tensor | Mapping | list | tuple | int | float | bool | str | None)


def meta_copy_if_possible(module: nn.Module) -> nn.Module:
    """Return a copy on meta; the module itself if it contains something that cannot be copied (a lock, a file)."""
    try:
        copied = meta_copy(module, plain_tensors=True)
    except Exception:
        return module
    _prepare(copied)
    return copied


def _prepare(copied: nn.Module) -> None:
    """Let the libraries of the providers prepare a copy that makes a forward pass without values."""
    for half in providers.in_use():
        half.before_pass(copied)


def trace(
    module: nn.Module, inputs: Inputs | None, *, mode: str = "eval", real: Callable[[], nn.Module] | None = None
) -> Traced:
    """Trace a forward pass. Hooks and a dispatch mode collect the figures, so a pass that fails still gives rows.

    Args:
        module: the model on meta.
        inputs: its inputs; None if they are not known.
        mode: `eval` or `train`.
        real: builds the same model with values, for a pass on the CPU if the meta device cannot run it.

    Returns:
        The trace, and the module that ran, whose lazy parameters have shapes now.
    """
    if inputs is None:
        reason = f"the input size is not known: {how_to_state_input(module)}"
        return Traced(Trace(None, reason=reason, device=None), module)
    counter = MultAdds()

    def attempt(subject: nn.Module, given: Arguments, device: str, outer: Outer) -> Pass:
        nonlocal counter
        counter = MultAdds()
        return run(subject, given, device=device, mode=mode, counter=counter, modes=outer)

    ran = on_some_device(module, inputs, attempt, real=real)
    return traced(ran, inputs, counter)


def traced(ran: Ran, inputs: Inputs, counter: MultAdds) -> Traced:
    """A forward pass that was made on these inputs, and whose multiply-accumulates `counter` counted."""
    seen = ran.seen
    layers = {
        path: LayerTrace(seen.output_shapes[path], seen.macs[path])
        for path, _ in walk(ran.module)
        if path in seen.output_shapes
    }
    notes, uncounted = ran.notes, tuple(counter.uncounted)
    if uncounted:
        names = listed(uncounted, 4)
        notes += (f"mult-adds are a lower bound: modelcli cannot count those of {names}",)
    made = Trace(
        inputs.all_shapes,
        layers,
        input_bytes=sum(_bytes_of(tensor) for tensor in inputs.tensors("meta")),
        device=seen.device,
        notes=notes,
        uncounted=uncounted,
        unseen=seen.unseen,
    )
    if seen.failure is not None:
        return Traced(replace(made, reason=ran.reason), ran.module)
    # As torchinfo does: an output that is kept for the backward pass counts twice, because its gradient is as large.
    return Traced(replace(made, macs=counter.total, forward_backward_bytes=2 * seen.leaf_bytes), ran.module)


def _bytes_of(tensor: torch.Tensor) -> int:
    return int(tensor.numel()) * tensor.element_size()


#: The modes to enter before all others: the `FakeTensorMode` of fake tensors.
Outer = tuple[AbstractContextManager[Any], ...]
Attempt = Callable[[nn.Module, Arguments, str, Outer], Pass]

#: A model with more bytes, or a pass with more multiply-accumulates, is first tried under fake tensors.
_LARGE_BYTES, _LARGE_MACS = 2**28, 5 * 10**11


@dataclass(frozen=True)
class Ran:
    """A forward pass on the device that was chosen, the module that ran, and notes about that choice.

    `reason` says why the pass failed; None if it did not.
    """

    seen: Pass
    module: nn.Module
    notes: tuple[str, ...] = ()
    reason: str | None = None


def on_some_device(
    module: nn.Module, inputs: Inputs, attempt: Attempt, *, real: Callable[[], nn.Module] | None = None
) -> Ran:
    """Make a forward pass on the meta device, or elsewhere if it fails there for the device's own reasons.

    The other devices are the CPU, if memory allows, and fake tensors, which claim to be on a device and have no values;
    a large model is tried under fake tensors first. A pass that a rule or the CPU refuses has failed.

    Args:
        module: the model on meta.
        inputs: its inputs.
        attempt: makes one pass.
        real: builds the model with values, for the CPU.
    """
    subject = meta_copy_if_possible(module)
    on_meta = attempt(subject, inputs.tensors("meta"), "meta", ())
    failure = on_meta.failure
    if failure is None:
        return Ran(on_meta, subject)
    if not failure.may_run_elsewhere:
        return Ran(on_meta, subject, reason=failure.reason)
    nbytes = memory.bytes_of(module)
    is_large = nbytes > _LARGE_BYTES or sum(macs or 0 for macs in on_meta.macs.values()) > _LARGE_MACS
    why_not = None
    for device in ("fake", "cpu") if is_large else ("cpu", "fake"):
        if device == "fake":
            ran = _under_fake_tensors(module, inputs, attempt)
            how = "under fake tensors, which have shapes but no values"
        elif is_large and not failure.needs_values:
            continue  # it failed under fake tensors too, and neither message is about the device
        else:
            why_not = _no_room(nbytes, on_meta, inputs) if real is not None else None
            ran = _on_cpu(real, inputs, attempt) if real is not None and why_not is None else None
            how = "on the CPU with random input, which may influence the shapes"
        if ran is None:
            continue
        if ran.seen.failure is None:
            return replace(ran, notes=(f"the forward pass was made {how}: on the meta device {failure.text}",))
        if device == "cpu":
            # Both failed. A rule gives the better explanation.
            better = failure if isinstance(failure.error, rules.RefusedError) else ran.seen.failure
            return replace(ran, reason=better.reason)
    return Ran(on_meta, subject, reason=f"{failure.reason}; {why_not}" if why_not else failure.reason)


def _no_room(nbytes: int, on_meta: Pass, inputs: Inputs) -> str | None:
    """Return why a pass with values does not fit in memory, or None if it fits, as far as the pass on meta shows."""
    flows = sum(_bytes_of(tensor) for tensor in inputs.tensors("meta"))
    needed = 2 * nbytes + 2 * on_meta.output_bytes + 16 * flows
    if memory.fits(needed):
        return None
    return f"on the CPU it would need about {needed / 1e9:,.1f} GB of memory, more than is free"


def _on_cpu(real: Callable[[], nn.Module], inputs: Inputs, attempt: Attempt) -> Ran | None:
    """Make a pass with values. None if the model cannot be built with values or memory is not sufficient after all."""
    try:
        subject = real()
    except (ModelcliError, MemoryError):
        return None
    seen = attempt(subject, inputs.tensors("cpu"), "cpu", ())
    if seen.failure is not None and seen.failure.is_out_of_memory:
        return None
    return Ran(seen, subject)


def _under_fake_tensors(module: nn.Module, inputs: Inputs, attempt: Attempt) -> Ran | None:
    """Make a pass under fake tensors that claim to be on the CPU. None if the module cannot be copied to them."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    fake = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        subject = fake_copy(module, fake)
        with fake:
            given = inputs.tensors("cpu")
    except Exception:
        return None
    with without_log():
        return Ran(attempt(subject, given, "fake", (fake,)), subject)


FirstCalls = dict[str, tuple[tuple[Any, ...], Mapping[str, Any]]]


def inputs_of(
    module: nn.Module, paths: Sequence[str], inputs: Inputs | None
) -> tuple[dict[str, torch.Tensor], Failure | None]:
    """Return the first tensor that each module gets in a forward pass, and how the pass failed, if it did.

    Modules that the pass did not reach are left out. `inputs` are the model's inputs; None gives no tensors.
    """
    calls, failure = _first_calls(module, paths, inputs)
    return {
        path: next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        for path, (args, kwargs) in calls.items()
    }, failure


def first_calls(module: nn.Module, paths: Sequence[str], inputs: Inputs | None) -> FirstCalls:
    """Return the arguments of the first call with a tensor of each module in a forward pass on meta."""
    return _first_calls(module, paths, inputs)[0]


def layers_that_ran(module: nn.Module, inputs: Inputs) -> tuple[list[str], Failure | None]:
    """Return the paths of the modules with parameters of their own that a forward pass ran, in the order of their end.

    Each has one path. If the pass failed, its failure is returned as well.
    """
    found: list[str] = []

    def attempt(subject: nn.Module, given: Arguments, device: str, outer: Outer) -> Pass:
        found.clear()

        def leave(child: nn.Module, path: str, _output: Any) -> None:
            if any(parameter is not None for parameter in child._parameters.values()):
                found.append(path)

        return run(subject, given, device=device, leave=leave, modes=outer, judged=False)

    seen = attempt(meta_copy_if_possible(module), inputs.tensors("meta"), "meta", ())
    if seen.failure is not None:
        seen = on_some_device(module, inputs, attempt).seen
    return found, seen.failure


def _first_calls(module: nn.Module, paths: Sequence[str], inputs: Inputs | None) -> tuple[FirstCalls, Failure | None]:
    if inputs is None:
        return {}, None
    found: FirstCalls = {}

    def attempt(subject: nn.Module, given: Arguments, device: str, outer: Outer) -> Pass:
        found.clear()
        paths_of: dict[int, list[str]] = {}
        for path, child in walk(subject):
            if path in paths:
                paths_of.setdefault(id(child), []).append(path)

        def visit(child: nn.Module, _path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            if any(isinstance(value, torch.Tensor) for value in (*args, *kwargs.values())):
                for path in paths_of.get(id(child), ()):
                    found.setdefault(path, (args, kwargs))

        return run(subject, given, device=device, visit=visit, modes=outer, judged=False)

    seen = attempt(meta_copy_if_possible(module), inputs.tensors("meta"), "meta", ())
    if seen.failure is not None and len(found) < len(set(paths)):
        on_meta, failure = dict(found), seen.failure
        ran = on_some_device(module, inputs, attempt)  # another device may reach more modules
        if len(found) < len(on_meta):
            return on_meta, failure
        seen = ran.seen
    return found, seen.failure
