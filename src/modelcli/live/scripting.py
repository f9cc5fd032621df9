"""Write opening, editing and saving a model as a plain PyTorch script that needs no modelcli."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from modelcli import checkpoints
from modelcli import edits as edit_lines
from modelcli.checkpoints import CompositeEntry, Contents, formats, shapes
from modelcli.checkpoints.format import Candidate, Format
from modelcli.checkpoints.optimizers import optimizers_in
from modelcli.checkpoints.storage import Span
from modelcli.edits import Edit
from modelcli.edits.applied import Applied
from modelcli.errors import ModelcliError
from modelcli.language.references import Source
from modelcli.live import surgery
from modelcli.live.build import Architecture
from modelcli.live.describe import describe
from modelcli.live.opening import Live, open_live
from modelcli.live.script import dtypes, flags
from modelcli.live.script.source_text import (
    InexpressibleError,
    SourceText,
    delete_statements,
    on_one_line,
    path_in_script,
    quoted,
)
from modelcli.live.script.state import State
from modelcli.live.script.step import StateDictStep, Step
from modelcli.live.source_models import SourceModels
from modelcli.live.surgery import seed_of
from modelcli.model.blueprint import Blueprint
from modelcli.model.parameter_origins import Held, OldParameters
from modelcli.model.state_dict import StateDictModel
from modelcli.model.wrapper_prefixes import Unwrapping
from modelcli.writing.optimizers import is_outdated


@dataclass(frozen=True)
class Script:
    """The text of a script, and notes on what it leaves out."""

    text: str
    notes: tuple[str, ...]
    blueprint: Blueprint


class OpenKeys(Protocol):
    """A state-dict model that is open for edits."""

    notes: list[str]
    seed: int
    edit_count: int
    model: StateDictModel
    contents: Contents
    sources: SourceModels

    def apply(self, edits: Sequence[Edit]) -> Applied[StateDictModel]: ...

    def keys_in_order(self) -> list[str]:
        """Return the keys in the order in which modelcli writes them."""
        ...

    @property
    def parameters_opened(self) -> Mapping[str, Held]:
        """The parameters that it had when it was opened, in order."""
        ...

    @property
    def parameters_now(self) -> Mapping[str, Held]:
        """The parameters that it has, in order."""
        ...


def script(
    source: Source,
    edits: Sequence[Edit],
    locations: Sequence[str],
    out: Path,
    kind: str,
    *,
    bare: bool = False,
    keys: OpenKeys | None = None,
) -> Script:
    """Write a script that opens a model, edits it and saves its state dict to `out`: the tensors that `save` writes.

    Where plain PyTorch has no statements for something, the script says so and stops there, and a note tells it.
    `locations` say where the edits are written, for errors; `bare` drops what a training checkpoint holds besides its
    state dict.
    `keys` is the model where only its keys are known.

    Raises RequestError for an edit that is wrong, and what opening the model raises.
    """
    text = SourceText()
    work = _KeysScript(text, keys) if keys is not None else _Script(text, open_live(source), open_live(source).module)
    work.open_model(source)
    for edit, location in zip(edits, locations, strict=True):
        work.edit(edit, location)
    work.save(out, kind, bare=bare)
    return Script(text.text(), (*work.notes, *work.edit_notes, *text.notes), work.describe())


def write_reading(text: SourceText, source: Source, opened: Live | Contents) -> None:
    """Write the statements that read another model of a script, and leave its state dict in `state`."""
    if isinstance(opened, Contents):
        _Writer(text, opened).read(source, opened, Unwrapping())
        return
    _Script(text, opened, opened.module).open_model(source)
    text.write("state = model.state_dict()")


class _Writer:
    """Writes the parts of a script that are the same for a model and for keys alone."""

    #: The expression for the state dict that is written.
    state_text: ClassVar[str]
    #: Whether the order of the parameters is that of the keys in the file.
    from_keys: ClassVar[bool]

    def __init__(self, text: SourceText, contents: Contents | None) -> None:
        self.text = text
        self.contents = contents
        self.edit_notes: list[str] = []

    def read(self, source: Source, contents: Contents, unwrapping: Unwrapping) -> None:
        """Write the statements that read the state dict of a file."""
        try:
            if contents.foreign or (source.tensors_only and checkpoints.read(contents.path, key=source.key).foreign):
                raise InexpressibleError("the file holds objects of foreign classes, which weights_only=True refuses")
            _read_state(self.text, contents, unwrapping)
        except InexpressibleError as error:
            self.text.refuse(f"read {contents.path}", str(error))

    def applied(self, apply: Callable[[], Applied[Any]], edit: Edit, location: str) -> list[Edit]:
        """Carry out an edit. Returns the edits that it was resolved to, without patterns and `_`."""
        try:
            applied = apply()
        except ModelcliError as error:
            error.message = f"{location}: {str(edit)!r}: {error.message}"
            raise
        self.edit_notes += applied.notes
        self.text.paragraph(str(edit))
        resolved = [edit_lines.parse(line) for change in applied.changes for line in change.resolved]
        if not resolved:
            self.text.write("# nothing changes")
        return resolved

    def shared(self) -> tuple[list[str], bool]:
        """The names of tensors that have one before, and whether each of the others is all of its storage."""
        raise NotImplementedError

    def parameters(self) -> tuple[Mapping[str, Held], Mapping[str, Held]]:
        """Return the parameters of the model as it was opened, and those of the edited model."""
        raise NotImplementedError

    def drop_outdated_optimizers(self, contents: Contents) -> None:
        """Write statements that take out optimizers whose numbers stand for the parameters before the edits."""
        opened, now = self.parameters()
        old = OldParameters(opened)
        for optimizer in optimizers_in(contents.tree, contents.key or ()):
            if optimizer.path and is_outdated(optimizer, old, now, from_keys=self.from_keys):
                at = f"checkpoint{_keys(optimizer.path)}"
                self.text.write(
                    f"# {on_one_line(optimizer.place)} has the state of the parameters before the edits: "
                    "create the optimizer again",
                    f"{at} = None",
                )
                self.text.notes.append(
                    f"the script drops {optimizer.place}, whose state is that of the parameters before the edits; "
                    "modelcli itself writes it so that it fits"
                )

    def save(self, out: Path, kind: str, *, bare: bool) -> None:
        """Write the statements that save the state dict, or the training checkpoint around it."""
        text, contents = self.text, self.contents
        text.paragraph()
        format_ = formats.named(kind)
        if format_.is_folder:
            text.refuse(f"write {path_in_script(out)}/", "PyTorch has no statement that writes a folder of shards")
            return
        if out.parent.name:
            text.imports.add("import os")
            text.write(f"os.makedirs({quoted(path_in_script(out.parent))}, exist_ok=True)")
        state = self.state_text
        if not format_.holds_views:
            again, alone = self.shared()
            if again:
                text.write(f"state = {state}", "# tied tensors are saved once, under their first name")
                text.write(*delete_statements(again))
                state = "state"
            if not alone:
                # Every tensor is held by itself, row-major.
                whole = "value.clone(memory_format=torch.contiguous_format)"
                state = f"{{key: {whole} for key, value in {state}.items()}}"
        if format_.holds_values and contents is not None and contents.key is not None and not bare:
            text.write(f"checkpoint{_keys(contents.key)} = {state}")
            self.drop_outdated_optimizers(contents)
            state = "checkpoint"
        line = format_.script_writes(quoted(path_in_script(out)), state)
        if line is None:
            text.refuse(f"write {path_in_script(out)}", f"PyTorch has no statement that writes {format_.title}")
            return
        text.imports.update(line.imports)
        text.write(line.text)


class _KeysScript(_Writer):
    """Writes the parts of a script for a file without a known architecture."""

    state_text = "state"
    from_keys = True

    def __init__(self, text: SourceText, opened: OpenKeys) -> None:
        super().__init__(text, opened.contents)
        self.opened = opened
        self.state = State(list(opened.contents.tensors))

    @property
    def notes(self) -> list[str]:
        return self.opened.notes

    def describe(self) -> Blueprint:
        return self.opened.model.blueprint

    def open_model(self, source: Source) -> None:
        """Write the statements that read the file."""
        self.read(source, self.opened.contents, Unwrapping())

    def edit(self, edit: Edit, location: str) -> None:
        """One edit, as what it was resolved to."""
        before = self.opened.model
        resolved = self.applied(lambda: self.opened.apply([edit]), edit, location)
        seed: int | None = seed_of(self.opened.seed, self.opened.edit_count)
        self.state.order_after_edit = self.opened.keys_in_order()
        for item in resolved:
            try:
                step = StateDictStep(self.text, before, self.opened.model, seed, self.opened.sources)
                self.text.write(*state_statements(item, step, self.state))
            except InexpressibleError as error:
                self.text.refuse(str(edit), str(error))
                self.state = State(self.state.order_after_edit)  # later edits are checked too
            seed = None  # the generator goes on

    def parameters(self) -> tuple[Mapping[str, Held], Mapping[str, Held]]:
        return self.opened.parameters_opened, self.opened.parameters_now

    def shared(self) -> tuple[list[str], bool]:
        first: dict[object, str] = {}
        again = []
        tensors = {name: t for name, t in self.opened.model.tensors.items() if t.persistent}
        tensors = {name: tensors[name] for name in self.opened.model.keys if name in tensors}
        for name, tensor in tensors.items():
            view = (tensor.storage, tensor.offset, tensor.shape, tensor.stride, tensor.dtype)
            if first.setdefault(view, name) != name and tensor.elements:
                again.append(name)
        left_out = set(again)
        rest = [tensor for name, tensor in tensors.items() if name not in left_out]
        whole = all(t.shape is None or shapes.is_row_major(t.shape, t.stride) for t in rest)
        return again, whole and len({tensor.storage for tensor in rest}) == len(rest)


class _Script(_Writer):
    """Writes the parts of a script. `before` is the model before each edit, and `live` after it."""

    state_text = "model.state_dict()"
    from_keys = False

    def __init__(self, text: SourceText, live: Live, before: nn.Module) -> None:
        super().__init__(text, live.contents)
        self.live = live
        self.before = before

    @property
    def notes(self) -> list[str]:
        return self.live.notes

    def parameters(self) -> tuple[Mapping[str, Held], Mapping[str, Held]]:
        return self.live.parameters_opened, self.live.parameters_now

    def describe(self) -> Blueprint:
        return self.live.describe()

    # --- the model -------------------------------------------------------------------------------------------------

    def open_model(self, source: Source) -> None:
        """Write the statements for the architecture, the edits of a record, and the values of a file."""
        base, contents = self.live.architecture, self.contents
        assert base is not None
        if self._loaded_by_its_library(base) or self._adapted_by_its_library(base):
            return
        _construct(self.text, base, source, self.live.seed if self._draws() else None)
        self._follow_record(base)
        if contents is None:
            return
        self.text.paragraph()
        self.read(source, contents, self.live.report.unwrapping if self.live.report else Unwrapping())
        arguments = ["state"]
        if not source.strict:
            arguments.append("strict=False")
        if self._takes_dtypes():
            built = self._built(base)
            if dtypes.has_ties(built):  # assign=True would untie them
                self.text.write(*dtypes.cast_statements(self.text, built, describe(built), self.live.describe()))
            else:
                arguments.append("assign=True")  # the tensors of the file, in their own dtype
        self.text.write(f"model.load_state_dict({', '.join(arguments)})")
        if self.live.record is not None:
            built = self._built(base)
            self.text.write(
                *_without_comment(flags.requires_grad_statements(built, describe(built), self.live.describe()))
            )

    def _loaded_by_its_library(self, base: Architecture) -> bool:
        """Write the call by which the library loads a model from its folder. Returns whether there is one."""
        folder, module = self.live.own_folder, self.live.module
        if folder is None or self.live.record is not None:
            return False
        return self._written_as_one_call(
            lambda: base.provider.expression_with_weights(self.text, base, module, folder), f"load {base.reference}"
        )

    def _adapted_by_its_library(self, base: Architecture) -> bool:
        """Write the call by which the library adapts a file to the model. Returns whether there is such a call."""
        contents = self.contents
        if contents is None or self.live.own_folder is not None or self.live.record is not None:
            return False
        return self._written_as_one_call(
            lambda: base.provider.expression_with_file(self.text, base, contents),
            f"load {contents.path} into {base.reference}",
        )

    def _written_as_one_call(self, expression_of: Callable[[], str | None], what: str) -> bool:
        """Write a call that returns the model with its values, or the reason why it cannot be written.

        Args:
            expression_of: returns the expression of the call, or None if the library has none.
            what: what the call would do, for the message that the script cannot do it.

        Returns:
            Whether a call or a reason was written.
        """
        try:
            expression = expression_of()
        except InexpressibleError as error:
            self.text.refuse(what, str(error))
            return True
        if expression is None:
            return False
        if self._draws():
            self.text.write(f"torch.manual_seed({self.live.seed})")
        self.text.write(f"model = {expression}")
        return True

    def _draws(self) -> bool:
        """Whether the result contains values that the constructor draws."""
        missing = self.live.report is not None and bool(self.live.report.missing)
        return self.live.drawn or (self.live.contents is not None and missing)

    def _built(self, base: Architecture) -> nn.Module:
        """Return the architecture after the edits of the record: the script's model before it reads the file."""
        built = base.on_meta(self.live.seed)
        record = self.live.record
        edits = () if record is None else [edit for edit in record.parsed_edits() if not edit.reads_models]
        return surgery.apply(built, edits, inputs=self.live.inputs).model

    def _takes_dtypes(self) -> bool:
        """Whether the file has tensors of another dtype than the architecture. `load_state_dict` would convert them."""
        assert self.live.architecture is not None
        built = self._built(self.live.architecture)
        before = describe(built).by_name
        return any(name in before and before[name].dtype != t.dtype for name, t in self.live.describe().by_name.items())

    def _follow_record(self, base: Architecture) -> None:
        """Write the edits that change the architecture to that of the file. The values come from the file."""
        record = self.live.record
        edits = [] if record is None else [edit for edit in record.parsed_edits() if not edit.changes_values_only]
        if not edits:
            return
        before, after = base.on_meta(self.live.seed), base.on_meta(self.live.seed)
        self.text.paragraph("the edits that were made before it was saved")
        for edit in edits:
            after = surgery.apply(after, [edit], inputs=self.live.inputs).model
            self._translate([edit], before, after, None, str(edit))
            before = surgery.apply(before, [edit], inputs=self.live.inputs).model

    # --- edits -----------------------------------------------------------------------------------------------------

    def edit(self, edit: Edit, location: str) -> None:
        """One edit, as what it was resolved to."""
        resolved = self.applied(lambda: self.live.apply([edit]), edit, location)
        seed: int | None = seed_of(self.live.seed, self.live.edit_count)
        # Modules that take the place of others are told together: none of them lies in another one.
        together = len(resolved) > 1 and hasattr(edit.handler_module(), "script_lines_together")
        for group in [resolved] if together else [[item] for item in resolved]:
            self._translate(group, self.before, self.live.module, seed, str(edit))
            seed = None  # the generator goes on
        live = self.live
        self.before = surgery.apply(self.before, resolved, inputs=live.inputs, sources=live.sources).model

    def save(self, out: Path, kind: str, *, bare: bool) -> None:
        """What the model says of itself now, and what writes it."""
        base = self.live.architecture
        if base is not None and self.live.edits:
            lines = base.provider.script_of_edits(self.text, base, self.live.module)
            if lines:
                self.text.paragraph("what the model says of itself")
                self.text.write(*lines)
        super().save(out, kind, bare=bare)

    def _translate(
        self, edits: Sequence[Edit], before: nn.Module, after: nn.Module, seed: int | None, line: str
    ) -> None:
        try:
            self.text.write(*statements(edits, Step(self.text, before, after, seed, self.live.sources)))
        except InexpressibleError as error:
            self.text.refuse(line, str(error))

    def shared(self) -> tuple[list[str], bool]:
        return _shared(self.live.module)


def statements(edits: Sequence[Edit], step: Step) -> list[str]:
    """Return the statements of one edit of a model, or of several edits that one was resolved to.

    Raises:
        InexpressibleError: plain PyTorch has no such statements.
    """
    handler = edits[0].handler_module()
    if len(edits) > 1:
        return list(handler.script_lines_together(edits, step))
    write = getattr(handler, "script_lines", None)
    if write is None:
        raise InexpressibleError(f"there are no statements of PyTorch for {edits[0].name}")
    return list(write(edits[0], step))


def state_statements(edit: Edit, step: StateDictStep, state: State) -> list[str]:
    """Return the statements of an edit of a state dict. Raises InexpressibleError if there are none."""
    write = getattr(edit.handler_module(), "state_dict_script_lines", None)
    if write is None:
        raise InexpressibleError(
            f"plain PyTorch has no statements for {edit.name} on a file that records no architecture"
        )
    return [*write(edit, step, state), *state.sort()]


def _shared(module: nn.Module) -> tuple[list[str], bool]:
    """The names of tensors that have one before, and whether each of the others has its storage for itself."""
    first: dict[tuple[object, ...], str] = {}
    again = []
    tensors = {name: value for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
    for name, value in tensors.items():
        view = (value.untyped_storage()._cdata, value.storage_offset(), value.shape, value.stride(), value.dtype)
        if first.setdefault(view, name) != name and value.numel():
            again.append(name)
    rest = [value for name, value in tensors.items() if name not in again]
    storages = {value.untyped_storage()._cdata for value in rest}
    return again, len(storages) == len(rest) and all(value.is_contiguous() for value in rest)


def _without_comment(lines: Sequence[str]) -> list[str]:
    return [line for line in lines if not line.startswith("#")]


# --- where the model comes from ------------------------------------------------------------------------------------


def _construct(text: SourceText, base: Architecture, source: Source, seed: int | None) -> None:
    """Write the statements that build `model`. `seed` is None if the model has no random values."""
    if base.instance is None and seed is not None:
        text.write(f"torch.manual_seed({seed})")
    try:
        text.write(f"model = {base.provider.expression(text, base, source.folder)}")
    except InexpressibleError as error:
        text.refuse(f"make {base.reference}", str(error))
    if base.instance is not None:
        text.notes.append(f"{base.reference} gets its values when its file runs")


def _read_state(text: SourceText, contents: Contents, unwrapping: Unwrapping) -> None:
    """Write the statements that read `state`, a dict of tensors."""
    if contents.path.is_dir() and not _is_folder_of_its_own(contents):
        entries = contents.tensors.values()
        parts = [part for entry in entries for part in (entry.parts if isinstance(entry, CompositeEntry) else (entry,))]
        files = sorted({part.storage.path for part in parts if isinstance(part.storage, Span)})
        loaded = [_loaded(text, formats.of_file(Candidate(file)), file) for file in files]
        text.write("state = {}", *(f"state |= {line}" for line in loaded))
    else:
        loaded_one = _loaded(text, formats.named(contents.format), contents.path)
        if contents.key is not None:
            text.write(f"checkpoint = {loaded_one}", f"state = checkpoint{_keys(contents.key)}")
        else:
            text.write(f"state = {loaded_one}")
    if unwrapping:
        text.write(_unwrapped(unwrapping))


def _unwrapped(found: Unwrapping) -> str:
    """Return the statement that removes the prefixes of wrappers from the keys of `state`."""
    key = "key"
    if found.markers:
        markers = quoted(found.markers[0])
        test = f"part != {markers}" if len(found.markers) == 1 else f"part not in {found.markers!r}"
        key = f'".".join(part for part in key.split(".") if {test})'
    if found.prefix:
        key += f".removeprefix({quoted(found.prefix)})"
    left_out = "".join(f" if key != {quoted(name)}" for name in found.dropped[:1])
    if len(found.dropped) > 1:
        left_out = f" if key not in {found.dropped!r}"
    return f"state = {{{key}: value for key, value in state.items(){left_out}}}"


def _is_folder_of_its_own(contents: Contents) -> bool:
    """Whether the format of a folder has no single files, unlike a folder of shards."""
    return any(format_.is_folder and format_.name == contents.format for format_ in formats.every())


def _loaded(text: SourceText, format_: Format, file: Path) -> str:
    """Return the expression that reads a file."""
    line = format_.script_reads(quoted(path_in_script(file)))
    if line is None:
        raise InexpressibleError(format_.unread_by_scripts)
    text.imports.update(line.imports)
    return line.text


def _keys(path: Sequence[str | int]) -> str:
    return "".join(f"[{step if isinstance(step, int) else quoted(step)}]" for step in path)


__all__ = ["Script", "script", "write_reading"]
