"""The assertions of `check`, and the result of an assertion."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from modelcli.errors import RequestError, did_you_mean
from modelcli.model.dtypes import FLOATING
from modelcli.model.tensors import Shape


@dataclass(frozen=True)
class Assertions:
    """The assertions about a model. None, empty and False mean that there is no such assertion.

    Attributes:
        max_params: the maximum number of parameters.
        max_bytes: the maximum number of bytes of parameters and buffers.
        frozen, trainable, has, absent: selectors.
        dtypes: the dtypes that floating-point tensors may have.
        output_shapes: the shapes of the output of the forward pass.
        same_as: references to models that must be equal.
        without: selectors of tensors that may differ from those of `same_as`.
        same_output_as: references to models that must give the same outputs on the same input.
        rtol, atol: the tolerances of `same_output_as` for each element; None for the usual ones.
        content_hash: the hash of the names, dtypes, shapes and values of all tensors, `sha256:` and 64 digits.
        complete: whether the files of a folder must agree.
        arch_check: whether the folder's configuration must build the model that its tensors belong to.
    """

    max_params: int | None = None
    max_bytes: int | None = None
    frozen: tuple[str, ...] = ()
    trainable: tuple[str, ...] = ()
    has: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    finite: bool = False
    safe: bool = False
    output_shapes: tuple[Shape, ...] = ()
    same_as: tuple[str, ...] = ()
    same_output_as: tuple[str, ...] = ()
    rtol: float | None = None
    atol: float | None = None
    content_hash: str | None = None
    complete: bool = False
    arch_check: bool = False
    without: tuple[str, ...] = ()

    def require_sense(self) -> None:
        """Raise RequestError if there is no assertion, or if one makes no sense."""
        if self.without and not self.same_as:
            raise RequestError(
                f"--except {self.without[0]} works only with --same-as", "add --same-as REFERENCE, or remove --except"
            )
        for name, value in (("rtol", self.rtol), ("atol", self.atol)):
            if value is not None and not self.same_output_as:
                raise RequestError(f"--{name} works only with --same-output-as", f"remove --{name}")
            if value is not None and not 0 <= value < math.inf:
                raise RequestError(f"--{name} {value:g} is no tolerance", f"--{name} 1e-3")
        if self == Assertions(without=self.without):
            raise RequestError(
                "no assertion is given",
                "pass one, such as --max-params 60M, --frozen features or --finite; modelcli check --help lists all",
            )
        for name in self.dtypes:
            if name not in FLOATING:
                raise RequestError(f"{name!r} is not a floating-point dtype", did_you_mean(name, FLOATING))


@dataclass(frozen=True)
class OutputDifference:
    """How the outputs of two models differ.

    Attributes:
        max_abs_diff: the largest absolute difference; None if no output could be compared.
        first_module: the path and the type of the first module with another output, if one is known.
    """

    max_abs_diff: float | None
    first_module: tuple[str, str] | None = None


@dataclass(frozen=True)
class AssertionResult:
    """The result of one assertion.

    Attributes:
        check: the assertion's option, without dashes: `max-params`.
        passed: whether it holds.
        found: what the model has (a number, a shape or text), or why this could not be decided.
        wanted: what was asserted (a number, a shape or text).
        answered: whether the assertion could be decided.
        outputs: how the outputs of two models differ, if that was asserted; the JSON document shows it.
        on_record: if only the file's record decides: why nothing else could; else None.
    """

    check: str
    passed: bool
    found: Any
    wanted: Any
    answered: bool = True
    on_record: str | None = None
    outputs: OutputDifference | None = None
