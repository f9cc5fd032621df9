"""Open a model from a source (reference, weights, architecture, seed), on the meta device or with values."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from modelcli import resolve
from modelcli.checkpoints import Contents
from modelcli.checkpoints.reading_to_edit import read_to_edit
from modelcli.checkpoints.record import Record
from modelcli.edits import Edit, kind_of
from modelcli.edits import parse as parse_edit
from modelcli.edits.applied import Applied
from modelcli.errors import FileFormatError, ModelcliError, RequestError
from modelcli.language import input_texts, references
from modelcli.language.quoting import quoted
from modelcli.language.references import CheckpointFile, NamedModel, Source
from modelcli.live import bounds, downloads, inputs, loading, memory, providers, trace
from modelcli.live.build import Architecture, architecture
from modelcli.live.describe import describe, floating_dtype
from modelcli.live.held_parameters import held_parameters
from modelcli.live.inputs import Inputs
from modelcli.live.loading import LoadReport
from modelcli.live.source_models import SourceModels
from modelcli.live.sources import flag_of, is_lazy, named_tensors, set_flag
from modelcli.live.surgery import apply
from modelcli.live.surgery.snapshot import restored_on_error
from modelcli.live.trace import Traced
from modelcli.model.blueprint import Blueprint
from modelcli.model.parameter_origins import Held
from modelcli.providers import configuration
from modelcli.values.watch import Watch
from modelcli.writing import Plan

#: How many bytes a record may need beyond the tensors of its file, and in proportion to them.
_BASE_BYTES = 1_000_000_000
_BASE_TIMES = 4


@dataclass
class Live:
    """A model on the meta device, its origin, and its edits.

    `architecture` is None for a checkpoint of unknown architecture. `edits` are all edits since the architecture's
    reference, as lines with selectors and `_` resolved, each with its number. `drawn` says whether values will be drawn
    at random. `report` says how a checkpoint's keys fit; `record` is the file's record, if it was followed.
    `parameters_opened` are the parameters at opening, of a training checkpoint; `opened_tensors` all tensors under
    every name. `own_folder` is the folder of a library's model that the weights are in, if it was opened from one.
    `sources` opens the other models that edits name. `carried_out` are the edits since it was opened, as they were
    written.
    """

    module: nn.Module
    source: Source
    architecture: Architecture | None
    contents: Contents | None = None
    inputs: Inputs | None = None
    edits: list[tuple[int, str]] = field(default_factory=list)
    report: LoadReport | None = None
    record: Record | None = None
    notes: list[str] = field(default_factory=list)
    seed: int = 0
    edit_count: int = 0
    parameters_opened: Mapping[str, Held] = field(default_factory=dict)
    opened_tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    own_folder: Path | None = None
    sources: SourceModels = field(default_factory=lambda: SourceModels(open_live))
    carried_out: list[Edit] = field(default_factory=list)
    _blueprint: Blueprint | None = None
    _made_anew: Mapping[str, str] | None = None

    @property
    def drawn(self) -> bool:
        base = self.architecture
        return self.contents is None and base is not None and base.weights is None and base.instance is None

    def describe(self) -> Blueprint:
        """Return the model's blueprint, which is made once between two edits."""
        if self._blueprint is None:
            self._blueprint = describe(self.module)
        return self._blueprint

    def described_copy(self) -> nn.Module | None:
        """Return a copy on the meta device that says of itself what edits made, as `modelcli.load` gives it.

        A class may go by its configuration, such as the number of its layers, in a forward pass. None for a model
        without edits, and for one that cannot be copied.
        """
        base = self.architecture
        if base is None or not self.edits or not base.provider.has_descriptions:
            return None
        copied = trace.meta_copy_if_possible(self.module)
        if copied is self.module:
            return None
        base.provider.describe_edits(base, copied)
        return copied

    def describe_loaded(self) -> Blueprint:
        """Return the blueprint of the model that `modelcli.load` makes of it.

        It is `describe` but for buffers outside the state dict, whose dtypes no file holds: a library's loader may make
        them in another dtype than an edit has cast them to.
        """
        found, dtypes = self.describe(), self.made_anew()
        if not dtypes:
            return found
        tensors = (replace(tensor, dtype=dtypes.get(tensor.name, tensor.dtype)) for tensor in found.tensors)
        return replace(found, tensors=tuple(tensors))

    def made_anew(self) -> Mapping[str, str]:
        """Return the buffers that the library's loader makes in another dtype than edits gave them, with that dtype.

        Their values in this model are not those that the loaded one has.
        """
        if self._made_anew is None:
            self._made_anew = self._find_made_anew()
        return self._made_anew

    def _find_made_anew(self) -> dict[str, str]:
        unsaved = {tensor.name: tensor.dtype for tensor in self.describe().tensors if not tensor.persistent}
        if self.architecture is None or not unsaved or not any(kind_of(line).changes_dtype for _, line in self.edits):
            return {}
        dtypes = self.architecture.provider.dtypes_of_unsaved(self.architecture, self.module)
        return {name: dtypes[name] for name, dtype in unsaved.items() if dtypes.get(name, dtype) != dtype}

    def apply(self, edits: Sequence[Edit], *, trusted: bool = True) -> Applied[nn.Module]:
        """Carry out edits: all of them, or none if one is wrong. What they resolved to joins `edits`.

        Without `trusted` an edit that would run code other than that of known libraries is refused.
        """
        numbers = self.next_numbers(len(edits))
        done = apply(
            self.module,
            edits,
            seed=self.seed,
            numbers=numbers,
            inputs=self.inputs,
            trusted=trusted,
            blueprint=self.describe(),
            sources=self.sources,
        )
        self.module, self.inputs, self._blueprint, self._made_anew = done.model, done.inputs, None, None
        self.edit_count += len(edits)
        self.edits += done.lines
        self.carried_out += edits
        return done

    def edited_copy(self, contents: Contents) -> Live:
        """Return the model of other contents of the same file, opened as this one and with the same edits."""
        copied = open_live(self.source, contents=contents)
        copied.sources = self.sources
        copied.apply(self.carried_out)
        return copied

    @property
    def parameters_now(self) -> Mapping[str, Held]:
        """The parameters that it has, in the order of `model.parameters()`."""
        return held_parameters(self.module, flags_are_known=self.record is not None)

    @property
    def tensors_opened(self) -> Mapping[str, Hashable]:
        """The identity of each tensor when the model was opened, under every name."""
        return {name: id(tensor) for name, tensor in self.opened_tensors.items()}

    @property
    def tensors_now(self) -> Mapping[str, Hashable]:
        """The identity of each tensor now, under every name."""
        return {name: id(tensor) for name, tensor in named_tensors(self.module).items()}

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
        """Return the plan for writing it: see `live.planning.plan`."""
        from modelcli.live import planning

        return planning.plan(self, out, kind, bare=bare, compact=compact, made=traced, with_record=with_record)

    def overflow_notes(self) -> list[str]:
        """Which values a narrower dtype cannot hold, known once they have been written."""
        from modelcli.live import overflow

        return overflow.notes_of(self.module)

    def watches(self) -> list[Watch]:
        """What records the values that these notes are about, in the same order in each process."""
        from modelcli.live import overflow

        return overflow.watches_of(self.module)

    def random_value_notes(self) -> list[str]:
        """Which values are in no file and were randomly initialised."""
        notes = []
        if self.report is not None and self.report.missing:
            count = len(self.report.missing)
            what = "1 tensor is" if count == 1 else f"{count} tensors are"
            drawn = "was" if count == 1 else "were"
            notes.append(f"{what} not in the file, and {drawn} randomly initialised (--seed {self.seed})")
        if self.drawn:
            assert self.architecture is not None
            if self.architecture.loads:
                told = f"loads weights itself; what these leave out is drawn at random (--seed {self.seed})"
            else:
                told = f"was randomly initialised (--seed {self.seed})"
            notes.append(f"{self.architecture.reference} {told}")
        return notes

    def real_module(self) -> nn.Module:
        """Return this model with values, for a forward pass: those of its file, else those that the constructor draws.

        Nothing is downloaded. Raises RequestError, and SystemFailureError if the model does not fit in memory.
        """
        assert self.architecture is not None
        times = 1 if self.contents is None else 2  # those that the constructor draws, and those of the file
        needed = times * memory.bytes_of(self.module)
        module = self.architecture.real(self.seed, needed=needed, weights=False)
        recorded = 0 if self.record is None else len(self.record.edits)
        if self.record is not None:
            module = _repeated(module, self.record, self.seed, trusted=True)
        if self.contents is not None and not self.contents.is_remote:  # else the constructor's values do
            loading.load_values(self.architecture, module, self.contents)
        return self._edited(module, self.edits[recorded:])

    def _edited(self, module: nn.Module, lines: Sequence[tuple[int, str]]) -> nn.Module:
        edits, numbers = [parse_edit(line) for _, line in lines], [number for number, _ in lines]
        return apply(module, edits, seed=self.seed, numbers=numbers, trusted=True, sources=self.sources).model

    def next_numbers(self, count: int) -> range:
        """Return the numbers of the next `count` edits."""
        return range(self.edit_count + 1, self.edit_count + 1 + count)


def _repeated(module: nn.Module, record: Record, seed: int, *, trusted: bool) -> nn.Module:
    """Apply the edits of a record to its architecture, without those that read other models: see `Edit.reads_models`.

    The values that these have taken are in the file.
    """
    numbered = [pair for pair in zip(record.parsed_edits(), record.numbers, strict=True) if not pair[0].reads_models]
    edits, numbers = [edit for edit, _ in numbered], [number for _, number in numbered]
    return apply(module, edits, seed=seed, numbers=numbers, trusted=trusted).model


def open_live(source: Source, *, report_only: bool = False, contents: Contents | None = None) -> Live:
    """Open a model on the meta device. No weights are read; of a model on the Hub, what describes it is downloaded.

    With `report_only`, a checkpoint that does not fit is not an error: `report` says how the keys differ. `contents`
    are those of the file, if they are not to be read from it.

    Raises RequestError, AnswerNoError (a checkpoint that does not fit), UnsafeError, FileFormatError.
    """
    return _opened(source, lambda opening: opening.live(report_only=report_only), contents)


def load_weights(live: Live) -> None:
    """Build a model with pretrained weights, which its library downloads and loads."""
    assert live.architecture is not None
    live.architecture.real(live.seed)


def open_real(source: Source, edits: Sequence[Edit] = ()) -> tuple[nn.Module, Live]:
    """Open a model with values and apply the edits; the result equals that of the constructor and `load_state_dict`."""
    return _opened(resolve.downloaded(source), lambda opening: opening.real(edits))


class _RecordDoesNotFitError(Exception):
    """The record in the folder of a library's model does not build that model: its configuration counts alone."""


_T = TypeVar("_T")


def _opened(source: Source, use: Callable[[_Opening], _T], contents: Contents | None = None) -> _T:
    """Open a source, with the record in the folder of a library's model where that fits, else without it."""
    try:
        return use(_Opening(source, given=contents))
    except _RecordDoesNotFitError as error:
        opening = _Opening(source, ignores_record=True)
        opening.notes.append(f"the record in {source.model} was ignored: {error}")
        return use(opening)


class _Opening:
    """The decisions that both ways of opening share: the architecture, the file, and the recorded edits."""

    def __init__(
        self,
        source: Source,
        followed: tuple[Path, ...] = (),
        *,
        ignores_record: bool = False,
        given: Contents | None = None,
    ) -> None:
        with downloads.allowed():
            source = resolve.pinned(source)
        self.source = source
        #: Whether the record in the folder of a library's model was tried and does not fit.
        self.ignores_record = ignores_record
        self.is_record_of_folder = False
        #: The folder of a library's model that the weights are in.
        self.own_folder: Path | None = None
        #: The recipes that were followed so far, each the architecture of the one before.
        self.followed = followed
        reference = resolve.reference_of(source)
        self.contents: Contents | None = None
        #: Whether the contents are a copy of the model in a file whose record was followed before.
        self.is_copy = given is not None
        self.record: Record | None = None
        self.notes: list[str] = []
        self.base: Architecture | None = None
        self.bounds: bounds.Bounds | None = None
        self.base_bytes = 0
        #: The file of the record: that of the tensors, or the one that --arch names.
        self.recorded_in: Path | None = None
        self.trust = source.trust
        if (hidden := resolve.hidden_file_note(source.model, source.folder)) is not None:
            self.notes.append(hidden)
        weights = source.weights if source.weights not in (None, "none") else None
        weights_file = None if isinstance(reference, CheckpointFile) else _weights_file(weights, source)
        if isinstance(reference, CheckpointFile):
            if weights is not None:
                raise RequestError(
                    f"--weights {weights} and the checkpoint {reference} both say where the values come from",
                    "use --arch for its architecture",
                )
            self.contents = given or read_to_edit(reference.path, source, self.notes)
            if source.arch is not None:
                self._take_named(source.arch)
            else:
                self._follow_record(reference.path)
        elif source.arch is not None:
            raise RequestError(f"--arch {source.arch} is for checkpoints, and {reference} is an architecture itself")
        elif weights_file is not None:
            self.contents = given or read_to_edit(weights_file, source, self.notes)
            self._take_architecture(reference, None)
        else:
            own = resolve.own_weights(reference, source)
            if own is None and source.key is not None:
                raise RequestError(f"--key {source.key} is for checkpoints, and {reference} is not one")
            if own is not None:
                self.contents = read_to_edit(own, source, self.notes)
            elif source.weights != "none":
                self.contents = self._remote_contents(reference)
            self.own_folder = None if self.contents is None else resolve.own_folder(reference, source)
            if self.own_folder is None or not self._follow_record_of_folder(self.own_folder):
                self._take_architecture(reference, weights)
                if self.contents is not None:
                    self._bound_by(self.contents)
        self.notes += self._notes_of_architecture()
        if self.contents is not None:
            self.notes += self.contents.notes

    def _bound_by(self, contents: Contents) -> None:
        """Bound what may be built of a model with weights of its own in proportion to these."""
        assert self.base is not None
        if self.base.bounds is not None and self.base.bounds.of_file:
            tensors = contents.infos()
            nbytes = sum(info.nbytes for info in tensors.values())
            found = bounds.of_configuration(self.base.bounds.what, len(tensors), nbytes)
            self.base = replace(self.base, bounds=found)

    def _notes_of_architecture(self) -> tuple[str, ...]:
        return () if self.base is None else self.base.notes

    def _remote_contents(self, reference: references.Reference) -> Contents | None:
        """Return what the headers of files on another machine say, if the model's own weights are there."""
        if not isinstance(reference, NamedModel) or reference.prefix is None:
            return None
        with downloads.allowed():
            return providers.provider_of(reference).remote_contents(reference, self.source.folder)

    def _take_architecture(
        self, reference: references.Reference, weights: str | None, *, trust: bool = True, folder: Path | None = None
    ) -> None:
        """Return the architecture of a reference. Paths in it are relative to `folder`, by default the source's."""
        seen_from = self.source.folder if folder is None else folder
        self.base = architecture(
            reference, weights=weights, folder=seen_from, trust=trust, remote_code=self.source.trust
        )

    def _take_named(self, arch: str) -> None:
        """Return the architecture that `--arch` names: a reference, a file with a record, or a recipe."""
        reference = resolve.parse(arch, self.source.folder)
        if not isinstance(reference, CheckpointFile):
            self._take_architecture(reference, None)
        elif reference.path.suffix.lower() == ".toml":
            self._take_recipe(reference.path)
        else:
            named = _Opening(Source(arch, folder=self.source.folder, trust=self.source.trust))
            if named.base is None or named.record is None:
                raise RequestError(
                    f"--arch {arch}: that file records no architecture",
                    "name a builder or a class, a file that modelcli wrote, or a recipe",
                )
            self.base, self.record, self.bounds = named.base, named.record, named.bounds
            self.recorded_in = reference.path

    def _take_recipe(self, path: Path) -> None:
        """Return the model of a recipe with its edits. The recipe is the user's own, so code that it names may run."""
        from modelcli import recipe

        itself = path.resolve()
        if itself in self.followed:
            raise RequestError(
                f"the architecture of {path} is that of {path} itself", "name another in its line arch ="
            )
        read = recipe.read(path)
        source = replace(read.source, weights=_weights_name(read.source))
        opening = _Opening(source, (*self.followed, itself))
        if opening.base is None:
            raise RequestError(f"--arch {path}: the model of that recipe, {read.source.model}, names no architecture")
        live = opening.live()
        assert live.architecture is not None
        for edit, location in zip(read.edits, read.locations, strict=True):
            if edit.reads_models:
                live.edit_count += 1  # the values come from the file whose architecture this is
                continue
            try:
                live.apply([edit])
            except ModelcliError as error:
                error.message = f"{location}: {str(edit)!r}: {error.message}"
                raise
        flags = {name: flag_of(parameter) for name, parameter in live.module.named_parameters()}
        self.base, self.recorded_in, self.trust = live.architecture, path, True
        self.record = Record(
            reference=str(live.architecture.reference),
            weights=live.architecture.weights,
            seed=live.seed,
            edits=tuple(line for _, line in live.edits),
            frozen=tuple(name for name, flag in flags.items() if flag is False),
            blueprint=live.describe(),
            input_size=read.source.input_size,
            input_dtype=read.source.input_dtype,
            inputs=read.source.inputs,
            numbers=tuple(number for number, _ in live.edits),
            edit_count=live.edit_count,
        )

    def _follow_record_of_folder(self, folder: Path) -> bool:
        """Follow the record in the folder of a library's model, and return whether there is one to follow.

        It says more than the configuration: which parameters are frozen, and what a configuration has no words for. It
        is believed while the configuration is the one that it was written with, and if the model that it builds has
        exactly the folder's tensors: see `_RecordDoesNotFitError`.
        """
        record = self._contents().record
        if record is None or record.reference is None or self.ignores_record:
            return False
        if record.configuration != configuration.digest_in(folder):
            self.notes.append(f"the record in {folder.name} was ignored: {configuration.NAME} has changed since")
            return False
        if why := record.unreadable_edit():
            self.notes.append(f"the record in {folder.name} was ignored: {why}")
            return False
        self.record, self.recorded_in, self.is_record_of_folder = record, folder, True
        self._build_recorded(record, folder)
        return True

    def _follow_record(self, path: Path) -> None:
        assert self.contents is not None
        self.recorded_in = path
        record = self.contents.record
        if record is None:
            return
        if not self.is_copy and (why := resolve.disagreement(record, self.contents, to_build=True)):
            self.notes.append(f"the record in {path.name} was ignored: {why}")
            return
        self.record = record
        if record.reference is not None:
            self._build_recorded(record, path)

    def _build_recorded(self, record: Record, path: Path) -> None:
        """Take the architecture that a record names."""
        assert record.reference is not None
        self.bounds = bounds.of_record(f"the architecture that {path.name} names", len(record.blueprint.modules))
        for half in providers.in_use():
            half.prepare()  # importing a library takes longer than the bounds allow
        with self._following(), self._memory_of_record():
            reference = resolve.parse_recorded(record.reference, path.parent, trust=self.source.trust)
            self._take_architecture(reference, record.weights, trust=self.source.trust, folder=path.parent)
        if isinstance(reference, NamedModel):
            assert self.base is not None
            self.base = replace(self.base, bounds=self.bounds)

    @contextlib.contextmanager
    def _following(self) -> Iterator[None]:
        """Follow the record within its bounds. Errors are those of the file."""
        assert self.recorded_in is not None
        try:
            with bounds.enforced(self.bounds):
                yield
        except RequestError as error:
            if self.is_record_of_folder:
                raise _RecordDoesNotFitError(error.message) from None
            what = f"the record in {self.recorded_in.name} cannot be followed: {error.message}"
            raise FileFormatError(what, "--arch names the architecture instead") from None

    def _memory_of_record(self) -> contextlib.AbstractContextManager[None]:
        """Bound the work of a record by the size of its file; the base of an extracted part may be larger."""
        contents = self._contents()
        nbytes = sum(info.nbytes for info in contents.infos().values())
        return memory.at_most(_BASE_BYTES + _BASE_TIMES * nbytes, contents.path.name)

    def live(self, *, report_only: bool = False) -> Live:
        seed = self.source.seed
        if seed is None:
            seed = self.record.seed if self.record else 0
        module = self._architecture_on_meta(seed)
        live = Live(module, self.source, self.base, self.contents, record=self.record, notes=self.notes, seed=seed)
        live.own_folder = self.own_folder
        live.sources = SourceModels(open_live, self.source.trust, self.source.tensors_only)
        if self.record is not None and self.base is not None:
            # The notes of the edits were shown when they were made.
            self.base_bytes = memory.bytes_of(module)
            with self._following(), self._memory_of_record():
                module = self._follow_edits(module, seed)
            live.module = module
        if self.record is not None:
            live.edits = list(zip(self.record.numbers, self.record.edits, strict=True))
            live.edit_count = self.record.edit_count
        if self.contents is not None and self.base is not None:
            fitted = self.base.provider.fit_state_dict(self.base, module, loading.on_meta(self.contents))
            live.report = loading.load(module, fitted.state, fitted.optional)
            if self.is_record_of_folder and not live.report.is_strict:
                raise _RecordDoesNotFitError("it builds a model with other tensors")
            self.notes += fitted.notes
            self._check(live.report, report_only, fitted.left_out)
        if self.record is not None:
            set_flags(module, self.record)
        live.inputs = self._inputs(module)
        if self.contents is not None and self.contents.key is not None:
            live.parameters_opened = live.parameters_now
        live.opened_tensors = named_tensors(module)
        return live

    def _architecture_on_meta(self, seed: int) -> nn.Module:
        base = self._known_base()
        if self.record is None:
            return base.on_meta(seed)
        with self._following():
            return base.on_meta(seed)

    def _known_base(self) -> Architecture:
        """Return the architecture. Raises RequestError for a file that records none, since only its keys are known."""
        if self.base is None:
            path = self._contents().path
            raise RequestError(
                f"{path} records no architecture",
                "name it: --arch alexnet, or arch= in Python",
            )
        return self.base

    def real(self, edits: Sequence[Edit]) -> tuple[nn.Module, Live]:
        base = self._known_base()
        live = self.live()
        if self.record is not None:
            with self._memory_of_record():
                module = base.real(live.seed, needed=self.base_bytes, weights=False)
                module = self._follow_edits(module, live.seed)
        else:
            # All values come from the file, so nothing has to be downloaded.
            module = base.real(live.seed, weights=self.contents is None)
        if self.contents is not None:
            loading.load_values(base, module, self.contents)
        if self.record is not None:
            set_flags(module, self.record)
        numbers = live.next_numbers(len(edits))
        done = apply(module, edits, seed=live.seed, numbers=numbers, inputs=live.inputs, sources=live.sources)
        live.apply(edits)
        return done.model, live

    def _follow_edits(self, module: nn.Module, seed: int) -> nn.Module:
        """Apply the edits of the record to its architecture."""
        assert self.record is not None
        return _repeated(module, self.record, seed, trusted=self.trust)

    def _contents(self) -> Contents:
        assert self.contents is not None
        return self.contents

    def _check(self, report: LoadReport, report_only: bool, left_out: frozenset[str]) -> None:
        """Raise the error that refuses a checkpoint, if it does. `left_out` are keys that may be missing in it."""
        if report.unwrapping:
            self.notes.append(report.unwrapping.note())
        for name, last in report.overruled:
            self.notes.append(
                f"{name} and {last} are one tensor here and two in the file: the values of {last} are used"
            )
        assert self.base is not None
        judged = replace(report, missing=tuple(name for name in report.missing if name not in left_out))
        error = judged.refusal(
            self._contents(),
            str(self.base.reference),
            strict=self.source.strict and not self.base.is_partial,
            follows_record=self.record is not None and self.source.arch is None,
        )
        if error is None or report_only:
            return
        if self.own_folder is not None:
            error.hint = (
                f"{configuration.NAME} does not describe the tensors: modelcli check {quoted(self.source.model)} "
                "--arch-check lists what differs, and --bare-keys works on the tensors alone"
            )
        raise error

    def _inputs(self, module: nn.Module) -> Inputs | None:
        """Return the model's inputs: those of the command, else of the file, else of the provider."""
        source, record = self.source, self.record
        # An extracted part takes another input.
        whole = record is None or not any(edit.changes_input for edit in record.parsed_edits())
        known = self.base.provider.inputs(self.base, module) if self.base is not None and whole else None
        dtypes = source.input_dtype or (record.input_dtype if record else ())
        shapes, texts = source.input_size, source.inputs
        if shapes is None and not texts and record is not None:
            shapes, texts = record.input_size, record.inputs
        floating = floating_dtype(module) or "float32"
        further = None if self.base is None else self.base.provider.further_inputs(module)
        if known is not None and known.named:  # by name: single ones can be replaced
            stated_by_name = inputs.overridden(known, shapes or (), dtypes, input_texts.parse_all(texts))
            return inputs.fitted(replace(stated_by_name, floating=floating), module, further)
        if texts:
            stated = Inputs(shapes or (), dtypes, floating=floating, named=input_texts.parse_all(texts))
            return inputs.fitted(stated, module, further)
        if shapes is not None:
            return Inputs(shapes, dtypes, known is not None and known.as_list, floating)
        if known is not None:
            return replace(known, dtypes=dtypes or known.dtypes, floating=floating)
        by_itself = inputs.own_inputs(module)
        return None if by_itself is None else replace(by_itself, floating=floating)


def _weights_name(source: Source) -> str | None:
    """Return the name of the weights, which may determine the architecture; None for a file."""
    weights = source.weights
    return None if weights is None or resolve.names_a_file(weights, source.folder, source.model) else weights


def _weights_file(weights: str | None, source: Source) -> Path | None:
    """Return the file that `--weights` names, if any: see `resolve.names_a_file`."""
    if weights is None or not resolve.names_a_file(weights, source.folder, source.model):
        return None
    path = source.folder / weights
    if not path.exists():
        raise references.missing_file(path, weights)
    return path


def set_flags(module: nn.Module, record: Record) -> None:
    """Set `requires_grad` as recorded: the parameters that the record names are frozen, all others are trainable.

    The flags of parameters that it lists without a flag are not known, nor in a new record of the model.
    """
    frozen = set(record.frozen)
    unknown = {info.name for info in record.blueprint.tensors if info.kind == "parameter" and info.is_trained is None}
    for name, parameter in module.named_parameters():
        set_flag(parameter, None if name in unknown else name not in frozen)


def with_arch_instance(source: Source, instance: object) -> tuple[nn.Module, LoadReport]:
    """Load a checkpoint into an existing module, in place."""
    if not isinstance(instance, nn.Module):
        how = f"call it: arch={instance.__name__}()" if callable(instance) and hasattr(instance, "__name__") else None
        raise RequestError(f"arch takes an nn.Module or a reference, not {instance!r:.60}", how)
    reference = resolve.reference_of(source)
    if not isinstance(reference, CheckpointFile):
        raise RequestError(f"{reference} is not a checkpoint, and arch is a module already")
    if source.weights not in (None, "none"):
        raise RequestError(f"weights={source.weights!r} and {reference} both say where the values come from")
    contents = read_to_edit(reference.path, source, [])
    state, report = loading.compare(instance, loading.mapped(contents))
    if not report.mismatched:
        report = loading.load(instance, state)
    if error := report.refusal(contents, type(instance).__name__, strict=source.strict):
        raise error
    return instance, report


def blueprint_of(instance: nn.Module, shapes: tuple[tuple[int, ...], ...] | None) -> Blueprint:
    """Return the blueprint of an existing module, with a forward pass on meta if input shapes are given."""
    if not isinstance(instance, nn.Module):
        raise RequestError(f"blueprint takes an nn.Module or a reference, not {instance!r:.40}")
    found = describe(instance)
    if shapes is None:
        return found
    given = Inputs(shapes, floating=floating_dtype(instance) or "float32")
    return found.with_trace(trace.trace(instance, given, real=lambda: copy.deepcopy(instance)).trace)


def edit_instance(
    instance: nn.Module,
    edits: Sequence[Edit],
    *,
    seed: int,
    shapes: tuple[tuple[int, ...], ...] | None,
    same: bool = False,
) -> nn.Module:
    """Apply edits to a real module, in place. Returns the module; after `extract`, the submodule.

    With `same`, the outputs have to be those of the unedited module, which stays as it was if they are not.
    """
    if not isinstance(instance, nn.Module):
        raise RequestError(f"apply takes an nn.Module, not {instance!r:.40}", "modelcli.load(...) gives one")
    given = None
    if shapes is not None:
        given = Inputs(shapes, floating=floating_dtype(instance) or "float32")
    sources = SourceModels(open_live)
    if not same:
        return apply(instance, edits, seed=seed, inputs=given, sources=sources).model
    from modelcli.live import same_outputs

    with same_outputs.demanded(instance, given or inputs.own_inputs(instance)) as require:
        return require(apply(instance, edits, seed=seed, inputs=given, sources=sources).model)


def edit_with_average(
    instance: nn.Module,
    average: object,
    edits: Sequence[Edit],
    *,
    seed: int,
    shapes: tuple[tuple[int, ...], ...] | None,
    same: bool = False,
) -> nn.Module:
    """Apply edits to a real module and to a moving average of it, in place: to both, or to none if one is wrong.

    `average` has the same tensors, or is a wrapper with such a module as `module`. Other arguments as in
    `edit_instance`.
    """
    if not isinstance(average, nn.Module):
        raise RequestError(f"also_ema takes an nn.Module, not {average!r:.40}", "pass the moving average itself")
    inner = getattr(average, "module", None)
    copied = next((each for each in (average, inner) if _has_tensors_of(each, instance)), None)
    if copied is None:
        raise RequestError(
            f"also_ema: this {type(average).__name__} has other tensors than the model, by name or shape",
            "pass a moving average of the model as it is before the edits",
        )
    with restored_on_error(instance), restored_on_error(copied):
        edited = edit_instance(instance, edits, seed=seed, shapes=shapes, same=same)
        made = edit_instance(copied, edits, seed=seed, shapes=shapes)
        if made is not copied and copied is average:
            raise RequestError(
                "also_ema: the edits give another module, and the average itself cannot become it",
                "apply the edits to the average by itself, and take what apply returns",
            )
    if made is not copied:
        average.module = made
    return edited


def _has_tensors_of(module: object, other: nn.Module) -> bool:
    if not isinstance(module, nn.Module):
        return False
    own, wanted = (
        {name: None if is_lazy(tensor) else tensor.shape for name, tensor in named_tensors(each).items()}
        for each in (module, other)
    )
    return own == wanted
