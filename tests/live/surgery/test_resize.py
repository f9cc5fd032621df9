"""`resize` on embeddings, with ties, flags and dtypes. The tests of the providers resize models of libraries."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import modelcli
from modelcli.errors import RequestError
from modelcli.live.surgery import seed_of
from tests.conftest import Cli


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 4, padding_idx=15)
        self.head = nn.Linear(4, 20)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("size", [25, 12])
def test_old_rows_are_kept_and_ties_and_flags_stay(size: int) -> None:
    model = Tied()
    model.embed.weight.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modelcli.apply(model, f"resize embed head vocab_size={size}")
    assert model.embed.weight is model.head.weight
    assert not model.embed.weight.requires_grad
    assert model.head.bias.requires_grad
    kept = min(size, 20)
    assert all(torch.equal(value[:kept], before[key][:kept]) for key, value in model.state_dict().items())
    assert (model.embed.num_embeddings, model.head.out_features, model.embed.weight.shape[0]) == (size, size, size)
    assert model.embed.padding_idx == (15 if size > 15 else None)
    assert model.head(model.embed(torch.tensor([0, size - 1]))).shape == (2, size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_new_rows_equal_transformers(dtype: torch.dtype) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = transformers.LlamaForCausalLM(config).to(dtype)
    mine = nn.ModuleDict({"embed": nn.Embedding(40, 8), "head": nn.Linear(8, 40, bias=False)}).to(dtype)
    mine["embed"].weight.data = model.model.embed_tokens.weight.detach().clone()
    mine["head"].weight.data = model.lm_head.weight.detach().clone()
    modelcli.apply(mine, "resize embed head vocab_size=50")
    torch.manual_seed(seed_of(0, 1))
    model.resize_token_embeddings(50)
    assert torch.equal(mine["embed"].weight, model.model.embed_tokens.weight)
    assert torch.equal(mine["head"].weight, model.lm_head.weight)


def test_the_written_file_has_what_a_real_module_gets(cli: Cli) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10))
    torch.save(model.state_dict(), "m.pth")
    arch = "Sequential(Embedding(10,4),Linear(4,10))"
    cli("resize", 0, 1, "vocab_size=13", "-m", "m.pth", "--arch", arch, "-o", "o.pth")
    found = torch.load("o.pth", weights_only=True)
    modelcli.apply(model, "resize 0 1 vocab_size=13")
    assert all(torch.equal(found[key], value) for key, value in model.state_dict().items())
    again = modelcli.load("o.pth")
    assert repr(again) == repr(model)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("resize 0 vocab_size=10", "0 has 10 rows already"),
        ("resize 2 vocab_size=12", "2 is LayerNorm((4,)): only Embedding and Linear have a row for each token"),
        ("resize 0 3 vocab_size=12", "0, 3 have 4, 10 rows: they do not have one for each token"),
        ("resize . image_size=12", "no library says how to give Sequential another image_size"),
        ("resize 4 vocab_size=12", "the rows of 4.weight cannot be kept: it has no plain values"),
        ("resize 5 vocab_size=12", "new rows of 5.weight cannot be drawn as complex64"),
    ],
)
def test_what_cannot_be_resized_is_refused(line: str, message: str) -> None:
    parts = [nn.Embedding(10, 4), nn.ReLU(), nn.LayerNorm(4), nn.Linear(4, 4), nn.LazyLinear(10)]
    model = nn.Sequential(*parts, nn.Linear(4, 10, dtype=torch.complex64))
    with pytest.raises(RequestError) as error:
        modelcli.apply(model, line)
    assert message in error.value.message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["0"], "resize takes at least one target and a size"),
        (["0", "12"], "'12' is no size: NAME=SIZE comes last"),
        (["0", "vocab=12"], "resize has no 'vocab'"),
        (["0", "vocab_size=0"], "vocab_size takes a whole number from 1, not '0'"),
    ],
)
def test_wrong_words_are_errors(cli: Cli, words: list[str], message: str) -> None:
    assert message in cli("resize", *words, "-m", "Sequential(Embedding(10,4))", code=2).err


def test_a_file_of_unknown_architecture_cannot_be_resized(cli: Cli) -> None:
    torch.save({"embed.weight": torch.zeros(10, 4)}, "m.pth")
    done = cli("resize", "embed", "vocab_size=12", "-m", "m.pth", "-o", "o.pth", code=2)
    assert "resize needs the classes of the modules, but the file records no architecture" in done.err
    assert not Path("o.pth").exists()
