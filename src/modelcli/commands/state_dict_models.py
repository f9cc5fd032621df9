"""A checkpoint of unknown architecture, open for edits. Does not import torch."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from modelcli import resolve
from modelcli.checkpoints import CompositeEntry, Contents, TensorEntry, formats
from modelcli.checkpoints import record as records
from modelcli.checkpoints.limits import Budget
from modelcli.checkpoints.reading_to_edit import read_to_edit
from modelcli.checkpoints.record import Record
from modelcli.checkpoints.record_of_keys import NO_TRACE
from modelcli.checkpoints.state_dict_model import model_of
from modelcli.commands import quantized_folder, state_dict_plan
from modelcli.edits import Edit
from modelcli.edits.applied import Applied, Context, apply_in_order, seed_of
from modelcli.errors import RequestError
from modelcli.language import input_texts
from modelcli.language.references import CheckpointFile, Source
from modelcli.language.stated_inputs import StatedInputs
from modelcli.live.source_models import SourceModels
from modelcli.model.blueprint import Blueprint, Trace
from modelcli.model.joined_tensors import casts_in
from modelcli.model.parameter_origins import Held, held_of
from modelcli.model.state_dict import StateDictModel, StateDictTensor
from modelcli.providers import quantization
from modelcli.values.watch import Watch
from modelcli.wording import listed
from modelcli.writing import Plan

if TYPE_CHECKING:
    from modelcli.live.inputs import Inputs
    from modelcli.live.opening import Live
    from modelcli.live.trace import Traced


@dataclass
class OpenStateDict:
    """A state-dict model, the file that it comes from, and the edits so far.

    `edits` are all edits since the file was first edited, as lines with selectors and `_` resolved, each with its
    number; `carried_out` are those since it was opened, as they were written. `opened` is the model as it is in the
    file. `sources` opens the other models that edits name. `own_folder` is the folder of a library's model, if its
    weights are quantized and only its keys are opened.
    """

    model: StateDictModel
    source: Source
    contents: Contents
    opened: StateDictModel
    record: Record | None = None
    inputs: StatedInputs | None = None
    edits: list[tuple[int, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seed: int = 0
    edit_count: int = 0
    carried_out: list[Edit] = field(default_factory=list)
    architecture: None = None
    report: None = None
    sources: SourceModels = field(default_factory=lambda: SourceModels(_open_live))
    own_folder: Path | None = None
    _sources: state_dict_plan.Sources = field(default_factory=state_dict_plan.Sources)

    def describe(self) -> Blueprint:
        return self.model.blueprint

    def apply(self, edits: Sequence[Edit], *, trusted: bool = True) -> Applied[StateDictModel]:
        """Apply all edits, or none. Raises RequestError if one is wrong."""

        def carry_out(model: StateDictModel, edit: Edit, number: int, inputs: Inputs | None) -> Applied[StateDictModel]:
            seed = seed_of(self.seed, number)
            context = Context(seed, inputs, trusted, sources=self.sources, quantization=described)
            return edit.apply_to_state_dict(model, context)

        described = quantization.beside(self.contents.path)
        numbers = range(self.edit_count + 1, self.edit_count + 1 + len(edits))
        applied = apply_in_order(self.model, edits, numbers, cast("Inputs | None", self.inputs), carry_out)
        self.model, self.inputs = applied.model, applied.inputs
        self.edit_count += len(edits)
        self.edits += applied.lines
        self.carried_out += edits
        return applied

    def edited_copy(self, contents: Contents) -> OpenStateDict:
        """Return the model of other contents of the same file, opened as this one and with the same edits."""
        copied = opened(self.source, replace(contents, record=self.record))
        assert copied is not None
        copied.sources = self.sources
        copied.apply(self.carried_out)
        return copied

    def keys_in_order(self) -> list[str]:
        """The keys in the order in which they are written."""
        return state_dict_plan.in_order(self.model, self.opened, self.contents)

    @property
    def trace(self) -> Trace:
        """Why no forward pass is made."""
        return NO_TRACE

    def entries(self) -> dict[str, TensorEntry | CompositeEntry]:
        """Return all tensors by name with the source of their values, without tensors that have no values."""
        found: dict[str, TensorEntry | CompositeEntry] = {}
        for name, entry in self.model.entries.items():
            if isinstance(entry, StateDictTensor):
                if entry.shape is not None and entry.source is not None:
                    found[name] = self._sources.entry(name, entry)
            elif isinstance(entry.value, CompositeEntry):
                found[name] = entry.value
        return found | self._within()[0]

    def extras(self) -> dict[str, Any]:
        """The entries that are not tensors, as inert values."""
        inert = ((name, entry.value) for name, entry in self.model.inert.items())
        return {name: value for name, value in inert if not isinstance(value, CompositeEntry)}

    def unseen(self) -> list[str]:
        """The entries that may contain tensors that modelcli cannot look at."""
        return self._within()[1]

    def unseen_notes(self) -> list[str]:
        """Return the note on these entries."""
        unseen = self.unseen()
        return [f"{listed(unseen, 3)} cannot be looked at: the totals leave it out"] if unseen else []

    def _within(self) -> tuple[dict[str, TensorEntry | CompositeEntry], list[str]]:
        if not self.model.inert:
            return {}, []
        from modelcli.checkpoints.torch_pickle.nested_tensors import tensors_within

        return tensors_within(self.extras(), self.model.entries.keys(), "the model", Budget("the model", 1 << 40))

    @property
    def parameters_opened(self) -> Mapping[str, Held]:
        return _held(self.opened, self.contents.names)

    @property
    def parameters_now(self) -> Mapping[str, Held]:
        return _held(self.model, self.keys_in_order())

    @property
    def tensors_opened(self) -> Mapping[str, Hashable]:
        return {name: tensor.identity for name, tensor in self.opened.tensors.items()}

    @property
    def tensors_now(self) -> Mapping[str, Hashable]:
        return {name: tensor.identity for name, tensor in self.model.tensors.items()}

    def plan(
        self,
        out: Path,
        kind: str,
        *,
        bare: bool = False,
        compact: bool = False,
        traced: Traced | None = None,
        with_record: bool = True,
    ) -> Plan:
        """Return the plan for writing. Raises RequestError for values that the format cannot store."""
        beside = None
        if self.own_folder is not None and formats.named(kind).is_folder:
            beside = quantized_folder.beside(self.own_folder, self.model, self.opened)
        made = state_dict_plan.plan(
            self.model,
            self.opened,
            self.contents,
            lambda names: self._record_text(names, kind) if with_record and self._says_more_than_keys() else "",
            kind,
            bare=bare,
            compact=compact,
            sources=self._sources,
        )
        return made if beside is None else replace(made, companions=beside.files, notes=(*beside.notes, *made.notes))

    def _says_more_than_keys(self) -> bool:
        """Whether a record is written: with --bare-keys, only of flags and of inputs, which the file cannot hold."""
        return (
            not self.source.bare_keys
            or (self.inputs is not None and self._is_input_stated())
            or any(tensor.requires_grad is not None for tensor in self.model.tensors.values())
        )

    def _record_text(self, names: list[str], kind: str) -> str:
        """The record of the model as it is, as text for a file that holds these keys in this order."""
        record = self._record()
        if not formats.named(kind).keeps_order:
            return records.to_text(record)
        return records.to_text_beside(record, names)

    def _record(self) -> Record:
        """The record of the model as it is."""
        blueprint = self.model.blueprint
        frozen = tuple(
            tensor.name
            for tensor in blueprint.tensors
            if tensor.requires_grad is False and tensor.tied_to is None and tensor.name in self.model.tensors
        )
        stated = self.inputs is not None and self._is_input_stated()
        return Record(
            reference=None,
            weights=None,
            seed=self.seed,
            edit_count=self.edit_count,
            edits=tuple(line for _, line in self.edits),
            numbers=tuple(number for number, _ in self.edits),
            frozen=frozen,
            blueprint=blueprint.with_trace(self.trace),
            input_size=(self.inputs.shapes or None) if stated and self.inputs is not None else None,
            input_dtype=self.inputs.dtypes if self.inputs is not None else (),
            inputs=self.inputs.texts if stated and self.inputs is not None else (),
        )

    def _is_input_stated(self) -> bool:
        recorded = self.record is not None and (self.record.input_size is not None or self.record.inputs)
        return bool(self.source.input_size is not None or self.source.inputs or recorded)

    def overflow_notes(self) -> list[str]:
        """Return notes on values that overflowed in a narrower dtype, and on scales. Call it after writing."""
        spoilt = [name for name, watch in self._watches_of_scales() if watch.seen]
        notes = []
        if spoilt:
            were = "was" if len(spoilt) == 1 else "were"
            notes.append(f"{listed(spoilt, 3)} {were} multiplied by scales that are NaN or Inf")
        if not (cast := self._cast()):
            return notes
        from modelcli.values import overflow

        return notes + overflow.notes_of(cast)

    def watches(self) -> list[Watch]:
        """Return what records the values that these notes are about, in the same order in each process."""
        found = [watch for _, watch in self._watches_of_scales()]
        if not (cast := self._cast()):
            return found
        from modelcli.values import overflow

        return found + overflow.watches_of(cast)

    def _watches_of_scales(self) -> list[tuple[str, Watch]]:
        named = ((name, self._sources.watch_of_scales(tensor)) for name, tensor in self.model.tensors.items())
        return [(name, watch) for name, watch in named if watch is not None]

    def _cast(self) -> list[tuple[str, TensorEntry]]:
        """Return the tensors that were cast, and those that were cast before they became parts of one."""
        cast = [(name, part) for name, tensor in self.model.tensors.items() for part in casts_in(tensor)]
        cast.sort(key=lambda item: item[1].kind == "buffer")  # parameters first, as PyTorch lists them
        return [(name, self._sources.entry(name, part)) for name, part in cast]

    def random_value_notes(self) -> list[str]:
        return []


def _open_live(source: Source) -> Live:
    """Open a model whose architecture is known, which needs torch."""
    from modelcli.live import opening

    return opening.open_live(source)


def _held(model: StateDictModel, names: Sequence[str]) -> dict[str, Held]:
    """Return the parameters of a model, each under its first name, in the order of a file with these keys."""
    found: dict[int, tuple[str, Held]] = {}
    for name in names:
        tensor = model.tensors.get(name)
        if tensor is not None and tensor.kind == "parameter" and tensor.identity not in found:
            found[tensor.identity] = (name, held_of(tensor))
    return dict(found.values())


def opened(source: Source, given: Contents | None = None) -> OpenStateDict | None:
    """Open a checkpoint of unknown architecture. Returns None for a file whose record names an architecture.

    `given` are the contents of a copy of the model in the file, if the file is not to be read.

    Raises RequestError, UnsafeError, FileFormatError.
    """
    reference = resolve.reference_of(source)
    assert isinstance(reference, CheckpointFile)
    notes: list[str] = []
    if (hidden := resolve.hidden_file_note(source.model, source.folder)) is not None:
        notes.append(hidden)
    if (unknown := resolve.keys_alone_note(reference.path, source)) is not None:
        notes.append(unknown)
    contents = given or read_to_edit(reference.path, source, notes)
    record = contents.record
    if record is not None and given is None and (why := resolve.disagreement(record, contents, to_build=True)):
        notes.append(f"the record in {reference.path.name} was ignored: {why}")
        record = None
    if record is not None and record.reference is not None:
        return None
    notes += contents.notes
    seed = source.seed
    if seed is None:
        seed = record.seed if record else 0
    model = model_of(contents, record)
    # Cached results such as the blueprint belong to this model, and an edit makes another one.
    opened_as = StateDictModel(model.entries, model.modules)
    made = OpenStateDict(model, source, contents, opened_as, record, notes=notes, seed=seed)
    made.sources = SourceModels(_open_live, source.trust, source.tensors_only)
    made.own_folder = resolve.quantized_folder(source)
    if record is not None:
        made.edits = list(zip(record.numbers, record.edits, strict=True))
        made.edit_count = record.edit_count
    made.inputs = _inputs(source, record, model)
    return made


def _inputs(source: Source, record: Record | None, model: StateDictModel) -> StatedInputs | None:
    """Return the model's inputs if the command or the file states them."""
    dtypes = source.input_dtype or (record.input_dtype if record else ())
    shapes, texts = source.input_size, source.inputs
    if shapes is None and not texts and record is not None:
        shapes, texts = record.input_size, record.inputs
    floating = model.floating_dtype or "float32"
    if texts:
        named = input_texts.parse_all(texts)
        for item in named:
            if item.path and not item.path[0].isdecimal():
                if source.bare_keys:  # the inputs are for `--check same`, which asks the architecture
                    return None
                raise RequestError(
                    f"the file records no architecture, so modelcli does not know whether forward has an argument "
                    f"{item.path[0]!r}",
                    "--arch names it",
                )
        return StatedInputs(shapes or (), dtypes, floating=floating, named=named)
    return None if shapes is None else StatedInputs(shapes, dtypes, floating=floating)
