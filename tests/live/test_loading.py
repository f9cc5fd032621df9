"""Loading checkpoints into architectures, compared with PyTorch's `load_state_dict`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from modelcli import checkpoints
from modelcli.errors import AnswerNoError, RequestError
from modelcli.live import loading
from modelcli.live.loading import LoadReport, Mismatch
from modelcli.live.meta_models import build_on_meta
from modelcli.live.sources import named_tensors, real_tensor, source_of
from modelcli.model import wrapper_prefixes
from modelcli.model.blueprint import Blueprint, ModuleInfo
from modelcli.model.wrapper_prefixes import Unwrapping
from tests.checkpoints.test_checkpoints import assert_same, saved
from tests.nets import Tied, Unusual


class Block(nn.Module):
    """A convolution and a BatchNorm, an own parameter, a scalar buffer, and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 1)
        self.bn = nn.BatchNorm2d(3)
        self.gain = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("steps", torch.tensor(0.0))


def perturbed(module: nn.Module) -> nn.Module:
    """Return the module with other values in every tensor."""
    with torch.no_grad():
        for number, tensor in enumerate(named_tensors(module).values()):
            tensor.copy_(torch.arange(tensor.numel()).reshape(tensor.shape) + number + 1)
    return module


def loaded_for_real(module: nn.Module, path: Path, key: str | None = None) -> tuple[nn.Module, LoadReport]:
    return module, loading.load(module, loading.mapped(checkpoints.read(path, key=key)))


def loaded_on_meta(module: nn.Module, path: Path, key: str | None = None) -> tuple[nn.Module, LoadReport]:
    """Load on the meta device, then read every tensor's values from its source."""
    meta = build_on_meta(lambda: copy.deepcopy(module))
    report = loading.load(meta, loading.on_meta(checkpoints.read(path, key=key)))
    return meta, report


def assert_same_state(found: nn.Module, wanted: nn.Module) -> None:
    theirs = wanted.state_dict()
    ours = found.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert_same(real_tensor(tensor), theirs[name])
    flags = [parameter.requires_grad for parameter in found.parameters()]
    assert flags == [parameter.requires_grad for parameter in wanted.parameters()]


@pytest.mark.parametrize("load", [loaded_for_real, loaded_on_meta])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_it_loads_what_pytorch_loads(tmp_path: Path, load: Any, legacy: bool) -> None:
    wanted = perturbed(Block())
    path = saved(tmp_path / "m.pth", wanted.state_dict(), _use_new_zipfile_serialization=not legacy)
    found, report = load(Block(), path)
    assert_same_state(found, wanted)
    assert report == LoadReport(matched=len(wanted.state_dict()))
    assert report.is_strict


@pytest.mark.parametrize("load", [loaded_for_real, loaded_on_meta])
@pytest.mark.parametrize("metadata", [True, False])
def test_a_batch_norm_from_before_num_batches_tracked(tmp_path: Path, load: Any, metadata: bool) -> None:
    wanted = perturbed(Block())
    state: Any = wanted.state_dict()
    del state["bn.num_batches_tracked"]
    if metadata:
        state._metadata["bn"] = {"version": 1}
    else:
        state = dict(state)
    theirs = Block()
    theirs.load_state_dict(copy.deepcopy(state))
    found, report = load(Block(), saved(tmp_path / "m.pth", state))
    assert report.is_strict
    assert_same_state(found, theirs)


@pytest.mark.parametrize("load", [loaded_for_real, loaded_on_meta])
def test_missing_and_unexpected_keys_are_those_of_pytorch(tmp_path: Path, load: Any) -> None:
    state: dict[str, Any] = dict(perturbed(Block()).state_dict())
    del state["conv.bias"], state["gain"], state["bn.running_mean"]
    state |= {"head.weight": torch.ones(1), "epoch": 3}
    theirs = Block()
    keys = theirs.load_state_dict({name: value for name, value in state.items() if name != "epoch"}, strict=False)
    _, report = load(Block(), saved(tmp_path / "m.pth", state))
    assert list(report.missing) == keys.missing_keys
    assert list(report.unexpected) == [*keys.unexpected_keys, "epoch"]
    assert report.matched == len(Block().state_dict()) - 3
    assert not report.is_strict


@pytest.mark.parametrize("load", [loaded_for_real, loaded_on_meta])
def test_shapes_that_differ_are_reported_and_stay_out(tmp_path: Path, load: Any) -> None:
    path = saved(tmp_path / "m.pth", nn.Linear(3, 4).state_dict())
    found, report = load(nn.Linear(3, 2), path)
    assert report.mismatched == (Mismatch("weight", (2, 3), (4, 3)), Mismatch("bias", (2,), (4,)))
    assert (report.matched, report.missing, report.unexpected) == (0, (), ())
    assert found.weight.shape == (2, 3)
    error = report.refusal(checkpoints.read(path), "Linear(3, 2)", strict=False)
    assert error is not None
    assert "weight is [4, 3] in the file and [2, 3] in the architecture" in error.message


def test_files_that_cannot_be_loaded_are_errors(tmp_path: Path) -> None:
    contents = checkpoints.read(saved(tmp_path / "m.pth", {"x": torch.ones(1)}))
    report = LoadReport(1, missing=("weight", "bias"), unexpected=("x",))
    assert report.refusal(contents, "Linear(1, 1)", strict=False) is None
    error = report.refusal(contents, "Linear(1, 1)", strict=True)
    assert error is not None
    assert error.exit_code == 1
    assert "missing: weight, bias; unexpected: x" in error.message
    assert LoadReport(3).refusal(contents, "Linear(1, 1)", strict=True) is None


@pytest.mark.parametrize("load", [loaded_for_real, loaded_on_meta])
def test_a_single_element_where_there_was_no_dimension(tmp_path: Path, load: Any) -> None:
    """Files of torch 0.3 store scalars as tensors with one element."""
    state = perturbed(Block()).state_dict()
    state["steps"] = torch.tensor([5.0])
    theirs = Block()
    theirs.load_state_dict(state)
    found, report = load(Block(), saved(tmp_path / "m.pth", state))
    assert report.is_strict
    assert_same_state(found, theirs)


def test_an_integer_for_a_trainable_parameter_is_an_error(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pth", {"weight": torch.ones(2, 2, dtype=torch.int8), "bias": torch.ones(2)})
    with pytest.raises(AnswerNoError, match="PyTorch refuses the state dict"):
        loaded_for_real(nn.Linear(2, 2), path)


# --- prefixes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [loaded_for_real, loaded_on_meta])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "model.module."])
def test_a_wrapper_s_prefix_is_stripped(tmp_path: Path, load: Any, prefix: str) -> None:
    wanted = perturbed(Block())
    wrapped: nn.Module = wanted
    for name in reversed(prefix.rstrip(".").split(".")):
        outer = nn.Module()
        outer.add_module(name, wrapped)
        wrapped = outer
    found, report = load(Block(), saved(tmp_path / "m.pth", wrapped.state_dict()))
    assert report == LoadReport(len(wanted.state_dict()), unwrapping=Unwrapping(prefix))
    assert_same_state(found, wanted)


def test_real_wrappers(tmp_path: Path) -> None:
    wanted = perturbed(Block())
    wrappers: tuple[Any, ...] = (nn.DataParallel(wanted), torch.compile(wanted))
    for wrapper in wrappers:
        _, report = loaded_for_real(Block(), saved(tmp_path / "m.pth", wrapper.state_dict()))
        assert report.is_strict
        assert report.unwrapping.prefix in ("module.", "_orig_mod.")


def test_the_metadata_of_the_root_moves_with_the_prefix(tmp_path: Path) -> None:
    """For an old BatchNorm inside DataParallel, the wrapper's version must not be used as the layer's."""
    norm = nn.BatchNorm1d(2)
    state: Any = nn.DataParallel(norm).state_dict()
    assert state._metadata == {"": {"version": 1}, "module": {"version": 2}}
    contents = checkpoints.read(saved(tmp_path / "m.pth", state))
    stripped, _ = loading.compare(norm, loading.on_meta(contents))
    assert stripped.metadata == {"": {"version": 2}}


def test_only_foreign_prefixes_are_stripped() -> None:
    def prefix(found: set[str], own: set[str]) -> str:
        return wrapper_prefixes.fit(dict.fromkeys(found), dict.fromkeys(own)).prefix

    own = {"model.weight", "model.bias"}
    assert prefix({"model.weight", "model.bias"}, own) == ""
    assert prefix({"module.model.weight", "module.model.bias"}, own) == "module."
    assert prefix({"model.other"}, own) == ""  # the architecture has a child of that name
    beside = wrapper_prefixes.fit({"module.weight": None, "epoch": None}, {"weight": None})
    assert (beside.parts, beside.key("module.weight"), beside.key("epoch")) == (("module",), "weight", "epoch")
    assert prefix({"encoder.weight"}, {"weight"}) == "encoder."
    assert prefix({"a.weight", "b.weight"}, {"weight"}) == ""  # more than one is possible
    found: dict[str, tuple[int, ...] | None] = {"a.weight": (1,), "b.weight": (2,), "b.bias": (3,)}
    assert wrapper_prefixes.fit(found, {"weight": (2,)}).elsewhere == ("b.",)  # one layer of three is not the model
    assert wrapper_prefixes.fit(found, {"weight": (2,), "bias": (3,)}).prefix == "b."
    assert prefix({"module.module.weight"}, {"weight"}) == "module.module."
    assert prefix({"model.weight", "weight"}, {"weight"}) == ""  # the name itself is there
    assert prefix(set(), {"weight"}) == ""


def test_extra_state_loses_the_prefix_too(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        got: Any = None

        def get_extra_state(self) -> Any:
            return {"scale": torch.full((2,), 3.0), "raw": b"\xff", "n": {1}, "size": torch.Size([2]), "i": [1, (2,)]}

        def set_extra_state(self, state: Any) -> None:
            self.got = state

    wanted = Extra(2, 1)
    found, report = loaded_for_real(Extra(2, 1), saved(tmp_path / "m.pth", nn.DataParallel(wanted).state_dict()))
    assert (report.is_strict, report.unwrapping.prefix) == (True, "module.")
    theirs = wanted.get_extra_state()
    assert found.got.pop("scale").equal(theirs.pop("scale"))
    assert found.got == theirs
    assert [type(value) for value in found.got.values()] == [type(value) for value in theirs.values()]


# --- ties ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [loaded_for_real, loaded_on_meta])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_tied_parameters_are_tied_again(tmp_path: Path, load: Any, legacy: bool) -> None:
    wanted = perturbed(Tied())
    path = saved(tmp_path / "m.pth", wanted.state_dict(), _use_new_zipfile_serialization=not legacy)
    found, report = load(Tied(), path)
    assert report.is_strict
    assert found.head.weight is found.embed.weight
    assert len(list(found.parameters())) == len(list(wanted.parameters()))
    assert_same_state(found, wanted)


@pytest.mark.parametrize("load", [loaded_for_real, loaded_on_meta])
@pytest.mark.parametrize("kept", ["embed.weight", "head.weight"])
def test_a_safetensors_file_without_the_alias_loads(tmp_path: Path, load: Any, kept: str) -> None:
    wanted = perturbed(Tied())
    state = {name: t for name, t in wanted.state_dict().items() if name == kept or t is not wanted.head.weight}
    del state["head.weight" if kept == "embed.weight" else "embed.weight"]
    safetensors.torch.save_file(state, tmp_path / "m.safetensors")
    found, report = load(Tied(), tmp_path / "m.safetensors")
    assert report.is_strict
    assert found.head.weight is found.embed.weight
    assert_same_state(found, wanted)


@pytest.mark.parametrize("load", [loaded_for_real, loaded_on_meta])
def test_tied_names_that_differ_in_the_file_end_as_pytorch_leaves_them(tmp_path: Path, load: Any) -> None:
    state = {name: tensor.clone() for name, tensor in perturbed(Tied()).state_dict().items()}
    state["head.weight"] += 1
    theirs = Tied()
    theirs.load_state_dict(state)
    found, _ = load(Tied(), saved(tmp_path / "m.pth", state))
    assert found.head.weight is found.embed.weight
    assert_same_state(found, theirs)


@pytest.mark.parametrize("load", [loaded_for_real, loaded_on_meta])
def test_shared_and_lazy_modules(tmp_path: Path, load: Any) -> None:
    wanted = Unusual()
    wanted(torch.ones(1, 4))
    perturbed(wanted)
    found, report = load(Unusual(), saved(tmp_path / "m.pth", wanted.state_dict()))
    assert report.is_strict
    assert found.again is found.first.lin
    assert found.heads["right"].weight.shape == (3, 4)
    assert_same_state(found, wanted)


def test_a_lazy_module_that_gets_nothing_stays_lazy(tmp_path: Path) -> None:
    found, report = loaded_for_real(nn.LazyLinear(3), saved(tmp_path / "m.pth", {"bias": torch.ones(3)}))
    assert report.missing == ("weight",)
    assert nn.parameter.is_lazy(found.get_parameter("weight"))


# --- what loading does not change -----------------------------------------------------------------------------------


def test_the_file_is_not_written_through(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pth", perturbed(Block()).state_dict())
    before = path.read_bytes()
    found, _ = loaded_for_real(Block(), path)
    with torch.no_grad():
        for tensor in named_tensors(found).values():
            tensor.add_(1)
    assert path.read_bytes() == before


def test_no_byte_is_read_on_meta(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pth", perturbed(Block()).state_dict())
    meta, _ = loaded_on_meta(Block(), path)
    for tensor in named_tensors(meta).values():
        assert tensor.is_meta
        assert isinstance(source_of(tensor), checkpoints.Span)


def test_a_dtype_that_this_torch_does_not_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = checkpoints.read(saved(tmp_path / "m.pth", {"w": torch.empty(1, dtype=torch.bits8)}))
    monkeypatch.delattr(torch, "bits8")
    with pytest.raises(RequestError, match=r"has no dtype bits8"):
        loading.mapped(contents)


def test_the_error_for_a_file_that_records_its_model(tmp_path: Path) -> None:
    from dataclasses import replace

    from modelcli.checkpoints.record import Record

    contents = checkpoints.read(saved(tmp_path / "m.pth", {"x": torch.ones(1)}))
    record = Record("alexnet", None, 0, (), (), Blueprint((ModuleInfo("", None),), ()))
    error = LoadReport(0, missing=("w",)).refusal(replace(contents, record=record), "vgg16", strict=True)
    assert error is not None
    assert error.hint == "m.pth records its own architecture: remove --arch"
