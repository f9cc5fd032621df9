"""Each edit compared with the plain PyTorch statements that do the same."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from modelcli import checkpoints, edits, load
from modelcli.errors import RequestError, SystemFailureError
from modelcli.language.references import Source
from modelcli.live import memory, meta_models, surgery
from modelcli.live.describe import describe
from modelcli.live.opening import open_live
from modelcli.live.sources import named_tensors, real_tensor
from modelcli.live.surgery.storages import shown_by
from modelcli.model.shared_bytes import tied
from tests.conftest import Cli


def apply(module: nn.Module, *lines: str, seed: int = 0) -> list[surgery.Change]:
    return surgery.apply(module, [edits.parse(line) for line in lines], seed=seed).changes


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 2))


# --- replace -------------------------------------------------------------------------------------------------------


def test_replace_is_setting_the_child() -> None:
    model, plain = small(), small()
    (change,) = apply(model, "replace 3 Linear(8,5)")
    plain[3] = nn.Linear(8, 5)
    assert repr(model) == repr(plain)
    assert (change.path, change.before, change.after) == ("3", "Linear(8, 2)", "Linear(8, 5)")
    assert (change.params_before, change.params_after) == (18, 45)
    assert change.resolved == ("replace 3 Linear(8,5)",)


def test_values_depend_on_the_seed_and_the_position_of_the_edit() -> None:
    """Edit number i draws what `torch.manual_seed(seed * 1000003 + i)` and the plain constructor draw."""
    model = small()
    apply(model, "freeze 0", "replace 3 Linear(8,5)", seed=7)
    torch.manual_seed(7 * 1_000_003 + 2)
    assert torch.equal(model[3].weight, nn.Linear(8, 5).weight)


def test_the_callers_random_generator_is_unchanged() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    model = small()
    torch.manual_seed(1)
    apply(model, "replace 3 Linear(8,5)")
    live = open_live(Source("Sequential(Linear(2,2))"))
    real_tensor(live.module[0].weight)
    assert torch.equal(torch.rand(3), expected)


def test_each_match_gets_a_module_of_its_own() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Sequential(nn.ReLU(), nn.Linear(2, 2)), nn.ReLU6())
    changes = apply(model, "replace **:ReLU PReLU()")
    assert [change.path for change in changes] == ["0", "1.0"]
    assert isinstance(model[0], nn.PReLU)
    assert isinstance(model[1][0], nn.PReLU)
    assert model[0] is not model[1][0]
    assert changes[0].resolved == ("replace 0 PReLU()", "replace 1.0 PReLU()")


def test_recorded_lines_omit_keep_weights_for_modules_that_keep_nothing() -> None:
    """With the option, such a line is refused by itself, so a file that records it could not be opened."""
    with pytest.raises(RequestError, match="bias of BatchNorm1d has another meaning in Linear"):
        apply(small(), "replace * Linear(4,4) --keep-weights")
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    changes = apply(model, "replace * Linear(4,4) --keep-weights")
    assert changes[0].resolved == (
        "replace 0 Linear(4,4) --keep-weights",
        "replace 1 Linear(4,4)",
        "replace 2 Linear(4,4) --keep-weights",
    )
    for line in changes[0].resolved:
        apply(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)), line)


def test_a_shared_module_stays_shared() -> None:
    shared = nn.ReLU()
    model = nn.Sequential(shared, nn.Linear(2, 2), shared)
    apply(model, "replace **:ReLU GELU")
    assert model[0] is model[2]
    assert isinstance(model[0], nn.GELU)


def test_one_name_of_a_shared_module_is_refused() -> None:
    shared = nn.ReLU()
    model = nn.Sequential(shared, nn.Linear(2, 2), shared)
    with pytest.raises(RequestError, match="one module with 2 names \\(0, 2\\)"):
        apply(model, "replace 0 GELU")
    assert model[0] is shared


def test_matches_inside_one_another_are_refused() -> None:
    model = nn.Sequential(nn.Sequential(nn.Sequential(nn.ReLU())))
    with pytest.raises(RequestError, match="lies inside 0"):
        apply(model, "replace **.0:Sequential ReLU")


def test_the_root_is_refused() -> None:
    with pytest.raises(RequestError, match="the model itself"):
        apply(small(), "replace . ReLU")


def test_a_new_module_has_the_dtype_and_mode_of_the_old_one() -> None:
    model = small().to(torch.bfloat16).eval()
    apply(model, "replace 3 Linear(8,5)", "replace 1 PReLU()")
    assert model[3].weight.dtype == torch.bfloat16
    assert model[1].weight.dtype == torch.bfloat16  # from its nearest relative, because ReLU has no tensor
    assert not model[3].training
    assert model[3].weight.requires_grad


def test_a_dtype_in_the_expression_is_used() -> None:
    model = small()
    apply(model, "replace 3 Linear(8,5,dtype=torch.float16)")
    assert model[3].weight.dtype == torch.float16


def test_holes_take_the_old_modules_attribute() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 5, stride=2, padding=1, bias=False))
    apply(model, "replace 0 Conv2d(_,_,_,stride=_,padding=_,bias=_)")
    assert repr(model[0]) == repr(nn.Conv2d(3, 8, 5, stride=2, padding=1, bias=False))


def test_holes_are_filled_in_from_the_input() -> None:
    """BatchNorm2d has no num_channels, so it is the second dimension of the input."""
    live = open_live(Source("resnet18"))
    changes = live.apply([edits.parse("replace **:BatchNorm2d GroupNorm(32,_)")]).changes
    assert len(changes) == 20
    norms = {path: module for path, module in live.module.named_modules() if isinstance(module, nn.GroupNorm)}
    plain = {t.name: t.shape for t in open_live(Source("resnet18")).describe().tensors if t.name.endswith("weight")}
    assert {f"{path}.weight": (norm.num_channels,) for path, norm in norms.items()}.items() <= plain.items()
    assert live.edits[0] == (1, "replace bn1 GroupNorm(32,64)")


@pytest.mark.parametrize("new", ["LayerNorm(_)", "RMSNorm(_)", "Sequential(LayerNorm(_),ReLU())"])
def test_the_width_of_an_image_fills_no_hole(cli: Cli, new: str) -> None:
    error = cli("replace", "bn1", new, "-m", "resnet18", "--json", code=2).error
    assert (
        f"{new} at bn1: _ for normalized_shape is not known: the old BatchNorm2d works on channels" in error["message"]
    )
    assert "[1,64,112,112]" in error["message"]
    assert error["hint"].startswith("GroupNorm(1,_) normalises over channels and space")
    cli("replace", "bn1", "GroupNorm(1,_)", "-m", "resnet18")
    cli("replace", "features.1.0.norm1", new, "-m", "swin_t")  # has its channels at the end


def test_holes_in_nested_modules() -> None:
    model = small()
    apply(model, "replace 3 Sequential(Linear(_,64),ReLU(),Linear(64,_))")
    assert repr(model[3]) == repr(nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2)))
    with pytest.raises(RequestError, match="not a part of one"):
        apply(model, "replace 0 Unflatten(1,(_,2))")


def test_a_hole_that_cannot_be_filled_in_is_an_error() -> None:
    with pytest.raises(RequestError, match="_ for num_channels is not known") as caught:
        apply(small(), "replace 1 GroupNorm(2,_)")
    assert "write the value of num_channels" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("replace 3 Linear(8)", "missing a required argument: 'out_features'"),
        ("replace 3 Linear(8,2,biass=False)", "unexpected keyword argument 'biass'"),
        ("replace 3 Linar(8,2)", "no class 'Linar'"),
        ("replace 3 Linear(-1,2)", "negative"),
        ("replace 7 ReLU", "no module matches '7'"),
        ("replace 3 Conv2d(3,4,5,groups=2)", "groups"),
        ("replace 3 functional(3)", "no class 'functional'"),
        ("replace 3 Parameter(3)", "no class 'Parameter'"),
        ("replace 3 os.path(3)", "no module class path in os"),
        ("replace 3 no_such.module:Class(3)", "no module named no_such"),
    ],
)
def test_wrong_edits_change_nothing(line: str, message: str) -> None:
    model = small()
    before = repr(model)
    with pytest.raises(RequestError, match=message):
        apply(model, line)
    assert repr(model) == before


def test_wrong_arguments_show_the_signature() -> None:
    with pytest.raises(RequestError) as caught:
        apply(small(), "replace 3 Linear(8)")
    assert caught.value.hint == "Linear(in_features: int, out_features: int, bias: bool = True)"


@pytest.mark.parametrize("on_meta", [True, False])
def test_a_module_that_does_not_fit_in_memory_is_an_error(on_meta: bool) -> None:
    model = open_live(Source("Sequential(Linear(4,4))")).module if on_meta else nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(SystemFailureError, match="of memory are free"):
        apply(model, "replace 0 Linear(1000000,1000000)")


@pytest.mark.parametrize("last", ["Linear(1,1,device='nowhere')", "Conv2d(1,1,1,padding_mode='meta')"])
def test_a_failing_constructor_allocates_nothing_that_does_not_fit(monkeypatch: pytest.MonkeyPatch, last: str) -> None:
    """torch's message contains `meta`, as if another device could help, but there the first layer is allocated."""
    monkeypatch.setattr(memory, "available", lambda: 1000)
    made: list[object] = []
    monkeypatch.setattr(meta_models, "_parameters_on_meta", made.append)
    with pytest.raises(RequestError, match=r"nowhere|padding_mode"):
        apply(small(), f'replace 3 "Sequential(Linear(100,100),{last})"')
    assert not made


@pytest.mark.parametrize(
    "text",
    [
        "LSTM(1,1,10**9)",
        "GRU(1,1,num_layers=10**9)",
        "TransformerEncoder(ReLU(),10**9)",
        "TransformerDecoder(TransformerDecoder(ReLU(),1000),1000)",
        "Transformer(8,2,10**9,10**9)",
    ],
)
def test_too_many_layers_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match="layers; the limit is 2,000"):
        apply(small(), f"replace 3 {text}")


def test_a_users_class_may_have_any_number_of_layers(folder: Path) -> None:
    (folder / "deep.py").write_text(
        "from torch import nn\nclass Deep(nn.Identity):\n    def __init__(self, num_layers): super().__init__()\n"
    )
    model = small()
    apply(model, "replace 3 deep:Deep(10**9)")
    assert type(model[3]).__name__ == "Deep"


def test_a_device_has_no_place_in_an_expression(cli: Cli) -> None:
    error = cli(
        "replace", "0", "Linear(4,4,device='meta')", "-m", "Sequential(Linear(4,4))", "-o", "out.pth", code=2
    ).err
    assert "device has no place here, since a module goes where the model is" in error


def test_a_module_without_values_is_not_written(cli: Cli, folder: Path) -> None:
    (folder / "own.py").write_text(
        "from torch import nn\n\nclass Made(nn.Linear):\n    def __init__(self):\n"
        "        super().__init__(4, 4, device='meta')\n"
    )
    for words in (("replace", "0", "own:Made()", "-m", "Sequential(Linear(4,4))", "-o", "out.pth"),
                  ("save", "out.pth", "-m", "Linear(4,4,device='meta')")):  # fmt: skip
        assert "weight has no values: its constructor makes it on the meta device" in cli(*words, code=2).err
    assert not Path("out.pth").exists()


def test_new_modules_do_not_take_a_one_byte_dtype_from_a_relative() -> None:
    model = small().to(torch.float8_e4m3fn)
    apply(model, "append . Linear(2,2)")
    assert model[4].weight.dtype == torch.float32


def test_nested_modules_and_classes_of_torchvision_ops() -> None:
    model = small()
    apply(model, "replace 3 Sequential(Linear(8,3),ReLU())", "replace 1 Permute([0,1])", "replace 2 torch.nn.Tanh()")
    assert repr(model[3]) == repr(nn.Sequential(nn.Linear(8, 3), nn.ReLU()))
    assert type(model[1]).__name__ == "Permute"
    assert isinstance(model[2], nn.Tanh)


def test_a_users_own_class(cli: Cli) -> None:
    result = cli("replace", "classifier.6", "nets:MyLinear(4096,10)", "-m", "alexnet", "--json").json
    assert result["check"]["output_shape"] == [1, 10]
    assert result["changes"][0]["params_after"] == 40_970


# --- freeze and unfreeze -------------------------------------------------------------------------------------------


def test_freeze_is_requires_grad() -> None:
    model = small()
    (change,) = apply(model, "freeze 0")
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True, True, True]
    assert (change.path, change.before, change.after) == ("0", "trainable", "frozen")
    (change,) = apply(model, "unfreeze 0.bias")
    assert model[0].bias.requires_grad
    assert not model[0].weight.requires_grad
    assert change.path == "0.bias"


def test_freeze_all_except() -> None:
    model = small()
    (change,) = apply(model, "freeze . --except 3")
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["3.weight", "3.bias"]
    assert change.params_before == 4 * 8 + 8 + 16
    assert change.resolved == ("freeze . --except 3",)
    change = apply(model, "unfreeze * --except 2")[0]
    assert change.resolved == ("unfreeze 0 3",)


def test_a_module_without_parameters_cannot_be_frozen() -> None:
    with pytest.raises(RequestError, match="has no parameters"):
        apply(small(), "freeze 1")


def test_expect() -> None:
    with pytest.raises(RequestError, match="2 modules match, not the 3 expected: 0, 3"):
        apply(small(), "replace *:Linear Linear(4,8) --expect 3")
    apply(small(), "replace *:Linear Linear(4,8) --expect 2")


def test_expect_counts_what_the_targets_pick() -> None:
    """Twenty norms count as twenty, whatever their number of tensors."""
    model = nn.Sequential(*(nn.BatchNorm1d(2) for _ in range(20)))
    apply(model, "freeze **:BatchNorm1d --expect 20")
    with pytest.raises(RequestError, match="20 match, not the 100 expected: 0, 1, 2, 3, 4 and 15 more"):
        apply(model, "freeze **:BatchNorm1d --expect 100")


def test_a_dtype_of_a_nested_module_is_kept() -> None:
    model = small()
    apply(model, "replace 3 Sequential(Linear(8,4,dtype=torch.float64))")
    assert model[3][0].weight.dtype == torch.float64


def test_a_tied_parameter_is_frozen_under_all_its_names() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    apply(model, "freeze 0.weight")
    rows = {t.name: (t.requires_grad, t.tied_to) for t in describe(model).tensors}
    assert rows["1.weight"] == (False, "0.weight")


# --- on meta and for real ------------------------------------------------------------------------------------------


def test_edits_on_meta_equal_edits_with_values() -> None:
    """The same edits on meta and on a model with values give the same names, shapes, flags and values."""
    lines = ("replace fc Linear(_,7)", "replace **:ReLU GELU", "freeze layer1 conv1", "unfreeze layer1.0.bn1")
    live = open_live(Source("resnet18", seed=3))
    real = live.architecture.real(3)
    parsed = [edits.parse(line) for line in lines]
    live.apply(parsed)
    surgery.apply(real, parsed, seed=3, inputs=live.inputs)
    assert describe(live.module) == describe(real)
    numbers = real.state_dict()
    for name, tensor in live.module.state_dict().items():
        assert torch.equal(real_tensor(tensor), numbers[name]), name


@pytest.mark.parametrize(
    "line",
    [
        "freeze .",
        "init . normal",
        "init . default",
        "cast . half",
        "replace 0 Linear(4,8)",
        "replace 0 Linear(4,9) --keep-weights",
        "insert 0 Linear(4,4)",
        "extract 0",
    ],
)
def test_a_discarded_model_is_garbage_collected(line: str) -> None:
    """The source of a tensor's values must not reference the tensor: the garbage collector cannot follow storages."""
    live = open_live(Source("Sequential(Linear(4,8),BatchNorm1d(8))"))
    held = [weakref.ref(tensor) for tensor in named_tensors(live.module).values()]
    live.apply([edits.parse(line)])
    held += [weakref.ref(tensor) for tensor in named_tensors(live.module).values()]
    for tensor in named_tensors(live.module).values():
        real_tensor(tensor)
    del live, tensor
    gc.collect()
    assert all(reference() is None for reference in held)


class Printed(nn.Module):
    """A module whose `repr` is its own, or raises."""

    def __init__(self, text: str | None) -> None:
        super().__init__()
        self.text = text

    def __repr__(self) -> str:
        assert self.text is not None
        return self.text


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (nn.Linear(4096, 10), "Linear(4096, 10)"),
        (nn.Linear(4096, 10, bias=False), "Linear(4096, 10, bias=False)"),
        (nn.Conv2d(3, 64, 7, stride=2, padding=3), "Conv2d(3, 64, (7,7), stride=(2,2), padding=(3,3))"),
        (nn.ReLU(inplace=True), "ReLU(inplace=True)"),
        (nn.GELU(), "GELU()"),
        (nn.BatchNorm2d(64), "BatchNorm2d(64)"),
        (nn.Sequential(nn.ReLU()), "Sequential"),
        (nn.Dropout(0.25), "Dropout(p=0.25)"),
        (FrozenBatchNorm2d(8), "FrozenBatchNorm2d(8)"),
        (FrozenBatchNorm2d(8, eps=0.001), "FrozenBatchNorm2d(8, eps=0.001)"),
        (Printed("Printed(of its own)"), "Printed(of its own)"),
        (Printed("Printed(\n)"), "Printed()"),
        (Printed("a module"), "Printed()"),
        (Printed(None), "Printed()"),
    ],
)
def test_brief(module: nn.Module, text: str) -> None:
    assert surgery.brief(module) == text


def test_the_configuration_of_a_class_with_its_own_repr() -> None:
    model = nn.Sequential(FrozenBatchNorm2d(8, eps=0.001), Printed(None))
    assert [module.config for module in describe(model).modules] == ["", "8, eps=0.001", ""]


def test_a_note_says_that_frozen_batch_norms_update_their_statistics(cli: Cli) -> None:
    told = " ".join(cli("freeze", "layer1", "-m", "resnet18").err.split())
    assert "frozen or not, 4 normalisation layers (layer1.0.bn1, layer1.0.bn2, layer1.1.bn1 and 1 more) still" in told
    told = " ".join(cli("freeze", "bn1", "-m", "resnet18").err.split())
    assert "1 normalisation layer (bn1) still updates its running mean and variance in train mode: call .eval()" in told
    assert "normalisation" not in cli("freeze", "layer1.0.conv1", "-m", "resnet18").err
    assert "normalisation" not in cli("unfreeze", "layer1", "-m", "resnet18").err
    assert "normalisation" not in cli("freeze", ".", "-m", "convnext_tiny").err  # LayerNorm counts nothing


def test_a_freeze_that_changes_nothing_says_so_and_is_recorded(cli: Cli) -> None:
    cli("load", "alexnet")
    assert "changes nothing" not in cli("freeze", "features").err
    assert "changes nothing" not in cli("freeze", "features", "classifier.1").err
    assert "note: freeze changes nothing: features is frozen already\n" in cli("freeze", "features").err
    again = cli("unfreeze", "classifier.4", "classifier.6", "--json").json
    assert again["notes"] == ["unfreeze changes nothing: classifier.4, classifier.6 are trainable already"]
    assert len(cli("log", "--json").json["edits"]) == 4


def test_the_row_of_freezing_all_but_the_head(cli: Cli) -> None:
    lines = cli("freeze", ".", "--except", "classifier.6", "-m", "alexnet").out.splitlines()
    assert lines[0] == ".  trainable  ->  frozen except classifier.6  57,003,840 params"
    assert "trainable:   61,100,840 -> 4,097,000 (-57,003,840)" in lines


def test_an_edit_without_effect_is_not_recorded(cli: Cli) -> None:
    def record() -> tuple[tuple[str, ...], int]:
        found = checkpoints.read(Path("g.pth")).record
        assert found is not None
        return found.edits, found.edit_count

    again = ("freeze", ".", "--except", "fc", "--expect", "1", "-o", "g.pth", "--force", "-m")
    cli(*again, "resnet18")
    assert record() == (("freeze . --except fc",), 1)
    for count in (2, 3):
        told = cli(*again, "g.pth")
        assert told.out.startswith(".  frozen except fc  ->  frozen except fc")
        assert "note: freeze changes nothing: " in told.err
        assert record() == (("freeze . --except fc",), count)
    cli("cast", ".", "float32", "-o", "g.pth", "--force", "-m", "g.pth")
    cli("unfreeze", "fc", "-o", "g.pth", "--force", "-m", "g.pth")
    assert record() == (("freeze . --except fc",), 5)
    cli("unfreeze", "layer1.*.bn1", "--except", "layer1.1.bn1", "-o", "g.pth", "--force", "-m", "g.pth")
    assert record() == (("freeze . --except fc", "unfreeze layer1.0.bn1"), 6)
    frozen = {name for name, parameter in load("g.pth").named_parameters() if not parameter.requires_grad}
    assert frozen.isdisjoint({"fc.weight", "layer1.0.bn1.bias"})
    assert len(frozen) == 58


def test_the_note_on_batch_statistics_if_tensors_are_selected(cli: Cli) -> None:
    told = " ".join(cli("freeze", "**.weight", "-m", "resnet18").err.split())
    assert "20 normalisation layers (bn1, layer1.0.bn1" in told
    assert "1 normalisation layer (bn1) still updates" in " ".join(
        cli("freeze", "bn1.bias", "-m", "resnet18").err.split()
    )


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning", "ignore:.*deprecated:DeprecationWarning")
def test_compiled_modules_with_tensors_are_refused() -> None:
    model = nn.ModuleDict({"a": torch.jit.script(nn.Linear(2, 2)), "b": nn.Linear(2, 2)})
    for line in ("replace b ReLU", "init . normal", "remove b"):
        with pytest.raises(RequestError, match="a is a compiled module"):
            apply(model, line)


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning", "ignore:.*deprecated:DeprecationWarning")
def test_compiled_modules_without_tensors_are_accepted() -> None:
    model = nn.Sequential(nn.Linear(2, 3), torch.jit.script(nn.ReLU()))
    with pytest.raises(RequestError, match=r"edit 2"):
        apply(model, "freeze 0", "replace 0 Nothing")
    assert model[0].weight.requires_grad
    apply(model, "freeze 0", "replace 0 Linear(_,1)")
    assert model(torch.ones(1, 2)).shape == (1, 1)


# --- ties that storages show ---------------------------------------------------------------------------------------


class Transposed(nn.Module):
    """An autoencoder whose decoder weight is the transposed encoder weight."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 3)
        self.decoder = nn.Linear(3, 4)
        self.decoder.weight = nn.Parameter(self.encoder.weight.detach().t())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_view_is_a_tie(device: str) -> None:
    model = Transposed() if device == "cpu" else meta_models.build_on_meta(Transposed)
    with pytest.raises(RequestError, match=r"decoder\.weight is tied to encoder\.weight"):
        apply(model, "replace decoder Linear(3,4)")
    assert model.decoder.weight.untyped_storage()._cdata == model.encoder.weight.untyped_storage()._cdata
    apply(model, "replace decoder Linear(3,4) --untie")
    assert model.decoder.weight.untyped_storage()._cdata != model.encoder.weight.untyped_storage()._cdata


def test_a_note_says_that_a_view_changes_too() -> None:
    model = Transposed()
    done = surgery.apply(model, [edits.parse("init encoder normal")])
    assert done.notes == ["decoder.weight shares memory with encoder.weight, so its values change too"]
    assert torch.equal(model.decoder.weight, model.encoder.weight.t())


def test_only_views_of_drawn_tensors_are_noted() -> None:
    whole = torch.arange(6.0)
    model = nn.Module()
    for name, view in {"full": whole, "q": whole[:3], "k": whole[3:], "again": whole[:3]}.items():
        model.register_parameter(name, nn.Parameter(view))
    model.same = model.q
    done = surgery.apply(model, [edits.parse("init q 'constant(9)'")])
    assert done.notes == [
        "q is tied to same, so that is initialised too",
        "full shares memory with q, so its values change too",
        "again shares memory with q, so its values change too",
    ]
    assert model.full.tolist() == [9, 9, 9, 3, 4, 5]


def test_neighbours_in_one_storage_are_not_tied() -> None:
    flat = torch.arange(24.0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 3, bias=False))
    model[0].weight = nn.Parameter(flat[:12].view(4, 3))
    model[1].weight = nn.Parameter(flat[12:].view(3, 4))
    assert tied(shown_by(model)) == [["0.weight"], ["1.weight"]]
    apply(model, "replace 1 Linear(4,2)")
    assert torch.equal(model[0].weight, flat[:12].view(4, 3))


def test_groups_of_tied_tensors() -> None:
    flat = torch.arange(10.0)
    model = nn.Module()
    for name, view in {"a": flat[6:], "b": flat[:4], "c": flat[3:6], "d": flat[8:9], "e": flat[:0]}.items():
        model.register_parameter(name, nn.Parameter(view))
    model.f = model.b
    assert sorted(tied(shown_by(model))) == [["a", "d"], ["b", "c", "f"], ["e"]]


# --- flags that cannot be set --------------------------------------------------------------------------------------


def with_whole_numbers() -> nn.Sequential:
    model = small()
    model[0].codes = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
    return model


def test_integer_parameters_stay_frozen() -> None:
    model = with_whole_numbers()
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    frozen = surgery.apply(model, [edits.parse("freeze .")])
    thawed = surgery.apply(model, [edits.parse("unfreeze .")])
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert [change.resolved for change in (*frozen.changes, *thawed.changes)] == [("freeze .",), ("unfreeze .",)]
    assert thawed.notes == ["0.codes stays frozen: int8 cannot be trained"]
    with pytest.raises(RequestError, match=r"no parameters that can be trained: 0\.codes is int8"):
        apply(model, "unfreeze 0.codes")


def test_tensors_that_are_not_dense_keep_their_flag(cli: Cli, folder: Path) -> None:
    state = {"a.weight": nn.Parameter(torch.ones(2, 2)), "a.mask": nn.Parameter(torch.eye(2).to_sparse())}
    torch.save(state, folder / "bare.pth")
    told = cli("freeze", ".", "-m", "bare.pth", "-o", "out.pth").err
    assert "a.mask stays trainable: it is not a dense tensor" in " ".join(told.split())
    assert [t["trainable"] for t in cli("params", "out.pth", "--json").json["tensors"]] == [False, True]


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("replace 3 Linear(8,2,biass=False)", "did you mean bias? Linear(in_features: int"),
        (
            "replace 0 Conv2d(1,2,3,padding_mode=reflect)",
            "did you mean ReflectionPad3d or ReflectionPad2d or ReflectionPad1d? Text is quoted, and the module around "
            "it once more: \"Conv2d(1,2,3,padding_mode='reflect')\"; or without brackets and quotes: "
            "Conv2d 1 2 3 padding_mode=reflect",
        ),
        (
            "replace 0 Conv2d(1,2,(3,3),padding_mode=rflect)",
            "text is quoted, and the module around it once more: \"Conv2d(1,2,(3,3),padding_mode='rflect')\"",
        ),
    ],
)
def test_the_hint_for_a_misspelt_argument(line: str, hint: str) -> None:
    with pytest.raises(RequestError) as caught:
        apply(small(), line)
    assert (caught.value.hint or "").startswith(hint)


def told(line: str, model: nn.Module) -> list[str]:
    return surgery.apply(model, [edits.parse(line)]).notes


def test_a_note_names_what_a_new_module_does_not_take_over() -> None:
    def model() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, padding=1, bias=False), nn.Conv2d(4, 4, 3, stride=2), nn.ReLU(inplace=True)
        )

    assert told("replace 0 Conv2d(_,4,3)", model()) == [
        "0: stride was (2, 2) and is (1, 1) now, padding was (1, 1) and is (0, 0) now, bias was False and is True now: "
        "stride=_, padding=_, bias=_ keep them"
    ]
    assert told("replace 0 Conv2d(_,4,3,stride=_,padding=_,bias=_)", model()) == []
    assert told("replace 0 Conv2d(_,4,3,1,0,bias=True)", model()) == []
    assert told("replace 2 GELU", model()) == []
    assert told("replace 2 ReLU", model()) == ["2: inplace was True and is False now: inplace=_ keeps it"]
    both = nn.Sequential(*(nn.Dropout(0.1) for _ in range(5)), *(nn.Dropout(p / 10) for p in (2, 3, 4)))
    assert told("replace *:Dropout Dropout", both) == [
        "0 and 4 more: p was 0.1 and is 0.5 now: p=_ keeps it",
        "5: p was 0.2 and is 0.5 now: p=_ keeps it",
        "6: p was 0.3 and is 0.5 now: p=_ keeps it",
        "1 more have other settings than before",
    ]


@pytest.mark.parametrize(
    ("old", "line", "notes"),
    [
        (
            nn.BatchNorm2d(4, eps=0.001),
            "replace 0 torchvision.ops:FrozenBatchNorm2d(_) --keep-weights",
            ["0: eps was 0.001 and is 1e-05 now: eps=_ keeps it"],
        ),
        (nn.BatchNorm2d(4, eps=0.001), "replace 0 'torchvision.ops:FrozenBatchNorm2d(_, eps=_)'", []),
        (nn.BatchNorm2d(4), "replace 0 GroupNorm(2,4)", []),
        (nn.BatchNorm2d(4), "replace 0 SyncBatchNorm(_)", []),
        (nn.MaxPool2d(2, stride=2), "replace 0 Conv2d(3,3,2,stride=2)", []),
        (nn.MaxPool2d(2), "replace 0 AvgPool2d(2)", []),
        (
            nn.Conv2d(3, 4, 1, bias=False),
            "replace 0 Linear(3,4)",
            ["0: bias was False and is True now: bias=_ keeps it"],
        ),
        (nn.MaxPool2d(2), "replace 0 Conv2d(3,3,2)", ["0: stride was 2 and is (1, 1) now: stride=_ keeps it"]),
    ],
)
def test_a_note_names_what_another_class_does_not_take_over(old: nn.Module, line: str, notes: list[str]) -> None:
    assert [note for note in told(line, nn.Sequential(old)) if " now: " in note] == notes


def test_a_note_says_that_new_modules_are_trainable() -> None:
    def frozen() -> nn.Module:
        return nn.Sequential(*(nn.Linear(3, 3) for _ in range(5)), nn.ReLU()).requires_grad_(False)

    one = "0 was frozen, what is new trains: freeze 0 keeps it so"
    assert told("replace 0 Linear(3,3)", frozen()) == [one]
    assert one in told("replace 0 Linear(3,3) --keep-weights", frozen())
    assert told("replace *:Linear Linear(3,3)", frozen()) == [
        "0, 1, 2 and 2 more were frozen, what is new trains: freeze keeps them so"
    ]
    assert told("replace *:Linear Identity", frozen()) == []
    assert told("replace 5 Linear(3,3)", frozen()) == []
    assert told("replace 0 Linear(3,3)", frozen().requires_grad_(True)) == []


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("replace fc Linear(5,3)", "fc: the old tensors say in_features=4, the new module takes 5: _ keeps it"),
        ("replace fc Linear(_,3)", None),
        ("replace conv Conv2d(2,6,3)", "conv: the old tensors say in_channels=3, the new module takes 2: _ keeps it"),
        ("replace conv Conv2d(6,6,3,groups=2)", None),
        ("replace conv ConvTranspose2d(2,6,3)", None),
        ("replace bn GroupNorm(2,4)", "bn: the old tensors say num_channels=6, the new module takes 4: _ keeps it"),
        ("replace bn LayerNorm(6)", None),
        ("replace fc Sequential(Linear(5,3))", None),
    ],
)
def test_a_note_names_a_new_width_if_the_architecture_is_unknown(cli: Cli, line: str, told: str | None) -> None:
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 6, 3), "bn": nn.BatchNorm2d(6), "fc": nn.Linear(4, 2)})
    torch.save(model.state_dict(), "bare.pth")
    notes = cli("apply", "-e", line, "-m", "bare.pth").err
    assert ("the old tensors say" in notes) == (told is not None)
    assert told is None or f"note: {told}\n" in notes
