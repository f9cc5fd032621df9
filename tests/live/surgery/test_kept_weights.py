"""`replace` with --keep-weights and --untie: what is kept of old tensors, and ties that an edit would break."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import modelcli
from modelcli import checkpoints
from modelcli.errors import RequestError
from modelcli.live import sources
from modelcli.live.surgery import seed_of, value_rules
from modelcli.live.surgery.value_rules import repeated
from tests import nets
from tests.checkpoints.test_checkpoints import tensors_of
from tests.conftest import Cli
from tests.sampling import rotated


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
    assert "--keep-weights takes overlap, sum, mean, repeat or interpolate, not 'max'" in done.err


@pytest.mark.parametrize(("channels", "how"), rotated([1, 5], ["sum", "mean"]))
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


# --- repeated and interpolated values --------------------------------------------------------------------------------


def both_kinds(cli: Cli, model: nn.Module, arch: str, edit: str, *more: str) -> dict[str, torch.Tensor]:
    """Apply an edit to a file with and without its architecture, and as scripts. Returns the values of all of them."""
    torch.save(model.state_dict(), "m.pth")
    found = []
    for number, source in enumerate((["-m", "m.pth", "--arch", arch], ["-m", "m.pth"])):
        out, made = f"o{number}.pth", f"s{number}.pth"
        cli("apply", "-e", edit, *source, "-o", out, "--check", "none", "--force", *more)
        script = cli("script", "-e", edit, *source, "-o", made, *more).out
        exec(compile(script, "made.py", "exec"), {})
        found += [torch.load(path, weights_only=True) for path in (out, made)]
        Path(made).unlink()
    for other in found[1:]:
        assert list(other) == list(found[0])
        assert all(torch.equal(other[name], tensor) for name, tensor in found[0].items())
        assert all(other[name].dtype == tensor.dtype for name, tensor in found[0].items())
    return found[0]


FLOATS = [torch.float32, torch.bfloat16, torch.float64]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("Conv2d(3,4,3)", "Conv2d(7,4,3)", lambda w, b: (torch.cat([w, w, w], 1)[:, :7], b)),
        ("Conv2d(3,4,3)", "Conv2d(2,6,3)", lambda w, b: (torch.cat([w, w])[:6, :2], torch.cat([b, b])[:6])),
        ("Conv1d(4,4,3,groups=4)", "Conv1d(8,8,3,groups=8)", lambda w, b: (torch.cat([w, w]), torch.cat([b, b]))),
        ("Linear(3,4)", "Linear(3,9)", lambda w, b: (torch.cat([w, w, w])[:9], torch.cat([b, b, b])[:9])),
        ("Linear(3,4)", "Linear(7,4)", lambda w, b: (torch.cat([w, w, w], 1)[:, :7], b)),
        ("Embedding(3,4)", "Embedding(8,4)", lambda w, b: (torch.cat([w, w, w])[:8], b)),
    ],
)
@pytest.mark.parametrize("dtype", FLOATS)
def test_values_are_repeated_along_each_larger_axis(
    cli: Cli, old: str, new: str, expected: Callable[[Any, Any], tuple[Any, Any]], dtype: torch.dtype
) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(modelcli.load(old)).to(dtype)
    values = dict(model[0].named_parameters())
    found = both_kinds(cli, model, f"Sequential({old})", f"replace 0 {new} --keep-weights=repeat")
    weight, bias = expected(values["weight"].detach(), values["bias"].detach() if "bias" in values else None)
    assert torch.equal(found["0.weight"], weight)
    assert found["0.weight"].dtype == dtype
    assert bias is None or torch.equal(found["0.bias"], bias)


def test_swapped_axes_are_repeated_too(cli: Cli, folder: Path) -> None:
    """transformers' Conv1D stores its weight the other way round."""
    source = "from torch import nn\nfrom transformers.pytorch_utils import Conv1D\n"
    (folder / "own.py").write_text(f"{source}def net():\n    return nn.Sequential(Conv1D(4, 3))\n")
    cli("save", "m.pth", "-m", "own.py:net")
    before = torch.load("m.pth", weights_only=True)["0.weight"]  # [3, 4]: in, out
    words = ("-m", "m.pth", "--trust", "--check", "none")
    cli("replace", "0", "Linear(5,4)", "--keep-weights=repeat", *words, "-o", "o.pth")
    expected = torch.cat([before, before])[:5].t()
    assert torch.equal(torch.load("o.pth", weights_only=True)["0.weight"], expected)
    edit = "replace 0 Linear(5,4) --keep-weights=repeat"
    exec(compile(cli("script", "-e", edit, *words[:3], "-o", "s.pth").out, "made.py", "exec"), {})
    assert torch.equal(torch.load("s.pth", weights_only=True)["0.weight"], expected)


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    rotated([((16, 16), (14, 14)), ((4, 4), (6, 5)), ((3, 3), (5, 5)), ((8, 8), (3, 3))], FLOATS),
)
def test_kernels_are_resampled_as_timm_does(
    cli: Cli, sizes: tuple[tuple[int, int], tuple[int, int]], dtype: torch.dtype
) -> None:
    from timm.layers import resample_patch_embed

    old, new = sizes
    model = nn.Sequential(nn.Conv2d(3, 5, old)).to(dtype)
    edit = f"replace 0 'Conv2d(3,5,({new[0]},{new[1]}))' --keep-weights=interpolate"
    found = both_kinds(cli, model, f"Sequential(Conv2d(3,5,({old[0]},{old[1]})))", edit)
    expected = resample_patch_embed(model[0].weight.detach(), list(new))
    if dtype == torch.float64:  # timm computes in float32
        assert torch.allclose(found["0.weight"], expected, atol=1e-5)
    else:
        assert torch.equal(found["0.weight"], expected)
    assert torch.equal(found["0.bias"], model[0].bias)


@pytest.mark.parametrize(("old", "new"), [(4, 6), (6, 4), (3, 14)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_grid_of_positions_is_interpolated_as_torchvision_does(dtype: torch.dtype, old: int, new: int) -> None:
    from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

    def made(side: int) -> VisionTransformer:
        return VisionTransformer(side * 2, 2, 1, 2, 8, 16)

    model = made(old)
    nn.init.normal_(model.encoder.pos_embedding)
    model.to(dtype)
    state = {name: tensor.float() for name, tensor in model.state_dict().items()}
    expected = interpolate_embeddings(new * 2, 2, state)["encoder.pos_embedding"].to(dtype)
    text = f"torchvision.models.vision_transformer:Encoder({new * new + 1},1,2,8,16,0.0,0.0)"
    modelcli.apply(model, f"replace encoder {text} --keep-weights=interpolate")
    assert torch.equal(model.encoder.pos_embedding, expected)
    mlp = state["encoder.layers.encoder_layer_0.mlp.0.weight"].to(dtype)
    assert torch.equal(model.encoder.layers[0].mlp[0].weight, mlp)


def test_a_grid_in_a_table_keeps_its_class_token(cli: Cli) -> None:
    """As CLIP's vision model has it: an Embedding with a class token and a square grid."""
    from torchvision.models.vision_transformer import interpolate_embeddings

    model = nn.Sequential(nn.Embedding(50, 4))
    found = both_kinds(
        cli, model, "Sequential(Embedding(50,4))", "replace 0 Embedding(197,4) --keep-weights=interpolate"
    )
    expected = interpolate_embeddings(14, 1, {"encoder.pos_embedding": model[0].weight.detach()[None]})
    assert torch.equal(found["0.weight"], expected["encoder.pos_embedding"][0])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("old", "new", "kept"), [(8, 20, 0), (16, 64, 0), (12, 5, 0), (10, 22, 2)])
def test_positions_of_a_line_are_interpolated_linearly(
    cli: Cli, dtype: torch.dtype, old: int, new: int, kept: int
) -> None:
    more = f",padding_idx={kept - 1}" if kept else ""
    model = nn.Sequential(nn.Embedding(old, 6, padding_idx=kept - 1 if kept else None)).to(dtype)
    edit = f"replace 0 Embedding({new},6{more}) --keep-weights=interpolate"
    found = both_kinds(cli, model, f"Sequential(Embedding({old},6{more}))", edit)["0.weight"]
    weight = model[0].weight.detach()
    wide = weight if dtype == torch.float64 else weight.float()
    line = nn.functional.interpolate(wide[kept:].t()[None], size=new - kept, mode="linear", align_corners=True)
    assert torch.equal(found, torch.cat([wide[:kept], line[0].t()]).to(dtype))
    assert torch.equal(found[-1], weight[-1])
    assert torch.equal(found[kept], weight[kept])


class Positions(nn.Module):
    def __init__(self, length: int, name: str = "pos", batch: bool = True) -> None:
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.randn(1, length, 4) if batch else torch.randn(length, 4)))


@pytest.fixture
def positions(monkeypatch: pytest.MonkeyPatch) -> str:
    """The expression for a module with position embeddings of its own."""
    monkeypatch.setitem(sys.modules, "positions_of_a_test", sys.modules[__name__])
    return "positions_of_a_test:Positions"


def test_positions_that_a_module_holds_itself(positions: str) -> None:
    from torchvision.models.vision_transformer import interpolate_embeddings

    for old, new, more in ((17, 26, ""), (17, 26, ",batch=False")):
        model = nn.Sequential(Positions(old, batch=not more))
        before = model[0].pos.detach().clone()
        modelcli.apply(model, f"replace 0 {positions}({new}{more}) --keep-weights=interpolate")
        expected = interpolate_embeddings(5, 1, {"encoder.pos_embedding": before.reshape(1, old, 4)})
        assert torch.equal(model[0].pos.reshape(1, new, 4), expected["encoder.pos_embedding"])
    # A grid without a class token: nothing stands before it.
    model = nn.Sequential(Positions(16))
    token = torch.randn(1, 1, 4)
    with_token = {"encoder.pos_embedding": torch.cat([token, model[0].pos.detach()], 1)}
    modelcli.apply(model, f"replace 0 {positions}(36) --keep-weights=interpolate")
    assert torch.equal(model[0].pos, interpolate_embeddings(6, 1, with_token)["encoder.pos_embedding"][:, 1:])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("17", "20", "its 17 positions are a grid of 4x4 and a class token, and 20 positions are no such grid"),
        ("16", "20", "its 16 positions are a grid of 4x4, and 20 positions are no such grid"),
        (
            "9,'relative_position_bias_table',False",
            "25,'relative_position_bias_table',False",
            "a table of relative positions is no sequence",
        ),
    ],
)
def test_what_is_no_sequence_of_positions_is_refused(positions: str, old: str, new: str, message: str) -> None:
    first, *more = old.split(",")
    model = nn.Sequential(Positions(int(first), *(part.strip("'") if part != "False" else False for part in more)))
    with pytest.raises(RequestError, match=message) as refused:
        modelcli.apply(model, f'replace 0 "{positions}({new})" --keep-weights=interpolate')
    assert refused.value.hint in ("26 positions are", "25 positions are", "leave --keep-weights out")


def test_a_word_that_does_not_apply_keeps_the_overlap(cli: Cli) -> None:
    for how, why in (
        ("repeat", "no tensor gets larger"),
        ("interpolate", "no kernel of two dimensions and no position embedding gets another size"),
    ):
        done = cli("replace", "fc", "Linear(_,10)", f"--keep-weights={how}", "-m", "resnet18")
        assert f"--keep-weights={how} keeps the overlap here: {why}" in done.err
        assert "fc keeps weight[:10,:], bias[:10]" in done.err
    for how, text in (("interpolate", "Conv1d(3,4,5)"), ("repeat", "Conv1d(3,4,5)")):
        told = cli("replace", "0", text, f"--keep-weights={how}", "-m", "Sequential(Conv1d(3,4,3))", code=2).err
        assert "the old one would fill only a corner of the new one" in told
    repeat = ("--keep-weights=repeat", "-m")
    told = cli("replace", "0", "Conv2d(4,8,3,groups=2)", *repeat, "Sequential(Conv2d(4,4,3,groups=2))", code=2).err
    assert "would get into others of its 2 groups" in told
    told = cli("replace", "0", "Embedding(9,4,padding_idx=1)", *repeat, "Sequential(Embedding(5,4))", code=2).err
    assert "--keep-weights=repeat would repeat row 1 of weight, which is for padding" in told
    told = cli("replace", "0", "GRU(3,8)", *repeat, "Sequential(GRU(3,4))", code=2).err
    assert "has a block for each gate" in told


def test_notes_say_what_was_repeated_or_interpolated(cli: Cli) -> None:
    words = ("-m", "resnet18", "--check", "none")
    told = cli("replace", "conv1", "Conv2d(4,_,_,2,3,bias=False)", "--keep-weights=repeat", *words).err
    assert "conv1 keeps weight (64x3x7x7 repeated to 64x4x7x7) of the old Conv2d(3, 64" in told
    told = cli("replace", "conv1", "Conv2d(_,_,3,1,1,bias=False)", "--keep-weights=interpolate", *words).err
    assert "conv1 keeps weight (kernels resampled from 7x7 to 3x3) of the old Conv2d(3, 64" in told
    words = ("--keep-weights=interpolate", "-m", "Sequential(Embedding(50,4))")
    told = cli("replace", "0", "Embedding(197,4)", *words).err
    assert "(positions interpolated from a grid of 7x7 to 14x14, class token kept)" in " ".join(told.split())
    told = cli("replace", "0", "Embedding(99,4)", *words).err
    assert "(positions interpolated along a line from 50 to 99)" in " ".join(told.split())


def test_one_tensor_at_a_time_is_repeated_when_it_is_written(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, ...]] = []

    def counting(values: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        made.append(shape)
        return repeated(values, shape)

    monkeypatch.setattr(value_rules, "repeated", counting)
    words = ("replace", "0", "Linear(3,9)", "--keep-weights=repeat", "-m", "Sequential(Linear(3,4))")
    cli(*words)
    assert made == []
    cli(*words, "-o", "o.pth")
    assert sorted(made) == [(9,), (9, 3)]


def test_the_bias_of_a_tied_module_is_repeated_too(cli: Cli) -> None:
    arch = "Sequential(Embedding(5,4),Linear(4,5))"
    model: Any = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
    model[1].weight = model[0].weight
    torch.save(model.state_dict(), "m.pth")
    edits = ("-e", "tie 0.weight 1.weight", "-e", "replace 0 Embedding(8,4) --keep-weights=repeat --tie")
    for source in (["-m", "m.pth", "--arch", arch], ["-m", "m.pth"]):
        source = [*source, "--check", "none"]
        lines = edits if "--arch" in source else edits[2:]
        cli("apply", *lines, *source, "-o", "o.pth", "--force")
        exec(compile(cli("script", *lines, *source[:-2], "-o", "s.pth").out, "made.py", "exec"), {})
        for path in ("o.pth", "s.pth"):
            found = torch.load(path, weights_only=True)
            assert torch.equal(found["0.weight"], torch.cat([model[0].weight, model[0].weight])[:8])
            assert torch.equal(found["1.weight"], found["0.weight"])
            assert torch.equal(found["1.bias"], torch.cat([model[1].bias, model[1].bias])[:8])
        Path("s.pth").unlink()
