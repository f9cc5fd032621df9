"""How edits and `save` write, and how what they did is shown."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from modelcli.cli import output
from modelcli.cli.options import EditOptions, OutputOptions, SaveOptions
from modelcli.errors import RequestError, did_you_mean
from modelcli.language.quoting import quoted

if TYPE_CHECKING:
    from modelcli.commands.edit import Outcome, Writing
    from modelcli.commands.target import Target


def writing_of(
    options: SaveOptions, out: str | None, report: Callable[[int, int, str], None] | None = None
) -> "Writing":
    """The options as the session wants them. Raises RequestError for a check or a format that does not exist."""
    from modelcli import writing
    from modelcli.commands.edit import Writing
    from modelcli.language.references import parse_bytes

    ways = ("meta", "run", "none")
    if options.check not in ways:
        raise RequestError(
            f"no check {options.check!r}", did_you_mean(options.check, ways) or "--check meta, run or none"
        )
    return Writing(
        out=None if out is None else Path(out),
        kind="pth" if out is None else writing.format_of(out),
        force=options.force,
        dry_run=options.dry_run,
        check=options.check,
        bare=options.bare,
        compact=options.compact,
        durable=not options.no_fsync,
        verify=options.verify,
        max_shard_bytes=None if options.max_shard_size is None else parse_bytes(options.max_shard_size),
        report=report,
    )


def show_outcome(target: "Target", outcome: "Outcome", options: EditOptions, shown: OutputOptions) -> None:
    """Show what an edit changed, and what was written where."""
    from modelcli.render import views
    from modelcli.render.documents import edit as documents

    written = outcome.written
    if written is not None:
        result = ("written", f"{written.reference} ({views.megabytes(written.nbytes)})")
    elif options.dry_run:
        result = ("not written", "--dry-run changes nothing")
    elif target.recipe is not None:
        from modelcli import recipe

        other = "" if target.recipe == recipe.default_path() else f" --recipe {quoted(target.recipe)}"
        result = ("recorded", f"{target.recipe} (modelcli save OUT{other} writes the result)")
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
        output=None if written is None else written.reference,
        outcome=results,
        folded=output.is_screen(shown),
    )
    output.show(view, shown, [*outcome.notes, *output.folding_note(view, "change", "-f csv")])


def tell_waiting(recipe: Path) -> None:
    """Tell whoever sits before a terminal why nothing happens."""
    if sys.stderr.isatty():
        output.tell(f"note: waiting for another command that is using {recipe}")
