"""Compute one hash of the contents of a model: the command `hash`, and `check --hash`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from modelcli.checkpoints.byte_comparison import nbytes_of
from modelcli.commands import diff, tensor_values
from modelcli.commands.look import Look, LookRequest, look, stdout_is_for_data
from modelcli.commands.target import Target
from modelcli.errors import RequestError
from modelcli.wording import counted, is_or_are, listed

if TYPE_CHECKING:
    from modelcli.values.content_hash import ModuleHash

#: How many names a message lists.
_MOST_NAMED = 3
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")

#: Called with the bytes done, the bytes in total, and the kind of work.
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class HashRequest:
    """A model, and the selectors of the tensors to hash; without them, all tensors of its state dict.

    `by_module` says that the hashes of modules or the selectors are needed too.
    """

    target: Target
    selected: tuple[str, ...] = ()
    by_module: bool = False


@dataclass(frozen=True)
class HashResult:
    """The hash of a model.

    Attributes:
        model: its reference.
        class_name: its class; None if that is not known.
        tensors: the hash of each tensor, by name.
        nbytes: the bytes of the values of each tensor, by name.
        notes: what the user should know.
        warnings: messages that are shown even with `--quiet`.
    """

    model: str
    class_name: str | None
    tensors: Mapping[str, bytes]
    nbytes: Mapping[str, int]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @cached_property
    def digest(self) -> str:
        """The hash of the model: `sha256:` and 64 hexadecimal digits."""
        from modelcli.values import content_hash

        return written(content_hash.model_digest(self.tensors))

    @property
    def modules(self) -> Mapping[str, ModuleHash]:
        """The hash of each module by path, the model itself under `""`."""
        from modelcli.values import content_hash

        return content_hash.module_hashes(self.tensors, self.nbytes)


def written(digest: bytes) -> str:
    """Return a hash as text: `sha256:` and 64 hexadecimal digits."""
    return f"sha256:{digest.hex()}"


def parse(word: str) -> str:
    """Return a hash that the user wrote, with small letters. Raises RequestError unless it is complete."""
    found = word.strip().lower()
    if _DIGEST.fullmatch(found) is None:
        raise RequestError(
            f"{word!r} is no hash: it has to be sha256: and 64 hexadecimal digits",
            "modelcli hash MODEL prints the hash",
        )
    return found


def hash_model(request: HashRequest, progress: Progress | None = None) -> HashResult:
    """Open a model with its recipe's edits, and hash its tensors as they would be written: see `of_look`."""
    found = look(LookRequest(request.target, cached=False, modules=request.by_module, of_files=True, values=True))
    return of_look(found, request.target.source.model, request.selected, progress)


@stdout_is_for_data
def of_look(found: Look, model: str, selected: tuple[str, ...] = (), progress: Progress | None = None) -> HashResult:
    """Return the hash of the tensors of a model's state dict. `values.content_hash` says what it is made of.

    Names are those of the state dict that modelcli reads, with the prefixes of wrappers that a file has. Tensors inside
    entries that are not tensors count under the names that `params` shows. Buffers that are not saved do not count.

    Args:
        found: the model.
        model: its reference.
        selected: selectors of the tensors to hash; without them, all count.
        progress: called with the bytes done, the bytes in total, and the kind of work.

    Raises:
        RequestError: a tensor cannot be hashed, or a selector picks nothing. The message names it.
        FileFormatError: a file changed while it was read, or is damaged.
    """
    from modelcli.values import content_hash

    blueprint = found.blueprint
    names = [tensor.name for tensor in blueprint.tensors if tensor.persistent]
    notes = list(found.notes)
    unseen = diff.unseen_of(found)
    if selected:
        from modelcli.language import selectors

        picked = set(selectors.select_tensors(blueprint, selected))
        names = [name for name in names if name in picked]
        if not names:
            raise RequestError(
                f"{' '.join(selected)} picks no tensor of the state dict", "modelcli params MODEL lists the tensors"
            )
    elif unseen:
        raise RequestError(
            f"{listed(list(unseen), _MOST_NAMED)} cannot be looked at, so the model cannot be hashed",
            "hash the other tensors alone: modelcli hash MODEL -s SELECTOR",
        )
    entries = tensor_values.entries_of(found, names)
    if without := [name for name in names if name not in entries]:
        raise RequestError(
            f"{listed(without, _MOST_NAMED)} {'has' if len(without) == 1 else 'have'} no values to hash",
            "hash the other tensors alone: modelcli hash MODEL -s SELECTOR",
        )
    report = progress or (lambda _done, _total, _doing: None)
    digests = content_hash.tensor_digests(
        {name: entries[name] for name in names}, lambda done, total: report(done, total, "hashing"), _what(found)
    )
    notes += found.live.random_value_notes() if found.live is not None else []
    notes += _not_covered(found)
    sizes = {name: nbytes_of(entries[name]) for name in names}
    return HashResult(model, blueprint.root.type, digests, sizes, tuple(notes), found.warnings)


def _what(found: Look) -> str:
    return "the model" if found.live is not None or found.contents is None else str(found.contents.path)


def _not_covered(found: Look) -> list[str]:
    """Return notes on what a model has besides tensors, and on tensors that are in no state dict."""
    notes = []
    if extras := list(diff.extras_of(found)):
        what = "no tensor" if len(extras) == 1 else "no tensors"
        notes.append(f"{listed(extras, _MOST_NAMED)} {is_or_are(len(extras))} {what}: the hash covers only tensors")
    contents = found.contents
    if contents is not None and found.live is None and contents.hidden:
        number = counted(len(contents.hidden), "attribute")
        notes.append(f"{number} with tensors outside the state dict, such as {contents.hidden[0]}: not hashed")
    if contents is not None and found.live is None and contents.is_program:
        notes.append("the hash covers the tensors of the program, not its code and constants")
    return notes
