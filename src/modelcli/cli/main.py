"""The entry point, and the only place that turns errors into messages and exit codes."""

from __future__ import annotations

import _thread
import atexit
import contextlib
import gc
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import takewhile
from typing import NoReturn

from modelcli.cli import failures, parallel
from modelcli.cli.output import PipeClosedError, prints_kept, tell, tell_error, unwritten, warned, warnings_kept, write
from modelcli.cli.synonyms import meant
from modelcli.errors import ModelcliError, SystemFailureError
from modelcli.interrupts import INTERRUPTED, advice, asked_to_end
from modelcli.language.quoting import quoted


class _EndedError(BaseException):
    """A signal asked the program to end. It unwinds as for Ctrl-C, so that unfinished work is undone."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def run() -> None:
    """Run the `modelcli` program."""
    # The process runs one command. A million tensors make more than ten million objects, all of which stay in use, so
    # searching them for garbage is a waste of time. Above twenty million objects, garbage may be worth collecting.
    gc.set_threshold(20_000_000, 50, 100)
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # escape characters that the encoding lacks
            # Python writes UTF-8 in the C locale, but users set that locale for terminals that only show ASCII.
            if stream.isatty() and _locale_of_characters() in ("C", "POSIX"):
                stream.reconfigure(encoding="ascii")
    _end_in_order()
    code = main()
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _leave_pipe()
    except OSError as error:
        _leave_pipe()
        code = code or _fail(error)
    _leave(code)


def _locale_of_characters() -> str | None:
    """Return the locale that the environment sets, if any: that of the first variable that is not empty."""
    given = _environment_at_start()
    return next((value for name in ("LC_ALL", "LC_CTYPE", "LANG") if (value := given.get(name))), None)


def _environment_at_start() -> Mapping[str, str]:
    """Return the original environment. (Python sets LC_CTYPE to C.UTF-8 if the locale is C.)"""
    try:
        with open("/proc/self/environ", "rb") as file:  # noqa: PTH123
            entries = os.fsdecode(file.read()).split("\0")
    except OSError:  # not on Linux
        return os.environ
    return {name: value for name, _, value in (entry.partition("=") for entry in entries)}


def _leave(code: int) -> NoReturn:
    """End the process at once, after the exit functions have run and the output has been flushed.

    Python's normal exit frees every module and object first, which takes 0.4 s with torch; the operating system frees
    the memory at once. If a model's own code has started a thread, Python's normal exit waits for it.
    """
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
        sys.exit(code)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _open_closed_streams() -> None:
    """Open standard output and standard error on the null device if the program was started without them (`>&-`)."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115


def _fail(error: OSError) -> int:
    """Report an OSError at the very end of the program. Returns the exit code."""
    failure = unwritten(error)
    tell_error(failure, as_json=False)
    return failure.exit_code


def _failure_of(error: OSError, words: Sequence[str]) -> SystemFailureError:
    """Return the error to report for an OSError. (Typer prints help texts itself, to standard output.)"""
    if error.filename is None and (not words or not {"-h", "--help"}.isdisjoint(words)):
        return unwritten(error)
    where = f"{error.filename}: " if error.filename else ""
    return SystemFailureError(f"{where}{error.strerror or error}")


def _end_in_order() -> None:
    """Make SIGINT, SIGTERM and SIGHUP unwind the program, so that no temporary file remains. `nohup` still works."""

    def end(number: int, _frame: object) -> None:
        asked_to_end.append(number)
        raise KeyboardInterrupt if number == signal.SIGINT else _EndedError(number)

    def ignored(lost: sys.UnraisableHookArgs) -> None:
        """Raise a signal's exception again if Python ignored it, as it does in callbacks of the import system."""
        if not asked_to_end or not isinstance(lost.exc_value, (KeyboardInterrupt, _EndedError)):
            sys.__unraisablehook__(lost)
        else:
            again = threading.Timer(0.02, _thread.interrupt_main, (signal.Signals(asked_to_end[-1]),))
            again.daemon = True
            again.start()

    sys.unraisablehook = ignored
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, end)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return the exit code. Every error is caught here and reported with its hint."""
    words = list(sys.argv[1:] if argv is None else argv)
    if asked := os.environ.get("_MODELCLI_COMPLETE"):  # a shell asks for completions
        from modelcli.cli import shells

        return shells.answer(asked, words)
    if words in (["--version"], ["-V"], ["version"]):  # needs no parser
        return _show_version()
    with warnings_kept(), _without_current_folder():
        return _carry_out(words)


@contextlib.contextmanager
def _without_current_folder() -> Iterator[None]:
    """Remove the current folder from `sys.path`. Code that needs it adds it after the installed packages."""
    entries = [(place, entry) for place, entry in enumerate(sys.path) if entry == ""]
    sys.path[:] = [entry for entry in sys.path if entry != ""]
    try:
        yield
    finally:
        for place, entry in entries:
            sys.path.insert(place, entry)


def _carry_out(words: list[str]) -> int:
    as_json = _wants_json(words)

    def report(error: ModelcliError) -> int:
        _report(error, as_json=as_json)
        return error.exit_code

    attempt = partial(_attempt_or_end, words, as_json=as_json)
    return parallel.carried_out(words, attempt, report, debug="--debug" in words)


def _attempt_or_end(words: list[str], *, as_json: bool) -> int:
    try:
        code = _attempt(words, as_json=as_json)
    except (KeyboardInterrupt, _EndedError) as error:
        asked_to_end[:] = [error.number if isinstance(error, _EndedError) else signal.SIGINT]
        code = 0
    if not asked_to_end:
        return code
    number = asked_to_end[-1]
    asked_to_end.clear()
    message = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
    message = ": ".join([message, *advice])
    advice.clear()
    return _report_end(message, INTERRUPTED if number == signal.SIGINT else 128 + number, as_json=as_json)


def _require_not_asked_to_end() -> None:
    """Raise KeyboardInterrupt if a signal came and its exception was lost or turned into another error.

    torch catches all exceptions around some of its imports, and an interrupted import of a compiled module raises
    other errors.
    """
    if asked_to_end:
        raise KeyboardInterrupt from None


def _attempt(words: list[str], *, as_json: bool) -> int:
    import typer

    from modelcli.cli.app import app

    if not {"--install-completion", "--show-completion"}.isdisjoint(words):
        from modelcli.cli import shells

        shells.hand_out_scripts()
    debug = "--debug" in words
    try:
        with prints_kept(wanted=as_json):
            result = app(args=words or ["--help"], standalone_mode=False, prog_name="modelcli")
        if result == INTERRUPTED:  # Typer has caught the KeyboardInterrupt
            raise KeyboardInterrupt
        return result if isinstance(result, int) else 0
    except PipeClosedError:
        _leave_pipe()
        return 0
    except SystemExit as error:
        # Rich and Typer exit with 1 if the reader of a help text has closed the pipe. A model's code may not exit.
        if error.code == 1 and not _is_open(sys.stdout):
            return 0
        if debug:
            _show_traceback()
        if (ended := failures.of_plug_in(error, debug=debug)) is None:
            raise
        _report(ended, as_json=as_json)
        return ended.exit_code
    except (KeyboardInterrupt, typer.Abort):
        raise KeyboardInterrupt from None
    except ModelcliError as error:
        _require_not_asked_to_end()
        if debug:
            _show_traceback()
        error.notes = (*error.notes, *warned()) if {"-q", "--quiet"}.isdisjoint(words) else ()
        _report(error, as_json=as_json)
        return error.exit_code
    except typer.TyperException as error:
        if not getattr(error, "format_message", error.__str__)():
            return 0  # a group without a command has shown its help
        _report(_usage_error(error, words), as_json=as_json)
        return 2
    except Exception as error:
        _require_not_asked_to_end()
        if debug:
            _show_traceback()
        if (package := failures.imported_at(error)) is not None:
            failure = failures.of_import(package, error)
        elif isinstance(error, MemoryError):
            failure = failures.of_memory()
        elif isinstance(error, OSError):
            failure = _failure_of(error, words)
        else:
            failure = failures.of_plug_in(error, debug=debug) or failures.of_bug(error, debug=debug)
    _report(failure, as_json=as_json)
    return failure.exit_code


def _report_end(message: str, code: int, *, as_json: bool) -> int:
    """Report that a signal ended the program. Returns the exit code."""
    if (why := parallel.failure_elsewhere()) is not None:  # torchrun ends all ranks when one has failed
        _report(why, as_json=as_json)
        return why.exit_code
    error = ModelcliError(message)
    error.kind, error.exit_code = "signal", code
    if as_json:
        _report(error, as_json=True)
    elif not parallel.reported(error):
        tell(message, "error")
    return code


def _report(error: ModelcliError, *, as_json: bool) -> None:
    """Report an error; on another rank than 0, to rank 0."""
    if not parallel.reported(error):
        tell_error(error, as_json=as_json)


def _show_version() -> int:
    from modelcli.cli.version import text

    try:
        write(text() + "\n")
    except PipeClosedError:
        _leave_pipe()
    except SystemFailureError as failure:
        _leave_pipe()
        tell_error(failure, as_json=False)
        return failure.exit_code
    return 0


def _show_traceback() -> None:
    import traceback

    traceback.print_exc()


def _usage_error(error: Exception, words: Sequence[str]) -> ModelcliError:
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "modelcli"
    message = getattr(error, "format_message", error.__str__)().replace("\n", " ").strip()
    model = None if context is None else context.params.get("model")
    if path == "modelcli" and message.startswith(f"No such command {words[0]!r}") and (line := meant(words)):
        made = ModelcliError(f"No such command {words[0]!r}.", f"did you mean: {line}")
    else:
        hint = (
            _model_with(model, message, path) or _model_before_edit(words, message) or f"{path} --help shows the usage"
        )
        made = ModelcliError(message, hint)
    made.kind = "usage"
    return made


def _model_with(model: object, message: str, path: str) -> str | None:
    """Return the hint for a model whose arguments are separate words: `load resnet18 num_classes=37`."""
    extra = re.fullmatch(r"Got unexpected extra argument\(s\) \((\w+=\S+( \w+=\S+)*)\)", message)
    if extra is None or not isinstance(model, str) or not re.fullmatch(r"[\w.:/-]*\w", model):
        return None
    call = f"{model}({', '.join(extra[1].split())})"
    return f"write a model and its arguments as one word: {path} {quoted(call)}"


def _model_before_edit(words: Sequence[str], message: str) -> str | None:
    """Return the correct command for an edit whose first word is the model, which needs `-m`: `rename a.pth w v`."""
    from modelcli import edits
    from modelcli.cli.edit_commands import with_model
    from modelcli.commands.target import names_model

    name, *given = words
    operands = list(takewhile(lambda word: not word.startswith("-"), given))
    if not message.startswith("Got unexpected extra argument") or edits.find(name) is None or len(operands) < 2:
        return None
    more = given[len(operands) :]
    if not {"-m", "--model"}.isdisjoint(more) or not names_model(operands[0]):
        return None
    return with_model(name, operands[1:], [], operands[0], more)


def _wants_json(words: Sequence[str]) -> bool:
    """Whether errors must be JSON. Decided from the words alone, because they may not parse."""
    joined = "\0".join(words)
    return "--json" in words or bool(re.search(r"(^|\0)(-q*f\0?=?|--format[\0=])json(\0|$)", joined))


def _is_open(stream: object) -> bool:
    """Whether a stream still has a reader: without one, Rich redirects it to the null device, and Typer wraps it."""
    if type(stream).__name__ == "PacifyFlushWrapper":
        return False
    from pathlib import Path

    try:
        return not os.path.samestat(os.fstat(sys.stdout.fileno()), Path(os.devnull).stat())
    except (OSError, ValueError, AttributeError):
        return True


def _leave_pipe() -> None:
    """Redirect standard output to the null device, so that the interpreter's last flush does not fail."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
