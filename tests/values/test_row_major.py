"""Non-contiguous tensors are written in row-major order, like torch's contiguous copies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from modelcli import checkpoints
from modelcli.checkpoints import TensorEntry
from modelcli.values import row_major
from tests.checkpoints.test_checkpoints import SAFETENSORS_DTYPES, raw
from tests.live.test_sources import VIEWS, numbers


@pytest.mark.parametrize("window", [8, 40, 1 << 26])
@pytest.mark.parametrize("view", VIEWS)
def test_the_elements_are_those_of_a_contiguous_copy(
    folder: Path, monkeypatch: pytest.MonkeyPatch, view: str, window: int
) -> None:
    monkeypatch.setattr(row_major, "WINDOW", window)
    for dtype in SAFETENSORS_DTYPES:
        shown = VIEWS[view](numbers(dtype))
        torch.save({"w": shown}, "in.pth")
        expected = raw(shown.clone(memory_format=torch.contiguous_format))
        entry = checkpoints.read(Path("in.pth")).tensors["w"]
        assert isinstance(entry, TensorEntry)
        found = row_major.row_major(entry)
        assert found.nbytes == len(expected)
        assert b"".join(map(bytes, found.chunks())) == found.bytes() == expected
        size = shown.element_size()
        for start in range(0, len(expected), max(size, len(expected) // size // 7 * size)):
            for stop in {start, start + size, len(expected)}:
                assert found.part(start, stop - start).bytes() == expected[start:stop]
