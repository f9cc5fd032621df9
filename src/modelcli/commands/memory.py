"""Estimate the memory of a step of training or inference: the command `memory`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from modelcli.commands.look import stdout_is_for_data
from modelcli.commands.target import Target
from modelcli.errors import RequestError
from modelcli.model.blueprint import Blueprint
from modelcli.model.memory_estimate import MemoryEstimate

#: What `--train` takes: the optimizers, and `none` for inference.
TRAIN = ("adamw", "adam", "sgd", "sgd-momentum", "none")
#: What `--amp` takes.
AMP = ("bfloat16", "float16")
#: What `--dtype` takes: the dtypes that layers compute in.
DTYPES = ("float16", "bfloat16", "float32", "float64")
DEVICES = ("cuda", "cpu")


@dataclass(frozen=True)
class MemoryRequest:
    """A model, and the step whose memory to estimate.

    Attributes:
        target: the model.
        train: the optimizer, one of TRAIN; None and `none` for inference.
        batch: the batch size; None for that of the inputs.
        amp: the dtype of autocast; None without it.
        dtype: the dtype to cast the model to; None if it stays as it is.
        checkpointing: whether activations inside blocks are computed again in the backward pass.
        context: the number of tokens of a language model.
        fits: the bytes into which the largest batch should fit; None if nobody asks.
        device: `cuda` or `cpu`.
    """

    target: Target
    train: str | None = None
    batch: int | None = None
    amp: str | None = None
    dtype: str | None = None
    checkpointing: bool = False
    context: int | None = None
    fits: int | None = None
    device: str = "cuda"


@dataclass(frozen=True)
class MemoryResult:
    """The memory of a step.

    Attributes:
        model: the reference of the model.
        blueprint: the model.
        request: what was asked.
        estimate: the memory.
        param_bytes: the bytes of the parameters of each module itself, by path.
        largest_batch: the largest batch that fits; 0 if none does, None if nobody asked.
        checkpointed: the blocks with activation checkpointing.
        notes: what the user should know.
    """

    model: str
    blueprint: Blueprint
    request: MemoryRequest
    estimate: MemoryEstimate
    param_bytes: Mapping[str, int]
    largest_batch: int | None = None
    checkpointed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@stdout_is_for_data
def memory(request: MemoryRequest) -> MemoryResult:
    """Estimate the memory of a step of a model with its recipe's edits.

    Raises RequestError if the architecture or the input is not known, or if the model cannot make the step.
    """
    target = request.target
    _require_sense(request)
    with target.notes_in_errors():
        return _estimated(request)


def _require_sense(request: MemoryRequest) -> None:
    if request.train not in (None, *TRAIN):
        raise RequestError(
            f"unknown optimizer {request.train!r}", f"pass --train {', '.join(TRAIN[:-1])} or {TRAIN[-1]}"
        )
    if request.amp not in (None, *AMP):
        raise RequestError(f"autocast casts to {' or '.join(AMP)}, not {request.amp!r}", f"pass --amp {AMP[0]}")
    if request.dtype not in (None, *DTYPES):
        raise RequestError(f"layers compute in {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, not in {request.dtype}")
    if request.device not in DEVICES:
        raise RequestError(f"unknown device {request.device!r}", "pass --device cuda or --device cpu")
    if request.checkpointing and request.train in (None, "none"):
        raise RequestError(
            "--checkpointing is about what the backward pass needs, and inference has none",
            "add --train adamw, or remove --checkpointing",
        )


def _estimated(request: MemoryRequest) -> MemoryResult:
    from modelcli.commands.applied_edits import apply_each
    from modelcli.commands.editable import opened_keys

    target = request.target
    if opened_keys(target.source) is not None:
        raise RequestError(
            "the memory of a step needs a model that can run, and the file records no architecture",
            "pass --arch REFERENCE",
        )
    from modelcli.live import downloads, opening
    from modelcli.live.memory_use.estimate import Estimator, StepOptions

    with downloads.forbidden():
        live = opening.open_live(target.source)
        apply_each(live, target.edits, target.locations)  # its notes were shown when the edits were made
        optimizer = None if request.train == "none" else request.train
        estimator = Estimator(
            live,
            StepOptions(
                optimizer,
                request.amp,
                request.dtype,
                request.checkpointing,
                request.context,
                is_cuda=request.device == "cuda",
            ),
        )
        notes = [*target.notes, *live.notes]
        largest = None
        if request.fits is None:
            estimate = estimator.estimate(request.batch)
        else:
            search = estimator.largest_batch(request.fits)
            largest, estimate = search.batch, search.estimate
            if not largest:
                notes.append(_why_nothing_fits(estimate, request.fits))
            if request.batch is not None:
                estimate = estimator.estimate(request.batch)
    return MemoryResult(
        target.source.model,
        live.describe_loaded(),
        request,
        estimate,
        estimator.param_bytes(),
        largest,
        estimator.checkpointed,
        (*notes, *estimate.notes),
    )


def _why_nothing_fits(estimate: MemoryEstimate, nbytes: int) -> str:
    room = f"{nbytes / 1e6:,.2f} MB"
    if estimate.fixed > nbytes:
        return (
            f"no batch fits into {room}: what no batch changes (parameters, buffers, gradients, optimizer state, CUDA "
            f"context) takes {estimate.fixed / 1e6:,.2f} MB"
        )
    return f"no batch fits into {room}: a batch of {estimate.batch} takes {estimate.total / 1e6:,.2f} MB"
