"""Commands that are built when they are first used, so that starting one command does not pay for all the others."""

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

from typer.core import TyperCommand, TyperGroup
from typer.main import get_command_from_info
from typer.models import CommandInfo

from modelcli.cli.options import SharesWork, expanded

#: The entry of `files` that stands for all edits and decides their position in the help.
EDITS = "(edits)"


class ProgramCommand(TyperCommand):
    """A command in whose help `{suffixes}` stands for the suffixes of all formats. Showing the help fills them in."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self._complete_help()
        super().format_help(ctx, formatter)

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        self._complete_help()
        return super().shell_complete(ctx, incomplete)

    def _complete_help(self) -> None:
        for parameter in self.params:
            text = getattr(parameter, "help", None)
            if text and "{suffixes}" in text:
                from modelcli.checkpoints import formats

                parameter.help = text.replace("{suffixes}", formats.written_suffixes())  # type: ignore[attr-defined]


class Command(NamedTuple):
    """The declaration of a command.

    Attributes:
        name: the word on the command line.
        function: the function to call. Its docstring is the help, and its parameters are the arguments and options.
        panel: the title under which `--help` lists the command.
        epilog: the last lines of its help.
        cls: the class of the Typer command.
        context_settings: settings of Typer's context.
        shares_work: whether several ranks share the work out, or a function of the options that says whether they do
            with these. It then has `--jobs`; else rank 0 carries it out alone.
    """

    name: str
    function: Callable[..., Any]
    panel: str | None = None
    epilog: str | None = None
    cls: type[TyperCommand] = ProgramCommand
    context_settings: Mapping[str, Any] = {}
    shares_work: SharesWork = False

    def built(self) -> Any:
        """Return the command with its arguments and options, for Typer to run."""
        info = CommandInfo(
            name=self.name,
            cls=self.cls,
            context_settings=dict(self.context_settings),
            callback=expanded(self.function, shares_work=self.shares_work),
            epilog=self.epilog,
            rich_help_panel=self.panel,
        )
        return get_command_from_info(info, pretty_exceptions_short=True, rich_markup_mode="rich")

    def listed(self) -> Any:
        """Return the command for a list of commands, without its arguments and options, which take time to build."""
        help_text = inspect.getdoc(self.function)
        return self.cls(self.name, help=help_text, rich_help_panel=self.panel, rich_markup_mode="rich")


class Group(NamedTuple):
    """The declaration of a command with subcommands. The attributes are those of `Command`."""

    name: str
    help: str
    commands: Sequence[Command]
    panel: str | None = None

    def built(self) -> TyperGroup:
        """Return the group with its subcommands, for Typer to run."""
        return TyperGroup(
            name=self.name,
            help=self.help,
            commands={command.name: command.built() for command in self.commands},
            no_args_is_help=True,
            rich_help_panel=self.panel,
            rich_markup_mode="rich",
        )

    def listed(self) -> Any:
        """Return the group for a list of commands."""
        return self.built()


class Commands(MutableMapping[str, Any]):
    """All commands by name, in the order in which the help lists them. Each is built when it is first looked up.

    Args:
        files: for each command, the module of this package that declares it. EDITS stands for all edits.
        edit_called: returns the command of an edit by the edit's name, or None if there is no such edit.
    """

    def __init__(self, files: Mapping[str, str], edit_called: Callable[[str], Command | Group | None]) -> None:
        self._files = files
        self._edit_called = edit_called
        self._built: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._built:
            self._built[name] = self._build(name)
        return self._built[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self._built[name] = command

    def __delitem__(self, name: str) -> None:
        del self._built[name]

    def __iter__(self) -> Iterator[str]:
        from modelcli import edits

        for name in self._files:
            if name == EDITS:
                yield from (edit for edit in edits.names() if edit not in self._files)
            else:
                yield name

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def listed(self, name: str) -> Any:
        """Return a command for a list of commands; None if there is no such command."""
        command = self._declaration(name)
        return None if command is None else command.listed()

    def _build(self, name: str) -> Any:
        command = self._declaration(name)
        if command is None:
            raise KeyError(name)
        return command.built()

    def _declaration(self, name: str) -> Command | Group | None:
        file = self._files.get(name)
        if file is None:
            return self._edit_called(name)
        declared: Sequence[Command | Group] = importlib.import_module(f"modelcli.cli.{file}").commands()
        return next(command for command in declared if command.name == name)
