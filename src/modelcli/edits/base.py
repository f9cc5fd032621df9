"""The base class of edits: a frozen dataclass that declares its words, its options and what it does to a model.

The command and its help, completion, lines of recipes and records, the check before writing, scripts and the README
are made from the declaration. Only an edit's own modules know which edit it is.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from modelcli.edits import words as line_words
from modelcli.edits.declaring import Operand, Option
from modelcli.errors import RequestError

if TYPE_CHECKING:
    from modelcli.edits.applied import Applied, Context
    from modelcli.language.expressions import Call
    from modelcli.model.state_dict import StateDictModel


@dataclass(frozen=True)
class Edit:
    """One operation on a model. Fields made by `declaring.option` are options, the other fields are operands."""

    # --- what a command line shows ---------------------------------------------------------------------------------

    #: The first word of its line, the name of its command, and the `action` of its changes.
    name: ClassVar[str]
    #: One sentence for `--help`.
    summary: ClassVar[str]
    #: Command lines that run, for `--help`: they begin with `modelcli`.
    examples: ClassVar[tuple[str, ...]]
    #: What it does, in Markdown, for a table of the README: "replaces every match with a new module".
    effect: ClassVar[str]
    #: The equivalent in PyTorch, for the same table.
    in_pytorch: ClassVar[str]
    #: The words after the name, in order.
    words: ClassVar[tuple[Operand, ...]]
    #: The group of commands that `modelcli --help` lists it in.
    panel: ClassVar[str] = "Edit"
    #: What other programs call it, for the hint if a user tries that name as a command.
    also_called: ClassVar[tuple[str, ...]] = ()

    # --- the handler -----------------------------------------------------------------------------------------------

    #: The module that applies it to a live model and writes its script: see `modelcli.live.surgery`.
    handler: ClassVar[str]

    # --- its traits ------------------------------------------------------------------------------------------------

    #: Whether it may change the paths of modules that it does not touch.
    moves_paths: ClassVar[bool] = False
    #: Whether it puts a new module at the path of each of its changes.
    places_module: ClassVar[bool] = False
    #: Whether a new module replaces an old one.
    replaces_module: ClassVar[bool] = False
    #: Whether the model may fail to run afterwards, because shapes, dtypes or children change.
    can_break_fit: ClassVar[bool] = True
    #: Whether the edited model takes another input than its reference.
    changes_input: ClassVar[bool] = False
    #: Whether it changes dtypes.
    changes_dtype: ClassVar[bool] = False
    #: Whether it changes only values: no name, shape, dtype or flag.
    changes_values_only: ClassVar[bool] = False
    #: Whether it changes only `requires_grad`: no name, shape, dtype or value.
    changes_flags_only: ClassVar[bool] = False
    #: Whether it takes values from another model or file. Opening the written file then does not repeat the edit: the
    #: file has the values, and a record opens no other file.
    reads_models: ClassVar[bool] = False

    @classmethod
    def from_operands(cls, words: Sequence[str]) -> Self:
        """Return the edit with these operands. Raises RequestError if there are too few, or one cannot be read."""
        raise NotImplementedError

    def operands(self) -> list[str]:
        """Return the words after the edit's name, without the options."""
        raise NotImplementedError

    def modules(self) -> tuple[Call, ...]:
        """Return the module expressions in it, whose classes would run: by default every expression."""
        from modelcli.language.expressions import Call

        values = (getattr(self, item.name) for item in fields(self))
        return tuple(value for value in values if isinstance(value, Call))

    def with_module(self, module: Call) -> Self:
        """Return the edit with another module in the place of its one module expression."""
        from modelcli.language.expressions import Call

        (name,) = (item.name for item in fields(self) if isinstance(getattr(self, item.name), Call))
        changed: dict[str, Any] = {name: module}
        return replace(self, **changed)

    def all_words(self) -> list[str]:
        """Return the words of its line, as a shell gets them: the name, the operands, the options."""
        return line_words.split_words(str(self))

    def references(self) -> tuple[str, ...]:
        """Return the texts in it that name other models, each `SOURCE` or `SOURCE:PATH`; by default none."""
        return ()

    def with_paths(self, seen: Callable[[str], str]) -> Self:
        """Return the edit with other relative paths of files, as `seen` gives them; by default it has none.

        The paths of an edit are relative to the current folder, those of its line in a recipe to the recipe's folder.
        """
        return self

    def handler_module(self) -> Any:
        """Import and return its handler, which needs torch."""
        return importlib.import_module(self.handler)

    def apply_to_state_dict(self, model: StateDictModel, context: Context) -> Applied[StateDictModel]:
        """Apply it to a state-dict model.

        An edit that needs no torch for this overrides the method; others have a function of this name in their handler.
        Raises RequestError if the edit cannot be applied.
        """
        carry_out = getattr(self.handler_module(), "apply_to_state_dict", None)
        if carry_out is None:
            raise RequestError(
                f"{self.name} needs the classes of the modules, but the file records no architecture",
                "--arch names it",
            )
        made: Applied[StateDictModel] = carry_out(self, model, context)
        return made

    @classmethod
    def option_fields(cls) -> dict[str, Field[Any]]:
        """Return the fields that are options, by their names on the command line."""
        return {item.metadata["option"].flag: item for item in fields(cls) if "option" in item.metadata}

    @classmethod
    def options(cls) -> tuple[Option, ...]:
        """Return the options, in the order in which the help shows them."""
        return tuple(item.metadata["option"] for item in cls.option_fields().values())

    def __str__(self) -> str:
        operands = self.operands()
        given: list[str] = []
        for item in self.option_fields().values():
            value = getattr(self, item.name)
            given += [] if value == item.default else item.metadata["option"].words(value)
        ordered = [*given, "--", *operands] if any(map(line_words.looks_like_option, operands)) else [*operands, *given]
        return line_words.joined([self.name, *ordered])
