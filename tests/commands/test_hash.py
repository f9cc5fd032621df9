"""The hash of a model's contents, against the few lines of plain PyTorch and hashlib on the page about it."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import re
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from tests.checkpoints.test_checkpoints import ALL_DTYPES
from tests.conftest import Cli
from tests.needs import what_torch_has

PAGE = (Path(__file__).parents[2] / "docs" / "checks.md").read_text(encoding="utf-8")
PLAIN: dict[str, Any] = {}
exec(PAGE.partition("```python\n")[2].partition("```")[0], PLAIN)  # the reader of the page would do the same

State = dict[str, torch.Tensor]
DTYPES = what_torch_has(ALL_DTYPES)


def wanted(state: State) -> str:
    return str(PLAIN["model_hash"](state))


def found(cli: Cli, *words: object) -> str:
    return cli("hash", *words).out.partition("  ")[0]


def random_bits(dtype: str, *shape: int) -> torch.Tensor:
    """Return a tensor of random bits: among floating-point numbers NaNs with payloads, -0.0 and infinities."""
    kind = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(len(dtype))
    *outer, row = shape
    top = 2 if dtype == "bool" else 256
    bits = torch.randint(0, top, (*outer, row * kind.itemsize), dtype=torch.uint8, generator=generator)
    return bits.view(kind)


def as_pth(state: State) -> str:
    torch.save(state, "x.pth")
    return "x.pth"


def as_legacy(state: State) -> str:
    torch.save(state, "old.pth", _use_new_zipfile_serialization=False)
    return "old.pth"


def as_safetensors(state: State) -> str:
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, "x.safetensors")
    return "x.safetensors"


def as_dcp(state: State) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(dict(state), storage_writer=FileSystemWriter("dcp"), no_dist=True)
    return "dcp"


FORMATS = [
    (dtype, write)
    for dtype in DTYPES
    for write in (as_pth, as_legacy, as_safetensors, as_dcp)
    if write is not as_safetensors or dtype not in ("complex32", "complex128")  # which safetensors does not have
]


@pytest.mark.parametrize(("dtype", "write"), FORMATS)
def test_every_dtype_in_every_format(dtype: str, write: Callable[[State], str], cli: Cli) -> None:
    state = {"b.w": random_bits(dtype, 3, 5), "a": random_bits(dtype, 7), "b.none": random_bits(dtype, 0, 4)}
    assert found(cli, write(state)) == wanted(state)


def test_shards_and_compression_and_the_order_of_keys(cli: Cli) -> None:
    state = {f"layer.{number}.weight": torch.randn(30, 10) for number in range(12)}
    torch.save(dict(reversed(state.items())), "x.pth")
    cli("save", "shards/", "-m", "x.pth", "--max-shard-size", "5kB", "-q")
    assert len(list(Path("shards").glob("*.safetensors"))) > 2
    assert found(cli, "shards/") == found(cli, "x.pth") == wanted(state)


def test_views_and_shared_tensors(cli: Cli) -> None:
    base = torch.randn(40, 30)
    complex_ = torch.randn(3, 4, dtype=torch.complex64)
    state = {
        "base": base,
        "tied": base,
        "transposed": base.T,
        "strided": base[::3, 1::2],
        "flipped rows": base[2:9],
        "expanded": torch.ones(1).expand(50, 60),
        "permuted": torch.randn(3, 4, 5).permute(2, 0, 1),
        "conjugated": complex_.conj(),
        "negated": complex_.clone().conj().imag,
        "scalar": torch.tensor(-0.0),
        "empty": torch.zeros(0),
    }
    for write in (as_pth, as_legacy):
        assert found(cli, write(state)) == wanted(state)


def test_large_tensors_are_read_in_pieces(cli: Cli) -> None:
    state = {"large": torch.randn(1500, 1100), "transposed": torch.randn(1100, 1500).T, "other": torch.randn(600_001)}
    for write in (as_pth, as_safetensors, as_dcp):
        assert found(cli, write(state)) == wanted(state)


def test_anything_that_changes_changes_the_hash(cli: Cli) -> None:
    ones = torch.ones(2, 3)
    flipped = ones.clone()
    flipped.view(torch.int32)[1, 2] ^= 1
    nan = [torch.tensor([bits], dtype=torch.int32).view(torch.float32) for bits in (0x7FC00000, 0x7FC00001)]
    states: list[State] = [
        {"w": ones},
        {"v": ones},
        {"w": flipped},
        {"w": ones.T},
        {"w": ones.reshape(6)},
        {"w": ones.reshape(1, 2, 3)},
        {"w": ones.view(torch.int32)},
        {"w": ones.double()},
        {"w": ones, "v": ones},
        {"w": nan[0]},
        {"w": nan[1]},
        {"w": torch.tensor([0.0])},
        {"w": torch.tensor([-0.0])},
        {"w": torch.zeros(0, 2)},
        {"w": torch.zeros(2, 0)},
        {"w": torch.zeros(0, 2), "": torch.zeros(0)},
        {},
    ]
    hashes = []
    for state in states:
        torch.save(state, "x.pth")
        if state:
            assert found(cli, "x.pth") == wanted(state)
        hashes.append(wanted(state))
    assert len(set(hashes)) == len(states)


HOSTILE = ("a\nb.c\x00", "‮x", "a..b", "", ".x", "é.ß.\U0001f600", "10", "9", "\ud800", "a.b", "a" * 300, "sha256:0  x")


def test_hostile_names(cli: Cli) -> None:
    state = {name: torch.full((2,), float(number)) for number, name in enumerate(HOSTILE)}
    torch.save(state, "x.pth")
    assert found(cli, "x.pth") == wanted(state)
    rows = cli("hash", "x.pth", "--tree", "--json").json["tree"]
    tensors = {row["path"]: row["hash"] for row in rows if row["kind"] == "tensor"}
    assert tensors == {name: f"sha256:{PLAIN['tensor_hash'](tensor).hex()}" for name, tensor in state.items()}
    assert len(cli("hash", "x.pth", "--tree").out.splitlines()) == len(rows)
    torch.save({"w": torch.ones(2)}, "a\nb.pth")
    assert cli("hash", "a\nb.pth").out == f"{wanted({'w': torch.ones(2)})}  a\\nb.pth\n"


def test_two_lists_of_fields_never_join_to_the_same_bytes() -> None:
    texts = ["", "a", "ab", "b", "\x00", "a\x00"]
    joined = [b"".join(map(PLAIN["text"], pair)) for pair in itertools.product(texts, repeat=2)]
    assert len(set(joined)) == len(texts) ** 2


# --- quantized and sparse tensors ------------------------------------------------------------------------------------


def composite(layout: str, tensor: torch.Tensor, settings: list[str], parts: list[bytes]) -> bytes:
    """Return the hash of a quantized or sparse tensor as the page describes it."""
    number, text = PLAIN["number"], PLAIN["text"]
    data = text("modelcli-hash-v1 composite") + text(layout) + PLAIN["header"](tensor)
    data += number(len(settings)) + b"".join(map(text, settings)) + number(len(parts)) + b"".join(parts)
    return hashlib.sha256(data).digest()


def integers(tensor: torch.Tensor, data: bytes, dtype: str, *shape: int) -> bytes:
    number, text = PLAIN["number"], PLAIN["text"]
    head = text(dtype) + number(len(shape)) + b"".join(map(number, shape))
    return hashlib.sha256(text("modelcli-hash-v1 tensor") + head + data).digest()


@pytest.mark.filterwarnings("ignore")
def test_quantized_and_sparse_tensors(cli: Cli) -> None:
    plain = PLAIN["tensor_hash"]
    numbers = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    one = torch.quantize_per_tensor(numbers, 0.1, 3, torch.qint8)
    scales, zeros = torch.rand(6).double() + 0.1, torch.arange(6)
    several = torch.quantize_per_channel(numbers, scales, zeros, 0, torch.quint8)
    packed = torch.quantize_per_channel(numbers, torch.rand(6), torch.rand(6), 0, torch.quint4x2)
    coo, csr = numbers.relu().to_sparse(), numbers.relu().to_sparse_csr()

    def data(tensor: torch.Tensor) -> bytes:
        return tensor.int_repr().numpy().tobytes()

    scale = [packed.q_per_channel_scales(), packed.q_per_channel_zero_points()]
    nibbles = bytes(packed.untyped_storage().tolist()[:24])
    expected = {
        "one": composite(
            "strided", one, ["per_tensor_affine", (0.1).hex(), "3"], [integers(one, data(one), "qint8", 6, 8)]
        ),
        "several": composite(
            "strided",
            several,
            ["per_channel_affine", "0"],
            [integers(several, data(several), "quint8", 6, 8), plain(scales), plain(zeros)],
        ),
        "packed": composite(
            "strided",
            packed,
            ["per_channel_affine", "0"],
            [integers(packed, nibbles, "uint8", 24), *map(plain, scale)],
        ),
        "coo": composite("sparse_coo", coo, [], [plain(coo.indices()), plain(coo.values())]),
        "csr": composite(
            "sparse_csr", csr, [], [plain(csr.crow_indices()), plain(csr.col_indices()), plain(csr.values())]
        ),
    }
    torch.save({"one": one, "several": several, "packed": packed, "coo": coo, "csr": csr}, "x.pth")
    rows = cli("hash", "x.pth", "--tree", "--json").json["tree"][1:]
    assert {row["path"]: row["hash"] for row in rows} == {name: f"sha256:{d.hex()}" for name, d in expected.items()}


# --- what counts -----------------------------------------------------------------------------------------------------

OWN = """
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(3, 2)
        self.head = torch.nn.Linear(3, 2)
        self.head.weight = self.fc.weight
        self.register_buffer("steps", torch.ones(2))
        self.register_buffer("not_saved", torch.ones(2), persistent=False)
"""


def test_a_model_that_is_no_file_has_the_hash_of_what_save_writes(cli: Cli) -> None:
    Path("own.py").write_text(OWN)
    for out in ("out.pth", "out.safetensors"):
        cli("save", out, "-m", "own.py:Net", "-q")
    state = torch.load("out.pth", weights_only=True)
    assert "not_saved" not in state
    shown = cli("hash", "own.py:Net")
    assert "randomly initialised" in shown.err
    assert {shown.out.split()[0], found(cli, "out.pth"), found(cli, "out.safetensors")} == {wanted(state)}
    cli(
        "apply",
        "-e",
        "cast . float16",
        "-e",
        "rename head.bias head.b",
        "-m",
        "out.pth",
        "--bare-keys",
        "-o",
        "new.pth",
        "-q",
    )
    Path("modelcli.toml").write_text(
        'model = "out.pth"\nbare_keys = true\nedits = ["cast . float16", "rename head.bias head.b"]\n'
    )
    assert found(cli) == found(cli, "new.pth") == wanted(torch.load("new.pth", weights_only=True))


def test_training_checkpoints_and_prefixes(cli: Cli) -> None:
    model = {"module.w": torch.ones(2)}
    ema = {"module.w": torch.zeros(2)}
    torch.save({"model": model, "ema": ema, "epoch": 3}, "t.pth")
    assert found(cli, "t.pth", "--key", "ema") == wanted(ema)
    assert found(cli, "t.pth", "--key", "model") == wanted(model) != wanted({"w": torch.ones(2)})


def test_entries_that_are_no_tensors_are_named(cli: Cli) -> None:
    torch.save({"w": torch.ones(2), "x._extra_state": {"n": 1, "t": torch.zeros(3)}}, "x.pth")
    shown = cli("hash", "x.pth")
    assert "x._extra_state is no tensor: the hash covers only tensors" in shown.err
    assert shown.out.split()[0] == wanted({"w": torch.ones(2), "x._extra_state['t']": torch.zeros(3)})
    assert "x._extra_state is no tensor" in cli("check", "x.pth", "--hash", shown.out.split()[0]).err


def test_what_cannot_be_hashed_is_named(cli: Cli) -> None:
    torch.save({"w": torch.ones(2), "nowhere": torch.empty(2, device="meta")}, "x.pth")
    for words in (["hash", "x.pth"], ["check", "x.pth", "--hash", f"sha256:{'0' * 64}"]):
        error = cli(*words, code=2).err
        assert "nowhere has no values to hash" in error
        assert "modelcli hash MODEL -s SELECTOR" in error
    assert found(cli, "x.pth", "-s", "w") == wanted({"w": torch.ones(2)})


def test_an_object_that_cannot_be_read_is_named(cli: Cli) -> None:
    torch.save({"w": torch.ones(2), "odd": torch.Tensor([1, 2]).as_subclass(nn.Parameter), "object": Odd()}, "x.pth")
    assert "object cannot be looked at" in cli("hash", "x.pth", code=2).err
    assert found(cli, "x.pth", "-s", "w") == wanted({"w": torch.ones(2)})


class Odd:
    """An object of a class that no reader knows."""

    def __init__(self) -> None:
        self.tensor = torch.ones(2)


# --- trees, several models, and check --------------------------------------------------------------------------------


def test_the_hash_of_a_module_is_that_of_the_module_alone(cli: Cli) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    torch.save(model.state_dict(), "x.pth")
    rows = {row["path"]: row for row in cli("hash", "x.pth", "--tree", "--json").json["tree"]}
    for path, module in model.named_modules():
        state = module.state_dict()
        assert rows[path or "."]["hash"] == wanted(state)
        assert rows[path or "."]["tensors"] == len(state)
        assert rows[path or "."]["bytes"] == sum(tensor.nbytes for tensor in state.values())
    assert [row["path"] for row in csv.DictReader(io.StringIO(cli("hash", "x.pth", "--tree", "-f", "csv").out))] == [
        *rows
    ]
    lines = cli("hash", "x.pth", "--tree", "--depth", "1").out.splitlines()
    assert [line.split()[-2] for line in lines] == [".", "0", "1"]
    assert lines[0].endswith(wanted(model.state_dict()))
    assert lines[2].endswith(wanted(model[1].state_dict())[7:23])


def test_the_folder_of_a_hugging_face_model(cli: Cli, folder: Path) -> None:
    """The names are those of the model's modules, as in its state dict, whatever the shards and their keys are."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50
    )
    model = transformers.BertForMaskedLM(config)  # the output is tied to the embedding
    model.save_pretrained(folder / "bert", max_shard_size="20kB")
    assert found(cli, "bert/") == wanted(dict(model.state_dict()))
    assert len([*(folder / "bert").glob("*.safetensors")]) > 1


def test_a_tree_fits_80_columns(cli: Cli) -> None:
    """A line of the tree has the own name and 16 digits; the model itself has all of them."""
    path = ".".join(["encoder"] * 8)
    torch.save({f"{path}.{number}.weight": torch.ones(2) for number in range(2)}, "x.pth")
    lines = cli("hash", "x.pth", "--tree").out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith(".  sha256:")
    assert len(lines) == 1 + 8 + 4


def test_several_models(cli: Cli) -> None:
    one, other = {"w": torch.ones(2)}, {"w": torch.zeros(2)}
    torch.save(one, "one.pth")
    torch.save(other, "other.pth")
    assert cli("hash", "one.pth", "other.pth").out == f"{wanted(one)}  one.pth\n{wanted(other)}  other.pth\n"
    models = cli("hash", "one.pth", "other.pth", "--json").json["models"]
    assert [entry["hash"] for entry in models] == [wanted(one), wanted(other)]


def test_check(cli: Cli) -> None:
    state = {"w": torch.ones(2)}
    torch.save(state, "x.pth")
    save_file(state, "x.safetensors")
    right, wrong = wanted(state), wanted({"v": torch.ones(2)})
    cli("check", "x.pth", "x.safetensors", "--hash", right)
    cli("check", "x.pth", "--hash", right.replace("sha256:", "SHA256:").upper())
    row = cli("check", "x.pth", "--hash", wrong, "--json", code=1).json["checks"][0]
    assert row == {"check": "hash", "passed": False, "found": right, "wanted": wrong}


@pytest.mark.parametrize(
    "word", ["", "12", "sha256:", f"sha256:{'0' * 16}", f"sha256:{'g' * 64}", "0" * 64, f"md5:{'0' * 64}"]
)
def test_a_hash_that_is_no_hash(word: str, cli: Cli) -> None:
    error = cli("check", "missing.pth", "--hash", word, code=2).err
    assert "is no hash" in error
    assert "modelcli hash MODEL prints the hash" in error


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["x.pth", "--depth", "1"], "--depth works only with --tree"),
        (["x.pth", "x.pth", "--tree"], "--tree shows one model, not 2"),
        (["x.pth", "-s", "nine"], "no tensor matches 'nine'"),
        (["gone.pth"], "no such file: gone.pth"),
    ],
)
def test_mistakes(words: list[str], says: str, cli: Cli) -> None:
    torch.save({"w": torch.ones(2)}, "x.pth")
    assert says in cli("hash", *words, code=2).err


def test_a_file_that_is_too_short_has_no_hash(cli: Cli) -> None:
    header = b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'
    Path("x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(12))
    shown = cli("hash", "x.safetensors", code=4)
    assert not re.search("sha256", shown.out)
