"""`--jobs N`: the same result as one process gives, and plain PyTorch; one message where a worker fails."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict_loader import load

from modelcli.errors import SystemFailureError
from modelcli.files.atomic import TEMPORARY
from modelcli.ranks import starting
from tests.conftest import Cli


@pytest.fixture
def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Eight tensors of 40 kB, saved as in.pth; the last one has two values that float16 cannot hold."""
    torch.manual_seed(0)
    made = {f"layers.{number}.weight": torch.randn(100, 100) for number in range(8)}
    made["layers.7.weight"][3, 4:6] = 1e6
    torch.save(made, folder / "in.pth")
    return made


def _shards(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_folder_is_that_of_one_process(cli: Cli, folder: Path, tensors: dict[str, torch.Tensor]):
    words = ("cast", "**", "float16", "-m", "in.pth", "--max-shard-size", "50KB", "--verify")
    alone = cli(*words, "-o", "alone/")
    shared = cli(*words, "-o", "shared/", "--jobs", 3)
    assert shared.out.replace("shared/", "alone/") == alone.out
    assert "2 values became Inf" in alone.err  # which the worker that wrote the last shard has met
    assert shared.err == alone.err
    assert _shards(folder / "shared") == _shards(folder / "alone")
    found = {
        name: value for file in (folder / "shared").glob("*.safetensors") for name, value in load_file(file).items()
    }
    assert {name: value.tolist() for name, value in found.items()} == {
        name: value.half().tolist() for name, value in tensors.items()
    }
    assert not list(folder.glob(f".*{TEMPORARY}"))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_folder_of_dcp_loads(cli: Cli, folder: Path, tensors: dict[str, torch.Tensor]):
    cli("rename", "layers.*.**", "blocks.*.**", "-m", "in.pth", "-o", "out/", "--format-out", "dcp",
        "--max-shard-size", "100KB", "--jobs", 2)  # fmt: skip
    assert len(list((folder / "out").glob("*.distcp"))) > 2
    found = {name.replace("layers", "blocks"): torch.empty(100, 100) for name in tensors}
    load(found, checkpoint_id=folder / "out")
    for name, value in tensors.items():
        assert torch.equal(found[name.replace("layers", "blocks")], value)


def test_rank_0_writes_a_file_alone_and_says_so(cli: Cli, folder: Path, tensors: dict[str, torch.Tensor]):
    found = cli("save", "out.safetensors", "-m", "in.pth", "--jobs", 2)
    assert "rank 0 wrote out.safetensors alone, because it is one file: 2 ranks share a folder/ of shards" in found.err
    assert torch.equal(load_file(folder / "out.safetensors")["layers.1.weight"], tensors["layers.1.weight"])


def test_the_recipe_gets_an_edit_once(cli: Cli, folder: Path, tensors: dict[str, torch.Tensor]):
    cli("load", "in.pth")
    cli("remove", "layers.0", "-o", "out/", "--jobs", 2)
    assert (folder / "modelcli.toml").read_text().count("remove layers.0") == 1
    cli("remove", "layers.1", "--jobs", 2)  # writes no checkpoint
    assert (folder / "modelcli.toml").read_text().count("remove layers.1") == 1


def test_a_wrong_request_is_one_message(cli: Cli, folder: Path, tensors: dict[str, torch.Tensor]):
    found = cli("remove", "blocks.0", "-m", "in.pth", "-o", "out/", "--jobs", 3, code=2)
    assert found.err.count("error: ") == 1
    assert "rank" not in found.err
    assert not (folder / "out").exists()


def test_statistics_hashes_and_differences_are_those_of_one_process(
    cli: Cli, folder: Path, tensors: dict[str, torch.Tensor]
):
    other = tensors | {"layers.2.weight": tensors["layers.2.weight"] + 0.25, "layers.6.weight": torch.zeros(100, 100)}
    other["layers.5.weight"] = torch.full((100, 100), float("nan"))
    torch.save(other, folder / "other.pth")
    for words, code in (
        (("params", "in.pth", "--stats", "--json"), 0),
        (("hash", "in.pth", "other.pth"), 0),
        (("hash", "other.pth", "--tree"), 0),
        (("check", "in.pth", "other.pth", "--finite"), 1),
        (("check", "in.pth", "--same-as", "other.pth", "--hash", f"sha256:{'0' * 64}"), 1),
        (("diff", "in.pth", "other.pth", "--json"), 1),
        (("diff", "in.pth", "other.pth", "--atol", "0.3"), 1),
    ):
        alone, shared = cli(*words, code=code), cli(*words, "--jobs", 3, code=code)
        assert (shared.out, shared.err) == (alone.out, alone.err)
    found = {row["name"]: row for row in cli("params", "in.pth", "--stats", "--json", "--jobs", 3).json["tensors"]}
    for name, value in tensors.items():
        assert found[name]["stats"]["max"] == value.max().item()
        assert found[name]["stats"]["mean"] == pytest.approx(value.double().mean().item(), rel=1e-9)
    differs = cli("diff", "in.pth", "other.pth", "--json", "--jobs", 2, code=1).json
    assert {row["name"] for row in differs["tensors"]} == {f"layers.{number}.weight" for number in (2, 5, 6)}


def test_edits_from_standard_input_reach_all_ranks(
    cli: Cli, folder: Path, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"cast ** float64\nremove layers.3\n")))
    cli("apply", "-", "-m", "in.pth", "-o", "out/", "--max-shard-size", "100KB", "--jobs", 2)
    found = {name: value for file in (folder / "out").glob("*.safetensors") for name, value in load_file(file).items()}
    assert found.keys() == tensors.keys() - {"layers.3.weight"}
    assert torch.equal(found["layers.4.weight"], tensors["layers.4.weight"].double())


def test_workers_import_nothing_from_the_current_folder(cli: Cli, folder: Path, tensors: dict[str, torch.Tensor]):
    """A model that was downloaded may have files named as Python's own modules, or as modelcli."""
    code = "import pathlib\npathlib.Path('was-imported').touch()\n"
    (folder / "modelcli").mkdir()
    for name in ("modelcli/__init__.py", "modelcli/__main__.py", "contextlib.py", "json.py", "torch.py"):
        (folder / name).write_text(code)
    cli("hash", "in.pth", "--jobs", 2)
    assert not (folder / "was-imported").exists()


@pytest.mark.parametrize(
    ("words", "is_shared"),
    [
        (("params", "in.pth"), False),
        (("params", "in.pth", "--stats"), True),
        (("check", "in.pth", "--safe", "--max-params", "1M"), False),
        (("check", "in.pth", "--finite"), True),
        (("check", "in.pth", "--same-as", "in.pth"), True),
        (("check", "in.pth", "--hash", "sha256:" + "0" * 64), True),
        (("diff", "in.pth", "in.pth", "--no-values"), False),
        (("diff", "in.pth", "in.pth"), True),
        (("hash", "in.pth"), True),
        (("remove", "layers.1", "-m", "in.pth"), False),
        (("remove", "layers.1", "-m", "in.pth", "-o", "out/", "--dry-run"), False),
        (("remove", "layers.1", "-m", "in.pth", "-o", "out/"), True),
        (("apply", "-e", "remove layers.1", "-m", "in.pth"), False),
        (("apply", "-e", "remove layers.1", "-m", "in.pth", "-o", "out/"), True),
        (("save", "out/", "-m", "in.pth", "--dry-run"), False),
        (("save", "out/", "-m", "in.pth"), True),
    ],
)
def test_no_worker_is_started_where_nothing_is_shared(
    cli: Cli,
    folder: Path,
    tensors: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    is_shared: bool,
):
    def refuse(*_given: object) -> None:
        raise SystemFailureError("a worker was started")

    monkeypatch.setattr(starting, "_started", refuse)
    found = cli(*words, "--jobs", 2, code=5 if is_shared else 0)
    assert ("a worker was started" in found.err) == is_shared
