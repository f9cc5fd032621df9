"""Many architectures of timm compared with plain timm: names, parameters, a new head, the written file."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

from modelcli.edits import parse
from modelcli.language.references import Source
from modelcli.live import landmarks, planning
from modelcli.live.opening import open_live, open_real
from modelcli.providers.timm import PROVIDER
from tests.conftest import Cli

NAMES = timm.list_models()
#: Values are compared as well for models with at most this many parameters and multiply-accumulates.
QUICK, LONG = (6_000_000, 1_000_000_000), (60_000_000, 6_000_000_000)
#: Every 60th model in each run of the tests, and every 12th in the long one.
SOME, MANY = NAMES[::60], NAMES[::12]
CASES = [
    *((name, QUICK) for name in SOME),
    *(pytest.param(name, LONG, marks=pytest.mark.sweep, id=f"{name}-long") for name in MANY),
]
#: Models that cannot run on the meta device, with the reason.
NEEDS_CPU: dict[str, str] = {}


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = timm.create_model(name)
    return model


@pytest.mark.parametrize(("name", "most"), CASES)
@pytest.mark.filterwarnings("ignore")  # timm's own
def test_a_model_equals_plain_timm(cli: Cli, name: str, most: tuple[int, int]) -> None:
    expected = on_meta(name)
    live = open_live(Source(f"timm:{name}"))
    assert {key: tuple(t.shape) for key, t in live.module.state_dict().items()} == {
        key: tuple(t.shape) for key, t in expected.state_dict().items()
    }
    blueprint = planning.traced(live)
    params = sum(parameter.numel() for parameter in expected.parameters())
    assert blueprint.totals.params == params
    trace = blueprint.trace
    assert trace is not None
    assert (trace.reason is None) == (name not in NEEDS_CPU), trace.reason
    assert any(name in group for group in PROVIDER.names_like(expected.state_dict()))
    heads = [
        path for path in landmarks.of(live.module).get("head", ()) if type(expected.get_submodule(path)) is nn.Linear
    ]
    macs = trace.macs
    if heads and macs is not None and params <= most[0] and macs <= most[1]:
        check_with_values(cli, name, heads)


def check_with_values(cli: Cli, name: str, heads: list[str]) -> None:
    """Require that the file loads strictly into plain timm, and that a new head gives the outputs of plain Python."""
    torch.manual_seed(0)
    plain: nn.Module = timm.create_model(name)
    edits = [parse(f"replace {path} Linear(_,7)") for path in heads]
    edited, live = open_real(Source(f"timm:{name}"), edits)
    cli("apply", *[word for edit in edits for word in ("-e", str(edit))], "-m", f"timm:{name}", "-o", "out.pth")
    state = torch.load("out.pth", weights_only=True)
    for path in heads:
        old: Any = plain.get_submodule(path)
        plain.set_submodule(path, nn.Linear(old.in_features, 7, bias=old.bias is not None))
    body = {key: value for key, value in plain.state_dict().items() if not key.startswith(tuple(heads))}
    assert all(torch.equal(state[key], value) for key, value in body.items())
    plain.load_state_dict(state, strict=True)
    assert live.inputs is not None
    image = live.inputs.tensors("cpu").args[0]
    with torch.no_grad():
        expected, found = plain.eval()(image), edited.eval()(image)
    assert all(torch.equal(one, other) for one, other in zip(flat(expected), flat(found), strict=True))


def flat(output: Any) -> list[torch.Tensor]:
    return [output] if isinstance(output, torch.Tensor) else [tensor for part in output for tensor in flat(part)]


def test_nearly_all_run_on_the_meta_device() -> None:
    assert len(NEEDS_CPU) <= 0.02 * len(MANY)
