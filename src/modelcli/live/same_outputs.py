"""Compare the outputs of two models on the same input, one model after the other.

`expected` runs the first model and keeps what it gives; `compare` runs the second one and compares. Both run on the
same values, in eval mode, without gradients, with torch's generator in the same state. Only the outputs of the first
model stay in memory.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from modelcli.errors import RequestError
from modelcli.live import drawn_ids, trace
from modelcli.live.describe import dtype_name
from modelcli.live.flat_outputs import FlatOutput, flatten
from modelcli.live.inputs import Arguments, Inputs
from modelcli.live.sources import named_tensors
from modelcli.live.surgery.snapshot import restored_on_error
from modelcli.model.paths import shown
from modelcli.wording import counted, listed

#: The largest difference that counts as none, in proportion to the largest absolute value of the expected tensor. Those
#: of the narrow dtypes and of float64 are the relative tolerances of `torch.testing.assert_close`. For float32, the
#: BatchNorm of a deep network makes a difference of up to 1e-6 where it is folded into the convolutions.
TOLERANCES: Mapping[torch.dtype, float] = {
    torch.float64: 1e-7,
    torch.complex128: 1e-7,
    torch.float32: 1e-5,
    torch.complex64: 1e-5,
    torch.float16: 1e-3,
    torch.bfloat16: 1.6e-2,
}

#: How many bytes of the outputs of single modules are kept, to find the first one that differs.
_MOST_BYTES = 2**28


@dataclass(frozen=True)
class How:
    """How outputs are compared, and what messages call the two models.

    Attributes:
        rtol, atol: an element agrees if it differs by at most `atol + rtol * abs(element of the first model)`; without
            both, the rule is that of `TOLERANCES`.
        any_floating: whether outputs of different floating-point dtypes are compared by their values.
        before, after: the first and the second model, as an adverb: `in alexnet`.
    """

    rtol: float | None = None
    atol: float | None = None
    any_floating: bool = False
    before: str = "before"
    after: str = "after"

    @property
    def is_elementwise(self) -> bool:
        return self.rtol is not None or self.atol is not None

    def changed(self, old: str, new: str) -> str:
        """Return the words that say what was there and what is there instead."""
        return f"was {old} and is {new}" if self == How() else f"is {new} {self.after} and {old} {self.before}"


@dataclass(frozen=True)
class ComparedTensor:
    """A tensor of the output, compared.

    Attributes:
        name: the path to it in the output; empty if the output is a tensor.
        shape: its shape.
        dtype: its dtype.
        max_abs_diff: the largest absolute difference; 0.0 where all elements are equal.
        tolerance: the largest difference that counts as none.
        is_bit_for_bit: whether all bytes are equal; -0.0 and 0.0 differ in this alone.
        differing: how many elements differ by more than is allowed for each; None where `tolerance` decides.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    max_abs_diff: float
    tolerance: float
    is_bit_for_bit: bool
    differing: int | None = None

    @property
    def agrees(self) -> bool:
        if self.differing is not None:
            return self.differing == 0
        return self.max_abs_diff <= self.tolerance  # False for NaN


@dataclass(frozen=True)
class SameOutputs:
    """The result of a comparison.

    Attributes:
        tensors: the tensors of the output that could be compared.
        problem: how the outputs differ; None if they agree.
        ran: whether the second model ran.
        shows_nothing: whether the outputs contain no value that depends on what the models compute.
        first: the path and class of the first module whose output differs, if the outputs differ and it is known.
        seen_of_modules: whether the outputs of all modules could be compared to find it; else memory was too small.
        output_shape: the shape of the second model's output.
        inputs: the shapes of the inputs that both models got.
        notes: what the comparison did not see.
    """

    tensors: tuple[ComparedTensor, ...] = ()
    problem: str | None = None
    ran: bool = True
    shows_nothing: bool = False
    first: tuple[str, str] | None = None
    seen_of_modules: bool = True
    output_shape: Any = None
    inputs: tuple[tuple[int, ...], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def max_abs_diff(self) -> float:
        """The largest absolute difference of all tensors."""
        return max((tensor.max_abs_diff for tensor in self.tensors), default=0.0)

    @property
    def is_bit_for_bit(self) -> bool:
        """Whether all bytes of all tensors are equal."""
        return self.problem is None and all(tensor.is_bit_for_bit for tensor in self.tensors)

    @property
    def refusal(self) -> str:
        """The message that says how the outputs differ, and from which module on."""
        where = "" if self.first is None else f"; {' '.join(self.first)} is the first module with another output"
        return f"the edited model does not give the outputs of the unedited one: {self.problem}{where}"

    @property
    def difference(self) -> str:
        """`equal bit for bit`, or the largest difference, beside the one that is allowed for that tensor."""
        if self.is_bit_for_bit:
            return "equal bit for bit"
        worst = max(self.tensors, key=lambda tensor: tensor.max_abs_diff)
        if worst.differing is not None:
            return f"largest difference {worst.max_abs_diff:.2g}, within the tolerance of each element"
        return f"largest difference {worst.max_abs_diff:.2g} ({worst.tolerance:.2g} is allowed)"


@dataclass
class Expected:
    """What the first model gave.

    Attributes:
        output: its output; None if the pass failed.
        failure: why the pass failed; None if it ran.
        make: makes the arguments anew, with the same values.
        device: where the model ran, and the second one runs.
        inputs: the shapes of the arguments.
        modules: the output of each call of a module, by path and number of the call there, as far as they are kept.
        notes: what there is to say of the input.
        is_cut: whether the outputs of later modules were not kept.
    """

    output: FlatOutput | None
    failure: str | None
    make: Callable[[], Arguments]
    device: str
    inputs: tuple[tuple[int, ...], ...]
    modules: dict[tuple[str, int], FlatOutput] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    is_cut: bool = False


def expected(module: nn.Module, inputs: Inputs, *, device: str = "cpu") -> Expected:
    """Run a model with values and keep its outputs.

    Args:
        module: the model, with values on `device`. It is in eval mode afterwards.
        inputs: its input. Floating-point tensors are drawn from the normal distribution; integers that index the rows
            of a table are drawn from its rows, and other integers are zeros.
        device: where it runs.
    """
    make, notes = drawn_ids.maker(module, inputs, device)
    kept: dict[tuple[str, int], FlatOutput] = {}
    calls, room = dict[str, int](), _MOST_BYTES

    def leave(_child: nn.Module, path: str, output: Any) -> None:
        nonlocal room
        number = calls[path] = calls.get(path, 0) + 1
        if room > 0 and path:
            found = flatten(output, copied=True)
            room -= found.nbytes
            kept[path, number] = found

    seen = trace.run(module, make(), device=device, leave=leave, judged=False)
    if seen.failure is not None:
        return Expected(None, seen.failure.reason, make, device, inputs.all_shapes)
    whole = flatten(seen.output, copied=True)
    return Expected(whole, None, make, device, inputs.all_shapes, kept, notes, is_cut=room <= 0)


def with_floating(reference: Expected, dtype: torch.dtype) -> Expected:
    """Return what the first model gave, for a second one of another dtype: it gets the same values, rounded to that."""

    def cast(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(dtype) if value.is_floating_point() else value
        if isinstance(value, Mapping):
            return {key: cast(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)([cast(item) for item in value])
        return value

    def make() -> Arguments:
        made = reference.make()
        return Arguments(cast(made.args), cast(made.kwargs))

    return replace(reference, make=make)


def compare(reference: Expected, module: nn.Module, how: How = How()) -> SameOutputs:
    """Run the second model on the input of the first and compare the outputs.

    The tolerance for a tensor is `TOLERANCES` of its dtype times its largest absolute value; integers have none. NaN
    agrees with NaN in the same place. Another dtype, shape or structure is a difference, and so is an output without a
    value that tells something: one without elements, or with NaN and zeros alone.

    Args:
        reference: what the first model gave; it must not have failed.
        module: the second model, with values. It is in eval mode afterwards.
        how: other tolerances and names.
    """
    assert reference.output is not None
    seen = trace.run(module, reference.make(), device=reference.device, judged=False)
    if seen.failure is not None:
        return SameOutputs(problem=f"it does not run: {seen.failure.reason}", ran=False)
    found = flatten(seen.output)
    comparison = compared(reference.output, found, how)
    if comparison.shows_nothing:
        comparison = _of_children(reference, module, how) or comparison
    first = None if comparison.problem is None else _first_difference(reference, module, how)
    return replace(
        comparison,
        first=first,
        seen_of_modules=not reference.is_cut,
        output_shape=trace.shape_of(seen.output),
        inputs=reference.inputs,
        notes=(*reference.notes, *comparison.notes),
    )


def _of_children(reference: Expected, module: nn.Module, how: How) -> SameOutputs | None:
    """Compare the outputs of the model's own children, where the model's output shows nothing.

    Returns None if theirs show nothing either. A detection model that finds no object has such an output.
    """
    calls: dict[str, int] = {}
    found: dict[str, SameOutputs] = {}

    def leave(_child: nn.Module, path: str, output: Any) -> None:
        number = calls[path] = calls.get(path, 0) + 1
        before = reference.modules.get((path, number))
        if before is not None and "." not in path:
            one = compared(before, flatten(output), how)
            if not one.shows_nothing:
                found[f"{path} (call {number})" if number > 1 else path] = one

    trace.run(module, reference.make(), device=reference.device, leave=leave, judged=False)
    if not found:
        return None
    tensors = [
        replace(tensor, name=f"{path}.{tensor.name}" if tensor.name else path)
        for path, one in found.items()
        for tensor in one.tensors
    ]
    problem = next((f"in {path}, {one.problem}" for path, one in found.items() if one.problem is not None), None)
    note = f"the output shows nothing, so the check compared the outputs of {listed([*found], 8)}"
    return SameOutputs(tuple(tensors), problem, notes=(note,))


def _first_difference(reference: Expected, module: nn.Module, how: How) -> tuple[str, str] | None:
    """Return the path and class of the module that first gives another output; None if that is not known.

    Modules are compared at the same path, in the order in which their calls end.
    """
    calls: dict[str, int] = {}
    first: list[tuple[str, str]] = []

    def leave(child: nn.Module, path: str, output: Any) -> None:
        number = calls[path] = calls.get(path, 0) + 1
        before = reference.modules.get((path, number))
        if not first and before is not None and _differ(before, flatten(output), how):
            first.append((shown(path), type(child).__name__))

    trace.run(module, reference.make(), device=reference.device, leave=leave, judged=False)
    return first[0] if first else None


def _differ(before: FlatOutput, after: FlatOutput, how: How) -> bool:
    return next(_problems(before, after, [], how), None) is not None


def compared(before: FlatOutput, after: FlatOutput, how: How = How()) -> SameOutputs:
    """Compare two outputs, as `compare` does."""
    tensors: list[ComparedTensor] = []
    problems = list(_problems(before, after, tensors, how))
    notes = []
    if before.unread:
        notes.append(f"the check compares tensors and numbers, and not {listed(before.unread, 3)}")
    both_nan = sum(_nans(value) for value in before.values.values())
    shows_nothing = not problems and not any(_tells(value) for value in before.values.values())
    if shows_nothing:
        what = "has no number but NaN and 0" if before.nbytes else "has no values"
        problems.append(f"the output {what}, {how.before} and {how.after}, so it shows nothing")
    elif not problems and both_nan:
        notes.append(f"NaN in {counted(both_nan, 'place')} of the output counts as equal, because both models have it")
    problem = problems[0] if problems else None
    return SameOutputs(tuple(tensors), problem, shows_nothing=shows_nothing, notes=tuple(notes))


def _tells(value: Any) -> bool:
    """Whether a part of an output depends on what the model computes: an integer, or a number that is not 0 or NaN."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() or value.is_complex():
            return bool(((value != 0) & ~value.isnan()).any())
        return value.numel() > 0
    return isinstance(value, int | float | complex) and value == value


def _nans(value: Any) -> int:
    if not isinstance(value, torch.Tensor) or not (value.is_floating_point() or value.is_complex()):
        return 0
    return int(value.isnan().sum())


def _problems(before: FlatOutput, after: FlatOutput, tensors: list[ComparedTensor], how: How) -> Iterator[str]:
    """Yield the differences, the largest one of values first; the tensors that can be compared join `tensors`."""
    lost = [name for name in before.values if name not in after.values]
    new = [name for name in after.values if name not in before.values]
    if lost or new:
        parts = [
            f"{listed([_shown(name) for name in names], 4)} {verb}"
            for names, verb in ((lost, how.before), (new, how.after))
            if names
        ]
        yield f"the output has another structure: {', '.join(f'{part} alone' for part in parts)}"
    worst: list[tuple[float, str]] = []
    for name, old in before.values.items():
        if name not in after.values:
            continue
        value = after.values[name]
        if not isinstance(old, torch.Tensor) or not isinstance(value, torch.Tensor):
            is_tensor = isinstance(old, torch.Tensor) or isinstance(value, torch.Tensor)
            if is_tensor or not (old == value or (old != old and value != value)):  # NaN equals NaN
                yield f"{_named(name)} {how.changed(_text(old), _text(value))}"
            continue
        floating = how.any_floating and old.is_floating_point() and value.is_floating_point()
        if old.shape != value.shape or (old.dtype != value.dtype and not floating):
            yield f"{_named(name)} {how.changed(_text(old), _text(value))}"
            continue
        found = _compared(name, old, value, how)
        tensors.append(found)
        if not found.agrees:
            worst.append((found.max_abs_diff, _difference(found, old, value, how)))
    yield from (text for _, text in sorted(worst, key=lambda item: -math.inf if math.isnan(item[0]) else -item[0]))


def _difference(found: ComparedTensor, old: torch.Tensor, new: torch.Tensor, how: How) -> str:
    if math.isnan(found.max_abs_diff):
        before, after = _nans(old), _nans(new)
        return (
            f"{_named(found.name)} has NaN in {counted(before, 'place')} {how.before} and in {counted(after, 'place')} "
            f"{how.after}"
        )
    largest = _largest(old)
    told = f"{_named(found.name)} differs by up to {found.max_abs_diff:.3g}"
    if found.differing is not None:
        limits = [f"{name} {value:g}" for name, value in (("rtol", how.rtol), ("atol", how.atol)) if value is not None]
        beyond = f"{found.differing:,} of {counted(old.numel(), 'element')}"
        return f"{told}, by more than {' and '.join(limits)} allow in {beyond} (its largest value is {largest:.3g})"
    if found.tolerance:
        return f"{told}, and {found.tolerance:.2g} is allowed (its largest value is {largest:.3g})"
    return f"{told} (its largest value is {largest:.3g})"


def _compared(name: str, old: torch.Tensor, new: torch.Tensor, how: How) -> ComparedTensor:
    dtype = dtype_name(old.dtype)
    is_bit_for_bit = _same_bytes(old, new)
    if old.dtype != new.dtype:
        tolerance = max(TOLERANCES.get(old.dtype, 0.0), TOLERANCES.get(new.dtype, 0.0))
        old, new = _wide(old), _wide(new)
    else:
        tolerance = TOLERANCES.get(old.dtype, 0.0)
    largest_diff, differing = _max_abs_diff(old, new), None
    if how.is_elementwise:
        close = torch.isclose(_wide(new), _wide(old), rtol=how.rtol or 0.0, atol=how.atol or 0.0, equal_nan=True)
        differing = close.numel() - int(close.sum())
    if tolerance:
        tolerance *= _largest(old)
    return ComparedTensor(name, tuple(old.shape), dtype, largest_diff, tolerance, is_bit_for_bit, differing)


def _same_bytes(old: torch.Tensor, new: torch.Tensor) -> bool:
    if old.dtype != new.dtype:
        return False
    before, after = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (old, new))
    return torch.equal(before, after)


def _largest(tensor: torch.Tensor) -> float:
    """Return the largest absolute value that is finite; 0.0 if there is none."""
    values = _wide(tensor).abs()
    values = values[values.isfinite()]
    return float(values.max()) if values.numel() else 0.0


def _max_abs_diff(old: torch.Tensor, new: torch.Tensor) -> float:
    """Return the largest absolute difference; NaN where one tensor alone has NaN, infinity beside a finite value."""
    if torch.equal(old, new):
        return 0.0
    if not (old.is_floating_point() or old.is_complex()):
        return float((_wide(old) - _wide(new)).abs().max())
    before, after = _wide(old), _wide(new)
    nan = before.isnan()
    if not torch.equal(nan, after.isnan()):
        return math.nan
    apart = (before - after).abs()
    apart[nan | (before == after)] = 0.0  # infinity minus infinity is NaN
    return float(apart.max())


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _named(name: str) -> str:
    return f"output {name}" if name else "the output"


def _shown(name: str) -> str:
    return name or "a lone tensor"


def _text(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{dtype_name(value.dtype)}[{','.join(map(str, value.shape))}]"
    return repr(value)


@contextlib.contextmanager
def demanded(module: nn.Module, inputs: Inputs | None) -> Iterator[Callable[[nn.Module], nn.Module]]:
    """Run a model in use, and give a function that demands its outputs of the edited model, and returns that.

    The block edits the model in place. If it raises, the model is as it was. Its modules keep their train or eval mode.

    Args:
        module: the model, with values on one device.
        inputs: its input; None if it is not known.

    Raises RequestError if the outputs cannot be compared; the function, if they differ.
    """
    if inputs is None:
        raise RequestError(
            "check='same' runs the model, and its input is not known", "pass input_size=(1, 3, 224, 224)"
        )
    device = next((tensor.device for tensor in named_tensors(module).values()), torch.device("cpu"))
    if device.type == "meta":
        raise RequestError("check='same' runs the model, but it is on the meta device", "give it values first")
    with _modes_kept(module):
        reference = expected(module, inputs, device=str(device))
    if reference.failure is not None:
        raise RequestError(f"check='same' has nothing to compare with: {reference.failure}", "is input_size right?")

    def require(edited: nn.Module) -> nn.Module:
        with _modes_kept(edited):
            found = compare(reference, edited)
        if found.problem is not None:
            raise RequestError(found.refusal, "leave check out if the edit is meant to change what the model computes")
        return edited

    with restored_on_error(module):
        yield require


@contextlib.contextmanager
def _modes_kept(module: nn.Module) -> Iterator[None]:
    """Give each module its train or eval mode back after the block."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
