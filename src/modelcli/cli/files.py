"""The commands load, save, log and undo, which start, write and change the working recipe."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from modelcli.cli import completing, output, progress
from modelcli.cli.mounting import Command
from modelcli.cli.options import OutputOptions, SaveOptions, SourceOptions, exit_codes
from modelcli.cli.outcome import MOST_KEYS, write_request

Dry = Annotated[bool, typer.Option("--dry-run", help="Write no file.")]


def load(
    model: Annotated[
        str, typer.Argument(help="The model: alexnet, nets.py:Net, best.pth.", autocompletion=completing.models)
    ],
    source: SourceOptions,
    options: OutputOptions,
    strict: Annotated[bool, typer.Option("--strict/--no-strict", help="Require that every key matches.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace a recipe that has edits.")] = False,
    dry_run: Dry = False,
) -> int:
    """Check that a model loads, and start the working recipe with it.

    modelcli load alexnet

    modelcli load best.pth --arch resnet18
    """
    from modelcli import recipe
    from modelcli.commands.load import LoadRequest
    from modelcli.commands.load import load as start_recipe
    from modelcli.commands.target import options_given
    from modelcli.language.references import Source
    from modelcli.render.documents import load as documents

    kind = output.format_of(options)
    opened = Source(model=model, strict=strict, **options_given(source.overrides()))
    path = source.recipe or recipe.default_path()
    result = start_recipe(LoadRequest(opened, path, force=force, dry_run=dry_run))
    view = documents.load(result, most=MOST_KEYS if kind == "table" else None)
    output.show(view, options, result.notes)
    if result.error is not None:
        raise result.error
    return 0


def save(
    out: Annotated[str, typer.Argument(help="The file to write: {suffixes}, or a folder/ of shards.")],
    edit: SaveOptions,
    source: SourceOptions,
    options: OutputOptions,
) -> None:
    """Apply the working recipe and write the result.

    modelcli save runs/best.pth

    modelcli save copy.safetensors -m best.pth
    """
    from modelcli.commands.save import SaveRequest
    from modelcli.commands.save import save as write_recipe
    from modelcli.commands.target import find_target
    from modelcli.render.documents import save as documents

    output.format_of(options)
    target = find_target(edit.model, source.overrides(), source.recipe)
    how = write_request(edit, out)
    with progress.of_bytes(options) as report:
        saved = write_recipe(SaveRequest(target, how), report)
    notes = list(saved.notes)
    if saved.written is None:
        notes.append("nothing was written: --dry-run changes nothing")
    output.show(documents.save(saved, how.format), options, notes)


def log(
    options: OutputOptions,
    path: Annotated[str | None, typer.Option("--recipe", help="The recipe.", metavar="FILE")] = None,
) -> None:
    """Show the working recipe, one edit in each row.

    modelcli log

    modelcli log --recipe head10.toml --json
    """
    output.format_of(options)
    _show_log(_recipe_path(path), options)


def undo(
    options: OutputOptions,
    count: Annotated[int, typer.Argument(help="The number of edits.", min=1)] = 1,
    path: Annotated[str | None, typer.Option("--recipe", help="The recipe.", metavar="FILE")] = None,
    dry_run: Dry = False,
) -> None:
    """Undo the last edits of the working recipe.

    modelcli undo

    modelcli undo 3
    """
    from modelcli.commands import recipe_log

    output.format_of(options)
    where = _recipe_path(path)
    verb = "would undo" if dry_run else "undid"
    undone = recipe_log.undo(recipe_log.UndoRequest(where, count, dry_run=dry_run))
    _show_log(where, options, [f"{verb}: {line}" for line in undone])


def _recipe_path(path: str | None) -> Path:
    from modelcli import recipe

    return Path(path) if path else recipe.default_path()


def _show_log(path: Path, options: OutputOptions, notes: Sequence[str] = ()) -> None:
    from modelcli.commands import recipe_log
    from modelcli.render.documents import recipe_log as documents

    output.show(documents.log(recipe_log.log(path)), options, notes)


def _writes(given: Mapping[str, Any]) -> bool:
    """Whether `save` writes the result, by its options."""
    return not given["dry_run"]


def commands() -> list[Command]:
    codes: dict[Callable[..., Any], str] = {
        load: exit_codes(0, 1, 2, 3, 4, 5, no="the keys do not match"),
        save: exit_codes(0, 2, 3, 4, 5),
        log: exit_codes(0, 2),
        undo: exit_codes(0, 2, 5),
    }
    return [
        Command(
            function.__name__,
            function,
            "Read and write",
            text,
            shares_work=function is save and _writes,
        )
        for function, text in codes.items()
    ]
