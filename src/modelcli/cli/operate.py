"""replace, add, freeze and the others: commands that carry out one edit."""

import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelcli.cli import completing, output, progress
from modelcli.cli.options import (
    EditOptions,
    MatchOptions,
    OutputOptions,
    SaveOptions,
    SourceOptions,
    UnheededOptions,
    exit_codes,
    expanded,
    names_of,
)
from modelcli.errors import RequestError, did_you_mean
from modelcli.language.quoting import command, quoted

if TYPE_CHECKING:
    from modelcli.commands.edit import Outcome, Writing
    from modelcli.commands.target import Target

Words = Annotated[
    list[str],
    typer.Argument(help="Linear(4096,10), or Linear 4096 10.", metavar="MODULE...", autocompletion=completing.classes),
]
Path_ = Annotated[str, typer.Argument(help="A path: classifier.6.", metavar="PATH", autocompletion=completing.modules)]
Renumber = Annotated[
    bool, typer.Option("--renumber", help="The numbered children of a bare checkpoint are a sequence.")
]
Targets = Annotated[
    list[str],
    typer.Argument(help="Selectors of modules or parameters.", metavar="TARGET...", autocompletion=completing.targets),
]

#: Words with a dash in front are operands of these commands where they are numbers: `Flatten 1 -1`.
NUMBERS_ALLOWED = {"ignore_unknown_options": True}


def replace(
    target: Annotated[
        str, typer.Argument(help="A selector of modules: classifier.6, '**:ReLU'.", autocompletion=completing.modules)
    ],
    module: Words,
    matches: MatchOptions,
    edit: EditOptions,
    source: SourceOptions,
    options: OutputOptions,
    also: Annotated[
        list[str] | None,
        typer.Option(
            "--also",
            help="Replace what this selector picks too: other names of a shared module.",
            autocompletion=completing.modules,
            metavar="SELECTOR",
        ),
    ] = None,
    keep_weights: Annotated[
        bool, typer.Option("--keep-weights", help="Carry the old values over where they mean the same.")
    ] = False,
    untie: Annotated[
        bool, typer.Option("--untie", help="Replace a shared module under the names picked alone.")
    ] = False,
) -> None:
    """Put a new module in place of every match. _ in its arguments means: as it was.

    modelcli replace fc 'Linear(_,10)' -m resnet18 -o head10.pth

    modelcli replace '**:ReLU' GELU -m vgg16
    """
    flags = [word for selector in also or () for word in ("--also", selector)]
    flags += [*(["--keep-weights"] if keep_weights else []), *(["--untie"] if untie else [])]
    _carry_out("replace", [target, *module], [*matches.words(), *flags], edit, source, options)


def add(path: Path_, module: Words, edit: EditOptions, source: SourceOptions, options: OutputOptions) -> None:
    """Add a child under a name that is free.

    modelcli add features.dropout 'Dropout(0.5)' -m alexnet

    modelcli add classifier.4 'Softmax(dim=1)' -m squeezenet1_1 -o out.pth
    """
    _carry_out("add", [path, *module], [], edit, source, options)


def insert(
    path: Path_,
    module: Words,
    edit: EditOptions,
    source: SourceOptions,
    options: OutputOptions,
    renumber: Renumber = False,
) -> None:
    """Insert before a position of a Sequential or ModuleList; the later ones move up.

    modelcli insert features.1 'BatchNorm2d(_)' -m squeezenet1_1 -o out.pth

    modelcli insert classifier.0 'Dropout(0.2)' -m alexnet
    """
    _carry_out("insert", [path, *module], ["--renumber"] if renumber else [], edit, source, options)


def append(path: Path_, module: Words, edit: EditOptions, source: SourceOptions, options: OutputOptions) -> None:
    """Add at the end of a Sequential or ModuleList.

    modelcli append classifier 'Softmax(dim=1)' -m squeezenet1_1 -o out.pth

    modelcli append classifier 'Linear(_,10)' -m alexnet
    """
    _carry_out("append", [path, *module], [], edit, source, options)


def remove(
    targets: Targets,
    matches: MatchOptions,
    edit: EditOptions,
    source: SourceOptions,
    options: OutputOptions,
    renumber: Renumber = False,
) -> None:
    """Take modules out; in a Sequential or ModuleList the later ones move down.

    modelcli remove '**:Dropout' -m squeezenet1_1 -o out.pth

    modelcli remove classifier.6 -m alexnet
    """
    _carry_out("remove", targets, [*matches.words(), *(["--renumber"] if renumber else [])], edit, source, options)


def extract(path: Path_, edit: EditOptions, source: SourceOptions, options: OutputOptions) -> None:
    """Let a submodule be the model.

    modelcli extract features -m squeezenet1_1 -o backbone.pth

    modelcli extract layer1.0 -m resnet18
    """
    _carry_out("extract", [path], [], edit, source, options)


def rename(
    old: Annotated[str, typer.Argument(help="The keys as they are: 'module.**'.", autocompletion=completing.targets)],
    new: Annotated[str, typer.Argument(help="As they shall be; what wildcards captured comes back in order: '**'.")],
    edit: EditOptions,
    source: SourceOptions,
    options: OutputOptions,
) -> None:
    """Rename the keys of tensors.

    modelcli rename 'module.**' '**' -m parallel.pth -o plain.pth

    modelcli rename 'head.*' 'classifier.*' -m bare.pth -o out.pth
    """
    _carry_out("rename", [old, new], [], edit, source, options)


def freeze(
    targets: Targets, matches: MatchOptions, edit: EditOptions, source: SourceOptions, options: OutputOptions
) -> None:
    """Stop training parameters: requires_grad becomes False.

    modelcli freeze 'layer?' -m best.pth -o still.pth

    modelcli freeze . --except fc
    """
    _carry_out("freeze", targets, matches.words(), edit, source, options)


def unfreeze(
    targets: Targets, matches: MatchOptions, edit: EditOptions, source: SourceOptions, options: OutputOptions
) -> None:
    """Train parameters again: requires_grad becomes True.

    modelcli unfreeze fc -m frozen.pth -o head.pth

    modelcli unfreeze '**:BatchNorm2d'
    """
    _carry_out("unfreeze", targets, matches.words(), edit, source, options)


def init(
    targets: Annotated[
        list[str],
        typer.Argument(
            help="Selectors, then the scheme: xavier_uniform, 'normal(0, 0.01)', default.",
            metavar="TARGET... SCHEME",
            autocompletion=completing.targets_and_scheme,
        ),
    ],
    matches: MatchOptions,
    edit: EditOptions,
    source: SourceOptions,
    options: OutputOptions,
    bias: Annotated[
        str | None,
        typer.Option(
            "--bias",
            help="The scheme of biases. \\[default: zeros]",
            metavar="SCHEME",
            autocompletion=completing.schemes,
        ),
    ] = None,
) -> None:
    """Draw the numbers of modules or tensors anew.

    modelcli init '**:Conv2d' xavier_uniform -m squeezenet1_1 -o fresh.pth

    modelcli init '**:Linear' 'normal(0, 0.01)' --bias zeros -m alexnet
    """
    _carry_out("init", targets, [*matches.words(), *(["--bias", bias] if bias else [])], edit, source, options)


def cast(
    targets: Annotated[
        list[str],
        typer.Argument(
            help="Selectors, then the dtype: bfloat16, half.",
            metavar="TARGET... DTYPE",
            autocompletion=completing.targets_and_dtype,
        ),
    ],
    matches: MatchOptions,
    edit: EditOptions,
    source: SourceOptions,
    options: OutputOptions,
) -> None:
    """Convert floating-point tensors to another dtype.

    modelcli cast . bfloat16 -m best.pth -o half.pth

    modelcli cast . half -m squeezenet1_1
    """
    _carry_out("cast", targets, matches.words(), edit, source, options)


RecipeArgument = Annotated[
    str | None,
    typer.Argument(
        help="A recipe; - reads edits from standard input. \\[default: the working recipe]",
        metavar="[RECIPE]",
        show_default=False,
    ),
]
Lines = Annotated[
    list[str] | None, typer.Option("-e", "--edit", help="An edit, as a line of text. Again for more.", metavar="EDIT")
]


def apply(
    edit: EditOptions,
    source: SourceOptions,
    options: OutputOptions,
    file: RecipeArgument = None,
    lines: Lines = None,
) -> None:
    """Apply many edits at once: all of them, or none where one is wrong.

    modelcli apply head10.toml -m best.pth -o head10.pth

    modelcli apply -e 'replace classifier.6 Linear(_,10)' -e 'freeze features' -m alexnet
    """
    from modelcli.commands.apply import find_batch
    from modelcli.commands.edit import edit as carry_out
    from modelcli.commands.target import recipe_locked

    output.format_of(options)
    path, given = _edits_from(file, lines, source)
    with recipe_locked(edit.model, source.recipe, _tell_waiting), progress.of_bytes(options) as report:
        batch = find_batch(path, given, edit.model, source.overrides(), source.recipe)
        outcome = carry_out(batch.target, batch.edits, writing_of(edit, edit.out, report), batch.places)
    show_outcome(batch.target, outcome, edit, options)


def script(
    source: SourceOptions,
    options: OutputOptions,
    _unheeded: UnheededOptions,
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
        str, typer.Option("-o", "--out", help="What the script writes.", rich_help_panel="Result", metavar="OUT")
    ] = ("out.pth"),
    bare: Annotated[
        bool,
        typer.Option(
            "--bare",
            help="Let the script drop what a training checkpoint holds besides its state dict.",
            rich_help_panel="Result",
        ),
    ] = False,
) -> None:
    """Show the same work as a plain PyTorch script that needs no modelcli.

    modelcli script > work.py

    modelcli script -e 'replace fc Linear(_,10)' -m resnet18 -o head10.pth
    """
    from modelcli import writing
    from modelcli.commands import script as scripting
    from modelcli.commands.apply import Batch, find_batch
    from modelcli.commands.target import find_target
    from modelcli.render.documents import script as documents

    output.format_of(options)
    kind = writing.format_of(out)
    path, given = _edits_from(file, lines, source)
    if path is None and not given:
        batch = Batch(find_target(model, source.overrides(), source.recipe))
    else:
        batch = find_batch(path, given, model, source.overrides(), source.recipe)
    made = scripting.script(batch, Path(out), kind, bare=bare)
    output.show(documents.script(batch.target.source.model, made.blueprint, made.text), options, made.notes)


def _edits_from(
    file: str | None, lines: list[str] | None, source: SourceOptions
) -> tuple[Path | None, list[tuple[str, str]]]:
    """The recipe that is named, and the edits of standard input and `-e` with where they stand."""
    from modelcli import resolve

    given = [(f"-e {number}", line) for number, line in enumerate(lines or (), 1)]
    if file == "-":
        return None, [*_standard_input(), *given]
    if file is not None and resolve.names_a_model(file):
        raise RequestError(f"{file} is no recipe", f"-m names the model: -m {quoted(file)}")
    if file is not None and source.recipe is not None:
        raise RequestError(f"two recipes: {file} and --recipe {source.recipe}", "give one of them")
    return None if file is None else Path(file), given


def _standard_input() -> list[tuple[str, str]]:
    """The lines of standard input that are edits, and where they stand. Raises RequestError where there are none."""
    if sys.stdin is None:  # it was closed: `<&-`
        raise RequestError("no edits on standard input: it is closed", "one a line: freeze features")
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"standard input is not UTF-8 text: {error}") from None
    lines = enumerate(re.split(r"\r\n|\r|\n", text), 1)
    found = [(f"standard input:{number}", line) for number, line in lines if not re.match(r"\s*(#|$)", line)]
    if not found:
        raise RequestError("no edits on standard input", "one a line: freeze features")
    return found


def _carry_out(
    name: str,
    operands: list[str],
    flags: list[str],
    options: EditOptions,
    source: SourceOptions,
    shown: OutputOptions,
) -> None:
    """Carry out the edit with these operands; `flags` are the words of its own options."""
    from modelcli import edits
    from modelcli.commands.edit import edit as carry_out
    from modelcli.commands.target import find_target, recipe_locked

    output.format_of(shown)
    kind = edits.find(name)
    assert kind is not None
    known = sorted({*names_of(EditOptions, SourceOptions, OutputOptions), *kind.option_fields()})
    for word in operands:
        edits.checked_operand(word, known)
    try:
        made = edits.from_words(name, [*flags, "--", *operands])
        with recipe_locked(options.model, source.recipe, _tell_waiting), progress.of_bytes(shown) as report:
            target = find_target(options.model, source.overrides(), source.recipe)
            outcome = carry_out(target, [made], writing_of(options, options.out, report))
    except RequestError as error:
        error.hint = _meant(name, operands, flags, error, options) or error.hint
        raise
    show_outcome(target, outcome, options, shown)


def _tell_waiting(recipe: Path) -> None:
    """Tell whoever sits before a terminal why nothing happens."""
    if sys.stderr.isatty():
        output.tell(f"note: waiting for another command that is using {recipe}")


def _meant(name: str, operands: list[str], flags: list[str], error: RequestError, options: EditOptions) -> str | None:
    """What an edit's words may have been meant for: a model without its `-m`, a pattern that the shell expanded."""
    from modelcli.commands.target import names_model

    first, *rest = operands
    if options.model is None and names_model(first):
        return with_model(name, rest, flags, first, [] if options.out is None else ["-o", options.out])
    if options.model is None and rest and names_model(rest[-1]):
        return f"where {rest[-1]} is the model: -m {quoted(rest[-1])}"
    files = [word for word in rest if "." in word and word != "." and os.path.lexists(word)]
    if files and "pattern" not in (error.hint or ""):
        return f"{files[0]} is a file here: if the shell expanded a pattern to it, quote the pattern"
    return None


def with_model(name: str, operands: list[str], flags: list[str], model: str, more: Sequence[str] = ()) -> str:
    """The command whose model was given as its first word: `replace resnet18 fc 'Linear(_,10)'`. `more` are the words
    behind the model, such as `-o OUT`."""
    from modelcli import edits

    try:
        edits.from_words(name, [*flags, "--", *operands])
    except RequestError:
        operands = ["TARGET"]
    return f"the model comes with -m: {command(['modelcli', name, *flags, *operands, '-m', model, *more])}"


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


def mount(app: typer.Typer) -> None:
    codes = exit_codes(0, 2, 3, 4, 5)
    commands: tuple[Callable[..., Any], ...] = (
        replace, add, insert, append, remove, extract, rename, freeze, unfreeze, init, cast,
    )  # fmt: skip
    for function in commands:
        app.command(function.__name__, rich_help_panel="Operate", context_settings=NUMBERS_ALLOWED, epilog=codes)(
            expanded(function)
        )
    for function in (script, apply):
        app.command(function.__name__, rich_help_panel="Read and write", epilog=codes)(expanded(function))
