"""The values of tensors as modelcli shows them equal torch's `tolist()`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from modelcli import checkpoints
from modelcli.checkpoints import Span, TensorEntry
from modelcli.errors import RequestError
from modelcli.live import value_entries
from modelcli.values import printed, reading
from tests.needs import each, needs_torch
from tests.values.test_statistics import COMPLEX, FLOATS, FLOATS_OF_A_BYTE, INTEGERS, random_tensor


def of_file(path: Path, tensor: torch.Tensor, *, whole: bool) -> tuple[Any, str]:
    """Return the values of a tensor in a file, as a list and as a line of text."""
    torch.save({"w": tensor}, path)
    rows = checkpoints.read(path).rows
    lists, texts = printed.collect({name: e for name, e in rows.items() if isinstance(e, TensorEntry)}, whole=whole)
    return lists.get("w"), texts["w"]


def by_hand(values: Any, most: int) -> str:
    """Return a nested list as a line of text. Lists of more than six items show the first and the last three."""
    if not isinstance(values, list):
        return f"{values:.4g}" if isinstance(values, float | complex) else str(values)
    if len(values) > 6 and most:
        parts = [
            *(by_hand(value, most) for value in values[:3]),
            "...",
            *(by_hand(value, most) for value in values[-3:]),
        ]
    else:
        parts = [by_hand(value, most) for value in values]
    return "[" + ",".join(parts) + "]"


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
@pytest.mark.parametrize("dtype", each((*INTEGERS, *FLOATS, *FLOATS_OF_A_BYTE, *COMPLEX)))
def test_values_of_every_dtype_equal_torchs_tolist(tmp_path: Path, dtype: str) -> None:
    for shape in ((), (1,), (3, 4), (24,), (25,), (5, 8), (9, 10)):
        tensor = random_tensor(dtype, 10, 10).flatten()[: torch.Size(shape).numel()].reshape(shape)
        wanted = tensor.tolist()
        _, text = of_file(tmp_path / "m.pth", tensor, whole=False)
        assert text == by_hand(wanted, tensor.numel() > printed.MAX_IN_FULL)
        if not tensor.is_complex():
            found, line = of_file(tmp_path / "m.pth", tensor, whole=True)
            assert line == text
            assert str(found) == str(wanted)  # NaN is not equal to itself


def test_values_of_views(tmp_path: Path) -> None:
    base = torch.arange(60.0).reshape(5, 12)
    for view in (base.T, base[1:4, ::3], base[2], base[:, 5], base[0, :1].expand(4, 3), base.flip(0), base[:0]):
        found, _ = of_file(tmp_path / "m.pth", view, whole=True)
        assert found == view.tolist()
        assert printed.collect(value_entries.plain({"w": view}), whole=True)[0]["w"] == view.tolist()


def test_any_nonzero_byte_of_a_bool_is_true(tmp_path: Path) -> None:
    odd = torch.tensor([0, 1, 2, 255], dtype=torch.uint8).view(torch.bool)
    assert of_file(tmp_path / "m.pth", odd, whole=True) == ([False, True, True, True], "[False,True,True,True]")


def test_long_lists_of_values_are_shortened(tmp_path: Path) -> None:
    _, text = of_file(tmp_path / "m.pth", torch.zeros(20, 20, 20, 20, 20), whole=False)
    assert text.count("0") <= printed.MAX_SHOWN
    assert text.startswith("[[[")


def test_the_list_of_complex_numbers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="w is complex, and JSON has no complex numbers"):
        of_file(tmp_path / "m.pth", torch.ones(2, dtype=torch.complex64), whole=True)


@needs_torch("float4_e2m1fn_x2")
def test_packed_values_are_left_out(tmp_path: Path) -> None:
    packed = torch.ones(3, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    torch.save({"packed": packed, "w": torch.ones(2)}, tmp_path / "m.pth")
    rows = checkpoints.read(tmp_path / "m.pth").rows
    tensors = {name: entry for name, entry in rows.items() if isinstance(entry, TensorEntry)}
    assert len(tensors) == 2
    assert printed.collect(tensors, whole=True) == ({"w": [1.0, 1.0]}, {"w": "[1,1]"})


LARGE = torch.arange(3_000_000, dtype=torch.float32)


@pytest.mark.parametrize(
    "view",
    [
        LARGE,
        LARGE.reshape(1000, 3000),
        LARGE.reshape(1000, 3000).T,
        LARGE.reshape(3000, 10, 100),
        LARGE.reshape(10, 3000, 100).permute(2, 0, 1),
        LARGE.reshape(50, 60, 1000)[::7, 5:, ::3],
        LARGE[:1].expand(5000, 70),
        LARGE[:3000].expand(700, 3000),
        LARGE.to(torch.bfloat16).reshape(3, 1_000_000),
        LARGE[: 2 << 14].reshape(2, 1 << 14),
    ],
    ids=lambda view: f"{list(view.shape)} {list(view.stride())}",
)
def test_only_the_shown_part_of_a_large_tensor_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, view: torch.Tensor
) -> None:
    read = 0
    original = reading.Reader._read

    def counted(reader: reading.Reader, span: Span, memory: memoryview) -> None:
        nonlocal read
        read += len(memory)
        original(reader, span, memory)

    monkeypatch.setattr(reading.Reader, "_read", counted)
    _, text = of_file(tmp_path / "m.pth", view, whole=False)
    corner = view
    for axis, size in enumerate(view.shape):  # the first and the last seven, which a line shortens in the same way
        if size > 14:
            places = torch.tensor([*range(7), *range(size - 7, size)])
            corner = corner.index_select(axis, places)
    assert text == by_hand(corner.tolist(), printed.MAX_IN_FULL)
    assert read <= 1 << 20


def test_values_of_tensors_with_many_dimensions(tmp_path: Path) -> None:
    for shape in ([1] * 40 + [300, 300], [2] * 17, [300, *[1] * 40, 300], [1] * 64):
        tensor = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
        _, text = of_file(tmp_path / "m.pth", tensor, whole=False)
        assert text.startswith("[" * len(shape) + "0")
        assert of_file(tmp_path / "m.pth", tensor, whole=True)[1] == text
