"""cache path, cache clear, cache warm: the blueprints that are kept on disk."""

import sys
from collections.abc import Iterable, Iterator
from typing import Annotated

import typer

from modelcli.cli import completing, output
from modelcli.cli.options import OutputOptions, exit_codes, expanded

app = typer.Typer(help="Tend the blueprints of installed models that are kept on disk.", no_args_is_help=True)


def path(options: OutputOptions) -> None:
    """Show where the blueprints are kept, how many there are, and what they take.

    modelcli cache path

    modelcli cache path --json
    """
    from modelcli import cache
    from modelcli.render import documents

    output.format_of(options)
    entries = cache.entries()
    sizes = sum(entry.stat().st_size for entry in entries if entry.exists())
    output.show(documents.cache(cache.folder(), len(entries), sizes), options)


def clear(options: OutputOptions) -> None:
    """Remove every blueprint that is kept.

    modelcli cache clear

    modelcli cache clear --quiet
    """
    from modelcli import cache
    from modelcli.render import documents

    output.format_of(options)
    removed = cache.clear()
    output.show(documents.cache(cache.folder(), 0, 0), options, [f"removed {removed} entries"])


def warm(
    options: OutputOptions,
    pattern: Annotated[
        str | None, typer.Argument(help="Part of a name, or a pattern: 'resnet*'.", autocompletion=completing.builders)
    ] = None,
) -> None:
    """Keep the blueprint of every torchvision builder, or of those of a pattern: a look at one needs no torch then.

    modelcli cache warm alexnet

    modelcli cache warm 'squeezenet*'
    """
    from modelcli import session

    output.format_of(options)
    names = [entry["name"] for entry in session.builders(pattern)]
    for name in _progress(names, options):
        session.warm(name)
    path(options)


def _progress(names: list[str], options: OutputOptions) -> Iterable[str]:
    """The names, with a progress bar on a terminal."""
    if options.quiet or not sys.stderr.isatty():
        return names
    return _with_bar(names)


def _with_bar(names: list[str]) -> Iterator[str]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task("", total=len(names))
        for name in names:
            bar.update(task, description=name)
            yield name
            bar.advance(task)


def mount(parent: typer.Typer) -> None:
    for name, function in (("path", path), ("clear", clear), ("warm", warm)):
        app.command(name, epilog=exit_codes(0, 2, 5))(expanded(function))
    parent.add_typer(app, name="cache", rich_help_panel="Inspect")
