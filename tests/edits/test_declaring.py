"""The kinds of words that edits declare."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelcli.edits.declaring import FINITE_NUMBER, finite_number, number_text
from modelcli.errors import RequestError


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_finite_number_is_read_back_with_all_its_digits(number: float) -> None:
    found = finite_number(number_text(number))
    assert (found, math.copysign(1, found)) == (number, math.copysign(1, number))


@pytest.mark.parametrize(
    "word", ["", "x", "nan", "-inf", "infinity", "1e999", "1_000", " 1", "\u0661", "0x10", "1e", "."]
)
def test_other_words_are_refused(word: str) -> None:
    with pytest.raises(RequestError, match="is not a finite number"):
        finite_number(word)
    assert FINITE_NUMBER.read is not None
    with pytest.raises(RequestError, match=r"--low: .* is not a finite number"):
        FINITE_NUMBER.read("--low", word)
