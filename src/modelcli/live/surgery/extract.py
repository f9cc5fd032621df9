"""extract: a submodule as the model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from modelcli.edits.applied import Applied, Change, Context
from modelcli.edits.extract import Extract
from modelcli.errors import RequestError
from modelcli.language import selectors
from modelcli.language.input_texts import InputText
from modelcli.live import signatures
from modelcli.live.describe import describe, dtype_name, floating_dtype
from modelcli.live.inputs import Inputs, fitted, tensors_in
from modelcli.live.providers import further_inputs_of
from modelcli.live.script.access_paths import module_expression
from modelcli.live.script.source_text import quoted
from modelcli.live.script.state import State
from modelcli.live.script.step import StateDictStep, Step
from modelcli.live.surgery.core import blueprint_of, brief, count, submodule
from modelcli.live.trace import first_calls, layers_that_ran
from modelcli.model.dtypes import INPUT_DTYPES
from modelcli.wording import listed


def carry_out(module: nn.Module, edit: Extract, context: Context) -> Applied[nn.Module]:
    """Let a submodule be the model; it takes what flows into it."""
    path = selectors.select_one(blueprint_of(module, context), edit.path, edit.name)
    if not path:
        raise RequestError("the model itself is the model already", "extract takes a path in it: extract features")
    part = submodule(module, path)
    line = str(Extract(path=selectors.literal(path)))
    change = Change(path, edit.name, brief(module), brief(part), count(module), count(part), (line,))
    inputs, notes = _inputs_of(module, part, path, context.inputs)
    return Applied(part, [change], notes, inputs)


def _inputs_of(module: nn.Module, part: nn.Module, path: str, inputs: Inputs | None) -> tuple[Inputs | None, list[str]]:
    """What flows into a submodule: tensors by position or by name, and settings that are not as `forward` has them.

    The second value has a note on what cannot be stated. It is left out if `forward` does without it; else nothing is
    known of the inputs.
    """
    if (call := first_calls(module, [path], inputs).get(path)) is None:
        return None, []
    floating = floating_dtype(part) or "float32"
    found = _Call(part, *call, floating)
    if found.reason is not None:
        return None, [f"what flows into {path} is not known: {found.reason}"]
    stated = Inputs(tuple(found.shapes), found.dtypes(), floating=floating, named=tuple(found.named))
    if not found.named:
        return (stated, found.notes(path)) if found.shapes else (None, [])
    try:
        stated = fitted(stated, part, further_inputs_of(part))
    except RequestError as error:
        return None, [f"what flows into {path} is not known: {error.message}"]
    failure = layers_that_ran(part, stated)[1]
    if failure is not None and not failure.needs_values:
        return None, [f"what flows into {path} is not known: with all of it that can be stated, {failure.reason}"]
    return stated, found.notes(path)


class _Call:
    """A call of a submodule as inputs that a record can state.

    Attributes:
        shapes: the shapes of the tensors in the first positions.
        named: the other inputs, by position or name.
        left_out: the arguments that no text states and that `forward` does without, each with its class.
        reason: why the call cannot be stated; None if it can.
    """

    def __init__(self, part: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], floating: str) -> None:
        self.floating = floating
        self.shapes: list[tuple[int, ...]] = []
        self.named: list[InputText] = []
        self.left_out: dict[str, str] = {}
        self.reason: str | None = None
        self._dtypes: list[str] = []
        self._parameters = signatures.of(part.forward).parameters
        self._further = further_inputs_of(part)
        while args and args[-1] is None:
            args = args[:-1]
        for position, value in enumerate(args):
            self._add_position(position, value)
        for name, value in kwargs.items():
            self._add_keyword(name, value)

    def dtypes(self) -> tuple[str, ...]:
        """The dtypes of the tensors in the first positions; empty if all have the dtype of the model."""
        return () if set(self._dtypes) <= {self.floating} else tuple(self._dtypes)

    def notes(self, path: str) -> list[str]:
        if not self.left_out:
            return []
        what = listed([f"{name} ({kind})" for name, kind in self.left_out.items()], 4)
        return [f"{path} was given {what}, which no input can state: it runs without"]

    def _add_position(self, position: int, value: Any) -> None:
        if isinstance(value, torch.Tensor) and not self.named:
            self.shapes.append(tuple(value.shape))
            self._dtypes.append(dtype_name(value.dtype))
        elif (made := self._texts((str(position),), value)) is not None:
            self.named += made
        else:
            self.reason = f"no input can state argument {position}, which is a {type(value).__name__}"

    def _add_keyword(self, name: str, value: Any) -> None:
        parameter = self._parameters.get(name)
        if parameter is not None and value is parameter.default:
            return
        is_tensor = next(tensors_in(value), None) is not None
        if parameter is None and not is_tensor and (value is None or name not in (self._further or (name,))):
            return
        if (made := self._texts((name,), value)) is not None:
            self.named += made
        elif parameter is None or parameter.default is not parameter.empty:
            self.left_out[name] = type(value).__name__
        else:
            self.reason = f"no input can state {name}, which is a {type(value).__name__}"

    def _texts(self, path: tuple[str, ...], value: Any) -> list[InputText] | None:
        """The inputs that state a value; None if none can."""
        if isinstance(value, torch.Tensor):
            dtype = dtype_name(value.dtype)
            usual = Inputs((), floating=self.floating).usual_dtype(path)
            return (
                [InputText(path, tuple(value.shape), None if dtype == usual else dtype)]
                if dtype in INPUT_DTYPES
                else None
            )
        if value is None or type(value) in (bool, int, float, str):
            return [InputText(path, None, value=value)]
        if type(value) is dict:
            items = list(value.items())
        elif type(value) in (tuple, list):
            items = [(str(index), item) for index, item in enumerate(value)]
        else:
            return None
        if not items or not all(isinstance(key, str) and re.fullmatch(r"\w+", key, re.ASCII) for key, _ in items):
            return None
        made = [self._texts((*path, key), item) for key, item in items]
        return None if None in made else [each for texts in made for each in texts or ()]


# --- scripts ---------------------------------------------------------------------------------------------------------


def script_lines(edit: Extract, step: Step) -> list[str]:
    (path,) = selectors.select_modules(describe(step.before), [edit.path])
    return [f"model = {module_expression(step.before, path)}"]


def state_dict_script_lines(edit: Extract, step: StateDictStep, state: State) -> list[str]:
    (path,) = selectors.select_modules(step.before.blueprint, [edit.path])
    prefix = f"{path}."
    state.names = [name.removeprefix(prefix) for name in state.names if name.startswith(prefix)]
    pairs = f"key.removeprefix({quoted(prefix)}): value for key, value in state.items()"
    return [f"state = {{{pairs} if key.startswith({quoted(prefix)})}}"]
