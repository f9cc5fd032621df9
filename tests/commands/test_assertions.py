"""`check MODEL`: each assertion passes and fails as it should, with the right text, and reads only what it must."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from modelcli.errors import RequestError
from modelcli.language.references import parse_count
from tests.checkpoints.test_equality import QUIET
from tests.commands.test_diff import EDITS, fresh, plain, states
from tests.conftest import Cli
from tests.needs import needs_torch

pytestmark = QUIET

BASE = "Sequential(Conv2d(1,4,1),BatchNorm2d(4),Flatten(),Linear(4,3),Linear(3,2))"


@pytest.fixture
def _files(cli: Cli) -> None:
    """Create a model with frozen parameters, and the same model without a record."""
    cli("apply", "-m", BASE, "-o", "m.pth", "-e", "freeze 0", "--input-size", "1,1,1,1")
    state = torch.load("m.pth", weights_only=True)
    torch.save(dict(state), "bare.pth")
    save_file(dict(state), "bare.safetensors")


PARAMS = sum(
    p.numel()
    for p in nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 3), nn.Linear(3, 2)).parameters()
)
BYTES = 4 * PARAMS + 4 * 8 + 8

ROWS: list[tuple[tuple[str, ...], bool, Any, Any]] = [
    (("--max-params", str(PARAMS)), True, PARAMS, PARAMS),
    (("--max-params", str(PARAMS - 1)), False, PARAMS, PARAMS - 1),
    (("--max-params", "1.5K"), True, PARAMS, 1500),
    (("--max-bytes", str(BYTES)), True, BYTES, BYTES),
    (("--max-bytes", str(BYTES - 1)), False, BYTES, BYTES - 1),
    (("--frozen", "0"), True, "2 parameters are frozen", "0"),
    (("--frozen", "{0,4}"), False, "2 of 4 parameters are trained: 4.weight, 4.bias", "{0,4}"),
    (("--trainable", "4.bias"), True, "1 parameter is trained", "4.bias"),
    (("--trainable", "0.bias"), False, "1 of 1 parameter is frozen: 0.bias", "0.bias"),
    (("--has", "4:Linear"), True, "4", "4:Linear"),
    (("--has", "4:Conv2d"), False, "nothing", "4:Conv2d"),
    (("--has", "3.weight"), True, "3.weight", "3.weight"),
    (("--has", "**:Module"), False, "nothing", "**:Module"),
    (("--absent", "**:Dropout"), True, "nothing", "**:Dropout"),
    (("--absent", "**:Linear"), False, "3, 4", "**:Linear"),
    (("--dtype", "float32"), True, "float32", "float32"),
    (("--dtype", "torch.float16", "--dtype", "float32"), True, "float32", "float16 or float32"),
    (("--dtype", "bfloat16"), False, "0.weight is float32, and 9 more differ", "bfloat16"),
    (("--finite",), True, "11 tensors without NaN or Inf", "no NaN, no Inf"),
    (("--safe",), True, "only tensors", "only tensors"),
    (("--output-shape", "1,2"), True, [1, 2], [1, 2]),
    (("--output-shape", "1,3"), False, [1, 2], [1, 3]),
    (("--same-as", "bare.pth"), True, "11 tensors are equal", "bare.pth"),
    (("--same-as", BASE), True, "11 tensors are equal", BASE),
]


@pytest.mark.usefixtures("_files")
@pytest.mark.parametrize(("words", "passed", "found", "wanted"), ROWS, ids=[" ".join(row[0])[:40] for row in ROWS])
def test_each_assertion(cli: Cli, words: tuple[str, ...], passed: bool, found: Any, wanted: Any) -> None:
    document = cli("check", "m.pth", *words, "--json", code=0 if passed else 1).json
    assert document.keys() >= {"schema", "model", "passed", "checks"}
    assert document["passed"] is passed
    name = words[0].removeprefix("--")
    assert document["checks"] == [{"check": name, "passed": passed, "found": found, "wanted": wanted}]


@pytest.mark.usefixtures("_files")
def test_all_at_once(cli: Cli) -> None:
    result = cli("check", "m.pth", "--frozen", "0", "--frozen", "1", "--has", "3", "--has", "9", code=1)
    lines = result.out.splitlines()
    assert lines[0].split() == ["check", "result", "found", "wanted"]
    assert [line.split()[:2] for line in lines[1:5]] == [
        ["frozen", "FAILED"],
        ["has", "FAILED"],
        ["frozen", "passed"],
        ["has", "passed"],
    ]
    assert lines[-1] == "Checks: 2 of 4 passed"
    assert result.err == ""


def test_the_finite_assertion_names_nan_and_infinite_values(cli: Cli) -> None:
    torch.save({"a": torch.tensor([1.0, float("nan"), float("inf")]), "b": torch.tensor([float("-inf")])}, "m.pth")
    (row,) = cli("check", "m.pth", "--finite", "--json", code=1).json["checks"]
    assert row["found"] == "a: 1 NaN and 1 Inf, and 1 more tensor"


def quantized(scale: float, scales: torch.Tensor) -> dict[str, torch.Tensor]:
    whole = torch.zeros(2, 2, dtype=torch.int8)
    return {
        "whole": torch._make_per_tensor_quantized_tensor(whole, scale, 0),
        "rows": torch._make_per_channel_quantized_tensor(whole, scales, torch.zeros(2, dtype=torch.int64), 0),
    }


MASKED = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, number):
        super().__init__()
        self.register_buffer("mask", (number * torch.ones(3, 3, device="cpu")).to_sparse())
"""

PARTS: list[tuple[Any, str]] = [
    (lambda: {"s": torch.eye(2).to_sparse()}, ""),
    (lambda: {"s": (torch.eye(2) * float("nan")).to_sparse()}, "s: 4 NaN"),
    (lambda: {"s": torch.diag(torch.tensor([1.0, float("inf")])).to_sparse_csr()}, "s: 1 Inf"),
    (lambda: quantized(0.5, torch.ones(2)), ""),
    (lambda: quantized(float("nan"), torch.ones(2)), "whole: 1 NaN"),
    (lambda: quantized(0.5, torch.tensor([float("inf"), 1.0])), "rows: 1 Inf"),
    (lambda: {"a": torch.ones(2), "m": torch.ones(2, device="meta")}, "m cannot be looked at"),
]


@pytest.mark.parametrize(("made", "found"), PARTS)
def test_finite_checks_the_parts_of_quantized_and_sparse_tensors(cli: Cli, made: Any, found: str) -> None:
    state = made()
    torch.save(state, "m.pth")
    row = cli("check", "m.pth", "--finite", "--json", code=1 if found else 0).json["checks"][0]
    assert row["found"] == (found or f"{len(state)} tensor{'s' if len(state) > 1 else ''} without NaN or Inf")


@pytest.mark.parametrize(("number", "code"), [("1.0", 0), ("1e39", 1)])
def test_finite_checks_tensors_that_a_class_makes_sparse(cli: Cli, number: str, code: int) -> None:
    Path("masked.py").write_text(MASKED)
    cli("check", f"masked.py:Net({number})", "--finite", code=code)


@needs_torch("float4_e2m1fn_x2")
def test_a_dtype_without_nan_passes(cli: Cli) -> None:
    torch.save({"f": torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}, "m.pth")
    cli("check", "m.pth", "--finite")


def test_a_lazy_tensor_does_not_pass(cli: Cli) -> None:
    row = cli("check", "LazyLinear(2)", "--finite", "--json", code=1).json["checks"][0]
    assert row["found"] == "weight, bias cannot be looked at"


@pytest.mark.usefixtures("_files")
def test_an_assertion_that_a_bare_file_cannot_answer_fails(cli: Cli) -> None:
    words = ("--frozen", "0", "--has", "4:Linear", "--absent", "**:Dropout", "--output-shape", "1,2")
    rows = cli("check", "bare.pth", *words, "--json", code=2).json["checks"]  # no forward pass ran
    assert [row["passed"] for row in rows] == [False] * 4
    assert all("--arch" in row["found"] for row in rows)
    cli("check", "bare.pth", "--has", "4.weight", "--absent", "5")
    more = ("--arch", BASE, "--has", "4:Linear", "--absent", "**:Dropout", "--output-shape", "1,2")
    cli("check", "bare.pth", *more, "--input-size", "1,1,1,1")


def test_an_assertion_given_twice_is_an_error(cli: Cli) -> None:
    result = cli("check", "Linear(2,2)", "--max-params", "5", "--max-params", "100", "--json", code=2)
    assert result.error["message"] == "--max-params is given 2 times: pass it only once"
    cli("check", "Linear(2,2)", "--max-bytes", "5MB", "--max-bytes=6MB", code=2)
    cli("check", "Linear(2,2)", "--has", ".", "--has", "weight", "--finite", "--finite", "--max-params", "6")


def test_safe(cli: Cli) -> None:
    torch.save(nn.Linear(2, 2), "whole.pth")
    (row,) = cli("check", "whole.pth", "--safe", "--json", code=1).json["checks"]
    assert row["found"] == "objects of torch.nn.modules.linear.Linear"
    # `--tensors-only` does not make the file itself safe.
    cli("check", "whole.pth", "--safe", "--arch", "Linear(2,2)", "--tensors-only", code=1)
    assert cli("check", "Linear(2,2)", "--safe", "--json").json["checks"][0]["found"] == "no file"
    # A file with only such objects contains no model that could be checked.
    torch.save({"who": nn.Linear, "n": 3}, "objects.pth")
    assert "contains no state dict, but objects of torch.nn" in cli("check", "objects.pth", "--safe", code=3).err


@pytest.mark.usefixtures("_files")
def test_same_as_with_exceptions(cli: Cli) -> None:
    cli("apply", "-m", "m.pth", "-o", "new.pth", "-e", "replace 4 Linear(_,7)", "-e", "init 3 'constant(2)'")
    row = cli("check", "new.pth", "--same-as", "m.pth", "--json", code=1).json["checks"][0]
    assert row["found"] == "4 tensors differ: 3.weight (values), 3.bias (values), 4.weight (shape) and 1 more"
    cli("check", "new.pth", "--same-as", "m.pth", "--except", "4", "--except", "3")
    row = cli("check", "new.pth", "--same-as", "m.pth", "--except", "4", "--json", code=1).json["checks"][0]
    assert row["wanted"] == "m.pth except 4"
    # requires_grad does not count as a value.
    cli("unfreeze", "0", "-m", "m.pth", "-o", "warm.pth")
    cli("check", "warm.pth", "--same-as", "m.pth")


@pytest.mark.usefixtures("_files")
@pytest.mark.parametrize("line", list(EDITS))
def test_same_as_is_what_plain_torch_finds(cli: Cli, line: str) -> None:
    edits = [word for part in line.split("; ") for word in ("-e", part)]
    cli("apply", "-m", "m.pth", "-o", "edited.pth", *edits, "--check", "none")
    wanted = plain(*states("m.pth", "edited.pth"))
    row = cli("check", "edited.pth", "--same-as", "m.pth", "--json", code=1 if wanted else 0).json["checks"][0]
    told = row["found"].split()[0]
    assert int(told) == len(wanted) if wanted else row["found"].endswith("are equal")


@pytest.mark.usefixtures("_files")
def test_output_of_several(cli: Cli) -> None:
    words = ("check", "nets.py:Unusual", "--input-size", "2,4")
    cli(*words, "--output-shape", "2,2", "--output-shape", "2,3")
    cli(*words, "--output-shape", "2,4", code=1)


@pytest.mark.usefixtures("_files")
def test_check_applies_the_working_recipe(cli: Cli) -> None:
    cli("load", BASE, "--input-size", "1,1,1,1")
    cli("replace", "4", "Linear(_,7)")
    cli("freeze", "0")
    cli("check", "--frozen", "0", "--output-shape", "1,7", "--finite", "--has", "4:Linear")


@pytest.mark.usefixtures("_files")
@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "no assertion is given"),
        (("--except", "0"), "--except 0 works only with --same-as"),
        (("--frozen", "9"), "no tensor matches '9'"),
        (("--trainable", "1.running_mean"), "picks no parameter that could be trained"),
        (("--has", "a["), "[ without ]"),
        (("--dtype", "float33"), "'float33' is not a floating-point dtype"),
        (("--dtype", "int64"), "'int64' is not a floating-point dtype"),
        (("--max-params", "many"), "'many' is not a count"),
        (("--max-bytes", "big"), "'big' is not a size"),
        (("--output-shape", "a,b"), "is not a list of whole numbers"),
        (("--same-as", "gone.pth"), "no such file: gone.pth"),
        (("--same-as", "bare.pth", "--except", "nine"), "nine"),
    ],
)
def test_wrong_requests(cli: Cli, words: tuple[str, ...], told: str) -> None:
    assert told in cli("check", "m.pth", *words, code=2).err


@pytest.mark.parametrize(
    ("text", "number"),
    [("60M", 60_000_000), ("1.5B", 1_500_000_000), ("7g", 7 * 10**9), ("200K", 200_000), ("61_100,840", 61_100_840)],
)
def test_how_counts_are_parsed(text: str, number: int) -> None:
    assert parse_count(text) == number


@pytest.mark.parametrize("text", ["", "M", "-1", "1T", "1.5.5", "1e6", "1" * 40])
def test_an_invalid_count_is_an_error(text: str) -> None:
    with pytest.raises(RequestError):
        parse_count(text)


@pytest.mark.usefixtures("_files")
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_torch_is_not_imported_if_the_file_has_the_answer(folder: Path) -> None:
    for words, torch_too in (
        ("check m.pth --has 4 --has 4.weight --safe --dtype float32 --max-params 60M", False),
        ("check m.pth --frozen 0 --has 4:Linear --output-shape 1,2", True),  # the record alone cannot answer these
        ("check m.pth --same-as bare.safetensors", False),
        ("check bare.safetensors --same-as bare.pth --safe --max-bytes 1GB", False),
        ("check m.pth --finite", False),
    ):
        modules, code, _ = fresh(folder, words)
        assert (code, "torch" in modules) == (0, torch_too), words


@pytest.mark.parametrize("dtype", ["bfloat16", "bf16", "torch.bfloat16"])
def test_short_names_of_dtypes_and_sizes(cli: Cli, dtype: str) -> None:
    """The names are those that `cast` accepts."""
    cli("cast", ".", dtype, "-m", "Linear(4,2)", "-o", "m.pth")
    cli("check", "m.pth", "--dtype", dtype, "--max-bytes", "1M")
    cli("summary", "m.pth", "--input-size", "1,4", "--input-dtype", dtype)
