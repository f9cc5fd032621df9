"""The command hash, which prints one hash of a model's contents."""

from typing import Annotated

import typer

from modelcli.cli import completing, inspect, output, progress
from modelcli.cli.mounting import Command
from modelcli.cli.options import LookOptions, OutputOptions, SourceOptions, exit_codes
from modelcli.errors import RequestError


def hash_models(
    source: SourceOptions,
    look: LookOptions,
    options: OutputOptions,
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...",
            help="One or more models. \\[default: the working recipe]",
            show_default=False,
            autocompletion=completing.models,
        ),
    ] = None,
    select: Annotated[
        list[str] | None,
        typer.Option(
            "-s",
            "--select",
            help="Hash only the tensors that this selector picks. Repeat for more.",
            metavar="SELECTOR",
            autocompletion=completing.targets,
        ),
    ] = None,
    tree: Annotated[bool, typer.Option("--tree", help="Show the hash of each module and tensor.")] = False,
    depth: Annotated[
        int | None,
        typer.Option("--depth", help="With --tree: show only this many levels below the model.", min=0, metavar="N"),
    ] = None,
) -> None:
    """Print one hash of the names, dtypes, shapes and values of a model's tensors, the same in every file format.

    modelcli hash best.pth

    modelcli hash best.pth --tree --depth 1

    modelcli hash best.pth frozen.pth -s fc --json
    """
    from modelcli.commands.content_hash import HashRequest, hash_model
    from modelcli.commands.target import find_target
    from modelcli.render.documents import content_hash as documents

    output.format_of(options)
    if depth is not None and not tree:
        raise RequestError("--depth works only with --tree", "add --tree, or remove --depth")
    names = [inspect.named(name, look) for name in models] if models else [inspect.named(None, look)]
    if tree and len(names) > 1:
        raise RequestError(f"--tree shows one model, not {len(names)}", "pass one model, or remove --tree")
    selected = tuple(select or ())
    results = []
    for name in names:
        target = find_target(name, source.overrides(), source.recipe)
        with progress.of_bytes(options) as report:
            results.append(hash_model(HashRequest(target, selected, tree or bool(selected)), report))
    notes = [note if len(results) == 1 else f"{result.model}: {note}" for result in results for note in result.notes]
    warnings = [warning for result in results for warning in result.warnings]
    view = documents.tree(results[0], results[0].modules, depth=depth) if tree else documents.hashes(results)
    output.show(view, options, notes, warnings=warnings)


def commands() -> list[Command]:
    return [Command("hash", hash_models, "Compare", exit_codes(0, 2, 3, 4, 5), shares_work=True)]
