"""Make one step of training or of inference on tensors without values, and record its memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from modelcli.live import providers
from modelcli.live.calls import Calls
from modelcli.live.inputs import Arguments, tensors_in
from modelcli.live.memory_use.cuda_dispatch import CudaDispatch
from modelcli.live.memory_use.recorder import Recorder
from modelcli.live.trace import Failure, settings_of_passes
from modelcli.model.memory_log import MemoryLog, Phase

#: The optimizers, by the names of `--train`, with their arguments.
OPTIMIZERS: Mapping[str, tuple[type[torch.optim.Optimizer], Mapping[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {}),
    "adam": (torch.optim.Adam, {}),
    "sgd": (torch.optim.SGD, {}),
    "sgd-momentum": (torch.optim.SGD, {"momentum": 0.9}),
}


@dataclass(frozen=True)
class StepPlan:
    """What kind of step to make.

    Attributes:
        optimizer: a name of `OPTIMIZERS`; None for inference.
        autocast: the dtype of autocast; None without it.
        is_cuda: whether operators run as on a CUDA device, else as on the CPU.
    """

    optimizer: str | None
    autocast: torch.dtype | None = None
    is_cuda: bool = True


@dataclass(frozen=True)
class Step:
    """A step that was made.

    Attributes:
        log: its memory.
        loss: what the loss was; None for inference.
        cache_bytes: the bytes of the keys and values that a language model returned for the next token.
        failure: where and why it failed; None if it did not.
    """

    log: MemoryLog
    loss: str | None = None
    cache_bytes: int | None = None
    failure: Failure | None = None


def make_step(
    module: nn.Module,
    inputs: Arguments,
    plan: StepPlan,
    *,
    device: str = "meta",
    outer: tuple[AbstractContextManager[Any], ...] = (),
) -> Step:
    """Make one step and record what it allocates.

    Training is what a usual loop does: the gradients are None at first; forward, loss, backward, update of the
    optimizer. The output and the loss stay until its end.

    Args:
        module: the model, on tensors without values.
        inputs: the arguments of `forward`.
        plan: what kind of step.
        device: `meta` or `fake`.
        outer: the `FakeTensorMode` for fake tensors.
    """
    recorder = Recorder()
    recorder.calls = calls = Calls(module, recorder)
    made = _Step(module, inputs, plan, recorder, device, outer)
    _register(module, inputs, recorder)
    try:
        made.run()
    except Exception as error:
        return Step(recorder.log, failure=Failure(calls.failed_in or "", error, device))
    finally:
        recorder.stop()
    return Step(recorder.log, made.loss, made.cache_bytes)


def _register(module: nn.Module, inputs: Arguments, recorder: Recorder) -> None:
    """Record what exists before the step, in the order in which `module.to(device)` allocates it."""

    def register(child: nn.Module, seen: set[int]) -> None:
        if id(child) in seen:
            return
        seen.add(id(child))
        for inner in child._modules.values():
            if inner is not None:
                register(inner, seen)
        for parameter in child._parameters.values():
            if parameter is not None:
                recorder.add(parameter, "params")
        for buffer in child._buffers.values():
            if buffer is not None:
                recorder.add(buffer, "buffers")

    register(module, set())
    for tensor in inputs:
        recorder.add(tensor, "activations")


class _Step:
    """A step while it is made."""

    def __init__(
        self,
        module: nn.Module,
        inputs: Arguments,
        plan: StepPlan,
        recorder: Recorder,
        device: str,
        outer: tuple[AbstractContextManager[Any], ...],
    ) -> None:
        self.module, self.inputs, self.plan, self.recorder = module, inputs, plan, recorder
        self.device, self.outer = device, outer
        self.dispatch = CudaDispatch(plan.autocast, self._is_recomputing)
        recorder.between = self.dispatch.forget_casts
        self.loss: str | None = None
        self.cache_bytes: int | None = None

    def run(self) -> None:
        """Make the step. Any exception of the model's is raised."""
        if self.plan.optimizer is None:
            self._infer()
        else:
            self._train(self.plan.optimizer)

    @contextlib.contextmanager
    def _passing(self) -> Iterator[None]:
        """Set up what forward and backward passes need."""
        assert self.recorder.calls is not None
        with contextlib.ExitStack() as stack:
            stack.enter_context(settings_of_passes())
            if self.plan.is_cuda:
                stack.enter_context(self.dispatch.entered())
            if self.device == "meta":
                stack.enter_context(torch.device("meta"))
            for mode in self.outer:
                stack.enter_context(mode)
            for half in providers.in_use():
                stack.enter_context(half.during_pass(self.module, self.device))
            self.module.train(self.plan.optimizer is not None)
            stack.enter_context(self.recorder.calls.watched())
            stack.enter_context(self.recorder)
            yield

    @contextlib.contextmanager
    def _autocast(self) -> Iterator[None]:
        if self.plan.is_cuda:
            with self.dispatch.casting():
                yield
        else:
            with torch.autocast("cpu", self.plan.autocast, enabled=self.plan.autocast is not None):
                yield

    def _is_recomputing(self) -> bool:
        """Whether a module with activation checkpointing runs again."""
        calls = self.recorder.calls
        return self.recorder.log.phase == "backward" and calls is not None and calls.innermost is not None

    def _forward(self) -> Any:
        output = self.module(*self.inputs.args, **self.inputs.kwargs)
        self.cache_bytes = _cache_bytes(output)
        return output

    def _infer(self) -> None:
        self.recorder.log.phase = "forward"
        with self._passing():
            with torch.no_grad(), self._autocast():
                output = self._forward()
            self.recorder.stop()  # while the output is still there
        del output

    def _train(self, optimizer_name: str) -> None:
        kind, arguments = OPTIMIZERS[optimizer_name]
        log = self.recorder.log
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        if not trained:
            raise FrozenModelError
        for parameter in trained:
            parameter.grad = None
        with contextlib.ExitStack() as stack:
            for parameter in trained:
                stack.callback(parameter.register_post_accumulate_grad_hook(self._note_gradient).remove)
            with self._passing():
                log.phase = "forward"
                with torch.enable_grad(), self._autocast():
                    output = self._forward()
                    loss, self.loss, targets = loss_of(output)
                log.phase = "backward"
                loss.backward()
        with_gradient = [parameter for parameter in trained if parameter.grad is not None]
        several: dict[str, Any] = {"foreach": True} if self.plan.is_cuda else {}  # what optimizers choose on CUDA
        optimizer = kind(trained, **arguments, **several)
        with self.recorder:
            phases: tuple[Phase, ...] = ("first_update", "update")
            for phase in phases:
                log.phase = phase
                optimizer.step()
                for tensor in tensors_in([optimizer.state[parameter] for parameter in with_gradient]):
                    self.recorder.become(tensor, "optimizer")
            self.recorder.stop()  # while the output, the loss and the gradients are still there
        del output, loss, targets

    def _note_gradient(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            self.recorder.become(parameter.grad, "gradients")


class FrozenModelError(Exception):
    """No parameter is trainable, so there is nothing to train."""


def _cache_bytes(output: Any) -> int | None:
    """Return the bytes of the keys and values in the output of a language model; None for another model."""
    cache = getattr(output, "past_key_values", None)
    if cache is None:
        return None
    layers = getattr(cache, "layers", cache)
    tensors = list(tensors_in([vars(layer) if hasattr(layer, "__dict__") else layer for layer in layers]))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) or None


def loss_of(output: Any) -> tuple[torch.Tensor, str, list[torch.Tensor]]:
    """Return a loss of a model's output, its description, and the targets, which a training loop keeps.

    What looks like logits gets the cross entropy, in float32: outputs called `logits`, those of two dimensions, and
    the maps of segmentation models, which have classes in dimension 1. Other outputs are summed up.
    """
    losses: list[torch.Tensor] = []
    targets: list[torch.Tensor] = []
    for name, tensor in _outputs(output):
        if name in ("logits", "prediction_logits") or tensor.dim() == 2:
            flat = tensor.float().flatten(0, -2)
        elif name in ("out", "aux") and tensor.dim() == 4:
            flat = tensor
        else:
            losses.append(tensor.sum())
            continue
        targets.append(torch.zeros((flat.shape[0], *flat.shape[2:]), dtype=torch.int64, device=flat.device))
        losses.append(functional.cross_entropy(flat, targets[-1]))
    if not losses:
        raise TypeError("the output has no floating-point tensor with a gradient, so there is no loss")
    loss = losses[0]
    for other in losses[1:]:
        loss = loss + other
    if len(targets) == len(losses):
        return loss, "cross entropy", targets
    what = "cross entropy, and the sum of the other outputs" if targets else "sum of the outputs"
    return loss, what, targets


def _outputs(output: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the names and tensors of an output that have gradients, without what is kept for the next token."""
    if isinstance(output, torch.Tensor):
        named: list[tuple[str, Any]] = [("", output)]
    elif isinstance(output, Mapping):
        named = [(str(name), value) for name, value in output.items()]
        if any(name == "logits" for name, _ in named):
            named = [pair for pair in named if pair[0] == "logits"]
    elif isinstance(output, tuple) and hasattr(output, "_fields"):
        named = list(zip(output._fields, output, strict=True))
    elif isinstance(output, list | tuple):
        named = [("", value) for value in output]
    else:
        named = []
    for name, value in named:
        if isinstance(value, torch.Tensor):
            if value.dtype.is_floating_point and value.requires_grad:
                yield name, value
        elif isinstance(value, Mapping | list | tuple) and name != "past_key_values":
            yield from _outputs(value)
