"""Every command on the keys of files that do not record their architecture, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.conftest import Cli

#: A program that runs a command line and prints which of these packages it imported.
RUN = """
import sys
from modelcli.cli import main
code = main(sys.argv[1:])
print("\\nimported:", *sorted({"torch", "torchvision"} & sys.modules.keys()), file=sys.stderr)
raise SystemExit(code)
"""


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Sequential(nn.ReLU(), nn.Linear(4, 2)))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state dict in three formats, one in a training checkpoint, and one with tensors that NumPy does not support."""
    folder = tmp_path_factory.mktemp("files")
    state = network().state_dict()
    torch.save(state, folder / "plain.pth")
    save_file(dict(state), folder / "plain.safetensors")
    torch.save({"state_dict": state, "epoch": 1}, folder / "training.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer releases announce that quantized tensors will go
        quantized = torch.quantize_per_tensor(torch.randn(3, 4), 0.1, 2, torch.qint8)
    sparse = torch.eye(3).to_sparse()
    torch.save({"q.weight": quantized, "s.weight": sparse, "w": torch.ones(2)}, folder / "composite.pth")
    return folder


def imported(folder: Path, *words: str) -> str:
    """Run a command line, which must succeed, in a new process. Returns the libraries that it imports."""
    run = subprocess.run(
        [sys.executable, "-c", RUN, *words], cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stderr.rpartition("imported:")[2].strip()


EDITS = (
    ("freeze", "2"),
    ("unfreeze", "2"),
    ("rename", "2.**", "head.**"),
    ("remove", "2"),
    ("extract", "2"),
    ("cast", ".", "bfloat16"),
)


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit[0])
def test_an_edit_imports_no_torch(files: Path, tmp_path: Path, edit: tuple[str, ...]) -> None:
    for source in ("plain.pth", "plain.safetensors"):
        for out in ("out.pth", "out.safetensors", "folder/"):
            path = f"{tmp_path}/{Path(source).suffix[1:]}-{out}"
            assert not imported(files, *edit, "-m", source, "-o", path)
    assert not imported(files, *edit, "-m", "plain.pth", "--dry-run")


@pytest.mark.parametrize(
    "words",
    [
        ("save", "OUT.safetensors", "-m", "plain.pth"),
        ("save", "OUT/", "-m", "plain.pth"),
        ("save", "OUT.pth", "-m", "plain.safetensors", "--compact"),
        ("save", "OUT.pth", "-m", "training.pth", "--bare"),
        ("freeze", "0", "-m", "training.pth", "--key", "state_dict", "-o", "OUT.pth"),
        ("apply", "-m", "plain.pth", "-e", "freeze 0", "-e", "cast . half", "-o", "OUT.pth"),
        ("save", "OUT.pth", "-m", "composite.pth"),
        ("rename", "q.**", "r.**", "-m", "composite.pth", "-o", "OUT.pth"),
        ("check", "plain.pth", "--max-params", "1M", "--finite"),
        ("load", "plain.pth", "--dry-run"),
    ],
    ids=" ".join,
)
def test_other_commands_import_no_torch(files: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    assert not imported(files, *(word.replace("OUT", f"{tmp_path}/out") for word in words))


def test_a_recipe_of_a_file_imports_no_torch(files: Path, tmp_path: Path) -> None:
    source = str(files / "plain.pth")
    assert not imported(tmp_path, "load", source)
    assert not imported(tmp_path, "rename", "2.**", "head.**")
    assert not imported(tmp_path, "cast", "head", "half")
    assert not imported(tmp_path, "params", "--values")
    assert not imported(tmp_path, "undo")
    assert not imported(tmp_path, "save", "out.pth")
    assert set(torch.load(tmp_path / "out.pth", weights_only=True)) == {
        name.replace("2.1.", "head.1.") for name in network().state_dict()
    }


def test_an_edit_with_new_values_imports_only_torch(files: Path, tmp_path: Path) -> None:
    assert imported(files, "init", "0", "ones", "-m", "plain.pth", "-o", f"{tmp_path}/out.pth") == "torch"
    words = ("replace", "2.1", "Linear(_,3)", "-m", "plain.pth", "-o", f"{tmp_path}/head.pth")
    assert "torch" in imported(files, *words)


def test_new_values_are_those_that_torch_draws(cli: Cli, files: Path) -> None:
    cli("replace", "2.1", "Linear(_,3)", "-m", files / "plain.pth", "-o", "head.pth", "--seed", "5")
    torch.manual_seed(5 * 1_000_003 + 1)
    expected = nn.Linear(4, 3)
    found = torch.load("head.pth", weights_only=True)
    assert torch.equal(found["2.1.weight"], expected.weight)
    assert torch.equal(found["2.1.bias"], expected.bias)
    assert list(found) == list(network().state_dict())


def test_values_after_edits_of_a_recipe(cli: Cli, files: Path) -> None:
    cli("load", files / "plain.pth")
    cli("cast", "0", "half")
    cli("rename", "0.**", "first.**")
    rows = {row["name"]: row for row in cli("params", "--values", "--json").json["tensors"]}
    expected = network().state_dict()["0.weight"].half()
    assert rows["first.weight"]["dtype"] == "float16"
    assert rows["first.weight"]["values"] == expected.tolist()


def test_modules_with_the_names_of_methods(cli: Cli) -> None:
    """`half` and `train` are methods of every nn.Module, and names of modules in some files."""
    torch.save({"half.weight": torch.zeros(3), "train.weight": torch.zeros(2)}, "bare.pth")
    cli("init", "half", "ones", "-m", "bare.pth", "-o", "out.pth")
    assert torch.equal(torch.load("out.pth", weights_only=True)["half.weight"], torch.ones(3))
    cli("replace", "train", "Linear(2,1)", "-m", "bare.pth", "-o", "out.pth", "--force")


def test_a_part_of_an_entry_is_not_removed_alone(cli: Cli) -> None:
    torch.save({"packed": (torch.ones(2), torch.zeros(1)), "w": torch.ones(1)}, "bare.pth")
    assert "remove takes only whole entries" in cli("remove", r"packed\[0\]", "-m", "bare.pth", code=2).err


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_names_that_describe_far_more_modules_than_their_size_allows_are_refused(cli: Cli, suffix: str) -> None:
    """20,000 keys with 20 components each name 400,000 modules, which no command creates."""
    state = {f"{number}{'.a' * 20}": torch.zeros(1) for number in range(20_000)}
    if suffix == ".pth":
        torch.save(dict.fromkeys(state, torch.zeros(1)), "deep.pth")
    else:
        save_file(state, "deep.safetensors")
    for words in (("modules",), ("freeze", ".", "-m"), ("rename", "0.**", "1.b.**", "-m"), ("extract", "0", "-m")):
        result = cli(*words, f"deep{suffix}", code=4)
        assert "describes a model that is too large for that size" in result.err


def test_work_for_many_keys_is_proportional_to_their_number(cli: Cli) -> None:
    """No edit takes quadratic time: four times as many keys take at most five times as many calls of functions.

    Searches inside one call of C code (`name in [...]`) do not count here. `make bench` measures them: it has rows for
    100,000 and for a million keys.
    """
    for edit in (
        ("freeze", "**.weight"),
        ("cast", ".", "half"),
        ("rename", "a.**", "b.**"),
        ("remove", "a.[0-9]"),
    ):
        calls = []
        for count in (1_000, 4_000):
            save_file({f"a.{i // 10}.m{i % 10}.weight": torch.zeros(1) for i in range(count)}, f"{count}.safetensors")
            counted = _Calls()
            sys.setprofile(counted)
            try:
                document = cli(*edit, "-m", f"{count}.safetensors", "--dry-run", "--json").out
            finally:
                sys.setprofile(None)
            assert json.loads(document)["changes"]
            calls.append(counted.number)
        assert calls[0] > 1_000
        assert calls[1] < 5 * calls[0], (edit, calls)


class _Calls:
    """Counts the calls of functions, for `sys.setprofile`."""

    number = 0

    def __call__(self, _frame: object, event: str, _argument: object) -> None:
        self.number += event in ("call", "c_call")
