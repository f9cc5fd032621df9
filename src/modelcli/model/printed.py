"""The text that `print(module)` gives, from a blueprint."""

from __future__ import annotations

from itertools import groupby, islice
from operator import itemgetter

from modelcli.model.blueprint import Blueprint, ModuleInfo

#: A line of a printed model: how deep it is indented, and what stands in it.
_Line = tuple[int, str]


def repr_text(blueprint: Blueprint, path: str = "") -> str:
    """The text that `print(module)` gives, built from the blueprint by the rules of `nn.Module.__repr__`.

    `ModuleList` folds runs of equal children (`(0-5): 6 x Block(...)`); a class that prints itself in its own way has
    its own text. However deep the modules lie in one another, nothing recurses, and each line is indented once.
    """
    printed: dict[str, list[_Line]] = {}
    stack = [path]
    while stack:
        module = blueprint.by_path[stack[-1]]
        children = () if module.own_repr is not None else blueprint.children.get(module.path, ())
        missing = [child.path for child in children if child.path not in printed]
        if missing:
            stack += missing
        else:
            printed[stack.pop()] = _lines(module, [(_own_name(child), printed.pop(child.path)) for child in children])
    return "\n".join("  " * level + text for level, text in printed[path])


def _own_name(module: ModuleInfo) -> str:
    return module.path.rpartition(".")[2]


def _lines(module: ModuleInfo, children: list[tuple[str, list[_Line]]]) -> list[_Line]:
    """A printed module, from the name and the lines of each of its children."""
    if module.own_repr is not None:
        return [(0, line) for line in module.own_repr.split("\n")]
    if "ModuleList" in module.bases:
        extra, entries = [], _folded([lines for _, lines in children])
    else:
        extra, entries = module.config.split("\n") if module.config else [], _with_absent(module, children)
    if not entries and len(extra) < 2:
        return [(0, f"{module.type}({''.join(extra)})")]
    below = [(1, line) for line in extra]
    for name, lines in entries:
        (_, first), *rest = lines
        below.append((1, f"({name}): {first}"))
        below += [(level + 1, text) for level, text in rest]
    return [(0, f"{module.type}("), *below, (0, ")")]


def _with_absent(module: ModuleInfo, children: list[tuple[str, list[_Line]]]) -> list[tuple[str, list[_Line]]]:
    """The children with those that are None between them, each at its position."""
    entries: list[tuple[str, list[_Line]]] = []
    rest = iter(children)
    for position, name in sorted(module.absent):
        entries += islice(rest, max(position - len(entries), 0))
        entries.append((name, [(0, "None")]))
    return [*entries, *rest]


def _folded(texts: list[list[_Line]]) -> list[tuple[str, list[_Line]]]:
    """The entries of a `ModuleList`: runs of equal ones are one entry, which says how many they are."""
    entries: list[tuple[str, list[_Line]]] = []
    for _, run in groupby(enumerate(texts), key=itemgetter(1)):
        numbers = [number for number, _ in run]
        first, last = numbers[0], numbers[-1]
        (level, text), *rest = texts[first]
        if first == last:
            entries.append((str(first), texts[first]))
        else:
            entries.append((f"{first}-{last}", [(level, f"{last - first + 1} x {text}"), *rest]))
    return entries
