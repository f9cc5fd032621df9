"""The Python API on models with values: the results equal plain PyTorch, and a failure changes nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import modelcli
from modelcli import checkpoints
from modelcli.edits import Freeze, Replace
from modelcli.errors import RequestError, SystemFailureError, UnsafeError
from modelcli.language.expressions import Call
from modelcli.live.surgery import new_modules
from tests import nets
from tests.conftest import Cli


def same(model: nn.Module, other: nn.Module) -> bool:
    ours, theirs = model.state_dict(), other.state_dict()
    flags = [[(name, p.requires_grad) for name, p in each.named_parameters()] for each in (model, other)]
    return (
        repr(model) == repr(other)
        and flags[0] == flags[1]
        and ours.keys() == theirs.keys()
        and all(torch.equal(ours[name], theirs[name]) for name in ours)
    )


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


# --- apply ---------------------------------------------------------------------------------------------------------


def test_a_partly_materialized_model_gets_modules_with_values() -> None:
    model = small()
    model[0] = nn.Linear(4, 8, device="meta")
    modelcli.apply(model, "replace 3 Linear(_,10)", "append . Linear(10,2)")
    torch.manual_seed(2)
    assert torch.equal(model[4].weight, nn.Linear(10, 2).weight)
    assert [name for name, p in model.named_parameters() if p.is_meta] == ["0.weight", "0.bias"]


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="a second device is needed")
def test_new_modules_are_on_the_models_device() -> None:
    model = small().to(torch.accelerator.current_accelerator())
    modelcli.apply(model, "replace 3 Linear(_,10)", "append . Linear(10,2)")
    assert {p.device for p in model.parameters()} == {model[0].weight.device}


def test_a_placement_sets_the_dtype_device_and_mode() -> None:
    placement = new_modules.Placement(training=False, dtype=torch.float16, device=torch.device("meta"))
    new = placement.apply_to(nn.Linear(2, 2))
    assert (new.weight.device.type, new.weight.dtype, new.training) == ("meta", torch.float16, False)


def test_apply_equals_plain_pytorch() -> None:
    model, plain = small(), small()
    result = modelcli.apply(model, "freeze .", "replace 3 Linear(_,10)", "replace 2 GELU", seed=5)
    plain.requires_grad_(False)
    torch.manual_seed(5 * 1_000_003 + 2)
    plain[3] = nn.Linear(8, 10)
    plain[2] = nn.GELU()
    assert result is model
    assert same(model, plain)
    model(torch.zeros(2, 4)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["3.weight", "3.bias"]


def test_text_and_dataclasses_are_the_same() -> None:
    model, other = small(), small()
    modelcli.apply(model, Replace(target="3", module=Call("Linear", (8, 3))), Freeze(targets=("0",)))
    modelcli.apply(other, "replace 3 Linear(8,3)", "freeze 0")
    assert same(model, other)


def test_no_edits_change_nothing() -> None:
    model = small()
    assert modelcli.apply(model) is model
    assert same(model, small())


def test_remaining_parameters_are_the_same_objects() -> None:
    """So an optimizer's references to the remaining parameters stay valid."""
    model = small().eval()
    kept = model[0], model[0].weight
    modelcli.apply(model, "replace 3 Linear(_,5)", "freeze 0")
    assert model[0] is kept[0]
    assert model[0].weight is kept[1]
    assert not model[3].training


def test_the_callers_random_generator_is_unchanged() -> None:
    model = small()
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    modelcli.apply(model, "replace 3 Linear(8,5)")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("size", ["1,3,8,8", (1, 3, 8, 8), [1, 3, 8, 8], [(1, 3, 8, 8)], torch.Size((1, 3, 8, 8))])
def test_an_input_fills_holes(size: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Dropout()).to(torch.bfloat16)
    modelcli.apply(model, "replace 2 PReLU(_)", input_size=size)
    assert model[2].weight.shape == (6,)
    assert model[2].weight.dtype == torch.bfloat16


@pytest.mark.parametrize("size", ["1,x", (), (1, "3"), (1, -3), ((1, 3), 4), [()], [[1.0]], 5, True, {1: 2}])
def test_an_invalid_input_is_an_error(size: Any) -> None:
    with pytest.raises(RequestError, match=r"input size|input_size"):
        modelcli.apply(small(), "freeze 0", input_size=size)


@pytest.mark.parametrize("seed", [-1, 2**63, "a", 1.5, True, None])
def test_an_invalid_seed_is_an_error(seed: Any) -> None:
    with pytest.raises(RequestError, match="seed"):
        modelcli.apply(small(), "freeze 0", seed=seed)


# --- all or nothing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("freeze decoder", "edit 3, 'freeze decoder': no tensor matches 'decoder'"),
        ("replace conv2 Conv2d(3)", "edit 3, 'replace conv2 Conv2d(3)': conv2: Conv2d(3): missing a required argument"),
        ("replace conv2 Conv3d(_,_,_,groups=7)", "edit 3, 'replace conv2 Conv3d(_,_,_,groups=7)'"),
        ("rename conv1.* first.*", "Net cannot load a state dict where conv1.weight is called first.weight"),
    ],
)
def test_a_third_edit_that_is_wrong_leaves_the_model_as_it_was(line: str, message: str) -> None:
    model = nets.Net()
    model.bn.eval()
    model.conv1.bias.requires_grad_(False)
    model.conv1.weight.grad = torch.ones_like(model.conv1.weight)
    modules = dict(model.named_modules())
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    flags = {name: tensor.requires_grad for name, tensor in tensors.items()}
    modes = {name: module.training for name, module in modules.items()}
    pointers = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    values = {name: tensor.clone() for name, tensor in tensors.items()}
    with pytest.raises(RequestError) as caught:
        modelcli.apply(model, "replace bn GroupNorm(3,3)", "freeze .", line)
    assert message in caught.value.message
    assert all(module is modules[name] for name, module in model.named_modules())
    now = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert list(now) == list(tensors)
    for name, tensor in now.items():
        assert tensor is tensors[name]
        assert tensor.data_ptr() == pointers[name]
        assert tensor.requires_grad is flags[name]
        assert torch.equal(tensor, values[name])
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(model.conv1.weight.grad, torch.ones_like(model.conv1.weight))


def test_the_error_of_a_single_edit_has_no_number() -> None:
    with pytest.raises(RequestError) as caught:
        modelcli.apply(small(), "freeze decoder")
    assert caught.value.message == "no tensor matches 'decoder'"


def test_all_invalid_lines_are_reported_at_once() -> None:
    with pytest.raises(RequestError) as caught:
        modelcli.apply(small(), "frezee 0", "freeze 1", "freeze", 7)  # type: ignore[arg-type]
    assert [line.partition(":")[0] for line in caught.value.message.splitlines()] == ["edit 1", "edit 3", "edit 4"]


def test_a_module_that_does_not_fit_in_memory_is_an_error() -> None:
    model = small()
    with pytest.raises(SystemFailureError, match="memory"):
        modelcli.apply(model, "freeze .", "replace 3 Linear(1000000,1000000)")
    assert same(model, small())


def test_an_object_that_is_not_a_model_is_an_error() -> None:
    with pytest.raises(RequestError, match=r"apply takes an nn.Module, not 'alexnet'"):
        modelcli.apply("alexnet", "freeze .")  # type: ignore[arg-type]


# --- the package ---------------------------------------------------------------------------------------------------


def test_the_package_is_lazy() -> None:
    code = """
import sys, modelcli
assert set(modelcli.__all__) <= set(dir(modelcli))
assert "modelcli.commands.python_api" not in sys.modules
assert all(callable(getattr(modelcli, name)) for name in modelcli.__all__ if name != "__version__")
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = modelcli.nothing  # type: ignore[attr-defined]


# --- blueprint -----------------------------------------------------------------------------------------------------


def test_the_blueprint_of_a_module_and_of_a_reference() -> None:
    model = nets.Places()
    found = modelcli.blueprint(model)
    assert found.totals.params == sum(parameter.numel() for parameter in model.parameters())
    assert [module.path for module in found.modules] == [n for n, _ in model.named_modules(remove_duplicate=False)]
    assert found.by_path["again"].shared_with == "shared"
    assert found.by_name["again.weight"].tied_to == "shared.weight"
    assert found.trace is None
    traced = modelcli.blueprint(model, input_size=(2, 4)).trace
    assert traced is not None
    assert traced.layers["seq.0"].output_shape == [2, 4]
    assert modelcli.blueprint("Linear(3,2)", input_size="5,3").trace.macs == 30


def test_the_blueprint_of_a_file_needs_no_architecture(folder: Path) -> None:
    torch.save({"module.fc.weight": torch.zeros(3, 2)}, "bare.pth")
    for path in ("bare.pth", Path("bare.pth"), folder / "bare.pth"):
        assert modelcli.blueprint(path).by_name["module.fc.weight"].shape == (3, 2)
    with pytest.raises(RequestError, match="arch and key are for checkpoints"):
        modelcli.blueprint(nets.Places(), arch="alexnet")
    with pytest.raises(RequestError, match=r"takes an nn\.Module or a reference"):
        modelcli.blueprint(3)


def test_blueprint_is_the_function_whatever_was_imported() -> None:
    import modelcli.model.blueprint

    assert callable(modelcli.blueprint)
    assert modelcli.model.blueprint.Blueprint is type(modelcli.blueprint(nets.Places()))


def test_the_arguments_of_load(folder: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        expected = nn.Linear(4, 2)
    assert torch.equal(modelcli.load("Linear(4,2)", seed=3).weight, expected.weight)
    torch.save(expected, "whole.pth")
    loaded = modelcli.load("whole.pth", arch="Linear(4,2)", tensors_only=True)
    assert torch.equal(loaded.weight, expected.weight)
    with pytest.raises(UnsafeError):
        modelcli.load("whole.pth", arch="Linear(4,2)")
    with pytest.raises(RequestError, match="seed -1 is not a whole number"):
        modelcli.load("Linear(4,2)", seed=-1)


@pytest.mark.parametrize("arch", [nn.Linear, len, 3])
def test_an_invalid_architecture_is_an_error(folder: Path, arch: Any) -> None:
    torch.save(nn.Linear(4, 2).state_dict(), "bare.pth")
    with pytest.raises(RequestError, match=r"arch takes an nn\.Module or a reference, not") as caught:
        modelcli.load("bare.pth", arch=arch)
    assert (caught.value.hint is not None) == callable(arch)


# --- save ----------------------------------------------------------------------------------------------------------

SMALL = "Sequential(Linear(4,8),BatchNorm1d(8),ReLU(),Linear(8,2))"


def head(cli: Cli) -> nn.Sequential:
    """A model with an edit in its record, trained for a step."""
    cli("apply", "-m", SMALL, "-e", "replace 3 Linear(_,3)", "-e", "freeze 0", "-o", "head.pth", "-q")
    model = modelcli.load("head.pth")
    assert isinstance(model, nn.Sequential)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    return model


@pytest.mark.parametrize("out", ["out.pth", "out.safetensors", "runs/"])
def test_save_writes_the_record_of_the_file_that_a_model_came_from(cli: Cli, out: str) -> None:
    model = head(cli)
    model[1].requires_grad_(False)
    modelcli.save(model, out, like="head.pth")
    again = modelcli.load(out)
    assert same(again, model)
    written, before = (checkpoints.read(Path(name)).record for name in (out, "head.pth"))
    assert written is not None
    assert before is not None
    assert (written.reference, written.edits, written.seed) == (before.reference, before.edits, before.seed)
    assert "1.weight" in written.frozen
    cli("check", out, "--frozen", "{0,1}", "--trainable", "3", "--has", "3:Linear", "--output-shape", "2,3", code=2)
    cli("replace", "3", "Linear(_,7)", "-m", out, "-o", "seven.pth", "-q")
    if out == "out.pth":
        assert torch.equal(torch.load(out, weights_only=True)["3.weight"], model[3].weight)


def test_save_writes_the_models_own_dtypes_and_ties(cli: Cli, folder: Path) -> None:
    model = head(cli)
    modelcli.save(model.half(), "half.pth", like="head.pth")
    assert modelcli.load("half.pth")[3].weight.dtype is torch.float16  # type: ignore[index, union-attr]
    (folder / "tied.py").write_text(
        "from torch import nn\nclass Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)\n"
        "        self.head.weight = self.embed.weight\n"
    )
    cli("save", "tied.pth", "-m", "tied.py:Net", "-q")
    tied = modelcli.load("tied.pth", trust=True)
    (folder / "runs").mkdir()
    modelcli.save(tied, "runs/tied.pth", like="tied.pth")  # the caller has the class already, so no trust is needed
    assert modelcli.load("runs/tied.pth", trust=True).head.weight.shape == (5, 3)  # type: ignore[union-attr]
    tied.head.weight = nn.Parameter(torch.zeros(5, 3))  # type: ignore[union-attr]
    with pytest.raises(RequestError, match=r"its head\.weight and embed\.weight are not tied, but the record says so"):
        modelcli.save(tied, "apart.pth", like="tied.pth")


def test_save_looks_through_wrappers(cli: Cli) -> None:
    model = head(cli)
    modelcli.save(nn.DataParallel(model), "parallel.pth", like="head.pth")
    modelcli.save(torch.compile(model), "compiled.pth", like="head.pth")  # type: ignore[arg-type]
    assert same(modelcli.load("parallel.pth"), model)
    assert same(modelcli.load("compiled.pth"), model)


def test_save_refuses_another_model_a_file_without_a_record_and_what_exists(cli: Cli) -> None:
    model = head(cli)
    torch.save(dict(model.state_dict()), "bare.pth")
    with pytest.raises(RequestError, match="contains no record"):
        modelcli.save(model, "out.pth", like="bare.pth")
    with pytest.raises(RequestError, match=r"its 3\.(weight|bias) is \[2.*\], but \[3.*\] in the record"):
        modelcli.save(small(), "out.pth", like="head.pth")
    with pytest.raises(RequestError, match="it lacks 5 tensors"):
        modelcli.save(nn.Sequential(model[0], nn.ReLU(), nn.ReLU(), model[3]), "out.pth", like="head.pth")
    with pytest.raises(RequestError, match="exists"):
        modelcli.save(model, "head.pth", like="head.pth")
    assert not Path("out.pth").exists()
    modelcli.save(model, "head.pth", like="head.pth", force=True)
    assert same(modelcli.load("head.pth"), model)


# --- types ---------------------------------------------------------------------------------------------------------


def test_a_type_checker_knows_every_name_and_no_other(tmp_path: Path) -> None:
    """A type checker reports `modelcli.laod()`, and it knows the types of all public names."""
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nmypy_path = " + str(Path(modelcli.__file__).parent.parent) + "\nfollow_imports = silent\n"
        "[mypy-torch.*]\nfollow_imports = skip\n"
    )
    (tmp_path / "user.py").write_text(
        'import modelcli\nmodelcli.laod("a.pth")\nmodelcli.load(3)\n'
        'modelcli.blueprint("a.pth").totals.params.bit_count()\n'
    )
    cache = str(Path(__file__).parents[2] / ".mypy_cache" / "face")
    words = ["--config-file", "mypy.ini", "--cache-dir", cache, "user.py"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *words], cwd=tmp_path, text=True, capture_output=True, check=False
    )
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert [line.partition(": error")[0] for line in errors] == ["user.py:2", "user.py:3"], done.stdout + done.stderr
    assert 'has no attribute "laod"' in errors[0]


def test_every_public_name_exists() -> None:
    assert all(hasattr(modelcli, name) for name in modelcli.__all__)
    assert not hasattr(modelcli, "laod")
    assert set(dir(modelcli)) == set(modelcli.__all__)
