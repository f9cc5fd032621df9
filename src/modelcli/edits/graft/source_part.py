"""The part of another model that `graft` takes tensors from, with the names that they are matched by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from modelcli.edits.applied import Context
from modelcli.edits.extract import Extract
from modelcli.edits.rename import Rename
from modelcli.edits.source_models import SourceModel
from modelcli.errors import RequestError
from modelcli.language import selectors
from modelcli.language.quoting import quoted
from modelcli.model import wrapper_prefixes
from modelcli.model.state_dict import StateDictModel, StateDictTensor, of_entries

if TYPE_CHECKING:
    from modelcli.edits.graft import Graft


@dataclass(frozen=True)
class Part:
    """The part of another model that an edit takes tensors from, with the names that it is matched by.

    Attributes:
        opened: the other model.
        model: the part.
        metadata: the `_metadata` of its state dict, by path in it.
        origins: the key of the whole model for each of its keys.
        notes: what there is to say.
    """

    opened: SourceModel
    model: StateDictModel
    metadata: Mapping[str, Any]
    origins: Mapping[str, str]
    notes: tuple[str, ...]

    @cached_property
    def tensors(self) -> dict[str, StateDictTensor]:
        """The plain tensors of its state dict."""
        return {name: tensor for name, tensor in self.model.tensors.items() if tensor.persistent and tensor.source}

    @cached_property
    def others(self) -> list[str]:
        """The entries of its state dict that are no plain tensors, such as quantized and lazy ones."""
        known = self.tensors
        return [name for name in self.model.keys if name not in known]

    @property
    def text(self) -> str:
        """How messages call it: `dino.pth:backbone`."""
        return joined_reference(self.opened.reference, self.opened.part)


def joined_reference(reference: str, part: str) -> str:
    """Return `SOURCE:PATH`, or `SOURCE` for the whole model."""
    return f"{reference}:{part}" if part not in ("", ".") else reference


def part_of(edit: Graft, context: Context) -> Part:
    """Open the other model, and return the part that the edit takes, renamed as it says.

    Raises RequestError for a part that does not exist or has no tensors, and what opening it raises.
    """
    if context.sources is None:
        raise RequestError("graft opens another model, which a record may not", "run modelcli graft yourself")
    opened = context.sources.open(edit.other, weights=edit.source_weights, key=edit.source_key, seed=context.seed)
    model, notes = opened.model, [*opened.notes]
    origins = {name: name for name in model.entries}
    if opened.part not in ("", "."):
        model, origins, found = _below(opened, context)
        notes += found
    for old, new in edit.renames:
        rename = Rename(old=old, new=new)
        try:
            renamed = rename.apply_to_state_dict(model, context).model
        except RequestError as error:
            error.message = f"--rename '{old} {new}' of {edit.other}: {error.message}"
            error.hint = f"modelcli params {quoted(opened.reference)} lists the source's tensors"
            raise
        names = rename.new_names(model)
        origins = {names.get(name) or name: origin for name, origin in origins.items()}
        model = renamed
    metadata = {
        path: opened.metadata[module.origin]
        for path, module in model.modules.items()
        if module.origin is not None and module.origin in opened.metadata
    }
    part = Part(opened, model, metadata or opened.metadata, origins, tuple(notes))
    if not part.tensors:
        raise RequestError(
            f"{part.text} has no tensors to take", f"modelcli params {quoted(opened.reference)} lists them"
        )
    return part


def _below(opened: SourceModel, context: Context) -> tuple[StateDictModel, dict[str, str], list[str]]:
    """Return the part of a model, also where wrappers have added names to its keys.

    Returns the part, the key of the whole model for each of its keys, and notes.
    """
    whole, names, notes = opened.model, {name: name for name in opened.model.entries}, list[str]()
    try:
        path = selectors.select_one(whole.blueprint, opened.part, "graft")
    except RequestError as error:
        unwrapping = wrapper_prefixes.markers_in(whole.keys)
        error.message = f"{opened.reference} has no part {opened.part!r}: {error.message}"
        error.hint = f"modelcli params {quoted(opened.reference)} lists its tensors"
        if not unwrapping:
            raise
        names = {unwrapping.key(name): name for name in whole.entries if name not in unwrapping.dropped}
        whole = of_entries({name: whole.entries[old] for name, old in names.items()})
        try:
            path = selectors.select_one(whole.blueprint, opened.part, "graft")
        except RequestError:
            raise error from None
        notes = [unwrapping.note()]
    if not path:
        return whole, names, notes
    prefix = f"{path}."
    part = Extract(path=selectors.literal(path)).apply_to_state_dict(whole, context).model
    return part, {name: names[prefix + name] for name in part.entries}, notes
