"""Show torchinfo's own table, made by torchinfo, for models that it can run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from modelcli.errors import ModelcliError, RequestError
from modelcli.live import memory
from modelcli.live.describe import walk
from modelcli.live.inputs import Arguments
from modelcli.live.trace import meta_copy_if_possible

if TYPE_CHECKING:
    from modelcli.live.opening import Live

#: torchinfo's time doubles with each level of nesting: 24 levels took half a minute.
MOST_LEVELS = 18
_OWN = "use modelcli's own table: remove --layout torchinfo"


def table(live: Live, *, mode: str, depth: int | None) -> str:
    """Return `str(torchinfo.summary(model, ...))`, made on the meta device, else on the CPU if memory allows.

    Args:
        live: the model.
        mode: `eval` or `train`.
        depth: torchinfo's depth; None means 3.

    Raises:
        RequestError: torchinfo cannot run the model.
    """
    levels = max(path.count(".") + 1 for path, _ in walk(live.module))
    if levels > MOST_LEVELS:
        raise RequestError(f"torchinfo would take hours for a model with {levels} levels of nesting", _OWN)
    ways: list[tuple[str, Callable[[], nn.Module]]] = [("meta", lambda: meta_copy_if_possible(live.module))]
    if memory.fits(4 * memory.bytes_of(live.module)):
        ways.append(("cpu", live.real_module))
    reason = ""
    for device, build in ways:
        try:
            return _made(build(), None if live.inputs is None else live.inputs.tensors(device), device, mode, depth)
        except ModelcliError:
            raise
        except Exception as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            reason = (str(cause) or type(cause).__name__).strip().splitlines()[0]
    raise RequestError(f"torchinfo cannot run this model: {reason}", _OWN)


def _made(module: nn.Module, given: Arguments | None, device: str, mode: str, depth: int | None) -> str:
    import torchinfo  # nothing else needs it

    inputs: dict[str, Any] = {}
    if given is not None:
        inputs = {"input_data": dict(given.kwargs) if given.kwargs and not given.args else list(given.args)}
        if given.args:
            inputs |= given.kwargs
    with torch.no_grad(), _on_meta(device):
        made = torchinfo.summary(
            module, device=device, mode=mode, verbose=0, cache_forward_pass=False, depth=depth or 3, **inputs
        )
        # Names come from the model, and their control characters must not reach a terminal.
        return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in str(made))


@contextlib.contextmanager
def _on_meta(device: str) -> Iterator[None]:
    """Make tensors that `forward` creates on the meta device too."""
    if device != "meta":
        yield
        return
    with torch.device("meta"):
        yield
