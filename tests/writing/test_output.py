"""Writing bytes to a file: the system copies them, or they are read and written; holes and checksums are kept."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch

from modelcli import checkpoints, writing
from modelcli.checkpoints.distributed import reading as distributed
from modelcli.checkpoints.layout import LARGE, PAGE, Bytes, HeaderLayout, place_like
from modelcli.checkpoints.storage import Span, identity_of
from modelcli.checkpoints.zip_archives import directory as zip_directory
from modelcli.checkpoints.zip_archives import layout as zip_layout
from modelcli.checkpoints.zip_archives.layout import ZipLayout
from modelcli.commands.editable import open_editable
from modelcli.errors import FileFormatError, ModelcliError, SystemFailureError
from modelcli.language.references import Source
from modelcli.writing import Plan, PlannedTensor, WriteOptions, output
from modelcli.writing.output import Output
from tests.conftest import Cli

DATA = bytes(range(256)) * 8192  # 2 MiB


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.bin"
    path.write_bytes(DATA)
    return path


def span(path: Path, offset: int, nbytes: int) -> Span:
    return Span(path, offset, nbytes, identity_of(path))


def put(path: Path, spans: list[tuple[int, Span]], told: list[tuple[int, int, str]] | None = None) -> bytes:
    total = max(offset + part.nbytes for offset, part in spans)
    with (
        path.open("wb+", buffering=0) as file,
        Output(file, total, None if told is None else lambda *now: told.append(now)) as out,
    ):
        for offset, part in spans:
            out.put(offset, part)
    return path.read_bytes()


@pytest.mark.parametrize("shift", [0, 64, 4096, 4100])
@pytest.mark.parametrize(("start", "nbytes"), [(0, len(DATA)), (1, len(DATA) - 1), (100, 1), (8191, 600_000), (5, 0)])
@pytest.mark.parametrize("copies", [True, False])
def test_a_span_is_copied_from_and_to_any_offset(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, shift: int, start: int, nbytes: int, copies: bool
) -> None:
    if not copies:
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    told: list[tuple[int, int, str]] = []
    found = put(tmp_path / "out.bin", [(start + shift, span(source, start, nbytes))], told)
    assert found[start + shift :] == DATA[start : start + nbytes]
    assert not nbytes or told[-1] == (nbytes, start + shift + nbytes, "writing")


@pytest.mark.parametrize("number", sorted(output._CANNOT_COPY))
def test_bytes_are_read_and_written_if_the_system_cannot_copy(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The call may fail at the start or midway: another file system, an old kernel, a container that forbids it."""
    for allowed in (0, 1):
        calls: list[int] = []
        original = os.copy_file_range

        def copy(*args: Any, allowed: int = allowed, calls: list[int] = calls, original: Any = original) -> int:
            calls.append(1)
            if len(calls) > allowed:
                raise OSError(number, os.strerror(number))
            return int(original(args[0], args[1], 65536, *args[3:]))

        monkeypatch.setattr(os, "copy_file_range", copy)
        assert put(tmp_path / "out.bin", [(0, span(source, 0, len(DATA)))]) == DATA
        monkeypatch.undo()


@pytest.mark.parametrize("call", ["copy_file_range", "pwrite"])
def test_a_disk_that_is_full_midway(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*_args: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    if call == "pwrite":
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    monkeypatch.setattr(os, call, full, raising=False)
    room = SimpleNamespace(f_bavail=30, f_frsize=4096)
    monkeypatch.setattr(os, "fstatvfs", lambda _handle: room, raising=False)
    message = r"No space left on device: the output needs 2\.10 MB, but only 0\.12 MB are free"
    with pytest.raises(OSError, match=message):
        put(tmp_path / "out.bin", [(0, span(source, 0, len(DATA)))])


def test_a_source_that_cannot_be_read_is_named(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_args: Any) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.delattr(os, "copy_file_range", raising=False)
    monkeypatch.setattr(os, "pread", broken)
    with pytest.raises(SystemFailureError, match=r"cannot read .*source\.bin: Input/output error"):
        put(tmp_path / "out.bin", [(0, span(source, 0, len(DATA)))])


def test_a_source_that_changes_or_ends_early_is_noticed(tmp_path: Path, source: Path) -> None:
    part = span(source, 0, len(DATA))
    with source.open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(FileFormatError, match="changed while it was being read"):
        put(tmp_path / "out.bin", [(0, part)])
    shorter = Span(source, 0, len(DATA), identity_of(source))
    with pytest.raises(FileFormatError, match="ends early"):
        put(tmp_path / "out.bin", [(0, shorter)])


@pytest.mark.parametrize("most", [3, 10_000])
def test_small_pieces_arrive_in_few_writes(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Of two files in turn, backwards, with gaps between some of them, and with a large one among them."""
    other = tmp_path / "other.bin"
    other.write_bytes(DATA[::-1])
    pieces = [(200 * n, span((source, other)[n % 2], 7 * n, 200 if n % 3 else 150)) for n in reversed(range(1000))]
    pieces.insert(500, (300_000, span(source, 0, LARGE)))
    wanted = bytearray(300_000 + LARGE)
    for offset, part in pieces:
        wanted[offset : offset + part.nbytes] = part.bytes()
    writes: list[int] = []
    original = output._pwrite

    def counted(handle: int, data: memoryview, offset: int) -> int:
        writes.append(offset)
        return original(handle, data, offset)

    monkeypatch.setattr(output, "_MOST_KEPT", most)
    monkeypatch.setattr(output, "_pwrite", counted)
    assert put(tmp_path / "out.bin", pieces) == bytes(wanted)
    assert len(writes) < (700 if most == 3 else 350)


def test_small_pieces_count_for_a_progress_bar(tmp_path: Path, source: Path) -> None:
    told: list[tuple[int, int, str]] = []
    put(tmp_path / "out.bin", [(8 * n, span(source, 8 * n, 8)) for n in range(1000)], told)
    assert told[-1] == (8000, 8000, "writing")


def test_a_source_that_changes_at_the_end_is_noticed(tmp_path: Path, source: Path) -> None:
    with (tmp_path / "out.bin").open("wb+", buffering=0) as file, Output(file, len(DATA)) as out:
        out.put(0, span(source, 0, len(DATA)))
        os.utime(source, ns=(1, 1))
        with pytest.raises(FileFormatError, match="changed while it was being read"):
            out.require_unchanged_sources()


def one_tensor(path: str) -> None:
    safetensors.torch.save_file({"w": torch.randn(3, 4)}, path)


def quantized(path: str) -> None:
    torch.save({"w": torch.quantize_per_tensor(torch.randn(3, 4), 0.1, 0, torch.qint8)}, path)


SOURCES: list[tuple[Callable[[str], None], str, tuple[str, ...]]] = [
    (one_tensor, "in.safetensors", ("save", "out.pth")),
    (one_tensor, "in.safetensors", ("cast", ".", "half", "-o", "out.pth")),
    (lambda path: torch.save({"w": torch.randn(3, 4).t()}, path), "in.pth", ("save", "out.safetensors")),
    (lambda path: torch.save({"m.weight": torch.randn(4, 4)}, path), "in.pth",
     ("replace", "m", "Linear(4,5)", "--keep-weights", "-o", "out.pth")),
    (quantized, "in.pth", ("save", "out.pth")),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*quant")
@pytest.mark.parametrize("change", [lambda path: os.utime(path, ns=(1, 1)), Path.unlink], ids=["changed", "removed"])
@pytest.mark.parametrize(("make", "name", "words"), SOURCES)
def test_a_source_that_changes_at_the_end_is_noticed_however_it_is_read(
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[str], None],
    name: str,
    words: tuple[str, ...],
    change: Callable[[Path], None],
) -> None:
    make(name)
    original = Output.require_unchanged_sources

    def late(out: Output) -> None:
        change(Path(name))
        original(out)

    monkeypatch.setattr(Output, "require_unchanged_sources", late)
    error = cli(*words, "-m", name, code=4).err
    assert f"{name} changed while it was being read" in error
    assert "run the command again" in error
    assert not list(Path().glob("*out*"))


def test_changes_of_a_shard_that_was_closed_are_noticed(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({f"w{number:02}": torch.randn(500) for number in range(40)}, "in.pth")
    cli("save", "many/", "-m", "in.pth", "--max-shard-size", "2000")
    original = Output.require_unchanged_sources

    def late(out: Output) -> None:
        os.utime("many/model-00001-of-00040.safetensors", ns=(1, 1))
        original(out)

    monkeypatch.setattr(Output, "require_unchanged_sources", late)
    error = cli("save", "one.safetensors", "-m", "./many", code=4).err
    assert "model-00001-of-00040.safetensors changed while it was being read" in error


def test_a_source_of_the_first_shard_that_changes_while_the_last_is_written(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({f"w{number}": torch.randn(500) for number in range(4)}, "in.pth")
    cli("save", "many/", "-m", "in.pth", "--max-shard-size", "2000")
    original = HeaderLayout.write
    written = []

    def late(layout: HeaderLayout, out: Output) -> None:
        original(layout, out)
        written.append(layout)
        if len(written) == 4:
            os.utime("many/model-00001-of-00004.safetensors", ns=(1, 1))

    monkeypatch.setattr(HeaderLayout, "write", late)
    error = cli("save", "again/", "-m", "./many", "--max-shard-size", "2000", code=4).err
    assert "model-00001-of-00004.safetensors changed while it was being read" in error
    assert not Path("again").exists()


@pytest.mark.parametrize("words", [("save", "out.pth"), ("cast", ".", "half", "-o", "out.pth")])
def test_a_source_that_is_gone_before_it_is_read_is_named(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    one_tensor("in.safetensors")
    original = ZipLayout.write

    def late(layout: ZipLayout, out: Output) -> None:
        Path("in.safetensors").unlink()
        original(layout, out)

    monkeypatch.setattr(ZipLayout, "write", late)
    assert "in.safetensors changed while it was being read" in cli(*words, "-m", "in.safetensors", code=4).err


@pytest.mark.skipif(not hasattr(os, "SEEK_DATA"), reason="this system does not tell of holes")
def test_holes_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "sparse.bin"
    with path.open("wb") as file:
        file.truncate(1 << 30)
        file.seek(500 << 20)
        file.write(b"x" * 5000)
    with (tmp_path / "out.bin").open("wb+", buffering=0) as target, Output(target, 1 << 30) as out:
        out.put(0, span(path, 0, 1 << 30))
    status = (tmp_path / "out.bin").stat()
    assert status.st_size == 1 << 30
    assert status.st_blocks * 512 < 1 << 20
    with (tmp_path / "out.bin").open("rb") as found:
        found.seek(500 << 20)
        assert found.read(5001) == b"x" * 5000 + b"\0"


# --- checksums -----------------------------------------------------------------------------------------------------


def checksums(path: Path) -> dict[str, int]:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        return {info.filename.partition("/")[2]: info.CRC for info in archive.infolist()}


@pytest.mark.parametrize("stated", [True, False])
def test_stated_checksums_are_copied(folder: Path, monkeypatch: pytest.MonkeyPatch, stated: bool) -> None:
    """A record that is copied whole is not read for its checksum, unless torch left the checksum out."""
    torch.serialization.set_crc32_options(stated)
    try:
        torch.save({"w": torch.randn(500_000)}, "in.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    path = Path("in.pth")
    with path.open("rb") as file:
        entry = zip_directory.read(file, path.stat().st_size, "in.pth")["in/data/0"]
    tensor = PlannedTensor((500_000,), "float32", (1,), 0, span(path, entry.offset, entry.nbytes))
    counted: list[int] = []

    def count(data: bytes, before: int = 0) -> int:
        counted.append(len(data))
        return original(data, before)

    original = zlib.crc32
    with monkeypatch.context() as patch:
        patch.setattr(zlib, "crc32", count)
        writing.write(Plan({"w": tensor}, "{}"), Path("out.pth"))
    assert (sum(counted) >= 2_000_000) is not stated
    assert checksums(Path("out.pth"))["data/0"] == original(torch.load("in.pth")["w"].numpy().tobytes())


def test_checksums_of_a_file_that_is_not_an_archive_are_computed(cli: Cli) -> None:
    from safetensors.torch import save_file

    state = {"a": torch.randn(300_000), "b": torch.arange(7)}
    save_file(state, "in.safetensors")
    cli("save", "out.pth", "-m", "in.safetensors")
    found = checksums(Path("out.pth"))
    assert {zlib.crc32(t.numpy().tobytes()) for t in state.values()} == {found["data/0"], found["data/1"]}


LARGE_DATA = DATA * 3  # 6 MiB: the checksum of so much is computed while it is copied


def put_with_checksum(path: Path, part: Span) -> int:
    with path.open("wb+", buffering=0) as file, Output(file, part.nbytes) as out:
        return out.put_with_checksum(0, part)


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("copies", [True, False])
def test_a_checksum_is_computed_while_the_bytes_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: int, copies: bool
) -> None:
    path = tmp_path / "large.bin"
    path.write_bytes(LARGE_DATA)
    if not copies:
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    found = put_with_checksum(tmp_path / "out.bin", span(path, start, len(LARGE_DATA) - start))
    assert found == zlib.crc32(LARGE_DATA[start:])
    assert (tmp_path / "out.bin").read_bytes() == LARGE_DATA[start:]


@pytest.mark.skipif(not hasattr(os, "copy_file_range"), reason="this system cannot copy, so one thread reads")
def test_a_source_that_only_the_checksum_cannot_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large.bin"
    path.write_bytes(LARGE_DATA)

    def broken(*_args: Any) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", broken)
    with pytest.raises(SystemFailureError, match=r"cannot read .*large\.bin: Input/output error"):
        put_with_checksum(tmp_path / "out.bin", span(path, 0, len(LARGE_DATA)))


def test_a_copy_that_fails_ends_the_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread goes on reading a file that is closed."""
    path = tmp_path / "large.bin"
    path.write_bytes(LARGE_DATA)

    def full(*_args: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full, raising=False)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left on device"):
        put_with_checksum(tmp_path / "out.bin", span(path, 0, len(LARGE_DATA)))
    assert "checksum" not in {thread.name for thread in threading.enumerate()}


# --- offsets -------------------------------------------------------------------------------------------------------


def test_large_spans_keep_their_offset_within_a_page(cli: Cli) -> None:
    """The same offset within a page lets file systems share blocks, and lets others copy whole pages."""
    torch.save({f"w{number}": torch.randn(100_000 + number) for number in range(5)}, "in.pth")
    cli("save", "out.pth", "-m", "in.pth")
    before, after = (checkpoints.read(Path(name)).tensors for name in ("in.pth", "out.pth"))
    for name in before:
        one, other = before[name].storage.offset, after[name].storage.offset  # type: ignore[union-attr]
        assert (one - other) % PAGE == 0
        assert other % zip_layout.ALIGNMENT == 0
    cli("save", "a.safetensors", "-m", "in.pth")
    cli("replace", "w4", "Linear(2,2)", "-m", "a.safetensors", "-o", "b.safetensors", code=2)
    cli("remove", "w0", "-m", "a.safetensors", "-o", "b.safetensors")
    before, after = (checkpoints.read(Path(name)).tensors for name in ("a.safetensors", "b.safetensors"))
    for name in after:
        assert (before[name].storage.offset - after[name].storage.offset) % PAGE == 0  # type: ignore[union-attr]


def test_the_offset_of_a_source(source: Path) -> None:
    assert place_like(span(source, 64, LARGE), 5000, 64) == 4096 + 4096 + 64
    assert place_like(span(source, 64, LARGE), 4160, 64) == 4160
    assert place_like(span(source, 65, LARGE), 5000, 64) == 5056
    assert place_like(span(source, 64, LARGE - 1), 5000, 64) == 5056


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_size_is_known_before_a_byte_is_written(cli: Cli, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cli("save", f"a{suffix}", "-m", "nets.py:Places")
    size = Path(f"a{suffix}").stat().st_size
    monkeypatch.setattr("modelcli.files.atomic.shutil.disk_usage", lambda _folder: SimpleNamespace(free=size - 1))
    error = cli("save", f"b{suffix}", "-m", "nets.py:Places", code=5).err
    assert f"cannot write b{suffix}: it takes 0.01 MB, and 0.01 MB are free" in error
    assert not Path(f"b{suffix}").exists()
    monkeypatch.setattr("modelcli.files.atomic.shutil.disk_usage", lambda _folder: SimpleNamespace(free=size))
    cli("save", f"b{suffix}", "-m", "nets.py:Places")


# --- safety --------------------------------------------------------------------------------------------------------


def test_no_fsync_skips_fsync(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    cli("save", "a.pth", "-m", "nets.py:Places", "--no-fsync")
    cli("save", "a/", "-m", "nets.py:Places", "--no-fsync")
    assert not synced
    cli("save", "b.pth", "-m", "nets.py:Places")
    assert len(synced) == 2  # the file, and the folder that contains it
    synced.clear()
    cli("save", "b/", "-m", "nets.py:Places")
    assert len(synced) == 4  # a shard, the index, their folder, and the folder that contains it


@pytest.mark.parametrize("out", ["a.pth", "a.safetensors", "a/"])
def test_verify_reads_every_byte_back(cli: Cli, monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    cli("save", out, "-m", "nets.py:Places", "--verify")
    original = Output.write

    def forgetful(self: Output, offset: int, data: bytes | memoryview) -> None:
        is_weight = len(data) == 64 and bytes(data[:2]) != b"PK"
        original(self, offset, bytes(64) if is_weight else data)

    monkeypatch.setattr(Output, "write", forgetful)
    cli("save", out, "-m", "nets.py:Places", "--force")
    error = cli("save", out, "-m", "nets.py:Places", "--force", "--verify", code=5).err
    assert "were not written as they were read" in error
    assert "the disk may be failing: nothing was changed" in error


def test_verify_finds_what_was_damaged_before(cli: Cli, folder: Path) -> None:
    """A copied record keeps the checksum that its file states, so a damaged record becomes a damaged copy."""
    torch.save({"w": torch.randn(400_000), "b": torch.ones(3)}, "in.pth")
    data = bytearray((folder / "in.pth").read_bytes())
    data[700_000] ^= 1
    (folder / "in.pth").write_bytes(data)
    cli("cast", "b", "half", "-m", "in.pth", "-o", "out.pth")
    error = " ".join(cli("cast", "b", "half", "-m", "in.pth", "-o", "new.pth", "--verify", code=4).err.split())
    assert "in.pth is damaged: its record in/data/0 does not match its checksum" in error
    assert not (folder / "new.pth").exists()


@pytest.mark.parametrize("out", ["out.safetensors", "out/"])
def test_verify_reads_headers_and_the_index_back(
    cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    torch.save({"w": torch.randn(4)}, "in.pth")
    original = output._pwrite

    def forgetful(handle: int, data: memoryview, offset: int) -> int:
        altered = bytes(data).replace(b'"seed":0', b'"seed":1').replace(b'"format":"pt"', b'"format":"xx"')
        return original(handle, memoryview(altered), offset)

    monkeypatch.setattr(output, "_pwrite", forgetful)
    assert "not written as they were read" in cli("save", out, "-m", "in.pth", "--verify", code=5).err
    assert not (folder / out).exists()


def test_a_report_for_a_progress_bar(folder: Path, tmp_path: Path) -> None:
    torch.save({"w": torch.randn(5_000_000)}, "in.pth")
    told: list[tuple[int, int, str]] = []
    for out, kind in (("out.pth", "pth"), ("out.safetensors", "safetensors"), ("out", "folder")):
        told.clear()
        made = open_editable(Source("in.pth")).plan(Path(out), kind)
        written = writing.write(
            made, Path(out), WriteOptions(verify=True, report=lambda *now: told.append(now)), kind=kind
        )
        for doing in ("writing", "verifying"):
            done = [now for now, _, what in told if what == doing]
            assert done == sorted(done)
            assert 0.99 * written.nbytes < done[-1] <= written.nbytes
        assert {total for _, total, what in told if what != "checking"} == {written.nbytes}
        assert {total for _, total, what in told if what == "checking"} == {Path("in.pth").stat().st_size}


def test_sources_that_give_other_bytes_than_they_say(tmp_path: Path) -> None:
    class Short(Bytes):
        def chunks(self) -> Iterator[bytes]:
            yield self.data[:-4]

    with (
        (tmp_path / "out.bin").open("wb+", buffering=0) as file,
        Output(file, 12) as out,
        pytest.raises(ModelcliError, match="a source of 12 bytes gave 8"),
    ):
        out.put(0, Short(bytes(12)))


def test_more_shards_than_files_may_be_open(cli: Cli) -> None:
    """The source has 60 files, and the process may open only a few."""
    torch.save({f"w{number}": torch.randn(500) for number in range(60)}, "in.pth")
    cli("save", "many/", "-m", "in.pth", "--max-shard-size", "2000")
    assert len(list(Path("many").glob("*.safetensors"))) == 60
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48));"
        "from modelcli.cli import main; raise SystemExit(main(['save', 'one.pth', '-m', './many']))"
    )
    if sys.platform != "win32":
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=120)
        assert torch.load("one.pth")["w59"].equal(torch.load("in.pth")["w59"])


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no advice")
@pytest.mark.parametrize("durable", [True, False])
def test_copied_bytes_are_flushed_while_copying_continues(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    advice: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _handle, offset, nbytes, _what: advice.append((offset, nbytes)))
    with (
        (tmp_path / "out.bin").open("wb+", buffering=0) as file,
        Output(file, len(DATA), durable=durable) as out,
    ):
        out.put(0, span(source, 0, len(DATA)))
    assert (tmp_path / "out.bin").read_bytes() == DATA
    assert sum(nbytes for _, nbytes in advice) == (len(DATA) if durable else 0)


@pytest.mark.parametrize("kind", ["safetensors", "dcp"])
def test_a_tensor_larger_than_a_shard_has_a_file_of_its_own_and_a_note(cli: Cli, folder: Path, kind: str) -> None:
    tensors = {"a": torch.ones(10), "b": torch.ones(900), "c": torch.ones(10), "d": torch.ones(1000)}
    torch.save({**tensors, "tied": tensors["d"]}, "in.pth")
    words = ("save", "out/", "-m", "in.pth", "--format-out", kind, "--force", "--max-shard-size")
    told = " ".join(cli(*words, "2KB").err.split())
    assert "d has 4,000 bytes, more than the 2,000 of a shard, and a file of its own; so has 1 other tensor" in told
    files = [path for path in (folder / "out").iterdir() if path.suffix in (".safetensors", ".distcp")]
    assert sum(path.stat().st_size > 3600 for path in files) == 2
    assert len(files) == 4
    told = " ".join(cli(*words, "3999").err.split())
    assert "d has 4,000 bytes, more than the 3,999 of a shard, and a file of its own" in told
    assert "other tensor" not in told
    assert "of a shard" not in cli(*words, "4KB").err


def test_what_is_not_as_it_was_written_is_named_as_the_user_does(
    cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is checked before it has its name, through a handle."""
    torch.save({"a": torch.ones(1000)}, "in.pth")
    original = writing._write_files

    def cut_short(share: Any, temporary: Path, book: Any) -> None:
        original(share, temporary, book)
        os.truncate(temporary / "__0_0.distcp", 500)

    words = ("save", "out/", "-m", "in.pth", "--format-out", "dcp")
    with monkeypatch.context() as patched:
        patched.setattr(writing, "_write_files", cut_short)
        error = " ".join(cli(*words, code=5).err.split())
    assert "what was read back is damaged; nothing was changed: out/" in error
    assert "/proc/" not in error
    read = distributed.read
    monkeypatch.setattr(distributed, "read", lambda path, key: replace(read(path, key), tensors={}))
    assert "what was read back from out is not what was written" in " ".join(cli(*words, code=5).err.split())
    assert not (folder / "out").exists()
