"""The program: which module declares each command, and the commands about the program itself."""

import contextlib
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from modelcli.cli.mounting import EDITS, Command, Commands
from modelcli.cli.options import exit_codes
from modelcli.errors import RequestError, did_you_mean

#: The module that declares each command, in the order in which the help lists them. EDITS stands for all edits.
COMMANDS = {
    **dict.fromkeys(("summary", "params", "modules", "list"), "inspect"),
    "report": "report",
    "memory": "memory",
    "adapt": "adapt",
    EDITS: "edit_commands",
    **dict.fromkeys(("script", "apply"), "apply"),
    **dict.fromkeys(("load", "save", "log", "undo"), "files"),
    **dict.fromkeys(("diff", "check", "identify"), "compare"),
    "hash": "content_hash",
    "cache": "cache",
    **dict.fromkeys(("help", "version"), "app"),
}


def _edit_called(name: str) -> Command | None:
    """Return the command of an edit; None if there is no such edit."""
    from modelcli.cli import edit_commands

    return edit_commands.command_called(name)


class _Program(TyperGroup):
    """The program. Its commands, and the last line of its help, are built when they are needed."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = self._commands = Commands(COMMANDS, _edit_called)
        self._is_listing = False

    def list_commands(self, _context: Any) -> list[str]:
        return list(self.commands)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return self._commands.listed(cmd_name) if self._is_listing else super().get_command(ctx, cmd_name)

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        with self._listing():
            return super().shell_complete(ctx, incomplete)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help as Typer does. All providers, those of other packages too, say what a model may be."""
        from modelcli import providers

        others = [f"a model of the plug-in {prefix} ({prefix}:NAME)" for prefix in providers.plug_ins()]
        self.epilog = f"A model is {', '.join((*providers.titles(), *others))} or a checkpoint (best.pth)."
        with self._listing():
            super().format_help(ctx, formatter)

    @contextlib.contextmanager
    def _listing(self) -> Iterator[None]:
        """While this context is open, look commands up without their options, which take time to build."""
        self._is_listing = True
        try:
            yield
        finally:
            self._is_listing = False


app = typer.Typer(
    name="modelcli",
    cls=_Program,
    help="Inspect and edit PyTorch models.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from modelcli.cli.version import text

        typer.echo(text())
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="Show the versions and exit.")
    ] = False,
) -> None:
    pass


def show_version() -> None:
    """Show the versions of modelcli, torch and the other libraries that its models come from.

    modelcli version

    modelcli version > versions.txt
    """
    _version(True)


def show_help(
    context: typer.Context,
    command: Annotated[list[str] | None, typer.Argument(help="The command to explain.", metavar="[COMMAND]")] = None,
) -> None:
    """Show the help of modelcli, or of one of its commands.

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


def commands() -> list[Command]:
    panel, codes = "This program", exit_codes(0, 2)
    return [Command("help", show_help, panel, codes), Command("version", show_version, panel, codes)]
