"""Give up building a model as soon as its tensors show that it is not the one that a file is from."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from modelcli.live.sources import is_lazy
from modelcli.model.tensors import Shape


class UnfitError(BaseException):
    """The model that is being built is not wanted. No constructor can catch it as one of its own errors."""


@contextlib.contextmanager
def given_up(shapes: Collection[Shape], most_others: int) -> Iterator[None]:
    """In the block, a module that registers too many parameters of other shapes raises UnfitError.

    Args:
        shapes: the shapes that are looked for.
        most_others: how many parameters of another shape a model may register.
    """
    others = 0

    def count(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> None:
        nonlocal others
        if parameter is not None and not is_lazy(parameter) and tuple(parameter.shape) not in shapes:
            others += 1
            if others > most_others:
                raise UnfitError

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()
