"""Forward passes on the meta device: shapes, multiply-accumulates, and what flows in where."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from modelcli.blueprints import LayerTrace, Trace
from modelcli.live import rules
from modelcli.live.describe import walk
from modelcli.live.operator_rules import OperatorRules
from modelcli.live.twins import meta_twin, seeded

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

    from modelcli.live.inputs import Inputs


#: What Python says of a call that leaves arguments out.
_MISSING = re.compile(r"missing \d+ required (?:positional|(keyword-only)) arguments?: (.*)")


@dataclass
class Failure:
    """Where and why a forward pass ended: the innermost module that was running, and what it raised."""

    path: str
    error: Exception

    @property
    def _cause(self) -> tuple[Exception, str]:
        """The error that others came from, and its first line."""
        error = self.error
        while isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
            error = error.__cause__
        return error, (str(error) or type(error).__name__).strip().splitlines()[0]

    @property
    def needs_numbers(self) -> bool:
        """Whether it may only be that the meta device has no numbers."""
        _, text = self._cause
        return "meta tensor" in text.lower() or "register_meta" in text or "aten::" in text

    @property
    def reason(self) -> str:
        """One line for a person."""
        error, text = self._cause
        if self.needs_numbers:
            operation = re.search(r"(?:aten::|torch\.)\w+", text)
            named = f" ({operation[0]})" if operation else ""
            text = f"it needs real numbers, and the meta device has none{named}"
        if isinstance(error, TypeError) and not self.path and (missing := _MISSING.search(text)):
            by_keyword, names = missing.groups()
            text = f"its forward takes {names} by keyword alone, and inputs are given by position: give it a default"
            if not by_keyword:
                text = f"its forward takes {names} as well: --input-size again gives one more input"
        return f"the forward pass ended in {self.path or 'the model itself'}: {text}"


@dataclass
class Pass:
    """What hooks saw of one forward pass, by path. A shared module has the path that its caller knows it by."""

    output_shapes: dict[str, Any] = field(default_factory=dict)
    macs: dict[str, int] = field(default_factory=dict)
    output: Any = None
    failure: Failure | None = None
    rules: OperatorRules | None = None


Visitor = Callable[[nn.Module, str, tuple[Any, ...], Mapping[str, Any]], None]


def run(
    module: nn.Module,
    inputs: Sequence[Any],
    *,
    device: str = "meta",
    mode: str = "eval",
    visit: Visitor | None = None,
    leave: Callable[[nn.Module, str, Any], None] | None = None,
    drive: Callable[[nn.Module, Sequence[Any]], Any] | None = None,
    counter: FlopCounterMode | None = None,
    modes: Sequence[AbstractContextManager[Any]] = (),
    judged: bool = True,
) -> Pass:
    """One forward pass without gradients. The module is changed only by what its own `forward` does to it.

    `visit` is called before each module runs, with its path and what flows in, and may raise; `leave` after it, with
    its path and output. `drive` makes the call, by default plainly. `modes` are entered innermost around the call, in
    their order: a dispatch mode of the caller's sees each operator, and may raise. An exception of the pass is kept in
    `failure`.

    A pass on meta ends where the CPU would end it (see `operator_rules`), unless it is not to be `judged`: what is then
    said to have run may not run.
    """
    on_meta = device == "meta"
    seen = Pass(rules=OperatorRules() if on_meta and judged else None)
    explainer = rules.Explainer(on_meta=on_meta and judged)
    paths: dict[int, list[str]] = {}
    for path, child in walk(module):
        paths.setdefault(id(child), []).append(path)
    running: list[tuple[str, int, nn.Module]] = []

    def total() -> int:
        return counter.get_total_flops() if counter is not None else 0

    def before(child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        path = _path_of_call(paths[id(child)], running[-1][0] if running else "")
        running.append((path, total(), child))
        explainer.visit(child, path, args, kwargs)
        if visit is not None:
            visit(child, path, args, kwargs)

    def after(child: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        # A module whose exception was caught above it has left no call of this hook.
        while running and running[-1][2] is not child:
            running.pop()
        path, started, _ = running.pop()
        # FlopCounterMode counts a multiply-accumulate as two.
        seen.macs[path] = seen.macs.get(path, 0) + (total() - started) // 2
        seen.output_shapes.setdefault(path, shape_of(output))
        if not running:
            seen.output = output
        if leave is not None:
            leave(child, path, output)

    with contextlib.ExitStack() as stack:
        for child in {id(child): child for _, child in walk(module)}.values():
            if isinstance(child, torch.jit.ScriptModule):
                continue  # takes no hooks of this kind
            hook = child.register_forward_pre_hook(before, with_kwargs=True)
            stack.callback(hook.remove)
            late_hook = child.register_forward_hook(after, with_kwargs=True)
            stack.callback(late_hook.remove)
        stack.enter_context(_quiet())
        stack.enter_context(torch.no_grad())
        stack.enter_context(seeded(0))
        stack.enter_context(_plain_attention())
        if on_meta:
            stack.enter_context(torch.device("meta"))
        if counter is not None:
            stack.enter_context(counter)
        for inner in (*modes, *filter(None, [seen.rules])):
            stack.enter_context(inner)
        module.train(mode == "train")
        try:
            if drive is None:
                module(*inputs)
            else:
                drive(module, inputs)
        except Exception as error:
            seen.failure = _explained(Failure(running[-1][0] if running else "", error), explainer)
    return seen


def _explained(failure: Failure, explainer: rules.Explainer) -> Failure:
    """A failure in the terms of the rules for `torch.nn`, where these know better why the module does not run."""
    if failure.needs_numbers:
        return failure
    return Failure(failure.path, explainer.explained(failure.path, failure.error))


def _path_of_call(paths: Sequence[str], caller: str) -> str:
    """Which of a module's paths a call from `caller` means: the nearest one below it, else the first."""
    below = [path for path in paths if not caller or path.startswith(f"{caller}.")]
    return min(below or paths[:1], key=lambda path: path.count("."))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Let attention call its submodules: the fused path skips them and their hooks."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def shape_of(output: Any) -> Any:
    """The shape of what a module gave: a list of ints, or a list or dict of those; None for what is no tensor."""
    if isinstance(output, torch.Tensor):
        return list(output.shape)
    if isinstance(output, Mapping):
        return {str(key): shape_of(value) for key, value in output.items()}
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return {name: shape_of(getattr(output, name)) for name in output._fields}
    if isinstance(output, list | tuple):
        shapes = [shape_of(value) for value in output]
        return shapes[0] if len(shapes) == 1 and isinstance(shapes[0], list) else shapes
    return None


def twin_or_itself(module: nn.Module) -> nn.Module:
    """A copy for a forward pass on meta; the module itself where something in it cannot be copied (a lock, a file)."""
    try:
        return meta_twin(module, plain_tensors=True)
    except Exception:
        return module


def trace(module: nn.Module, inputs: Inputs | None, *, mode: str = "eval") -> tuple[Trace, nn.Module]:
    """Trace a forward pass on a meta twin; gives the twin as well, whose lazy parameters have their shapes now.

    torchinfo drives the pass and sums up the sizes of inputs and outputs; MACs are halved FLOPs of
    `FlopCounterMode`; rows come from hooks of our own, so that a pass that fails still gives its rows.
    """
    if inputs is None:
        return Trace(None, reason="no input size is known: give --input-size, batch included"), module
    import torchinfo  # here alone: FlopCounterMode brings Triton with it, which the edit of a bare file has no use for
    from torch.utils.flop_counter import FlopCounterMode

    twin = twin_or_itself(module)
    tensors = inputs.tensors("meta")
    statistics: list[Any] = []

    def drive(model: nn.Module, given: Sequence[Any]) -> None:
        statistics.append(
            torchinfo.summary(model, input_data=list(given), device="meta", mode=mode, verbose=0, depth=1_000)
        )

    counter = FlopCounterMode(display=False)
    seen = run(twin, tensors, mode=mode, drive=drive, counter=counter)
    if seen.failure is not None and _raised_by_torchinfo(seen.failure.error):
        twin = twin_or_itself(module)
        counter = FlopCounterMode(display=False)
        seen = run(twin, tensors, mode=mode, counter=counter)
    layers = {
        path: LayerTrace(seen.output_shapes[path], seen.macs[path])
        for path, _ in walk(twin)
        if path in seen.output_shapes
    }
    input_bytes = sum(_bytes_of(tensor) for tensor in _flat(tensors))
    if seen.failure is not None:
        return Trace(inputs.shapes, layers, input_bytes=input_bytes, reason=seen.failure.reason), twin
    summary = statistics[0] if statistics else None
    return Trace(
        inputs=inputs.shapes,
        layers=layers,
        macs=counter.get_total_flops() // 2,
        input_bytes=input_bytes,
        forward_backward_bytes=None if summary is None else int(summary.total_output_bytes),
    ), twin


def _raised_by_torchinfo(error: Exception) -> bool:
    """Whether torchinfo itself fell over an output it does not expect, and not the model."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return place is not None and "torchinfo" in place.tb_frame.f_code.co_filename


def _flat(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        else:
            yield from _flat(value)


def _bytes_of(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


Calls = dict[str, tuple[tuple[Any, ...], Mapping[str, Any]]]


def flowing_into(
    module: nn.Module, paths: Sequence[str], inputs: Inputs | None
) -> tuple[dict[str, torch.Tensor], Failure | None]:
    """The first tensor that flows into each module on a forward pass on meta, without those it did not reach; and how
    the pass failed, where it did."""
    calls, failure = _first_calls(module, paths, inputs)
    return {
        path: next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        for path, (args, kwargs) in calls.items()
    }, failure


def first_calls(module: nn.Module, paths: Sequence[str], inputs: Inputs | None) -> Calls:
    """The arguments of the first call of each module that a tensor flows into, on a forward pass on meta."""
    return _first_calls(module, paths, inputs)[0]


def _first_calls(module: nn.Module, paths: Sequence[str], inputs: Inputs | None) -> tuple[Calls, Failure | None]:
    if inputs is None:
        return {}, None
    found: Calls = {}
    twin = twin_or_itself(module)
    places: dict[int, list[str]] = {}
    for path, child in walk(twin):
        if path in paths:
            places.setdefault(id(child), []).append(path)

    def visit(child: nn.Module, _path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if any(isinstance(value, torch.Tensor) for value in (*args, *kwargs.values())):
            for path in places.get(id(child), ()):
                found.setdefault(path, (args, kwargs))

    return found, run(twin, inputs.tensors("meta"), visit=visit, judged=False).failure
