"""The only module that prints: data to standard output in the chosen format, everything else to standard error."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from modelcli.errors import ModelcliError, RequestError, SystemFailureError, did_you_mean

if TYPE_CHECKING:
    from modelcli.cli.options import OutputOptions
    from modelcli.render.views import View


class PipeClosedError(Exception):
    """The reader of standard output has closed the pipe, so there is nothing left to do."""


_FOR_DEVELOPERS = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning, BytesWarning)
#: The Python warnings since the last result was shown.
_warned: list[str] = []


@contextlib.contextmanager
def warnings_kept() -> Iterator[None]:
    """Collect the warnings of torch and of a model's own code, for the notes of the result or of the error."""

    def keep(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        text = re.sub(r"\s*\(Triggered internally at .*", "", " ".join(str(message).split()))
        _warned.append(f"{_speaker(filename, lineno)} warns: {text}")

    _warned.clear()
    shown, warnings.showwarning = warnings.showwarning, keep
    try:
        yield
    finally:
        warnings.showwarning = shown


def _speaker(filename: str, lineno: int) -> str:
    """Return the source of a warning: the name of an installed package, or the file and line of other code."""
    package = re.search(r"[/\\](?:site|dist)-packages[/\\](\w+)", filename)
    if package is not None:
        return package[1]
    return "torch" if f"modelcli{os.sep}" in filename else f"{Path(filename).name}:{lineno}"


def warned() -> list[str]:
    """Return the collected warnings, each once, and forget them."""
    collected = list(dict.fromkeys(_warned))
    _warned.clear()
    return collected


#: How many characters of printed text to keep, and how many lines of it to show as notes.
_MOST_PRINTED, _MOST_LINES = 65_536, 20
_printed: TextIO | None = None


class _Beginning(io.BytesIO):
    """A buffer that accepts everything and keeps only the beginning, because a model may print without end."""

    def write(self, data: Any, /) -> int:
        super().write(bytes(data)[: max(_MOST_PRINTED - self.tell(), 0)])
        return len(data)


@contextlib.contextmanager
def prints_kept(*, wanted: bool) -> Iterator[None]:
    """If the result is JSON (`wanted`), collect what other code prints on standard error, for the notes.

    Such code is a model's own, or a library that downloads. Standard error then contains at most an error as JSON.
    """
    global _printed
    if not wanted:
        yield
        return
    _printed = io.TextIOWrapper(_Beginning(), encoding="utf-8", errors="backslashreplace", write_through=True)
    try:
        with contextlib.redirect_stderr(_printed):
            yield
    finally:
        lines = printed()
        _printed = None
        _warned.extend(lines)


def printed() -> list[str]:
    """Return the collected lines that other code printed on standard error, and forget them."""
    if not isinstance(_printed, io.TextIOWrapper):
        return []
    kept = _printed.buffer
    assert isinstance(kept, _Beginning)
    data = kept.getvalue().decode("utf-8", "backslashreplace")
    kept.seek(0)
    kept.truncate()
    lines = [line.strip() for line in re.split(r"[\r\n]+", data) if line.strip()]
    more = [f"{len(lines) - _MOST_LINES} more lines were printed"] if len(lines) > _MOST_LINES else []
    return [*(f"printed: {line}" for line in lines[:_MOST_LINES]), *more]


def format_of(options: OutputOptions, *own: str) -> str:
    """Return the chosen format. `own` are formats that only this command has.

    Raises RequestError if the format does not exist, or if two are given.
    """
    from modelcli.render import writers

    if options.json and options.format not in (None, "json"):
        raise RequestError(f"--json and -f {options.format} are two formats", "pass only one of them")
    name = "json" if options.json else options.format or "table"
    known = (*writers.FORMATS, *own)
    if name not in known:
        raise RequestError(f"unknown format {name!r}", did_you_mean(name, known) or f"there are {', '.join(known)}")
    return name


def show(
    view: View, options: OutputOptions, notes: Iterable[str] = (), *, warnings: Iterable[str] = (), **more: object
) -> None:
    """Print a view, then its notes; in JSON the notes are part of the document.

    Args:
        view: the result to print.
        options: the format, and whether to leave out notes.
        notes: the notes about the result.
        warnings: messages that are shown even with `--quiet`.
        more: further entries of the JSON document.
    """
    from modelcli.render import writers

    kind = format_of(options)
    shown_notes = [] if options.quiet else [*notes, *warned(), *printed()]
    match kind:
        case "json":
            shown_notes = [*(f"warning: {warning}" for warning in warnings), *shown_notes]
            notes_of = {"notes": shown_notes} if shown_notes else {}
            write(writers.to_json({**view.document, **more, **notes_of}) + "\n")
            return
        case "csv":
            write(writers.to_csv(view))
        case "markdown":
            write(writers.to_markdown(view))
        case _ if is_terminal():
            import shutil

            from rich.console import Console

            try:
                columns, lines = shutil.get_terminal_size()  # Rich assumes 80 columns for a dumb terminal
                console = Console(
                    file=sys.stdout, width=columns, height=lines, highlight=False, markup=False, emoji=False
                )
                left_out = writers.print_rich(view, console)
                sys.stdout.flush()
            except BrokenPipeError:
                raise PipeClosedError from None
            except OSError as error:
                raise unwritten(error) from None
            if left_out and not options.quiet:
                shows = "shows it" if len(left_out) == 1 else "shows them"
                shown_notes.append(f"no space for {', '.join(left_out)}: a wider terminal or -f csv {shows}")
        case _:
            write(writers.to_plain(view, encoding=_encoding()))
    for warning in warnings:
        tell(f"warning: {warning}", "error")
    for note in shown_notes:
        tell(f"note: {note}")


def folding_note(view: View, noun: str, way_out: str = "--expand") -> list[str]:
    """Return the note on how many rows were folded into similar rows, and on the option that shows each of them."""
    from modelcli.wording import counted

    return (
        [f"{counted(view.folded, noun)} folded into rows of similar ones: {way_out} shows each"] if view.folded else []
    )


def is_screen(options: OutputOptions) -> bool:
    """Whether the output is a table on a terminal, which may be shortened for people. Programs get all rows."""
    return format_of(options) == "table" and is_terminal()


def is_terminal() -> bool:
    """Whether standard output is a terminal."""
    return sys.stdout.isatty()


def _encoding() -> str:
    return getattr(sys.stdout, "encoding", None) or "utf-8"


def write(text: str) -> None:
    """Write to standard output. Characters that its encoding lacks are escaped."""
    encoding = _encoding()
    try:
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        raise PipeClosedError from None
    except OSError as error:
        raise unwritten(error) from None


def unwritten(error: OSError) -> SystemFailureError:
    """Return the error for a failure to write standard output."""
    hint = "check that there is space where the output is written"
    return SystemFailureError(f"cannot write standard output: {error.strerror or error}", hint)


def tell(text: str, style: str = "dim") -> None:
    """Write one message to standard error, in colour on a terminal."""
    from modelcli.render import writers

    text = "\n".join(writers.safe(line) for line in text.split("\n"))
    if sys.stderr.isatty():
        text = "\n".join(_wrapped(line) for line in text.split("\n"))
    if sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb":
        codes = {"dim": "2", "error": "1;31", "hint": "36"}
        head, colon, rest = text.partition(":")
        text = f"\x1b[{codes[style]}m{head}{colon}\x1b[0m{rest}"
    try:
        encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
        sys.stderr.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        sys.stderr.flush()
    except OSError:
        pass  # there is no reader or no space; the exit code must be enough


def _wrapped(line: str) -> str:
    """Break a message between words at the width of the terminal."""
    import shutil
    import textwrap

    width = shutil.get_terminal_size().columns
    return textwrap.fill(line, max(width, 20), break_long_words=False, break_on_hyphens=False)


def tell_error(error: ModelcliError, *, as_json: bool) -> None:
    """Print an error: its notes, message and hint, or one JSON document."""
    from modelcli.render import writers

    if as_json:
        body: dict[str, object] = {
            "kind": error.kind,
            "message": error.message,
            "hint": error.hint,
            "exit_code": error.exit_code,
        }
        if error.notes:
            body["notes"] = list(error.notes)
        with contextlib.suppress(OSError):
            sys.stderr.write(writers.to_json({"schema": 1, "error": body}) + "\n")
            sys.stderr.flush()
        return
    for note in error.notes:
        tell(f"note: {note}")
    tell(f"error: {error.message}", "error")
    if error.hint:
        tell(f"hint: {error.hint}", "hint")
