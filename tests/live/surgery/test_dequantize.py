"""dequantize: compared with the dequantization of transformers, and with its formula in plain PyTorch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import modelcli
from modelcli.errors import RequestError
from modelcli.model.dequantized import NoBlockSizeError, block_of
from modelcli.values import dequantized
from tests.conftest import Cli
from tests.live.surgery.state_files import FILES, assert_same, other, read, write

State = dict[str, torch.Tensor]
TARGETS = ("bfloat16", "float16", "float32", "float64")
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def fp8(*shape: int, dtype: torch.dtype = E4M3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 100).to(dtype)


def scales(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=generator) * 0.01 + 1e-4).to(dtype)


def plain(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int], dtype: str) -> torch.Tensor:
    """DeepSeek's formula, block by block: elements and scale as float32, multiplied, rounded once."""
    made = weight.float()
    for row in range(scale.shape[-2]):
        for column in range(scale.shape[-1]):
            rows = slice(row * block[0], (row + 1) * block[0])
            columns = slice(column * block[1], (column + 1) * block[1])
            made[..., rows, columns] *= scale[..., row : row + 1, column : column + 1].float()
    return made.to(getattr(torch, dtype))


def of_transformers(weight: torch.Tensor, scale: torch.Tensor, dtype: str) -> torch.Tensor:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    made: torch.Tensor = Fp8Dequantize(None)._dequantize_one(weight, scale, getattr(torch, dtype))
    return made


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("dtype", TARGETS)
def test_what_transformers_makes(cli: Cli, file: str, dtype: str) -> None:
    """Blocks, one scale for a row, one for all, blocks of a row, several experts: wherever the blocks are whole."""
    pairs = {
        "blocks": (fp8(32, 48), scales(2, 3)),
        "e5m2": (fp8(32, 16, dtype=E5M2), scales(2, 1)),
        "rows": (fp8(5, 7), scales(5, 1, dtype=torch.bfloat16)),
        "whole": (fp8(5, 7), scales(1, 1)),
        "groups": (fp8(6, 32), scales(6, 2, dtype=torch.float16)),
        "powers": (fp8(32, 32), torch.tensor([[0.5, 2.0], [4.0, 0.125]]).to(torch.float8_e8m0fnu)),
        "experts": (fp8(3, 32, 16), scales(3, 2, 1)),
    }
    state = {"norm.weight": torch.ones(3).bfloat16()}
    for name, (weight, scale) in pairs.items():
        state |= {f"{name}.weight": weight, f"{name}.weight_scale_inv": scale}
    write(state, file)
    cli("dequantize", ".", dtype, "-m", file, "-o", other(file))
    wanted = {f"{name}.weight": of_transformers(*pair, dtype) for name, pair in pairs.items()}
    found = read(other(file))
    assert_same(found, {"norm.weight": state["norm.weight"], **wanted})
    if file.endswith(".pth"):
        assert list(found) == [name for name in state if not name.endswith("_scale_inv")]


@pytest.mark.parametrize("dtype", TARGETS)
@pytest.mark.parametrize("shape", [(128, 128), (300, 130), (129, 1), (1, 129), (7, 5), (256, 700), (0, 128)], ids=str)
def test_blocks_of_128_with_parts_at_the_ends(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], dtype: str
) -> None:
    """Pieces end within rows and within blocks."""
    monkeypatch.setattr(dequantized, "PIECE", 333)
    weight, scale = fp8(*shape), scales(-(-shape[0] // 128), -(-shape[1] // 128))
    state = {"a.weight": weight, "a.weight_scale_inv": scale}
    torch.save(state, "a.pth")
    cli("dequantize", ".", dtype, "--block", "128,128", "-m", "a.pth", "-o", "b.pth")
    assert_same(read("b.pth"), {"a.weight": plain(weight, scale, (128, 128), dtype)})


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (5,), (5, 1)], ids=str)
@pytest.mark.parametrize("name", ["a.weight_scale", "a.weight_scale_inv", "a.scale_weight"])
def test_scales_of_compressed_tensors_and_fbgemm(cli: Cli, shape: tuple[int, ...], name: str) -> None:
    weight, scale = fp8(5, 4), scales(*shape)
    torch.save({"a.weight": weight, name: scale}, "a.pth")
    cli("dequantize", "a", "bfloat16", "-m", "a.pth", "-o", "b.pth")
    factors = scale.reshape(-1, 1)
    assert_same(read("b.pth"), {"a.weight": (weight.float() * factors).bfloat16()})


def test_every_fp8_value_times_odd_scales(cli: Cli) -> None:
    """All patterns, NaN and Inf among them, times zero, a subnormal number, a large one and a negative one."""
    patterns = torch.arange(256, dtype=torch.uint8)
    state: State = {}
    for name, stored in (("a", E4M3), ("b", E5M2), ("c", torch.float8_e4m3fnuz)):
        state[f"{name}.weight"] = patterns.view(stored).repeat(4, 1)
        state[f"{name}.weight_scale"] = torch.tensor([0.0, 1e-42, 3e38, -0.7])
    torch.save(state, "a.pth")
    for dtype in TARGETS:
        cli("dequantize", ".", dtype, "-m", "a.pth", "-o", "b.pth", "--force")
        for name, value in read("b.pth").items():
            wanted = (state[name].float() * state[f"{name}_scale"][:, None]).to(getattr(torch, dtype))
            assert value.dtype == wanted.dtype
            assert torch.equal(value.nan_to_num(nan=7.0), wanted.nan_to_num(nan=7.0))
            assert torch.equal(value.isnan(), wanted.isnan())


def test_views_and_ties_of_a_file(cli: Cli) -> None:
    """A transposed weight, and one with two names, of which only one has a scale."""
    whole, scale = fp8(4, 6), scales(6)
    tied = fp8(3, 3)
    state = {"a.weight": whole.T, "a.weight_scale": scale, "b.weight": tied, "b.weight_scale": scales(1)}
    torch.save({**state, "c.weight": tied}, "a.pth")
    cli("dequantize", ".", "float32", "-m", "a.pth", "-o", "b.pth", "--except", "c")
    found = read("b.pth")
    wanted = {"a.weight": whole.T.float() * scale[:, None], "b.weight": tied.float() * state["b.weight_scale"]}
    assert_same(found, {**wanted, "c.weight": wanted["b.weight"]})
    assert found["b.weight"].data_ptr() == found["c.weight"].data_ptr()


def test_activation_scales_go_with_a_note(cli: Cli) -> None:
    state = {"a.weight": fp8(2, 2), "a.weight_scale": scales(1), "a.input_scale": scales(1), "a.bias": torch.ones(2)}
    state |= {"b.weight": torch.ones(2, 2), "b.input_scale": scales(1)}
    torch.save(state, "a.pth")
    told = cli("dequantize", ".", "half", "-m", "a.pth", "-o", "b.pth").err
    assert "removed a.input_scale: scales of inputs and outputs mean nothing" in told
    assert list(read("b.pth")) == ["a.weight", "a.bias", "b.weight", "b.input_scale"]


def test_what_becomes_inf_in_float16_is_counted(cli: Cli) -> None:
    torch.save({"a.weight": torch.tensor([[448.0, 1.0]]).to(E4M3), "a.weight_scale": torch.tensor([1000.0])}, "a.pth")
    assert "1 value became Inf in a.weight" in cli("dequantize", ".", "half", "-m", "a.pth", "-o", "b.pth").err


# --- block sizes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "scale", "stated", "block"),
    [
        ((256, 512), (2, 4), None, (128, 128)),
        ((576, 7168), (5, 56), None, (128, 128)),
        ((310, 131), (3, 2), None, (128, 128)),
        ((384, 384), (2, 2), (192, 192), (192, 192)),
        ((60, 60), (3, 3), None, (20, 20)),
        ((4, 8), (4, 1), (128, 128), (1, 8)),
        ((4, 8), (1, 1), (2, 2), None),
        ((2, 256, 256), (2, 2, 2), None, (128, 128)),
    ],
)
def test_block_sizes(shape: Any, scale: Any, stated: Any, block: Any) -> None:
    assert block_of(shape, scale, stated) == block


@pytest.mark.parametrize(
    ("shape", "scale", "stated", "message"),
    [
        ((384, 384), (2, 2), None, "2 blocks of 384 elements may have from 192 to 383 elements each"),
        ((10, 10), (7, 1), None, "no block size makes 7 blocks of 10 elements"),
        ((10, 10), (20, 1), None, "no block size makes 20 blocks of 10 elements"),
        ((256, 256), (2, 3), (128, 128), "blocks of 128x128 need 2x2 scales"),
        ((4, 8), (8,), None, "no block size makes 8 blocks of 4 elements"),
        ((8,), (2,), None, "the axes of the two do not fit"),
        ((3, 4, 4), (2, 1, 1), None, "the axes of the two do not fit"),
        ((4, 4), (0, 1), None, "no block size makes 0 blocks of 4 elements"),
    ],
)
def test_shapes_that_give_no_block_size(shape: Any, scale: Any, stated: Any, message: str) -> None:
    with pytest.raises(NoBlockSizeError, match=message):
        block_of(shape, scale, stated)


def test_an_ambiguous_size_is_stated_with_the_line_of_the_hint(cli: Cli) -> None:
    weight, scale = fp8(192, 192), scales(2, 2)
    torch.save({"a.weight": weight, "a.weight_scale_inv": scale}, "a.pth")
    told = cli("dequantize", ".", "bfloat16", "-m", "a.pth", "-o", "b.pth", code=2).err
    assert "dequantize . bfloat16 --block 128,128" in " ".join(told.split())
    cli("dequantize", ".", "bfloat16", "--block", "128,128", "-m", "a.pth", "-o", "b.pth")
    assert_same(read("b.pth"), {"a.weight": plain(weight, scale, (128, 128), "bfloat16")})


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a.weight": fp8(4, 4)}, "neither a.weight_scale_inv nor a.weight_scale is there"),
        ({"a.weight": torch.ones(4, 4)}, "nothing to dequantize: . has no fp8 weights with scales"),
        ({"a.weight": fp8(4, 4), "a.weight_scale": torch.ones(1, dtype=torch.int32)}, "a.weight_scale is int32"),
        ({"a.weight": fp8(4, 4), "a.weight_scale": scales(3)}, "[4, 4] and its scale a.weight_scale [3]"),
        ({"a.weight": fp8(8), "a.weight_scale": scales(2)}, "the axes of the two do not fit"),
        ({"a.weight": fp8(4, 4), "a.weight_scale": scales(0)}, "its scale a.weight_scale [0]"),
        ({"a.weight": fp8(4, 4), "a.weight_scale": scales(1), "a.weight_zero_point": scales(1)}, "an unknown method"),
        ({"a.qweight": torch.ones(4, 4, dtype=torch.int32), "a.scales": scales(1, 4)}, "GPTQ or AWQ"),
        (
            {
                "a.qweight": torch.ones(4, 4, dtype=torch.int32),
                "a.scales": scales(1, 4),
                "a.g_idx": torch.ones(4, dtype=torch.int32),
            },
            "a.qweight is quantized by GPTQ, which dequantize does not know",
        ),
        ({"a.weight": torch.ones(8, 1, dtype=torch.uint8), "a.weight.absmax": scales(1)}, "by bitsandbytes"),
        ({"a.weight": torch.ones(8, 1, dtype=torch.int8), "a.SCB": scales(8)}, "by bitsandbytes"),
        (
            {
                "a.weight": torch.ones(8, 8, dtype=torch.uint8),
                "a.weight_scale": fp8(8, 1),
                "a.weight_scale_2": scales(),
            },
            "by NVFP4",
        ),
        (
            {"a.w_blocks": torch.ones(8, 2, 16, dtype=torch.uint8), "a.w_scales": torch.ones(8, 2, dtype=torch.uint8)},
            "a.w_blocks is quantized by MXFP4",
        ),
        (
            {"a.weight_packed": torch.ones(2, 4, dtype=torch.int32), "a.weight_scale": scales(4)},
            "by compressed-tensors",
        ),
    ],
)
def test_what_is_refused(cli: Cli, state: State, message: str) -> None:
    torch.save(state, "a.pth")
    assert message in " ".join(cli("dequantize", ".", "bfloat16", "-m", "a.pth", "-o", "b.pth", code=2).err.split())
    assert not Path("b.pth").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((".",), "dequantize takes at least one target and a dtype"),
        ((".", "int8"), "'int8' is not a dtype for weights without scales"),
        ((".", "float8_e4m3fn"), "'float8_e4m3fn' is not a dtype for weights without scales"),
        ((".", "half", "--block", "128"), "--block takes the rows and the columns of a block, not '128'"),
        ((".", "half", "--block", "0,1"), "'0,1' is no list of sizes"),
    ],
)
def test_words_that_cannot_be_read(cli: Cli, words: tuple[str, ...], message: str) -> None:
    torch.save({"a.weight": fp8(2, 2), "a.weight_scale": scales(1)}, "a.pth")
    assert message in " ".join(cli("dequantize", *words, "-m", "a.pth", code=2).err.split())


def test_two_scales_of_one_tensor(cli: Cli) -> None:
    weight = fp8(2, 2)
    state = {"a.weight": weight, "a.weight_scale": scales(1), "b.weight": weight, "b.weight_scale": scales(1, seed=9)}
    torch.save(state, "a.pth")
    told = " ".join(cli("dequantize", ".", "half", "-m", "a.pth", "-o", "b.pth", code=2).err.split())
    assert "b.weight has two scales, a.weight_scale and b.weight_scale" in told
    assert "untie b.weight" in told
    cli("apply", "-m", "a.pth", "-e", "untie b.weight", "-e", "dequantize . half", "-o", "b.pth")
    wanted = {f"{name}.weight": (weight.float() * state[f"{name}.weight_scale"]).half() for name in "ab"}
    assert_same(read("b.pth"), wanted)


def test_a_model_is_refused() -> None:
    with pytest.raises(RequestError, match="nothing to dequantize"):
        modelcli.apply(nn.Linear(2, 2), "dequantize . bfloat16")
    module = nn.Linear(2, 2, bias=False)
    module.weight = nn.Parameter(fp8(2, 2), requires_grad=False)
    module.register_buffer("weight_scale", scales(1))
    with pytest.raises(RequestError, match="dequantize changes the keys of a state dict, and Linear takes its tensors"):
        modelcli.apply(module, "dequantize . bfloat16")


@pytest.mark.parametrize(("value", "told"), [(float("nan"), True), (float("inf"), True), (0.0, False)])
def test_a_scale_that_is_not_finite_is_told(cli: Cli, value: float, told: bool) -> None:
    torch.save({"a.weight": fp8(4, 4), "a.weight_scale": torch.tensor([1.0, value, 1.0, 1.0])}, "a.pth")
    err = cli("dequantize", ".", "bfloat16", "-m", "a.pth", "-o", "b.pth").err
    assert ("a.weight was multiplied by scales that are NaN or Inf" in err) == told
    found = read("b.pth")["a.weight"]
    assert bool(found.isfinite().all()) != told


# --- records, recipes and scripts ------------------------------------------------------------------------------------


def test_the_hint_of_cast_works(cli: Cli) -> None:
    torch.save({"a.weight": fp8(4, 4), "a.weight_scale": scales(1), "b": torch.ones(2)}, "a.pth")
    told = " ".join(cli("cast", ".", "bfloat16", "-m", "a.pth", "-o", "b.pth", code=2).err.split())
    assert "apply the scales first: dequantize . bfloat16" in told
    cli("apply", "-m", "a.pth", "-e", "dequantize . bfloat16", "-e", "cast . bfloat16", "-o", "b.pth")
    assert {value.dtype for value in read("b.pth").values()} == {torch.bfloat16}


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_its_script_does_the_same_without_modelcli(cli: Cli, many: bool, dtype: str) -> None:
    tied = fp8(4, 4, seed=5)
    state: State = {"t.weight": tied, "t.weight_scale": scales(1), "u.weight": tied}
    for number in range(12 if many else 1):
        state |= {f"a.{number}.weight": fp8(40, 20), f"a.{number}.weight_scale_inv": scales(3, 2)}
        state |= {f"b.{number}.weight": fp8(4, 2), f"b.{number}.weight_scale": scales(4)}
        state |= {f"c.{number}.weight": fp8(4, 2), f"c.{number}.weight_scale": scales(1, 1)}
        state |= {f"d.{number}.weight": fp8(4, 2), f"d.{number}.weight_scale": scales(4, 1)}
        state |= {f"d.{number}.input_scale": scales(1)}
    torch.save(state, "a.pth")
    edits = ("-e", f"dequantize '{{a,b,c,d}}.**' t {dtype} --block 16,16")
    cli("apply", "-m", "a.pth", *edits, "-o", "by-edit.pth")
    Path("made.py").write_text(cli("script", "-m", "a.pth", *edits, "-o", "by-script.pth").out)
    assert "modelcli" not in Path("made.py").read_text().partition("import torch")[2]
    subprocess.run([sys.executable, "made.py"], check=True)
    one, two = read("by-edit.pth"), read("by-script.pth")
    assert list(one) == list(two)
    assert_same(two, one)


def test_the_recorded_line_has_no_wildcards_and_states_the_block_size(cli: Cli) -> None:
    save_file({"a.weight": fp8(192, 192), "a.weight_scale_inv": scales(2, 2), "b": torch.ones(1)}, "a.safetensors")
    cli("dequantize", "*.*", "half", "--block", "128,128", "-m", "a.safetensors", "-o", "b.safetensors")
    line = "dequantize a.weight float16 --block 128,128"
    assert line.encode() in Path("b.safetensors").read_bytes()
    cli("apply", "-m", "a.safetensors", "-e", line, "-o", "c.safetensors")
    assert_same(read("c.safetensors"), read("b.safetensors"))
