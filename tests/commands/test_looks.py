"""Showing files that are unusual but not hostile: modelcli shows what torch reads, and names what it does not show."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import modelcli
from modelcli import checkpoints
from tests import hostile
from tests.checkpoints import test_distributed
from tests.conftest import Cli


class Sub(torch.Tensor):
    """A tensor of a user's class."""


def without_checksums(path: str, value: Any) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(value, path)
    finally:
        torch.serialization.set_crc32_options(True)


# --- what torch reads ----------------------------------------------------------------------------------------------


def test_an_archive_without_checksums(cli: Cli) -> None:
    state = {"w": torch.randn(300_000), "b": torch.ones(2)}
    without_checksums("in.pth", state)
    assert torch.equal(torch.load("in.pth", weights_only=True)["w"], state["w"])
    result = cli("params", "in.pth")
    assert "w     [300000]" in result.out
    assert "in.pth has no checksums, so damage in it would not be noticed" in result.err
    cli("save", "out.pth", "-m", "in.pth")
    subprocess.run([sys.executable, "-m", "zipfile", "-t", "out.pth"], check=True, capture_output=True)
    assert torch.equal(torch.load("out.pth", weights_only=True)["w"], state["w"])


def test_a_damaged_pickle_is_still_refused(cli: Cli) -> None:
    torch.save({"w": torch.ones(2)}, "in.pth")
    data = Path("in.pth").read_bytes()
    place = data.index(b"FloatStorage")
    Path("in.pth").write_bytes(data[:place] + b"FlootStorage" + data[place + 12 :])
    assert "does not have the CRC-32 that the archive states" in cli("params", "in.pth", code=4).err


def test_tensors_of_a_users_class_are_shown(cli: Cli) -> None:
    torch.save({"w": torch.arange(3.0).as_subclass(Sub), "v": torch.ones(1)}, "in.pth")
    result = cli("params", "in.pth", "--values")
    assert "w     [3]" in result.out
    assert "[0,1,2]" in result.out
    assert "test_looks.Sub" in result.err


def test_requires_grad_is_shown_if_the_file_stores_it(cli: Cli) -> None:
    torch.save({"w": torch.ones(2, requires_grad=True), "v": torch.ones(2)}, "in.pth")
    rows = cli("params", "in.pth", "--json").json["tensors"]
    assert [(row["name"], row["trainable"]) for row in rows] == [("w", True), ("v", None)]


def test_packed_weights_have_a_row(cli: Cli) -> None:
    """The packed weights of a quantized module are found as Python finds them."""
    torch.save({"fc.scale": torch.ones(1), "fc.packed": (torch.ones(3), None), "n": 3}, "in.pth")
    result = cli("params", "in.pth", "--json")
    assert [row["name"] for row in result.json["tensors"]] == ["fc.scale", "fc.packed[0]"]
    assert "no row" not in result.err


def test_a_note_names_tensors_beside_the_state_dict(cli: Cli) -> None:
    torch.save({"a": torch.ones(1), "inner": {"b": torch.ones(2)}}, "in.pth")
    told = cli("params", "in.pth").err
    assert "took the state dict under 'inner' of in.pth" in told
    assert "note: a beside it is not shown" in told


# --- what is wrong is named ----------------------------------------------------------------------------------------


def test_a_state_dict_that_was_pickled_without_torch_save(cli: Cli) -> None:
    with Path("in.pth").open("wb") as file:
        pickle.dump(nn.Linear(2, 2).state_dict(), file)
    assert "in.pth is a pickle that torch.save did not write" in cli("params", "in.pth").err
    with Path("in.pth").open("wb") as file:
        pickle.dump({"a": 1}, file)
    assert "in.pth contains no state dict" in cli("params", "in.pth", code=4).err


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_the_format_before_1_6_in_every_protocol(cli: Cli, protocol: int) -> None:
    torch.save({"w": torch.ones(2)}, "in.pth", _use_new_zipfile_serialization=False, pickle_protocol=protocol)
    assert cli("params", "in.pth", "--json").json["totals"]["params"] == 2


def test_a_limit_is_named_in_the_format_before_1_6(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"w": torch.ones(2)}, "in.pth", _use_new_zipfile_serialization=False)
    monkeypatch.setenv("MODELCLI_MAX_PICKLE_BYTES", "100")
    assert "MODELCLI_MAX_PICKLE_BYTES" in cli("params", "in.pth", code=4).err


def test_the_file_of_one_rank_points_to_its_folder(cli: Cli, folder: Path) -> None:
    test_distributed.saved({"w": torch.ones(3)}, folder / "ck")
    error = cli("params", "ck/__0_0.distcp", code=4).err
    assert "only the part of a torch.distributed.checkpoint that one rank wrote" in error
    assert "hint: name its folder: ck/" in error


@pytest.mark.parametrize(("value", "what"), [(torch.ones(1), "a tensor"), ([1], "a list"), (3, "a int")])
def test_the_error_describes_a_value_that_is_not_a_state_dict(cli: Cli, value: Any, what: str) -> None:
    torch.save(value, "in.pth")
    error = cli("params", "in.pth", code=4).err
    assert f"in.pth contains no state dict: it is {what}" in error
    assert "--key" not in error


def test_a_folder_with_a_bare_name(cli: Cli) -> None:
    cli("save", "shards/", "-m", "Linear(2,3)")
    assert cli("params", "shards", "--json").json["totals"]["params"] == 9


def test_a_dangling_symlink(cli: Cli, folder: Path) -> None:
    (folder / "gone.pth").symlink_to("nowhere")
    assert "hint" not in cli("params", "gone.pth", code=2).err


def test_the_hint_for_a_misspelt_file_name(cli: Cli) -> None:
    for name in ("gone.pth", "runs/best.pth"):
        cli("save", name, "-m", "Linear(2,3)")
    assert "hint: here is: gone.pth" in cli("params", "gne.pth", code=2).err
    assert f"hint: in runs{os.sep}: best.pth" in cli("params", "runs/bets.pth", code=2).err


def test_cache_path_prints_only_the_folder(cli: Cli) -> None:
    assert cli("cache", "path").out == f"{os.environ['MODELCLI_CACHE']}\n"


def test_counts_of_one_are_singular(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    cli("cache", "warm", "squeezenet1_1")
    with monkeypatch.context() as patch:
        patch.setattr("modelcli.cli.output.is_terminal", lambda: True)
        patch.setenv("COLUMNS", "200")
        assert "  1 entry  " in cli("cache", "path").out
    assert "removed 1 entry\n" in cli("cache", "clear").err
    assert "  1 tensor  2 params  " in cli("save", "one.pth", "-m", "Linear(2,1,bias=False)").out
    below = cli("modules", "-s", "0", "-m", "Sequential(Sequential(ReLU()))").err
    assert "1 module lies below 0: -s '0.**' shows it too" in below


# --- records -------------------------------------------------------------------------------------------------------


def test_a_record_that_contradicts_the_ties_of_the_file_is_ignored(cli: Cli) -> None:
    """`_metadata` is kept when a user changes the state dict and saves it again."""
    cli("save", "tied.pth", "-m", "nets.py:Tied")
    state = torch.load("tied.pth", weights_only=True)
    state["head.weight"] = torch.zeros(11, 4)
    torch.save(state, "untied.pth")
    result = cli("params", "untied.pth", "--json").json
    assert result["totals"]["params"] == 44 + 20 + 44
    assert all(row["tied_to"] is None for row in result["tensors"])
    assert any("are two tensors in the file, but tied in the record" in note for note in result["notes"])
    told = cli("freeze", "embed", "-m", "untied.pth", "--arch", "nets.py:Tied", "-o", "out.pth").err
    assert "embed.weight and head.weight are one tensor here and two in the file: the values of head.weight" in told
    assert "two in the file" not in cli("freeze", "embed", "-m", "tied.pth", "--trust", "-o", "x.pth").err


def test_a_record_without_a_forward_pass(cli: Cli) -> None:
    import json

    from modelcli.checkpoints import record as records

    cli("save", "in.pth", "-m", "Linear(2,3)")
    contents = checkpoints.read(Path("in.pth"))
    assert contents.record is not None
    document = json.loads(records.to_text(contents.record))
    document["blueprint"].pop("trace")
    state = torch.load("in.pth", weights_only=True)
    state._metadata[records.METADATA_KEY] = json.dumps(document)
    torch.save(state, "out.pth")
    assert "the record in the file contains no forward pass" in cli("summary", "out.pth").out


# --- foreign names -------------------------------------------------------------------------------------------------


def test_suspicious_classes_are_always_listed(cli: Cli, folder: Path) -> None:
    """JSON lists all of them, a line of text lists the most suspicious first, and `--quiet` hides none."""
    names = [f"torch.nn.Harmless{number}" for number in range(30)] + ["os.system"]
    values = [(f"v{number}", hostile.name(dotted)) for number, dotted in enumerate(names)]
    (folder / "evil.pth").write_bytes(hostile.archive(hostile.state_dict(("w", hostile.tensor()), *values)))
    for words in ((), ("-q",)):
        told = cli("params", "evil.pth", *words).err
        assert "warning: evil.pth also holds objects of os.system, torch.nn.Harmless0" in told
        assert "and 11 more" in told
    document = cli("params", "evil.pth", "--json", "-q").json
    assert len(document["foreign"]) == 31
    assert "os.system" in document["foreign"]
    assert document["notes"][0].startswith("warning: evil.pth also holds objects of os.system")
    assert "foreign" not in cli("params", "Linear(2,3)", "--json").json


# --- the cache, and ends of the program ----------------------------------------------------------------------------


def test_the_cache_replaces_a_symlink_and_not_its_target(cli: Cli, folder: Path) -> None:
    cli("summary", "squeezenet1_0")
    (entry,) = Path(os.environ["MODELCLI_CACHE"]).rglob("*.blueprint")
    (folder / "precious").write_text("precious")
    entry.unlink()
    entry.symlink_to(folder / "precious")
    cli("summary", "squeezenet1_0")
    assert (folder / "precious").read_text() == "precious"
    assert not entry.is_symlink()


def test_warming_a_cache_that_is_off(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELCLI_NO_CACHE", "1")
    assert "$MODELCLI_NO_CACHE is set" in cli("cache", "warm", "alexnet", code=2).err


def test_a_group_alone_shows_its_help(cli: Cli) -> None:
    result = cli("cache")
    assert "warm" in result.out + result.err
    assert "error" not in result.err


def program(command: str) -> tuple[int, str]:
    """Run a shell command with the real program. Returns the exit code of the program and its output."""
    text = command.replace("modelcli", f"{sys.executable} -m modelcli")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(["bash", "-c", text], capture_output=True, text=True, timeout=60, env=environment)
    return ended.returncode, ended.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("modelcli --help | head -1; exit ${PIPESTATUS[0]}", 0),
        ("modelcli params --help | head -1; exit ${PIPESTATUS[0]}", 0),
        ("modelcli --version > /dev/full", 5),
        ("modelcli params in.safetensors > /dev/full", 5),
        ("modelcli params in.safetensors --json > /dev/full", 5),
        ("modelcli params --help > /dev/full", 5),
        ("modelcli params in.safetensors >&-", 0),
        ("modelcli params none.pth --json 2>&1 | true; exit ${PIPESTATUS[0]}", 2),
        ("modelcli params none.pth 2> /dev/full", 2),
        ("modelcli params none.pth 2>&-", 2),
    ],
)
def test_ends_of_streams(folder: Path, command: str, code: int) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.ones(2)}, "in.safetensors")
    found, told = program(command)
    assert found == code
    assert "Traceback" not in told
    assert ("cannot write standard output: No space left on device" in told) == (code == 5)


def test_an_archive_without_checksums_in_the_python_api(folder: Path) -> None:
    without_checksums("in.pth", {"fc.w": torch.ones(2)})
    assert modelcli.blueprint("in.pth").totals.params == 2


@pytest.mark.filterwarnings("always")
def test_warnings_of_torch_and_of_a_model_become_notes(cli: Cli, folder: Path) -> None:
    (folder / "noisy.py").write_text(
        "import warnings\n"
        "from torch import nn\n\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self):\n"
        "        super().__init__(nn.Linear(2, 3))\n"
        '        warnings.warn("an old\\nnet (Triggered internally at x.cpp:1.)", stacklevel=1)\n'
    )
    own, dropout = "noisy.py:7 warns: an old net", "torch warns: dropout option adds dropout after all but last"
    words = ("replace", "0", "LSTM(2,3,dropout=0.5)", "-m", "noisy.py:Net")
    told = cli(*words).err
    assert (told.count(f"note: {own}\n"), told.count(f"note: {dropout}")) == (1, 1)
    assert "UserWarning" not in told
    result = cli(*words, "-o", "zero.pth", "--json")
    assert own in result.json["notes"]
    assert [note for note in result.json["notes"] if note.startswith(dropout)]
    assert result.err == ""
    assert "warns" not in cli(*words, "-q").err
    assert cli("freeze", "1", "-m", "noisy.py:Net", "--json", code=2).error["notes"] == [own]


def test_a_note_names_the_columns_left_out_on_a_narrow_terminal(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelcli.cli.output.is_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    shown = cli("params", "alexnet")
    assert "bytes" not in shown.out.partition("\n\n")[0]
    assert re.search(r"note: no space for .*bytes.*: a wider terminal or -f csv shows them", shown.err)
    monkeypatch.setenv("COLUMNS", "200")
    assert "no space for" not in cli("params", "alexnet").err
    monkeypatch.setenv("COLUMNS", "60")
    assert "no space for" not in cli("params", "alexnet", "--quiet").err


def test_deep_paths_are_a_tree_where_they_do_not_fit(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelcli.cli.output.is_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    shown = cli("summary", "vit_b_16").out.split("\n")
    names = [line[:26].rstrip() for line in shown]
    assert "      encoder_layer_[0-11]" in names
    assert "        self_attention" in names
    assert not any("\N{HORIZONTAL ELLIPSIS}" in name for name in names)
    assert all(len(line) <= 80 for line in shown)
    monkeypatch.setenv("COLUMNS", "200")
    assert "encoder.layers.encoder_layer_[0-11].self_attention" in cli("summary", "vit_b_16").out


def test_without_a_forward_pass_executed_is_null(cli: Cli) -> None:
    torch.save(nn.Linear(2, 3).state_dict(), "bare.pth")
    for model in ("bare.pth", "Linear(2,3)"):
        layers = cli("summary", model, "--json").json["layers"]
        assert {layer["executed"] for layer in layers} == {None}
