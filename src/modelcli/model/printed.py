"""Make the text of `print(module)` from a blueprint."""

from __future__ import annotations

from itertools import groupby, islice
from operator import itemgetter

from modelcli.model.blueprint import Blueprint, ModuleInfo

#: A line of a printed model: its indentation level and its text.
_Line = tuple[int, str]


def repr_text(blueprint: Blueprint, path: str = "") -> str:
    """Return the text of `print(module)` for the module at `path`, by the rules of `nn.Module.__repr__`.

    `ModuleList` folds runs of equal children (`(0-5): 6 x Block(...)`). A class that overrides `__repr__` keeps its own
    text. The function does not recurse, so deeply nested modules are no problem, and it indents each line once.
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
    """Return the lines of a module, given the name and the lines of each of its children."""
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
    """Return the children together with those that are None, each at its position."""
    entries: list[tuple[str, list[_Line]]] = []
    rest = iter(children)
    for position, name in sorted(module.absent):
        entries += islice(rest, max(position - len(entries), 0))
        entries.append((name, [(0, "None")]))
    return [*entries, *rest]


def _folded(texts: list[list[_Line]]) -> list[tuple[str, list[_Line]]]:
    """Return the entries of a `ModuleList`, with each run of equal children as one entry that states their number."""
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
