"""A storage with converted elements: its bytes, its parts, and the note about values beyond the range."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from modelcli import checkpoints
from modelcli.checkpoints.entries import TensorEntry
from modelcli.checkpoints.storage import JoinedSpan, Span, Storage, identity_of
from modelcli.checkpoints.torch_pickle.conj_and_neg import with_flags
from modelcli.checkpoints.zip_archives.inflating import Inflated
from modelcli.errors import FileFormatError
from modelcli.values import conversion, ordered_work, overflow, reading, statistics
from modelcli.values.conversion import Conversion, converted


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def in_file(path: Path, tensor: torch.Tensor, before: bytes = b"") -> Span:
    """Write the bytes of a tensor to a file, after other bytes. Returns their span."""
    path.write_bytes(before + bytes_of(tensor))
    return Span(path, len(before), tensor.nbytes, identity_of(path))


def entry_of(tensor: torch.Tensor, storage: Storage, dtype: str) -> TensorEntry:
    return TensorEntry(tuple(tensor.shape), dtype, tuple(tensor.stride()), int(tensor.storage_offset()), storage)


@pytest.fixture
def values() -> torch.Tensor:
    return torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 100


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("piece", [1, 100, 9_999, 10_000, 1 << 20])
def test_the_bytes_are_those_of_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: torch.Tensor, piece: int, threads: int
) -> None:
    values = values[:500] if piece == 1 else values
    monkeypatch.setattr(conversion, "PIECE", piece)
    monkeypatch.setattr(ordered_work, "threads", lambda: threads)
    source = converted(in_file(tmp_path / "v", values, b"odd"), "float32", "bfloat16")
    wanted = bytes_of(values.to(torch.bfloat16))
    assert source.nbytes == len(wanted)
    chunks = list(source.chunks())
    assert b"".join(chunks) == wanted
    assert max(map(len, chunks)) <= piece * 2
    assert source.bytes() == bytes(source.mapped()) == wanted


def test_a_part_may_begin_and_end_inside_an_element(tmp_path: Path, values: torch.Tensor) -> None:
    source = converted(in_file(tmp_path / "v", values[:50]), "float32", "float64")
    wanted = bytes_of(values[:50].double())
    for start in range(30):
        for nbytes in (0, 1, 7, 8, 9, 100, len(wanted) - start):
            assert source.part(start, nbytes).bytes() == wanted[start : start + nbytes]
            assert source.part(5, 300).part(start, min(nbytes, 100)).bytes() == wanted[5 + start :][: min(nbytes, 100)]


def test_any_storage_is_a_source(tmp_path: Path, values: torch.Tensor) -> None:
    parts = [in_file(tmp_path / str(number), part) for number, part in enumerate(values.chunk(3))]
    wanted = bytes_of(values.half())
    assert converted(JoinedSpan(tuple(parts)), "float32", "float16").bytes() == wanted
    negated = with_flags(in_file(tmp_path / "n", -values), "float32", conj=False, neg=True)
    assert converted(negated, "float32", "float16").bytes() == wanted
    twice = converted(converted(JoinedSpan(tuple(parts)), "float32", "float8_e5m2"), "float8_e5m2", "bfloat16")
    assert twice.bytes() == bytes_of(values.to(torch.float8_e5m2).to(torch.bfloat16))
    assert {path.name for path, _ in twice.files()} == {"0", "1", "2"}


def test_bytes_behind_the_last_whole_element_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "v").write_bytes(bytes(11))
    span = Span(tmp_path / "v", 0, 11, identity_of(tmp_path / "v"))
    assert converted(span, "float32", "float16").bytes() == bytes(4)
    assert converted(span.part(0, 3), "float32", "float16").bytes() == b""


def test_equal_conversions_are_one_storage(tmp_path: Path, values: torch.Tensor) -> None:
    span = in_file(tmp_path / "v", values)
    one, other = (converted(span, "float32", "float16") for _ in range(2))
    assert one == other
    assert len({one, other}) == 1
    assert one != converted(span, "float32", "bfloat16")
    assert one != one.part(0, 4)


def test_a_file_that_changes_meanwhile_is_an_error(tmp_path: Path, values: torch.Tensor) -> None:
    source = converted(in_file(tmp_path / "v", values), "float32", "float16")
    (tmp_path / "v").write_bytes(bytes(100))
    with pytest.raises(FileFormatError, match="changed while it was being read"):
        source.bytes()


def test_an_error_in_a_thread_ends_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "PIECE", 10)
    span = in_file(tmp_path / "v", torch.ones(1000))
    os.truncate(tmp_path / "v", 2000)
    late = Span(span.path, 0, span.nbytes, identity_of(span.path))
    with pytest.raises(FileFormatError, match="ends early"):
        converted(late, "float32", "float16").bytes()


# --- overflow --------------------------------------------------------------------------------------------------------


def notes(path: Path, tensors: dict[str, torch.Tensor], after: str) -> list[str]:
    """Convert tensors of a file. Returns the notes about values beyond the range."""
    torch.save(tensors, path)
    storages: dict[int, Conversion] = {}
    found = {}
    for name, entry in checkpoints.read(path).tensors.items():
        assert isinstance(entry, TensorEntry)
        source = storages.setdefault(id(entry.storage), converted(entry.storage, entry.dtype, after))
        found[name] = TensorEntry(entry.shape, after, entry.stride, entry.offset, source)
    assert overflow.notes_of(list(found.items())) == []  # nothing has been converted
    for source in storages.values():
        source.bytes()
    return overflow.notes_of(list(found.items()))


def test_overflow_is_counted_for_each_tensor(tmp_path: Path) -> None:
    base = torch.tensor([[1.0, 1e5, -1e6], [float("inf"), float("nan"), 65504.0]])
    (note,) = notes(tmp_path / "m.pth", {"t": base.T, "first": base[:, :1], "again": base.T}, "float16")
    assert note == "2 values became Inf in t: the largest value of float16 is 65,504"
    assert notes(tmp_path / "m.pth", {"first": base[:, :1]}, "float16") == []
    (note,) = notes(tmp_path / "m.pth", {"a": base.clone(), "b": base.clone(), "c": base[0].clone()}, "float16")
    assert note == "6 values became Inf in a and 2 more tensors: the largest value of float16 is 65,504"


def test_values_that_saturate_or_become_nan(tmp_path: Path) -> None:
    values = torch.tensor([1.0, 448.0, 449.0, 1e6, -1e9, float("inf")])
    (note,) = notes(tmp_path / "m.pth", {"w": values}, "float8_e4m3fn")
    assert note == "4 values became 448 in w: the largest value of float8_e4m3fn is 448"
    (note,) = notes(tmp_path / "m.pth", {"w": values}, "float8_e5m2fnuz")
    assert note == "3 values became NaN in w: the largest value of float8_e5m2fnuz is 57,344"
    (note,) = notes(tmp_path / "m.pth", {"w": torch.tensor([3.4e38, 1e39], dtype=torch.float64)}, "bfloat16")
    assert note == "2 values became Inf in w: the largest value of bfloat16 is 3.38953e+38"


def test_overflow_in_the_first_of_two_casts_is_reported(tmp_path: Path) -> None:
    span = in_file(tmp_path / "v", torch.tensor([1.0, 1e5, 2.0]))
    twice = converted(converted(span, "float32", "float16").part(2, 4), "float16", "float32")
    assert torch.frombuffer(bytearray(twice.bytes()), dtype=torch.float32).tolist() == [float("inf"), 2.0]
    found = overflow.notes_of([("w", entry_of(torch.empty(2), twice, "float32"))])
    assert found == ["1 value became Inf in w: the largest value of float16 is 65,504"]


# --- compressed records ----------------------------------------------------------------------------------------------


def compressed(path: Path, state: dict[str, torch.Tensor]) -> None:
    """Write a file of torch with compressed records, as some archivers do."""
    torch.save(state, path.with_suffix(".plain"))
    with zipfile.ZipFile(path.with_suffix(".plain")) as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        for name in plain.namelist():
            made.writestr(name, plain.read(name))


def test_a_compressed_record_is_decompressed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: torch.Tensor
) -> None:
    """Reading a part costs decompressing everything before it, so many parts would take quadratic time."""
    monkeypatch.setattr(conversion, "PIECE", 100)
    monkeypatch.setattr(reading, "PIECE", 100)
    compressed(tmp_path / "m.pth", {"w": values, "t": values[:6000].reshape(60, 100).T})
    entries = {
        name: e for name, e in checkpoints.read(tmp_path / "m.pth").tensors.items() if isinstance(e, TensorEntry)
    }
    begun = []
    original = Inflated.chunks

    def counted(self: Inflated) -> Iterator[bytes]:
        begun.append(self.name)
        return original(self)

    monkeypatch.setattr(Inflated, "chunks", counted)
    made = converted(entries["w"].storage, "float32", "float16")
    assert made.bytes() == bytes_of(values.half())
    assert len(begun) == 1
    assert made.part(777, 5000).bytes() == bytes_of(values.half())[777:5777]
    assert len(begun) == 2
    found = statistics.collect(entries)
    assert len(begun) == 4  # one for each tensor
    assert found["w"]["max"] == values.max().item()
    assert found["t"]["mean"] == pytest.approx(values[:6000].double().mean().item())
    wider = converted(entries["t"].storage, "float32", "float64")
    view = TensorEntry(entries["t"].shape, "float64", entries["t"].stride, entries["t"].offset, wider)
    assert statistics.collect({"t": view})["t"] == found["t"]
    assert len(begun) == 5
    bad = values.clone()
    bad[5000] = 1e6
    assert notes(tmp_path / "plain.pth", {"w": bad}, "float16") == [
        "1 value became Inf in w: the largest value of float16 is 65,504"
    ]
