"""What is copied beside the weights of an edited model: files of its own folder, and never what a link leads out to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import timm
from timm.models._hub import save_for_hf

from modelcli.live.providers import companions
from tests.conftest import Cli
from tests.live.providers.huggingface.tiny import loaded, saved

SECRET = "root:x:0:0"


def read(found: companions.Companions) -> dict[str, bytes]:
    return {name: b"".join(source.chunks()) for name, source in found.files.items()}


@pytest.fixture
def model(folder: Path) -> Path:
    made = folder / "model"
    made.mkdir()
    (made / "vocab.txt").write_text("a b c")
    (folder / "secret").write_text(SECRET)
    return made


def test_links_within_the_folder_are_followed(model: Path) -> None:
    (model / "same.txt").symlink_to("vocab.txt")
    (model / "deep").mkdir()
    (model / "deep" / "real.json").write_text("{}")
    (model / "far.json").symlink_to("deep/real.json")
    found = companions.of(model)
    assert read(found) == {"vocab.txt": b"a b c", "same.txt": b"a b c", "far.json": b"{}"}
    assert found.notes == (f"modelcli copies files, and no folders: deep in {model} may be needed as well",)


@pytest.mark.parametrize("target", ["../secret", "{folder}/secret", "hop", "../model/../secret"])
def test_links_out_of_the_folder_are_left_out(model: Path, folder: Path, target: str) -> None:
    (model / "hop").symlink_to("../secret")
    (model / "leak.txt").symlink_to(target.format(folder=folder))
    found = companions.of(model)
    assert read(found) == {"vocab.txt": b"a b c"}
    (note,) = found.notes
    assert f"leak.txt (a link to {target.format(folder=folder)}, which is outside)" in note
    assert "put a file there if the model needs it" in note


def test_checksums_of_the_files_before_are_left_out(model: Path) -> None:
    for name in ("SHA256SUMS", "model.safetensors.sha256", "checksums.txt"):
        (model / name).write_text(f"{'0' * 64}  model.safetensors\n")
    found = companions.of(model)
    assert read(found) == {"vocab.txt": b"a b c"}
    (note,) = found.notes
    assert note.endswith("are not copied: the checksums are of the files before the edit")
    assert "SHA256SUMS" in note


def test_what_is_no_file_is_left_out(model: Path, folder: Path) -> None:
    (model / "gone.json").symlink_to("nowhere.json")
    (model / "loop.json").symlink_to("loop.json")
    (model / "etc").symlink_to(folder)
    (model / "null.txt").symlink_to(os.devnull)
    os.mkfifo(model / "pipe.txt")
    found = companions.of(model)
    assert read(found) == {"vocab.txt": b"a b c"}
    assert "no folders: etc in" in found.notes[0]
    told = (
        "gone.json (a link to nothing), loop.json (a link to nothing), null.txt (no file), pipe.txt (no file) are not"
    )
    assert told in found.notes[1]


def in_cache(cache: Path, name: str, *, shared: bool = False) -> Path:
    """A folder as huggingface_hub lays it out: links to blobs, which with `shared` are links to those of all models."""
    repository = cache / "models--org--bert"
    snapshot = repository / "snapshots" / ("1" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    if shared:
        (cache / "blobs" / "aa").mkdir(parents=True)
        (cache / "blobs" / "aa" / "aa00").write_text("a b c")
        (repository / "blobs" / "b1").symlink_to("../../blobs/aa/aa00")
    else:
        (repository / "blobs" / "b1").write_text("a b c")
    (snapshot / name).symlink_to("../../blobs/b1")
    return snapshot


@pytest.mark.parametrize("shared", [False, True])
def test_the_blobs_of_a_cache_are_copied(folder: Path, *, shared: bool) -> None:
    snapshot = in_cache(folder / "hub", "vocab.txt", shared=shared)
    linked = folder / "linked"
    linked.symlink_to(snapshot)
    for path in (snapshot, linked):
        found = companions.of(path)
        assert read(found) == {"vocab.txt": b"a b c"}
        assert not found.notes


def test_blobs_that_lead_out_of_the_cache_are_not(folder: Path) -> None:
    (folder / "secret").write_text(SECRET)
    snapshot = in_cache(folder / "hub", "vocab.txt")
    (snapshot.parents[1] / "blobs" / "b2").symlink_to("../../../secret")
    (snapshot / "leak.txt").symlink_to("../../blobs/b2")
    (snapshot / "other.txt").symlink_to("../../../models--org--other/private.txt")
    (folder / "hub" / "models--org--other").mkdir()
    (folder / "hub" / "models--org--other" / "private.txt").write_text(SECRET)
    found = companions.of(snapshot)
    assert read(found) == {"vocab.txt": b"a b c"}
    assert "leak.txt" in found.notes[0]
    assert "other.txt" in found.notes[0]


def test_blobs_that_are_a_link_out_are_not(folder: Path) -> None:
    snapshot = in_cache(folder / "hub", "vocab.txt")
    (folder / "private").mkdir()
    (snapshot.parents[1] / "blobs").rename(folder / "private" / "blobs")
    (snapshot.parents[1] / "blobs").symlink_to(folder / "private" / "blobs")
    assert not companions.of(snapshot).files


def test_an_edited_model_leaves_the_secret_where_it_is(cli: Cli, folder: Path) -> None:
    (folder / "secret").write_text(SECRET)
    saved("BertForSequenceClassification", folder / "model")
    (folder / "model" / "vocab.txt").write_text("a b c")
    (folder / "model" / "leak.txt").symlink_to("../secret")
    told = cli("save", "out/", "-m", "./model").err
    assert "leak.txt (a link to ../secret, which is outside) is not copied" in told
    assert {path.name for path in (folder / "out").iterdir()} == {"config.json", "model.safetensors", "vocab.txt"}
    assert not any(report for report in loaded(folder / "out")[1].values())


def test_an_edited_model_of_the_cache_takes_its_files_along(cli: Cli, folder: Path) -> None:
    snapshot = in_cache(folder / "hub", "vocab.txt")
    saved("BertForSequenceClassification", folder / "plain")
    for number, path in enumerate((folder / "plain").iterdir()):
        path.rename(snapshot.parents[1] / "blobs" / f"c{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/c{number}")
    result = cli("replace", "classifier", "Linear(_,5)", "-m", f"hf:{snapshot}", "-o", "out/")
    assert "not copied" not in result.err
    assert not (folder / "out" / "vocab.txt").is_symlink()
    assert (folder / "out" / "vocab.txt").read_text() == "a b c"
    assert loaded(folder / "out")[0].config.num_labels == 5


def test_a_model_of_timm_leaves_the_secret_too(cli: Cli, folder: Path) -> None:
    (folder / "secret").write_text(SECRET)
    save_for_hf(timm.create_model("test_resnet"), "model", safe_serialization=True)
    (folder / "model" / "leak.txt").symlink_to("../secret")
    assert "leak.txt (a link to ../secret, which is outside)" in cli("save", "out/", "-m", "./model").err
    assert {path.name for path in (folder / "out").iterdir()} == {"config.json", "model.safetensors"}
