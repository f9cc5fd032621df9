"""The commands diff, check and identify, which answer yes or no, for scripts and CI."""

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperOption

from modelcli.cli import completing, inspect, output, progress
from modelcli.cli.mounting import Command
from modelcli.cli.options import (
    AssertOptions,
    DiffOptions,
    LookOptions,
    OutputOptions,
    SourceOptions,
    exit_codes,
)

#: A format of `check` only: annotations in the log of a GitHub workflow.
GITHUB = "github"


class AssertionsCommand(TyperCommand):
    """A command that refuses the same single assertion twice; Typer would silently drop one of them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not ctx.resilient_parsing:
            _, _, given = self.make_parser(ctx).parse_args(args=list(args))
            for option in given:
                if given.count(option) > 1 and _is_single(option):
                    ctx.fail(f"{option.opts[0]} is given {given.count(option)} times: pass it only once")
        return super().parse_args(ctx, args)


def _is_single(parameter: Any) -> bool:
    """Whether this is an assertion with one value, which cannot be repeated."""
    if not isinstance(parameter, TyperOption) or parameter.rich_help_panel != "Assertions":
        return False
    return not (parameter.multiple or parameter.is_flag)


def diff(
    a: Annotated[
        str,
        typer.Argument(
            metavar="A", help="A model: alexnet, nets.py:Net, before.pth.", autocompletion=completing.models
        ),
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="The other model.", autocompletion=completing.models)],
    options: OutputOptions,
    sides: DiffOptions,
    select: Annotated[
        list[str] | None,
        typer.Option(
            "-s",
            "--select",
            help="Compare only what this selector picks. Repeat for more.",
            metavar="SELECTOR",
            autocompletion=completing.targets,
        ),
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option(
            "--except",
            help="Leave out what this selector picks. Repeat for more.",
            metavar="SELECTOR",
            autocompletion=completing.targets,
        ),
    ] = None,
    values: Annotated[bool, typer.Option("--values/--no-values", help="Compare the values too.")] = True,
    atol: Annotated[float, typer.Option("--atol", help="Ignore differences up to X.", metavar="X")] = 0.0,
    rtol: Annotated[
        float, typer.Option("--rtol", help="Ignore differences up to X times the value in B.", metavar="X")
    ] = 0.0,
    expand: inspect.Expand = False,
) -> int:
    """Show what differs between two models or checkpoints.

    modelcli diff best.pth frozen.pth

    modelcli diff resnet18 best.pth --no-values
    """
    from modelcli.commands.diff import DiffRequest, Scope
    from modelcli.commands.diff import diff as compare
    from modelcli.render.documents import diff as documents

    output.format_of(options)
    scope = Scope(tuple(select or ()), tuple(without or ()), values=values, atol=atol, rtol=rtol)
    request = DiffRequest(*sides.sources(a, b), (a, b), scope)
    with progress.of_bytes(options) as report:
        found = compare(request, report)
    folded = output.is_screen(options) and not expand
    view = documents.diff(a, b, found, values=values, folded=folded)
    notes = [*found.notes, *output.folding_note(view, "difference")]
    output.show(view, options, notes, warnings=found.warnings)
    return 0 if found.same else 1


def check(
    source: SourceOptions,
    look: LookOptions,
    asserted: AssertOptions,
    options: OutputOptions,
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...",
            help="One or more models. \\[default: the working recipe]",
            show_default=False,
            autocompletion=completing.models,
        ),
    ] = None,
) -> int:
    """Check assertions about one or several models, one per row. -f github prints annotations for GitHub workflows.

    modelcli check best.pth --finite --safe --max-params 60M

    modelcli check best.pth --trainable fc --has 'fc:Linear' --output-shape 1,1000
    """
    from modelcli.commands.check import CheckRequest, CheckResult, checked
    from modelcli.commands.check import check as find_out
    from modelcli.commands.target import find_target
    from modelcli.render import annotations
    from modelcli.render.documents import check as documents

    kind = output.format_of(options, GITHUB)
    wanted = asserted.assertions()
    wanted.require_sense()
    names = [inspect.named(name, look) for name in models] if models else [inspect.named(None, look)]

    def check_it(name: str | None) -> CheckResult:
        target = find_target(name, source.overrides(), source.recipe)
        with progress.of_bytes(options) as report:
            return find_out(CheckRequest(target, wanted, cached=not look.no_cache), report)

    if len(names) == 1 and kind != GITHUB:
        result = check_it(names[0])
        output.show(documents.check(result), options, result.notes, warnings=result.warnings)
        result.require_answers()
        return 0 if result.passed else 1
    outcomes = [checked(name or "the working recipe", partial(check_it, name)) for name in names]
    if kind == GITHUB:
        output.write(annotations.of_checks(outcomes))
    else:
        notes = [f"{found.model}: {note}" for found in outcomes for note in found.notes]
        warnings = [warning for found in outcomes for warning in found.warnings]
        output.show(documents.checks(outcomes), options, notes, warnings=warnings)
    return max(found.exit_code for found in outcomes)


def identify(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="A checkpoint, or a folder with a model: best.pth, runs/bert.", autocompletion=completing.models
        ),
    ],
    options: OutputOptions,
    key: Annotated[
        str | None,
        typer.Option(
            "--key", help="The state dict in a training checkpoint.", metavar="NAME", autocompletion=completing.keys
        ),
    ] = None,
) -> int:
    """Show which known model a checkpoint belongs to, by the names and shapes of its tensors.

    For a folder with a configuration: what that says, and whether the tensors fit it.

    modelcli identify best.pth

    modelcli identify bare.pth --json
    """
    from modelcli.commands.identify import IdentifyRequest
    from modelcli.commands.identify import identify as find_architecture
    from modelcli.render.documents import identify as documents

    output.format_of(options)
    found = find_architecture(IdentifyRequest(checkpoint, key), lambda names: progress.of_names(names, options))
    output.show(
        documents.identify(checkpoint, found.matches, found.configured),
        options,
        found.notes,
        warnings=found.look.warnings,
    )
    return 0 if found.matches else 1


def _reads_values(given: Mapping[str, Any]) -> bool:
    """Whether assertions are of values, by their options: only these are shared out."""
    return bool(given["finite"] or given["same_as"] or given["content_hash"])


def commands() -> list[Command]:
    return [
        Command(
            function.__name__,
            function,
            "Compare",
            exit_codes(0, 1, 2, 3, 4, 5, no=no),
            kind,
            shares_work=shares,
        )
        for function, no, kind, shares in (
            (diff, "they differ", TyperCommand, lambda given: given["values"]),
            (check, "an assertion fails", AssertionsCommand, _reads_values),
            (identify, "no known model is close", TyperCommand, False),
        )
    ]
