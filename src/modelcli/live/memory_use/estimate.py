"""Estimate the memory of a step of training or inference, and find the largest batch that fits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from modelcli.errors import ModelcliError, RequestError
from modelcli.live import trace
from modelcli.live.describe import walk
from modelcli.live.fake_kernels import without_log
from modelcli.live.inputs import Inputs, how_to_state_input
from modelcli.live.memory_use import checkpointing, sizes, workspaces
from modelcli.live.memory_use.step import FrozenModelError, Step, StepPlan, make_step
from modelcli.live.meta_models import fake_copy
from modelcli.live.opening import Live
from modelcli.live.sources import flag_of, is_composite, named_tensors
from modelcli.model.cuda_allocator import CachingAllocator
from modelcli.model.memory_estimate import Margin, MemoryEstimate
from modelcli.model.memory_log import PlainAllocator, replay
from modelcli.wording import listed

#: What is assumed for the CUDA context and the loaded kernels. No API says it before the GPU is used; `nvidia-smi`
#: shows 300 to 600 MB, by GPU, driver and libraries.
CONTEXT_BYTES = 512 << 20

#: The largest batch that `largest_batch` tries.
_MOST = 1 << 20


@dataclass(frozen=True)
class StepOptions:
    """What step to estimate.

    Attributes:
        optimizer: `adamw`, `adam`, `sgd` or `sgd-momentum`; None for inference.
        autocast: the dtype of autocast; None without it.
        dtype: the dtype that the model is cast to; None if it stays as it is.
        checkpointing: whether activations inside blocks are computed again.
        context: the number of tokens of a language model; None for the model's own inputs.
        is_cuda: whether the step runs on a CUDA device, else on the CPU.
    """

    optimizer: str | None = None
    autocast: str | None = None
    dtype: str | None = None
    checkpointing: bool = False
    context: int | None = None
    is_cuda: bool = True


@dataclass
class Estimator:
    """Estimates steps of one model with different batch sizes.

    Attributes:
        live: the model.
        options: what step.
        inputs: the inputs, with the model's own batch size or the one that the user stated.
        checkpointed: the blocks with activation checkpointing.
    """

    live: Live
    options: StepOptions
    inputs: Inputs = field(init=False)
    checkpointed: tuple[str, ...] = field(default=(), init=False)
    _module: nn.Module = field(init=False)
    _device: str = field(default="meta", init=False)
    _fake: Any = field(default=None, init=False)
    _notes: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        """Prepare the model. Raises RequestError if its input is not known or it cannot run without values."""
        module = self.live.described_copy() or self.live.module
        if self.live.inputs is None:
            raise RequestError(f"the input size is not known: {how_to_state_input(module)}")
        self.inputs = self.live.inputs
        if self.options.dtype is not None:
            self.inputs = self.inputs.with_floating(self.options.dtype)
        if self.options.context is not None:
            self.inputs = sizes.with_context(self.inputs, self.options.context)
        module = trace.meta_copy_if_possible(module)
        if self.options.dtype is not None:
            module = module.to(getattr(torch, self.options.dtype))
        made = trace.trace(module, self.inputs)
        if made.trace.reason is not None:
            raise RequestError(f"no step can be made without values: {made.trace.reason}")
        module = made.module if made.trace.device == "meta" else module
        if made.trace.device == "fake" or (self.options.autocast is not None and not self.options.is_cuda):
            # Autocast of the CPU casts tensors of the CPU, and fake ones claim to be there.
            from torch._subclasses.fake_tensor import FakeTensorMode

            self._device, self._fake = "fake", FakeTensorMode(allow_non_fake_inputs=True)
            module = fake_copy(module, self._fake)
            self._notes += made.trace.notes if made.trace.device == "fake" else ()
        self._module = module
        self._notes += _notes_of_parameters(self.live.module, trains=self.options.optimizer is not None)
        if self.options.is_cuda and any(isinstance(child, nn.RNNBase) for child in module.modules()):
            self._notes.append(
                "on a GPU, cuDNN runs LSTM, GRU and RNN as a whole and keeps a reserve of its own: here they run step "
                "by step, so what they keep is an approximation"
            )
        if self.options.checkpointing:
            self.checkpointed = checkpointing.turn_on(module)
            if not self.checkpointed:
                raise RequestError(
                    "--checkpointing finds no blocks in this model: no container has two modules of one class that "
                    "have children of their own",
                    "remove --checkpointing",
                )

    def estimate(self, batch: int | None = None) -> MemoryEstimate:
        """Estimate the memory of a step.

        Args:
            batch: the batch size; None for that of the inputs.

        Raises RequestError if the step fails.
        """
        inputs = self.inputs if batch is None else sizes.with_batch(self.inputs, batch)
        step = self._make(inputs)
        if step.failure is not None:
            raise self._error(step, inputs)
        log = step.log
        events = log.steady()
        notes = list(self._notes)
        if self.options.is_cuda:
            held = [workspaces.of_cublas()] * len(log.multiplies & {"forward", "backward"})
            usage = replay(events, CachingAllocator(), held=held)
            full = replay(events, CachingAllocator(), held=held, workspaces=True)
            above = max(full.peak.allocated - usage.peak.allocated, 0)
            rest = max(full.reserved - usage.peak.allocated - above, 0)
            margin = Margin(above, rest, CONTEXT_BYTES)
        else:
            held = []
            usage = replay(events, PlainAllocator())
            margin = Margin()
        return MemoryEstimate(
            sizes.batch_of(inputs),
            tuple(map(tuple, inputs.all_shapes)),
            usage.whole,
            usage.peak,
            sum(held),
            margin,
            usage.modules,
            step.loss,
            step.cache_bytes,
            tuple(notes),
        )

    def param_bytes(self) -> dict[str, int]:
        """Return the bytes of the parameters of each module itself, by path; of a shared module under its first path.

        A tied parameter counts for the first module that has it.
        """
        seen: set[int] = set()
        found: dict[str, int] = {}
        for path, child in walk(self._module):
            for parameter in child._parameters.values():
                if parameter is not None and id(parameter) not in seen:
                    seen.add(id(parameter))
                    found[path] = found.get(path, 0) + parameter.numel() * parameter.element_size()
        return found

    def _make(self, inputs: Inputs) -> Step:
        autocast = None if self.options.autocast is None else getattr(torch, self.options.autocast)
        plan = StepPlan(self.options.optimizer, autocast, self.options.is_cuda)
        if self._fake is None:
            return make_step(self._module, inputs.tensors("meta"), plan)
        with self._fake:
            given = inputs.tensors("cpu")
        with without_log():
            return make_step(self._module, given, plan, device="fake", outer=(self._fake,))

    def _error(self, step: Step, inputs: Inputs) -> RequestError:
        assert step.failure is not None
        if isinstance(step.failure.error, FrozenModelError):
            return RequestError(
                "every parameter is frozen, so there is nothing to train",
                "unfreeze some of them, or remove --train for inference",
            )
        if isinstance(step.failure.error, ModelcliError):
            return RequestError(step.failure.error.message, step.failure.error.hint)
        hint = None
        if "more than 1 value per channel" in step.failure.text:
            hint = f"pass --batch {(sizes.batch_of(inputs) or 1) + 1}"
        reason = step.failure.reason.replace("the forward pass", "the step", 1)
        return RequestError(reason, hint)

    def largest_batch(self, nbytes: int) -> Search:
        """Find the largest batch whose peak and margin fit into `nbytes`.

        Two passes tell roughly how the memory grows; the batches next to the border are tried by passes of their own:
        the largest one that fits, and the next one, which does not.

        Raises RequestError if no step can be made, or if a batch of a million would fit.
        """
        tried: dict[int, MemoryEstimate] = {}

        def total(batch: int) -> int:
            if batch not in tried:
                tried[batch] = self.estimate(batch)
            return tried[batch].total

        first = 1
        try:
            total(1)
        except RequestError as error:
            if error.hint is None or "--batch" not in error.hint:
                raise
            first = 2  # BatchNorm cannot be trained on one value
        if total(first) > nbytes:
            return Search(0, tried[first], tuple(tried))
        low, high = first, None
        slope = max(total(first + 1) - total(first), 1)
        if total(first + 1) > nbytes:
            high = first + 1
        else:
            low = first + 1
        while high is None or high - low > 1:
            guess = low + max((nbytes - total(low)) // slope, 1)
            # The peak may be the optimizer's, and grow only from some batch on.
            guess = min(guess, high - 1 if high is not None else 8 * low)
            if guess > _MOST:
                raise RequestError(
                    f"a batch of {low} fits, and modelcli tries none above {_MOST}",
                    f"pass --batch {low} for its memory, or --fits with a smaller size",
                )
            if total(guess) > nbytes:
                high = guess
            else:
                low = guess
            # The growth between the nearest batches on both sides, else between the two largest.
            other = high if high is not None else max(batch for batch in tried if batch < low)
            slope = max((total(other) - total(low)) // (other - low), 1)
        return Search(low, tried[low], tuple(tried))


def _notes_of_parameters(module: nn.Module, *, trains: bool) -> list[str]:
    """Return notes on tensors whose memory, or whether they are trained, is not known."""
    notes = []
    composite = [name for name, tensor in named_tensors(module).items() if is_composite(tensor)]
    if composite:
        notes.append(f"quantized and sparse tensors are not counted: {listed(composite, 4)}")
    unknown = [name for name, parameter in module.named_parameters() if flag_of(parameter) is None]
    if unknown and trains:
        notes.append(
            f"modelcli does not know whether some parameters are trained, and counts them: {listed(unknown, 4)}"
        )
    return notes


@dataclass(frozen=True)
class Search:
    """The result of a search for the largest batch.

    Attributes:
        batch: the largest batch that fits; 0 if none does.
        estimate: its memory; that of the smallest batch if none fits.
        tried: the batches that were tried, in order.
    """

    batch: int
    estimate: MemoryEstimate
    tried: tuple[int, ...]
