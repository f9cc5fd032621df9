"""`init` equals `torch.nn.init` and `reset_parameters`, on a model and lazily on a file."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import init

import modelcli
from modelcli.errors import RequestError
from modelcli.language import expressions
from modelcli.live.surgery import seed_of
from tests import nets
from tests.commands.test_script import both, run
from tests.conftest import Cli


def network() -> nn.Sequential:
    """Return a small network like those that tutorials initialise."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, bias=False), nn.BatchNorm2d(32)),
        *(nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


NETWORK = (
    "Sequential(Conv2d(3,16,3),BatchNorm2d(16),ReLU(),Conv2d(16,32,3,bias=False),BatchNorm2d(32),"
    "ReLU(),Flatten(),Linear(512,64),ReLU(),Linear(64,10))"
)
THREE_LINES = ("init **:Conv2d xavier_uniform", "init **:BatchNorm2d ones", "init **:Linear normal(0,0.01)")


def tutorial(module: nn.Module) -> None:
    """The function that most tutorials pass to `model.apply`."""
    if isinstance(module, nn.Conv2d):
        init.xavier_uniform_(module.weight)
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        init.constant_(module.weight, 1)
        init.constant_(module.bias, 0)
    elif isinstance(module, nn.Linear):
        init.normal_(module.weight, 0, 0.01)
        init.zeros_(module.bias)


# --- the tutorials' recipe -----------------------------------------------------------------------------------------


def test_three_lines_draw_the_distributions_of_the_tutorials_function() -> None:
    """Constants are equal, and random values have the same distribution within sampling noise."""
    ours, theirs = modelcli.apply(network(), *THREE_LINES), network()
    torch.manual_seed(1234)
    theirs.apply(tutorial)
    for (name, found), (_, expected) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        if torch.unique(expected).numel() == 1:
            assert torch.equal(found, expected), name
            continue
        assert not torch.equal(found, expected), name
        with torch.no_grad():
            # The critical value of the two-sample Kolmogorov-Smirnov statistic at p = 0.001.
            assert _distance(found, expected) < 1.95 * math.sqrt(2 / found.numel()), name
            assert found.abs().max() <= expected.abs().max() * 1.3, name


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    one, other = one.flatten().sort().values, other.flatten().sort().values
    at = torch.cat([one, other])
    shares = [torch.searchsorted(sample, at, right=True) / sample.numel() for sample in (one, other)]
    return float((shares[0] - shares[1]).abs().max())


def test_three_lines_equal_their_script(cli: Cli) -> None:
    words = [word for line in THREE_LINES for word in ("-e", line)]
    text = both(cli, "-m", NETWORK, *words)
    assert "init.xavier_uniform_(model[0].weight)" in text
    assert run(text)["model"][9].weight.std() < 0.012


def test_the_order_of_the_lines_does_not_change_a_lines_own_numbers() -> None:
    """Edit number i draws from its own generator, so undoing earlier edits does not change it."""
    all_three = modelcli.apply(network(), *THREE_LINES)
    others_changed = modelcli.apply(network(), "freeze 0", "freeze 1", THREE_LINES[2])
    assert torch.equal(all_three[9].weight, others_changed[9].weight)


# --- schemes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "function"),
    [
        ("xavier_uniform", init.xavier_uniform_),
        ("xavier_uniform_", init.xavier_uniform_),
        ("torch.nn.init.xavier_normal_", init.xavier_normal_),
        ("xavier_normal(gain=2.0)", lambda t: init.xavier_normal_(t, gain=2.0)),
        ("kaiming_uniform", init.kaiming_uniform_),
        ("'kaiming_normal(nonlinearity=\"relu\")'", lambda t: init.kaiming_normal_(t, nonlinearity="relu")),
        ("\"kaiming_normal(mode='fan_out', nonlinearity='relu')\"",
         lambda t: init.kaiming_normal_(t, mode="fan_out", nonlinearity="relu")),
        ("'normal(0, 0.01)'", lambda t: init.normal_(t, 0, 0.01)),
        ("uniform(-0.1,0.1)", lambda t: init.uniform_(t, -0.1, 0.1)),
        ("trunc_normal(std=.02)", lambda t: init.trunc_normal_(t, std=0.02)),
        ("orthogonal", init.orthogonal_),
        ("eye", init.eye_),
        ("sparse(0.5)", lambda t: init.sparse_(t, 0.5)),
        ("ones", init.ones_),
        ("zeros", init.zeros_),
        ("constant(0.3)", lambda t: init.constant_(t, 0.3)),
    ],
)  # fmt: skip
def test_any_function_of_torch_nn_init(scheme: str, function: Callable[[torch.Tensor], object]) -> None:
    found = modelcli.apply(nn.Linear(6, 5), f"init . {scheme}")
    torch.manual_seed(seed_of(0, 1))
    expected = torch.zeros(5, 6)
    function(expected)
    assert torch.equal(found.weight, expected)
    assert torch.equal(found.bias, torch.zeros(5))


def test_every_function_that_fills_a_tensor_has_a_name() -> None:
    """This includes functions that a newer torch adds. (`dirac` works for convolutions only.)"""
    names = [name.removesuffix("_") for name in vars(init) if name.endswith("_") and not name.startswith("_")]
    assert {"dirac", "eye", "orthogonal", "trunc_normal"} <= set(names)
    arguments = {"constant": "(1)", "sparse": "(0.5)"}
    for name in names:
        modelcli.apply(
            nn.Conv2d(2, 2, 3) if name == "dirac" else nn.Linear(2, 2), f"init . {name}{arguments.get(name, '')}"
        )


def test_bias_option_sets_the_scheme_of_biases() -> None:
    model = modelcli.apply(nn.Linear(3, 2), "init . ones --bias 'uniform(1, 2)'")
    assert torch.equal(model.weight, torch.ones(2, 3))
    assert 1 <= model.bias.min() <= model.bias.max() <= 2


def test_names_of_weights_and_biases() -> None:
    """`in_proj_bias` and `bias_ih_l0` are biases, whatever their modules call them."""
    model = modelcli.apply(
        nn.ModuleList([nn.MultiheadAttention(4, 2), nn.LSTM(3, 4)]), "init . ones --bias constant(7)"
    )
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, torch.full_like(parameter, 7.0 if "bias" in name else 1.0)), name


NORMS = [nn.BatchNorm1d(3), nn.LayerNorm(3), nn.GroupNorm(1, 3), nn.InstanceNorm1d(3, affine=True), nn.RMSNorm(3)]


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: type(norm).__name__)
def test_normalisation_layers_are_reset_unless_selected_by_themselves(norm: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(3, 3), norm)
    modelcli.apply(model, "init . normal")
    assert torch.equal(norm.weight, torch.ones(3))
    assert getattr(norm, "bias", None) is None or torch.equal(norm.bias, torch.zeros(3))
    modelcli.apply(model, f"init '**:{type(norm).__name__}' constant(0.5) --bias constant(2)")
    assert torch.equal(norm.weight, torch.full((3,), 0.5))
    assert getattr(norm, "bias", None) is None or torch.equal(norm.bias, torch.full((3,), 2.0))


def test_a_note_names_the_normalisation_layers_left_out(cli: Cli) -> None:
    told = cli("init", ".", "xavier_normal", "-m", "resnet18").err
    assert (
        "20 normalisation layers get weight 1 and bias 0: a target that picks nothing else gives them a scheme" in told
    )
    assert "normalisation" not in cli("init", "**:Conv2d", "xavier_normal", "-m", "resnet18").err


def test_tensors_that_a_scheme_cannot_fill_are_named(cli: Cli) -> None:
    result = cli("init", ".", "xavier_uniform", "-m", "Sequential(Linear(3,2),PReLU())")
    assert (
        "note: 1.weight keeps its values: xavier_uniform does not fill such a tensor: Fan in and fan out" in result.err
    )
    error = cli("init", "1", "xavier_uniform", "-m", "Sequential(Linear(3,2),PReLU())", code=2).err
    assert "xavier_uniform fills nothing: 1.weight: Fan in and fan out" in error
    assert "hint: normal, uniform, constant, ones and zeros fill any tensor" in error


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("init . xavier", "no scheme 'xavier' in torch.nn.init"),
        ("init . calculate_gain(1)", "no scheme"),
        ("init . normal(0,1,2,3,4,5)", "too many positional arguments"),
        ("init . normal(sigma=1)", "unexpected keyword argument 'sigma'"),
        ("init . normal(Linear(2,3))", "is neither a number nor a word"),
        ("init . normal(tensor=1)", "unexpected keyword argument 'tensor'"),
        ("init . default(3)", "default takes no arguments"),
        ("init . default --bias ones", "so it excludes --bias"),
        ("init . ones --bias default", "default resets weights and biases together"),
        ("init 1 ones", "'1' has no tensors"),
        ("init . ones --expect 2", "1 matches, not the 2 expected"),
    ],
)
def test_refused_and_nothing_is_drawn(line: str, message: str) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(RequestError) as caught:
        modelcli.apply(model, line)
    assert message in caught.value.message
    assert all(map(torch.equal, model.parameters(), before))


# --- default -------------------------------------------------------------------------------------------------------


def test_default_is_reset_parameters() -> None:
    model, expected = network(), network()
    modelcli.apply(model, "init . default")
    torch.manual_seed(seed_of(0, 1))
    for module in expected.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert all(map(torch.equal, model.state_dict().values(), expected.state_dict().values()))


def test_default_resets_statistics_of_what_it_selects() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    model(torch.randn(9, 3))
    modelcli.apply(model, "init 0 default")
    assert model[0].num_batches_tracked == 0


def test_default_on_a_file_without_an_architecture(cli: Cli) -> None:
    torch.save(network().state_dict(), "bare.pth")
    error = cli("init", ".", "default", "-m", "bare.pth", code=2).err
    assert "a plain state dict records no classes" in error
    cli("init", ".", "default", "-m", "bare.pth", "--arch", NETWORK, "-o", "out.pth")


# --- lazily, and in place ------------------------------------------------------------------------------------------


def test_values_are_drawn_when_the_file_is_written(cli: Cli) -> None:
    """Tensors that the edit does not select are copied from the file byte for byte."""
    state = network().state_dict()
    torch.save(state, "bare.pth")
    cli("init", "9", "normal(0,0.01)", "-m", "bare.pth", "-o", "out.pth")
    written = torch.load("out.pth", weights_only=True)
    torch.manual_seed(seed_of(0, 1))
    expected = init.normal_(torch.empty(10, 64), 0, 0.01)
    assert torch.equal(written["9.weight"], expected)
    assert all(torch.equal(written[name], tensor) for name, tensor in state.items() if not name.startswith("9."))


@pytest.mark.parametrize("scheme", ["normal(0,0.01)", "xavier_uniform"])
def test_an_expanded_tensor_takes_constants_only(cli: Cli, scheme: str) -> None:
    torch.save({"w": torch.randn(1, 3).expand(4, 3), "v": torch.randn(4, 3)}, "m.pth")
    assert "w: unsupported operation: more than one element" in cli("init", "w", scheme, "-m", "m.pth", code=2).err
    result = cli("init", ".", scheme, "-m", "m.pth", "-o", "out.pth")
    assert f"w keeps its values: {scheme} does not fill such a tensor" in result.err
    before, after = torch.load("m.pth"), torch.load("out.pth")
    assert torch.equal(after["w"], before["w"])
    assert not torch.equal(after["v"], before["v"])
    cli("init", "w", "ones", "-m", "m.pth", "-o", "ones.pth")
    assert torch.equal(torch.load("ones.pth")["w"], torch.ones(4, 3))


def test_keys_with_leading_and_double_dots(cli: Cli) -> None:
    state = {name: torch.full((2,), 7.0) for name in ("weight", ".weight", "..weight", "a..b.weight", "a.")}
    torch.save(state, "m.pth")
    cli("init", "**", "ones", "-m", "m.pth", "-o", "out.pth")
    after = torch.load("out.pth")
    assert list(after) == list(state)
    assert all(torch.equal(tensor, torch.ones(2)) for tensor in after.values())


def test_the_old_data_is_not_overwritten() -> None:
    """Other references to the old data keep it. The parameter is the same object, with its requires_grad."""
    model = nn.Linear(3, 2)
    model.weight.requires_grad_(False)
    weight, old = model.weight, model.weight.data
    kept = old.clone()
    modelcli.apply(model, "init . ones")
    assert model.weight is weight
    assert not weight.requires_grad
    assert torch.equal(old, kept)


def test_a_tied_parameter_is_drawn_once(cli: Cli) -> None:
    cli("init", ".", "normal(0,0.02)", "-m", "nets.py:Tied", "-o", "out.pth")
    model = modelcli.load("out.pth", trust=True)
    assert model.head.weight is model.embed.weight
    torch.manual_seed(seed_of(0, 1))
    assert torch.equal(model.embed.weight, init.normal_(torch.empty(11, 4), 0, 0.02))


def test_the_callers_random_generator_is_unchanged() -> None:
    torch.manual_seed(7)
    expected = torch.randn(3)
    torch.manual_seed(7)
    modelcli.apply(nets.Places(), "init . normal", "init seq default")
    # The model's own constructor drew values before.
    torch.manual_seed(7)
    assert torch.equal(torch.randn(3), expected)


def test_seeds(cli: Cli, folder: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        cli("init", ".", "normal", "-m", "Linear(3,2)", "--seed", seed, "-o", f"{name}.pth")
    assert Path("a.pth").read_bytes() == Path("b.pth").read_bytes()
    assert not torch.equal(torch.load("a.pth")["weight"], torch.load("c.pth")["weight"])


@pytest.mark.parametrize("scheme", ["trunc_normal(0,0.02,1,2)", "trunc_normal(5,1,-1000,1)", "trunc_normal(a=50,b=60)"])
def test_a_truncated_normal_with_an_improbable_range_is_refused(scheme: str) -> None:
    with pytest.raises(RequestError, match=r"lies .* standard deviations from the mean"):
        modelcli.apply(nn.Linear(4, 4), f"init . {scheme}")


@pytest.mark.parametrize(
    "scheme", ["trunc_normal(0,0.02)", "trunc_normal(0,1,1.5,4)", "trunc_normal(0,0.02,-0.04,0.04)"]
)
def test_truncated_normals_with_probable_ranges(scheme: str) -> None:
    model, plain = nn.Linear(100, 100), nn.Linear(100, 100)
    modelcli.apply(model, f"init weight {scheme}")
    torch.manual_seed(1)
    nn.init.trunc_normal_(plain.weight, *expressions.parse(scheme).args)
    assert torch.equal(model.weight, plain.weight)


def test_a_note_names_a_users_normalisation_layer(cli: Cli, folder: Path) -> None:
    (folder / "own.py").write_text(
        "import torch\nfrom torch import nn\n\n"
        "class MyRMSNorm(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.weight = nn.Parameter(torch.ones(4))\n"
        "    def forward(self, x):\n        return x * self.weight\n\n"
        "def net():\n    return nn.Sequential(nn.Linear(4, 4), MyRMSNorm(), nn.Linear(4, 4), MyRMSNorm())\n"
    )
    told = " ".join(cli("init", ".", "normal", "-m", "own.py:net").err.split())
    assert "MyRMSNorm is no normalisation layer of torch.nn, but is called like one: normal went into 1.weight;" in told
    assert "--except '**:MyRMSNorm' leaves them as they are" in told
    quiet = " ".join(cli("init", ".", "normal", "--except", "**:MyRMSNorm", "-m", "own.py:net").err.split())
    assert "called like one" not in quiet
