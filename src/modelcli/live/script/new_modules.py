"""New modules in a script: their constructor calls, and the statement that seeds torch before them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from modelcli.language import expressions
from modelcli.language.expressions import Call
from modelcli.live.describe import dtype_name
from modelcli.live.script.source_text import SourceText
from modelcli.live.sources import named_tensors


def constructor_call(script: SourceText, call: Call, new: nn.Module) -> str:
    """Return the constructor call of `new`, with `.to(...)` and `.eval()` for its dtype and mode in the model."""
    text = script.value(call)
    if not expressions.gives(call, "dtype"):
        dtypes = [dtype_name(t.dtype) for t in named_tensors(new).values() if t.dtype.is_floating_point]
        if dtypes and dtypes[0] != "float32":
            text += f".to(torch.{dtypes[0]})"
    return text if new.training else f"{text}.eval()"


def seed_statements(seed: int | None, news: Iterable[nn.Module]) -> list[str]:
    """Return the statement that seeds torch's generator; none without a seed, or if no new module has tensors."""
    if seed is None or not any(map(named_tensors, news)):
        return []
    return [f"torch.manual_seed({seed})"]


def tensor_names(new: nn.Module) -> list[str]:
    """Return the keys of a new module's own state dict."""
    return list(new.state_dict())


def new_statements(script: SourceText, call: Call, new: nn.Module, seed: int | None) -> list[str]:
    """Return the statements that assign the new module to `new`; none if it has no tensors."""
    if not new.state_dict():
        return []
    seeded = [f"torch.manual_seed({seed})"] if seed is not None and named_tensors(new) else []
    return [*seeded, f"new = {constructor_call(script, call, new)}"]
