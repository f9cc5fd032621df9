"""The command of each edit, made from the edit's declaration: its words, its options, its help and its examples."""

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import Field
from typing import Annotated, Any, ClassVar

import typer

from modelcli import edits
from modelcli.cli import completing, output, progress
from modelcli.cli.mounting import Command, ProgramCommand
from modelcli.cli.options import EditOptions, OutputOptions, SourceOptions, exit_codes, names_of
from modelcli.cli.outcome import show_outcome, tell_waiting, write_request
from modelcli.edits import Edit
from modelcli.edits.declaring import Operand, Option
from modelcli.errors import RequestError, SystemFailureError
from modelcli.language.quoting import command, quoted

#: Words with a dash in front are operands of these commands where they are numbers: `Flatten 1 -1`.
_NUMBERS_ALLOWED = {"ignore_unknown_options": True}
_CODES = (0, 2, 3, 4, 5)


def command_called(name: str) -> Command | None:
    """The command of an edit; None where no edit has this name.

    One of another package that cannot be used is a command that says so, so that the help lists the others.
    """
    try:
        kind = edits.find(name)
        return None if kind is None else command_of(kind)
    except SystemFailureError as failure:
        return _failing(name, failure)


def command_of(kind: type[Edit]) -> Command:
    """The command of an edit. Raises SystemFailureError where it declares what every edit has already."""
    _refuse_taken(kind)

    def carry_out(*, edit: EditOptions, source: SourceOptions, options: OutputOptions, **given: Any) -> None:
        operands = [word for operand in kind.words for word in _listed(given[operand.name])]
        flags = [
            word for item in kind.option_fields().values() for word in _words(item.metadata["option"], given[item.name])
        ]
        _carry_out(kind, operands, flags, edit, source, options)

    carry_out.__doc__ = "\n\n".join([kind.summary, *kind.examples]).replace("[", "\\[")
    groups = {"edit": EditOptions, "source": SourceOptions, "options": OutputOptions}
    carry_out.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            *map(_of_operand, kind.words),
            *(_parameter(name, inspect.Parameter.empty, group) for name, group in groups.items()),
            *(_of_option(item.name, item.metadata["option"]) for item in _own_first(kind)),
        ]
    )
    return Command(
        kind.name, carry_out, kind.panel, exit_codes(*_CODES), _class_for(kind), context_settings=_NUMBERS_ALLOWED
    )


class _WithBareOptions(ProgramCommand):
    """A command with options whose value may be left out: it follows an `=` where it is given."""

    #: The words that their names alone stand for.
    bare: ClassVar[Mapping[str, str]] = {}

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        options = [f"{word}={self.bare[word]}" if word in self.bare else word for word in args[:end]]
        return super().parse_args(ctx, [*options, *args[end:]])


def _class_for(kind: type[Edit]) -> type[ProgramCommand]:
    bare = {option.flag: option.kind.bare for option in kind.options() if option.kind.bare is not None}
    return type("EditCommand", (_WithBareOptions,), {"bare": bare}) if bare else ProgramCommand


def _refuse_taken(kind: type[Edit]) -> None:
    groups = (EditOptions, SourceOptions, OutputOptions)
    names = {*(name for group in groups for name in group.options), "edit", "source", "options"}
    flags = {*names_of(*groups), "--help"} & kind.option_fields().keys()
    words = {operand.name for operand in kind.words} | {item.name for item in kind.option_fields().values()}
    if taken := sorted(flags | (words & names)):
        raise SystemFailureError(f"the edit {kind.name} declares {', '.join(taken)}, which every edit has already")


def _own_first(kind: type[Edit]) -> list[Field[Any]]:
    """The options of an edit as the help lists them: its own, then those that it shares with other edits."""
    shared = {flag for base in kind.__mro__[1:] if issubclass(base, Edit) for flag in base.option_fields()}
    return [item for _, item in sorted(kind.option_fields().items(), key=lambda pair: pair[0] in shared)]


def _failing(name: str, failure: SystemFailureError) -> Command:
    def fail(words: Annotated[list[str] | None, typer.Argument(metavar="WORD...")] = None) -> None:
        raise failure

    fail.__doc__ = failure.message.replace("[", "\\[")
    return Command(name, fail, Edit.panel, exit_codes(5), context_settings=_NUMBERS_ALLOWED)


def _of_operand(operand: Operand) -> inspect.Parameter:
    argument = typer.Argument(
        help=_plain(operand.help), metavar=operand.metavar, autocompletion=completing.operand(operand)
    )
    words: Any = list[str] if operand.several else str
    return inspect.Parameter(
        operand.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=Annotated[words, argument]
    )


def _of_option(name: str, option: Option) -> inspect.Parameter:
    default = "" if option.default is None else f" \\[default: {_plain(option.default)}]"
    help_text = _plain(option.help) + default
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


def _plain(text: str) -> str:
    """Text of which Rich takes nothing for markup."""
    return text.replace("[", "\\[")


def _listed(value: str | Sequence[str]) -> Sequence[str]:
    return [value] if isinstance(value, str) else value


def _words(option: Option, value: Any) -> list[str]:
    """The words of an edit's line for an option of the command line, given or not."""
    if value is None or value is False:
        return []
    if value is True:
        return [option.flag]
    if option.kind.bare is not None:
        return [f"{option.flag}={value}"]
    return [word for each in (value if isinstance(value, list) else [value]) for word in (option.flag, str(each))]


def _carry_out(
    kind: type[Edit],
    operands: list[str],
    flags: list[str],
    options: EditOptions,
    source: SourceOptions,
    shown: OutputOptions,
) -> None:
    """Carry out the edit with these operands; `flags` are the words of its own options."""
    from modelcli import edits
    from modelcli.commands.edit import EditRequest
    from modelcli.commands.edit import edit as carry_out
    from modelcli.commands.target import find_target, recipe_locked

    output.format_of(shown)
    known = sorted({*names_of(EditOptions, SourceOptions, OutputOptions), *kind.option_fields()})
    for word in operands:
        edits.checked_operand(word, known)
    try:
        made = edits.from_words(kind.name, [*flags, "--", *operands])
        with recipe_locked(options.model, source.recipe, tell_waiting), progress.of_bytes(shown) as report:
            target = find_target(options.model, source.overrides(), source.recipe)
            how = write_request(options, options.out)
            edited = carry_out(EditRequest(target, (made,), how), report)
    except RequestError as error:
        error.hint = _meant(kind.name, operands, flags, error, options) or error.hint
        raise
    show_outcome(target, edited, options, shown)


def _meant(name: str, operands: list[str], flags: list[str], error: RequestError, options: EditOptions) -> str | None:
    """What an edit's words may have been meant for: a model without its `-m`, a pattern that the shell expanded."""
    from modelcli.commands.target import names_model

    first, *rest = operands
    if options.model is None and names_model(first):
        return with_model(name, rest, flags, first, [] if options.out is None else ["-o", options.out])
    if options.model is None and rest and names_model(rest[-1]):
        return f"if {rest[-1]} is the model, write -m {quoted(rest[-1])}"
    files = [word for word in rest if "." in word and word != "." and os.path.lexists(word)]
    if files and "pattern" not in (error.hint or ""):
        return f"{files[0]} is a file here: if the shell expanded a pattern to it, quote the pattern"
    return None


def with_model(name: str, operands: list[str], flags: list[str], model: str, more: Sequence[str] = ()) -> str:
    """The command whose model was given as its first word: `replace resnet18 fc 'Linear(_,10)'`. `more` are the words
    behind the model, such as `-o OUT`."""
    try:
        edits.from_words(name, [*flags, "--", *operands])
    except RequestError:
        operands = ["TARGET"]
    return f"-m names the model: {command(['modelcli', name, *flags, *operands, '-m', model, *more])}"
