"""Generate the tables of the README from the declarations of the edits. `make readme` writes them."""

from __future__ import annotations

import re
from pathlib import Path

from modelcli import edits
from modelcli.edits import Edit

README = Path(__file__).parents[2] / "README.md"
_MARKED = re.compile(r"(<!-- (edits|options of edits): made by `make readme` -->\n).*?(<!-- end -->\n)", re.DOTALL)


def with_tables(text: str) -> str:
    """Return a text with each table between its two marks generated anew."""
    made = {"edits": table_of_edits(), "options of edits": table_of_options()}
    return _MARKED.sub(lambda found: f"{found[1]}\n{made[found[2]]}\n{found[3]}", text)


def table_of_edits() -> str:
    rows = [f"| `{words_of(kind)}` | {kind.effect} | {kind.in_pytorch} |\n" for kind in own()]
    return "| edit | does | in PyTorch |\n| --- | --- | --- |\n" + "".join(rows)


def table_of_options() -> str:
    """Return the table of the options that edits declare, with the edits that have each."""
    found: dict[str, tuple[str, list[str]]] = {}
    for kind in own():
        for option in kind.options():
            metavar = option.metavar or ""
            space = " " if metavar and option.kind.bare is None else ""
            shown = f"{option.flag}{space}{metavar}".replace("|", r"\|")
            default = f" (default {option.default})" if option.default else ""
            found.setdefault(f"`{shown}`", (option.help.removesuffix(".") + default, []))[1].append(f"`{kind.name}`")
    rows = [f"| {shown} | {', '.join(names)} | {text} |\n" for shown, (text, names) in found.items()]
    return "| option | of | means |\n| --- | --- | --- |\n" + "".join(rows)


def own() -> list[type[Edit]]:
    """Return the edits that are part of modelcli."""
    return [kind for name in edits.own_names() if (kind := edits.find(name)) is not None]


def words_of(kind: type[Edit]) -> str:
    """Return how an edit is written: `replace TARGET MODULE...`."""
    return " ".join([kind.name, *(operand.metavar or operand.name.upper() for operand in kind.words)])


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
