"""`replace` with --keep-weights and --untie: what is kept of old tensors, and ties that an edit would break."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import modelcli
from modelcli import checkpoints
from modelcli.errors import RequestError
from modelcli.live import sources
from modelcli.live.surgery import seed_of
from tests import nets
from tests.checkpoints.test_checkpoints import tensors_of
from tests.conftest import Cli


def plain(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(294, 5))


def drawn(make: type[nn.Module], *args: object, **kwargs: object) -> nn.Module:
    torch.manual_seed(seed_of(0, 1))
    return make(*args, **kwargs)


def kept(old: nn.Module, new: nn.Module) -> dict[str, torch.Tensor]:
    """Return the new state dict with the old values in the overlap of each tensor, computed by hand."""
    state = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    for name, before in old.state_dict().items():
        if name in state and state[name].dim() == before.dim():
            part = tuple(slice(0, min(a, b)) for a, b in zip(before.shape, state[name].shape, strict=True))
            state[name][part] = before[part]
    return state


@pytest.mark.parametrize(
    ("path", "text", "new"),
    [
        ("3", "Linear(294,2)", lambda: drawn(nn.Linear, 294, 2)),
        ("3", "Linear(294,9)", lambda: drawn(nn.Linear, 294, 9)),
        ("3", "Linear(100,9,bias=False)", lambda: drawn(nn.Linear, 100, 9, bias=False)),
        ("0", "Conv2d(4,6,3)", lambda: drawn(nn.Conv2d, 4, 6, 3)),
        ("0", "Conv2d(3,6,3)", lambda: drawn(nn.Conv2d, 3, 6, 3)),
        ("1", "BatchNorm2d(8)", lambda: drawn(nn.BatchNorm2d, 8)),
        ("1", "BatchNorm2d(4,affine=False)", lambda: drawn(nn.BatchNorm2d, 4, affine=False)),
    ],
)
@pytest.mark.parametrize("on_file", [False, True])
def test_the_overlap_of_each_tensor_is_copied(cli: Cli, path: str, text: str, new: object, on_file: bool) -> None:
    model = plain()
    old = model.get_submodule(path)
    with torch.no_grad():
        expected = kept(old, new())  # type: ignore[operator]
    if on_file:
        torch.save(model.state_dict(), "bare.pth")
        words = ("-m", "bare.pth", "--arch", "Sequential(Conv2d(3,6,3),BatchNorm2d(6),Flatten(),Linear(294,5))")
        told = cli("replace", path, text, "--keep-weights", *words, "--check", "none", "-o", "out.pth").err
        assert f"note: {path} keeps " in told
        state = torch.load("out.pth", weights_only=True)
        found = {name.removeprefix(f"{path}."): t for name, t in state.items() if name.startswith(f"{path}.")}
    else:
        found = modelcli.apply(model, f"replace {path} {text} --keep-weights").get_submodule(path).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("step", [8, 40, 1 << 20])
@pytest.mark.parametrize(
    ("text", "new"),
    [
        ("Conv2d(4,5,3)", lambda: drawn(nn.Conv2d, 4, 5, 3)),
        ("Conv2d(2,7,3)", lambda: drawn(nn.Conv2d, 2, 7, 3)),
        ("Conv2d(3,6,3)", lambda: drawn(nn.Conv2d, 3, 6, 3)),
        ("Conv2d(3,6,3,dtype=torch.float64)", lambda: drawn(nn.Conv2d, 3, 6, 3, dtype=torch.float64)),
    ],
)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_kept_values_are_read_in_pieces(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, step: int, text: str, new: Callable[[], nn.Module], suffix: str
) -> None:
    """This holds for any memory layout of the old values, any end of a piece, and later edits."""
    monkeypatch.setattr(sources, "WINDOW", step)
    monkeypatch.setattr(sources, "CHUNK", step)
    old = plain()[0].to(memory_format=torch.channels_last)
    torch.save({f"conv.{name}": tensor for name, tensor in old.state_dict().items()}, "bare.pth")
    assert not old.weight.is_contiguous()
    with torch.no_grad():
        expected = kept(old, new())
    words = ("-m", "bare.pth", "--check", "none")
    cli("apply", "-e", f"replace conv {text} --keep-weights", "-e", "cast conv bfloat16", *words, "-o", f"out.{suffix}")
    found = tensors_of(checkpoints.read(Path(f"out.{suffix}")))
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        f"conv.{name}": tensor.bfloat16().tolist() for name, tensor in expected.items()
    }


def test_nested_modules_keep_by_their_names() -> None:
    model = nn.ModuleDict({"block": nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))})
    old = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modelcli.apply(model, "replace block Sequential(Linear(2,4),Tanh(),Linear(4,2)) --keep-weights")
    assert torch.equal(model["block"][0].weight[:3], old["block.0.weight"])
    assert torch.equal(model["block"][2].weight[:, :3], old["block.2.weight"])


def test_a_note_says_which_weights_were_kept(cli: Cli) -> None:
    told = cli("replace", "classifier.6", "Linear(_,10)", "--keep-weights", "-m", "alexnet").err
    assert "note: classifier.6 keeps weight[:10,:], bias[:10] of the old Linear(4096, 1000)" in told
    told = cli("replace", "**:Linear", "Linear(_,_,bias=False)", "--keep-weights", "-m", "vgg16").err
    assert "classifier.0 keeps weight of the old Linear(25088, 4096)" in told


def test_nothing_to_keep_is_an_error(cli: Cli) -> None:
    error = cli(
        "replace", "3", "ReLU()", "--keep-weights", "-m", "Sequential(ReLU(),Tanh(),ReLU(),Linear(3,2))", code=2
    )
    assert "--keep-weights keeps nothing of 3: ReLU has no tensor of the name and number of dimensions" in error.err


def test_another_dtype_is_converted() -> None:
    model = plain().double()
    old = model[3].weight.clone()
    modelcli.apply(model, "replace 3 Linear(294,9,dtype=torch.float32) --keep-weights")
    assert model[3].weight.dtype == torch.float32
    assert torch.equal(model[3].weight[:5], old.float())


def test_a_whole_tensor_is_kept_without_drawing(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """If old values replace all values of the constructor, none are drawn."""
    state = plain().state_dict()
    torch.save(state, "bare.pth")
    made: list[bool] = []
    monkeypatch.setattr(nn.Linear, "reset_parameters", lambda self: made.append(self.weight.is_meta))
    words = ("-m", "bare.pth", "--arch", "Sequential(Conv2d(3,6,3),BatchNorm2d(6),Flatten(),Linear(294,5))")
    cli("replace", "3", "Linear(294,5)", "--keep-weights", *words, "-o", "out.pth", "--check", "none")
    assert made
    assert all(made)
    assert torch.equal(torch.load("out.pth", weights_only=True)["3.weight"], state["3.weight"])


# --- ties ----------------------------------------------------------------------------------------------------------


def test_breaking_a_tie_needs_untie(cli: Cli) -> None:
    error = cli("replace", "head", "Linear(4,11)", "-m", "nets.py:Tied", "-o", "out.pth", code=2).err
    assert "head.weight is tied to embed.weight, and replacing head unties them" in error
    assert "--untie replaces it anyway" in error
    told = cli("replace", "head", "Linear(4,11)", "--untie", "-m", "nets.py:Tied", "-o", "out.pth").err
    assert "head.weight and embed.weight are no longer tied" in told
    assert cli("params", "out.pth", "--json").json["totals"]["params"] == 44 + 20 + 44 + 11
    assert all(row["tied_to"] is None for row in cli("params", "out.pth", "--json").json["tensors"])
    model = modelcli.load("out.pth", trust=True)
    assert model.head.weight is not model.embed.weight


def test_replacing_both_ends_of_a_tie_needs_untie_too() -> None:
    model = nets.Tied()
    with pytest.raises(RequestError, match=r"is tied to"):
        modelcli.apply(model, "replace {embed,head} Embedding(11,4)")
    modelcli.apply(model, "replace {embed,head} Embedding(11,4) --untie")
    assert model.embed.weight is not model.head.weight


def test_a_tie_inside_a_replaced_module_needs_no_untie() -> None:
    model = nn.ModuleDict({"inner": nets.Tied(), "other": nn.Linear(2, 2)})
    modelcli.apply(model, "replace inner Linear(2,2)")
    assert isinstance(model["inner"], nn.Linear)


def test_a_shared_module_under_one_of_its_names() -> None:
    model = nets.Places()
    with pytest.raises(RequestError, match="--untie") as caught:
        modelcli.apply(model, "replace again Linear(4,4)")
    assert "again is one module with 2 names (shared, again); the selector names 1 of them" in caught.value.message
    modelcli.apply(model, "replace again Linear(4,4) --also shared")
    assert model.again is model.shared
    old = model.shared
    modelcli.apply(model, "replace again Linear(4,4) --untie --keep-weights")
    assert model.shared is old
    assert model.again is not old
    assert torch.equal(model.again.weight, old.weight)
    assert model.again.weight.data_ptr() != old.weight.data_ptr()


def test_weights_kept_beside_the_old_module_are_copied(cli: Cli) -> None:
    """--untie leaves the old module under its other name, so that the file has two tensors."""
    words = ("-m", "nets.py:Places", "-o", "out.pth")
    cli("replace", "again", "Linear(4,4)", "--untie", "--keep-weights", *words)
    state = torch.load("out.pth", weights_only=True)
    assert torch.equal(state["again.weight"], state["shared.weight"])
    assert state["again.weight"].data_ptr() != state["shared.weight"].data_ptr()
    assert not torch.equal(state["again.weight"], torch.zeros(4, 4))


@pytest.mark.parametrize(
    ("line", "done"),
    [("freeze head", "frozen"), ("unfreeze head", "trainable"), ("cast head bfloat16", "cast"),
     ("init head xavier_uniform", "initialised")],
)  # fmt: skip
def test_an_edit_of_one_name_applies_to_the_tied_tensor(cli: Cli, line: str, done: str) -> None:
    told = cli("apply", "-e", line, "-m", "nets.py:Tied", "-o", "out.pth").err
    assert f"head.weight is tied to embed.weight, so that is {done} too" in told
    model = modelcli.load("out.pth", trust=True)
    assert model.head.weight is model.embed.weight
    assert "is tied to" not in cli("apply", "-e", line.replace("head", "."), "-m", "nets.py:Tied").err


def test_also_replaces_a_shared_module_under_all_its_names(cli: Cli) -> None:
    """The recorded edit has all names, so that the file gives the same model again."""
    words = ("-m", "nets.py:Unusual", "--input-size", "2,4")
    error = cli("replace", "first.lin", "Linear(4,4)", *words, code=2).err
    assert "first.lin is one module with 2 names (first.lin, again); the selector names 1 of them" in error
    assert "hint: --also again replaces it everywhere" in error
    cli("apply", "-e", "replace first.lin Linear(_,_) --also again", "-e", "replace heads.right Linear(4,3)",
        *words, "-o", "out.pth")  # fmt: skip
    model = modelcli.load("out.pth", trust=True)
    assert model.first.lin is model.again
    assert modelcli.blueprint("out.pth").by_path["again"].shared_with == "first.lin"


def test_a_note_names_newly_drawn_tensors(cli: Cli) -> None:
    told = cli("replace", "0", "Linear(4,2)", "--keep-weights", "-m", "Sequential(Linear(4,2,bias=False))").err
    assert "0 keeps weight of the old Linear(4, 2, bias=False); bias initialised" in " ".join(told.split())


# --- other numbers of input channels ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_summed_channels_equal_timm(cli: Cli, dtype: torch.dtype, channels: int) -> None:
    from timm.models import adapt_input_conv

    model = plain().to(dtype)
    torch.save(model.state_dict(), "m.pth")
    words = ("replace", "0", f"Conv2d({channels},_,_)", "--keep-weights=sum", "--check", "none")
    cli(
        *words,
        "-m",
        "m.pth",
        "--arch",
        "Sequential(Conv2d(3,6,3),BatchNorm2d(6),Flatten(),Linear(294,5))",
        "-o",
        "o.pth",
    )
    found = torch.load("o.pth", weights_only=True)
    assert torch.equal(found["0.weight"], adapt_input_conv(channels, model[0].weight.detach()))
    assert torch.equal(found["0.bias"], model[0].bias)
    assert found["0.weight"].dtype == dtype
    cli(*words, "-m", "m.pth", "-o", "bare.pth")  # only keys are known
    assert torch.equal(torch.load("bare.pth", weights_only=True)["0.weight"], found["0.weight"])


@pytest.mark.parametrize(("old", "new"), [(3, 1), (3, 5), (4, 2)])
def test_the_mean_of_the_channels_is_in_each_new_one(old: int, new: int) -> None:
    model = nn.Sequential(nn.Conv1d(old, 6, 3))
    before = model[0].weight.detach().clone()
    modelcli.apply(model, f"replace 0 Conv1d({new},_,_) --keep-weights=mean")
    for channel in range(new):
        assert torch.equal(model[0].weight[:, channel], before.mean(dim=1))


def test_a_note_says_how_channels_are_carried_over(cli: Cli) -> None:
    done = cli(
        "replace", "conv1", "Conv2d(1,_,7,2,3,bias=False)", "--keep-weights=sum", "-m", "resnet18", "--check", "none"
    )
    assert "conv1 keeps weight (3 input channels summed to 1) of the old Conv2d(3, 64" in done.err
    done = cli("replace", "fc", "Linear(_,10)", "--keep-weights=mean", "-m", "resnet18")
    assert "--keep-weights=mean keeps the overlap here: no convolution gets other input channels" in done.err


def test_the_value_of_keep_weights_needs_an_equals_sign(cli: Cli) -> None:
    assert cli("replace", "--keep-weights", "fc", "Linear(_,10)", "-m", "resnet18").code == 0
    line = "replace fc Linear(_,10) --keep-weights"
    assert str(modelcli.edits.parse(line)) == str(modelcli.edits.parse(f"{line}=overlap")) == line
    assert str(modelcli.edits.parse(f"{line}=sum")) == f"{line}=sum"
    done = cli("replace", "fc", "Linear(_,10)", "--keep-weights=max", "-m", "resnet18", code=2)
    assert "--keep-weights takes overlap, sum or mean, not 'max'" in done.err


@pytest.mark.parametrize("how", ["sum", "mean"])
@pytest.mark.parametrize("channels", [1, 5])
def test_the_script_carries_channels_over_too(cli: Cli, how: str, channels: int) -> None:
    torch.save(plain().state_dict(), "m.pth")
    edit = f"replace 0 Conv2d({channels},_,_) --keep-weights={how}"
    for source in (
        ["-m", "m.pth", "--arch", "Sequential(Conv2d(3,6,3),BatchNorm2d(6),Flatten(),Linear(294,5))"],
        ["-m", "m.pth"],
    ):
        cli("apply", "-e", edit, *source, "-o", "o.pth", "--check", "none", "--force")
        text = cli("script", "-e", edit, *source, "-o", "s.pth").out
        Path("s.py").write_text(text)
        subprocess.run([sys.executable, "s.py"], check=True)
        assert torch.equal(
            torch.load("s.pth", weights_only=True)["0.weight"], torch.load("o.pth", weights_only=True)["0.weight"]
        )
