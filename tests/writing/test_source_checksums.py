"""`--verify` and the checksums beside source files: those that sha256sum, hashlib and huggingface_hub write."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modelcli import writing
from tests.conftest import Cli

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def shards(folder: Path) -> None:
    """A folder of two shards with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(SHARDS):
        save_file({f"w{number}": torch.randn(64, 64, generator=torch.Generator().manual_seed(number))}, folder / name)
    index = {"metadata": {}, "weight_map": {f"w{number}": name for number, name in enumerate(SHARDS)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def damage(path: Path, at: int = -9) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sums(name: str, *options: str) -> Callable[[Path], None]:
    """The list that sha256sum writes."""

    def write(folder: Path) -> None:
        files = sorted(path.name for path in folder.iterdir())
        listed = subprocess.run(
            ["sha256sum", *options, *files], cwd=folder, check=True, capture_output=True, text=True
        ).stdout
        (folder / name).write_text(listed)

    return write


def each(folder: Path) -> None:
    """A file for each file, as many downloads have: the digest alone, or the line of sha256sum."""
    for number, path in enumerate(sorted(folder.iterdir())):
        line = digest(path).upper() if number % 2 else f"{digest(path)}  {path.name}"
        path.with_name(f"{path.name}.sha256").write_text(f"{line}\n")


def downloaded(folder: Path) -> None:
    """What `hf download --local-dir` writes: commit, etag, and the time of the download."""
    from huggingface_hub._local_folder import write_download_metadata

    for path in sorted(folder.iterdir()):
        write_download_metadata(folder, path.name, "0" * 40, digest(path))


NOTED: dict[str, Callable[[Path], None]] = {
    "SHA256SUMS": sums("SHA256SUMS"),
    "binary": sums("sha256sum.txt", "--binary"),
    "tag": sums("checksums.txt", "--tag"),
    "each": each,
    "downloaded": downloaded,
}


@pytest.mark.skipif(sys.platform != "linux", reason="sha256sum is one of the coreutils")
@pytest.mark.parametrize("how", NOTED)
def test_a_damaged_shard_is_refused_by_its_name(cli: Cli, folder: Path, how: str) -> None:
    shards(folder / "in")
    NOTED[how](folder / "in")
    (folder / "in" / "SHA256SUMS.asc").write_text("no list")
    told = cli("save", "good/", "-m", "in/", "--verify").err
    assert "3 source files match" in told
    assert load_file(folder / "good" / "model-00001-of-00001.safetensors").keys() == {"w0", "w1"}
    damage(folder / "in" / SHARDS[1])
    if how == "downloaded":  # the time of the file is kept by what damages a disk
        note = folder / "in" / ".cache" / "huggingface" / "download" / f"{SHARDS[1]}.metadata"
        lines = note.read_text().split("\n")
        note.write_text("\n".join([*lines[:2], str(float(lines[2]) + 60), ""]))
    error = " ".join(cli("cast", "w1", "half", "-m", "in/", "-o", "out/", "--verify", code=4).err.split())
    assert f"{SHARDS[1]} is damaged or another file: its SHA-256 is {digest(folder / 'in' / SHARDS[1])}" in error
    assert "nothing was written" in error
    assert not (folder / "out").exists()
    cli("cast", "w1", "half", "-m", "in/", "-o", "out/")


def test_a_file_that_was_changed_after_its_download_is_not_compared(cli: Cli, folder: Path) -> None:
    """huggingface_hub goes by the time of the file, too."""
    shards(folder / "in")
    downloaded(folder / "in")
    note = folder / "in" / ".cache" / "huggingface" / "download" / f"{SHARDS[1]}.metadata"
    lines = note.read_text().split("\n")
    note.write_text("\n".join([*lines[:2], str(float(lines[2]) - 60), ""]))
    damage(folder / "in" / SHARDS[1])
    told = cli("save", "out/", "-m", "in/", "--verify").err
    assert "2 of 3 source files match the metadata of hf download" in told
    assert f"nothing states a checksum of in/{SHARDS[1]}" in told


def test_the_names_of_blobs_in_the_cache_of_the_hub(cli: Cli, folder: Path) -> None:
    """Large files have their SHA-256 as the name of the blob, small ones a digest of git, which is not compared."""
    shards(folder / "in")
    home = folder / "models--org--name"
    snapshot, blobs = home / "snapshots" / ("a" * 40), home / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in sorted((folder / "in").iterdir()):
        blob = blobs / (digest(path) if path.suffix == ".safetensors" else "b" * 40)
        path.rename(blob)
        (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
    told = cli("save", "out/", "-m", str(snapshot), "--verify").err
    assert "2 of 3 source files match the names of blobs in huggingface_hub's cache" in told
    damage((snapshot / SHARDS[0]).resolve())
    error = cli("save", "new/", "-m", str(snapshot), "--verify", code=4).err
    assert SHARDS[0] in error
    assert not (folder / "new").exists()


def test_the_index_is_compared_too(cli: Cli, folder: Path) -> None:
    shards(folder / "in")
    each(folder / "in")
    index = folder / "in" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"metadata"', '"metadat_"'))
    assert "index.json is damaged" in cli("save", "out/", "-m", "in/", "--verify", code=4).err


def test_the_list_of_a_folder_goes_with_the_files_that_it_is_of(cli: Cli, folder: Path) -> None:
    shards(folder / "in")
    each(folder / "in")
    (folder / "in" / "notes.txt").write_text("mine")
    cli("cast", "**", "bfloat16", "-m", "in/", "-o", "in/", "--force", "--verify")
    assert (folder / "in" / "notes.txt").read_text() == "mine"
    cli("save", "out/", "-m", "in/", "--verify")  # what it would refuse if old checksums were there


@pytest.mark.parametrize("out", ["out.safetensors", "out.pth", "out/"])
def test_the_checksums_of_zip_records(cli: Cli, folder: Path, out: str) -> None:
    torch.save({"a": torch.randn(100, 100), "b": torch.ones(3)}, "in.pth")
    told = cli("cast", "b", "half", "-m", "in.pth", "-o", out, "--verify").err
    assert "1 source file matches the CRCs of zip records" in told
    damage(folder / "in.pth", 20_000)
    with zipfile.ZipFile("in.pth") as archive:
        name = archive.testzip()
    error = " ".join(cli("cast", "b", "half", "-m", "in.pth", "-o", f"new-{out}", "--verify", code=4).err.split())
    assert f"in.pth is damaged: its record {name} does not match its checksum" in error
    assert not (folder / f"new-{out}").exists()


def test_what_nothing_states_is_told(cli: Cli, folder: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.randn(100, 100)}, "in.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert "nothing states a checksum of in.pth" in cli("save", "out.pth", "-m", "in.pth", "--verify").err
    assert "checksum" not in cli("save", "new.pth", "-m", "nets.py:Places", "--verify").err


@pytest.mark.parametrize("kind", ["safetensors", "dcp"])
def test_a_shard_that_is_damaged_before_it_is_read_back(
    cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    shards(folder / "in")
    original = writing._compare

    def compare(file: object, path: Path, *more: object) -> None:
        if path.name.endswith(("00002-of-00002.safetensors", "__0_1.distcp")):
            file.seek(12_000)  # type: ignore[attr-defined]
            file.write(b"\0\1\2\3")  # type: ignore[attr-defined]
        original(file, path, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(writing, "_compare", compare)
    options = ("--verify", "--max-shard-size", "20kB", "--format-out", kind)
    error = " ".join(cli("save", "out/", "-m", "in/", *options, code=5).err.split())
    assert "were not written as they were read" in error
    assert "of out/model-00002-of-00002.safetensors" in error or "of out/__0_1.distcp" in error
    assert not (folder / "out").exists()


def test_lists_with_odd_names_and_lines(cli: Cli, folder: Path) -> None:
    """A list may name files of other folders, files twice, and hold other text."""
    save_file({"w": torch.ones(4)}, "in.safetensors")
    own = digest(folder / "in.safetensors")
    lines = ["# sums", f"{'0' * 64}  other.safetensors", f"{own} *./in.safetensors", f"{own}  in.safetensors", "x  y"]
    (folder / "SHA256SUMS").write_text("\n".join(lines))
    assert "matches SHA256SUMS" in cli("save", "a.safetensors", "-m", "in.safetensors", "--verify").err
    (folder / "more.sha256").write_text(f"{'0' * 64}  in.safetensors\n")
    error = cli("save", "b.safetensors", "-m", "in.safetensors", "--verify", code=4).err
    assert "more.sha256 states" in " ".join(error.split())


@pytest.mark.skipif(sys.platform != "linux", reason="sha256sum is one of the coreutils")
@pytest.mark.parametrize(
    ("made_in", "files", "place"),
    [
        (".", "in/*", "SHA256SUMS"),
        (".", "in/*", "in/SHA256SUMS"),
        (".", "./in/*", "in/checksums.txt"),
        ("..", "{name}/in/*", "in/SHA256SUMS"),
        ("in", "./*", "in/SHA256SUMS"),
        ("in", "../in/*", "in/SHA256SUMS"),
        ("in", "$PWD/*", "SHA256SUMS"),
    ],
)
def test_lists_with_paths(cli: Cli, folder: Path, made_in: str, files: str, place: str) -> None:
    shards(folder / "in")
    line = f"sha256sum {files.format(name=folder.name)}"
    listed = subprocess.run(["sh", "-c", line], cwd=folder / made_in, check=True, capture_output=True, text=True).stdout
    (folder / place).write_text(listed)
    assert f"3 source files match {place}\n" in cli("save", "good/", "-m", "in/", "--verify").err
    damage(folder / "in" / SHARDS[1])
    error = " ".join(cli("save", "out/", "-m", "in/", "--verify", code=4).err.split())
    assert f"in/{SHARDS[1]} is damaged or another file" in error
    assert f"and {place} states" in error
    assert not (folder / "out").exists()


def test_a_path_in_a_list_is_of_the_file_that_is_there(cli: Cli, folder: Path) -> None:
    """`q/in.safetensors` in the list of q is of q/q/in.safetensors if that exists; a name is of no other folder."""
    for name in ("q/q", "q"):
        (folder / name).mkdir(exist_ok=True, parents=True)
        save_file({"w": torch.full((4,), len(name))}, folder / name / "in.safetensors")
    sums = folder / "q" / "SHA256SUMS"
    sums.write_text(f"{digest(folder / 'q/q/in.safetensors')}  q/in.safetensors\n")
    (folder / "SHA256SUMS").write_text(f"{'0' * 64}  in.safetensors\n{'1' * 64}  {'x' * 300}/in.safetensors\n")
    words = ("save", "out.pth", "--force", "--verify", "-m")
    assert "matches q/SHA256SUMS" in cli(*words, "q/q/in.safetensors").err
    assert "nothing states a checksum of q/in.safetensors" in cli(*words, "q/in.safetensors").err
    sums.rename(folder / "q" / "in.safetensors.sha256")  # made elsewhere: it is of the file beside it
    (folder / "q" / "in.safetensors.sha256").write_text(f"{'2' * 64}  /made/elsewhere/in.safetensors\n")
    error = " ".join(cli(*words, "q/in.safetensors", code=4).err.split())
    assert "q/in.safetensors.sha256 states" in error
