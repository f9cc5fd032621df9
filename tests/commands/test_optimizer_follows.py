"""An optimizer in a training checkpoint follows the edits: shown by the next step of training.

Each edit is made twice: by modelcli on the file, and by hand, in plain PyTorch, on the parameters and the state of the
optimizer that wrote the file. Then both take the same step, and every parameter has to be equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import nets
from tests.conftest import Cli

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "plain SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "capturable": lambda p: torch.optim.NAdam(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
}


@dataclass
class Trained:
    """Parameters by name, in the order of `model.parameters()`, and the optimizer's state of each that it has."""

    parameters: dict[str, Tensor]
    state: dict[str, dict[str, Any]]

    def each(self, old: str, new: dict[str, Callable[[Tensor], Tensor]]) -> Trained:
        """Put new parameters in the place of an old one, each made by a function; its state likewise."""
        parameters: dict[str, Tensor] = {}
        state = dict(self.state)
        for name, value in self.parameters.items():
            if name != old:
                parameters[name] = value
                continue
            for own, make in new.items():
                parameters[own] = make(value)
                if old in self.state:
                    state[own] = {
                        key: make(item) if isinstance(item, Tensor) and item.shape == value.shape else item
                        for key, item in self.state[old].items()
                    }
        return Trained(parameters, {name: entry for name, entry in state.items() if name in parameters})

    def renamed(self, name_of: Callable[[str], str | None]) -> Trained:
        """Rename parameters, or leave out those for which there is no name."""
        names = {name: new for name in self.parameters if (new := name_of(name)) is not None}
        return Trained(
            {new: self.parameters[name] for name, new in names.items()},
            {new: self.state[name] for name, new in names.items() if name in self.state},
        )

    def ordered(self, names: list[str]) -> Trained:
        assert sorted(names) == sorted(self.parameters)
        return Trained({name: self.parameters[name] for name in names}, self.state)

    def without(self, names: Callable[[str], bool]) -> Trained:
        """Take parameters out of the optimizer, as one that gets only the trained ones."""
        return self.renamed(lambda name: None if names(name) else name)


def joined(trained: Trained, old: list[str], new: str, join: Callable[[list[Tensor]], Tensor]) -> Trained:
    """Join parameters, and the tensors of their state."""
    values = [trained.parameters[name] for name in old]
    entries = [trained.state.get(name, {}) for name in old]
    state = {
        key: join([entry[key] for entry in entries])
        if isinstance(item, Tensor) and item.shape == values[0].shape
        else item
        for key, item in entries[0].items()
    }
    parameters = {
        (new if name == old[0] else name): (join(values) if name == old[0] else value)
        for name, value in trained.parameters.items()
        if name not in old[1:]
    }
    return Trained(parameters, {**{k: v for k, v in trained.state.items() if k not in old}, new: state})


def rows(start: int, stop: int) -> Callable[[Tensor], Tensor]:
    return lambda value: value[start:stop].clone()


def row(number: int) -> Callable[[Tensor], Tensor]:
    return lambda value: value[number].clone()


def rounded(trained: Trained) -> Trained:
    """Cast the parameters there and back; an optimizer's state stays as it is."""
    return Trained({name: value.bfloat16().float() for name, value in trained.parameters.items()}, trained.state)


def anew(trained: Trained, name: str) -> Trained:
    """Give a parameter no state."""
    return Trained(trained.parameters, {own: entry for own, entry in trained.state.items() if own != name})


ARCH = ("--arch", "nets.py:Chain")
BOTH = (ARCH, ())
KEYS = ((),)

#: The edits, the same by hand, and how the model is named.
EDITS: dict[str, tuple[list[str], Callable[[Trained], Trained], tuple[tuple[str, ...], ...]]] = {
    "rename": (["rename layers.** body.**"], lambda t: t.renamed(lambda n: n.replace("layers", "body")), KEYS),
    "remove": (["remove layers.1"], lambda t: t.renamed(lambda n: removed(n, 1)), (ARCH,)),
    "remove keys": (
        ["remove layers.1 --renumber"],
        lambda t: t.renamed(lambda n: removed(n, 1)),
        KEYS,
    ),
    "remove norm": (["remove norm"], lambda t: t.without(lambda n: n.startswith("norm")), KEYS),
    "slice": (["slice layers 0-1"], lambda t: t.without(lambda n: n[:8] in ("layers.2", "layers.3")), BOTH),
    "slice backwards": (
        ["slice layers 3,0"],
        lambda t: t.renamed(lambda n: moved(n, {3: 0, 0: 1})).ordered(order_of(t, 2)),
        BOTH,
    ),
    "slice twice": (["slice layers 0,1,0"], lambda t: repeated(t), BOTH),
    "freeze": (["freeze stem layers.0"], lambda t: t.without(lambda n: n.startswith(("stem", "layers.0"))), BOTH),
    "freeze and unfreeze": (["freeze stem", "unfreeze stem"], lambda t: t, BOTH),
    "replace": (["replace head Linear(6,2)"], lambda t: anew(anew(t, "head.weight"), "head.bias"), BOTH),
    "replace, keep weights": (
        ["replace head Linear(6,2) --keep-weights"],
        lambda t: anew(anew(t, "head.weight"), "head.bias"),
        BOTH,
    ),
    "insert": (["insert layers.0 Linear(6,6)"], lambda t: inserted(t), (ARCH,)),
    "init": (["init stem.weight xavier_uniform"], lambda t: anew(t, "stem.weight"), BOTH),
    "cast": (["cast . float64", "cast . float32"], lambda t: t, BOTH),
    "extract": (
        ["extract layers"],
        lambda t: t.renamed(lambda n: n.removeprefix("layers.") if n.startswith("layers.") else None),
        BOTH,
    ),
    "tie": (["tie layers.0.weight layers.2.weight"], lambda t: t.without(lambda n: n == "layers.2.weight"), BOTH),
    "wrap": (["wrap stem Sequential(_)"], lambda t: t.renamed(lambda n: n.replace("stem", "stem.0")), BOTH),
    "split": (
        ["split layers.1.weight q.weight k.weight v.weight"],
        lambda t: t.each(
            "layers.1.weight",
            {f"{own}.weight": rows(2 * i, 2 * i + 2) for i, own in enumerate("qkv")},
        ),
        KEYS,
    ),
    "split columns": (
        ["split layers.1.weight a b --dim 1 --sizes 1,5"],
        lambda t: t.each("layers.1.weight", {"a": lambda x: x[:, :1].clone(), "b": lambda x: x[:, 1:].clone()}),
        KEYS,
    ),
    "concat": (
        ["concat layers.0.weight layers.1.weight layers.joined --dim 1"],
        lambda t: joined(t, ["layers.0.weight", "layers.1.weight"], "layers.joined", lambda x: torch.cat(x, 1)),
        KEYS,
    ),
    "stack": (
        ["stack layers.*.bias biases"],
        lambda t: joined(t, [f"layers.{number}.bias" for number in range(4)], "biases", torch.stack),
        KEYS,
    ),
    "unstack": (
        ["unstack layers.0.weight row.*"],
        lambda t: t.each("layers.0.weight", {f"row.{i}": row(i) for i in range(6)}),
        KEYS,
    ),
    "permute": (
        ["permute stem.weight layers.2.weight 1,0"],
        lambda t: t.each("stem.weight", {"stem.weight": lambda x: x.T.contiguous()}).each(
            "layers.2.weight", {"layers.2.weight": lambda x: x.T.contiguous()}
        ),
        KEYS,
    ),
    "permute there and back": (["permute stem.weight 1,0", "permute stem.weight 1,0"], lambda t: t, KEYS),
    "reshape": (
        ["reshape stem.weight 2,12"],
        lambda t: t.each("stem.weight", {"stem.weight": lambda x: x.reshape(2, 12).clone()}),
        KEYS,
    ),
    "many": (
        ["permute stem.weight 1,0", "split stem.weight a b", "concat b a ba", "cast . bfloat16", "cast . float32"],
        lambda t: rounded(t.each("stem.weight", {"ba": lambda x: torch.cat([x.T[2:], x.T[:2]])})),
        KEYS,
    ),
}


#: The parameters that get new values, which modelcli draws.
DRAWN = {
    "replace": ("head.weight", "head.bias"),
    "replace, keep weights": ("head.weight", "head.bias"),
    "insert": ("layers.0.weight", "layers.0.bias"),
    "init": ("stem.weight",),
}


def removed(name: str, number: int) -> str | None:
    own = int(name.split(".")[1]) if name.startswith("layers") else -1
    return None if own == number else name.replace(f"layers.{own}", f"layers.{own - 1}") if own > number else name


def moved(name: str, places: dict[int, int]) -> str | None:
    if not name.startswith("layers"):
        return name
    number = int(name.split(".")[1])
    return name.replace(f"layers.{number}", f"layers.{places[number]}") if number in places else None


def order_of(trained: Trained, layers: int) -> list[str]:
    ends = [name for name in trained.parameters if not name.startswith("layers")]
    middle = [f"layers.{number}.{own}" for number in range(layers) for own in ("weight", "bias")]
    return [*ends[:4], *middle, *ends[4:]]


def repeated(trained: Trained) -> Trained:
    found = trained.renamed(lambda name: moved(name, {0: 0, 1: 1}))
    for own in ("weight", "bias"):
        found.parameters[f"layers.2.{own}"] = found.parameters[f"layers.0.{own}"].clone()
        if (state := found.state.get(f"layers.0.{own}")) is not None:
            found.state[f"layers.2.{own}"] = {
                key: item.clone() if isinstance(item, Tensor) else item for key, item in state.items()
            }
    return found.ordered(order_of(trained, 3))


def inserted(trained: Trained) -> Trained:
    found = trained.renamed(lambda name: moved(name, {number: number + 1 for number in range(4)}))
    for own, shape in (("weight", (6, 6)), ("bias", (6,))):
        found.parameters[f"layers.0.{own}"] = torch.empty(shape)
    return found.ordered(order_of(trained, 5))


def train(kind: str, groups: Callable[[nn.Module], Any] | None = None) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Train a model for two steps."""
    torch.manual_seed(0)
    model = nets.Chain()
    optimizer = OPTIMIZERS[kind](model.parameters() if groups is None else groups(model))
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def trained_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Trained:
    """Return copies of the parameters and of their state, which a step may change in place."""
    names = dict(model.named_parameters())
    return Trained(
        {name: value.detach().clone() for name, value in names.items()},
        {
            name: {key: item.clone() if isinstance(item, Tensor) else item for key, item in optimizer.state[p].items()}
            for name, p in names.items()
            if p in optimizer.state
        },
    )


def step(kind: str, parameters: dict[str, Tensor], state: Any) -> dict[str, Tensor]:
    """Take one step with gradients that depend on the names; `state` is the optimizer's state dict, or states by name.

    Returns the parameters after it.
    """
    made = {name: nn.Parameter(value.detach().clone()) for name, value in parameters.items()}
    optimizer = OPTIMIZERS[kind](list(made.values()))
    if isinstance(state, Trained):
        for name, entry in state.state.items():
            optimizer.state[made[name]] = {
                key: item.clone() if isinstance(item, Tensor) else item for key, item in entry.items()
            }
    else:
        optimizer.load_state_dict(state)
    for number, parameter in enumerate(made.values()):
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    optimizer.step()
    optimizer.step()
    return {name: value.detach() for name, value in made.items()}


def is_parameter(name: str) -> bool:
    return name.rpartition(".")[2] not in ("running_mean", "running_var", "num_batches_tracked")


CASES = [(name, arch) for name, (_, _, ways) in EDITS.items() for arch in ways]


def each_case() -> list[Any]:
    """Return each edit with each optimizer. `make test` runs each edit with one of them, in turn."""
    return [
        pytest.param(
            name,
            arch,
            kind,
            id=f"{name}-{'arch' if arch else 'keys'}-{kind}",
            marks=() if number % len(OPTIMIZERS) == place else pytest.mark.sweep,
        )
        for number, (name, arch) in enumerate(CASES)
        for place, kind in enumerate(OPTIMIZERS)
    ]


@pytest.mark.parametrize(("name", "arch", "kind"), each_case())
def test_the_next_step_is_that_of_an_optimizer_edited_by_hand(
    cli: Cli, name: str, arch: tuple[str, ...], kind: str
) -> None:
    lines, by_hand, _ = EDITS[name]
    model, optimizer = train(kind)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 2}, "train.pth")
    words = [word for line in lines for word in ("-e", line)]
    notes = cli("apply", *words, "-m", "train.pth", *arch, "--check", "none", "-o", "out.pth").err
    assert "as it was" not in notes
    written = torch.load("out.pth", weights_only=True)
    wanted = by_hand(trained_of(model, optimizer))
    found = {key: value for key, value in written["model"].items() if is_parameter(key)}
    if name == "tie":
        del found["layers.2.weight"]
    if "freeze" in name:
        found = {key: found[key] for key in wanted.parameters}
    assert list(found) == list(wanted.parameters)
    for own in DRAWN.get(name, ()):
        wanted.parameters[own] = found[own]
    ours, theirs = step(kind, found, written["optimizer"]), step(kind, wanted.parameters, wanted)
    assert all(torch.equal(ours[own], theirs[own]) for own in theirs)
    assert [len(written["optimizer"]["param_groups"]), written["step"]] == [1, 2]
    assert written["optimizer"]["param_groups"][0]["params"] == list(range(len(theirs)))


@pytest.mark.parametrize("arch", [(), ("--arch", "resnet18(num_classes=10)")], ids=["keys", "arch"])
def test_a_resnet_trains_on_as_the_live_model_edited_in_the_same_way(cli: Cli, arch: tuple[str, ...]) -> None:
    """A new head, and a frozen stem: the model and its optimizer are edited in PyTorch while they are in use."""
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data = torch.randn(2, 3, 32, 32)

    def train_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(data).square().mean().backward()
        optimizer.step()

    for _ in range(2):
        train_step(model, optimizer)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "train.pth")
    edits = ("-e", "replace fc Linear(512,3)", "-e", "freeze conv1 bn1")
    cli("apply", *edits, "-m", "train.pth", *arch, "-o", "out.pth")
    written = torch.load("out.pth", weights_only=True)

    (group,) = optimizer.param_groups
    model.fc = nn.Linear(512, 3)
    model.fc.load_state_dict({name: written["model"][f"fc.{name}"] for name in ("weight", "bias")})
    model.conv1.requires_grad_(False)
    model.bn1.requires_grad_(False)
    group["params"] = [parameter for parameter in model.parameters() if parameter.requires_grad]
    train_step(model, optimizer)

    resumed = torchvision.models.resnet18(num_classes=3)
    resumed.load_state_dict(written["model"])
    resumed.conv1.requires_grad_(False)
    resumed.bn1.requires_grad_(False)
    again = torch.optim.AdamW((p for p in resumed.parameters() if p.requires_grad), lr=1e-3)
    again.load_state_dict(written["optimizer"])
    train_step(resumed, again)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in resumed.state_dict().items())
