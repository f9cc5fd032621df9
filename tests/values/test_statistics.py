"""`params --stats` equals what plain torch computes from the whole tensor in float64, and reads nothing else."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import statistics as exactly
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import save_file
from torch import nn

from modelcli import checkpoints
from modelcli.checkpoints import Span, TensorEntry
from modelcli.cli import progress
from modelcli.live import value_entries
from modelcli.render.documents import params
from modelcli.render.views import Share, number, percent
from modelcli.render.writers import print_rich, to_plain
from modelcli.values import ordered_work, passes, reading, statistics
from tests.conftest import Cli
from tests.needs import each, needs_torch, what_torch_has
from tests.nets import Tied

NOTHING = dict.fromkeys(params.STATS)
INTEGERS = ("bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64")
FLOATS = ("float16", "bfloat16", "float32", "float64")
FLOATS_OF_A_BYTE = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
COMPLEX = ("complex32", "complex64", "complex128")


def plain(tensor: torch.Tensor) -> dict[str, Any]:
    """Return the statistics of a tensor, computed by plain torch from all elements at once."""
    tensor = tensor.detach()
    numbers = tensor.to(torch.complex128).abs() if tensor.is_complex() else tensor.to(torch.float64)
    finite = numbers[numbers.isfinite()]
    whole = not (tensor.is_complex() or tensor.is_floating_point())
    values = [int(value) for value in tensor.flatten().tolist()] if whole else finite.tolist()
    return {
        "min": min(values, default=None),
        "max": max(values, default=None),
        "mean": finite.mean().item() if values else None,
        "std": finite.std().item() if len(values) > 1 else None,
        "zeros": int((numbers == 0).sum()),
        "nan": int(numbers.isnan().sum()),
        "inf": int(numbers.isinf().sum()),
    }


def assert_close(found: Any, wanted: dict[str, Any]) -> None:
    """Require equal statistics; mean and deviation to twelve digits, because float64 is summed in another order."""
    assert list(found) == list(wanted)
    scale = max(abs(wanted["min"]), abs(wanted["max"])) if wanted["min"] is not None else 0
    for key, value in wanted.items():
        close = value if value is None or key not in ("mean", "std") else pytest.approx(value, abs=1e-12 * scale)
        assert found[key] == close, key


def random_tensor(dtype: str, *shape: int) -> torch.Tensor:
    """Return a random tensor with zeros, and with NaN and Inf if the dtype has them."""
    wanted = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(3)
    count = torch.Size(shape).numel()
    if dtype in ("float64", "complex128"):  # random bytes of these give numbers whose squares overflow
        made = torch.randn(count, dtype=wanted, generator=generator)
        made[:7] = torch.tensor([0, math.nan, math.inf, -math.inf, -0.0, 1e-310, 1e100])
        return made.reshape(shape)
    size = torch.empty(0, dtype=wanted).element_size()
    data = torch.randint(0, 2 if dtype == "bool" else 256, (count * size,), generator=generator, dtype=torch.uint8)
    data[: 3 * size] = 0
    return data.view(wanted).reshape(shape)


def of_file(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Save tensors to a file. Returns their statistics, read from the file."""
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    return dict(statistics.collect(entries_in(path)))


def entries_in(path: Path, *names: str) -> dict[str, TensorEntry]:
    """Return the tensors of a file, or those with these names."""
    rows = checkpoints.read(path).rows
    return {
        name: entry for name, entry in rows.items() if isinstance(entry, TensorEntry) and (not names or name in names)
    }


def in_memory(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return the statistics of tensors in memory."""
    return dict(statistics.collect(value_entries.plain(tensors)))


def entry_of(tensor: torch.Tensor) -> TensorEntry:
    return value_entries.plain({"w": tensor})["w"]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PIECE", 64)


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch) -> list[Span]:
    """Return a list of the spans that are read from files, in order. At most 1 MiB is read ahead of each."""
    spans: list[Span] = []
    asked, read = reading.Reader.bytes, reading.Reader._read

    def spy(reader: reading.Reader, storage: Span) -> memoryview:
        spans.append(storage)
        return asked(reader, storage)

    def spy_on_read(reader: reading.Reader, span: Span, memory: memoryview) -> None:
        assert len(memory) == span.nbytes
        assert span in spans or span.nbytes <= 1 << 20
        read(reader, span, memory)

    monkeypatch.setattr(reading.Reader, "bytes", spy)
    monkeypatch.setattr(reading.Reader, "_read", spy_on_read)
    return spans


# --- the numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
@pytest.mark.parametrize("chunk", [1, 63, 64, 1 << 20])
@pytest.mark.parametrize("dtype", each((*INTEGERS, *FLOATS, *FLOATS_OF_A_BYTE, *COMPLEX)))
def test_every_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, chunk: int) -> None:
    monkeypatch.setattr(reading, "PIECE", chunk)
    tensor = random_tensor(dtype, 31, 4, 2)
    assert_close(of_file(tmp_path / "m.pth", {"w": tensor})["w"], plain(tensor))
    assert_close(in_memory({"w": tensor})["w"], plain(tensor))


@pytest.mark.parametrize("dtype", each((*INTEGERS, *FLOATS, *FLOATS_OF_A_BYTE, "complex64")))
def test_safetensors(tmp_path: Path, dtype: str) -> None:
    tensors = {"odd": torch.zeros(3, dtype=torch.uint8), "w": random_tensor(dtype, 5, 50)}
    assert_close(of_file(tmp_path / "m.safetensors", tensors)["w"], plain(tensors["w"]))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("size", [63, 64, 65, 128, 129])
def test_non_finite_values_at_the_edges_of_a_chunk(bad: float, size: int) -> None:
    for place in (0, 62, 63, 64, size - 1):
        tensor = torch.arange(size, dtype=torch.float32)
        tensor[min(place, size - 1)] = bad
        assert_close(in_memory({"w": tensor})["w"], plain(tensor))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.empty(0, 3),
        torch.tensor(2.5),
        torch.tensor(7),
        torch.tensor(math.nan),
        torch.full((3,), math.inf),
        torch.tensor([math.nan, 2.0]),
        torch.zeros(5),
        torch.tensor([True, False, True]),
        nn.Parameter(torch.randn(4, 4)),
    ],
)
def test_small_and_unusual_tensors(tensor: torch.Tensor) -> None:
    assert_close(in_memory({"w": tensor})["w"], plain(tensor))


def test_integers_are_exact_in_statistics() -> None:
    """float64 cannot represent these integers."""
    for dtype, values in ((torch.int64, [-(2**63) + 1, 2**63 - 1]), (torch.uint64, [2**53 + 1, 2**64 - 1])):
        found = in_memory({"w": torch.tensor(values, dtype=dtype)})["w"]
        assert (found["min"], found["max"]) == tuple(values)


@pytest.mark.usefixtures("small_chunks")
def test_a_large_mean_and_a_small_deviation() -> None:
    """A difference of two sums of squares would lose all digits. The expected value uses exact fractions."""
    tensor = 1e9 + torch.randn(5000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1e-3
    found = in_memory({"w": tensor})["w"]
    assert found["std"] == pytest.approx(exactly.stdev(tensor.tolist()), rel=1e-6)
    assert found["mean"] == pytest.approx(exactly.mean(tensor.tolist()), rel=1e-15)


@pytest.mark.usefixtures("small_chunks")
def test_statistics_beyond_float64_are_none() -> None:
    tensor = torch.full((200,), 1e308, dtype=torch.float64)
    tensor[100] = -1e308
    found = in_memory({"w": tensor})["w"]
    assert (found["min"], found["max"], found["std"]) == (-1e308, 1e308, None)
    assert (found["zeros"], found["nan"], found["inf"]) == (0, 0, 0)
    same = in_memory({"w": torch.full((100,), 1e200, dtype=torch.float64)})["w"]
    assert same["mean"] == pytest.approx(1e200)
    assert same["std"] == pytest.approx(0, abs=1e188)


def test_statistics_do_not_change_the_model() -> None:
    for dtype in (torch.float64, torch.complex128, torch.int64):
        tensor = torch.arange(6).to(dtype)
        in_memory({"w": tensor})
        assert torch.equal(tensor, torch.arange(6).to(dtype))


def elements_of(piece: TensorEntry) -> list[float]:
    """Return the elements of a view."""
    found: list[float] = reading.view_of(reading.part_of(piece).mapped(), piece).flatten().tolist()
    return found


# --- views ---------------------------------------------------------------------------------------------------------

axes = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9)), max_size=4)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    axes=axes,
    offset=st.integers(0, 5),
    chunk=st.integers(1, 40),
    elements=st.lists(st.floats(width=32) | st.just(0.0), min_size=1, max_size=30),
)
def test_any_view(folder: Path, axes: list[tuple[int, int]], offset: int, chunk: int, elements: list[float]) -> None:
    """Slices and transposed, expanded and overlapping views, in memory and in a file, in pieces of any size."""
    base = torch.tensor((elements * 200)[:200])
    view = base.as_strided([size for size, _ in axes], [stride for _, stride in axes], offset)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "PIECE", chunk)
        assert_close(in_memory({"w": view})["w"], plain(view))
        assert_close(of_file(folder / "m.pth", {"w": view})["w"], plain(view))


@given(
    axes=st.lists(st.tuples(st.integers(0, 6), st.integers(1, 9)), max_size=4),
    offset=st.integers(0, 5),
    chunk=st.integers(1, 40),
)
def test_pieces_are_small_and_have_each_element_once(axes: list[tuple[int, int]], offset: int, chunk: int) -> None:
    view = torch.arange(250).as_strided([size for size, _ in axes], [stride for _, stride in axes], offset)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "PIECE", chunk)
        pieces = [elements_of(piece) for (piece,) in reading.pieces_of(entry_of(view))]
    assert sorted(number for numbers in pieces for number in numbers) == sorted(view.flatten().tolist())
    for numbers in pieces:
        assert len(numbers) <= chunk
        assert max(numbers) - min(numbers) < chunk


@pytest.mark.usefixtures("small_chunks")
def test_the_number_of_threads_does_not_change_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results of pieces are combined in order, so that every run gives the same bits."""
    generator = torch.Generator().manual_seed(1)
    tensors = {str(n): torch.randn(n * 100, generator=generator).to(torch.bfloat16) for n in range(30)}
    torch.save(tensors, tmp_path / "m.pth")
    monkeypatch.setattr(passes, "_BATCH_PIECES", 3)
    found = []
    for count in (1, 2, 4, 4):
        monkeypatch.setattr(ordered_work, "threads", lambda count=count: count)
        found.append(statistics.collect(entries_in(tmp_path / "m.pth")))
    assert found[0] == found[1] == found[2] == found[3]
    for name, tensor in tensors.items():
        assert_close(found[0][name], plain(tensor))


@pytest.mark.usefixtures("small_chunks")
def test_statistics_of_conjugated_and_negated_tensors(tmp_path: Path) -> None:
    numbers = torch.randn(20, 30, dtype=torch.complex64, generator=torch.Generator().manual_seed(5))
    conjugated, negated = numbers.conj(), numbers.clone().conj().imag
    assert negated.is_neg()
    for view in (conjugated, conjugated.T, conjugated[3:, ::2], negated, negated.T, negated[3:, ::2]):
        wanted = {key: pytest.approx(value) for key, value in plain(view.resolve_conj().resolve_neg()).items()}
        assert of_file(tmp_path / "m.pth", {"w": view})["w"] == wanted
        assert in_memory({"w": view})["w"] == wanted


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None])
@pytest.mark.parametrize("dtype", each((*INTEGERS, *FLOATS, *FLOATS_OF_A_BYTE, *COMPLEX)))
def test_counting_only_non_finite_values_gives_the_same_counts(tmp_path: Path, dtype: str, bad: float | None) -> None:
    wanted = getattr(torch, dtype)
    tensor = torch.full((1000,), 0.5).to(torch.float32 if "complex" not in dtype else torch.complex64).to(wanted)
    if bad is not None and dtype not in INTEGERS:
        tensor[77], tensor[999] = (torch.tensor(bad).to(wanted) for _ in range(2))
    torch.save({"w": tensor, "random": random_tensor(dtype, 31, 7)}, tmp_path / "m.pth")
    entries = entries_in(tmp_path / "m.pth")
    whole = statistics.collect(entries)
    found = statistics.not_finite(entries)
    assert found == {name: {word: numbers[word] for word in ("nan", "inf")} for name, numbers in whole.items()}


def test_an_expanded_tensor_is_read_once(tmp_path: Path) -> None:
    small, large = torch.tensor([0.0, 1.0, 3.0]).expand(5, 3), torch.tensor([0.0, 1.0, 3.0]).expand(10**12, 3)
    found = of_file(tmp_path / "m.pth", {"small": small, "large": large})
    assert_close(found["small"], plain(small))
    assert (found["large"]["zeros"], found["large"]["mean"]) == (10**12, pytest.approx(4 / 3))
    assert found["large"]["std"] == pytest.approx(small.double().std(correction=0).item())


def test_overlapping_rows_do_not_take_memory() -> None:
    """10^12 elements view two million. The number of elements in a piece is limited, not only its span."""
    pieces = reading.pieces_of(entry_of(torch.zeros(2_000_000).as_strided((1_000_000, 1_000_000), (1, 1))))
    for _ in range(100):
        assert math.prod(next(pieces)[0].shape) <= reading.PIECE


# --- dtypes without arithmetic----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_dtypes_without_arithmetic_have_no_statistics() -> None:
    packed = what_torch_has(("float4_e2m1fn_x2",))
    tensors = {
        "quantized": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "sparse": torch.eye(3).to_sparse(),
        **{dtype: torch.ones(3, dtype=torch.uint8).view(getattr(torch, dtype)) for dtype in packed},
        "meta": torch.empty(3, device="meta"),
        "lazy": nn.UninitializedParameter(),
        "w": torch.ones(3),
    }
    assert list(in_memory(tensors)) == ["w"]


@needs_torch("float4_e2m1fn_x2")
def test_a_tensor_without_statistics_shows_null(cli: Cli, folder: Path) -> None:
    torch.save({"packed": torch.ones(3, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), "w": torch.ones(2)}, "m.pth")
    rows = cli("params", "m.pth", "--stats", "--json").json["tensors"]
    assert rows[0]["stats"] == NOTHING
    assert_close(rows[1]["stats"], plain(torch.ones(2)))
    lines = cli("params", "m.pth", "--stats", "-f", "csv").out.splitlines()
    assert lines[1].endswith(",,,,,,,")
    assert cli("params", "LazyLinear(3)", "--stats", "--json").json["tensors"][0]["stats"] == NOTHING
    (folder / "m.py").write_text("from torch import nn\nnet = nn.Linear(2, 2, device='meta')\n")
    assert cli("params", "m.py:net", "--stats", "--json").json["tensors"][0]["stats"] == NOTHING


# --- models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 7])
def test_the_values_of_a_builder_depend_on_the_seed(cli: Cli, seed: int) -> None:
    rows = cli("params", "Linear(20,30)", "--stats", "--seed", seed, "--json").json["tensors"]
    torch.manual_seed(seed)
    drawn = nn.Linear(20, 30)
    for row, tensor in zip(rows, drawn.parameters(), strict=True):
        assert_close(row["stats"], plain(tensor))


def test_statistics_apply_the_edits_of_a_recipe(cli: Cli, folder: Path) -> None:
    first = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    torch.save(first.state_dict(), "m.pth")
    (folder / "modelcli.toml").write_text(
        'model = "m.pth"\narch = "Sequential(Linear(3,4),Linear(4,2))"\nedits = ["replace 1 Linear(_,5)"]\n'
    )
    rows = {row["name"]: row["stats"] for row in cli("params", "--stats", "--json").json["tensors"]}
    assert_close(rows["0.weight"], plain(first[0].weight))
    torch.manual_seed(1)  # the seed of the first edit with seed 0
    assert_close(rows["1.weight"], plain(nn.Linear(4, 5).weight))


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_tied_tensor_is_read_once(cli: Cli, mapped: list[Span], suffix: str) -> None:
    cli("save", f"m.{suffix}", "-m", "nets.py:Tied")
    model = Tied()
    told: list[tuple[int, int]] = []
    mapped.clear()
    names = ["embed.weight", "body.weight", "head.weight"]
    found = statistics.collect(entries_in(Path(f"m.{suffix}"), *names), lambda done, total: told.append((done, total)))
    assert found["embed.weight"] == found["head.weight"]
    nbytes = model.embed.weight.nbytes + model.body.weight.nbytes
    assert sum(span.nbytes for span in mapped) == nbytes
    assert told == [(0, nbytes), (model.embed.weight.nbytes, nbytes), (nbytes, nbytes)]


# --- what is read --------------------------------------------------------------------------------------------------


def sparse_file(path: Path, shapes: dict[str, list[int]]) -> None:
    """Write a safetensors file of float32 zeros as a hole, which takes no space on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(file.tell() + end)


@pytest.mark.skipif(os.name == "nt", reason="a file is not sparse there unless it is told to be")
@pytest.mark.parametrize(
    "words", [("-s", "small"), ("--sort", "shape", "--top", "1"), ("--trainable",), ("--sort", "std", "-s", "small")]
)
def test_nothing_else_of_100_gb_is_read(cli: Cli, folder: Path, mapped: list[Span], words: tuple[str, ...]) -> None:
    sparse_file(folder / "big.safetensors", {"a": [5, 10**9], "small": [4], "z": [20, 10**9]})
    small = checkpoints.read(folder / "big.safetensors").tensors["small"].storage
    assert isinstance(small, Span)
    with (folder / "big.safetensors").open("r+b") as file:
        file.seek(small.offset)
        file.write(struct.pack("<4f", 1, 2, 0, math.nan))
    rows = cli("params", "big.safetensors", "--stats", "--json", *words).json["tensors"]
    picked = [] if words == ("--trainable",) else ["small"]
    assert [row["name"] for row in rows] == picked
    assert [(span.offset, span.nbytes) for span in mapped] == [(small.offset, 16) for _ in picked]
    for row in rows:
        assert_close(row["stats"], plain(torch.tensor([1, 2, 0, math.nan])))


@pytest.mark.usefixtures("small_chunks")
def test_a_file_is_mapped_a_piece_at_a_time(tmp_path: Path, mapped: list[Span]) -> None:
    base = torch.randn(40, 50)
    for view in (base, base.T, base[:, 3], base[5:20, ::7]):
        mapped.clear()
        assert_close(of_file(tmp_path / "m.pth", {"w": view})["w"], plain(view))
        assert len(mapped) > 1
        assert max(span.nbytes for span in mapped) <= 64 * 4


@pytest.mark.skipif(os.name == "nt", reason="there is no resource module there")
@pytest.mark.parametrize("option", ["--stats", "--values"])
def test_more_tensors_than_files_may_be_open(cli: Cli, folder: Path, option: str) -> None:
    """A process may open few files, so only one is open at a time."""
    import resource

    save_file({f"layers.{index}": torch.full((2,), float(index)) for index in range(300)}, folder / "m.safetensors")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, limits[1]))
    try:
        rows = cli("params", "m.safetensors", option, "--json").json["tensors"]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    found = {row["name"]: row["values"][0] if option == "--values" else row["stats"]["max"] for row in rows}
    assert found == {f"layers.{index}": index for index in range(300)}


MEMORY = """
    import resource, sys
    from pathlib import Path
    from modelcli import checkpoints
    from modelcli.values import statistics

    tensors = checkpoints.read(Path("big.safetensors")).tensors
    unit = 1 if sys.platform == "darwin" else 1024
    statistics.collect({"small": tensors["small"]})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = statistics.collect({"large": tensors["large"]})
    assert found["large"]["zeros"] == 75_000_000, found
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit)
"""


@pytest.mark.skipif(os.name == "nt", reason="there is no resource module there")
def test_memory_does_not_grow_with_the_tensor(folder: Path) -> None:
    sparse_file(folder / "big.safetensors", {"large": [75_000_000], "small": [4]})
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(MEMORY)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 30e6  # of the 300 MB in the file, 600 MB as float64


# --- what is shown -------------------------------------------------------------------------------------------------

MIXED = {
    "block.weight": torch.tensor([[0.5, math.nan, -1.5], [0.0, math.inf, 1.0]]),
    "block.ones": torch.ones(3),
    "few": torch.cat([torch.zeros(1), torch.ones(19999)]),
    "steps": torch.tensor(12345),
    "empty": torch.empty(0),
}


@pytest.fixture
def mixed(folder: Path) -> str:
    torch.save(MIXED, folder / "mixed.pth")
    return "mixed.pth"


def test_json(cli: Cli, mixed: str) -> None:
    for row in cli("params", mixed, "--stats", "--json").json["tensors"]:
        assert_close(row["stats"], plain(MIXED[row["name"]]))
    assert "stats" not in cli("params", mixed, "--json").json["tensors"][0]


def test_csv_has_every_digit_and_counts(cli: Cli, mixed: str) -> None:
    rows = list(csv.DictReader(io.StringIO(cli("params", mixed, "--stats", "-f", "csv").out)))
    for row in rows:
        wanted = plain(MIXED[row["name"]])
        found = {key: None if row[key] == "" else float(row[key]) for key in params.STATS}
        assert_close(found, wanted)
    assert [row["zeros"] for row in rows] == ["1", "0", "1", "0", "0"]


def test_a_pipe_shows_the_share_of_zeros(cli: Cli, mixed: str) -> None:
    lines = cli("params", mixed, "--stats").out.splitlines()
    assert lines[0].split()[-7:] == ["min", "max", "mean", "std", "zeros", "NaN", "Inf"]
    std = f"{torch.tensor([0.5, -1.5, 0, 1]).std():.3g}"
    assert lines[1].split()[-7:] == ["-1.5", "1", "0", std, "16.67%", "1", "1"]
    assert [line.split()[-3] for line in lines[2:6]] == ["0%", "<0.01%", "0%", "-"]
    assert lines[4].split()[-7:-3] == ["12,345", "12,345", "1.23e+04", "-"]
    assert "Not finite: 1" in lines
    assert "Not finite" not in cli("params", mixed).out
    markdown = cli("params", mixed, "--stats", "-f", "markdown").out.splitlines()
    assert markdown[2].endswith(f"| -1.5 | 1 | 0 | {std} | 16.67% | 1 | 1 |")


def test_statistics_and_values_together(cli: Cli, mixed: str) -> None:
    row = cli("params", mixed, "--stats", "--values", "--json", "-s", "block.ones").json["tensors"][0]
    assert row["values"] == [1.0, 1.0, 1.0]
    assert_close(row["stats"], plain(MIXED["block.ones"]))


@pytest.mark.parametrize(
    ("value", "text"), [(Share(0, 5), "0%"), (Share(5, 5), "100%"), (Share(1, 3), "33.33%"), (Share(0, 0), "-")]
)
def test_shares(value: Share, text: str) -> None:
    assert percent(value) == text
    assert str(value) == str(value.part)


def test_a_share_is_round_only_where_it_is_exact() -> None:
    assert percent(Share(1, 10**9)) == "<0.01%"
    assert percent(Share(10**9 - 1, 10**9)) == ">99.99%"
    assert percent(None) == "-"


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (-0.0173456, "-0.0173"), (1.0, "1"), (12345, "12,345"), (-(2**63), "-9.22e+18"), (1e-30, "1e-30")],
)
def test_floats_show_three_digits_and_integers_all(value: float | None, text: str) -> None:
    assert number(value) == text


def on_terminal(tensors: dict[str, torch.Tensor], path: Path, width: int) -> str:
    """Return the table of tensors on a terminal of this width."""
    found = of_file(path, tensors)
    blueprint = checkpoints.read(path).bare_blueprint()
    screen = io.StringIO()
    view = params.params("m", blueprint, blueprint.tensors, stats=found)
    print_rich(view, Console(file=screen, width=width, force_terminal=True, color_system=None))
    assert all(name in to_plain(view) for name in tensors)
    return screen.getvalue()


def test_80_columns_hold_the_statistics_and_whole_names(tmp_path: Path) -> None:
    tensors = {
        "layer4.0.downsample.1.num_batches_tracked": torch.tensor(0),
        "layer4.0.downsample.0.weight": torch.tensor([-0.2512, 0.2533, -0.002997]),
    }
    screen = on_terminal(tensors, tmp_path / "m.pth", 80)
    assert screen.split("\n", 1)[0].split()[:6] == ["name", "min", "max", "mean", "std", "zeros"]
    assert "NaN" not in screen
    assert "…" not in screen
    tensors["layer4.0.bias"] = torch.tensor([math.nan, 1.0])
    assert "NaN" in on_terminal(tensors, tmp_path / "m.pth", 80).split("\n", 1)[0]
    wide = on_terminal(tensors, tmp_path / "m.pth", 200).split("\n", 1)[0].split()
    assert wide == ["name", "shape", "dtype", "elements", "bytes", "kind", "trainable", *wide[-7:]]
    assert wide[-7:] == ["min", "max", "mean", "std", "zeros", "NaN", "Inf"]


# --- sorting -------------------------------------------------------------------------------------------------------


def share_of_zeros(tensor: torch.Tensor) -> float:
    return (tensor == 0).double().mean().item() if tensor.numel() else 0


@pytest.mark.parametrize(
    ("key", "rank"),
    [
        *((key, lambda tensor, key=key: plain(tensor)[key]) for key in ("min", "max", "mean", "std", "nan", "inf")),
        ("zeros", share_of_zeros),
    ],
)
def test_sorted_by_a_statistic(cli: Cli, mixed: str, key: str, rank: Callable[[torch.Tensor], float | None]) -> None:
    """The largest come first and tensors without the statistic last; `--top` uses the same order."""
    names = [row["name"] for row in cli("params", mixed, "--stats", "--sort", key, "--json").json["tensors"]]
    ranks = [rank(MIXED[name]) for name in names]
    known = [value for value in ranks if value is not None]
    assert known == sorted(known, reverse=True)
    assert ranks[: len(known)] == known
    top = cli("params", mixed, "--stats", "--sort", key, "--top", 2, "--json").json["tensors"]
    assert [row["name"] for row in top] == names[:2]


def test_sorting_by_a_statistic_needs_them(cli: Cli, mixed: str) -> None:
    error = cli("params", mixed, "--sort", "std", code=2).err
    assert "cannot sort by 'std' without statistics" in error
    assert "add --stats" in error
    assert "did you mean std?" in cli("params", mixed, "--stats", "--sort", "sdt", code=2).err
    assert "std" not in cli("params", mixed, "--sort", "weight", code=2).err
    assert "std" in cli("params", mixed, "--stats", "--sort", "weight", code=2).err


# --- progress ------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """A text stream whose `isatty()` returns True."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("words", "moment", "shown"), [((), -1, True), ((), 60, False), (("-q",), -1, False)])
def test_a_progress_bar_appears_on_a_terminal_after_a_moment(
    cli: Cli, mixed: str, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], moment: float, shown: bool
) -> None:
    screen = Terminal()
    monkeypatch.setattr(progress, "MOMENT", moment)
    monkeypatch.setattr(sys, "stderr", screen)
    found = cli("params", mixed, "--stats", "-f", "csv", *words)
    nbytes = sum(tensor.nbytes for tensor in MIXED.values())
    assert (f"{nbytes / 1000:.1f}/{nbytes / 1000:.1f} kB" in screen.getvalue()) is shown
    assert bool(screen.getvalue()) is shown
    assert [line.partition(",")[0] for line in found.out.splitlines()[1:]] == list(MIXED)


def test_no_bar_where_json_is_asked_for(cli: Cli, mixed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --json, standard error contains at most the document of an error."""
    screen = Terminal()
    monkeypatch.setattr(progress, "MOMENT", -1)
    monkeypatch.setattr(sys, "stderr", screen)
    assert [row["name"] for row in cli("params", mixed, "--stats", "--json").json["tensors"]] == list(MIXED)
    assert screen.getvalue() == ""


def test_no_bar_elsewhere(cli: Cli, mixed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "MOMENT", -1)
    assert cli("params", mixed, "--stats").err == ""
