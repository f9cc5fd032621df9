"""Sources of bytes: contiguous copies of views, pieces of computed bytes, and the memory that they need."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from modelcli import checkpoints
from modelcli.checkpoints.storage import Span
from modelcli.live import sources
from modelcli.live.loading import on_meta
from modelcli.live.sources import Value, row_major
from modelcli.values.conversion import Conversion
from tests.checkpoints.test_checkpoints import SAFETENSORS_DTYPES, raw
from tests.conftest import Cli

VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "whole": lambda flat: flat,
    "slice": lambda flat: flat[16:40].view(4, 6),
    "transposed": lambda flat: flat[:96].view(8, 12).t(),
    "permuted": lambda flat: flat[:96].view(2, 3, 4, 4).permute(3, 1, 0, 2),
    "channels last": lambda flat: flat[:96].view(2, 4, 4, 3).permute(0, 3, 1, 2),
    "columns": lambda flat: flat[:96].view(8, 12)[:, 2:5],
    "every third": lambda flat: flat[5::3],
    "expanded": lambda flat: flat[7:10].view(3, 1).expand(3, 5),
    "expanded in front": lambda flat: flat[:6].expand(4, 6),
    "one element expanded": lambda flat: flat[3].expand(3, 2),
    "overlapping": lambda flat: flat.as_strided((5, 4), (2, 1), 3),
    "overlapping, transposed": lambda flat: flat.as_strided((4, 5), (1, 2), 3),
    "no dimension": lambda flat: flat[9],
    "empty": lambda flat: flat[4:4],
    "empty, strided": lambda flat: flat[:96].view(8, 12)[:, 3:3],
    "one row": lambda flat: flat[:96].view(8, 12)[2:3].t(),
}


def numbers(dtype: str, count: int = 96) -> torch.Tensor:
    """Return elements of any dtype whose bytes are all different."""
    size = getattr(torch, dtype).itemsize
    values = torch.arange(count * size, dtype=torch.int64).remainder(2 if dtype == "bool" else 251).to(torch.uint8)
    return values.view(getattr(torch, dtype))


def joined(source: sources.AnySource) -> bytes:
    return b"".join(map(bytes, source.chunks()))


@pytest.mark.parametrize("window", [8, 40, 1 << 26])
@pytest.mark.parametrize("view", VIEWS)
def test_a_view_is_written_as_a_contiguous_copy_has_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, view: str, window: int
) -> None:
    monkeypatch.setattr(sources, "WINDOW", window)
    for dtype in SAFETENSORS_DTYPES:
        shown = VIEWS[view](numbers(dtype))
        torch.save({"w": shown}, "in.pth")
        expected = raw(shown.clone(memory_format=torch.contiguous_format))
        found = row_major(on_meta(checkpoints.read(Path("in.pth"))).tensors["w"])
        assert found.nbytes == len(expected)
        assert joined(found) == joined(row_major(shown)) == expected
        size = shown.element_size()
        for start in range(0, len(expected), max(size, len(expected) // size // 7 * size)):
            for stop in {start, start + size, len(expected)}:
                assert joined(found.part(start, stop - start)) == expected[start:stop]


def test_a_contiguous_view_is_a_part_of_its_file(folder: Path) -> None:
    """Then the system can copy it."""
    torch.save({"w": numbers("float32")[8:20].view(3, 4)}, "in.pth")
    found = row_major(on_meta(checkpoints.read(Path("in.pth"))).tensors["w"])
    (entry,) = checkpoints.read(Path("in.pth")).tensors.values()
    assert found == entry.storage.part(32, 48)  # type: ignore[union-attr]
    assert isinstance(found, Span)


def test_parts_of_what_is_in_memory_are_the_same_memory() -> None:
    flat = torch.arange(10.0)
    part = Value(flat.untyped_storage()).part(8, 12)
    assert joined(part) == raw(flat[2:5])
    flat[3] = 7.0
    assert joined(part) == raw(flat[2:5])
    assert part.real().data_ptr() == flat[2:].data_ptr()


def test_equal_parts_of_what_is_computed_are_one() -> None:
    flat = torch.arange(10.0)
    whole = sources.converted(flat, torch.float64)
    assert whole.part(8, 16) == whole.part(0, 40).part(8, 16)
    assert whole.part(8, 16) != whole.part(16, 16)
    assert joined(whole.part(8, 16)) == raw(flat[1:3].double())
    assert isinstance(whole, Conversion)


@pytest.mark.parametrize("out", ["out.safetensors", "out/"])
def test_a_view_with_two_names_is_written_once(cli: Cli, out: str) -> None:
    flat = numbers("float32")
    views = {name: VIEWS[name.removesuffix(" again")](flat) for name in ("slice", "transposed", "every third")}
    state = {f"{name}{more}": view for more in ("", " again") for name, view in views.items()}
    torch.save(state, "in.pth")
    for _ in range(2):
        cli("save", out, "-m", "in.pth", "--force")
        files = sorted(Path(out).glob("*.safetensors")) if out.endswith("/") else [Path(out)]
        written = {file.name: file.read_bytes() for file in files}
        loaded = {name: tensor for file in files for name, tensor in safetensors.torch.load_file(file).items()}
        assert loaded.keys() == views.keys()
        assert all(tensor.equal(views[name]) for name, tensor in loaded.items())
        contents = checkpoints.read(Path(out))
        assert {name: info.tied_to for name, info in contents.infos().items()} == {
            name: name.removesuffix(" again") if name.endswith(" again") else None for name in state
        }
    assert written == {file.name: file.read_bytes() for file in files}


MEMORY = r"""
    import re, sys
    from pathlib import Path
    from modelcli.cli import main
    from modelcli.live import sources

    def run(*words):
        assert main([*words, "--force", "--quiet"]) == 0

    def peak():  # only of this program; that of `getrusage` includes its parent's
        return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

    sources.WINDOW = 1 << 22
    run("save", "out.safetensors", "-m", "small.pth")
    run("replace", "m", "Linear(10,20)", "--keep-weights", "-m", "small.pth", "-o", "out.pth")
    before = peak()
    run(*sys.argv[1:])
    print(peak() - before)
"""


def slices(matrix: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"m{number}": matrix[number * 5000 : (number + 1) * 5000] for number in range(8)}


def linear(matrix: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"m.weight": matrix, "m.bias": matrix[:, 0].clone()}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not tell of peaks")
@pytest.mark.parametrize(
    ("make", "words", "drawn"),
    [
        (slices, ("save", "out.safetensors"), 0),
        (lambda matrix: {"m": matrix.t()}, ("save", "out/"), 0),
        (linear, ("replace", "m", "Linear(1000,36000)", "--keep-weights", "-o", "out.pth"), 0),
        (linear, ("replace", "m", "Linear(1000,45000)", "--keep-weights", "-o", "out.pth"), 180e6),
    ],
)
def test_memory_does_not_grow_with_what_is_written(
    folder: Path, make: Callable[[torch.Tensor], dict[str, torch.Tensor]], words: tuple[str, ...], drawn: float
) -> None:
    torch.save({"m.weight": torch.zeros(30, 10).t(), "m.bias": torch.zeros(30)}, "small.pth")
    torch.save(make(torch.zeros(40_000, 1000)), "large.pth")  # 160 MB
    program = [sys.executable, "-c", textwrap.dedent(MEMORY), *words, "-m", "large.pth"]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    assert int(done.stdout.splitlines()[-1]) < drawn + 90e6
