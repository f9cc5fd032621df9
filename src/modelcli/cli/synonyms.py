"""The names that other programs use for modelcli's commands, for the hint of a command that does not exist."""

from __future__ import annotations

from collections.abc import Sequence

from modelcli.language.quoting import command

#: For each word that users may try, the command that does the same. Edits declare such words themselves.
COMMANDS = {
    **dict.fromkeys(("show", "info", "inspect", "describe", "view", "stat"), "summary"),
    **dict.fromkeys(("print", "layers", "tree"), "modules"),
    **dict.fromkeys(("tensors", "weights", "keys", "ls"), "params"),
    **dict.fromkeys(("models", "builders", "zoo"), "list"),
    **dict.fromkeys(("compare", "cmp"), "diff"),
    **dict.fromkeys(("assert", "test", "validate", "verify"), "check"),
    **dict.fromkeys(("open", "new", "start"), "load"),
    **dict.fromkeys(("digest", "checksum", "fingerprint", "sha256sum"), "hash"),
    "history": "log",
    "revert": "undo",
}
#: Words for what `save` does: convert a file to the format that the name of another file says.
COPYING = ("convert", "cp", "copy", "export", "write")


def meant(words: Sequence[str]) -> str | None:
    """Return the modelcli command that does what these words of another program do; None if there is none."""
    word, *rest = words
    if word == "strip":
        return "modelcli rename 'module.**' '**' -m IN.pth -o OUT.pth"
    if word in COPYING:
        files = rest if len(rest) == 2 and not any(file.startswith("-") for file in rest) else ["IN.pth", "OUT.pth"]
        return command(["modelcli", "save", files[1], "-m", files[0]])
    name = COMMANDS.get(word) or _edit_also_called(word)
    return None if name is None else command(["modelcli", name, *rest])


def _edit_also_called(word: str) -> str | None:
    """Return the edit that other programs call by this word; None if there is none."""
    from modelcli import edits

    return next((kind.name for kind in edits.usable() if word in kind.also_called), None)
