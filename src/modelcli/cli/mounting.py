"""Commands that are made when they are asked for: a look at a file pays for its own command, and for no other."""

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

from typer.core import TyperCommand, TyperGroup
from typer.main import get_command_from_info
from typer.models import CommandInfo

from modelcli.cli.options import expanded

#: Where the edits come among the commands.
EDITS = "(edits)"


class ProgramCommand(TyperCommand):
    """A command whose help may say `{suffixes}`: those of all formats, which are asked for when the help is shown."""

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
    """One command: its function, whose docstring is the help, and how `--help` lists it."""

    name: str
    function: Callable[..., Any]
    panel: str | None = None
    epilog: str | None = None
    cls: type[TyperCommand] = ProgramCommand
    context_settings: Mapping[str, Any] = {}

    def built(self) -> Any:
        """The command as Typer runs it."""
        info = CommandInfo(
            name=self.name,
            cls=self.cls,
            context_settings=dict(self.context_settings),
            callback=expanded(self.function),
            epilog=self.epilog,
            rich_help_panel=self.panel,
        )
        return get_command_from_info(info, pretty_exceptions_short=True, rich_markup_mode="rich")

    def listed(self) -> Any:
        """The command as a list of commands shows it: without its arguments and options, which take time to make."""
        help_text = inspect.getdoc(self.function)
        return self.cls(self.name, help=help_text, rich_help_panel=self.panel, rich_markup_mode="rich")


class Group(NamedTuple):
    """A command with commands of its own."""

    name: str
    help: str
    commands: Sequence[Command]
    panel: str | None = None

    def built(self) -> TyperGroup:
        return TyperGroup(
            name=self.name,
            help=self.help,
            commands={command.name: command.built() for command in self.commands},
            no_args_is_help=True,
            rich_help_panel=self.panel,
            rich_markup_mode="rich",
        )

    def listed(self) -> Any:
        """The command as a list of commands shows it."""
        return self.built()


class Commands(MutableMapping[str, Any]):
    """All commands by their names, in the order in which the help lists them; each is built once it is asked for.

    Args:
        files: the module in this package that has each command, by the command's name. The edits, which are not listed
            one by one, come where EDITS is.
        edit_called: makes the command of an edit, by the edit's name; None if there is no such edit.
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
        """A command as a list of commands shows it; None where there is none."""
        made = self._made(name)
        return None if made is None else made.listed()

    def _build(self, name: str) -> Any:
        made = self._made(name)
        if made is None:
            raise KeyError(name)
        return made.built()

    def _made(self, name: str) -> Command | Group | None:
        file = self._files.get(name)
        if file is None:
            return self._edit_called(name)
        found: Sequence[Command | Group] = importlib.import_module(f"modelcli.cli.{file}").commands()
        return next(command for command in found if command.name == name)
