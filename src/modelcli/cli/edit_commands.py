"""Make the command of each edit from the edit's declaration: its words, its options, its help and its examples."""

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import Field
from typing import Annotated, Any, ClassVar

import typer

from modelcli import edits
from modelcli.cli import completing, output, progress
from modelcli.cli.mounting import Command, ProgramCommand
from modelcli.cli.options import (
    EditOptions,
    OutputOptions,
    SourceOptions,
    WorkOptions,
    exit_codes,
    names_of,
    writes_file,
)
from modelcli.cli.outcome import keys_shown, show_outcome, tell_waiting, write_request
from modelcli.edits import Edit, declaring
from modelcli.edits.declaring import Operand, Option
from modelcli.errors import RequestError, SystemFailureError
from modelcli.language.quoting import command, quoted

#: These commands accept negative numbers as operands: `Flatten 1 -1`.
_NUMBERS_ALLOWED = {"ignore_unknown_options": True}
_CODES = (0, 2, 3, 4, 5)


def command_called(name: str) -> Command | None:
    """Return the command of an edit; None if no edit has this name.

    If an edit of another package cannot be loaded, its command reports that, so that the help can list all others.
    """
    try:
        kind = edits.find(name)
        return None if kind is None else command_of(kind)
    except SystemFailureError as failure:
        return _command_that_fails(name, failure)


def command_of(kind: type[Edit]) -> Command:
    """Return the command of an edit. Raises SystemFailureError if it declares an option that every edit has."""
    _refuse_reserved_names(kind)

    def carry_out(*, edit: EditOptions, source: SourceOptions, options: OutputOptions, **given: Any) -> None:
        operands = [word for operand in kind.words for word in _as_list(given[operand.name])]
        flags = [
            word for item in kind.option_fields().values() for word in _words(item.metadata["option"], given[item.name])
        ]
        _carry_out(kind, operands, flags, edit, source, options)

    carry_out.__doc__ = "\n\n".join([kind.summary, *kind.examples]).replace("[", "\\[")
    groups = {"edit": EditOptions, "source": SourceOptions, "options": OutputOptions}
    carry_out.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            *map(_argument_of, kind.words),
            *(_parameter(name, inspect.Parameter.empty, group) for name, group in groups.items()),
            *(_option_of(item.name, item.metadata["option"]) for item in _own_first(kind)),
        ]
    )
    return Command(
        kind.name,
        carry_out,
        kind.panel,
        _codes_of(kind),
        _class_for(kind),
        context_settings=_NUMBERS_ALLOWED,
        shares_work=writes_file,
    )


def _codes_of(kind: type[Edit]) -> str:
    """Return the exit codes for the help. Keys of another model may not match: the answer is then no."""
    return exit_codes(0, 1, *_CODES[1:], no="the keys do not match") if kind.reads_models else exit_codes(*_CODES)


class _WithBareOptions(ProgramCommand):
    """A command with options whose value may be left out; a value follows an `=` (`--keep-weights=sum`)."""

    #: For each of these options, the value that the option has without one.
    bare: ClassVar[Mapping[str, str]] = {}

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        options = [f"{word}={self.bare[word]}" if word in self.bare else word for word in args[:end]]
        return super().parse_args(ctx, [*options, *args[end:]])


def _class_for(kind: type[Edit]) -> type[ProgramCommand]:
    bare = {option.flag: option.kind.bare for option in kind.options() if option.kind.bare is not None}
    return type("EditCommand", (_WithBareOptions,), {"bare": bare}) if bare else ProgramCommand


def _refuse_reserved_names(kind: type[Edit]) -> None:
    groups = (EditOptions, SourceOptions, OutputOptions, WorkOptions)
    names = {*(name for group in groups for name in group.options), "edit", "source", "options"}
    flags = {*names_of(*groups), "--help"} & kind.option_fields().keys()
    words = {operand.name for operand in kind.words} | {item.name for item in kind.option_fields().values()}
    if taken := sorted(flags | (words & names)):
        raise SystemFailureError(f"the edit {kind.name} declares {', '.join(taken)}, which every edit has already")


def _own_first(kind: type[Edit]) -> list[Field[Any]]:
    """Return the options of an edit in the order of the help: its own, then those that it shares with other edits."""
    shared = {flag for base in kind.__mro__[1:] if issubclass(base, Edit) for flag in base.option_fields()}
    return [item for _, item in sorted(kind.option_fields().items(), key=lambda pair: pair[0] in shared)]


def _command_that_fails(name: str, failure: SystemFailureError) -> Command:
    def fail(words: Annotated[list[str] | None, typer.Argument(metavar="WORD...")] = None) -> None:
        raise failure

    fail.__doc__ = failure.message.replace("[", "\\[")
    return Command(name, fail, Edit.panel, exit_codes(5), context_settings=_NUMBERS_ALLOWED)


def _argument_of(operand: Operand) -> inspect.Parameter:
    argument = typer.Argument(
        help=_escape_markup(operand.help), metavar=operand.metavar, autocompletion=completing.of_operand(operand)
    )
    words: Any = list[str] if operand.several else str
    return inspect.Parameter(
        operand.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=Annotated[words, argument]
    )


def _option_of(name: str, option: Option) -> inspect.Parameter:
    default = "" if option.default is None else f" \\[default: {_escape_markup(option.default)}]"
    help_text = _escape_markup(option.help) + default
    if option.kind.read is None:
        return _parameter(name, False, Annotated[bool, typer.Option(option.flag, help=help_text)])
    declared = typer.Option(
        option.flag,
        help=help_text,
        metavar=option.metavar,
        min=option.kind.minimum,
        autocompletion=completing.of_option(option),
    )
    word: Any = option.kind.type
    return _parameter(name, None, Annotated[(list[word] if option.kind.several else word) | None, declared])


def _parameter(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _escape_markup(text: str) -> str:
    """Escape text so that Rich does not read any of it as markup."""
    return text.replace("[", "\\[")


def _as_list(value: str | Sequence[str]) -> Sequence[str]:
    return [value] if isinstance(value, str) else value


def _words(option: Option, value: Any) -> list[str]:
    """Return the words of an edit's line for the value of a command-line option; no words for an option not given."""
    if value is None or value is False:
        return []
    if value is True:
        return [option.flag]
    if option.kind.bare is not None:
        return [f"{option.flag}={value}"]
    return [word for item in (value if isinstance(value, list) else [value]) for word in (option.flag, str(item))]


def _carry_out(
    kind: type[Edit],
    operands: list[str],
    flags: list[str],
    options: EditOptions,
    source: SourceOptions,
    shown: OutputOptions,
) -> None:
    """Carry out an edit.

    Args:
        kind: the class of the edit.
        operands: the words of its operands.
        flags: the words of its own options.
        options: the model and where to write it.
        source: where the model's architecture and values come from.
        shown: the output format.
    """
    from modelcli import edits
    from modelcli.commands.edit import EditRequest
    from modelcli.commands.edit import edit as carry_out
    from modelcli.commands.target import find_target, recipe_locked

    output.format_of(shown)
    known = sorted({*names_of(EditOptions, SourceOptions, OutputOptions, WorkOptions), *kind.option_fields()})
    for word in operands:
        edits.checked_operand(word, known)
    try:
        parsed = edits.from_words(kind.name, [*flags, "--", *operands])
        with recipe_locked(options.model, source.recipe, tell_waiting), progress.of_bytes(shown) as report:
            target = find_target(options.model, source.overrides(), source.recipe)
            request = EditRequest(target, (parsed,), write_request(options, options.out))
            with keys_shown(shown):
                edited = carry_out(request, report)
    except RequestError as error:
        error.hint = _hint_for(kind, operands, flags, error, options) or error.hint
        raise
    show_outcome(target, edited, options, shown)


def _hint_for(
    kind: type[Edit], operands: list[str], flags: list[str], error: RequestError, options: EditOptions
) -> str | None:
    """Return a hint for a model without its `-m`, or for a pattern that the shell expanded; None if it is neither."""
    from modelcli.commands.target import names_model

    name, (first, *rest) = kind.name, operands
    # Of an edit that names another model this word may be a file.
    others = zip(kind.words[1:], rest, strict=False)
    rest = (
        [word for operand, word in others if declaring.REFERENCES not in operand.completes]
        if kind.reads_models
        else rest
    )
    if options.model is None and names_model(first):
        return with_model(name, rest, flags, first, [] if options.out is None else ["-o", options.out])
    if options.model is None and rest and names_model(rest[-1]):
        return f"if {rest[-1]} is the model, write -m {quoted(rest[-1])}"
    files = [word for word in rest if "." in word and word != "." and os.path.lexists(word)]
    if files and "pattern" not in (error.hint or ""):
        return f"{files[0]} is a file here: if the shell expanded a pattern to it, quote the pattern"
    return None


def with_model(name: str, operands: list[str], flags: list[str], model: str, more: Sequence[str] = ()) -> str:
    """Return a hint with the correct command for `replace resnet18 fc 'Linear(_,10)'`, whose model needs `-m`.

    Args:
        name: the name of the edit.
        operands: its operands without the model.
        flags: the words of its own options.
        model: the first word, which names a model.
        more: words to put behind the model, such as `-o OUT`.
    """
    try:
        edits.from_words(name, [*flags, "--", *operands])
    except RequestError:
        operands = ["TARGET"]
    return f"-m names the model: {command(['modelcli', name, *flags, *operands, '-m', model, *more])}"
