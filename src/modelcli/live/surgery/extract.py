"""extract: a submodule as the model."""

from __future__ import annotations

import torch
from torch import nn

from modelcli.edits.applied import Applied, Change, Context
from modelcli.edits.extract import Extract
from modelcli.errors import RequestError
from modelcli.language import selectors
from modelcli.live import signatures
from modelcli.live.describe import describe, dtype_name, floating_dtype
from modelcli.live.inputs import Inputs
from modelcli.live.script.access_paths import module_expression
from modelcli.live.script.source_text import quoted
from modelcli.live.script.state import State
from modelcli.live.script.step import StateDictStep, Step
from modelcli.live.surgery.core import blueprint_of, brief, count, submodule
from modelcli.live.trace import first_calls


def carry_out(module: nn.Module, edit: Extract, context: Context) -> Applied[nn.Module]:
    """Let a submodule be the model; it takes what flows into it."""
    path = selectors.select_one(blueprint_of(module, context), edit.path, edit.name)
    if not path:
        raise RequestError("the model itself is the model already", "extract takes a path in it: extract features")
    part = submodule(module, path)
    line = str(Extract(path=selectors.literal(path)))
    change = Change(path, edit.name, brief(module), brief(part), count(module), count(part), (line,))
    return Applied(part, [change], inputs=_inputs_of(module, part, path, context.inputs))


def _inputs_of(module: nn.Module, part: nn.Module, path: str, inputs: Inputs | None) -> Inputs | None:
    """What flows into a submodule, where that is nothing but tensors, and settings as its `forward` has them anyway."""
    args, kwargs = first_calls(module, [path], inputs).get(path, ((), {}))
    while args and args[-1] is None:
        args = args[:-1]
    defaults = signatures.of(part.forward).parameters
    stated = [name for name, value in kwargs.items() if name not in defaults or value is not defaults[name].default]
    if not args or stated or not all(isinstance(value, torch.Tensor) for value in args):
        return None
    floating = floating_dtype(part) or "float32"
    dtypes = tuple(dtype_name(value.dtype) for value in args)
    shapes = tuple(tuple(value.shape) for value in args)
    return Inputs(shapes, () if set(dtypes) == {floating} else dtypes, floating=floating)


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
