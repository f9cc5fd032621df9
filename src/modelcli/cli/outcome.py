"""Turn the options of edits and `save` into a request to write, and show what was changed and written."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from modelcli.cli import output
from modelcli.cli.options import CHECKS, EditOptions, OutputOptions, SaveOptions
from modelcli.errors import AnswerNoError, RequestError, did_you_mean
from modelcli.language.quoting import quoted

if TYPE_CHECKING:
    from modelcli.commands.edit import EditResult
    from modelcli.commands.target import Target
    from modelcli.commands.write import WriteRequest

#: `load` and `graft` show at most this many rows for missing keys, and for each other kind of mismatch.
MOST_KEYS = 20


def write_request(options: SaveOptions, out: str | None) -> "WriteRequest":
    """Return where and how to write. Raises RequestError for a check or a format that does not exist."""
    from modelcli import writing
    from modelcli.commands.write import WriteRequest
    from modelcli.language.references import parse_bytes

    if options.check not in CHECKS:
        either = f"pass --check {', '.join(CHECKS[:-1])} or {CHECKS[-1]}"
        raise RequestError(f"unknown check {options.check!r}", did_you_mean(options.check, CHECKS) or either)
    if out is None and options.format_out is not None:
        raise RequestError("--format-out says how a folder is written, and none is", "-o out/ writes it")
    kind = writing.default_format() if out is None else writing.format_of(out, options.format_out)
    if options.resume and out is None:
        raise RequestError("--resume goes on with writing a folder, and none is written", "-o out/ writes it")
    if options.resume and out is not None and not writing.is_folder(kind):
        raise RequestError(f"--resume is for folders, and {out} is one file", f"-o {quoted(Path(out).stem or out)}/")
    return WriteRequest(
        out=None if out is None else Path(out),
        format=kind,
        force=options.force,
        dry_run=options.dry_run,
        check=options.check,
        bare=options.bare,
        compact=options.compact,
        durable=not options.no_fsync,
        verify=options.verify,
        resume=options.resume,
        also_ema=options.also_ema,
        max_shard_bytes=None if options.max_shard_size is None else parse_bytes(options.max_shard_size),
    )


def show_outcome(
    target: "Target",
    edited: "EditResult",
    options: EditOptions,
    shown: OutputOptions,
    *,
    with_edits: bool = False,
) -> None:
    """Show what an edit changed, and what was written where. `with_edits` also shows the edits as lines."""
    from modelcli.render import views
    from modelcli.render.documents import edit as documents

    written = edited.written
    if written is not None:
        result = ("written", f"{written.reference} ({views.megabytes(written.nbytes)})")
    elif options.dry_run:
        result = ("not written", "--dry-run changes nothing")
    elif target.recipe is not None and not edited.edits and not target.restates_input:
        result = ("not recorded", "there is no edit")
    elif target.recipe is not None:
        from modelcli import recipe

        other = "" if target.recipe == recipe.default_path() else f" --recipe {quoted(target.recipe)}"
        result = ("recorded", f"{target.recipe} (modelcli save OUT{other} writes the result)")
    else:
        result = ("not written", "-o OUT writes the result")
    results = [result]
    if written is not None and target.recipe is not None:
        results.append(("recorded", str(target.recipe)))
    view = documents.edits(edited, results, folded=output.is_screen(shown), with_edits=with_edits)
    output.show(view, shown, [*edited.notes, *output.folding_note(view, "change", "-f csv")])


@contextlib.contextmanager
def keys_shown(shown: OutputOptions) -> Iterator[None]:
    """Show how the keys of another model match, as `load` does, before the error that refuses them."""
    try:
        yield
    except AnswerNoError as error:
        from modelcli.model.key_report import KeysDoNotMatchError
        from modelcli.render.documents import load as documents

        if not isinstance(error, KeysDoNotMatchError):
            raise
        most = MOST_KEYS if output.format_of(shown) == "table" else None
        output.show(documents.graft(error.source, error.path, error.report, most=most), shown, [])
        raise


def tell_waiting(recipe: Path) -> None:
    """Tell a user at a terminal that another process has locked the recipe and that this one waits."""
    if sys.stderr.isatty():
        output.tell(f"note: waiting for another command that is using {recipe}")
