"""Make the plan for writing a state-dict model: each tensor with the source of its bytes. Does not import torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from modelcli import writing
from modelcli.checkpoints import CompositeEntry, Contents, shapes
from modelcli.model.joined_tensors import Joined
from modelcli.model.paths import ancestors, parent_of
from modelcli.model.state_dict import StateDictModel, StateDictTensor
from modelcli.model.tensors import Shape
from modelcli.values.state_dict_sources import Sources
from modelcli.writing import Plan, PlannedTensor
from modelcli.writing.state_dict import plan_of


def plan(
    model: StateDictModel,
    opened: StateDictModel,
    contents: Contents,
    record: Callable[[list[str]], str],
    kind: str,
    *,
    bare: bool = False,
    compact: bool = False,
    sources: Sources | None = None,
) -> Plan:
    """Return the plan for writing a state-dict model in a format.

    `opened` is the model as it is in the file, and `record` returns the text of the record for the keys in their order.
    `bare` writes only the state dict of a training checkpoint. `compact` writes only the bytes of each storage that
    tensors use.

    Raises RequestError for values that the format cannot store.
    """
    sources = sources or Sources()
    tensors: dict[str, PlannedTensor] = {}
    extras: dict[str, Any] = {}
    names = in_order(model, opened, contents)
    holds_views = writing.holds_views(kind)
    strides: dict[Shape, Shape] = {}  # of the shapes so far: a file may have 100,000 tensors
    for name in names:
        entry = model.entries[name]
        if not isinstance(entry, StateDictTensor):
            _require_writable(name, entry.value)
            extras[name] = entry.value
        elif holds_views:
            storage, shape = sources.of(name, entry), entry.shape or ()
            tensors[name] = PlannedTensor(shape, entry.dtype, entry.stride, entry.offset, storage)
        else:
            # The format stores every tensor separately in row-major order, so the elements of a view are written.
            storage, shape = sources.row_major(name, entry), entry.shape or ()
            if (stride := strides.get(shape)) is None:
                stride = strides[shape] = shapes.row_major(shape)
            tensors[name] = PlannedTensor(shape, entry.dtype, stride, 0, storage)
    return plan_of(
        tensors,
        extras,
        names,
        kind,
        lambda name: sources.row_major(name, model.tensors[name]),
        contents=contents,
        metadata=metadata_of(model, contents),
        record=lambda: record(names),
        bare=bare,
        compact=compact,
    )


def _require_writable(name: str, value: Any) -> None:
    """Raise RequestError if torch has no dtype for a tensor in an entry."""
    if isinstance(value, CompositeEntry):
        from modelcli.checkpoints.torch_pickle.composite_tensors import require_call

        require_call(name, value)
    elif type(value) is dict:
        for item in value.values():
            _require_writable(name, item)
    elif type(value) in (list, tuple):
        for item in value:
            _require_writable(name, item)


def in_order(model: StateDictModel, opened: StateDictModel, contents: Contents) -> list[str]:
    """Return the keys in the order in which they are written: that of the file.

    A renamed key keeps its position. The tensors of a new module come at the position of the first tensor that it
    replaces; a tensor that is made of others comes at the position of the first of them; other new tensors come after
    the tensor before them in their module.
    """
    if not model.inert and (moved := _positions_of_moved(model, opened, contents)) is not None:
        if list(moved.values()) == sorted(moved.values()):  # most edits leave them in the order of the file
            return [name for name in moved if model.tensors[name].persistent]
        return _by_number(sorted(model.keys, key=moved.__getitem__), moved, contents.names)
    positions = {name: position for position, name in enumerate(contents.names)}
    before = {name: tensor.identity for name, tensor in opened.tensors.items()}
    now = {name: tensor.identity for name, tensor in model.tensors.items()}
    renamed: dict[int, list[int]] = {}  # where each tensor was under names that it has no more: a tied one has several
    for name in sorted(before, key=positions.__getitem__):
        if now.get(name) != before[name]:
            renamed.setdefault(before[name], []).append(positions[name])
    for old_positions in renamed.values():
        old_positions.reverse()
    replaced = _positions_of_new(before, now, positions)
    made = _positions_of_made(model, before, positions)
    found: dict[str, tuple[int, ...]] = {}
    last: tuple[int, ...] = (-1,)
    for name in model.keys:
        identity = now.get(name)
        if name in made:
            last = made[name]
        elif identity is not None and before.get(name) == identity:
            last = (positions[name],)
        elif identity is not None and (others := renamed.get(identity)):
            last = (others.pop(),)
        else:
            position = None
            if replaced:
                position = next((replaced[path] for path in ancestors(parent_of(name)) if path in replaced), None)
            if position is None:
                position = positions.get(name)
            last = last if position is None else (position,)
        found[name] = last
    in_file = {name: place[0] for name, place in found.items() if len(place) == 1 and place[0] >= 0}
    return _by_number(sorted(found, key=found.__getitem__), in_file, contents.names)


def _by_number(names: list[str], positions: Mapping[str, int], in_file: Sequence[str]) -> list[str]:
    """Return keys with numbered children in the order of their numbers, as a module has them, where the file had that.

    The keys below a module whose children edits have put into another order change places among themselves.
    `positions` is where the file has the tensors that it has, by their names now, and `in_file` has all its keys.
    """
    holders = _out_of_order(names) - _out_of_order(in_file)
    if holders:
        holders &= _renumbered(names, holders, positions, in_file)
    if not holders:
        return names
    first: dict[str, int] = {}  # where each path begins
    places: dict[str, list[int]] = {}  # of the keys below each outermost of the modules
    keys: dict[int, list[int]] = {}
    for place, name in enumerate(names):
        path, outermost = "", None
        for own in name.split("."):
            if path in holders and outermost is None:
                outermost = path
                keys[place] = []
                places.setdefault(path, []).append(place)
            below = f"{path}.{own}" if path else own
            if outermost is not None:
                begins = first.setdefault(below, place)
                is_number = path in holders and own.isdecimal() and len(own) < 10
                keys[place].append(int(own) if is_number else begins - len(names))
            path = below
    found = list(names)
    for own_places in places.values():
        for place, old in zip(own_places, sorted(own_places, key=keys.__getitem__), strict=True):
            found[place] = names[old]
    return found


def _renumbered(
    names: Iterable[str], holders: Collection[str], positions: Mapping[str, int], in_file: Sequence[str]
) -> set[str]:
    """Return the holders where not every key below has the same name below its holder as in the file."""
    found: set[str] = set()
    for name in names:
        position = positions.get(name)
        old = None if position is None else in_file[position]
        for path in ancestors(parent_of(name)):
            if path in holders and path not in found:
                below = name[len(path) + 1 :] if path else name
                if old is None or (old != below and not old.endswith(f".{below}")):
                    found.add(path)
    return found


def _out_of_order(names: Iterable[str]) -> set[str]:
    """Return the paths whose numbered children are not in the order of their numbers, the children being modules."""
    last: dict[str, int] = {}
    found: set[str] = set()
    for name in names:
        path = ""
        for own in name.split(".")[:-1]:
            if own.isdecimal() and len(own) < 10:
                if int(own) < last.get(path, 0):
                    found.add(path)
                last[path] = int(own)
            path = f"{path}.{own}" if path else own
    return found


def _positions_of_moved(model: StateDictModel, opened: StateDictModel, contents: Contents) -> dict[str, int] | None:
    """Return the position of each tensor if all have one name in the file and one name now; else None."""
    before = opened.tensors
    in_file = {before[name].identity: position for position, name in enumerate(contents.names) if name in before}
    found = [in_file.get(tensor.identity) for tensor in model.tensors.values()]
    known = [position for position in found if position is not None]
    if len(in_file) < len(before) or len(set(known)) < len(found):
        return None
    return dict(zip(model.tensors, known, strict=True))


def _positions_of_made(
    model: StateDictModel, before: Mapping[str, int], positions: Mapping[str, int]
) -> dict[str, tuple[int, ...]]:
    """Return the position of each tensor that is made of others in the file: that of the first, then its number."""
    places = {name: tensor.source.place for name, tensor in model.tensors.items() if isinstance(tensor.source, Joined)}
    if not places:
        return {}
    in_file: dict[int, list[int]] = {}
    for name in sorted(before, key=positions.__getitem__):
        in_file.setdefault(before[name], []).append(positions[name])
    found = {}
    for name, place in places.items():
        if at := in_file.get(place.identity):
            first = positions[place.name] if before.get(place.name) == place.identity else at[0]
            found[name] = (first, *place.numbers)
    return found


def _positions_of_new(
    before: Mapping[str, int], now: Mapping[str, int], positions: Mapping[str, int]
) -> dict[str, int]:
    """Return, for each path all of whose tensors were removed, the position of the first of them in the file."""
    there, known = set(now.values()), set(before.values())
    gone = [name for name, identity in before.items() if identity not in there]
    if not gone:
        return {}
    held = {path for name, identity in now.items() if identity in known for path in ancestors(parent_of(name))}
    first_positions: dict[str, int] = {}
    for name in gone:
        for path in ancestors(parent_of(name)):
            if path not in held:
                first_positions[path] = min(positions[name], first_positions.get(path, positions[name]))
    return first_positions


def metadata_of(model: StateDictModel, contents: Contents) -> dict[str, Any]:
    """Return the `_metadata` of the file, adapted to the edited model: each entry moves with its module.

    The entry of a module without tensors moves with the module above it; a new module of a known type has its own.
    """
    if not contents.metadata:
        return {}
    in_file = {path for name in (*contents.tensors, *contents.extras) for path in ancestors(parent_of(name))}
    new_paths: dict[str, list[str]] = defaultdict(list)
    known: dict[str, Any] = {}
    for path, module in model.modules.items():
        if module.version is not None:
            known[path] = {"version": module.version}
        elif module.origin is not None:
            new_paths[module.origin].append(path)
    found: dict[str, Any] = {path: entry for path, entry in contents.metadata.items() if not path}
    for path, entry in contents.metadata.items():
        above = next((above for above in ancestors(path) if above in in_file), "")
        for new_path in new_paths[above]:
            moved = ".".join(part for part in (new_path, path[len(above) :].removeprefix(".")) if part)
            if above == path or moved not in model.modules:
                found[moved] = entry
    return {name: dict(value) if isinstance(value, dict) else value for name, value in (found | known).items()}


__all__ = ["Sources", "in_order", "metadata_of", "plan"]
