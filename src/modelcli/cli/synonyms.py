"""What other programs call the commands: the line that was meant, for the hint of a command that does not exist."""

from __future__ import annotations

from collections.abc import Sequence

from modelcli.language.quoting import command

#: A command that does the same, by the words that are tried for it. The edits say themselves what else they are called.
COMMANDS = {
    **dict.fromkeys(("show", "info", "inspect", "describe", "view", "stat"), "summary"),
    **dict.fromkeys(("print", "layers", "tree"), "modules"),
    **dict.fromkeys(("tensors", "weights", "keys", "ls"), "params"),
    **dict.fromkeys(("models", "builders", "zoo"), "list"),
    **dict.fromkeys(("compare", "cmp"), "diff"),
    **dict.fromkeys(("assert", "test", "validate", "verify"), "check"),
    **dict.fromkeys(("open", "new", "start"), "load"),
    "history": "log",
    "revert": "undo",
}
#: Words for what `save` does: from one file to another, in the format of the second one's name.
COPYING = ("convert", "cp", "copy", "export", "write")


def meant(words: Sequence[str]) -> str | None:
    """The command line that another program's words may stand for; None where they stand for none."""
    word, *rest = words
    if word == "strip":
        return "modelcli rename 'module.**' '**' -m IN.pth -o OUT.pth"
    if word in COPYING:
        files = rest if len(rest) == 2 and not any(file.startswith("-") for file in rest) else ["IN.pth", "OUT.pth"]
        return command(["modelcli", "save", files[1], "-m", files[0]])
    name = COMMANDS.get(word) or _edit_also_called(word)
    return None if name is None else command(["modelcli", name, *rest])


def _edit_also_called(word: str) -> str | None:
    """The edit that other programs call so."""
    from modelcli import edits

    return next((kind.name for kind in edits.usable() if word in kind.also_called), None)
