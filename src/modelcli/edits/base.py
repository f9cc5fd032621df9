"""What an edit is: a frozen dataclass that declares its words, its options and what it does to a model.

Everything else takes what it needs from the declaration: the command and its help, completion, lines of recipes and
records, the check before writing, scripts, the README. Nothing outside an edit's own modules asks which edit it is.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import Field, dataclass, fields
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
    """One surgical operation. Fields made by `declaring.option` are options, the others operands."""

    # --- what a command line shows ---------------------------------------------------------------------------------

    #: The first word of its line, the name of its command, and the `action` of its changes.
    name: ClassVar[str]
    #: One sentence for `--help`.
    summary: ClassVar[str]
    #: Command lines that run, for `--help`: they begin with `modelcli`.
    examples: ClassVar[tuple[str, ...]]
    #: What it does, for a table of the README, in Markdown: "puts a new module in place of every match".
    effect: ClassVar[str]
    #: What somebody would write in PyTorch for it, for the same table.
    in_pytorch: ClassVar[str]
    #: The words after the name, in order.
    words: ClassVar[tuple[Operand, ...]]
    #: The group of commands that `modelcli --help` lists it in.
    panel: ClassVar[str] = "Edit"
    #: Names of other programs for the same work, for the hint where somebody tries them as a command.
    also_called: ClassVar[tuple[str, ...]] = ()

    # --- what does the work ----------------------------------------------------------------------------------------

    #: The module that carries it out on a live model and writes its script: see `modelcli.live.surgery`.
    handler: ClassVar[str]

    # --- what others need to know of it (traits) -------------------------------------------------------------------

    #: Whether modules that it does not touch may have other paths afterwards.
    moves_paths: ClassVar[bool] = False
    #: Whether it puts a new module at the path of each of its changes.
    places_module: ClassVar[bool] = False
    #: Whether a new module takes the place of one that was there.
    replaces_module: ClassVar[bool] = False
    #: Whether a model that ran before may not run afterwards: shapes, dtypes or children are others.
    can_break_fit: ClassVar[bool] = True
    #: Whether the model takes another input afterwards than its reference says.
    changes_input: ClassVar[bool] = False
    #: Whether tensors have another dtype afterwards.
    changes_dtype: ClassVar[bool] = False
    #: Whether only values are others afterwards: every name, shape, dtype and flag stays.
    changes_values_only: ClassVar[bool] = False
    #: Whether only `requires_grad` is another afterwards: every name, shape, dtype and value stays.
    changes_flags_only: ClassVar[bool] = False

    @classmethod
    def from_operands(cls, words: Sequence[str]) -> Self:
        """The edit with these words for operands. Raises RequestError where they are too few, or cannot be read."""
        raise NotImplementedError

    def operands(self) -> list[str]:
        """The words after the edit's name, without the options."""
        raise NotImplementedError

    def modules(self) -> tuple[Call, ...]:
        """The module expressions in it, whose names are code that would run: by default every expression."""
        from modelcli.language.expressions import Call

        values = (getattr(self, item.name) for item in fields(self))
        return tuple(value for value in values if isinstance(value, Call))

    @classmethod
    def again(cls, path: str) -> str:
        """The words that put another module at the path of one of its changes: `replace fc`."""
        raise NotImplementedError

    def handler_module(self) -> Any:
        """The module that carries it out where that takes torch."""
        return importlib.import_module(self.handler)

    def apply_to_state_dict(self, model: StateDictModel, context: Context) -> Applied[StateDictModel]:
        """What it makes of a checkpoint of which only the keys are known.

        An edit that needs no torch for it says it here, others in a function of this name in their handler. Raises
        RequestError where it cannot be carried out.
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
        """The fields that are options, by their names on a command line."""
        return {item.metadata["option"].flag: item for item in fields(cls) if "option" in item.metadata}

    @classmethod
    def options(cls) -> tuple[Option, ...]:
        """The options, in the order in which the help shows them."""
        return tuple(item.metadata["option"] for item in cls.option_fields().values())

    def __str__(self) -> str:
        operands = self.operands()
        given: list[str] = []
        for item in self.option_fields().values():
            value = getattr(self, item.name)
            given += [] if value == item.default else item.metadata["option"].words(value)
        ordered = [*given, "--", *operands] if any(map(line_words.looks_like_option, operands)) else [*operands, *given]
        return line_words.joined([self.name, *ordered])
