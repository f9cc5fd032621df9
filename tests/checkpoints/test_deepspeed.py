"""Folders of DeepSpeed are read as the model that zero_to_fp32.py makes of them, and lies in them are errors.

The tests write the files as DeepSpeed 0.19 does, from its own programs `zero_to_fp32.py` and `ds_to_universal.py`. They
do not need DeepSpeed: it is not installed with the other tools, because it builds itself where it is installed.
"""

from __future__ import annotations

import enum
import itertools
import os
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from modelcli import checkpoints
from modelcli.checkpoints import TensorEntry
from modelcli.errors import FileFormatError, ModelcliError, RequestError
from tests.checkpoints.test_distributed import SYSTEM, Marker, tensor_of
from tests.conftest import Cli

STEP = "global_step500"


class LossScaler:
    """Stands for the class of DeepSpeed with this name."""


class fragment_address(NamedTuple):
    numel: int
    start: int


class ZeroStageEnum(int, enum.Enum):
    optimizer_states = 1
    gradients = 2
    weights = 3


HOMES: Mapping[type, str] = {
    LossScaler: "deepspeed.runtime.fp16.loss_scaler",
    fragment_address: "deepspeed.utils.tensor_fragment",
    ZeroStageEnum: "deepspeed.runtime.zero.config",
}


@pytest.fixture(autouse=True)
def deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `torch.save` find the classes of DeepSpeed under their names while the files are written."""
    for kind, home in HOMES.items():
        module = types.ModuleType(home)
        setattr(module, kind.__name__, kind)
        for parent in itertools.accumulate(home.split(".")[:-1], "{}.{}".format):
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        monkeypatch.setitem(sys.modules, home, module)
        monkeypatch.setattr(kind, "__module__", home)


def values(*shape: int, start: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    count = torch.Size(shape).numel()
    return ((torch.arange(count) + start) / 3).reshape(shape).to(dtype)


GROUPS = [
    {"embed.weight": values(11, 6), "body.0.weight": values(7, 5, start=100), "one": values(1, start=7)},
    {"body.0.bias": values(7, start=200), "scale": torch.tensor(1.25)},
]
FROZEN = {"frozen.weight": values(5, 6, start=300, dtype=torch.bfloat16), "frozen.bias": values(5, start=400)}
BUFFERS = {
    "norm.mean": values(3, start=500),
    "bf16": values(5, start=1, dtype=torch.bfloat16),
    "half": torch.tensor([[0.1, -2.0, 65504.0], [6e-8, float("inf"), -0.0]], dtype=torch.float16).t(),
    "double": torch.tensor([1 / 3, 1e300, -1e-300], dtype=torch.float64),
    "mask": torch.tensor([True, False]),
    "steps": torch.tensor(7),
}
SHARED = {"head.weight": "embed.weight"}


def part_of(tensor: torch.Tensor, rank: int, world: int) -> torch.Tensor:
    """Return the part of a rank, as ZeRO-3 cuts tensors: all parts of the same length, the last ones padded."""
    length = -(-tensor.numel() // world)
    padded = torch.cat([tensor.flatten(), torch.full((length * world - tensor.numel(),), 9e9, dtype=tensor.dtype)])
    return padded[rank * length : (rank + 1) * length].clone()


def flat_of(group: Mapping[str, torch.Tensor], rank: int, world: int, paddings: Sequence[int]) -> torch.Tensor:
    """Return the part of a rank, as ZeRO-1 and ZeRO-2 cut a group: all of it in a row, the last part unpadded."""
    pieces = [
        torch.cat([tensor.flatten(), torch.full((padding,), 9e9)])
        for tensor, padding in zip(group.values(), paddings, strict=True)
    ]
    row = torch.cat(pieces)
    length = 2 * world * -(-row.numel() // (2 * world)) // world
    return row[rank * length : (rank + 1) * length].clone()


def write(home: Path, stage: int, world: int, *, paddings: Sequence[Sequence[int]] | None = None, cut: int = 0) -> Path:
    """Write a run of one step. `cut` is where the vectors of ZeRO-3 are cut into groups. Returns the step's folder."""
    step = home / STEP
    step.mkdir(parents=True)
    (home / "latest").write_text(STEP)
    (home / "zero_to_fp32.py").write_text("")
    trained = {name: tensor for group in GROUPS for name, tensor in group.items()}
    owned = {**trained, **FROZEN, "head.weight": trained["embed.weight"]}
    module = {
        name: (torch.empty(0) if stage == 3 else tensor).bfloat16() if name in owned else tensor
        for name, tensor in {**BUFFERS, **owned}.items()
    }
    shapes = [OrderedDict((name, tensor.shape) for name, tensor in group.items()) for group in GROUPS]
    for rank in range(world if stage == 3 else 1):
        frozen = FROZEN if stage < 3 else {name: part_of(tensor, rank, world) for name, tensor in FROZEN.items()}
        states = {
            "module": OrderedDict(module),
            "buffer_names": list(BUFFERS),
            "optimizer": None,
            "param_shapes": shapes,
            "frozen_param_shapes": OrderedDict((name, tensor.shape) for name, tensor in FROZEN.items()),
            "frozen_param_fragments": OrderedDict(frozen),
            "shared_params": dict(SHARED),
            "lr_scheduler": None,
            "ds_config": {"zero_optimization": {"stage": stage}},
            "ds_version": "0.19.8",
            "dp_world_size": world,
            "mp_world_size": 1,
            "epoch": 3,
        }
        who = f"zero_pp_rank_{rank}_mp_rank_00" if stage == 3 else "mp_rank_00"
        torch.save(states, step / f"{who}_model_states.pt")
    for rank in range(world):
        optimizer: dict[str, Any] = {
            "loss_scaler": LossScaler(),
            "zero_stage": ZeroStageEnum(stage),
            "partition_count": world if stage == 3 else [world] * len(GROUPS),
            "base_optimizer_state": {"state": {0: {"exp_avg": torch.zeros(50)}}},
            "param_slice_mappings": [OrderedDict(w=fragment_address(3, 5))],
        }
        if stage == 3:
            vector = torch.cat([part_of(tensor, rank, world) for tensor in trained.values()])
            optimizer["fp32_flat_groups"] = [vector[:cut].clone(), vector[cut:].clone()] if cut else [vector]
        else:
            behind = paddings or [[0] * len(group) for group in GROUPS]
            optimizer["single_partition_of_fp32_groups"] = [
                flat_of(group, rank, world, after) for group, after in zip(GROUPS, behind, strict=True)
            ]
            if paddings is not None:
                optimizer["param_alignment_paddings"] = paddings
        torch.save(
            {"optimizer_state_dict": optimizer, "ds_config": {}, "ds_version": "0.19.8"},
            step / f"{'bf16_' if stage == 1 else ''}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
        )
    return step


def wanted() -> dict[str, torch.Tensor]:
    """Return the model, in the order and the dtypes of zero_to_fp32.py."""
    buffers = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in BUFFERS.items()}
    trained = {name: tensor for group in GROUPS for name, tensor in group.items()}
    return {**buffers, **FROZEN, **trained, "head.weight": trained["embed.weight"]}


def assert_is_the_model(found: Mapping[str, Any]) -> None:
    """Require the tensors of `wanted`, bit by bit, in its order."""
    expected = wanted()
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        one = tensor_of(found[name]) if isinstance(found[name], TensorEntry) else found[name]
        assert (one.dtype, one.shape) == (tensor.dtype, tensor.shape), name
        assert (
            one.contiguous().numpy(force=True).tobytes() == tensor.contiguous().numpy(force=True).tobytes()
            if (tensor.dtype != torch.bfloat16)
            else torch.equal(one, tensor)
        ), name


@pytest.mark.parametrize(
    ("stage", "world", "how"),
    [
        (1, 2, {}),
        (2, 3, {"paddings": [[2, 0, 5], [1, 0]]}),
        (2, 1, {}),
        (3, 2, {"cut": 20}),
        (3, 3, {}),
        (3, 200, {}),  # more ranks than some tensors have elements
    ],
)
def test_every_stage_gives_the_model(folder: Path, stage: int, world: int, how: dict[str, Any]) -> None:
    step = write(folder / "run", stage, world, **how)
    for reference in (folder / "run", step):
        contents = checkpoints.read(reference)
        assert_is_the_model(contents.tensors)
        assert (contents.path, contents.format, contents.foreign) == (step, "deepspeed", ())
        ranks = "1 rank" if world == 1 else f"{world} ranks"
        assert contents.notes == (
            f"14 tensors of {STEP}, from {ranks} of DeepSpeed ZeRO-{stage}, as zero_to_fp32.py joins them; "
            "the optimizer states are left out",
        )
    infos = contents.infos()
    assert {name for name, info in infos.items() if info.kind == "buffer"} == set(BUFFERS)
    assert {name for name, info in infos.items() if info.requires_grad is False} == set(FROZEN)
    assert {name for name, info in infos.items() if info.requires_grad} == {*GROUPS[0], *GROUPS[1], "head.weight"}
    assert infos["head.weight"].tied_to == "embed.weight"


def test_commands(cli: Cli, folder: Path) -> None:
    write(folder / "run", 3, 2)
    document = cli("summary", "run", "--json").json
    assert document["totals"]["params"] == sum(tensor.numel() for name, tensor in wanted().items() if name in TENSORS)
    assert document["totals"]["trainable_params"] == document["totals"]["params"] - 35
    frozen = cli("params", f"run/{STEP}/", "--frozen", "--json").json["tensors"]
    assert [row["name"] for row in frozen] == list(FROZEN)
    cli("save", "out/", "-m", f"run/{STEP}")
    written = load_file("out/model-00001-of-00001.safetensors")
    assert_is_the_model({name: written[SHARED.get(name, name)] for name in wanted()})
    cli("save", "out.pth", "-m", "run")
    state = torch.load("out.pth", weights_only=True)
    assert {type(tensor) for tensor in state.values()} == {torch.Tensor}
    assert_is_the_model(state)
    assert state["head.weight"].data_ptr() == state["embed.weight"].data_ptr()
    for model in ("out/", "out.pth"):
        rows = cli("params", model, "--frozen", "--json").json["tensors"]
        assert [row["name"] for row in rows] == list(FROZEN)
    hashes = {cli("hash", model, "--json").json["hash"] for model in ("run", "out.pth", "out/")}
    assert len(hashes) == 1
    cli("cast", "frozen", "float32", "-m", "run", "-o", "cast.safetensors")
    assert load_file("cast.safetensors")["frozen.weight"].equal(FROZEN["frozen.weight"].float())
    assert "which is read as one model" in cli("params", "run", "--key", "module", code=2).err


TENSORS = {*FROZEN, *GROUPS[0], *GROUPS[1]}


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change what a file holds; of optimizer states their inner dict."""
    states = torch.load(path, weights_only=False)
    change(states.get("optimizer_state_dict", states))
    torch.save(states, path)


def test_frozen_parameters_that_zero_1_leaves_out_are_added_behind(folder: Path) -> None:
    step = write(folder / "run", 1, 2)
    none = {"frozen_param_shapes": None, "frozen_param_fragments": None}
    rewritten(step / "mp_rank_00_model_states.pt", lambda states: states.update(none))
    rewritten(step / "mp_rank_00_model_states.pt", lambda states: states["module"].update({"0._extra_state": {"a": 1}}))
    contents = checkpoints.read(step)
    rest = [name for name in wanted() if name not in FROZEN]
    assert list(contents.tensors) == [*rest, *FROZEN]
    for name, tensor in FROZEN.items():
        entry = contents.tensors[name]
        assert isinstance(entry, TensorEntry)
        assert torch.equal(tensor_of(entry), tensor.bfloat16())
        assert contents.trained[name] is False
    assert "frozen.weight, frozen.bias are as in the model states" in contents.notes[1]
    assert contents.notes[2] == "0._extra_state in its model states is left out: no tensors"
    assert contents.unseen == ("0._extra_state",)


@pytest.mark.parametrize("stage", [2, 3])
def test_universal_checkpoints(folder: Path, stage: int) -> None:
    step = write(folder / "run", stage, 3)
    for path in step.glob("*optim*"):
        path.unlink()
    for group in GROUPS:
        for name, tensor in group.items():
            (step / "zero" / name).mkdir(parents=True)
            torch.save(
                {"cat_dim": 0, "param": tensor} if stage == 2 else tensor.flatten(), step / f"zero/{name}/fp32.pt"
            )
    contents = checkpoints.read(step)
    assert_is_the_model(contents.tensors)
    (folder / "run/latest").rename(folder / "run/latest_universal")
    assert list(checkpoints.read(folder / "run").tensors) == list(wanted())
    torch.save({"param": torch.ones(3)}, step / "zero/body.0.bias/fp32.pt")
    with pytest.raises(
        FileFormatError, match=r"fp32.pt is damaged: it has a tensor of shape \[3\], but should .* \[7\]"
    ):
        checkpoints.read(step)
    (step / "zero/body.0.bias/fp32.pt").unlink()
    with pytest.raises(FileFormatError, match=r"names the file 'zero/body.0.bias/fp32.pt', which does not exist"):
        checkpoints.read(step)
    rewritten(
        step / first(stage, "model"), lambda states: states["param_shapes"][0].update({"../../x": torch.Size([1])})
    )
    with pytest.raises(FileFormatError, match="outside its folder"):
        checkpoints.read(step)


def test_a_folder_without_optimizer_states(folder: Path) -> None:
    step = write(folder / "run", 2, 2)
    for path in step.glob("*optim*"):
        path.unlink()
    contents = checkpoints.read(folder / "run")
    assert contents.notes[0].endswith("took the weights of mp_rank_00_model_states.pt, in the dtype of training")
    assert {entry.dtype for name, entry in contents.tensors.items() if name in TENSORS} == {"bfloat16"}
    step = write(folder / "other", 3, 2)
    for path in step.glob("*optim*"):
        path.unlink()
    with pytest.raises(FileFormatError, match=r"holds no optimizer states \(\*_optim_states.pt\), in which ZeRO-3"):
        checkpoints.read(folder / "other")


def test_what_is_not_joined_is_named(cli: Cli, folder: Path) -> None:
    step = write(folder / "run", 2, 2)
    model = step / "mp_rank_00_model_states.pt"
    rewritten(model, lambda states: states.update(mp_world_size=4))
    assert (
        "one of the 4 parts into which DeepSpeed's model parallelism splits the model"
        in cli("params", "run", code=2).err
    )
    for name, says in (
        ("mp_rank_01_model_states.pt", "the parts of 2 ranks of model parallelism (mp_rank_00, mp_rank_01)"),
        ("layer_3_expert_1_mp_rank_00_model_states.pt", "the experts of DeepSpeed's mixture of experts"),
        (
            "layer_03-model_00-model_states.pt",
            "the layers of a pipeline of DeepSpeed (layer_03-model_00-model_states.pt)",
        ),
    ):
        (step / name).write_bytes(b"")
        for reference in ("run", step):
            error = cli("params", reference, code=2).err
            assert says in error
            assert "load it with the program that trained it" in error


def test_the_step_of_a_run(cli: Cli, folder: Path) -> None:
    step = write(folder / "run", 2, 1)
    (folder / "run/latest").unlink()
    assert checkpoints.read(folder / "run").path == step
    step.rename(folder / "run/global_step600")
    write(folder / "other", 2, 1).rename(step)
    error = cli("params", "run", code=2).err
    assert "run holds 2 steps of DeepSpeed and no file latest\n" in error
    assert "name one of run/global_step500, run/global_step600" in error
    for text in ("../other", "/etc", "..", ".", "", "a/b", "C:x", "\udcff", "x" * 5000):
        (folder / "run/latest").write_text(text, errors="surrogateescape")
        assert (
            "run/latest is damaged: it should hold the name of a folder beside it" in cli("params", "run", code=4).err
        )
    (folder / "run/latest").write_text("global_step7")
    assert "run/latest names global_step7, and there is no such folder" in cli("params", "run", code=4).err
    (folder / "run/latest").write_text("global_step600\n")
    assert checkpoints.read(folder / "run").path == folder / "run/global_step600"
    (folder / "run/pytorch_model.bin").write_bytes(b"")
    assert "pytorch_model.bin is empty" in cli("params", "run", code=4).err
    (folder / "else").mkdir()
    (folder / "else/latest").write_text("../run")
    with pytest.raises(RequestError, match="folder without an index of shards"):
        checkpoints.read(folder / "else")


def first(stage: int, what: str) -> str:
    return (
        "mp_rank_00_model_states.pt" if what == "model" and stage < 3 else f"zero_pp_rank_0_mp_rank_00_{what}_states.pt"
    )


LAST = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
FLAT = {2: "single_partition_of_fp32_groups", 3: "fp32_flat_groups"}


def cut_off(states: dict[str, Any], stage: int, count: int) -> None:
    states[FLAT[stage]][0] = states[FLAT[stage]][0][:count].clone()


@pytest.mark.parametrize(
    ("stage", "file", "change", "message"),
    [
        (
            2,
            "model",
            lambda s: s["param_shapes"][0].update(w=torch.Size([9])),
            "and w of shape [9] in mp_rank_00_model_states.pt would end at 111",
        ),
        (
            2,
            "model",
            lambda s: s["param_shapes"][0].update({"one": torch.Size([500])}),
            "one of shape [500] in mp_rank",
        ),
        (2, "model", lambda s: s["param_shapes"][0].update({"one": (2**62, 4)}), "has 2^63 or more elements"),
        (2, "model", lambda s: s["param_shapes"][0].update({"one": (-1,)}), "the shape of 'one' is wrong"),
        (2, "model", lambda s: s["param_shapes"][0].update({"one": 7}), "the shape of 'one' is wrong"),
        (2, "model", lambda s: s["param_shapes"][0].update({"one": (1,) * 100}), "100 dimensions; the limit is 64"),
        (2, "model", lambda s: s["param_shapes"].pop(), "2 groups of parameters, but mp_rank_00_model_states.pt has"),
        (2, "model", lambda s: s["param_shapes"][1].update({"one": torch.Size([0])}), "names the tensor one twice"),
        (
            2,
            "model",
            lambda s: s["param_shapes"][1].update({7: s["param_shapes"][1].pop("scale")}),
            "a tensor is 7, not",
        ),
        (2, "model", lambda s: s.update(param_shapes=None), "param_shapes should be a list"),
        (2, "model", lambda s: s.update(param_shapes=[7]), "param_shapes[0] should be a dict"),
        (2, "model", lambda s: s.update(module=None), "module should be a dict"),
        (2, "model", lambda s: s.update(buffer_names=None), "buffer_names should be a list"),
        (2, "model", lambda s: s["module"].update(bf16="x"), "the buffer 'bf16' is not a dense tensor"),
        (2, "model", lambda s: s.update(shared_params={"a": 7}), "shared_params should map names to names"),
        (2, "model", lambda s: s.update(shared_params=[7]), "shared_params should consist of pairs"),
        (2, "model", lambda s: s["frozen_param_fragments"].pop("frozen.bias"), "has no dense tensor 'frozen.bias'"),
        (2, "model", lambda s: s.update(frozen_param_fragments=None), "frozen_param_fragments should be a dict"),
        (2, "optim", lambda s: s.update(zero_stage=7), "its zero_stage is 7, not 1, 2 or 3"),
        (2, "optim", lambda s: s.update(zero_stage=True), "its zero_stage is True, not 1, 2 or 3"),
        (
            2,
            "optim",
            lambda s: s.update(partition_count=3),
            "says that 3 ranks wrote global_step500, but the optimizer",
        ),
        (
            2,
            "optim",
            lambda s: s.update(partition_count=10**12),
            "but the optimizer states of rank 2, 3, 4, 5 and 999,",
        ),
        (2, "optim", lambda s: s.update(partition_count=1), "but there are 2 files of optimizer states"),
        (2, "optim", lambda s: s.update(partition_count=[]), "its partition_count is a list, not a number of ranks"),
        (2, "optim", lambda s: cut_off(s, 2, 40), "the vectors of group 0 have 90 elements"),
        (2, "optim", lambda s: s[FLAT[2]].pop(), "it has 2 groups of parameters, but rank 0 has 1"),
        (2, "optim", lambda s: s.pop(FLAT[2]), "single_partition_of_fp32_groups should be a list"),
        (2, "optim", lambda s: s[FLAT[2]].__setitem__(0, torch.ones(2, 3)), "_groups[0] should be a vector"),
        (2, "optim", lambda s: s[FLAT[2]].__setitem__(0, torch.ones(99)[::2]), "_groups[0] should be a vector"),
        (
            2,
            "optim",
            lambda s: s[FLAT[2]].__setitem__(0, s[FLAT[2]][0].half()),
            "is float32, but that of rank 0 is float",
        ),
        (2, "optim", lambda s: s.update(param_alignment_paddings=[[0]]), "should have a list for each group"),
        (2, "optim", lambda s: s.update(param_alignment_paddings=[[0], [0]]), "paddings[0] should have 3 numbers"),
        (2, "optim", lambda s: s.update(param_alignment_paddings=[[0, -9, 0], [0, 0]]), "should have 3 numbers"),
        (3, "optim", lambda s: cut_off(s, 3, 40), "its group 0 has 57 elements, but that of rank 0 has 40"),
        (3, "model", lambda s: s["param_shapes"][0].update(w=torch.Size([9])), "need 62 on each of 2 ranks"),
        (
            3,
            "model",
            lambda s: s["frozen_param_shapes"].update({"frozen.bias": torch.Size([7])}),
            "but should be float32",
        ),
        (
            3,
            "optim",
            lambda s: s[FLAT[3]].append(torch.ones(1).half()),
            "it has 1 groups of parameters, but rank 0 has 2",
        ),
    ],
)
def test_states_that_do_not_agree_are_errors(
    folder: Path, stage: int, file: str, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    step = write(folder / "run", stage, 2)
    rewritten(step / first(stage, file), change)
    with pytest.raises(FileFormatError) as error:
        checkpoints.read(folder / "run")
    assert message in error.value.message
    assert STEP in error.value.message


def test_missing_files_are_named(folder: Path) -> None:
    for stage, file, message in (
        (2, LAST, "but the optimizer states of rank 1 are missing"),
        (2, first(2, "model"), "has no file mp_rank_00_model_states.pt"),
        (2, first(2, "optim"), "has no file zero_pp_rank_0_mp_rank_00_optim_states.pt"),
        (3, "zero_pp_rank_1_mp_rank_00_model_states.pt", "has no file zero_pp_rank_1_mp_rank_00_model_states.pt"),
    ):
        step = write(folder / file / str(stage), stage, 2)
        (step / file).unlink()
        with pytest.raises(FileFormatError, match=message):
            checkpoints.read(step)
        (step / file).write_bytes(b"not a checkpoint")
        with pytest.raises(FileFormatError, match=f"{file} is damaged: it should be a file that torch.save wrote"):
            checkpoints.read(step)
    (step / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"")
    with pytest.raises(FileFormatError, match="two files of the same rank"):
        checkpoints.read(step)


def test_damaged_files(folder: Path) -> None:
    """Bytes that are cut off or changed: an error of modelcli or a model, never another exception."""
    step = write(folder / "run", 2, 2)
    refused = 0
    for path in (step / first(2, "model"), step / LAST):
        data = path.read_bytes()
        cases = [data[: len(data) * number // 17] for number in range(17)]
        for number in range(60):
            place = len(data) * number // 60
            cases.append(data[:place] + bytes([data[place] ^ 1 << number % 8]) + data[place + 1 :])
        for case in cases:
            path.write_bytes(case)
            try:
                for entry in checkpoints.read(step).tensors.values():
                    assert isinstance(entry, TensorEntry)
                    entry.storage.bytes()
            except ModelcliError:
                refused += 1
        path.write_bytes(data)
    assert refused > 40
    assert_is_the_model(checkpoints.read(step).tensors)


def test_objects_in_the_states_are_named_and_not_made(cli: Cli, folder: Path) -> None:
    step = write(folder / "run", 3, 2)
    marker = folder / "marker"
    rewritten(step / LAST, lambda states: states.update(loss_scaler=Marker(marker)))
    assert checkpoints.read(step).foreign == (SYSTEM,)
    assert SYSTEM in cli("params", "run").err
    assert SYSTEM in cli("save", "out.pth", "-m", "run", code=3).err
    cli("check", "run", "--safe", code=1)
    cli("save", "out.pth", "-m", "run", "--tensors-only")
    assert_is_the_model(torch.load("out.pth", weights_only=True))
    assert not marker.exists()


def test_names_with_odd_characters(cli: Cli, folder: Path) -> None:
    step = write(folder / "run", 2, 1)
    odd = "a/../b\n\x1b[31m[bold]$(x)"

    def change(states: dict[str, Any]) -> None:
        shapes = states["param_shapes"][0]
        states["param_shapes"][0] = OrderedDict((odd if name == "one" else name, size) for name, size in shapes.items())
        states["module"][odd] = states["module"].pop("one")

    rewritten(step / first(2, "model"), change)
    rows = {row["name"]: row["values"] for row in cli("params", "run", "--values", "--json").json["tensors"]}
    assert rows[odd] == GROUPS[0]["one"].tolist()
    assert "\x1b" not in cli("params", "run").out


def test_states_in_the_old_format_of_torch_save(folder: Path) -> None:
    step = write(folder / "run", 3, 2)
    for path in step.iterdir():
        states = torch.load(path, weights_only=False)
        torch.save(states, path, _use_new_zipfile_serialization=False)
    assert_is_the_model(checkpoints.read(step).tensors)


@pytest.mark.skipif(not hasattr(os, "copy_file_range"), reason="this system does not copy parts of files")
def test_parts_of_ranks_are_copied_by_the_system(cli: Cli, folder: Path) -> None:
    """What is read and written instead would fill the holes of a sparse file."""
    step = folder / STEP
    step.mkdir()
    side, nbytes = 4096, 4096 * 4096 * 4
    states = {
        "module": {"w": torch.empty(0)},
        "buffer_names": [],
        "param_shapes": [{"w": torch.Size([side, side])}],
        "shared_params": {},
    }
    for rank in range(4):
        name = f"zero_pp_rank_{rank}_mp_rank_00"
        torch.save(states, step / f"{name}_model_states.pt")
        vector = torch.empty(side * side // 4)
        with torch.serialization.skip_data():
            torch.save(
                {"optimizer_state_dict": {"zero_stage": 3, "partition_count": 4, "fp32_flat_groups": [vector]}},
                step / f"{name}_optim_states.pt",
            )
    source = step / first(3, "optim")
    if 512 * source.stat().st_blocks > nbytes // 8:
        pytest.skip("this file system has no holes")
    cli("save", "out.safetensors", "-m", STEP)
    out = Path("out.safetensors").stat()
    assert out.st_size > nbytes
    assert 512 * out.st_blocks < nbytes // 8


def test_the_optimizer_of_bf16_states_no_stage(folder: Path) -> None:
    """zero_to_fp32.py refuses such states; they are those of ZeRO-1."""
    step = write(folder / "run", 1, 2)
    for path in step.glob("*optim*"):
        rewritten(path, lambda states: states.pop("zero_stage"))
    assert_is_the_model(checkpoints.read(step).tensors)


def test_states_may_be_links_to_outside_and_the_step_that_latest_names_may_not(folder: Path) -> None:
    """The states are found by listing their folder, so a link is the user's own; `latest` is a file of the run."""
    step = write(folder / "run", 3, 2)
    links = folder / "links" / STEP
    links.mkdir(parents=True)
    for path in step.iterdir():
        (links / path.name).symlink_to(path)
    assert_is_the_model(checkpoints.read(links).tensors)
    (folder / "other").mkdir()
    (folder / "other" / STEP).symlink_to(step)
    assert_is_the_model(checkpoints.read(folder / "other").tensors)
    (folder / "other" / "latest").write_text(STEP)
    with pytest.raises(FileFormatError, match="should hold the name of a folder beside it"):
        checkpoints.read(folder / "other")
