"""replace, freeze, unfreeze: commands that carry out one edit."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelcli.cli import output
from modelcli.cli.options import (
    EditOptions,
    MatchOptions,
    OutputOptions,
    SaveOptions,
    SourceOptions,
    expanded,
)
from modelcli.errors import RequestError, did_you_mean

if TYPE_CHECKING:
    from modelcli.session import Outcome, Target, Writing

Words = Annotated[list[str], typer.Argument(help="Linear(4096,10), or Linear 4096 10.", metavar="MODULE...")]
Targets = Annotated[list[str], typer.Argument(help="Selectors of modules or parameters.", metavar="TARGET...")]

#: Words with a dash in front are operands of these commands where they are numbers: `Flatten 1 -1`.
NUMBERS_ALLOWED = {"ignore_unknown_options": True}


def replace(
    target: Annotated[str, typer.Argument(help="A selector of modules: classifier.6, '**:ReLU'.")],
    module: Words,
    matches: MatchOptions,
    edit: EditOptions,
    source: SourceOptions,
    options: OutputOptions,
) -> None:
    """Put a new module in place of every match. _ in its arguments means: as it was.

    modelcli replace classifier.6 'Linear(_,10)' -m alexnet -o head10.pth

    modelcli replace '**:ReLU' GELU -m vgg16
    """
    _carry_out("replace", [target, *module], matches, edit, source, options)


def freeze(
    targets: Targets, matches: MatchOptions, edit: EditOptions, source: SourceOptions, options: OutputOptions
) -> None:
    """Stop training parameters: requires_grad becomes False.

    modelcli freeze features -m best.pth -o frozen.pth

    modelcli freeze . --except classifier.6
    """
    _carry_out("freeze", targets, matches, edit, source, options)


def unfreeze(
    targets: Targets, matches: MatchOptions, edit: EditOptions, source: SourceOptions, options: OutputOptions
) -> None:
    """Train parameters again: requires_grad becomes True.

    modelcli unfreeze classifier -m frozen.pth -o head.pth

    modelcli unfreeze '**:BatchNorm2d'
    """
    _carry_out("unfreeze", targets, matches, edit, source, options)


def _carry_out(
    name: str,
    words: list[str],
    matches: MatchOptions,
    options: EditOptions,
    source: SourceOptions,
    shown: OutputOptions,
) -> None:
    from modelcli import edits, session

    output.format_of(shown)
    for word in words:
        edits.checked_operand(word, ALL_OPTIONS)
    line = [*words]
    for selector in matches.without or ():
        line += ["--except", selector]
    if matches.expect is not None:
        line += ["--expect", str(matches.expect)]
    made = edits.from_words(name, line)
    target = session.find_target(options.model, source.overrides(), source.recipe)
    outcome = session.edit(target, [made], writing_of(options, options.out))
    show_outcome(target, outcome, options, shown)


ALL_OPTIONS = (
    *(
        "--model",
        "--out",
        "--force",
        "--dry-run",
        "--check",
        "--bare",
        "--except",
        "--expect",
        "--weights",
        "--arch",
    ),
    *(
        "--key",
        "--seed",
        "--input-size",
        "--input-dtype",
        "--trust",
        "--tensors-only",
        "--recipe",
        "--format",
        "--json",
        "--quiet",
    ),
)


def writing_of(options: SaveOptions, out: str | None) -> "Writing":
    """The options as the session wants them. Raises RequestError for a check or a format that does not exist."""
    from modelcli import writing
    from modelcli.session import Writing

    ways = ("meta", "run", "none")
    if options.check not in ways:
        raise RequestError(
            f"no check {options.check!r}", did_you_mean(options.check, ways) or "--check meta, run or none"
        )
    if out is not None:
        writing.format_of(out)
    path = None if out is None else Path(out)
    return Writing(path, options.force, options.dry_run, options.check, options.bare)


def show_outcome(target: "Target", outcome: "Outcome", options: EditOptions, shown: OutputOptions) -> None:
    """Show what an edit changed, and what was written where."""
    from modelcli.render import documents, views

    written = outcome.written
    if written is not None:
        result = ("written", f"{written.path} ({views.megabytes(written.nbytes)})")
    elif options.dry_run:
        result = ("not written", "--dry-run changes nothing")
    elif target.recipe is not None:
        result = ("recorded", f"{target.recipe} (modelcli save OUT writes the result)")
    else:
        result = ("not written", "-o OUT writes the result")
    results = [result]
    if written is not None and target.recipe is not None:
        results.append(("recorded", str(target.recipe)))
    view = documents.edits(
        target.source.model,
        outcome.blueprint,
        lines=outcome.edits,
        changes=outcome.changes,
        before=outcome.before,
        after=outcome.after,
        check=outcome.check,
        output=None if written is None else written.path,
        outcome=results,
    )
    output.show(view, shown, outcome.notes)


def mount(app: typer.Typer) -> None:
    commands: tuple[tuple[str, Callable[..., Any]], ...] = (
        ("replace", replace),
        ("freeze", freeze),
        ("unfreeze", unfreeze),
    )
    for name, function in commands:
        app.command(name, rich_help_panel="Operate", context_settings=NUMBERS_ALLOWED)(expanded(function))
