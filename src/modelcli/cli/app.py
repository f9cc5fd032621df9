"""The commands, mounted: what each does stands in the file of its group."""

from typing import Annotated

import typer

from modelcli.cli import cache, compare, files, inspect, operate
from modelcli.cli.options import exit_codes, expanded
from modelcli.errors import RequestError, did_you_mean

app = typer.Typer(
    name="modelcli",
    help="Inspect PyTorch models and operate on them.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="A model is a torchvision builder (alexnet), a module expression ('Linear(2,3)'), a class of your own "
    "(nets.py:Net) or a checkpoint (best.pth).",
)


def _version(wanted: bool) -> None:
    if wanted:
        from modelcli.cli.version import text

        typer.echo(text())
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="Show the versions, and end.")
    ] = False,
) -> None:
    pass


def show_version() -> None:
    """Show the versions of modelcli, torch and torchvision.

    modelcli version

    modelcli version > versions.txt
    """
    _version(True)


def show_help(
    context: typer.Context,
    command: Annotated[list[str] | None, typer.Argument(help="The command to explain.", metavar="[COMMAND]")] = None,
) -> None:
    """Show how modelcli, or one of its commands, is used.

    modelcli help

    modelcli help replace
    """
    parent = context.find_root()
    for name in command or ():
        found = parent.command.get_command(parent, name) if hasattr(parent.command, "get_command") else None
        if found is None:
            names = parent.command.list_commands(parent) if hasattr(parent.command, "list_commands") else []
            hint = did_you_mean(name, names) or "modelcli help lists the commands"
            raise RequestError(f"{parent.command_path} has no command {name!r}", hint)
        parent = type(context)(found, info_name=name, parent=parent)
    typer.echo(parent.get_help())


inspect.mount(app)
operate.mount(app)
files.mount(app)
compare.mount(app)
cache.mount(app)
app.command("help", rich_help_panel="This program", epilog=exit_codes(0, 2))(expanded(show_help))
app.command("version", rich_help_panel="This program", epilog=exit_codes(0, 2))(show_version)
