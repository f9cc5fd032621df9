"""The command memory, which estimates the memory of a step of training or inference."""

from typing import Annotated

import typer

from modelcli.cli import completing, inspect, output
from modelcli.cli.mounting import Command
from modelcli.cli.options import LookOptions, OutputOptions, SourceOptions, exit_codes


def memory(
    source: SourceOptions,
    look: LookOptions,
    options: OutputOptions,
    model: inspect.Model = None,
    train: Annotated[
        str | None,
        typer.Option(
            "--train",
            help="The optimizer of a training step: adamw, adam, sgd or sgd-momentum; none for inference. "
            "\\[default: none]",
            autocompletion=completing.one_of("adamw", "adam", "sgd", "sgd-momentum", "none"),
            metavar="OPTIMIZER",
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option("--batch", help="The batch size. \\[default: that of the input]", min=1, metavar="N"),
    ] = None,
    amp: Annotated[
        str | None,
        typer.Option(
            "--amp",
            help="The dtype of autocast: bfloat16 or float16.",
            autocompletion=completing.one_of("bfloat16", "float16"),
            metavar="DTYPE",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            help="The dtype that the whole model is cast to.",
            autocompletion=completing.dtypes,
            metavar="DTYPE",
        ),
    ] = None,
    checkpointing: Annotated[
        bool,
        typer.Option("--checkpointing", help="Compute the activations inside blocks again in the backward pass."),
    ] = False,
    context: Annotated[
        int | None,
        typer.Option("--context", help="The number of tokens that a language model gets.", min=1, metavar="N"),
    ] = None,
    fits: Annotated[
        str | None,
        typer.Option("--fits", help="Find the largest batch that fits into SIZE: 24GB.", metavar="SIZE"),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            "--device",
            help="cuda or cpu.",
            autocompletion=completing.one_of("cuda", "cpu"),
            metavar="DEVICE",
        ),
    ] = "cuda",
    top: Annotated[
        int | None,
        typer.Option("--top", help="Show the N modules that keep most activations.", min=1, metavar="N"),
    ] = None,
) -> None:
    """Estimate the memory that a step of inference or training takes on a GPU: what it consists of, and the peak.

    modelcli memory resnet18 --train adamw --batch 32 --amp bfloat16

    modelcli memory resnet18 --train sgd --top 5

    modelcli memory alexnet --train adamw --fits 24GB
    """
    from modelcli.commands.memory import MemoryRequest
    from modelcli.commands.memory import memory as estimate
    from modelcli.commands.target import find_target
    from modelcli.language.references import parse_bytes
    from modelcli.model.dtypes import dtype_called
    from modelcli.render.documents import memory as documents

    output.format_of(options)
    request = MemoryRequest(
        find_target(inspect.named(model, look), source.overrides(), source.recipe),
        train=train,
        batch=batch,
        amp=None if amp is None else dtype_called(amp),
        dtype=None if dtype is None else dtype_called(dtype),
        checkpointing=checkpointing,
        context=context,
        fits=None if fits is None else parse_bytes(fits),
        device=device,
    )
    found = estimate(request)
    output.show(documents.memory(found, top=top), options, found.notes)


def commands() -> list[Command]:
    return [Command("memory", memory, "Inspect", exit_codes(0, 2, 3, 4, 5))]
