"""The schemes of init: functions of `torch.nn.init` with their arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import init

from modelcli.errors import RequestError, did_you_mean
from modelcli.language import expressions
from modelcli.language.expressions import Call
from modelcli.live import signatures
from modelcli.live.meta_models import seeded

#: The scheme that is a module's own `reset_parameters`, and no function of `torch.nn.init`.
DEFAULT = "default"


def schemes_of_torch() -> dict[str, Callable[..., Any]]:
    """The functions of `torch.nn.init` that fill a tensor, by their names without the trailing underscore."""
    return {
        name.removesuffix("_"): function
        for name, function in vars(init).items()
        if name.endswith("_")
        and not name.startswith("_")
        and inspect.isfunction(function)
        and next(iter(signatures.of(function).parameters), None) == "tensor"
    }


@dataclass(frozen=True)
class Scheme:
    """A function of `torch.nn.init` with its arguments; `text` is how a person writes it."""

    text: str
    signature: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def fill(self, tensor: torch.Tensor) -> None:
        """Draw the numbers of a real tensor, in place."""
        self.function(tensor, *self.args, **self.kwargs)

    def refusal(self, tensor: torch.Tensor) -> str | None:
        """Why it cannot fill a tensor of this shape, dtype and layout, tried on a small one; None if it can."""
        # The first size is kept: what `dirac` takes depends on whether its groups divide it.
        sizes = tensor.shape[: tensor.dim() > 1] + torch.Size(min(n, 2) for n in tensor.shape[tensor.dim() > 1 :])
        # Where a tensor is expanded, several of its elements are one, which torch fills with a constant only.
        stored = [1 if step == 0 else n for n, step in zip(sizes, tensor.stride(), strict=True)]
        with seeded(0), torch.no_grad():
            try:
                self.fill(torch.zeros(stored, dtype=tensor.dtype).expand(sizes))
            except Exception as error:
                return (str(error) or type(error).__name__).splitlines()[0]
        return None


def scheme_name(call: Call) -> str:
    """The name without what may stand around it: `torch.nn.init.normal_` is `normal`."""
    name = call.name
    for package in ("torch.", "nn.", "init."):
        name = name.removeprefix(package)
    return name.removesuffix("_")


def scheme_of(call: Call) -> Scheme:
    """The scheme that an expression names.

    Raises RequestError for what is no function of `torch.nn.init`, and for arguments that do not fit its signature.
    """
    name, schemes = scheme_name(call), schemes_of_torch()
    function = schemes.get(name)
    if function is None:
        if name == DEFAULT:
            raise RequestError("default resets weights and biases together, so it cannot be passed to --bias")
        near = did_you_mean(name, [*schemes, DEFAULT])
        raise RequestError(
            f"no scheme {call.name!r} in torch.nn.init", near or f"there are: {', '.join(sorted(schemes))}, {DEFAULT}"
        )
    full = signatures.of(function)
    own = [p for p in full.parameters.values() if p.name not in ("tensor", "generator")]
    signature = full.replace(parameters=own, return_annotation=full.empty)
    shown_signature = f"{name}{signature}"
    for value in (*call.args, *call.kwargs.values()):
        if not isinstance(value, int | float | str | None):
            raise RequestError(f"{call}: {expressions.to_text(value)} is neither a number nor a word", shown_signature)
    try:
        signature.bind(*call.args, **call.kwargs)
    except TypeError as error:
        raise RequestError(f"{call}: {error}", shown_signature) from None
    text = expressions.to_text(Call(name, call.args, call.kwargs)).removesuffix("()")
    if name == "trunc_normal":
        _require_hits(text, signature.bind(*call.args, **call.kwargs))
    return Scheme(text, shown_signature, function, call.args, call.kwargs)


#: How many numbers torch may have to draw for one that `trunc_normal` keeps.
_MOST_DRAWS = 100


def _require_hits(text: str, arguments: inspect.BoundArguments) -> None:
    """Raise RequestError for a truncated normal distribution that torch would draw from for hours.

    It draws evenly from [a, b] and keeps what falls below the density, as a share of the highest one there. With the
    mean d standard deviations outside, and the interval w of them wide, about one number in d * w does.
    """
    arguments.apply_defaults()
    mean, std, a, b = (arguments.arguments[name] for name in ("mean", "std", "a", "b"))
    if not all(isinstance(number, int | float) for number in (mean, std, a, b)) or not std:
        return  # torch says itself what is wrong
    outside = max(a - mean, mean - b) / abs(std)
    if outside > 1 and outside * (b - a) / abs(std) > _MOST_DRAWS:
        raise RequestError(
            f"{text} would reject nearly every value that it draws: [{a}, {b}] lies {outside:.3g} standard deviations "
            f"from the mean {mean}",
            f"a and b bound the values themselves: trunc_normal({mean},{std},{mean - 2 * std:g},{mean + 2 * std:g}) "
            "cuts at two standard deviations",
        )
