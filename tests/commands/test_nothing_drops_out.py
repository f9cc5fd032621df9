"""Tensors that are not plain entries of a flat dict are shown, counted, compared, checked and written, or named."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import modelcli
from tests.checkpoints.test_equality import QUIET
from tests.conftest import Cli

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")]


def rows_of(cli: Cli, model: str) -> dict[str, Any]:
    """Return the rows of `params` by name."""
    return {row["name"]: row for row in cli("params", model, "--json").json["tensors"]}


# --- folders -------------------------------------------------------------------------------------------------------


def folder_of_both(path: Path) -> None:
    """Create a folder like many on the Hub: the same model in safetensors and in pickles."""
    path.mkdir()
    state = {"w": torch.ones(4)}
    safetensors.torch.save_file(state, path / "model-00001-of-00001.safetensors")
    torch.save(state, path / "pytorch_model-00001-of-00001.bin")
    for stem, file in (("model.safetensors", "model-00001-of-00001.safetensors"), ("pytorch_model.bin", None)):
        file = file or "pytorch_model-00001-of-00001.bin"
        (path / f"{stem}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"w": file}}))
    (path / "config.json").write_text("{}")


def test_editing_a_folder_keeps_its_checkpoint_in_another_format(cli: Cli, folder: Path) -> None:
    folder_of_both(folder / "both")
    before = {file.name: file.read_bytes() for file in Path("both").iterdir()}
    err = cli("cast", "w", "half", "-m", "both/model.safetensors.index.json", "-o", "both/", "--force").err
    assert {file.name for file in Path("both").iterdir()} == set(before)
    for name in ("pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin", "config.json"):
        assert Path("both", name).read_bytes() == before[name]
    assert "both/ also contains pytorch_model.bin.index.json" in err
    assert rows_of(cli, "both/model.safetensors.index.json")["w"]["dtype"] == "float16"
    assert rows_of(cli, "both/pytorch_model.bin.index.json")["w"]["dtype"] == "float32"


def test_the_shards_of_the_old_index_are_removed(cli: Cli, folder: Path) -> None:
    folder_of_both(folder / "both")
    state = {name: torch.ones(4) for name in ("w", "v")}
    torch.save(state, "two.pth")
    cli("save", "both/", "-m", "two.pth", "--force", "--max-shard-size", "16")
    assert sorted(file.name for file in Path("both").glob("model-*")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert len(list(Path("both").glob("pytorch_model*"))) == 2


# --- texts beside tensors ------------------------------------------------------------------------------------------


def test_a_metadata_text_that_equals_a_tensor_name_stays_a_text(cli: Cli, folder: Path) -> None:
    state = {"clip_l": torch.ones(2), "net.b": torch.ones(1)}
    texts = {"target": "clip_l", "ss_base.model": "net.b", "format": "pt"}
    safetensors.torch.save_file(state, "m.safetensors", metadata=texts)
    assert set(rows_of(cli, "m.safetensors")) == set(state)
    cli("cast", "net", "half", "-m", "m.safetensors", "-o", "out.safetensors")
    assert set(rows_of(cli, "out.safetensors")) == set(state)
    with safetensors.safe_open("out.safetensors", "pt") as reader:
        assert reader.metadata().items() >= texts.items()


def test_alias_names_written_by_save_model_are_ties(cli: Cli, folder: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    safetensors.torch.save_model(model, "m.safetensors")
    rows = rows_of(cli, "m.safetensors")
    assert set(rows) == set(model.state_dict())
    assert rows["b.weight"]["tied_to"] == "a.weight"


def test_a_record_knows_which_names_are_tied(cli: Cli, folder: Path) -> None:
    first = torch.ones(3)
    torch.save({"first": first, "second": first}, "m.pth")
    cli("save", "m.safetensors", "-m", "m.pth")
    assert rows_of(cli, "m.safetensors")["second"]["tied_to"] == "first"


# --- large tensors that are no plain views -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["quantized", "sparse"])
def test_large_tensors_that_are_not_plain_views_are_compared(cli: Cli, folder: Path, kind: str) -> None:
    values = torch.rand(1500, 2000)
    if kind == "quantized":
        one, other = (torch.quantize_per_tensor(v, 0.1, 0, torch.qint8) for v in (values, values + 1))
    else:
        index = torch.arange(150_000).repeat(2, 1)
        one, other = (
            torch.sparse_coo_tensor(index, torch.full((150_000,), n), (150_000,) * 2, check_invariants=True)
            for n in (1.0, 2.0)
        )
    for name, tensor in (("a", one), ("same", one.clone()), ("b", other)):
        torch.save({"w": tensor}, f"{name}.pth")
    cli("diff", "a.pth", "same.pth")
    cli("check", "a.pth", "--same-as", "same.pth", "--finite")
    assert cli("diff", "a.pth", "b.pth", "--json", code=1).json["tensors"][0]["name"] == "w"
    cli("check", "a.pth", "--same-as", "b.pth", code=1)


# --- keys below the key of a tensor --------------------------------------------------------------------------------


def test_keys_below_a_tensor_are_renamed(cli: Cli, folder: Path) -> None:
    state = {
        "model.w.weight": torch.ones(4, 1, dtype=torch.uint8),
        "model.w.weight.absmax": torch.ones(1),
        "model.w.weight.quant_map": torch.ones(16),
        "model.v.bias": torch.ones(2),
    }
    safetensors.torch.save_file(state, "m.safetensors")
    cli("rename", "model.**", "x.**", "-m", "m.safetensors", "-o", "out.safetensors")
    found = safetensors.torch.load_file("out.safetensors")
    assert found.keys() == {name.replace("model.", "x.") for name in state}
    for name, tensor in found.items():
        assert tensor.equal(state[name.replace("x.", "model.")])
    error = cli("rename", "model.v.bias", "model.w", "-m", "m.safetensors", "-o", "no.safetensors", code=2).err
    assert "cannot be a tensor and a module at once" in error


# --- slices of large buffers ---------------------------------------------------------------------------------------


def slices() -> dict[str, torch.Tensor]:
    buffer = torch.arange(500_000.0)
    wide = torch.arange(1_000_000, dtype=torch.int16).view(1000, 1000)
    return {
        "a": buffer[:10],
        "b": buffer[20:30],
        "c": buffer[25:40],  # overlaps b
        "again": buffer[20:30],
        "row": wide[3],
        "column": wide[:, 7],
        "turned": wide[10:12].T,
        "one": torch.ones(1).expand(1000),
        "none": buffer[5:5],
        "whole": torch.ones(3, 3),
    }


def test_slices_are_noted_and_written_compactly(cli: Cli, folder: Path) -> None:
    state = slices()
    torch.save(state, "m.pth")
    err = cli("save", "large.pth", "-m", "m.pth").err
    assert "--compact writes only what they use" in err
    assert Path("large.pth").stat().st_size > 4_000_000
    for command in (
        ["save", "o.pth"],
        ["cast", "whole", "half", "-o", "o.pth"],
        ["apply", "-e", "freeze a", "-o", "o.pth"],
    ):
        err = cli(*command, "-m", "m.pth", "--compact", "--force").err
        assert "--compact" not in err
        assert Path("o.pth").stat().st_size < 20_000
        found = torch.load("o.pth", weights_only=True)
        assert list(found) == list(state)
        for name, tensor in state.items():
            assert found[name].equal(tensor.to(found[name].dtype)), name
        assert found["b"].untyped_storage().data_ptr() == found["c"].untyped_storage().data_ptr()
        assert found["again"].data_ptr() == found["b"].data_ptr()
        assert found["a"].untyped_storage().data_ptr() != found["b"].untyped_storage().data_ptr()


def test_a_file_without_slices_has_no_note_about_them(cli: Cli, folder: Path) -> None:
    torch.save(nn.LSTM(4, 4).state_dict(), "m.pth")
    assert cli("save", "o.pth", "-m", "m.pth").err == ""


# --- _extra_state --------------------------------------------------------------------------------------------------

EXTRA = """
import torch
from torch import nn

class Net(nn.Module):
    told = None
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
    def get_extra_state(self):
        return self.told
    def set_extra_state(self, state):
        self.told = state

class Devices(Net):
    told = {"device": torch.device("cuda:1"), "layout": torch.strided, "dtype": torch.float16}
"""


@pytest.mark.parametrize("value", [None, {}, [], (), "", set(), OrderedDict(), bytearray(), torch.empty(0)])
def test_an_empty_extra_state_does_not_block_safetensors(cli: Cli, folder: Path, value: Any) -> None:
    torch.save({"w": torch.ones(2), "layer._extra_state": value}, "m.pth")
    err = cli("save", "m.safetensors", "-m", "m.pth").err
    if not isinstance(value, torch.Tensor):
        assert "layer._extra_state is empty and was left out" in err
    assert safetensors.torch.load_file("m.safetensors")["w"].equal(torch.ones(2))


@pytest.mark.parametrize("value", [{"a": 1}, [0], "x", 0])
def test_an_extra_state_with_content_blocks_safetensors(cli: Cli, folder: Path, value: Any) -> None:
    torch.save({"w": torch.ones(2), "layer._extra_state": value}, "m.pth")
    assert "layer._extra_state is not a tensor" in cli("save", "m.safetensors", "-m", "m.pth", code=2).err


def test_a_model_with_an_empty_extra_state_loads_from_safetensors(cli: Cli, folder: Path) -> None:
    (folder / "own.py").write_text(EXTRA, encoding="utf-8")
    cli("save", "m.safetensors", "-m", "own.py:Net")
    assert cli("load", "m.safetensors", "--trust", "--dry-run", "--json").json["missing"] == []
    model = modelcli.load("m.safetensors", trust=True)
    assert model.state_dict()["layer.weight"].equal(safetensors.torch.load_file("m.safetensors")["layer.weight"])


def test_a_device_in_an_extra_state_is_kept(cli: Cli, folder: Path) -> None:
    (folder / "own.py").write_text(EXTRA, encoding="utf-8")
    cli("save", "m.pth", "-m", "own.py:Devices")
    wanted = {"device": torch.device("cuda:1"), "layout": torch.strided, "dtype": torch.float16}
    assert torch.load("m.pth", weights_only=True)["_extra_state"] == wanted
    cli("cast", ".", "half", "-m", "m.pth", "-o", "o.pth", "--trust")
    assert torch.load("o.pth", weights_only=True)["_extra_state"] == wanted
    assert modelcli.load("o.pth", trust=True).told == wanted


# --- modules pickled whole -----------------------------------------------------------------------------------------


class OwnReduce(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def __reduce__(self) -> Any:
        return OwnReduce, (), {"weights": self.state_dict()}


class OwnState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def __getstate__(self) -> Any:
        return {"packed": list(self.parameters())}


class Slotted(nn.Module):
    __slots__ = ("depth",)

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.depth = 3


def feature_extractor() -> nn.Module:
    from torchvision.models.feature_extraction import create_feature_extractor

    body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3))
    return create_feature_extractor(body, ["2"])


@pytest.mark.parametrize("make", [feature_extractor, Slotted, lambda: torch.fx.symbolic_trace(nn.Linear(2, 2))])
@pytest.mark.parametrize("is_root", [False, True])
def test_all_tensors_of_a_pickled_module_are_found(cli: Cli, folder: Path, make: Any, is_root: bool) -> None:
    module = make() if is_root else nn.Sequential(nn.Linear(5, 43), make())
    torch.save(module, "whole.pth")
    document = cli("params", "whole.pth", "--json").json
    wanted = module.state_dict()
    assert {row["name"]: row["shape"] for row in document["tensors"]} == {n: list(t.shape) for n, t in wanted.items()}
    assert document["totals"]["params"] == sum(p.numel() for p in module.parameters())
    cli("save", "out.pth", "-m", "whole.pth", "--tensors-only")
    found = torch.load("out.pth", weights_only=True)
    assert found.keys() == wanted.keys()
    assert all(found[name].equal(tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (OwnReduce, "1 (OwnReduce)"),
        (OwnState, "1 (OwnState)"),
        (lambda: torch.ao.nn.quantized.Conv2d(3, 8, 3), "1 (Conv2d)"),
        (lambda: torch.ao.nn.quantized.Linear(3, 8), "1._packed_params._packed_params (ScriptObject)"),
        (lambda: nn.LazyLinear(3), "1.weight (UninitializedParameter)"),
    ],
)
def test_a_child_that_cannot_be_read_is_named(cli: Cli, folder: Path, make: Any, named: str) -> None:
    torch.save(nn.Sequential(nn.Linear(5, 43), make()), "whole.pth")
    for command in (["summary", "whole.pth"], ["check", "whole.pth", "--max-params", "1M"]):
        assert f"modelcli cannot read {named}" in cli(*command, code=3).err
    assert named in cli("save", "out.pth", "-m", "whole.pth", "--tensors-only", code=3).err
    assert not Path("out.pth").exists()


def spectral() -> nn.Module:
    return nn.utils.spectral_norm(nn.Linear(3, 4))


def pruned() -> nn.Module:
    from torch.nn.utils import prune

    layer = nn.Linear(3, 4)
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


@pytest.mark.parametrize("make", [spectral, pruned, lambda: nn.BatchNorm1d(3)])
def test_buffers_of_a_pickled_module_are_found_by_its_own_tables(cli: Cli, folder: Path, make: Any) -> None:
    module = nn.Sequential(make())
    torch.save(module, "whole.pth")
    rows = rows_of(cli, "whole.pth")
    assert {n for n, row in rows.items() if row["kind"] == "parameter"} == set(dict(module.named_parameters()))
    assert {n for n, row in rows.items() if row["kind"] == "buffer"} == set(dict(module.named_buffers()))
    cli("save", "out.pth", "-m", "whole.pth", "--tensors-only")
    totals = cli("params", "out.pth", "--json").json["totals"]
    assert totals["params"] == sum(p.numel() for p in module.parameters())


def test_tensors_outside_a_modules_tables_are_named(cli: Cli, folder: Path) -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    module[0].cache = [torch.ones(3)]
    torch.save(module, "whole.pth")
    assert "0.cache holds tensors that are not parameters or buffers" in cli("params", "whole.pth").err


# --- conjugated and negated buffers --------------------------------------------------------------------------------

MARKED = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("conj", torch.tensor([1 + 2j, 3 + 4j]).conj())
        self.register_buffer("part", torch.arange(6.0).to(torch.complex64).view(2, 3)[:, 1:].mul(1j).conj())
        self.register_buffer("neg", torch.tensor([1 + 2j, 5j]).conj().imag)

net = Net()
"""


@pytest.mark.parametrize("model", ["own.py:net", "own.py:Net"])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_conjugated_and_negated_buffers_are_written_as_they_were(
    cli: Cli, folder: Path, model: str, suffix: str
) -> None:
    (folder / "own.py").write_text(MARKED, encoding="utf-8")
    names: dict[str, Any] = {}
    exec(MARKED, names)
    wanted = names["net"].state_dict()
    assert wanted["conj"].is_conj()
    assert wanted["neg"].is_neg()
    cli("save", f"out.{suffix}", "-m", model)
    cli("freeze", "layer", "-o", f"frozen.{suffix}", "-m", model)
    read = safetensors.torch.load_file if suffix == "safetensors" else torch.load
    for file in ("out", "frozen"):
        found = read(f"{file}.{suffix}")
        for name in ("conj", "part", "neg"):
            assert found[name].equal(wanted[name]), name
    cli("diff", model, f"out.{suffix}", *(["--except", "layer"] if model.endswith("Net") else []))
    wrong = {**torch.load("out.pth"), "neg": -wanted["neg"]} if suffix == "pth" else {}
    if wrong:
        torch.save(wrong, "wrong.pth")
        changes = cli("diff", "own.py:net", "wrong.pth", "-s", "neg", "--json", code=1).json["tensors"]
        assert [(change["name"], change["max_abs_diff"]) for change in changes] == [("neg", 10.0)]


def test_values_of_conjugated_and_negated_buffers_are_shown_and_cast(cli: Cli, folder: Path) -> None:
    (folder / "own.py").write_text(MARKED, encoding="utf-8")
    document = cli("params", "own.py:net", "--values", "-s", "neg", "--json").json
    assert document["tensors"][0]["values"] == [-2.0, -5.0]
    assert cli("params", "own.py:net", "--stats", "-s", "neg", "--json").json["tensors"][0]["stats"]["max"] == -2.0
    cli("cast", ".", "half", "-m", "own.py:net", "-o", "half.pth")
    assert torch.load("half.pth")["neg"].tolist() == [-2.0, -5.0]
    module = nn.Module()
    module.register_buffer("neg", torch.tensor([1 + 2j]).conj().imag)
    assert modelcli.apply(module, "cast . half").neg.tolist() == [-2.0]


# --- DeepSpeed -----------------------------------------------------------------------------------------------------


def deepspeed(home: Path, stage: int) -> None:
    """Create the files of one rank as DeepSpeed 0.14 writes them."""
    step = home / "global_step5"
    step.mkdir(parents=True)
    layers = {f"l{i}.weight": torch.empty(0) if stage == 3 else torch.ones(3, 3) for i in range(16)}
    states = {
        "module": layers,
        "param_shapes": [{name: torch.Size([3, 3]) for name in layers}],
        "ds_config": {"zero_optimization": {"stage": stage}},
        "ds_version": "0.14.4",
        "mp_world_size": 1,
    }
    rank = "zero_pp_rank_0_mp_rank_00" if stage == 3 else "mp_rank_00"
    torch.save(states, step / f"{rank}_model_states.pt")
    optimizer = {"zero_stage": stage, "partition_count": 1, "fp32_flat_groups": [torch.ones(144)]}
    torch.save(
        {"optimizer_state_dict": optimizer, "ds_config": {}, "ds_version": "0.14.4"},
        step / "zero_pp_rank_0_mp_rank_00_optim_states.pt",
    )
    (home / "latest").write_text("global_step5")
    (home / "zero_to_fp32.py").write_text("")


def test_the_error_for_a_file_of_zero_3_names_its_folder(cli: Cli, folder: Path) -> None:
    deepspeed(folder / "run", 3)
    states = "run/global_step5/zero_pp_rank_0_mp_rank_00_model_states.pt"
    for command in (["summary", states], ["save", "out.pth", "-m", states], ["params", states, "--key", "module"]):
        err = cli(*command, code=4).err
        assert "model states of one rank of DeepSpeed ZeRO-3 without values: 16 tensors of shape [0]" in err
        assert "name its folder, in which modelcli joins the files of all ranks: run/global_step5/" in err
    assert not Path("out.pth").exists()
    err = cli("params", "run/global_step5/zero_pp_rank_0_mp_rank_00_optim_states.pt", code=4).err
    assert "ZeRO-3 optimizer states of one rank of DeepSpeed" in err


def test_a_zero_2_checkpoint_is_read_from_its_model_states(cli: Cli, folder: Path) -> None:
    deepspeed(folder / "run", 2)
    assert len(rows_of(cli, "run/global_step5/mp_rank_00_model_states.pt")) == 16


# --- entries that are not tensors ----------------------------------------------------------------------------------


def packed(value: float, bias: float = 1.0) -> nn.Module:
    """Return a dynamically quantized layer, whose state dict has its weights in a tuple."""
    model = nn.Sequential(nn.Linear(3, 4))
    with torch.no_grad():
        model[0].weight.fill_(value)
        model[0].bias.fill_(bias)
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


WEIGHT, BIAS = (f"0._packed_params._packed_params[{index}]" for index in (0, 1))


def test_packed_weights_have_rows_and_are_counted(cli: Cli, folder: Path) -> None:
    torch.save(packed(1.0).state_dict(), "m.pth")
    document = cli("params", "m.pth", "--json").json
    rows = {row["name"]: row for row in document["tensors"]}
    assert (rows[WEIGHT]["shape"], rows[WEIGHT]["dtype"]) == ([4, 3], "qint8")
    assert (rows[BIAS]["shape"], rows[BIAS]["dtype"]) == ([4], "float32")
    assert document["totals"]["params"] == 16  # as many as before quantization
    cli("save", "out.pth", "-m", "m.pth")
    assert rows_of(cli, "out.pth").keys() == rows.keys()
    assert [row["name"] for row in cli("params", "m.pth", "-s", WEIGHT, "--json").json["tensors"]] == [WEIGHT]
    cli("check", "m.pth", "--max-params", "15", code=1)
    cli("check", "m.pth", "--max-bytes", "27", code=1)  # 12 and 4 x 4


@pytest.mark.parametrize(("other", "name"), [((2.0, 1.0), WEIGHT), ((1.0, 5.0), BIAS)])
def test_packed_weights_are_compared(cli: Cli, folder: Path, other: tuple[float, float], name: str) -> None:
    for file, module in (("a", packed(1.0)), ("same", packed(1.0)), ("b", packed(*other))):
        torch.save(module.state_dict(), f"{file}.pth")
    cli("diff", "a.pth", "same.pth")
    cli("check", "a.pth", "--same-as", "same.pth", "--finite")
    changes = cli("diff", "a.pth", "b.pth", "--json", code=1).json["tensors"]
    assert [(change["name"], change["change"]) for change in changes] == [(name, "values")]
    cli("check", "a.pth", "--same-as", "b.pth", code=1)
    cli("diff", "a.pth", "b.pth", "--except", "**._packed_params*")


def test_packed_weights_are_checked_for_nan(cli: Cli, folder: Path) -> None:
    torch.save(packed(1.0, float("nan")).state_dict(), "m.pth")
    assert f"{BIAS}: 4 NaN" in cli("check", "m.pth", "--finite", code=1).out


EXTRAS = [
    ({"a": 1}, {"a": 2}),
    ({"a": 1}, None),
    ([1, 2], [2, 1]),
    (1, True),
    ("a", b"a"),
    ({1, 2}, {1, 3}),
    (torch.float16, torch.float32),
    (float("nan"), 0.0),
    ({"t": torch.ones(2)}, {"t": torch.zeros(2)}),
    ({"t": torch.ones(2)}, {"t": torch.ones(3)}),
    ((torch.ones(2), 1), (torch.ones(2), 2)),
]


@pytest.mark.parametrize(("one", "other"), EXTRAS)
def test_entries_that_are_not_tensors_are_compared(cli: Cli, folder: Path, one: Any, other: Any) -> None:
    for file, value in (("a", one), ("same", one), ("b", other)):
        torch.save({"w": torch.ones(2), "layer._extra_state": value}, f"{file}.pth")
    torch.save({"w": torch.ones(2)}, "without.pth")
    cli("diff", "a.pth", "same.pth")
    cli("check", "a.pth", "--same-as", "same.pth")
    cli("diff", "a.pth", "b.pth", code=1)
    for left, right, change in (("a", "without", "removed"), ("without", "a", "added")):
        changes = cli("diff", f"{left}.pth", f"{right}.pth", "--json", code=1).json["tensors"]
        assert {row["change"] for row in changes} == {change}
        assert all(row["name"].startswith("layer._extra_state") for row in changes)
    assert "layer._extra_state" in cli("check", "a.pth", "--same-as", "b.pth", code=1).out
    cli("check", "a.pth", "--same-as", "without.pth", code=1)
    cli("diff", "a.pth", "b.pth", "--except", "**._extra_state*")
    cli("diff", "a.pth", "b.pth", "-s", "w")


def test_the_order_of_keys_is_not_a_difference(cli: Cli, folder: Path) -> None:
    for file, keys in (("a", "xy"), ("b", "yx")):
        torch.save({"w": torch.ones(1), "_extra_state": {key: ord(key) for key in keys}}, f"{file}.pth")
    cli("diff", "a.pth", "b.pth")


class Foreign:
    """An object of an unknown class with a tensor in it."""

    def __init__(self, value: float) -> None:
        self.tensor = torch.full((3,), value)


def test_a_check_fails_on_objects_that_cannot_be_read(cli: Cli, folder: Path) -> None:
    for file, value in (("a", 1.0), ("b", float("nan"))):
        torch.save({"w": torch.ones(1), "layer.scale": Foreign(value)}, f"{file}.pth")
    assert "layer.scale" in cli("params", "a.pth").err
    changes = cli("diff", "a.pth", "b.pth", "--json", code=1).json["tensors"]
    assert {(row["name"], row["change"]) for row in changes} == {("layer.scale", "not compared")}
    for words in (["--finite"], ["--max-params", "1M"], ["--max-bytes", "1M"], ["--same-as", "b.pth"]):
        assert "layer.scale" in cli("check", "b.pth", *words, code=1).out
    error = cli("save", "out.pth", "-m", "a.pth", "--tensors-only", code=3).err
    assert "would drop layer.scale in a.pth" in error


QUANTIZED = """
import torch
from torch import nn

def linear():
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})

def conv():
    return nn.Sequential(torch.ao.nn.quantized.Conv2d.from_float(prepared()))

def prepared():
    layer = nn.Conv2d(3, 8, 3)
    layer.qconfig = torch.ao.quantization.get_default_qconfig("x86")
    seen = torch.ao.quantization.prepare(nn.Sequential(layer))
    seen(torch.ones(1, 3, 8, 8))
    return seen[0]
"""


@pytest.mark.parametrize(("make", "params", "nbytes"), [("linear", 2_212, 2_344), ("conv", 224, 388)])
def test_quantized_modules_of_a_live_model_are_counted(
    cli: Cli, folder: Path, make: str, params: int, nbytes: int
) -> None:
    (folder / "own.py").write_text(QUANTIZED, encoding="utf-8")
    result = cli("params", f"own.py:{make}", "--json")
    totals = result.json["totals"]
    assert totals["params"] == params
    assert not totals["trainable_params"]
    assert totals["param_bytes"] + totals["buffer_bytes"] == nbytes
    assert "does not list them" in str(result.json.get("notes", result.err))
    cli("save", "out.pth", "-m", f"own.py:{make}")
    err = cli("diff", f"own.py:{make}", "out.pth").err
    assert "ignored" not in err
    cli("check", f"own.py:{make}", "--finite", "--same-as", "out.pth")


# --- tensors of classes of their own, as torchao's -----------------------------------------------------------------


class Int8Tensor(torch.Tensor):
    """A tensor like those of torchao: it has no values of its own and wraps other tensors."""

    @staticmethod
    def __new__(cls: Any, qdata: torch.Tensor, scale: torch.Tensor, block: Any) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, qdata.shape, dtype=scale.dtype, requires_grad=False)

    def __init__(self, qdata: torch.Tensor, scale: torch.Tensor, block: Any) -> None:
        self.qdata, self.scale, self.block = qdata, scale, block

    def __tensor_flatten__(self) -> Any:
        return ["qdata", "scale"], {}

    def __repr__(self) -> str:  # type: ignore[override]
        return "Int8Tensor"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        assert function is torch.ops.aten.detach.default
        return cls(args[0].qdata, args[0].scale, args[0].block)


def wrapped(value: int = 1, scale: float = 1.0, block: int = 64) -> dict[str, torch.Tensor]:
    def weight(*shape: int) -> Int8Tensor:
        return Int8Tensor(torch.full(shape, value, dtype=torch.int8), torch.full((shape[0], 1), scale), [1, block])

    return {"0.weight": weight(32, 64), "0.bias": torch.ones(32), "2.weight": weight(4, 32), "2.bias": torch.ones(4)}


def test_wrapped_tensors_are_rows(cli: Cli, folder: Path) -> None:
    torch.save(wrapped(), "m.pth")
    document = cli("params", "m.pth", "--json").json
    rows = {row["name"]: row for row in document["tensors"]}
    assert list(rows) == list(wrapped())
    assert (rows["0.weight"]["shape"], rows["0.weight"]["dtype"]) == ([32, 64], "float32")
    assert rows["0.weight"]["bytes"] == 32 * 64 + 32 * 4
    assert rows["0.weight"]["layout"] == "Int8Tensor"
    assert document["totals"]["params"] == 2_212
    cli("check", "m.pth", "--max-params", "2211", code=1)
    cli("check", "m.pth", "--safe", code=1)
    error = cli("save", "out.pth", "-m", "m.pth", "--tensors-only", code=3).err
    assert "0.weight in m.pth is a tests.commands.test_nothing_drops_out.Int8Tensor" in error


@pytest.mark.parametrize("other", [{"value": 2}, {"scale": 2.0}, {"block": 32}])
def test_wrapped_tensors_are_compared(cli: Cli, folder: Path, other: dict[str, Any]) -> None:
    for file, state in (("a", wrapped()), ("same", wrapped()), ("b", wrapped(**other))):
        torch.save(state, f"{file}.pth")
    cli("diff", "a.pth", "same.pth")
    changes = cli("diff", "a.pth", "b.pth", "--json", code=1).json["tensors"]
    assert {change["name"] for change in changes} == {"0.weight", "2.weight"}


def test_the_scales_of_wrapped_tensors_are_checked_for_nan(cli: Cli, folder: Path) -> None:
    torch.save(wrapped(scale=float("nan")), "m.pth")
    assert "0.weight: 32 NaN" in cli("check", "m.pth", "--finite", code=1).out


def test_wrapped_tensors_of_a_live_model_are_an_error(cli: Cli, folder: Path) -> None:
    lines = ["import torch", "from torch import nn", "from tests.commands.test_nothing_drops_out import wrapped"]
    lines += ["net = nn.Linear(64, 32)", "net.weight = nn.Parameter(wrapped()['0.weight'], requires_grad=False)"]
    (folder / "own.py").write_text("\n".join(lines), encoding="utf-8")
    assert rows_of(cli, "own.py:net")["weight"]["shape"] == [32, 64]
    assert "weight" in cli("save", "out.pth", "-m", "own.py:net", code=2).err
    assert "weight cannot be looked at" in cli("check", "own.py:net", "--finite", code=1).out


@pytest.mark.parametrize("is_named", [False, True])
def test_entries_of_shards_that_are_not_tensors(cli: Cli, folder: Path, is_named: bool) -> None:
    """transformers names every entry in the index. Other libraries name only tensors."""
    file = "pytorch_model-00001-of-00001.bin"
    for name, value in (("a", 1), ("b", 2)):
        Path(name).mkdir()
        torch.save({"w": torch.ones(4), "l._extra_state": {"n": value, "t": torch.ones(3)}}, f"{name}/{file}")
        weight_map = {"w": file} | ({"l._extra_state": file} if is_named else {})
        Path(name, "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert list(rows_of(cli, "a/")) == ["w", "l._extra_state['t']"]
    changes = cli("diff", "a/", "b/", "--json", code=1).json["tensors"]
    assert [(row["name"], row["change"]) for row in changes] == [("l._extra_state", "values")]
    cli("save", "out.pth", "-m", "a/")
    assert torch.load("out.pth", weights_only=True)["l._extra_state"]["n"] == 1
