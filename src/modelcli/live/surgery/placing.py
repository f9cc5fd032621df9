"""add, insert, append: a new module where none was."""

from __future__ import annotations

from functools import partial

from torch import nn

from modelcli.edits.add import Add
from modelcli.edits.append import Append
from modelcli.edits.insert import Insert
from modelcli.errors import RequestError
from modelcli.language import selectors
from modelcli.language.quoting import quoted
from modelcli.live.build import Bare
from modelcli.live.describe import describe
from modelcli.live.surgery import numbering
from modelcli.live.surgery.core import (
    Change,
    Context,
    Done,
    are_numbers,
    brief,
    count,
    is_numbered,
    put_children,
    submodule,
)
from modelcli.live.surgery.holes import Placeholder, resolved_calls
from modelcli.live.surgery.new_modules import maker
from modelcli.model.blueprint import Blueprint
from modelcli.model.paths import joined, shown

Children = dict[str, nn.Module | None]


def carry_out(module: nn.Module, edit: Add | Insert | Append, context: Context) -> Done:
    """Put a placeholder at the place first, so that a forward pass can tell what flows in there."""
    blueprint = describe(module)
    place = Placeholder()
    path, name = _holder_and_name(blueprint, edit)
    holder = submodule(module, path)
    match edit:
        case Add():
            _require_free(holder, path, name)
            vars(holder).pop(name, None)  # `self.downsample = None` keeps the place for a child
            children = {**holder._modules, name: place}
        case Insert():
            name, children = _inserted(holder, path, name, place, renumber=edit.renumber)
        case Append():
            name, children = _appended(holder, path, place)
    put_children(holder, children)
    place.train(holder.training)
    there = joined(path, name)
    (call,) = resolved_calls(module, edit.module, [(place, there)], context)
    (new,) = maker(module, [call], context, [(place, there)])()
    holder._modules[name] = new
    kept: dict[str, bool] = {"renumber": edit.renumber} if isinstance(edit, Insert) else {}
    target = path if isinstance(edit, Append) else there
    line = str(type(edit)(path=selectors.literal(target), module=call, **kept))
    return Done(module, [Change(there, edit.name, "", brief(new), 0, count(new), (line,))], inputs=context.inputs)


def _holder_and_name(blueprint: Blueprint, edit: Add | Insert | Append) -> tuple[str, str]:
    """The path of the module that gets a child, and the name that the edit gives it; none for one at the end."""
    if isinstance(edit, Append):
        return selectors.select_one(blueprint, edit.path, edit.name), ""
    selector = selectors.parse(edit.path)
    if selector.type is not None:
        raise RequestError(f"{edit.name} takes a path, and {edit.path!r} asks for a type", "write the path out")
    *above, own = selector.components or ("",)
    if isinstance(edit, Add) and (name := selectors.plain(own)) is None:
        raise RequestError(f"add takes a name for the new module, and {own!r} is a pattern", "write the name out")
    if isinstance(edit, Insert):
        name = own
    if not name:
        raise RequestError(f"{edit.name} takes the path of a new module, not of the model itself", edit.example_line())
    return selectors.select_one(blueprint, ".".join(above) or ".", edit.name), name


# --- add -----------------------------------------------------------------------------------------------------------


def _require_free(holder: nn.Module, path: str, name: str) -> None:
    """Raise RequestError where the module has something of this name, or could not be called by it."""
    there = joined(path, name)
    if (child := holder._modules.get(name)) is not None:
        raise RequestError(
            f"{there} is there already: {brief(child)}", f"replace {quoted(there)} puts another module in its place"
        )
    if name in holder._parameters or name in holder._buffers:
        raise RequestError(f"{there} is a tensor, and no child can have its name", "add takes a name that is free")
    if not isinstance(holder, Bare) and getattr(holder, name, None) is not None:
        raise RequestError(
            f"{type(holder).__name__} has something else called {name}: no child can have that name",
            "add takes a name that is free",
        )


# --- insert, append ------------------------------------------------------------------------------------------------


def _inserted(holder: nn.Module, path: str, word: str, new: nn.Module, *, renumber: bool) -> tuple[str, Children]:
    """The children with a new one before a position, and its name: the later ones move up."""
    where = f"{shown(path)} {_what(holder)}"
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


def _appended(holder: nn.Module, path: str, new: nn.Module) -> tuple[str, Children]:
    """The children with a new one at the end, called by their number, as PyTorch's own `append` does."""
    name = str(len(holder._modules))
    if isinstance(holder, Bare) or not isinstance(holder, nn.Sequential | nn.ModuleList):
        raise RequestError(
            f"append takes a Sequential or ModuleList, and {shown(path)} {_what(holder)} is none",
            f"add {quoted(joined(path, 'NAME'))} MODULE puts a child with a name at the end",
        )
    if name in holder._modules:
        raise RequestError(
            f"{shown(path)} has {name} children, and one of them is called {name} already",
            f"add {quoted(joined(path, 'NAME'))} MODULE puts a child with another name at the end",
        )
    return name, {**holder._modules, name: new}


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


def _what(holder: nn.Module) -> str:
    return "(of unknown type)" if isinstance(holder, Bare) else type(holder).__name__
