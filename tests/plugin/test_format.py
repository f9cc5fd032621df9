"""A checkpoint format of another package is found everywhere where one of modelcli's own is."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import modelcli
from modelcli import plug_ins, resolve
from modelcli.checkpoints import formats
from modelcli.language.references import CheckpointFile
from tests.conftest import Cli
from tests.plugin.installing import Asked, asked_by, register

pytestmark = pytest.mark.usefixtures("plugin")
FORMAT = "from modelcli.checkpoints.format import Format\nclass Wreck(Format):\n"


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def files(folder: Path) -> Path:
    """`v.blob`, written by a program that does not know modelcli, and `v.pth` with the same tensors."""
    from modelcli_plugin import blob_tensors

    blob_tensors.save(state(), "v.blob")
    torch.save(state(), "v.pth")
    return folder


@pytest.mark.parametrize("words", [("save", "--help"), ("freeze", "--help"), ("help", "save")])
def test_the_help_lists_its_suffix(words: tuple[str, ...], cli: Cli) -> None:
    shown = " ".join(cli(*words).out.replace("│", " ").split())
    own = [suffix for format_ in formats.built_in() for suffix in format_.written_suffixes]
    assert f"{', '.join([*own, '.blob'])}, or a folder/" in shown


def test_what_a_name_may_end_in_is_a_hint(cli: Cli, files: Path) -> None:
    hint = cli("save", "out.nothing", "-m", "v.pth", code=2).err
    assert ".safetensors, .blob (as blob.save writes), or / (a folder of shards)" in hint


def test_its_files_are_completed(cli: Cli, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (files / "v.blb").write_bytes((files / "v.blob").read_bytes())
    (files / "v.other").write_bytes(b"")
    monkeypatch.setenv("_MODELCLI_COMPLETE", "complete_zsh_words")
    offered = [line.split("\t")[0] for line in cli("params", "v.").out.splitlines()]
    assert offered == ["v.blb", "v.blob", "v.pth"]


def test_a_word_with_its_suffix_is_a_file(folder: Path) -> None:
    assert formats.has_known_suffix("best.BLOB")
    with pytest.raises(modelcli.errors.RequestError, match=r"no such file: best\.blob"):
        resolve.parse("best.blob")
    Path("best.blob").touch()
    assert resolve.parse("best.blob") == CheckpointFile(Path("best.blob"))


def test_its_content_tells_it_whatever_it_is_called(cli: Cli, files: Path) -> None:
    Path("v.blob").rename("v.weights")
    document = cli("params", "v.weights", "--json").json
    assert [tensor["name"] for tensor in document["tensors"]] == list(state())
    assert document["tensors"][0]["shape"] == [3, 2]
    values = cli("params", "v.weights", "--values", "-s", "0.bias", "--json").json["tensors"][0]["values"]
    assert values == pytest.approx(state()["0.bias"].tolist())
    stats = cli("params", "v.weights", "--stats", "--json").json["tensors"][0]["stats"]
    assert stats["mean"] == pytest.approx(state()["0.weight"].mean().item(), rel=1e-5)
    assert cli("diff", "v.pth", "v.weights", "--json").json["same"]


@pytest.mark.parametrize("other", ["out.pth", "out.safetensors", "shards/"])
def test_it_is_converted_both_ways(other: str, cli: Cli, files: Path) -> None:
    from modelcli_plugin import blob_tensors

    document = cli("save", other, "-m", "v.blob", "--json").json
    assert document["tensors"] == len(state())
    if other == "out.pth":
        assert same(torch.load(other, weights_only=True), state())
    elif other == "out.safetensors":
        assert same(load_file(other), state())
    document = cli("save", "back.blob", "-m", other, "--verify", "--json").json
    assert document["format"] == "blob"
    assert same(blob_tensors.load("back.blob"), state())


def test_a_model_is_written_with_its_record(cli: Cli, folder: Path) -> None:
    from modelcli_plugin import blob_tensors

    cli("replace", "0", "Linear(2,5)", "-m", "Sequential(Linear(2,3),ReLU())", "-o", "out.blob", "-q")
    assert blob_tensors.load("out.blob")["0.weight"].shape == (5, 2)
    document = cli("modules", "out.blob", "--json").json
    assert [module["type"] for module in document["modules"]] == ["Sequential", "Linear", "ReLU"]
    assert isinstance(modelcli.load("out.blob")[1], nn.ReLU)
    cli("freeze", "0", "-m", "out.blob", "-o", "out.blob", "--force", "-q")
    assert cli("check", "out.blob", "--frozen", "0", "--json").json["passed"]


def test_what_it_cannot_hold_is_an_error_that_names_it(cli: Cli, folder: Path) -> None:
    torch.save({"w": torch.ones(2), "epoch": 3}, "v.pth")
    error = cli("save", "out.blob", "-m", "v.pth", code=2).err
    assert "epoch is not a tensor, but blob stores only tensors" in error
    assert "write a .pth file" in error
    assert not Path("out.blob").exists()
    assert "v.pth" in cli("params", "v.pth", "--key", "nothing", code=2).err


def test_a_key_is_refused(cli: Cli, files: Path) -> None:
    assert (
        "--key ema is for training checkpoints, and v.blob is a blob"
        in cli("params", "v.blob", "--key", "ema", code=2).err
    )


def test_its_script_reads_and_writes_it_without_modelcli(cli: Cli, files: Path) -> None:
    from modelcli_plugin import blob_tensors

    text = cli("script", "-m", "v.blob", "-e", "rename '0.*' 'first.*'", "-o", "out.blob").out
    assert "blob_tensors.load(" in text
    exec(compile(text, "work.py", "exec"), {"__name__": "__main__"})
    expected = {name.replace("0.", "first.", 1) if name.startswith("0.") else name: v for name, v in state().items()}
    assert same(blob_tensors.load("out.blob"), expected)


def test_a_file_of_two_formats_is_refused(cli: Cli, files: Path) -> None:
    end = b"PK\x05\x06" + bytes(18)
    Path("v.blob").write_bytes(Path("v.blob").read_bytes() + end)
    assert "is both a checkpoint and a zip archive" in cli("params", "v.blob", code=4).err


# --- tensors that need care ------------------------------------------------------------------------------------------


def test_tied_tensors_are_written_once_and_stay_tied(cli: Cli, folder: Path) -> None:
    from modelcli_plugin import blob_tensors

    weight = torch.randn(100, 100)
    torch.save({"a": weight, "b": weight, "view": weight.t(), "none": torch.ones(0, 3)}, "v.pth")
    for more in ((), ("--bare",)):  # with a record that says what is tied, and without one
        cli("save", "out.blob", "-m", "v.pth", "--force", *more)
        assert 80_000 < Path("out.blob").stat().st_size < 90_000  # two tensors of 40,000 bytes
        loaded = blob_tensors.load("out.blob")
        assert same(loaded, torch.load("v.pth", weights_only=True))
        assert loaded["a"].data_ptr() == loaded["b"].data_ptr()
        tied = {tensor["name"]: tensor["tied_to"] for tensor in cli("params", "out.blob", "--json").json["tensors"]}
        assert tied == {"a": None, "b": "a", "view": None, "none": None}
        cli("save", "back.pth", "-m", "out.blob", "--force")
        back = torch.load("back.pth", weights_only=True)
        assert back["a"].data_ptr() == back["b"].data_ptr()


def test_every_dtype(cli: Cli, folder: Path) -> None:
    from modelcli_plugin import blob_tensors
    from modelcli_plugin.blob import DTYPES

    bits = torch.arange(32, dtype=torch.uint8)
    state = {name: (bits % 2 if name == "bool" else bits.clone()).view(getattr(torch, name)) for name in sorted(DTYPES)}
    torch.save(state, "v.pth")
    cli("save", "out.blob", "-m", "v.pth", "--verify")
    for name, value in blob_tensors.load("out.blob").items():
        assert value.dtype == getattr(torch, name)
        assert torch.equal(value.view(torch.uint8), state[name].view(torch.uint8))
    rows = cli("params", "out.blob", "--values", "--stats").out
    assert all(name in rows for name in DTYPES)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_what_it_cannot_hold_leaves_no_file(cli: Cli, folder: Path) -> None:
    for value, said in (
        ({"w": torch.eye(2).to_sparse()}, "w is sparse_coo, which blob does not support"),
        ({"w\ud800": torch.ones(2)}, "a name in it is no valid text, which a blob needs"),
        ({"w": torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}, "w is float4_e2m1fn_x2, which a blob"),
    ):
        torch.save(value, "v.pth")
        refused = cli("save", "out.blob", "-m", "v.pth", code=2).err
        assert said in refused
        assert "write a .pth file" in refused
        assert not list(folder.glob("*.blob*"))


# --- files that lie --------------------------------------------------------------------------------------------------


def blob(tensors: object, body: bytes, **more: object) -> bytes:
    """A file with this header, whatever it says."""
    header = json.dumps({"tensors": tensors, **more}).encode()
    return struct.pack("<8sQ", b"\x93BLOB\x00\x00\x01", len(header)) + header + body


GOOD = {"a": ["float32", [2], 0], "b": ["float32", [1], 8]}
HEAD = b"\x93BLOB\x00\x00\x01"
LIES = {
    "cut in the length": HEAD + b"\1",
    "cut in the header": HEAD + struct.pack("<Q", 99) + b"{}",
    "a huge header": HEAD + struct.pack("<Q", 2**62) + b"{}",
    "a header of more bytes than the limit": HEAD + struct.pack("<Q", 100_000_001) + b"{}",
    "no JSON": HEAD + struct.pack("<Q", 2) + b"{x",
    "no UTF-8": HEAD + struct.pack("<Q", 3) + b'"\xff"',
    "deep JSON": HEAD + struct.pack("<Q", 200_000) + b"[" * 200_000,
    "many brackets": HEAD + struct.pack("<Q", 2_000_001) + b"[" + b"[]," * 666_666 + b"1]",
    "a list": HEAD + struct.pack("<Q", 2) + b"[]",
    "no tensors": HEAD + struct.pack("<Q", 2) + b"{}",
    "a name twice": HEAD + struct.pack("<Q", 58) + b'{"tensors":{"a":["int8",[1],0],"a":["int8",[1],0],"b":[]}}',
    "tensors in a list": blob([1, 2], b""),
    "cut in the values": blob(GOOD, bytes(11)),
    "bytes behind the values": blob(GOOD, bytes(13)),
    "a hole": blob({"a": ["float32", [2], 0], "b": ["float32", [1], 12]}, bytes(16)),
    "an overlap": blob({"a": ["float32", [2], 0], "b": ["float32", [1], 4]}, bytes(8)),
    "one place, two kinds": blob({"a": ["float32", [2], 0], "b": ["float32", [1], 0]}, bytes(8)),
    "an offset below 0": blob({"a": ["float32", [2], -8]}, bytes(8)),
    "an offset beyond 2^63": blob({"a": ["float32", [2], 2**63]}, bytes(8)),
    "a fraction for an offset": blob({"a": ["float32", [2], 0.5]}, bytes(8)),
    "a size below 0": blob({"a": ["float32", [-2], 0]}, bytes(8)),
    "a huge size": blob({"a": ["float32", [2**40], 0]}, bytes(8)),
    "more elements than there can be": blob({"a": ["float32", [2**40, 2**40], 0]}, bytes(8)),
    "a truth for a size": blob({"a": ["float32", [True], 0]}, bytes(4)),
    "too many axes": blob({"a": ["float32", [1] * 65, 0]}, bytes(4)),
    "no dtype of a blob": blob({"a": ["qint8", [2], 0]}, bytes(2)),
    "no dtype": blob({"a": [["float32"], [2], 0]}, bytes(8)),
    "a text": blob({"a": "abc"}, b""),
    "a long name": blob({"a" * 5_000: ["float32", [2], 0]}, bytes(8)),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_lies_is_refused(lie: str, cli: Cli, folder: Path) -> None:
    Path("good.blob").write_bytes(blob(GOOD, bytes(12), record=None))
    assert cli("params", "good.blob", "--json").json["totals"]["params"] == 3
    Path("v.blob").write_bytes(LIES[lie])
    for words in (("params", "v.blob"), ("save", "out.pth", "-m", "v.blob")):
        error = cli(*words, code=4).err
        assert error.startswith("error: v.blob")
        assert len(error) < 500
    assert not Path("out.pth").exists()


@pytest.mark.parametrize("record", ["no record", 3, {"a": 1}, "{" * 50])
def test_a_damaged_record_is_no_error(record: object, cli: Cli, folder: Path) -> None:
    Path("v.blob").write_bytes(blob(GOOD, bytes(12), record=record))
    assert cli("params", "v.blob", "--json").json["totals"]["params"] == 3


# --- the package -----------------------------------------------------------------------------------------------------


def test_entry_points_are_read_only_for_what_no_built_in_format_knows(site: list[Path], files: Path) -> None:
    for words in (("params", "v.pth"), ("save", "out.safetensors", "-m", "v.pth")):
        assert asked_by(site, *words) == Asked(0, set(), imported=False)
    for words in (("params", "v.blob"), ("save", "out.blob", "-m", "v.pth")):
        assert asked_by(site, *words) == Asked(0, {plug_ins.FORMATS}, imported=True)


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (None, "the format wreck of broken 1.0 cannot be loaded: ModuleNotFoundError: No module named 'wreck'"),
        ("1 / 0", "the format wreck of broken 1.0 cannot be loaded: ZeroDivisionError: division by zero"),
        ("Wreck = dict", "the format wreck of broken 1.0 cannot be used: wreck:Wreck is no subclass of"),
        (FORMAT + "    title = 'a wreck'\n", "the format wreck of broken 1.0 declares no name"),
        (
            FORMAT + "    name = title = label = 'w'\n    suffixes = '.w'\n",
            "declares '.w' as its suffixes, which has to",
        ),
        (
            FORMAT + "    name = title = 'w'\n    written_suffixes = ('.w',)\n",
            "the format wreck of broken 1.0 declares no label",
        ),
        (FORMAT + "    name = title = 'w'\n    suffixes = ('w',)\n", "declares the suffix 'w', which is not a dot"),
        (
            FORMAT + "    name = 'safetensors'\n    title = 'w'\n",
            "is not used: modelcli has a format that is called safetensors",
        ),
        (
            FORMAT + "    name = title = 'w'\n    def __init__(self):\n        1 / 0\n",
            "cannot be made: ZeroDivisionError",
        ),
    ],
)
def test_one_that_cannot_be_used_leaves_the_others(
    module: str | None, said: str, cli: Cli, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(files, "broken", "1.0", {plug_ins.FORMATS: {"wreck": "wreck:Wreck"}})
    if module is not None:
        Path("wreck.py").write_text(module)
    monkeypatch.syspath_prepend(str(files))
    formats.forget()
    assert cli("params", "v.blob", "--json").json["totals"]["params"] == 15
    Path("what").write_bytes(b"nothing that anybody knows")
    error = " ".join(cli("params", "./what", code=4).err.split())
    assert "is not a checkpoint" in error
    assert said in error
