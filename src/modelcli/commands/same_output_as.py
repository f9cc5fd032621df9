"""`check --same-output-as`: whether two models give the same outputs, and which module is the first that does not."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from modelcli import resolve
from modelcli.commands.applied_edits import apply_each
from modelcli.commands.assertions import AssertionResult, OutputDifference
from modelcli.commands.editable import opened_keys
from modelcli.commands.look import stdout_is_for_data
from modelcli.commands.target import Target
from modelcli.errors import RequestError
from modelcli.language.quoting import quoted
from modelcli.language.references import Source
from modelcli.language.stated_inputs import StatedInputs

if TYPE_CHECKING:
    import torch
    from torch import nn

    from modelcli.live.inputs import Inputs
    from modelcli.live.opening import Live
    from modelcli.live.same_outputs import SameOutputs

CHECK = "same-output-as"


@stdout_is_for_data
def same_output_as(
    target: Target, reference: str, rtol: float | None, atol: float | None, notes: list[str]
) -> AssertionResult:
    """Run two models on the CPU with values, on the same seeded input, and compare their outputs.

    A checkpoint without an architecture runs in that of the other model. The input is the one that the command states,
    else the one that the models are known to take.

    Args:
        target: the model, with the edits of its recipe.
        reference: the model that gives the expected outputs.
        rtol, atol: an element may differ by `atol + rtol * abs(expected element)`; None for the usual tolerances.
        notes: gets what there is to say besides.

    Raises RequestError if a model has no architecture or no known input, and as opening it does.
    """
    from modelcli.live import opening, same_outputs

    one, other = _with_architectures(target.source, _source_of(reference, target), notes)
    inputs = _inputs(replace(target, source=one), other, reference)
    module, live = opening.open_real(other)
    _add_notes(notes, reference, live)
    expected = same_outputs.expected(module, inputs)
    if expected.failure is not None:
        return AssertionResult(CHECK, False, f"{reference} does not run: {expected.failure}", reference, answered=False)
    floating = _floating_dtype(module)
    del module  # the values of one model at a time
    after, live = opening.open_real(one, target.edits)
    _add_notes(notes, target.source.model, live)
    own = _floating_dtype(after)
    if own is not None and own != floating:
        expected = same_outputs.with_floating(expected, own)
    names = f"in {reference}", f"in {target.source.model}"
    how = same_outputs.How(rtol, atol, any_floating=True, before=names[0], after=names[1])
    found = same_outputs.compare(expected, after, how)
    base = live.architecture
    if not found.ran and base is not None and base.provider.has_descriptions:
        base.provider.describe_edits(base, after)  # a class may go by its configuration in a forward pass
        found = same_outputs.compare(expected, after, how)
    notes += [note for note in found.notes if note not in notes]
    return _result(found, reference)


def _result(found: SameOutputs, reference: str) -> AssertionResult:
    differs = OutputDifference(found.max_abs_diff if found.tensors else None)
    if found.shows_nothing:
        assert found.problem is not None
        return AssertionResult(CHECK, False, found.problem, reference, answered=False, outputs=differs)
    if found.problem is None:
        return AssertionResult(CHECK, True, found.difference, reference, outputs=differs)
    text = found.problem
    if found.first is not None:
        path, kind = found.first
        differs = replace(differs, first_module=found.first)
        text = f"{text}; {path} ({kind}) is the first module with another output"
    elif found.ran and not found.seen_of_modules:
        text = f"{text}; the modules whose outputs fit into memory agree"
    return AssertionResult(CHECK, False, text, reference, outputs=differs)


def _source_of(reference: str, target: Target) -> Source:
    """Return the source of the other model. The input that the command states, and not a recipe's, is for both."""
    source = target.source
    found = Source(reference, trust=source.trust, seed=source.seed)
    if target.recipe is not None and not target.restates_input:
        return found
    return replace(found, input_size=source.input_size, input_dtype=source.input_dtype, inputs=source.inputs)


def _with_architectures(one: Source, other: Source, notes: list[str]) -> tuple[Source, Source]:
    """Let a checkpoint without an architecture run in that of the other model.

    Raises RequestError if neither has one.
    """
    sources = [one, other]
    bare = [opened_keys(source) is not None for source in sources]
    for number, source in enumerate(sources):
        if bare[number] and resolve.quantized_folder(source) is not None:
            raise RequestError(
                f"the weights in {source.model} are quantized, so its class cannot run them",
                f"modelcli dequantize . bfloat16 -m {quoted(source.model)} -o out/ gives a folder that runs",
            )
    if bare == [True, True]:
        raise RequestError(
            f"neither {one.model} nor {other.model} records its architecture, so neither can run",
            "--arch REFERENCE names that of the first",
        )
    for number, source in enumerate(sources):
        if bare[number]:
            architecture = sources[1 - number]
            named = architecture.arch or architecture.model
            sources[number] = replace(source, arch=named, bare_keys=False)
            notes.append(f"{source.model} records no architecture, and runs in that of {named}")
    return sources[0], sources[1]


def _inputs(target: Target, other: Source, reference: str) -> Inputs:
    """Return the input of both models. Raises RequestError if it is not known, or if they take different ones."""
    from modelcli.live import opening
    from modelcli.live.inputs import how_to_state_input

    live, edited = opening.open_live(other), opening.open_live(target.source)
    apply_each(edited, target.edits, target.locations)
    own, known, model = edited.inputs, live.inputs, target.source.model
    if own is None or known is None:
        if (found := own or known) is None:
            raise RequestError(
                f"--{CHECK} runs both models, and it is not known what they take", how_to_state_input(live.module)
            )
        return found
    if _shapes(own) != _shapes(known):
        raise RequestError(
            f"--{CHECK} gives both models the same input, and {model} takes {_described(own)}, {reference} "
            f"{_described(known)}",
            "--input-size or --input states one for both",
        )
    return known


def _shapes(inputs: StatedInputs) -> object:
    return [*inputs.shapes], {item.path: (item.shape, item.value) for item in inputs.named}


def _described(inputs: StatedInputs) -> str:
    """Return the shapes of inputs as text."""
    parts = [f"[{','.join(map(str, shape))}]" for shape in inputs.shapes]
    return ", ".join((*parts, *map(str, inputs.named))) or "no input"


def _floating_dtype(module: nn.Module) -> torch.dtype | None:
    """Return the dtype of the first floating-point parameter, which the input has as well; None if there is none."""
    from modelcli.live.describe import floating_dtype
    from modelcli.live.sources import dtype_of

    name = floating_dtype(module)
    return None if name is None else dtype_of(name)


def _add_notes(notes: list[str], name: str, live: Live) -> None:
    """Add what there is to say of a model, such as that its values are random."""
    told = {note.removeprefix(f"{name}: ") for note in notes}
    notes += [f"{name}: {note}" for note in (*live.notes, *live.random_value_notes()) if note not in told]
