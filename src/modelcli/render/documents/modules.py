"""The view of `modules`: one row for each module, a tree, or the text of `print(model)`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from modelcli.model.blueprint import Blueprint, ModuleInfo
from modelcli.model.paths import lies_in, shown
from modelcli.model.printed import repr_text
from modelcli.render.documents.common import SCHEMA, TRAINABLE, model_of, totals_document
from modelcli.render.runs import Run, Runs
from modelcli.render.views import (
    Branch,
    Column,
    View,
    count,
    path_column,
)


def modules(
    reference: str,
    blueprint: Blueprint,
    paths: Sequence[str],
    *,
    depth: int | None,
    style: str = "table",
    folded: bool = False,
) -> View:
    """Return the view of some modules.

    Args:
        reference: the reference of the model.
        blueprint: the model.
        paths: the paths of the modules to show.
        depth: the largest depth of a module to show; None for no limit.
        style: `table`, `tree` or `repr`. The last two also show what lies below each path.
        folded: whether a tree has one line for each run of siblings that look the same.
    """
    picked = [blueprint.by_path[path] for path in paths]
    rows = [_module_row(blueprint, module) for module in picked if depth is None or module.depth <= depth]
    totals = totals_document(blueprint.totals)
    document = {"schema": SCHEMA, "model": model_of(reference, blueprint), "modules": rows, "totals": totals}
    body, tree, hidden = None, None, 0
    if style == "tree":
        runs = Runs(blueprint, traced=False) if folded else None
        trees = [_tree(blueprint, path, depth, runs) for path in _outermost(paths)]
        tree = [line for lines, _ in trees for line in lines]
        hidden = sum(count for _, count in trees)
    elif style == "repr":
        body = "\n".join(repr_text(blueprint, path) for path in _outermost(paths))
    columns = (
        path_column("path", "path"),
        Column("type", "type", flexible=True),
        Column("config", "configuration", flexible=True, spare=1),
        Column("params", "params", count, right=True),
        replace(TRAINABLE, spare=2),
    )
    nested = len(picked) == len(blueprint.modules)
    footer = [("Modules", count(len(rows)))]
    return View(document, rows, columns, footer, body=body, tree=tree, nested=nested, folded=hidden)


def _module_row(blueprint: Blueprint, module: ModuleInfo) -> dict[str, Any]:
    return {
        "path": shown(module.path),
        "type": module.type,
        "config": module.config and " ".join(module.config.split()),
        "params": blueprint.params_of(module.path),
        "trainable": blueprint.trainable_of(module.path),
        "shared_with": module.shared_with,
    }


def _outermost(paths: Sequence[str]) -> list[str]:
    """Return the paths that do not lie below another of the paths."""
    found: dict[str, None] = {}
    for path in paths:
        if not lies_in(path, found):
            found[path] = None
    return list(found)


def _tree(blueprint: Blueprint, top: str, depth: int | None, runs: Runs | None) -> tuple[list[Branch], int]:
    """Return a line for each module at and below a path, and how many modules were folded into the line of a run."""
    lines, hidden = [], 0
    # The runs that have no line yet, each with the guide before its label and the guide before its children's labels.
    stack = [(Run(shown(top), shown(top), (top,), blueprint.by_path[top].depth), "", "")]
    while stack:
        run, before, guide = stack.pop()
        lines.append(_branch(blueprint, run, runs, before))
        hidden += len(run.paths) - 1
        if depth is not None and run.depth >= depth:
            continue
        children = _single(blueprint, run) if runs is None else runs.children(run)
        rows = [(child, f"{guide}├── ", f"{guide}│   ") for child in children]
        rows[-1:] = [(child, f"{guide}└── ", f"{guide}    ") for child, _, _ in rows[-1:]]
        stack += reversed(rows)
    return lines, hidden


def _single(blueprint: Blueprint, run: Run) -> list[Run]:
    """Return the children of a module, each as a run of its own."""
    names = [(child.path, child.path.rpartition(".")[2]) for child in blueprint.children.get(run.first, ())]
    return [Run(path, name, (path,), run.depth + 1) for path, name in names]


def _branch(blueprint: Blueprint, run: Run, runs: Runs | None, guide: str) -> Branch:
    """Return the line of a module or run in a tree."""
    module = blueprint.by_path[run.first]
    size = blueprint.params_of(run.first) if runs is None else runs.params_of(run)
    rest = f"  {size:,}" if size else ""
    if module.shared_with is not None:
        rest += f"  (same as {shown(module.shared_with)})"
    if (kind := run.counted(module.type)) is None:
        return Branch(guide, run.name, rest=rest)
    config = "" if module.type is None else f"({' '.join(module.config.split())})"
    return Branch(guide, f"{run.name}  {kind}", config, rest)
