"""The edits add, insert, append, remove and extract: positions, holes, dtypes, and what is refused."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

import modelcli
from modelcli import edits
from modelcli.errors import RequestError
from modelcli.live.inputs import Inputs
from modelcli.live.meta_models import build_on_meta
from modelcli.live.surgery import apply
from tests import nets
from tests.conftest import Cli


def sequence() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3))


IMAGE = (1, 3, 9, 9)


@pytest.mark.parametrize(
    ("line", "path", "text"),
    [
        ("insert 1 BatchNorm2d(_)", "1", "BatchNorm2d(6"),
        ("insert 0 Conv2d(_,3,1)", "0", "Conv2d(3, 3"),
        ("insert -1 PReLU(_)", "2", "PReLU(num_parameters=6)"),
        ("insert 3 BatchNorm2d(_)", "3", "BatchNorm2d(8"),
        ("append . BatchNorm2d(_)", "3", "BatchNorm2d(8"),
        ("add norm BatchNorm2d(_)", "norm", "BatchNorm2d(8"),
        ("add 9 BatchNorm2d(_)", "9", "BatchNorm2d(8"),
        ("append . Sequential(BatchNorm2d(_),ReLU())", "3", "BatchNorm2d(8"),
    ],
)
def test_holes_of_a_new_child_take_its_input(line: str, path: str, text: str) -> None:
    model = modelcli.apply(sequence(), line, input_size=IMAGE)
    assert text in repr(model.get_submodule(path))
    assert model(torch.randn(IMAGE)).shape == (1, 8, 5, 5)


def test_a_hole_without_an_input_is_an_error(cli: Cli) -> None:
    error = cli("add", "extra", "Linear(_,3)", "-m", "alexnet", code=2).err
    assert "_ for in_features is not known: there was no module before, and no forward pass reached it" in error
    assert "hint: write the value of in_features" in error


def test_a_new_child_has_the_dtype_and_mode_of_its_neighbours() -> None:
    model = sequence().bfloat16().eval()
    modelcli.apply(model, "insert 1 Conv2d(6,6,1)", "append . Dropout(0.5)")
    assert model[1].weight.dtype == torch.bfloat16
    assert not model[1].training
    assert not model[4].training


def test_a_named_sequence_keeps_its_names() -> None:
    model = nn.Sequential(OrderedDict(first=nn.Linear(2, 2), act=nn.ReLU(), last=nn.Linear(2, 2)))
    modelcli.apply(model, "remove act", "add end Tanh", "append . ReLU")
    assert list(model._modules) == ["first", "last", "end", "3"]  # as PyTorch's own append calls it
    with pytest.raises(RequestError, match="insert needs a Sequential or ModuleList"):
        modelcli.apply(model, "insert 0 ReLU")


def stages() -> nn.Sequential:
    return nn.Sequential(OrderedDict(first=nn.Conv2d(3, 6, 3), batchnorm2d=nn.BatchNorm2d(6), last=nn.Conv2d(6, 8, 3)))


@pytest.mark.parametrize(
    ("lines", "names"),
    [
        (["insert first BatchNorm2d(_) --after"], ["first", "batchnorm2d_2", "batchnorm2d", "last"]),
        (["insert last BatchNorm2d(_) --after"], ["first", "batchnorm2d", "last", "batchnorm2d_2"]),
        (["insert first torch.nn:PReLU(_) --after"], ["first", "prelu", "batchnorm2d", "last"]),
        (["insert first ReLU --after"] * 3, ["first", "relu_3", "relu_2", "relu", "batchnorm2d", "last"]),
    ],
)
def test_a_child_goes_behind_one_with_a_name(lines: list[str], names: list[str]) -> None:
    """What is there keeps its name and its place; each new child goes right behind the one that is named."""
    model = modelcli.apply(stages(), *lines, input_size=IMAGE)
    assert list(model._modules) == names
    assert model(torch.randn(IMAGE)).shape == (1, 8, 5, 5)


def test_behind_a_named_child_of_a_library_model(cli: Cli) -> None:
    from torchvision.models import densenet121

    line = "insert features.norm0 'PReLU(_)' --after"
    shown = cli("apply", "-m", "densenet121", "-e", line, "-o", "out.pth").out
    assert "features.prelu" in shown
    torch.manual_seed(0)
    plain = densenet121()
    names = list(plain.features._modules)
    found = modelcli.load("out.pth")
    assert list(found.features._modules) == [*names[:2], "prelu", *names[2:]]
    assert found.features.prelu.num_parameters == 64
    exec(compile(cli("script", "-m", "densenet121", "-e", line, "-o", "by.pth").out, "made.py", "exec"), {})
    one, other = (torch.load(name, weights_only=True) for name in ("out.pth", "by.pth"))
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_behind_a_numbered_child_is_before_the_next() -> None:
    one, other = sequence(), sequence()
    modelcli.apply(one, "insert 0 PReLU(6) --after", "insert -1 ReLU --after")
    modelcli.apply(other, "insert 1 PReLU(6)", "append . ReLU")
    assert repr(one) == repr(other)


def test_behind_a_numbered_key(cli: Cli) -> None:
    state = {f"layers.{number}.weight": torch.full((2, 2), float(number)) for number in range(3)}
    torch.save(state, "a.pth")
    cli("insert", "layers.1", "Linear(2,2,bias=False)", "--after", "--renumber", "-m", "a.pth", "-o", "b.pth")
    found = torch.load("b.pth", weights_only=True)
    assert list(found) == [f"layers.{number}.weight" for number in range(4)]
    for new, old in ((0, 0), (1, 1), (3, 2)):
        assert torch.equal(found[f"layers.{new}.weight"], state[f"layers.{old}.weight"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("insert frist ReLU --after", "has no child 'frist' did you mean first?"),
        ("insert first ReLU", "insert first MODULE --after puts it behind that child"),
        ("insert first.0 ReLU --after", "is neither"),
        ("insert batchnorm* ReLU --after", "has no child 'batchnorm*'"),
    ],
)
def test_what_no_child_goes_behind(line: str, message: str) -> None:
    model = stages()
    before = repr(model)
    with pytest.raises(RequestError) as caught:
        modelcli.apply(model, line)
    assert message in f"{caught.value.message} {caught.value.hint}"
    assert repr(model) == before


def test_a_child_that_is_none_may_be_added(folder: Path) -> None:
    model = nets.Places()
    modelcli.apply(model, "add later Linear(4,4)")
    assert model.get_submodule("later").in_features == 4
    assert "later" not in vars(model)


def test_inserting_into_a_shared_sequence_changes_both_paths() -> None:
    shared = sequence()
    model = nn.ModuleDict({"one": shared, "two": shared})
    modelcli.apply(model, "insert one.1 BatchNorm2d(6)")
    assert model["two"][1] is model["one"][1]
    modelcli.apply(model, "remove **:BatchNorm2d")
    assert [type(part) for part in shared] == [nn.Conv2d, nn.ReLU, nn.Conv2d]


def test_removing_several_children_renumbers_once() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2 + number) for number in range(6)))
    modelcli.apply(model, "remove 0 2 -1")
    assert [part.out_features for part in model] == [3, 5, 6]
    assert list(model._modules) == ["0", "1", "2"]


def test_flags_follow_their_modules(cli: Cli) -> None:
    """Frozen names, the recorded blueprint and the keys of the file have the new paths."""
    cli("freeze", "2", "-m", "Sequential(Linear(2,2),ReLU(),Linear(2,2))", "-o", "a.pth")
    cli("insert", "0", "Linear(2,2)", "-m", "a.pth", "-o", "b.pth")
    assert {n for n, p in modelcli.load("b.pth").named_parameters() if not p.requires_grad} == {"3.weight", "3.bias"}
    cli("remove", "0", "1", "-m", "b.pth", "-o", "c.pth")
    assert list(torch.load("c.pth", weights_only=True)) == ["1.weight", "1.bias"]
    rows = cli("params", "c.pth", "--json").json["tensors"]
    assert [(row["name"], row["trainable"]) for row in rows] == [("1.weight", False), ("1.bias", False)]


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        ("add seq.0 ReLU", "seq.0 is there already: Linear(4, 4)", "replace seq.0 puts another module in its place"),
        ("add fc.weight ReLU", "fc.weight is a tensor, and no child can have its name", "a name that is free"),
        ("add forward ReLU", "Places has something else called forward", "a name that is free"),
        ("add se.x ReLU", "no module matches 'se'", "nearest: seq"),
        ("add '*.x' ReLU", "'*' matches", "add takes one"),
        ("add 'x*' ReLU", "'x*' is a pattern", "write the name out"),
        ("add . ReLU", "takes the path of a new module, not of the model itself", "add classifier.dropout"),
        ("add x:ReLU ReLU", "asks for a type", "write the path without a type"),
        ("insert seq.9 ReLU", "'9' is no position in seq Sequential, whose children are 0 to 3", "append seq last"),
        ("insert seq.-9 ReLU", "'-9' is no position", "insert seq.0 puts it first"),
        ("insert seq.one ReLU", "'one' is no position", "insert seq.0"),
        ("insert seq.+1 ReLU", "'+1' is no position", "insert seq.0"),
        ("insert seq.٣ ReLU", "'٣' is no position", "insert seq.0"),
        ("remove seq seq.0", "seq.0 lies inside seq, and both match", "narrow the selector"),
        ("remove fc.weight", "fc.weight is a tensor of Places, but remove takes only modules", "bias=False"),
        ("remove fc --expect 2", "1 matches, not the 2 expected", ""),
        ("remove fk", "no module matches 'fk'", "there are: seq, blocks, heads, fc"),
        ("extract 'seq.*'", "'seq.*' matches 4 modules, but extract takes one", ""),
        ("extract fc.weight", "no module matches 'fc.weight'", ""),
    ],
)
def test_refused_and_nothing_is_changed(line: str, message: str, hint: str) -> None:
    model = nets.Places()
    before = repr(model), {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    with pytest.raises(RequestError) as caught:
        modelcli.apply(model, line)
    assert message in str(caught.value) or message in caught.value.message
    assert hint in str(caught.value)
    assert before == (repr(model), {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()})


def test_a_removed_module_that_forward_needs_is_an_error(cli: Cli) -> None:
    error = cli("remove", "avgpool", "-m", "alexnet", "-o", "out.pth", code=2).err
    assert "the model itself (AlexNet) cannot run after the edit: 'AlexNet' object has no attribute 'avgpool'" in error
    assert "replace avgpool Identity keeps its name and passes its input through" in error
    cli("replace", "avgpool", "Identity", "-m", "alexnet", "-o", "out.pth")


def test_a_note_names_a_new_child_that_is_never_called(cli: Cli) -> None:
    words = ("-m", "nets.py:Places", "--input-size", "2,4")
    told = cli("add", "later", "Linear(4,4)", *words).err
    assert "later did not run in the forward pass: nothing calls it" in told
    assert "did not run" not in cli("append", "blocks", "Linear(4,4)", *words).err


# --- extract -------------------------------------------------------------------------------------------------------


def test_an_extracted_module_takes_its_own_input(cli: Cli) -> None:
    result = cli("extract", "classifier", "-m", "alexnet", "-o", "head.pth")
    assert "check:   runs: [1,9216] -> [1,1000]" in result.out
    assert "Input:                      [1,9216]" in cli("summary", "head.pth").out
    model = modelcli.load("head.pth")
    assert model(torch.randn(2, 9216)).shape == (2, 1000)
    cli("replace", "6", "Linear(_,5)", "-m", "head.pth", "-o", "five.pth")
    assert modelcli.load("five.pth")(torch.randn(2, 9216)).shape == (2, 5)
    # The output describes the extracted model.
    assert "[7,9216]" in cli("summary", "five.pth", "--input-size", "7,9216").out
    cli("extract", "6", "-m", "five.pth", "-o", "last.pth")
    assert modelcli.blueprint("last.pth").trace.inputs == ((1, 4096),)


def test_an_extracted_module_takes_several_inputs(cli: Cli) -> None:
    words = ("-m", "nets.py:Attending", "--input-size", "2,5,4")
    cli("extract", "attention", *words, "-o", "attention.pth")
    trace = modelcli.blueprint("attention.pth").trace
    assert trace.inputs == ((2, 5, 4), (2, 5, 4), (2, 5, 4))


def test_an_extracted_module_keeps_integer_inputs(cli: Cli) -> None:
    cli("extract", "embed", "-m", "nets.py:Tied", "--input-size", "2,5", "--input-dtype", "int64", "-o", "embed.pth")
    assert modelcli.blueprint("embed.pth").trace.inputs == ((2, 5),)
    assert "[2,5,4]" in cli("summary", "embed.pth").out


def test_after_extract_paths_are_those_of_the_part(cli: Cli) -> None:
    result = cli(
        "apply", "-e", "extract features", "-e", "replace 0 Conv2d(3,64,11,4,2)", "-m", "alexnet", "-o", "f.pth"
    )
    assert "check:   runs: [1,3,224,224] -> [1,256,6,6]" in result.out


def test_a_live_model_gives_its_part_back() -> None:
    model = nets.Places()
    assert modelcli.apply(model, "extract seq", "freeze 0") is model.seq
    assert not model.seq[0].weight.requires_grad


# --- files that say no architecture --------------------------------------------------------------------------------


def saved(**tensors: tuple[int, ...]) -> None:
    torch.save({name.replace("__", "."): torch.randn(shape) for name, shape in tensors.items()}, "bare.pth")


def keys(path: str = "out.pth") -> list[str]:
    return list(torch.load(path, weights_only=True))


def test_numbers_of_keys_are_kept_unless_they_are_a_sequence(cli: Cli) -> None:
    """`--renumber` moves later children by one, keeping the gaps of layers without tensors."""
    state = {f"features.{number}.weight": torch.full((number + 1,), float(number)) for number in (0, 3, 6, 10)}
    torch.save(state, "bare.pth")
    told = cli("remove", "features.3", "-m", "bare.pth", "-o", "out.pth").err
    assert "the later children of features keep their numbers" in told
    assert keys() == ["features.0.weight", "features.6.weight", "features.10.weight"]
    cli("remove", "features.3", "--renumber", "-m", "bare.pth", "-o", "out.pth", "--force")
    written = torch.load("out.pth", weights_only=True)
    assert {name: tensor[0].item() for name, tensor in written.items()} == {
        "features.0.weight": 0,
        "features.5.weight": 6,
        "features.9.weight": 10,
    }
    assert "keep their numbers" not in cli("remove", "features.10", "-m", "bare.pth").err
    cli("insert", "features.3", "Linear(2,2)", "--renumber", "-m", "bare.pth", "-o", "out.pth", "--force")
    assert keys() == [
        *("features.0.weight", "features.3.weight", "features.3.bias"),
        *("features.4.weight", "features.7.weight", "features.11.weight"),
    ]


def test_single_tensors_can_be_removed(cli: Cli) -> None:
    saved(fc__weight=(3, 2), fc__bias=(3,), head__weight=(2, 2), head__bias=(2,))
    cli("remove", "**.bias", "-m", "bare.pth", "-o", "out.pth")
    assert keys() == ["fc.weight", "head.weight"]
    cli("remove", "fc", "head.bias", "-m", "bare.pth", "-o", "out.pth", "--force")
    assert keys() == ["head.weight"]
    cli("remove", "**.weight", "--except", "fc.weight", "-m", "bare.pth", "-o", "out.pth", "--force")
    assert keys() == ["fc.weight", "fc.bias", "head.bias"]
    error = cli("remove", "fc", "head", "-m", "bare.pth", "-o", "none.pth", code=2).err
    assert "would leave no tensor" in error


@pytest.mark.parametrize(
    ("expression", "made"),
    [
        ("Linear(_,10)", "Linear(2, 10)"),
        ("Linear(_,_)", "Linear(2, 3)"),
        ("Linear(_,7,bias=_)", "Linear(2, 7, bias=False)"),
        ("Embedding(_,_)", "Embedding(3, 2)"),
    ],
)
def test_holes_from_the_shapes_of_a_file(cli: Cli, expression: str, made: str) -> None:
    saved(fc__weight=(3, 2))
    changes = cli("replace", "fc", expression, "-m", "bare.pth", "--json").json["changes"]
    assert changes[0]["after"] == made


def test_holes_from_a_convolution_of_a_file(cli: Cli) -> None:
    saved(conv__weight=(8, 4, 3, 3), conv__bias=(8,), norm__weight=(8,), norm__bias=(8,))
    words = ("-m", "bare.pth", "--json")
    change = cli("replace", "conv", "Conv2d(_,16,_,bias=_)", *words).json["changes"][0]
    assert change["after"] == "Conv2d(4, 16, (3,3), stride=(1,1))"
    change = cli("replace", "norm", "GroupNorm(2,_)", *words).json["changes"][0]
    assert change["after"] == "GroupNorm(2, 8)"
    # The weight of a grouped convolution does not show its input channels.
    assert "_ for in_channels is not known" in cli("replace", "conv", "Conv2d(_,8,3,groups=2)", *words, code=2).err
    assert "_ for in_channels is not known" in cli("replace", "conv", "ConvTranspose2d(_,8,3)", *words, code=2).err


def test_a_replaced_path_loses_its_tensors_and_gains_those_of_the_module(cli: Cli) -> None:
    saved(body__weight=(3, 2), head__0__weight=(4, 3), head__0__bias=(4,), head__2__weight=(2, 4))
    cli("replace", "head", "Linear(3,5)", "-m", "bare.pth", "-o", "out.pth")
    written, before = torch.load("out.pth", weights_only=True), torch.load("bare.pth", weights_only=True)
    assert {name: tuple(tensor.shape) for name, tensor in written.items()} == {
        "body.weight": (3, 2),
        "head.weight": (5, 3),
        "head.bias": (5,),
    }
    assert torch.equal(written["body.weight"], before["body.weight"])


# --- a plan and a model --------------------------------------------------------------------------------------------


def test_placing_on_meta_equals_placing_with_values() -> None:
    lines = [
        "insert 1 BatchNorm2d(_)",
        "append . Conv2d(_,2,1)",
        "remove 2",
        "add end Sequential(ReLU())",
        "extract end",
    ]
    parsed = list(map(edits.parse, lines))
    inputs = Inputs((IMAGE,))
    real = apply(sequence(), parsed, seed=3, inputs=inputs)
    meta = apply(build_on_meta(sequence), parsed, seed=3, inputs=inputs)
    assert repr(real.model) == repr(meta.model)
    assert [change.resolved for change in real.changes] == [change.resolved for change in meta.changes]
    assert real.inputs == meta.inputs


def test_children_with_ambiguous_numbers_are_not_renumbered(cli: Cli) -> None:
    saved(b__01__weight=(2, 2), b__1__weight=(2, 2), b__2__weight=(2, 2))
    assert "some here have other names" in cli("remove", "b.1", "--renumber", "-m", "bare.pth", code=2).err
    assert "those of b have names" in cli("insert", "b.1", "ReLU", "--renumber", "-m", "bare.pth", code=2).err


def test_before_the_last_of_numbers_with_gaps(cli: Cli) -> None:
    saved(a__0__weight=(2, 2), a__2__weight=(2, 2), a__10__weight=(2, 2))
    cli("insert", "a.-1", "Linear(2,2,bias=False)", "--renumber", "-m", "bare.pth", "-o", "out.pth")
    assert keys() == ["a.0.weight", "a.2.weight", "a.10.weight", "a.11.weight"]


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize("line", ["cast . half", "init . normal", "freeze ."])
def test_entries_that_are_not_dense_tensors_are_kept(cli: Cli, line: str) -> None:
    torch.save({"a.weight": torch.randn(4, 4), "s.weight": torch.randn(4, 4).to_sparse()}, "bare.pth")
    told = cli("apply", "-e", line, "-m", "bare.pth", "-o", "out.pth").err
    assert line == "freeze ." or "s.weight" in told
    assert torch.load("out.pth", weights_only=True)["s.weight"].is_sparse


def test_a_hole_in_the_place_of_a_lazy_module(folder: Path) -> None:
    model = modelcli.apply(nn.Sequential(nn.LazyLinear(4), nn.ReLU()), "replace 0 Linear(_,3)", input_size=(1, 5))
    assert model[0].in_features == 5
    with pytest.raises(RequestError, match="is not known"):
        modelcli.apply(nn.Sequential(nn.LazyLinear(4)), "replace 0 Linear(_,3)")
