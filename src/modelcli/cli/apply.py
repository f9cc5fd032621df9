"""The commands apply and script: carry out many edits at once, or write them as a PyTorch script."""

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from modelcli import ranks
from modelcli.cli import completing, output, progress
from modelcli.cli.mounting import Command
from modelcli.cli.options import EditOptions, OutputOptions, SourceOptions, UnheededOptions, exit_codes, writes_file
from modelcli.cli.outcome import keys_shown, show_outcome, tell_waiting, write_request
from modelcli.errors import RequestError
from modelcli.language.quoting import quoted

RecipeArgument = Annotated[
    str | None,
    typer.Argument(
        help="A recipe; - reads edits from standard input. \\[default: the working recipe]",
        metavar="[RECIPE]",
        show_default=False,
    ),
]
Lines = Annotated[
    list[str] | None, typer.Option("-e", "--edit", help="An edit, as a line of text. Repeat for more.", metavar="EDIT")
]


def apply(
    edit: EditOptions,
    source: SourceOptions,
    options: OutputOptions,
    file: RecipeArgument = None,
    lines: Lines = None,
) -> None:
    """Apply many edits at once: all of them, or none if one is wrong.

    modelcli apply head10.toml -m best.pth -o head10.pth

    modelcli apply -e 'replace classifier.6 Linear(_,10)' -e 'freeze features' -m alexnet
    """
    from modelcli.commands.apply import BatchRequest, find_batch
    from modelcli.commands.edit import EditRequest
    from modelcli.commands.edit import edit as carry_out
    from modelcli.commands.target import recipe_locked

    output.format_of(options)
    path, given = _edits_from(file, lines, source)
    with recipe_locked(edit.model, source.recipe, tell_waiting), progress.of_bytes(options) as report:
        batch = find_batch(BatchRequest(path, given, edit.model, source.overrides(), source.recipe))
        how = write_request(edit, edit.out)
        with keys_shown(options):
            edited = carry_out(EditRequest(batch.target, batch.edits, how, batch.locations), report)
    show_outcome(batch.target, edited, edit, options)


def script(
    source: SourceOptions,
    options: OutputOptions,
    unheeded: UnheededOptions,
    file: RecipeArgument = None,
    lines: Lines = None,
    model: Annotated[
        str | None,
        typer.Option(
            "-m",
            "--model",
            help="The model. \\[default: the working recipe]",
            rich_help_panel="Model",
            autocompletion=completing.models,
            metavar="MODEL",
        ),
    ] = None,
    out: Annotated[
        str,
        typer.Option("-o", "--out", help="The file that the script writes.", rich_help_panel="Result", metavar="OUT"),
    ] = ("out.pth"),
    bare: Annotated[
        bool,
        typer.Option(
            "--bare",
            help="Let the script keep only the state dict of a training checkpoint.",
            rich_help_panel="Result",
        ),
    ] = False,
) -> None:
    """Show the same work as a plain PyTorch script that needs no modelcli.

    modelcli script > work.py

    modelcli script -e 'replace fc Linear(_,10)' -m resnet18 -o head10.pth
    """
    from modelcli import writing
    from modelcli.commands.apply import Batch, BatchRequest, find_batch
    from modelcli.commands.script import ScriptRequest
    from modelcli.commands.script import script as write_script
    from modelcli.commands.target import find_target
    from modelcli.render.documents import script as documents

    output.format_of(options)
    kind = writing.format_of(out)
    path, given = _edits_from(file, lines, source)
    if path is None and not given:
        batch = Batch(find_target(model, source.overrides(), source.recipe))
    else:
        batch = find_batch(BatchRequest(path, given, model, source.overrides(), source.recipe))
    made = write_script(ScriptRequest(batch, Path(out), kind, bare=bare))
    notes = list(made.notes)
    if unheeded.also_ema:
        notes.append("the script edits one state dict: other copies of the model, as --also-ema edits them, stay")
    output.show(documents.script(batch.target.source.model, made.blueprint, made.text), options, notes)


def _edits_from(
    file: str | None, lines: list[str] | None, source: SourceOptions
) -> tuple[Path | None, tuple[tuple[str, str], ...]]:
    """Return the path of the recipe, if one is named, and the location and text of each edit of stdin and of `-e`."""
    from modelcli import resolve

    given = tuple((f"-e {number}", line) for number, line in enumerate(lines or (), 1))
    if file == "-":
        return None, (*_standard_input(), *given)
    if file is not None and resolve.names_a_model(file):
        raise RequestError(f"{file} is not a recipe", f"-m names the model: -m {quoted(file)}")
    if file is not None and source.recipe is not None:
        raise RequestError(f"two recipes: {file} and --recipe {source.recipe}", "pass only one of them")
    return None if file is None else Path(file), given


def _standard_input() -> list[tuple[str, str]]:
    """Return the location and text of each edit on standard input. Raises RequestError if there are none."""
    if sys.stdin is None:  # the program was started without standard input: `<&-`
        raise RequestError(
            "no edits on standard input: it is closed", "write one edit per line, such as: freeze features"
        )
    try:
        group = ranks.current()
        data = group.broadcast("standard input", b"" if group.rank else sys.stdin.buffer.read())
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"standard input is not UTF-8 text: {error}") from None
    lines = enumerate(re.split(r"\r\n|\r|\n", text), 1)
    found = [(f"standard input:{number}", line) for number, line in lines if not re.match(r"\s*(#|$)", line)]
    if not found:
        raise RequestError("no edits on standard input", "write one edit per line, such as: freeze features")
    return found


def commands() -> list[Command]:
    codes = exit_codes(0, 2, 3, 4, 5)
    panel = "Read and write"
    return [Command("script", script, panel, codes), Command("apply", apply, panel, codes, shares_work=writes_file)]
