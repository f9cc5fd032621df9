"""An edit of another package is found everywhere where one of modelcli's own is, with no line of modelcli changed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import modelcli
from modelcli import edits, plug_ins
from modelcli.edits import registry
from modelcli.errors import RequestError
from modelcli.language.expressions import Call, parse
from modelcli.live import surgery
from tests.conftest import Cli
from tests.plugin.installing import Asked, asked_by, register

pytestmark = pytest.mark.usefixtures("plugin")
NET = "nets.py:Net"
CLAMP = (
    "from dataclasses import dataclass\nfrom modelcli.edits.declaring import Operand\n"
    "from modelcli_plugin.clamp import Clamp\n"
)
WRECK = "@dataclass(frozen=True, kw_only=True)\nclass Wreck(Clamp):\n    name = 'wreck'\n"


def real() -> nn.Module:
    """The model of `nets.py` as `--seed 0` draws it."""
    from tests import nets

    torch.manual_seed(0)
    return nets.Net()


def clamped(model: nn.Module, start: str, low: float, high: float) -> dict[str, torch.Tensor]:
    """Its state dict, with the floating-point tensors below a path clamped by torch."""
    return {
        name: value.clamp(low, high) if name.startswith(start) and value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_plug_in_edit_is_registered_like_the_others() -> None:
    assert edits.names()[-1] == "clamp"
    assert "clamp" not in edits.own_names()
    edit = edits.parse("clamp conv1 -0.5 0.5 --except conv1.bias --expect 1")
    assert str(edit) == "clamp conv1 -0.5 0.5 --except conv1.bias --expect 1"
    assert str(edits.parse("clamp conv1 -1 0.123456789")) == "clamp conv1 -1 0.123456789"
    for word in ("high", "nan", "inf", "Infinity", "1e999"):
        with pytest.raises(RequestError, match=f"'{word}' is not a finite number"):
            edits.parse(f"clamp conv1 1 {word}")
    with pytest.raises(RequestError) as error:
        edits.parse("clam fc 1 2")
    assert error.value.hint == "did you mean clamp?"


def test_the_help_lists_and_explains_it(cli: Cli) -> None:
    listed = cli("--help").out
    panel = listed.partition(f"─ {edits.Edit.panel} ─")[2].partition("╰")[0]
    assert "clamp" in panel
    assert "cast" in panel
    shown = " ".join(cli("clamp", "--help").out.split())
    assert "modelcli clamp [OPTIONS] {TARGET... LOW HIGH}" in shown
    assert "Bring values into a range" in shown
    assert "modelcli clamp fc -0.5 0.5 -m resnet18" in shown
    assert "--except" in shown
    assert "--expect" in shown
    assert "Exit codes: 0 done; 2 the request is wrong" in shown


def test_its_name_and_its_targets_are_completed(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(real().state_dict(), "v.pth")
    monkeypatch.setenv("_MODELCLI_COMPLETE", "complete_zsh_words")
    assert [line.split("\t")[0] for line in cli("cl").out.splitlines()] == ["clamp"]
    offered = [line.split("\t")[0] for line in cli("clamp", "-m", "v.pth", "con").out.splitlines()]
    assert offered == ["conv1", "conv2"]


def test_the_names_in_other_programs_give_a_hint(cli: Cli) -> None:
    assert "did you mean: modelcli clamp conv1 0 1" in cli("clip", "conv1", "0", "1", code=2).err


@pytest.mark.parametrize("out", ["out.pth", "out.safetensors"])
def test_it_changes_the_values_of_a_model(out: str, cli: Cli, folder: Path) -> None:
    document = cli("clamp", "conv1", "-0.1", "0.1", "-m", NET, "-o", out, "--json").json
    assert document["edits"] == ["clamp conv1 -0.1 0.1"]
    assert [(change["path"], change["action"], change["after"]) for change in document["changes"]] == [
        ("conv1", "clamp", "from -0.1 to 0.1")
    ]
    expected = clamped(real(), "conv1", -0.1, 0.1)
    written = load_file(out) if out.endswith("safetensors") else torch.load(out, weights_only=True)
    assert same(written, expected)
    assert not same(written, real().state_dict())


def test_it_changes_the_values_of_a_state_dict(cli: Cli, folder: Path) -> None:
    torch.save(real().state_dict(), "v.pth")
    document = cli("clamp", "conv1", "-0.1", "0.1", "-m", "v.pth", "-o", "out.pth", "--json").json
    assert [change["action"] for change in document["changes"]] == ["clamp"]
    assert same(torch.load("out.pth", weights_only=True), clamped(real(), "conv1", -0.1, 0.1))


def test_a_plug_in_edit_on_a_model_in_memory() -> None:
    model = real()
    modelcli.apply(model, "clamp . -0.1 0.1 --except conv1")
    rest = clamped(real(), "", -0.1, 0.1) | {
        name: value for name, value in real().state_dict().items() if name.startswith("conv1")
    }
    assert same(dict(model.state_dict()), rest)


def test_in_a_recipe_and_in_its_log(cli: Cli, folder: Path) -> None:
    cli("load", NET)
    cli("clamp", "conv1", "-0.1", "0.1")
    cli("freeze", "conv1")
    assert '"clamp conv1 -0.1 0.1"' in Path("modelcli.toml").read_text()
    assert cli("log", "--json").json["edits"] == ["clamp conv1 -0.1 0.1", "freeze conv1"]
    cli("save", "out.pth")
    assert same(torch.load("out.pth", weights_only=True), clamped(real(), "conv1", -0.1, 0.1))
    cli("undo")
    cli("apply", "modelcli.toml", "-m", NET, "-o", "again.pth")
    assert same(torch.load("again.pth", weights_only=True), clamped(real(), "conv1", -0.1, 0.1))


def test_apply_with_a_plug_in_edit_is_all_or_nothing(cli: Cli, folder: Path) -> None:
    cli("apply", "-e", "clamp conv1 -0.1 0.1", "-e", "freeze nothing", "-m", NET, "-o", "out.pth", code=2)
    assert not Path("out.pth").exists()
    cli("apply", "-e", "clamp conv1 -0.1 0.1", "-e", "replace conv2 Conv2d(_,2,1)", "-m", NET, "-o", "out.pth")
    assert torch.load("out.pth", weights_only=True)["conv2.weight"].shape[0] == 2


def test_a_record_with_a_plug_in_edit_is_followed(cli: Cli, folder: Path) -> None:
    cli("clamp", "conv1", "-0.1", "0.1", "-m", NET, "-o", "out.pth")
    loaded = modelcli.load("out.pth", trust=True)
    assert same(dict(loaded.state_dict()), clamped(real(), "conv1", -0.1, 0.1))
    cli("clamp", "conv1", "-0.01", "0.01", "-m", "out.pth", "--trust", "-o", "more.pth")
    assert same(torch.load("more.pth", weights_only=True), clamped(real(), "conv1", -0.01, 0.01))


@pytest.mark.parametrize("model", [NET, "v.pth"])
def test_its_script_does_the_same_without_modelcli(model: str, cli: Cli, folder: Path) -> None:
    torch.save(real().state_dict(), "v.pth")
    text = cli("script", "-m", model, "-e", "clamp conv1 -0.1 0.1", "-o", "out.pth").out
    assert "modelcli" not in text
    assert "clamp" in text
    exec(compile(text, "work.py", "exec"), {"__name__": "__main__"})
    assert same(torch.load("out.pth", weights_only=True), clamped(real(), "conv1", -0.1, 0.1))


def test_the_program_finds_it_and_reads_entry_points_only_then(site: list[Path], folder: Path) -> None:
    """In processes of their own: a look at a file, and an edit of modelcli's own, read no entry points of edits."""
    torch.save(real().state_dict(), "v.pth")
    for words in (("params", "v.pth"), ("freeze", "conv1", "-m", "v.pth", "--dry-run")):
        assert asked_by(site, *words) == Asked(0, set(), imported=False)
    for words in (("clamp", "conv1", "-1", "1", "-m", "v.pth", "-o", "out.pth"), ("--help",)):
        asked = asked_by(site, *words)
        assert asked.code == 0
        assert plug_ins.EDITS in asked.groups
        assert asked.imported


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (None, "the edit wreck of broken 1.0 cannot be loaded: ModuleNotFoundError: No module named 'wreck'"),
        ("1 / 0", "the edit wreck of broken 1.0 cannot be loaded: ZeroDivisionError: division by zero"),
        ("raise SystemExit(3)", "the edit wreck of broken 1.0 cannot be loaded: SystemExit: 3"),
        ("Wreck = 3", "the edit wreck of broken 1.0 cannot be used: wreck:Wreck is no subclass of modelcli.edits.Edit"),
        (
            "from modelcli_plugin.clamp import Clamp as Wreck",
            "the edit wreck of broken 1.0 cannot be used: wreck:Wreck calls itself clamp",
        ),
        (CLAMP + "class Wreck(Clamp):\n    name = 'wreck'\n", "wreck:Wreck is no dataclass"),
        (CLAMP + WRECK + "    words = ['targets']\n", "declares ['targets'] as its words, which has to be a tuple"),
        (CLAMP + WRECK + "    summary = ''\n", "declares '' as its summary"),
        (
            "from dataclasses import dataclass\nfrom modelcli.edits import Edit\n@dataclass(frozen=True)\n"
            "class Wreck(Edit):\n    name = 'wreck'\n",
            "the edit wreck of broken 1.0 declares no summary",
        ),
        (
            CLAMP + WRECK + "    words = (Operand('model', 'A model.'),)\n",
            "the edit wreck declares model, which every edit has already",
        ),
    ],
)
def test_the_help_is_complete_despite_a_broken_plug_in(
    module: str | None, said: str, cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(folder, "broken", "1.0", {plug_ins.EDITS: {"wreck": "wreck:Wreck", "params": "wreck:Wreck"}})
    if module is not None:
        Path("wreck.py").write_text(module)
    monkeypatch.syspath_prepend(str(folder))
    registry.forget()
    shown = cli("--help").out
    assert "wreck" in shown
    assert "clamp" in shown
    assert len(re.findall(r"│ params ", shown)) == 1  # no edit takes the name of another command
    assert said in cli("wreck", "fc", "-m", NET, code=5).err
    assert "did you mean: modelcli remove fc" in cli("rm", "fc", code=2).err


def test_a_module_expression_in_any_field_of_an_edit_needs_trust() -> None:
    """A record that names Python is followed only with --trust, whatever the field is called that names it."""

    @dataclass(frozen=True, kw_only=True)
    class Wrap(edits.Edit):
        name = "wrap"
        block: Call

    assert Wrap(block=Call("nets.Net")).modules() == (Call("nets.Net"),)
    assert edits.parse("replace conv1 nets:Net()").modules() == (parse("nets:Net()"),)
    assert edits.parse("append seq ReLU").modules() == (Call("ReLU"),)
    assert edits.parse("init conv1 normal --bias ones").modules() == ()
    assert edits.parse("clamp conv1 0 1").modules() == ()


@pytest.mark.parametrize("out", ["out.pth", "out.safetensors"])
@pytest.mark.parametrize("target", ["left", "column", "turned", "grid", "."])
def test_tensors_of_a_state_dict_that_share_storages(target: str, out: str, cli: Cli, folder: Path) -> None:
    """As torch does it in place: whatever shows the same bytes has the new values."""

    def made() -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        both, grid = torch.randn(10), torch.randn(4, 6)
        return {
            "left": both[:4],
            "right": both[4:],
            "grid": grid,
            "column": grid[:, 1],
            "turned": torch.randn(2, 3).t(),
            "count": torch.tensor(3),
        }

    torch.save(made(), "v.pth")
    cli("clamp", target, "-0.1", "0.1", "-m", "v.pth", "-o", out)
    expected = made()
    for name, value in expected.items():
        if target in (name, ".") and value.is_floating_point():
            value.clamp_(-0.1, 0.1)
    written = load_file(out) if out.endswith("safetensors") else torch.load(out, weights_only=True)
    assert same(written, expected)


def test_between_casts_of_a_state_dict(cli: Cli, folder: Path) -> None:
    torch.save(real().state_dict(), "v.pth")
    lines = [
        ["-e", line] for line in ("cast . bfloat16", "clamp . -0.1 0.1", "cast . float32", "rename 'conv1.*' 'a.*'")
    ]
    cli("apply", *(word for line in lines for word in line), "-m", "v.pth", "-o", "out.pth")
    expected = {
        name.replace("conv1", "a"): value.bfloat16().clamp(-0.1, 0.1).float() if value.is_floating_point() else value
        for name, value in real().state_dict().items()
    }
    assert same(torch.load("out.pth", weights_only=True), expected)


# --- tensors that need care ------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """A buffer that is a weight under another name, a sparse buffer, and an expanded one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.one = nn.Linear(3, 3)
        self.two = nn.Linear(3, 3)
        self.two.weight = self.one.weight
        self.register_buffer("sparse", torch.eye(3).to_sparse())
        self.register_buffer("wide", torch.randn(3, 1).expand(3, 4))


def test_tied_sparse_and_expanded_tensors_of_a_model() -> None:
    model = Tied()
    applied = surgery.apply(model, [edits.parse("clamp one sparse wide -0.1 0.1")])
    assert applied.notes == [
        "one.weight is tied to two.weight, so that is clamped too",
        "sparse stays as it is: it is no dense tensor",
    ]
    assert model.two.weight is model.one.weight
    before = Tied()
    for name in ("one.weight", "one.bias", "wide"):
        assert torch.equal(model.state_dict()[name], before.state_dict()[name].clamp(-0.1, 0.1))
    assert torch.equal(model.sparse.to_dense(), torch.eye(3))


def test_a_model_without_dense_tensors() -> None:
    for model, target in ((Tied(), "sparse"), (nn.Sequential(nn.LazyLinear(3)), "0")):
        with pytest.raises(RequestError, match=f"nothing to clamp: {target} has no dense floating-point tensors"):
            modelcli.apply(model, f"clamp {target} -0.1 0.1")


def shared() -> dict[str, torch.Tensor]:
    """A state dict of tied, sparse and expanded tensors, and of two that lie side by side in one storage."""
    state = dict(Tied().state_dict())
    both = torch.randn(8)
    return state | {"left": both[:4], "right": both[4:]}


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize("target", [".", "one", "left wide"])
def test_tied_sparse_and_expanded_tensors_of_a_state_dict(target: str, cli: Cli, folder: Path) -> None:
    """The command and its script write the same, and tied tensors stay tied."""
    torch.save(shared(), "v.pth")
    document = cli("clamp", *target.split(), "-0.1", "0.1", "-m", "v.pth", "-o", "out.pth", "--json").json
    told = "sparse stays as it is: it is no dense tensor"
    assert (told in document.get("notes", [])) == (target == ".")
    line = f"clamp {target} -0.1 0.1"
    text = cli("script", "-m", "v.pth", "-e", line, "-o", "script.pth").out
    exec(compile(text, "work.py", "exec"), {"__name__": "__main__"})
    loaded = torch.load("v.pth", weights_only=True)
    names = {".": list(loaded), "one": ["one.weight", "one.bias", "two.weight"], "left wide": ["left", "wide"]}[target]
    for out in ("out.pth", "script.pth"):
        written = torch.load(out, weights_only=True)
        for name, value in loaded.items():
            is_clamped = name in names and not value.is_sparse
            assert torch.equal(written[name].to_dense(), (value.clamp(-0.1, 0.1) if is_clamped else value).to_dense())
        assert written["one.weight"].data_ptr() == written["two.weight"].data_ptr()


def test_a_script_stops_where_tensors_overlap(cli: Cli, folder: Path) -> None:
    whole = torch.randn(6)
    torch.save({"whole": whole, "start": whole[:4]}, "v.pth")
    shown = cli("script", "-m", "v.pth", "-e", "clamp . -0.1 0.1", "-o", "out.pth")
    assert "start and whole lie in one piece of memory" in shown.out.replace("whole and start", "start and whole")
    assert "raise NotImplementedError" in shown.out


@pytest.mark.parametrize("more", [("--dry-run",), ("-o", "out.pth"), ()])
def test_a_dtype_that_torch_cannot_clamp_is_refused_early(more: tuple[str, ...], cli: Cli, folder: Path) -> None:
    torch.save({"a": torch.ones(2), "f": torch.ones(2).to(torch.float8_e4m3fn)}, "v.pth")
    refused = cli("clamp", ".", "0", "0.5", "-m", "v.pth", *more, code=2).err
    assert "f is float8_e4m3fn, and this edit cannot be carried out on that dtype" in refused
    assert not Path("out.pth").exists()
    cli("clamp", ".", "0", "0.5", "--except", "f", "-m", "v.pth", "-o", "out.pth")
    model = nn.Linear(2, 2).to(torch.float8_e4m3fn)
    with pytest.raises(RequestError, match="weight is float8_e4m3fn"):
        modelcli.apply(model, "clamp . 0 0.5")


def test_empty_tensors(cli: Cli, folder: Path) -> None:
    torch.save({"none": torch.ones(0, 3), "w": torch.ones(2)}, "v.pth")
    cli("clamp", ".", "0", "0.5", "-m", "v.pth", "-o", "out.pth")
    text = cli("script", "-m", "v.pth", "-e", "clamp . 0 0.5", "-o", "script.pth").out
    exec(compile(text, "work.py", "exec"), {"__name__": "__main__"})
    for out in ("out.pth", "script.pth"):
        written = torch.load(out, weights_only=True)
        assert written["none"].shape == (0, 3)
        assert written["w"].tolist() == [0.5, 0.5]
