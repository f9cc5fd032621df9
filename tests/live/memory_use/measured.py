"""The peak of a step that is really made on the CPU, from the events of torch's profiler."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from modelcli.live.inputs import Arguments
from modelcli.live.memory_use.step import OPTIMIZERS, StepPlan, loss_of, make_step
from modelcli.live.meta_models import fake_copy
from modelcli.model.memory_log import PlainAllocator, replay
from tests.gpu.measure_memory import Case

Inputs = Mapping[str, torch.Tensor] | torch.Tensor


CASES = (
    Case("inference", None),
    Case("sgd", "sgd"),
    Case("sgd-momentum", "sgd-momentum"),
    Case("adam", "adam"),
    Case("adamw", "adamw"),
    Case("adamw, autocast", "adamw", autocast=True),
    Case("inference, autocast", None, autocast=True),
    Case("adamw, head only", "adamw", head_only=True),
)


#: The kernels of the CPU that allocate copies while they run: oneDNN those of tensors in other memory formats, and the
#: mean of bfloat16 one in float32. Those of a GPU have ways of their own.
_COPYING = ("aten::mkldnn_convolution", "aten::mkldnn_convolution_backward", "aten::convolution_backward", "aten::mean")


@dataclass(frozen=True)
class Measured:
    """A measured peak in bytes, and the peak outside the kernels that make copies while they run."""

    peak: int
    outside: int


def freeze_all_but_head(model: nn.Module) -> None:
    """Freeze everything but the last module with parameters of its own."""
    model.requires_grad_(False)
    last = [child for child in model.modules() if any(True for _ in child.parameters(recurse=False))][-1]
    last.requires_grad_(True)


def measured_peak(make: Callable[[], nn.Module], inputs: Inputs, case: Case) -> Measured:
    """Return the largest number of bytes that torch's CPU allocator has handed out during the second step."""
    torch.manual_seed(0)
    model = make()
    if case.head_only:
        freeze_all_but_head(model)
    model.train(case.optimizer is not None)
    optimizer = None
    if case.optimizer is not None:
        kind, arguments = OPTIMIZERS[case.optimizer]
        optimizer = kind([p for p in model.parameters() if p.requires_grad], **arguments)

    def forward() -> Any:
        return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)

    def step() -> None:
        autocast = torch.autocast("cpu", torch.bfloat16) if case.autocast else contextlib.nullcontext()
        if optimizer is None:
            with torch.no_grad(), autocast:
                output = forward()
            del output
            return
        with autocast:
            output = forward()
            loss, _, _targets = loss_of(output)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    held: dict[int, int] = {}
    tensors = [*model.parameters(), *model.buffers()]
    tensors += list(inputs.values()) if isinstance(inputs, Mapping) else [inputs]
    if optimizer is not None:
        tensors += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    for tensor in tensors:
        storage = tensor.untyped_storage()
        held[storage._cdata] = storage.nbytes()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None
    every = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    inside = [(event.start_ns(), event.end_ns()) for event in every if event.name() in _COPYING]
    now = outside = most = sum(held.values())
    for event in every:
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
            if not any(start < event.start_ns() < end for start, end in inside):
                outside = max(outside, now)
    return Measured(most, outside)


def estimated_peak(make: Callable[[], nn.Module], inputs: Inputs, case: Case) -> int:
    """Return what modelcli estimates for the same step on the CPU."""
    model = make()
    if case.head_only:
        freeze_all_but_head(model)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    subject = fake_copy(model, mode)
    with mode:
        if isinstance(inputs, Mapping):
            given = Arguments((), {name: torch.zeros_like(tensor) for name, tensor in inputs.items()})
        else:
            given = Arguments((torch.zeros_like(inputs),))
    plan = StepPlan(case.optimizer, torch.bfloat16 if case.autocast else None, is_cuda=False)
    step = make_step(subject, given, plan, device="fake", outer=(mode,))
    if step.failure is not None:
        raise step.failure.error
    return replay(step.log.steady(), PlainAllocator()).peak.allocated
