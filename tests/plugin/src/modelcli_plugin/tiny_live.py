"""How modelcli builds the models of `tiny_models`, and what they take."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from modelcli.language.references import NamedModel
from modelcli.live.build import Architecture
from modelcli.live.inputs import Inputs
from modelcli.live.providers.base import LiveProvider
from modelcli.providers.published import PublishedModel

if TYPE_CHECKING:
    from modelcli.live.script.source_text import SourceText


class LiveTiny(LiveProvider):
    """The two models, their weights, and their one operator."""

    operator_libraries = frozenset({"tiny"})

    def _function(self, name: str) -> Callable[..., nn.Module]:
        from modelcli_plugin import tiny_models

        function: Callable[..., nn.Module] = getattr(tiny_models, name)
        return function

    def published(self, name: str) -> PublishedModel:
        """What the library says of its models; of the second it has counted nothing."""
        params = 408 if name == "mlp" else None
        return PublishedModel(name, "toys", ("COUNTED",), params)

    def parameters(self, name: str) -> Mapping[str, inspect.Parameter]:
        """Those of the function."""
        return inspect.signature(self._function(name)).parameters

    def build(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], weights: str | None) -> nn.Module:
        """Call the function, and load the weights."""
        from modelcli_plugin import tiny_models

        model = self._function(name)(*args, **kwargs)
        return model if weights is None else tiny_models.load(model, tiny_models.counted(model))

    def inputs(self, architecture: Architecture, module: nn.Module) -> Inputs:
        """Images of 4 x 4 pixels for the perceptron, of any size for the convolution."""
        side = 4 if _name(architecture) == "mlp" else 9
        return Inputs(((1, 3, side, side),))

    def formulas(self) -> Mapping[str, Callable[..., int]]:
        """Each element of the output takes a row of the one operand and a column of the other."""

        def of_product(one: torch.Tensor, other: torch.Tensor, *, out: torch.Tensor) -> int:
            return one.shape[0] * other.numel()

        return {"tiny::product": of_product}

    def downloads(self) -> Iterator[tuple[Any, str]]:
        """The function that fetches weights."""
        from modelcli_plugin import tiny_models

        yield tiny_models, "fetch"

    def expression(self, text: SourceText, architecture: Architecture, folder: Path) -> str:
        """A call of the function, with the weights loaded behind it."""
        reference = architecture.reference
        assert isinstance(reference, NamedModel)
        text.imports.add("from modelcli_plugin import tiny_models")
        call = f"tiny_models.{_name(architecture)}({text.arguments(reference.call.args, reference.call.kwargs)})"
        return call if architecture.weights is None else f"tiny_models.load(m := {call}, tiny_models.counted(m))"


def _name(architecture: Architecture) -> str:
    assert isinstance(architecture.reference, NamedModel)
    return architecture.reference.call.name
