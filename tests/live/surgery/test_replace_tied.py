"""`replace --tie`: a module that shares a tensor with the replaced one gets the new size, and the tensor stays one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import modelcli
from modelcli.errors import RequestError
from modelcli.live.surgery import seed_of
from tests.commands.test_script import both
from tests.conftest import Cli

OWN = '''
import torch
from torch import nn

class Scaled(nn.Embedding):
    """An embedding of its own class, as some language models have it."""

    def forward(self, ids):
        return super().forward(ids) * 2

class LM(nn.Module):
    def __init__(self, bias=False, kind=nn.Embedding):
        super().__init__()
        self.tok = kind(50, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 50, bias=bias)
        self.head.weight = self.tok.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.body(self.tok(ids))))

class Biased(LM):
    def __init__(self):
        super().__init__(bias=True)

class Subclass(LM):
    def __init__(self):
        super().__init__(kind=Scaled)

class Twice(LM):
    """The bias of the head is a parameter of the model as well."""

    def __init__(self):
        super().__init__(bias=True)
        self.bias = self.head.bias

class Bare(nn.Module):
    """The output layer is the function, with a parameter of the model."""

    def __init__(self):
        super().__init__()
        self.tok = nn.Embedding(50, 8)
        self.out = self.tok.weight

    def forward(self, ids):
        return nn.functional.linear(self.tok(ids), self.out)
'''
INPUT = ("--input", "ids=2,5:int64")


@pytest.fixture
def own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module with the models."""
    (folder / "own.py").write_text(OWN, encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))
    import own  # type: ignore[import-not-found]

    return own


def plain(model: nn.Module, rows: int, *, keep: bool) -> nn.Module:
    """Give the model another number of tokens with plain statements."""
    old = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    part = slice(min(rows, 50))
    torch.manual_seed(seed_of(0, 1))
    new = nn.Embedding(rows, 8)
    with torch.no_grad():
        if keep:
            new.weight[part] = old["tok.weight"][part]
        model.tok, model.head.weight, model.head.out_features = new, new.weight, rows
        if model.head.bias is not None:
            model.head.bias = nn.Linear(8, rows).bias
            if keep:
                model.head.bias[part] = old["head.bias"][part]
    return model


def made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


def assert_equal(found: nn.Module, expected: nn.Module, rows: int) -> None:
    assert repr(found) == repr(expected)
    first, second = found.state_dict(), expected.state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in second)
    assert found.head.weight is found.tok.weight
    ids = torch.randint(rows, (2, 5))
    with torch.no_grad():
        assert torch.equal(found.eval()(ids), expected.eval()(ids))


@pytest.mark.parametrize("rows", [60, 40])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("name", ["LM", "Biased"])
def test_both_ends_equal_plain_statements(cli: Cli, own: Any, name: str, keep: bool, rows: int) -> None:
    words = ["replace", "tok", f"Embedding({rows},_)", "--tie", *(["--keep-weights"] if keep else [])]
    done = cli(*words, "-m", f"own.py:{name}", *INPUT, "-o", "out.pth", "--json").json
    assert done["check"]["output_shape"] == [2, 5, rows]
    assert [change["path"] for change in done["changes"]] == ["tok", "head"]
    expected = plain(made(getattr(own, name)), rows, keep=keep)
    assert_equal(modelcli.load("out.pth", trust=True), expected, rows)
    line = " ".join(words)
    assert_equal(modelcli.apply(made(getattr(own, name)), line), expected, rows)  # with values, in Python
    script = both(cli, "-m", f"own.py:{name}", "-e", line)
    assert f"model.head.weight = model.tok.weight\nmodel.head.out_features = {rows}\n" in script


def test_the_record_and_a_recipe_repeat_it(cli: Cli, own: Any) -> None:
    cli("load", "own.py:Biased", "--input", "ids=2,5:int64")
    cli("replace", "tok", "Embedding(60,_)", "--keep-weights", "--tie")
    assert '"replace tok Embedding(60,_) --keep-weights --tie"' in Path("modelcli.toml").read_text(encoding="utf-8")
    cli("save", "a.pth")
    cli("replace", "tok", "Embedding(70,_)", "--keep-weights", "--tie", "-m", "a.pth", "--trust", "-o", "b.pth")
    found = modelcli.load("b.pth", trust=True)
    first = plain(made(own.Biased), 60, keep=True)
    assert torch.equal(found.tok.weight[:60], first.tok.weight)
    assert torch.equal(found.head.bias[:60], first.head.bias)
    assert found.head.weight is found.tok.weight
    assert repr(found.head) == "Linear(in_features=8, out_features=70, bias=True)"
    assert found(torch.tensor([[69]])).shape == (1, 1, 70)


def test_the_other_end_may_be_the_one_that_is_named(cli: Cli, own: Any) -> None:
    """The embedding keeps its class."""
    words = ("replace", "head", "Linear(_,60,bias=_)", "--keep-weights", "--tie")
    cli(*words, "-m", "own.py:Subclass", *INPUT, "-o", "out.pth")
    found, before = modelcli.load("out.pth", trust=True), made(own.Subclass)
    assert type(found.tok).__name__ == "Scaled"
    assert found.tok.num_embeddings == 60
    assert found.head.weight is found.tok.weight
    torch.manual_seed(seed_of(0, 1))
    expected = nn.Linear(8, 60, bias=False).weight.detach()
    expected[:50] = before.tok.weight
    assert torch.equal(found.tok.weight, expected)
    ids = torch.tensor([[0, 7, 49]])
    with torch.no_grad():
        assert torch.equal(found.eval()(ids)[..., :50], before(ids))
    both(cli, "-m", "own.py:Subclass", "-e", " ".join(words))


def test_frozen_stays_frozen_where_it_is_not_new(cli: Cli, own: Any) -> None:
    words = ("apply", "-e", "freeze head.bias", "-e", "replace tok Embedding(60,_) --keep-weights --tie")
    cli(*words, "-m", "own.py:Biased", *INPUT, "-o", "out.pth")
    rows = {row["name"]: row["trainable"] for row in cli("params", "out.pth", "--trust", "--json").json["tensors"]}
    assert rows == {
        "tok.weight": True,
        "body.weight": True,
        "body.bias": True,
        "head.weight": True,
        "head.bias": False,
    }
    both(cli, "-m", "own.py:Biased", *words[1:])


@pytest.mark.usefixtures("own")
def test_the_hint_offers_both_and_both_work(cli: Cli) -> None:
    words = ("replace", "tok", "Embedding(60,_)", "--keep-weights", "-m", "own.py:LM", *INPUT)
    error = cli(*words, code=2).err
    assert "tok.weight is tied to head.weight, and replacing tok unties them" in error
    assert "hint: --tie gives the other module the new size as well; --untie replaces it anyway" in error
    assert cli(*words, "--tie", "--json").json["check"]["output_shape"] == [2, 5, 60]
    assert cli(*words, "--untie", "--json").json["check"]["output_shape"] == [2, 5, 50]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("replace", "tok", "Identity", "-m", "own.py:LM"), "head.weight cannot be tied to the new module: Identity()"),
        (("replace", "tok", "Embedding(60,_)", "-m", "own.py:Twice"), "its bias is tied to bias"),
        (("replace", "tok", "Embedding(60,_)", "-m", "own.py:Bare"), "out is of Bare, no Linear or Embedding"),
        (("replace", "{tok,head}", "Linear(8,60)", "-m", "own.py:LM"), "tok and head are tied to each other"),
        (("replace", "body", "Linear(8,8)", "-m", "own.py:LM"), "no tensor of body is tied to one of another module"),
    ],
)
@pytest.mark.usefixtures("own")
def test_what_cannot_follow_is_refused_and_is_not_offered(cli: Cli, words: tuple[str, ...], message: str) -> None:
    error = cli(*words, "--tie", *INPUT, "-o", "out.pth", code=2).err
    assert message in error
    assert "hint: " in error
    assert not Path("out.pth").exists()
    if "body" not in words:
        plain_hint = cli(*words, *INPUT, code=2).err
        assert "--tie" not in plain_hint
        assert "--untie replaces it anyway" in plain_hint
    assert "leave one of the two out" in cli(*words, "--tie", "--untie", *INPUT, code=2).err


@pytest.mark.usefixtures("own")
def test_three_edits_do_what_one_cannot(cli: Cli) -> None:
    """The hint of a module that cannot follow, with the modules filled in."""
    error = cli("replace", "tok", "Embedding(60,_)", "--tie", "-m", "own.py:Twice", *INPUT, code=2).err
    steps = "three edits can: replace tok MODULE --untie, replace head MODULE, tie tok.weight head.weight"
    assert f"hint: {steps}" in error
    lines = [
        "replace tok Embedding(60,_) --keep-weights --untie",
        "replace head Linear(_,60) --keep-weights --untie",
        "tie tok.weight head.weight",
    ]
    cli("apply", *[word for line in lines for word in ("-e", line)], "-m", "own.py:Twice", *INPUT, "-o", "out.pth")
    found = modelcli.load("out.pth", trust=True)
    assert found.head.weight is found.tok.weight


# --- state-dict models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("name", ["LM", "Biased"])
def test_keys_of_a_file(cli: Cli, own: Any, name: str, keep: bool) -> None:
    torch.save(made(getattr(own, name)).state_dict(), "bare.pth")
    line = f"replace tok Embedding(60,8) --tie{' --keep-weights' if keep else ''}"
    cli("apply", "-e", line, "-m", "bare.pth", "-o", "out.pth")
    found = torch.load("out.pth", weights_only=True)
    expected = plain(made(getattr(own, name)), 60, keep=keep).state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert found["head.weight"].data_ptr() == found["tok.weight"].data_ptr()
    both(cli, "-m", "bare.pth", "-e", line)
    model = getattr(own, name)()
    plain(model, 60, keep=False).load_state_dict(found)


def test_keys_that_cannot_follow(cli: Cli) -> None:
    weight = torch.randn(50, 8)
    torch.save({"tok.weight": weight, "head.weight": weight, "head.scale": torch.ones(1)}, "more.pth")
    words = ("replace", "tok", "Embedding(60,8)", "--tie", "-m")
    error = cli(*words, "more.pth", code=2).err
    assert "it has other tensors than weight and bias: weight, scale" in error
    bias = torch.zeros(50)
    torch.save({"tok.weight": weight, "head.weight": weight, "head.bias": bias, "bias": bias}, "bias.pth")
    assert "its bias is tied to bias" in cli(*words, "bias.pth", code=2).err
    torch.save({"tok.weight": weight, "head.weight": weight, "head.bias": torch.zeros(8)}, "other.pth")
    assert "its bias does not have one element for each row" in cli(*words, "other.pth", code=2).err
    torch.save({"tok.weight": weight, "head.weight": weight.clone()}, "apart.pth")
    assert "no tensor of tok is tied to one of another module" in cli(*words, "apart.pth", code=2).err


# --- Hugging Face ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "path"), [("gpt2", "transformer.wte"), ("llama", "model.embed_tokens")])
def test_a_folder_of_transformers(cli: Cli, kind: str, path: str) -> None:
    transformers = pytest.importorskip("transformers")
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=40, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True
        )
        model = transformers.GPT2LMHeadModel(config).eval()
    else:
        config = transformers.LlamaConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            vocab_size=40,
            tie_word_embeddings=True,
        )
        model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained("model")
    cli("replace", path, "Embedding(50,_,padding_idx=_)", "--keep-weights", "--tie", "-m", "./model", "-o", "out/")
    found, report = type(model).from_pretrained("out", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert found.config.vocab_size == 50
    assert found.config.tie_word_embeddings
    assert found.lm_head.weight is found.get_input_embeddings().weight
    torch.manual_seed(seed_of(0, 1))
    rows = nn.Embedding(50, 16).weight.detach()
    rows[:40] = model.get_input_embeddings().weight
    assert torch.equal(found.lm_head.weight, rows)
    ids = torch.tensor([[3, 39, 7]])
    with torch.no_grad():
        logits = found.eval()(ids).logits
        assert logits.shape == (1, 3, 50)
        assert torch.allclose(logits[..., :40], model(ids).logits, atol=1e-6)


def test_a_bias_that_the_model_holds_as_well_is_refused(cli: Cli) -> None:
    """BERT's decoder shares its bias with the module above it, which `resize` knows."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=40
    )
    transformers.BertForMaskedLM(config).save_pretrained("model")
    words = ("replace", "bert.embeddings.word_embeddings", "Embedding(50,_,padding_idx=_)", "-m", "./model")
    assert "its bias is tied to cls.predictions.bias" in cli(*words, "--tie", code=2).err
    cli("resize", ".", "vocab_size=50", "-m", "./model", "-o", "out/")


def test_python_leaves_a_model_as_it_was_where_it_cannot(own: Any) -> None:
    model = own.Twice()
    before = dict(model.named_parameters(remove_duplicate=False))
    with pytest.raises(RequestError, match="its bias is tied to bias"):
        modelcli.apply(model, "replace tok Embedding(60,_) --tie")
    assert dict(model.named_parameters(remove_duplicate=False)) == before
    model = own.Biased()
    before = dict(model.named_parameters(remove_duplicate=False))
    with pytest.raises(RequestError, match="nothing"):
        modelcli.apply(model, "replace tok Embedding(60,_) --tie", "replace nothing Linear(2,2)")
    assert dict(model.named_parameters(remove_duplicate=False)) == before
    assert model.head.out_features == 50
