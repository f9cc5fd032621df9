"""`rename` compared with a dict comprehension over the state dict."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import modelcli
from modelcli import edits
from modelcli.commands.editable import opened_keys
from modelcli.commands.state_dict_models import OpenStateDict
from modelcli.errors import RequestError
from modelcli.language import selectors
from modelcli.language.references import Source
from modelcli.live import surgery
from modelcli.model.blueprint import from_keys
from modelcli.model.tensors import TensorInfo
from tests.conftest import Cli
from tests.sampling import sampled

NAMES = ("conv.weight", "layers.0.bn.weight", "layers.0.bn.bias", "layers.12.bn.weight", "module", "a_b_c.w", "old-0.x")


def new_names(old: str, new: str, names: tuple[str, ...] = NAMES) -> dict[str, str | None]:
    renamed = selectors.renaming(old, new, from_keys([TensorInfo(name, (1,), "float32") for name in names]))
    return {name: renamed(name) for name in names}


# --- what wildcards capture ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "name", "expected"),
    [
        ("module.**", "**", "module.conv.weight", "conv.weight"),
        ("**", "module.**", "conv.weight", "module.conv.weight"),
        ("head.*", "classifier.*", "head.weight", "classifier.weight"),
        ("head.*", "classifier.*", "head.0.weight", None),
        ("layers.[0-11].**", "blocks.[0-11].**", "layers.7.attn.weight", "blocks.7.attn.weight"),
        ("layers.[0-11].**", "blocks.[0-11].**", "layers.12.attn.weight", None),
        ("**.gamma", "**.weight", "encoder.norm.gamma", "encoder.norm.weight"),
        ("**.gamma", "**.weight", "gamma", "weight"),  # ** captures nothing, and leaves no dot
        ("a.**.w", "b.**.v", "a.w", "b.v"),
        ("**.bn?.*", "**.norm?.*", "layer1.bn2.bias", "layer1.norm2.bias"),
        ("{enc,dec}oder.*", "{enc,dec}.*", "decoder.w", "dec.w"),
        ("*_*.w", "*-*.w", "a_b_c.w", "a_b-c.w"),  # the first one takes as much as it can
        ("**.mid.**", "**.new.**", "mid.mid.x", "mid.new.x"),
        ("x[0-99]y.w", "z[0-99]y.w", "x12y.w", "z12y.w"),
        (r"a\*.w", r"b\*.w", "a*.w", "b*.w"),
        ("a", "b.c", "a", "b.c"),
        ("proj_*", "proj.*", "proj_weight", "proj.weight"),  # a dot may come in: the key says another module
    ],
)
def test_captures(old: str, new: str, name: str, expected: str | None) -> None:
    assert new_names(old, new, (name,))[name] == expected


def test_the_last_child_of_a_sequence() -> None:
    names = ("head.0.weight", "head.1.weight", "head.2.weight")
    assert new_names("head.-1.*", "out.*", names) == {names[0]: None, names[1]: None, names[2]: "out.weight"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("module.**", "x", r"'module.**' has the wildcard **, and 'x' has no wildcard"),
        ("a.*", "a.**", r"'a.*' has the wildcard *, and 'a.**' has the wildcard **"),
        ("*.a?", "?.a*", r"has the wildcards * ?, and '?.a*' has the wildcards ? *"),
        ("a[0-3].w", "b[0-4].w", r"the wildcard [0-3], and 'b[0-4].w' has the wildcard [0-4]"),
        ("{a,b*}.w", "{a,b}.w", r"the wildcard {a,b*}, and '{a,b}.w' has the wildcard {a,b}"),
        ("**:Conv2d", "**", r"asks for a type"),
        ("a.w", "b.-1", r"counts from the end"),
    ],
)
def test_both_names_have_the_same_wildcards(old: str, new: str, message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        new_names(old, new)


def test_matching_does_not_backtrack_exponentially() -> None:
    """A regular expression would take too long for the first two."""
    long = ".".join("a" * 30 for _ in range(100))
    started = time.process_time()
    assert new_names(".".join(["**"] * 30 + ["b"]), ".".join(["**"] * 30 + ["c"]), (long,))[long] is None
    assert new_names("*a" * 30 + "b", "*a" * 30 + "c", ("a" * 3000,))["a" * 3000] is None
    assert new_names("**.**.**.**", "x.**.**.**.**", (long,))[long] == f"x.{long}"
    assert time.process_time() - started < 5


words = st.text("ab.", max_size=9).filter(lambda text: all(text.split(".")))
patterns = st.lists(st.sampled_from(["a", "b", "*", "?", "*a", "a*b", "**", "?*"]), min_size=1, max_size=5)


@given(patterns, words)
@settings(deadline=None)
def test_captured_as_a_regular_expression_captures(parts: list[str], name: str) -> None:
    """Each wildcard captures what a group of `re` captures (the longest first), and the captures restore the name."""
    pattern = ".".join(parts)
    found = new_names(pattern, f"new.{pattern}", (name,))[name]
    # Each ** takes components with their dots, one after another as far as they go.
    groups = "".join(r"((?:[^.]+\.)*)" if part == "**" else _as_regex(part) + r"\." for part in parts)
    match = re.fullmatch(groups, f"{name}.")
    assert found == (f"new.{name}" if match else None)


@given(patterns, words)
@settings(deadline=None)
def test_rename_matches_the_same_names_as_the_selector(parts: list[str], name: str) -> None:
    pattern = ".".join(parts)
    blueprint = from_keys([TensorInfo(name, (1,), "float32")])
    matched = selectors._matcher(selectors.parse(pattern), blueprint)(name)
    assert (selectors.renaming(pattern, pattern, blueprint)(name) == name) is matched


def _as_regex(part: str) -> str:
    return "".join({"*": "([^.]*)", "?": "([^.])"}.get(character, character) for character in part)


# --- on a bare checkpoint ------------------------------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Linear(2, 2))


def opened(state: dict[str, Any], name: str = "bare.pth") -> OpenStateDict:
    torch.save(state, name)
    found = opened_keys(Source(name))
    assert found is not None
    return found


def rename(live: OpenStateDict, *lines: str) -> list[surgery.Change]:
    return live.apply([edits.parse(line) for line in lines]).changes


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize(
    ("line", "function"),
    [
        ("rename 'module.**' '**'", lambda key: key.removeprefix("module.")),
        ("rename '**' 'net.**'", lambda key: f"net.{key}"),
        ("rename 'module.3.*' 'module.head.*'", lambda key: key.replace("module.3.", "module.head.")),
        ("rename '**.weight' '**.gamma'", lambda key: re.sub(r"weight$", "gamma", key)),
        ("rename module.1.bias bias", lambda key: "bias" if key == "module.1.bias" else key),
    ],
)
def test_rename_equals_a_dict_comprehension(cli: Cli, line: str, function: Callable[[str], str], suffix: str) -> None:
    state: dict[str, torch.Tensor] = nn.DataParallel(network()).state_dict()
    torch.save(state, "bare.pth")
    cli(*line.replace("'", "").split(), "-m", "bare.pth", "-o", f"out.{suffix}")
    expected = {function(key): tensor for key, tensor in state.items()}
    found: Any
    if suffix == "pth":
        found = torch.load("out.pth", weights_only=True)
        norm = function("module.1.running_mean").removesuffix(".running_mean")
        assert found._metadata[norm]["version"] == 2  # the version of BatchNorm moves with it
    else:
        from safetensors.torch import load_file

        found = load_file("out.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_the_result_loads_where_the_keys_belong(cli: Cli) -> None:
    torch.save(nn.DataParallel(network()).state_dict(), "parallel.pth")
    cli("rename", "module.**", "**", "-m", "parallel.pth", "-o", "plain.pth")
    state = torch.load("plain.pth", weights_only=True)
    expected: Any = network().state_dict()
    assert list(state) == list(expected)
    assert {k: v for k, v in state._metadata.items() if k != ".modelcli"} == dict(expected._metadata)
    network().load_state_dict(state)
    model = modelcli.load("plain.pth", arch=network())
    assert torch.equal(model[3].weight, expected["3.weight"])


def test_rename_keeps_order_ties_views_and_extras(folder: Path) -> None:
    table = torch.arange(12.0).reshape(6, 2)
    state = {
        "module.embed.weight": table,
        "module.part": table[2:4],
        "module.head.weight": table,
        "module.head._extra_state": {"scale": 2},
    }
    live = opened(state)
    rename(live, "rename 'module.**' '**'")
    found = live.model.tensors
    assert live.model.keys == ["part", "embed.weight", "head.weight", "head._extra_state"]
    assert found["embed.weight"].identity == found["head.weight"].identity != found["part"].identity
    assert found["part"].storage == found["embed.weight"].storage
    assert live.model.inert["head._extra_state"].value == {"scale": 2}


def test_flags_stay_with_their_tensors(cli: Cli) -> None:
    torch.save({"old.weight": torch.zeros(2), "old.bias": torch.zeros(2)}, "bare.pth")
    cli("freeze", "old.weight", "-m", "bare.pth", "-o", "frozen.pth")
    cli("rename", "old.*", "new.*", "-m", "frozen.pth", "-o", "out.pth")
    frozen = cli("params", "out.pth", "--frozen", "--json").json["tensors"]
    assert [row["name"] for row in frozen] == ["new.weight"]


def test_versions_follow_through_several_edits(cli: Cli) -> None:
    state = network().state_dict()
    torch.save(state, "bare.pth")
    cli("load", "bare.pth")
    cli("rename", "**", "net.**")
    cli("rename", "net.1.**", "norm.**")
    cli("replace", "net.3", "BatchNorm1d(2)", "--check", "none")
    cli("save", "out.pth")
    metadata = torch.load("out.pth", weights_only=True)._metadata
    found = {path: entry for path, entry in metadata.items() if path != ".modelcli"}
    assert found == {
        "": {"version": 1},
        "net": {"version": 1},
        "net.0": {"version": 1},
        "norm": {"version": 2},
        "net.2": {"version": 1},
        "net.3": {"version": 2},
    }


def test_rename_keeps_the_training_checkpoint_around_the_state_dict(cli: Cli) -> None:
    torch.save({"epoch": 3, "state_dict": {"module.w": torch.ones(2)}}, "training.pth")
    cli("rename", "module.**", "**", "-m", "training.pth", "-o", "out.pth")
    found = torch.load("out.pth", weights_only=True)
    assert found["epoch"] == 3
    assert list(found["state_dict"]) == ["w"]


# --- what is shown -------------------------------------------------------------------------------------------------


def test_a_row_for_each_module_that_moves(folder: Path) -> None:
    live = opened(nn.DataParallel(network()).state_dict())
    (change,) = rename(live, "rename module.** **")
    assert (change.path, change.before, change.after) == ("module", "module.**", "** (9 keys)")
    assert change.params_before == change.params_after == sum(p.numel() for p in network().parameters())
    assert change.resolved == ("rename module.** **",)
    rows = rename(live, "rename *.bias *.offset")
    assert [(row.path, row.before, row.after) for row in rows] == [
        (path, f"{path}.bias", f"{path}.offset") for path in ("0", "1", "3")
    ]


def test_more_than_a_screenful_is_one_row(folder: Path) -> None:
    live = opened({f"layers.{number}.gamma": torch.zeros(2) for number in range(30)})
    (change,) = rename(live, "rename **.gamma **.weight")
    assert (change.before, change.after, change.params_after) == ("**.gamma", "**.weight (30 keys)", 60)


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        ("rename modul.** **", "no tensor matches 'modul.**'", "nearest: module"),
        ("rename module net", "'module' is a module, not a key", "rename 'module.**' 'net.**' renames all its keys"),
        ("rename . net", "'.' is a module, not a key", "rename '**' 'net.**'"),
        ("rename module.1.running_* module.1.a", "'module.1.running_*' has the wildcard *", ""),
        ("rename module.0.bias module.0.weight", "module.0.weight and module.0.bias would both be called", ""),
        ("rename module.0.bias module.1", "module.1 cannot be a tensor and a module at once", ""),
        ("rename module.0.bias module.1.weight.x", "module.1.weight cannot be a tensor and a module at once", ""),
        ("rename **.num_batches_tracked **", "cannot be a tensor and a module at once", ""),
        ("rename ** **", "would change no key", ""),
        ("rename module.0.bias .", "would get an empty name", ""),
    ],
)
def test_refused(folder: Path, line: str, message: str, hint: str) -> None:
    live = opened(nn.DataParallel(network()).state_dict())
    before = list(live.model.keys)
    with pytest.raises(RequestError, match=re.escape(message)) as caught:
        rename(live, line)
    assert hint in (caught.value.hint or "")
    assert live.model.keys == before


def test_an_empty_key_of_the_file_stays_where_others_are_renamed(cli: Cli) -> None:
    """Such a file is no state dict of a module, but people can still mend its other keys."""
    torch.save({"": torch.ones(2), "a.w": torch.ones(3)}, "a.pth")
    cli("rename", "a.**", "b.**", "-m", "a.pth", "-o", "b.pth")
    assert list(torch.load("b.pth")) == ["", "b.w"]


def test_rename_is_refused_if_the_architecture_is_known(cli: Cli) -> None:
    result = cli("rename", "classifier.6.*", "head.*", "-m", "alexnet", "--json", code=2)
    assert result.error["message"] == "AlexNet cannot load a state dict where classifier.6.weight is called head.weight"
    assert result.error["hint"].startswith("--bare-keys ignores the file's record")


def test_a_new_module_keeps_its_version_when_its_keys_are_renamed(cli: Cli, folder: Path) -> None:
    torch.save(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3)).state_dict(), folder / "bare.pth")
    lines = ("replace 1 BatchNorm1d(3)", "rename '0.**' 'first.**'", "rename '1.**' 'norm.**'")
    words = [word for line in lines for word in ("-e", line)]
    cli("apply", *words, "-m", "bare.pth", "-o", "out.pth")
    metadata = torch.load(folder / "out.pth", weights_only=True)._metadata
    assert metadata["norm"] == {"version": nn.BatchNorm1d._version}
    assert metadata["first"] == {"version": nn.Linear._version}


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("freeze .", "b.w a.w scale b.v a.v"),
        ("cast a float16", "b.w a.w scale b.v a.v"),
        ("rename a.** c.d.**", "b.w c.d.w scale b.v c.d.v"),
        ("rename a.w a.x", "b.w a.x scale b.v a.v"),
        ("remove a", "b.w scale b.v"),
        ("add n Linear(2,2)", "b.w a.w scale b.v a.v n.weight n.bias"),
        ("add b.n Linear(2,2)", "b.w a.w scale b.v b.n.weight b.n.bias a.v"),
        ("replace a Linear(2,2)", "b.w a.weight a.bias scale b.v"),
    ],
)
def test_keys_stay_in_the_order_of_their_file(cli: Cli, folder: Path, line: str, wanted: str) -> None:
    keys = ("b.w", "a.w", "scale", "b.v", "a.v")
    state = {key: nn.Parameter(torch.full((2,), float(number))) for number, key in enumerate(keys)}
    torch.save(state, folder / "bare.pth")
    cli("apply", "-e", line, "-m", "bare.pth", "-o", "out.pth")
    assert list(torch.load(folder / "out.pth", weights_only=True)) == wanted.split()


@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_entries_that_are_not_plain_tensors_keep_their_position(cli: Cli, folder: Path) -> None:
    state: dict[str, Any] = {
        "a._extra_state": None,
        "mask": torch.eye(2).to_sparse(),
        "a.weight": torch.ones(2, 2),
        "b._extra_state": {"calls": 3},
        "b.weight": torch.ones(2),
    }
    torch.save(state, folder / "bare.pth")
    cli("cast", "a", "float16", "-m", "bare.pth", "-o", "out.pth")
    assert list(torch.load(folder / "out.pth", weights_only=True)) == list(state)


def test_the_order_of_an_architecture_is_that_of_its_state_dict(cli: Cli, folder: Path) -> None:
    (folder / "own.py").write_text(
        "from torch import nn\n\nclass Extra(nn.Linear):\n    def __init__(self):\n        super().__init__(2, 2)\n"
        "        self.part = nn.Linear(2, 2)\n    def get_extra_state(self):\n        return 7\n"
        "    def set_extra_state(self, state):\n        pass\n"
    )
    cli("freeze", "part", "-m", "own.py:Extra", "-o", "out.pth")
    found = list(torch.load(folder / "out.pth", weights_only=True))
    assert found == ["weight", "bias", "_extra_state", "part.weight", "part.bias"]


def test_single_entries_that_are_not_tensors_can_be_removed(cli: Cli, folder: Path) -> None:
    state: dict[str, Any] = {"a.weight": torch.ones(2), "a._extra_state": None, "b._extra_state": {"calls": 3}}
    torch.save(state, folder / "bare.pth")
    rows = cli("remove", "**._extra_state", "-m", "bare.pth", "-o", "out.pth").out
    assert "a._extra_state  1 entry" in rows
    assert list(torch.load(folder / "out.pth", weights_only=True)) == ["a.weight"]
    cli("remove", "b._extra_state", "-m", "bare.pth")


def test_rows_of_tensors_that_are_not_dense_add_up(cli: Cli, folder: Path) -> None:
    state = {"s.m": nn.Parameter(torch.eye(3).to_sparse()), "w": nn.Parameter(torch.ones(2, 2))}
    torch.save(state, folder / "bare.pth")
    document = cli("remove", "s", "-m", "bare.pth", "--json").json
    assert [(row["before"], row["params_before"]) for row in document["changes"]] == [("1 tensor", 9)]
    assert document["totals_before"]["params"] - document["totals_after"]["params"] == 9
    assert "notes" not in document


# --- a file with a record as keys alone -------------------------------------------------------------------------------


def test_a_file_with_an_architecture_is_renamed_as_keys_alone(cli: Cli) -> None:
    cli("save", "net.pth", "-m", "resnet18", "-q")
    words = ("rename", "fc.*", "head.*", "-m", "net.pth", "-o", "out.pth")
    assert "--bare-keys" in cli(*words, code=2).err
    told = cli(*words, "--bare-keys").err
    assert "ignored the record in net.pth, with its architecture, edits and flags" in told
    before, after = (torch.load(name, weights_only=True) for name in ("net.pth", "out.pth"))
    renamed = {name.replace("fc.", "head."): value for name, value in before.items()}
    assert list(after) == list(renamed)
    assert all(torch.equal(after[name], value) for name, value in renamed.items())
    assert cli("modules", "out.pth", "-s", "head", "--json").json["modules"][0]["type"] is None
    assert "the file records no architecture" in cli("summary", "out.pth").out


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_file_with_an_architecture_is_made_bare(cli: Cli, suffix: str) -> None:
    cli("freeze", ".", "--except", "fc", "-m", "resnet18", "-o", "net.pth", "-q")
    cli("save", f"bare.{suffix}", "-m", "net.pth", "--bare-keys")
    assert cli("summary", f"bare.{suffix}", "--json").json["model"]["class"] is None
    cli("load", f"bare.{suffix}", "--arch", "resnet18", "-q")


# --- numbered tensors without an architecture -------------------------------------------------------------------------


def of_list() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Module()
    model.ps = nn.ParameterList([torch.randn(size) for size in (2, 3, 4)])
    return dict(model.state_dict())


def test_inserting_among_numbered_tensors_moves_later_ones_up(cli: Cli) -> None:
    state = of_list()
    torch.save(state, "bare.pth")
    edit = ("insert", "ps.1", "Linear(4,4)", "--renumber")
    cli(*edit, "-m", "bare.pth", "-o", "out.pth")
    found = torch.load("out.pth", weights_only=True)
    assert set(found) == {"ps.0", "ps.1.weight", "ps.1.bias", "ps.2", "ps.3"}
    for new, old in (("ps.0", "ps.0"), ("ps.2", "ps.1"), ("ps.3", "ps.2")):
        assert torch.equal(found[new], state[old])
    same_by_script(cli, " ".join(edit), found)


@pytest.mark.parametrize("case", sampled([("ps.0", [1, 2]), ("ps.1", [0, 2]), ("ps.2", [0, 1]), ("ps.[0-1]", [2])], 4))
def test_later_tensors_move_down(cli: Cli, case: tuple[str, list[int]]) -> None:
    target, left = case
    state = of_list()
    torch.save(state, "bare.pth")
    told = cli("remove", target, "-m", "bare.pth").err
    assert ("the later tensors of ps keep their numbers" in told) == (target in ("ps.0", "ps.1", "ps.[0-1]"))
    edit = ("remove", target, "--renumber")
    cli(*edit, "-m", "bare.pth", "-o", "out.pth")
    found = torch.load("out.pth", weights_only=True)
    assert list(found) == [f"ps.{number}" for number in range(len(left))]
    assert all(torch.equal(found[f"ps.{new}"], state[f"ps.{old}"]) for new, old in enumerate(left))
    same_by_script(cli, " ".join(edit), found)


def test_children_without_numbers_are_not_renumbered(cli: Cli) -> None:
    torch.save({f"features.5.{n}": v for n, v in nn.BatchNorm2d(3).state_dict().items()}, "bare.pth")
    for command in ("remove", "script"):
        words = ("remove", "features.5.running_mean", "--renumber")
        line = ("script", "-e", " ".join(words)) if command == "script" else words
        error = cli(*line, "-m", "bare.pth", "--json", code=2).error
        assert "--renumber is for what is called 0, 1, 2" in error["message"]
        assert "features.5.running_mean has another name" in error["message"]


def same_by_script(cli: Cli, edit: str, wanted: dict[str, torch.Tensor]) -> None:
    """Require that the script of an edit gives these tensors without modelcli."""
    Path("work.py").write_text(cli("script", "-e", edit, "-m", "bare.pth", "-o", "script.pth").out)
    subprocess.run([sys.executable, "work.py"], check=True, capture_output=True)
    made = torch.load("script.pth", weights_only=True)
    assert set(made) == set(wanted)
    assert all(torch.equal(made[name], value) for name, value in wanted.items())
