"""insert: a new module before a position of a sequence."""

from __future__ import annotations

from functools import partial

from torch import nn

from modelcli.edits.applied import Applied, Context
from modelcli.edits.insert import Insert
from modelcli.edits.picking import are_numbers
from modelcli.errors import RequestError
from modelcli.language import selectors
from modelcli.language.quoting import quoted
from modelcli.live.build import Bare
from modelcli.live.describe import describe
from modelcli.live.script import access_paths
from modelcli.live.script.new_modules import new_statements, own_names
from modelcli.live.script.source_text import InexpressibleError
from modelcli.live.script.state import State, moved
from modelcli.live.script.step import Step
from modelcli.live.surgery import numbering
from modelcli.live.surgery.core import blueprint_of, is_numbered, submodule
from modelcli.live.surgery.placing import Children, holder_and_name, kind_of, new_child, put_new
from modelcli.model.paths import joined, shown


def carry_out(module: nn.Module, edit: Insert, context: Context) -> Applied[nn.Module]:
    path, word = holder_and_name(blueprint_of(module, context), edit)

    def arranged(holder: nn.Module, new: nn.Module) -> tuple[str, Children]:
        return _inserted(holder, path, word, new, renumber=edit.renumber)

    return put_new(module, edit, context, path, arranged)


def _inserted(holder: nn.Module, path: str, word: str, new: nn.Module, *, renumber: bool) -> tuple[str, Children]:
    """The children with a new one before a position, and its name: the later ones move up."""
    where = f"{shown(path)} {kind_of(holder)}"
    if isinstance(holder, Bare):
        _require_numbers(holder, path, renumber)
    elif not is_numbered(holder):
        raise RequestError(
            f"insert takes a place in a Sequential or ModuleList with children 0 to n-1, and {where} is none",
            f"add {quoted(joined(path, 'NAME'))} MODULE puts a child with a name at the end",
        )
    size = len(numbering.numbers_in(holder)) if isinstance(holder, Bare) else len(holder._modules)
    position = _position(word, size)
    if isinstance(holder, Bare) and word.startswith("-") and position is not None and position >= 0:
        position = sorted(numbering.numbers_in(holder))[position]  # its numbers have gaps
    if position is None or (position > size and not isinstance(holder, Bare)) or position < 0:
        last = (
            f"insert {quoted(joined(path, str(size)))}" if isinstance(holder, Bare) else f"append {quoted(shown(path))}"
        )
        raise RequestError(
            f"{word!r} is no position in {where}, whose children are 0 to {size - 1}"
            if size
            else f"{word!r} is no position in {where}, which has no children yet",
            f"insert {quoted(joined(path, '0'))} puts it first, {last} last",
        )
    moved = partial(_moved_up, position)
    if isinstance(holder, Bare):
        numbering.renumber(holder, moved)
        return str(position), _in_order({**holder._modules, str(position): new})
    children: Children = {str(moved(int(name))): child for name, child in holder._modules.items()}
    return str(position), _in_order({**children, str(position): new})


def _moved_up(position: int, number: int) -> int:
    return number + (number >= position)


def _position(word: str, size: int) -> int | None:
    """The number that a word means: `-1` is the place before the last child."""
    digits = word.removeprefix("-")
    if not (digits.isascii() and digits.isdigit()) or len(digits) > 9:
        return None
    return int(word) + (size if word.startswith("-") else 0)


def _in_order(children: Children) -> Children:
    return dict(sorted(children.items(), key=lambda item: int(item[0])))


def _require_numbers(holder: Bare, path: str, renumber: bool) -> None:
    """Raise RequestError where the children of a module of unknown type cannot be, or are not said to be, in order."""
    if not are_numbers(holder._modules):
        raise RequestError(
            f"insert takes a place among numbered children, and those of {shown(path)} have names",
            f"add {quoted(joined(path, 'NAME'))} MODULE puts a child with a name at the end",
        )
    if not renumber:
        raise RequestError(
            f"nothing in the file says that the children of {shown(path)} are a sequence",
            "--renumber says so, and moves the later ones up; add takes a name that is free",
        )


# --- scripts ---------------------------------------------------------------------------------------------------------


def script_lines(edit: Insert, step: Step) -> list[str]:
    above, own = holder_and_name(describe(step.before), edit)
    path = joined(above, selectors.plain(own) or own)
    before, text = new_child(edit.module, step, path)
    if not is_numbered(submodule(step.before, above)):
        raise InexpressibleError(f"{above or 'the model'} is no sequence with children 0, 1, 2")
    return [*before, *access_paths.insert(step.before, path, text)]


def state_dict_script_lines(edit: Insert, step: Step, state: State) -> list[str]:
    above, _, position = edit.path.rpartition(".")
    (holder,) = selectors.select_modules(describe(step.before), [above or "."])
    names = list(step.before.state_dict())
    shifted = moved(names, holder, lambda number: number + (number >= int(position)), state)
    path = joined(holder, position)
    lines = new_statements(step.script, edit.module, path, step.after, step.seed)
    return [*shifted, *lines, *state.put(f"{path}.", own_names(step.after, path))]
