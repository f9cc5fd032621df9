"""The commands summary, params, modules and list, which only show something."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelcli.cli import completing, output, progress
from modelcli.cli.mounting import Command
from modelcli.cli.options import LookOptions, OutputOptions, SourceOptions, exit_codes
from modelcli.errors import RequestError, did_you_mean
from modelcli.language.quoting import quoted
from modelcli.wording import counted

if TYPE_CHECKING:
    from modelcli.commands.look import Look
    from modelcli.model.blueprint import Blueprint
    from modelcli.model.tensors import TensorInfo
    from modelcli.render.views import View
    from modelcli.values.statistics import Statistics

Model = Annotated[
    str | None,
    typer.Argument(
        help="The model. \\[default: the working recipe]", show_default=False, autocompletion=completing.models
    ),
]
Selected = Annotated[
    list[str] | None,
    typer.Option(
        "-s",
        "--select",
        help="Show only what this selector picks.",
        autocompletion=completing.targets,
        metavar="SELECTOR",
    ),
]
Depth = Annotated[
    int | None, typer.Option("--depth", help="Show only rows down to this depth; the root is 0.", min=0, metavar="N")
]

Expand = Annotated[bool, typer.Option("--expand", help="On a terminal, show similar siblings in separate rows.")]


def named(model: str | None, look: LookOptions) -> str | None:
    """Return the model of the argument or of `-m`. Raises RequestError if both are given."""
    if model is not None and look.option_model is not None:
        raise RequestError(f"{model} and -m {look.option_model} are two models", "pass only one of them")
    return model if model is not None else look.option_model


def _show(view: "View", options: OutputOptions, found: "Look", notes: Sequence[str]) -> None:
    """Print a view of a model. JSON always names the classes in the file that only running code could load."""
    more = {"foreign": list(found.foreign)} if found.foreign else {}
    notes = [*notes, *output.folding_note(view, "module")]
    output.show(view, options, notes, warnings=found.warnings, **more)


def summary(
    source: SourceOptions,
    look: LookOptions,
    options: OutputOptions,
    model: Model = None,
    depth: Depth = None,
    mode: Annotated[
        str,
        typer.Option(
            "--mode", help="eval or train.", autocompletion=completing.one_of("eval", "train"), metavar="MODE"
        ),
    ] = "eval",
    sort: Annotated[
        str | None,
        typer.Option(
            "--sort",
            help="Sort by params, mult-adds (or macs) or path; largest numbers first.",
            autocompletion=completing.one_of("params", "mult-adds", "macs", "path"),
            metavar="COLUMN",
        ),
    ] = None,
    select: Selected = None,
    expand: Expand = False,
    exact: Annotated[bool, typer.Option("--exact", help="On a terminal, show every digit of large numbers.")] = False,
    layout: Annotated[
        str | None,
        typer.Option(
            "--layout",
            help="torchinfo: show the table that torchinfo makes.",
            autocompletion=completing.one_of("torchinfo"),
            metavar="LAYOUT",
        ),
    ] = None,
) -> None:
    """Show every module: its output shape, parameters and mult-adds, and the totals.

    modelcli summary alexnet

    modelcli summary nets.py:Net --input-size 1,1,28,28 --sort params
    """
    from modelcli.commands.look import LookRequest, torchinfo_table
    from modelcli.commands.look import look as look_at
    from modelcli.commands.target import find_target
    from modelcli.render.documents import summary as documents

    output.format_of(options)
    if mode not in ("eval", "train"):
        raise RequestError(f"unknown mode {mode!r}", "pass --mode eval or --mode train")
    if sort is not None:
        _check_key(sort, documents.SUMMARY_KEYS)
    if layout not in (None, "torchinfo"):
        raise RequestError(f"unknown layout {layout!r}", "pass --layout torchinfo, or remove --layout")
    target = find_target(named(model, look), source.overrides(), source.recipe)
    if layout is not None:
        if output.format_of(options) != "table" or sort is not None or select:
            raise RequestError("--layout torchinfo makes a fixed table", "remove --format, --sort and --select")
        output.write(torchinfo_table(target, mode=mode, depth=depth) + "\n")
        return
    found = look_at(LookRequest(target, traced=True, mode=mode, cached=not look.no_cache))
    view = documents.summary(
        target.source.model,
        found.blueprint,
        depth=depth,
        sort=sort,
        folded=output.is_screen(options) and not expand,
        paths=frozenset(_selected(found.blueprint, select)) if select else None,
        exact=exact,
    )
    _show(view, options, found, found.notes)


def params(
    source: SourceOptions,
    look: LookOptions,
    options: OutputOptions,
    model: Model = None,
    select: Selected = None,
    values: Annotated[bool, typer.Option("--values", help="Show the values too.")] = False,
    stats: Annotated[
        bool,
        typer.Option("--stats", help="Show min, max, mean and std of the finite values; count zeros, NaN and Inf."),
    ] = False,
    sort: Annotated[
        str | None,
        typer.Option(
            "--sort",
            help="Sort by a column; largest numbers first.",
            autocompletion=completing.columns,
            metavar="COLUMN",
        ),
    ] = None,
    top: Annotated[
        int | None,
        typer.Option("--top", help="Show only the first N rows, by size without --sort.", min=1, metavar="N"),
    ] = None,
    frozen: Annotated[bool, typer.Option("--frozen", help="Show only frozen parameters.")] = False,
    trainable: Annotated[bool, typer.Option("--trainable", help="Show only trainable parameters.")] = False,
    buffers: Annotated[bool, typer.Option("--buffers/--no-buffers", help="Show buffers too.")] = True,
) -> None:
    """Show every parameter and buffer: name, shape, dtype, size, and whether it is trainable.

    modelcli params best.pth --frozen

    modelcli params squeezenet1_1 -s 'classifier.**' --values

    modelcli params best.pth --stats --sort std --top 10
    """
    from modelcli.commands.look import LookRequest
    from modelcli.commands.look import look as look_at
    from modelcli.commands.params import select_tensors, sort_tensors
    from modelcli.commands.target import find_target
    from modelcli.commands.tensor_values import values as values_of
    from modelcli.render.documents import params as documents

    kind = output.format_of(options)
    if sort in documents.STATS and not stats:
        raise RequestError(f"cannot sort by {sort!r} without statistics", "add --stats")
    keys = (*documents.SORT_KEYS, *(documents.STATS if stats else ()))
    if sort is not None:
        _check_key(sort, keys)
    target = find_target(named(model, look), source.overrides(), source.recipe)
    needs_modules = bool(select)  # a selector names modules too
    needs_values = values or stats
    is_cached = not (needs_values or look.no_cache)
    found = look_at(LookRequest(target, cached=is_cached, modules=needs_modules, values=needs_values))
    tensors = select_tensors(found.blueprint, select or [], buffers=buffers, frozen=frozen, trainable=trainable)
    statistics = None
    if sort not in documents.STATS:  # the order is known without reading tensors, so only those shown are read
        tensors = sort_tensors(tensors, sort or "elements")[:top] if sort or top else tensors
    if stats:
        statistics = _statistics(found, tensors, options)
    if sort in documents.STATS:
        tensors = sort_tensors(tensors, sort, statistics)[:top]
    lists, texts = None, None
    if values:
        lists, texts = values_of(found, [tensor.name for tensor in tensors], whole=kind == "json")
    view = documents.params(
        target.source.model, found.blueprint, tensors, values=lists, value_texts=texts, stats=statistics
    )
    notes = found.notes
    if (frozen or trainable) and found.blueprint.totals.trainable_params is None:
        notes = (
            *notes,
            "modelcli does not know whether some parameters are trainable, and leaves them out: pass --arch REFERENCE",
        )
    _show(view, options, found, notes)


def _check_key(sort: str, keys: Sequence[str]) -> None:
    if sort not in keys:
        raise RequestError(f"cannot sort by {sort!r}", did_you_mean(sort, keys) or f"there are {', '.join(keys)}")


def _statistics(found: "Look", tensors: "Sequence[TensorInfo]", options: OutputOptions) -> "dict[str, Statistics]":
    """Return the statistics of tensors. A progress bar appears if reading them takes a while."""
    from modelcli.commands.tensor_values import stats as stats_of

    with progress.of_bytes(options) as report:
        return stats_of(found, [tensor.name for tensor in tensors], report)


def _selected(blueprint: "Blueprint", select: Sequence[str]) -> list[str]:
    """Return the paths of the modules that selectors pick."""
    from modelcli.language import selectors

    return selectors.select_modules(blueprint, select)


def modules(
    source: SourceOptions,
    look: LookOptions,
    options: OutputOptions,
    model: Model = None,
    select: Selected = None,
    depth: Depth = None,
    tree: Annotated[bool, typer.Option("--tree", help="Show a tree.")] = False,
    as_repr: Annotated[bool, typer.Option("--repr", help="Show the text of print(model).")] = False,
    expand: Expand = False,
) -> None:
    """Show every module: path, type, configuration, parameters.

    modelcli modules alexnet -s 'classifier.*'

    modelcli modules best.pth --tree
    """
    from modelcli.commands.look import LookRequest
    from modelcli.commands.look import look as look_at
    from modelcli.commands.target import find_target
    from modelcli.render.documents import modules as documents

    output.format_of(options)
    if tree and as_repr:
        raise RequestError("--tree and --repr are two forms of the same output", "pass only one of them")
    target = find_target(named(model, look), source.overrides(), source.recipe)
    found = look_at(LookRequest(target, cached=not look.no_cache))
    blueprint = found.blueprint
    paths = _selected(blueprint, select) if select else [module.path for module in blueprint.modules]
    notes = list(found.notes)
    if select and len(paths) == 1 and not (tree or as_repr):
        below = sum(module.path.startswith(f"{paths[0]}.") for module in blueprint.modules) if paths[0] else 0
        if below:
            lie, them = ("lies", "it") if below == 1 else ("lie", "them")
            notes.append(
                f"{counted(below, 'module')} {lie} below {paths[0]}: -s {quoted(f'{paths[0]}.**')} shows {them} too"
            )
    style = "tree" if tree else "repr" if as_repr else "table"
    folded = output.is_screen(options) and not expand
    view = documents.modules(target.source.model, blueprint, paths, depth=depth, style=style, folded=folded)
    _show(view, options, found, notes)


def list_builders(
    options: OutputOptions,
    pattern: Annotated[
        str | None, typer.Argument(help="Part of a name, or a pattern: 'resnet*'.", autocompletion=completing.builders)
    ] = None,
) -> None:
    """List the models that have names, with the parameters, mult-adds and weights that their libraries publish.

    modelcli list

    modelcli list 'vit_*'
    """
    from modelcli.commands.list import ListRequest, named_models
    from modelcli.render.documents import list as documents

    output.format_of(options)
    found = named_models(ListRequest(pattern))
    output.show(documents.models(found.models), options, found.notes)


def commands() -> list[Command]:
    functions: dict[str, Callable[..., Any]] = {
        "summary": summary,
        "params": params,
        "modules": modules,
        "list": list_builders,
    }
    return [
        Command(
            name,
            function,
            "Inspect",
            exit_codes(0, 2) if function is list_builders else exit_codes(0, 2, 3, 4, 5),
            shares_work=function is params and (lambda given: given["stats"]),
        )
        for name, function in functions.items()
    ]
