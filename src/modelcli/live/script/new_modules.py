"""New modules in a script: the calls that make them, and the seed of their values."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from modelcli.language import expressions
from modelcli.language.expressions import Call
from modelcli.live.describe import dtype_name
from modelcli.live.script.source_text import SourceText
from modelcli.live.sources import named_tensors


def new_module(script: SourceText, call: Call, new: nn.Module) -> str:
    """The call that makes a module, with the dtype and mode that it has in the model."""
    text = script.value(call)
    if not expressions.gives(call, "dtype"):
        dtypes = [dtype_name(t.dtype) for t in named_tensors(new).values() if t.dtype.is_floating_point]
        if dtypes and dtypes[0] != "float32":
            text += f".to(torch.{dtypes[0]})"
    return text if new.training else f"{text}.eval()"


def seeded(seed: int | None, news: Iterable[nn.Module]) -> list[str]:
    """What sets the generator, where one of the new modules has numbers."""
    if seed is None or not any(map(named_tensors, news)):
        return []
    return [f"torch.manual_seed({seed})"]


def own_names(new: nn.Module) -> list[str]:
    """The names that the tensors of a new module have in it."""
    return list(new.state_dict())


def new_statements(script: SourceText, call: Call, new: nn.Module, seed: int | None) -> list[str]:
    """What makes `new`, where it has tensors."""
    if not new.state_dict():
        return []
    seeded = [f"torch.manual_seed({seed})"] if seed is not None and named_tensors(new) else []
    return [*seeded, f"new = {new_module(script, call, new)}"]
