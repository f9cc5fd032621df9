"""The entry point, and the one place where errors end."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import re
import sys
from collections.abc import Sequence

from modelcli.cli.output import PipeClosedError, tell, tell_error, write
from modelcli.errors import ModelcliError, SystemFailureError

INTERRUPTED = 130


def run() -> None:
    """The `modelcli` program."""
    # It lives for one command: rows by the 100,000 are made and kept, and looking for garbage among them is in vain. Of
    # 100,000 tensors there are more than a million objects; beyond two, garbage might be what takes the memory.
    gc.set_threshold(2_000_000, 50, 100)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what a terminal's encoding lacks is shown escaped
    code = main()
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _leave_pipe()
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and give its exit code. Every error ends here, as one message and what to do next."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words == ["--version"]:  # needs no parser
        return _show_version()
    import typer

    from modelcli.cli.app import app

    as_json, debug = _wants_json(words), "--debug" in words
    try:
        result = app(args=words or ["--help"], standalone_mode=False, prog_name="modelcli")
        code = result if isinstance(result, int) else 0
        if code == INTERRUPTED:  # Typer has caught the KeyboardInterrupt
            tell("interrupted", "error")
        return code
    except PipeClosedError:
        _leave_pipe()
        return 0
    except (KeyboardInterrupt, typer.Abort):
        tell("interrupted", "error")
        return INTERRUPTED
    except ModelcliError as error:
        if debug:
            _show_traceback()
        tell_error(error, as_json=as_json)
        return error.exit_code
    except typer.TyperException as error:
        tell_error(_usage_error(error), as_json=as_json)
        return 2
    except MemoryError:
        failure = SystemFailureError("not enough memory")
    except OSError as error:
        if debug:
            _show_traceback()
        where = f"{error.filename}: " if error.filename else ""
        failure = SystemFailureError(f"{where}{error.strerror or error}")
    except Exception as error:
        if debug:
            _show_traceback()
        failure = SystemFailureError(
            f"a fault in modelcli itself: {type(error).__name__}: {error}",
            None if debug else "--debug shows where; please report it",
        )
        failure.kind = "internal"
    tell_error(failure, as_json=as_json)
    return failure.exit_code


def _show_version() -> int:
    from modelcli.cli.version import text

    try:
        write(text() + "\n")
    except PipeClosedError:
        _leave_pipe()
    return 0


def _show_traceback() -> None:
    import traceback

    traceback.print_exc()


def _usage_error(error: Exception) -> ModelcliError:
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "modelcli"
    made = ModelcliError(
        getattr(error, "format_message", error.__str__)().replace("\n", " ").strip(),
        f"{path} --help shows how it is used",
    )
    made.kind = "usage"
    return made


def _wants_json(words: Sequence[str]) -> bool:
    joined = "\0".join(words)
    return "--json" in words or bool(re.search(r"(^|\0)(-f\0?=?|--format[\0=])json(\0|$)", joined))


def _leave_pipe() -> None:
    """Point standard output elsewhere, so that the interpreter's last flush finds no closed pipe."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
