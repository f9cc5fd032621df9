"""Read `SOURCE[:PATH]`: a reference of a model, and a part of that model behind a colon.

Colons occur in references themselves (`timm:resnet50`, `nets.py:Net`, `C:\\best.pth`), and in names of files. The first
of these rules that matches decides:

1. the whole text is an existing file or folder: no part;
2. the text up to a colon, the last one first, is an existing file or folder: the rest is the part;
3. a builder or a module expression: the part comes after its first colon (`resnet50:layer4`);
4. `PREFIX:NAME`, `file.py:Class(...)` or `module:Class(...)`: the part comes after the second colon;
5. a file that does not exist: the part comes after the last colon.

Colons in parentheses and those of drives do not count. A colon at the end names the whole model.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from modelcli import providers, resolve
from modelcli.checkpoints import formats
from modelcli.errors import ModelcliError, RequestError
from modelcli.language.references import MAX_PATH, CheckpointFile, PythonObject, exists


def split(text: str, folder: Path | None = None) -> tuple[str, str]:
    """Split `SOURCE[:PATH]` into the reference and the selector of the part, which is empty for the whole model.

    Args:
        text: the text.
        folder: relative paths start here; None for the current folder.

    Raises RequestError for a text without a reference.
    """
    base = folder or Path()
    if not text.strip() or text.startswith(":"):
        raise RequestError(f"{text!r} names no model", "name one: best.pth, best.pth:layer4, timm:resnet50:layer4")
    if exists(base / text) and not text.endswith(".py"):
        return text, ""
    colons = _colons(text)
    for at in reversed([at for at in colons if at < MAX_PATH]):
        if _is_file(text[:at], base):
            return text[:at], text[at + 1 :]
    end = _end_of_reference(text, colons)
    return (text, "") if end is None else (text[:end], text[end + 1 :])


def _colons(text: str) -> list[int]:
    """Return the positions of the colons that are neither in parentheses or quotes nor those of drives."""
    found: list[int] = []
    depth, quote = 0, ""
    for position, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif depth and character in "'\"":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= depth > 0
        elif character == ":" and not depth and not _is_of_drive(text, position):
            found.append(position)
    return found


def _is_of_drive(text: str, colon: int) -> bool:
    """Whether a colon is that of a drive: `C:\\best.pth`, `hf:C:/models/bert`."""
    around = text[max(colon - 2, 0) : colon + 2]
    return re.fullmatch(r":?[A-Za-z]:[\\/]", around) is not None


def _is_file(text: str, folder: Path) -> bool:
    """Whether a reference means a file or folder that exists."""
    if not exists(folder / text) or text.endswith(".py"):
        return False
    try:
        return isinstance(resolve.parse(text, folder), CheckpointFile) or resolve.is_folder(text, folder)
    except ModelcliError:
        return False


def _end_of_reference(text: str, colons: list[int]) -> int | None:
    """Return the position of the colon behind a reference that is no existing file; None if there is no part."""
    if not colons:
        return None
    first, *later = colons
    head = text[:first]
    if (python := re.match(r".*?\.py(?=:)", text)) is not None:
        return next((at for at in colons if at > python.end()), None)
    if head in providers.prefixes():
        return later[0] if later else None
    if head.endswith(")") or head in _builders():
        return first
    before_last = text[: colons[-1]]
    if formats.has_known_suffix(before_last) or re.search(r"[\\/]", before_last.partition("(")[0]):
        return colons[-1]
    if formats.has_known_suffix(text) or re.search(r"[\\/]", text.partition("(")[0]):
        return None  # `odd:name.pth`, which does not exist
    return later[0] if later else None


def _builders() -> set[str]:
    return {name for provider in providers.built_in() for name in provider.bare_words()}


def seen_from(text: str, base: Path, folder: Path) -> str:
    """Return `SOURCE[:PATH]`, whose relative paths start at `base`, with paths as seen from `folder`."""
    if base.resolve() == folder.resolve():
        return text
    try:
        reference, part = split(text, base)
    except RequestError:
        return text
    moved = reference_seen_from(reference, base, folder)
    return moved if reference == text else f"{moved}:{part}"


def reference_seen_from(text: str, base: Path, folder: Path) -> str:
    """Return a reference, whose relative paths start at `base`, with paths as seen from `folder`."""
    try:
        reference = resolve.parse(text, base)
    except ModelcliError:
        if not formats.has_known_suffix(text):
            return text
        reference = CheckpointFile(base / text)  # it does not exist
    if isinstance(reference, PythonObject):
        return reference.relative_to(folder.resolve(), base)
    if isinstance(reference, CheckpointFile) or resolve.is_folder(text, base):
        if Path(text).is_absolute():
            return text
        try:
            relative = os.path.relpath((base / text).resolve(), folder.resolve()).replace(os.sep, "/")
        except ValueError:  # another drive on Windows
            return str((base / text).resolve())
        return relative if "/" in relative or Path(relative).suffix else f"./{relative}"
    return text


__all__ = ["reference_seen_from", "seen_from", "split"]
