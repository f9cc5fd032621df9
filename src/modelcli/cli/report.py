"""The command report, which writes a page about a model."""

from pathlib import Path
from typing import Annotated

import typer

from modelcli.cli import completing, inspect, output, progress
from modelcli.cli.mounting import Command
from modelcli.cli.options import LookOptions, OutputOptions, SourceOptions, exit_codes


def report(
    source: SourceOptions,
    look: LookOptions,
    options: OutputOptions,
    model: inspect.Model = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            help="Show what was added, removed and changed since this model.",
            metavar="OTHER",
            autocompletion=completing.models,
        ),
    ] = None,
    stats: Annotated[
        bool,
        typer.Option("--stats", help="Show the range, zeros, NaN and Inf, and a histogram of each tensor."),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", help="The page to write. \\[default: the name of the model, with .html]", metavar="OUT"
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing page.")] = False,
    show: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """Write one HTML page about a model: its tree of modules, maps of its parameters and mult-adds, its totals.

    modelcli report resnet18 -o resnet.html

    modelcli report frozen.pth --against best.pth --stats
    """
    from modelcli.commands import report as commands
    from modelcli.commands.target import find_target
    from modelcli.render import page
    from modelcli.render.documents import report as documents

    kind = output.format_of(options)
    target = find_target(inspect.named(model, look), source.overrides(), source.recipe)
    path = out if out is not None else Path(commands.default_name(target.source))
    if show:
        commands.require_display(path)
    commands.check_out(path, force=force)
    other = None if against is None else commands.other_side(target, against)
    with progress.of_bytes(options) as report_progress:
        request = commands.ReportRequest(target, other, stats, cached=not look.no_cache)
        found = commands.report(request, report_progress)
    nbytes = commands.write(page.html(found), path, force=force)
    if show:
        commands.show_in_browser(path)
    view = documents.report(found, str(path), nbytes, whole=kind == "json")
    output.show(view, options, found.notes, warnings=found.warnings)


def commands() -> list[Command]:
    return [Command("report", report, "Inspect", exit_codes(0, 2, 3, 4, 5))]
