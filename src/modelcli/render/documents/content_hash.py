"""The view of `hash`: a line for each model, or a tree of the hashes of modules and tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from modelcli.render.documents.common import SCHEMA
from modelcli.render.views import Branch, Column, View, count, megabytes, path_column
from modelcli.render.writers import safe

if TYPE_CHECKING:
    from modelcli.commands.content_hash import HashResult
    from modelcli.values.content_hash import ModuleHash

#: How many hexadecimal digits a line of a tree shows.
_DIGITS = 16


def hashes(results: Sequence[HashResult]) -> View:
    """Return the view of the hashes of models, one in each line, as `sha256sum` shows files."""
    rows = [{"hash": result.digest, "model": result.model} for result in results]
    entries = [_entry(result) for result in results]
    document = {"schema": SCHEMA, **entries[0]} if len(entries) == 1 else {"schema": SCHEMA, "models": entries}
    body = "\n".join(f"{row['hash']}  {safe(row['model'])}" for row in rows)
    return View(document, rows, (Column("hash", "hash"), path_column("model", "model")), body=body)


def _entry(result: HashResult) -> dict[str, Any]:
    from modelcli.values.content_hash import SCHEME

    return {
        "model": {"reference": result.model, "class": result.class_name},
        "scheme": SCHEME,
        "hash": result.digest,
        "tensors": len(result.tensors),
        "bytes": sum(result.nbytes.values()),
    }


def tree(result: HashResult, modules: Mapping[str, ModuleHash], *, depth: int | None) -> View:
    """Return the view of the hashes of a model's modules and tensors.

    Args:
        result: the hash of the model.
        modules: the hashes of its modules by path, the model itself under `""`.
        depth: the largest depth of a module or tensor to show; None for no limit.
    """
    rows: list[dict[str, Any]] = []
    lines: list[Branch] = []
    for path, name, is_module, before in _walked(result.tensors, modules, depth):
        if is_module:
            found = modules[path]
            digest, tensors, nbytes = found.digest, found.tensors, found.nbytes
        else:
            digest, tensors, nbytes = result.tensors[path], 1, result.nbytes[path]
        hexadecimal = digest.hex()
        kind = "module" if is_module else "tensor"
        row = {"path": path or "." if is_module else path, "kind": kind, "hash": f"sha256:{hexadecimal}"}
        rows.append(row | {"tensors": tensors, "bytes": nbytes})
        shown = hexadecimal[:_DIGITS] if rows[1:] else row["hash"]
        lines.append(Branch(before, name, rest=f"  {shown}"))
    columns = (
        path_column("path", "path"),
        Column("kind", "kind"),
        Column("hash", "hash"),
        Column("tensors", "tensors", count, right=True),
        Column("bytes", "bytes", megabytes, right=True),
    )
    document = {"schema": SCHEMA, **_entry(result), "tree": rows}
    return View(document, rows, columns, tree=lines)


def _walked(
    tensors: Mapping[str, bytes], modules: Mapping[str, ModuleHash], depth: int | None
) -> Iterator[tuple[str, str, bool, str]]:
    """Yield the path, the own name, whether it is a module, and the guide of each line, from the model down."""
    from modelcli.model.state_dict import split_key

    children: dict[str, list[tuple[str, str, bool]]] = {path: [] for path in modules}
    for paths, is_module in ((modules, True), (tensors, False)):
        for path in paths:
            if path or not is_module:
                above, own = split_key(path)
                children[above].append((path, own, is_module))
    stack = [("", ".", True, "", "", 0)]
    while stack:
        path, name, is_module, before, guide, level = stack.pop()
        yield path, name, is_module, before
        if not is_module or level == depth:
            continue
        below = sorted(children[path], key=_place)
        rows = [(*child, f"{guide}├── ", f"{guide}│   ", level + 1) for child in below]
        rows[-1:] = [(*child, f"{guide}└── ", f"{guide}    ", level + 1) for child in below[-1:]]
        stack += reversed(rows)


def _place(child: tuple[str, str, bool]) -> tuple[bool, int, str, bool]:
    """Return the sort key of a line: numbers in their order, then names; it does not depend on the order in a file."""
    name = child[1]
    is_number = name.isascii() and name.isdigit() and len(name) < 19
    return not is_number, int(name) if is_number else 0, name, child[2]
