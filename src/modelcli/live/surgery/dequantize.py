"""dequantize: fp8 weights of a state dict times their scales; a known class takes its tensors as they are."""

from __future__ import annotations

from typing import NoReturn

from torch import nn

from modelcli.edits.applied import Context
from modelcli.edits.dequantize import Dequantize
from modelcli.edits.key_surgery import needs_keys
from modelcli.errors import RequestError
from modelcli.language import selectors
from modelcli.live.script.source_text import STATEMENTS, delete_statements, dict_statement, quoted
from modelcli.live.script.state import State
from modelcli.live.script.step import StateDictStep
from modelcli.live.surgery.core import blueprint_of
from modelcli.model.dequantized import PRODUCTS, Dequantized
from modelcli.model.scaled_weights import scaled_weights


def carry_out(module: nn.Module, edit: Dequantize, context: Context) -> NoReturn:
    """Raise RequestError: there is no weight with a scale, or the model's own code applies it."""
    blueprint = blueprint_of(module, context)
    names = selectors.select_tensors(blueprint, edit.targets, without=edit.without)
    pairs = scaled_weights({tensor.name: tensor.dtype for tensor in blueprint.tensors})
    if not any(name in pairs for name in names):
        raise RequestError(
            f"nothing to dequantize: {', '.join(edit.targets)} has no fp8 weights with scales",
            "modelcli params shows the dtypes",
        )
    raise needs_keys(edit, type(module).__name__)


# --- scripts ---------------------------------------------------------------------------------------------------------


def state_dict_script_lines(edit: Dequantize, step: StateDictStep, state: State) -> list[str]:
    before, after = step.before, step.after
    names: dict[int, str] = {}
    for name, tensor in before.tensors.items():
        names.setdefault(tensor.identity, name)
    groups: dict[str, dict[str, str]] = {}
    ties: list[tuple[str, str]] = []
    first: dict[object, str] = {}
    for name, tensor in after.tensors.items():
        made = tensor.source
        if not isinstance(made, Dequantized) or before.tensors[name].source == made:
            continue
        if (other := first.setdefault(made.token, name)) is not name:
            ties.append((name, other))
            continue
        groups.setdefault(_scales(made), {})[name] = names[made.scale.identity]
    lines: list[str] = []
    to = "" if edit.dtype == PRODUCTS else f".to(torch.{edit.dtype})"
    for scales, pairs in groups.items():
        if len(pairs) <= STATEMENTS:
            for key, scale in pairs.items():
                lines += [
                    f"weight, scale = state[{quoted(key)}].float(), state[{quoted(scale)}].float()",
                    f"state[{quoted(key)}] = (weight * {scales}){to}",
                ]
        else:
            lines += [
                *dict_statement("scales", pairs.items()),
                "for key, name in scales.items():",
                "    weight, scale = state[key].float(), state[name].float()",
                f"    state[key] = (weight * {scales}){to}",
            ]
    lines += [f"state[{quoted(name)}] = state[{quoted(other)}]" for name, other in ties]
    gone = [name for name in state.names if name not in after.entries]
    state.names = [name for name in state.names if name in after.entries]
    return [*lines, *delete_statements(gone)]


def _scales(made: Dequantized) -> str:
    """Return the expression for the scales of all elements of `weight`."""
    if made.block is None:
        return "scale.reshape(())"
    rows, columns = made.block
    if len(made.scale.shape or ()) == 1:
        return "scale[:, None]"
    grown = "scale"
    if rows > 1:
        grown += f".repeat_interleave({rows}, -2)[..., : weight.shape[-2], :]"
    if columns > 1:
        grown += f".repeat_interleave({columns}, -1)[..., : weight.shape[-1]]"
    return grown
