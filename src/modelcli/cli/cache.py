"""The commands cache path, cache clear and cache warm, for the blueprints that are cached on disk."""

from typing import Annotated

import typer

from modelcli.cli import completing, output, progress
from modelcli.cli.mounting import Command, Group
from modelcli.cli.options import OutputOptions, exit_codes
from modelcli.wording import counted


def path(options: OutputOptions) -> None:
    """Show the folder of the cached blueprints, their number and their size.

    modelcli cache path

    modelcli cache path --json
    """
    from modelcli.commands import cache as caching
    from modelcli.render.documents import cache as documents

    kind, found = output.format_of(options), caching.state()
    if kind == "table" and not output.is_terminal():
        output.write(f"{found.folder}\n")  # for use in a shell: rm -r "$(modelcli cache path)"
    else:
        output.show(documents.cache(found), options)


def clear(options: OutputOptions) -> None:
    """Remove every cached blueprint.

    modelcli cache clear

    modelcli cache clear --quiet
    """
    from modelcli.commands import cache as caching
    from modelcli.render.documents import cache as documents

    output.format_of(options)
    note = f"removed {counted(caching.clear(), 'entry', 'entries')}"
    output.show(documents.cache(caching.state()), options, [note])


def warm(
    options: OutputOptions,
    pattern: Annotated[
        str | None, typer.Argument(help="Part of a name, or a pattern: 'resnet*'.", autocompletion=completing.builders)
    ] = None,
) -> None:
    """Cache the blueprints of all named models, or of those that match, so that showing them needs no torch.

    modelcli cache warm alexnet

    modelcli cache warm 'squeezenet*'
    """
    from modelcli.commands import cache as caching

    output.format_of(options)
    caching.warm(caching.WarmRequest(pattern), lambda names: progress.of_names(names, options))
    path(options)


def commands() -> list[Group]:
    parts = [
        Command(name, f, epilog=exit_codes(0, 2, 5)) for name, f in (("path", path), ("clear", clear), ("warm", warm))
    ]
    return [Group("cache", "Manage the blueprints of installed models that are cached on disk.", parts, "Inspect")]
