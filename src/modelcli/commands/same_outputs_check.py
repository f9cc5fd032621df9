"""`--check same`: demand that an edited model gives the outputs of the unedited one."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from modelcli.commands.applied_edits import AppliedEdits, apply_each
from modelcli.commands.editable import opened_keys
from modelcli.commands.target import Target
from modelcli.errors import AnswerNoError, RequestError
from modelcli.language.references import Source
from modelcli.language.stated_inputs import StatedInputs

if TYPE_CHECKING:
    from torch import nn

    from modelcli.commands.editable import Editable
    from modelcli.live.opening import Live
    from modelcli.live.same_outputs import SameOutputs

#: What to do where outputs differ, since some edits are meant to change them.
HINT = "leave --check same out if the edit is meant to change what the model computes"


def require_same_outputs(model: Editable, applied: AppliedEdits, target: Target) -> SameOutputs:
    """Run the unedited and then the edited model on the CPU with values, and compare their outputs.

    A state-dict model is loaded into the architecture that the file records or `--arch` names, before and after.

    Args:
        model: the edited model.
        applied: the edits that are checked.
        target: the model as it was before these edits.

    Raises RequestError if the outputs differ, and if they cannot be compared: no architecture, no known input, a model
    that did not run before.
    """
    source = target.source
    if model.architecture is not None:
        from modelcli.live import opening

        edits = (*target.edits, *(each.edit for each in applied.edits))
        return _compared(lambda: opening.open_real(source, target.edits), lambda: opening.open_real(source, edits))
    if not _has_architecture(source):
        raise RequestError(
            f"--check same runs both models, and {source.model} records no architecture: only its keys are known",
            "--arch REFERENCE names it (edits of keys take --bare-keys --arch REFERENCE); --check none writes the keys "
            "without comparing outputs",
        )
    with tempfile.TemporaryDirectory(prefix="modelcli-", ignore_cleanup_errors=True) as folder:
        paths = Path(folder) / "before.pth", Path(folder) / "after.pth"
        return _compared(
            lambda: _loaded(_keys_before(target), target, paths[0], "before the edit"),
            lambda: _loaded(model, target, paths[1], "after the edit"),
        )


def _has_architecture(source: Source) -> bool:
    """Whether the file records an architecture that `--bare-keys` ignores, or `--arch` names one."""
    if source.arch is not None:
        return True
    return source.bare_keys and opened_keys(replace(source, bare_keys=False)) is None


def _keys_before(target: Target) -> Editable:
    model = opened_keys(target.source)
    assert model is not None
    apply_each(model, target.edits, target.locations)
    return model


def _loaded(keys: Editable, target: Target, path: Path, when: str) -> tuple[nn.Module, Live]:
    """Write a state-dict model into a temporary file, and load that into its architecture.

    Raises RequestError if the keys do not fit.
    """
    from modelcli import writing
    from modelcli.live import opening

    writing.write(keys.plan(path, "pth", bare=True), path, writing.WriteOptions(durable=False), kind="pth")
    arch = target.source.model if target.source.arch is None else target.source.arch
    source = replace(target.source, model=str(path.resolve()), arch=arch, key=None, bare_keys=False)
    try:
        return opening.open_real(source)
    except AnswerNoError as error:
        raise RequestError(
            f"--check same loads the keys into {arch}, and they do not fit {when}: "
            f"{error.message.replace(source.model, target.source.model)}",
            "--check none writes the keys without comparing outputs",
        ) from error


#: Builds a model with values.
_Opened = Callable[[], "tuple[nn.Module, Live]"]


def _compared(unedited: _Opened, edited: _Opened) -> SameOutputs:
    from modelcli.live import same_outputs
    from modelcli.live.inputs import how_to_state_input

    module, live = unedited()
    inputs = live.inputs
    if inputs is None:
        raise RequestError("--check same runs both models, and their input is not known", how_to_state_input(module))
    reference = same_outputs.expected(module, inputs)
    if reference.failure is not None:
        raise RequestError(
            f"--check same has nothing to compare with: before the edit {reference.failure}",
            "correct --input-size or --input; --check none writes the model without running it",
        )
    del module  # the values of one model at a time
    after, live = edited()
    _require_same_inputs(inputs, live.inputs)
    found = same_outputs.compare(reference, after)
    base = live.architecture
    if not found.ran and base is not None and base.provider.has_descriptions:
        base.provider.describe_edits(base, after)  # a class may go by its configuration in a forward pass
        found = same_outputs.compare(reference, after)
    if found.problem is not None:
        raise RequestError(found.refusal, HINT)
    return found


def _require_same_inputs(before: StatedInputs, after: StatedInputs | None) -> None:
    """Raise RequestError if the edited model takes another input than the unedited one."""
    if after is not None and _described(before) == _described(after):
        return
    now = "its input is not known after the edit" if after is None else f"{_described(after)} after the edit"
    raise RequestError(
        f"--check same gives both models the same input, but the model takes {_described(before)} before the edit, and "
        f"{now}",
        HINT,
    )


def _described(inputs: StatedInputs) -> str:
    """Return the shapes and dtypes of inputs as text."""
    dtypes = inputs.dtypes or (inputs.floating,)
    last = len(dtypes) - 1
    parts = [f"{dtypes[min(index, last)]}[{','.join(map(str, shape))}]" for index, shape in enumerate(inputs.shapes)]
    return ", ".join((*parts, *map(str, inputs.named))) or "no input"
