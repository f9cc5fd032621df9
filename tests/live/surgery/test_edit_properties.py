"""Properties of every edit: as text, in a recipe, on the meta device, on a model with values, and undone.

Edits and models are generated, and plain PyTorch gives the expected results.
"""

from __future__ import annotations

import keyword
import re
import shlex
import sys
import tomllib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

import modelcli
from modelcli import edits, recipe, writing
from modelcli.cli import main
from modelcli.edits import Edit, from_words
from modelcli.edits.add import Add
from modelcli.edits.append import Append
from modelcli.edits.cast import Cast
from modelcli.edits.concat import Concat
from modelcli.edits.dequantize import Dequantize
from modelcli.edits.extract import Extract
from modelcli.edits.freeze import Freeze
from modelcli.edits.fuse import Fuse
from modelcli.edits.graft import Graft
from modelcli.edits.init import Init
from modelcli.edits.insert import Insert
from modelcli.edits.permute import Permute
from modelcli.edits.remove import Remove
from modelcli.edits.rename import Rename
from modelcli.edits.replace import Replace
from modelcli.edits.reshape import Reshape
from modelcli.edits.resize import Resize
from modelcli.edits.set import Set
from modelcli.edits.slice import Slice
from modelcli.edits.split import Split
from modelcli.edits.stack import Stack
from modelcli.edits.tie import Tie
from modelcli.edits.unfreeze import Unfreeze
from modelcli.edits.unstack import Unstack
from modelcli.edits.untie import Untie
from modelcli.edits.wrap import Wrap
from modelcli.errors import ModelcliError
from modelcli.language.expressions import Call, Name, parse
from modelcli.language.references import Source
from modelcli.language.selectors import literal
from modelcli.live import planning, surgery
from modelcli.live.meta_models import meta_copy
from modelcli.live.opening import Live, open_live
from modelcli.live.source_models import SourceModels
from modelcli.model.dtypes import FLOATING
from modelcli.model.paths import joined
from tests.conftest import Cli
from tests.language.test_expressions import calls

IN_A_FOLDER = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

# --- edits as text -------------------------------------------------------------------------------------------------

ODD_NAMES = [
    "it's", 'a"b', "a\\b", "\\", "'", '"', "{x}", "[0]", "-x", "--", "--except=a", "-1", "-1.5e3", "a b", " ",
    "\u00e9\u6a21", "$(true)", "`x`", "#", "a:b", "\n", "\t", "\r\n", "=", "*", "**", "?", "\x7f", "\x1b[1m",
    "\u2028", "\U0001f600",
]  # fmt: skip
PATTERNS = [
    ".", "**", "**:Linear", "a.*:_*", "classifier.-1", "-1", "a.[0-3,7]", "{a,b}.*", "{-a,{b,}}", "**.bn?", "\\-x",
    "-[0-3]",
]  # fmt: skip

names = st.sampled_from(ODD_NAMES) | st.text(
    st.characters(exclude_characters=".", exclude_categories=["Cs"]), min_size=1, max_size=8
)
selector_texts = st.lists(names, min_size=1, max_size=3).map(".".join).map(literal) | st.sampled_from(PATTERNS)
targets = st.lists(selector_texts, min_size=1, max_size=3).map(tuple)
picking: dict[str, Any] = {
    "without": st.lists(selector_texts, max_size=2).map(tuple),
    "expect": st.none() | st.integers(0, 999_999_999),
}


def in_words(call: Call) -> Call:
    """Return a scheme as parsing gives it: a bare word among its arguments becomes text."""

    def read(value: Any) -> Any:
        return value.dotted if isinstance(value, Name) and value.dotted.isidentifier() else value

    return Call(call.name, tuple(map(read, call.args)), {key: read(value) for key, value in call.kwargs.items()})


schemes = calls.map(in_words)
placing: dict[str, Any] = {"path": selector_texts, "module": calls}

#: Targets of `set`: words like `a=1` are settings, and a path that is called so is written `a\\=1`.
set_targets = targets.filter(lambda words: not any(re.fullmatch(r"[^\W\d]\w*=.*", word, re.DOTALL) for word in words))
plain_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple),
    max_leaves=4,
)  # fmt: skip
settings_given = st.dictionaries(
    st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True).filter(lambda name: not keyword.iskeyword(name)),
    plain_values, min_size=1, max_size=3,
).map(lambda given: tuple(given.items()))  # fmt: skip

axes = st.integers(-9, 9)

#: The values of `--keep-weights`; None if it is not given.
KEPT = st.sampled_from((None, "overlap", "sum", "mean", "repeat", "interpolate"))
EDITS: dict[type[Edit], st.SearchStrategy[Edit]] = {
    Replace: st.builds(
        Replace,
        target=selector_texts,
        module=calls,
        keep_weights=KEPT,
        untie=st.booleans(),
        tie=st.booleans(),
        **picking,
    ),
    Add: st.builds(Add, **placing),
    Insert: st.builds(Insert, **placing, renumber=st.booleans(), after=st.booleans()),
    Append: st.builds(Append, **placing),
    Remove: st.builds(Remove, targets=targets, renumber=st.booleans(), **picking),
    Extract: st.builds(Extract, path=selector_texts),
    Rename: st.builds(Rename, old=selector_texts, new=selector_texts),
    Freeze: st.builds(Freeze, targets=targets, **picking),
    Unfreeze: st.builds(Unfreeze, targets=targets, **picking),
    Init: st.builds(Init, targets=targets, scheme=schemes, bias=schemes | st.just(Call("zeros")), **picking),
    Cast: st.builds(Cast, targets=targets, dtype=st.sampled_from(sorted(FLOATING)), **picking),
    Dequantize: st.builds(
        Dequantize,
        targets=targets,
        dtype=st.sampled_from(["bfloat16", "float16", "float32", "float64"]),
        block=st.none() | st.tuples(st.integers(1, 999), st.integers(1, 999)),
        **picking,
    ),
    Resize: st.builds(
        Resize,
        targets=targets,
        what=st.sampled_from(("image_size", "in_channels", "vocab_size")),
        size=st.integers(1, 999_999_999),
    ),
    Set: st.builds(Set, targets=set_targets, settings=settings_given, **picking),
    Split: st.builds(
        Split,
        old=selector_texts,
        new=st.lists(selector_texts, min_size=2, max_size=3, unique=True).map(tuple),
        dim=axes,
        sizes=st.lists(st.integers(0, 99), max_size=3).map(tuple),
    ),
    Concat: st.builds(
        Concat, old=st.lists(selector_texts, min_size=2, max_size=3).map(tuple), new=selector_texts, dim=axes
    ),
    Wrap: st.builds(
        Wrap, target=selector_texts, module=calls, also=st.lists(selector_texts, max_size=2).map(tuple), **picking
    ),
    Permute: st.builds(
        Permute,
        targets=targets,
        dims=st.integers(1, 4).flatmap(lambda count: st.permutations(range(count))).map(tuple),
        **picking,
    ),
    Reshape: st.builds(
        Reshape,
        targets=targets,
        shape=st.lists(st.integers(0, 99), min_size=1, max_size=3).map(tuple) | st.sampled_from([(-1,), (3, -1, 4)]),
        **picking,
    ),
    Stack: st.builds(Stack, old=selector_texts, new=selector_texts, dim=axes),
    Unstack: st.builds(Unstack, old=selector_texts, new=selector_texts, dim=axes),
    Slice: st.builds(
        Slice,
        target=selector_texts,
        ranges=st.lists(st.tuples(st.integers(-9, 99), st.integers(-9, 99)), min_size=1, max_size=4).map(tuple),
        tied=st.booleans(),
        **picking,
    ),
    Tie: st.builds(Tie, names=st.lists(selector_texts, min_size=2, max_size=3).map(tuple)),
    Untie: st.builds(Untie, names=targets),
    Fuse: st.builds(Fuse, targets=targets, into=st.lists(selector_texts, max_size=2).map(tuple), **picking),
    Graft: st.builds(
        Graft,
        path=selector_texts,
        other=st.text(min_size=1, max_size=8),
        renames=st.lists(st.tuples(selector_texts, selector_texts), max_size=2).map(tuple),
        lenient=st.booleans(),
        also_init=st.booleans(),
        source_weights=st.none() | st.text(min_size=1, max_size=8),
        source_key=st.none() | st.text(min_size=1, max_size=8),
    ),
}
some_edit = st.one_of(*EDITS.values())


def test_every_edit_with_all_its_options_is_generated() -> None:
    assert set(EDITS) == {edits.find(name) for name in edits.own_names()}


@pytest.mark.parametrize("kind", EDITS)
@given(st.data())
@settings(max_examples=60, deadline=None)
def test_an_edits_text_parses_to_the_same_edit_and_text(kind: type[Edit], data: st.DataObject) -> None:
    """Edits are compared by `repr`, because in Python `True == 1` and `0.0 == -0.0`."""
    edit = data.draw(EDITS[kind])
    text = str(edit)
    assert repr(edits.parse(text)) == repr(edit)
    assert str(edits.parse(text)) == text
    name, *words = shlex.split(text)
    assert repr(from_words(name, words)) == repr(edit)


def quoted(word: str, how: int) -> str:
    """Return a word in one of the ways to quote it for a shell."""
    if how == 0:
        return shlex.quote(word)
    if how == 1:
        return '"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return "".join(f"\\{character}" for character in word) or "''"


@given(some_edit, st.lists(st.integers(0, 2), min_size=20, max_size=20), st.sampled_from([" ", "  ", "\t", " \n "]))
@settings(max_examples=150, deadline=None)
def test_quoting_does_not_change_the_text_of_an_edit(edit: Edit, hows: list[int], space: str) -> None:
    words = shlex.split(str(edit))
    assume(len(words) <= len(hows))
    line = space.join(quoted(word, how) for word, how in zip(words, hows, strict=False))
    assert str(edits.parse(f" {line} ")) == str(edit)


@given(st.lists(st.lists(some_edit, min_size=1, max_size=3), min_size=1, max_size=3))
@settings(IN_A_FOLDER, max_examples=45)
def test_a_recipe_is_read_as_it_was_written(folder: Path, steps: list[list[Edit]]) -> None:
    path = folder / "made.toml"
    path.unlink(missing_ok=True)
    recipe.start(path, Source("alexnet", seed=3))
    stages = [path.read_bytes()]
    for step in steps:
        recipe.append(path, step)
        stages.append(path.read_bytes())
    added = [edit for step in steps for edit in step]
    assert repr(recipe.read(path).edits) == repr(tuple(added))
    assert tomllib.loads(path.read_text("utf-8"))["edits"] == list(map(str, added))
    assert recipe.remove_last(path, len(added)) == list(map(str, added))
    assert path.read_bytes() == stages[0]


# --- models --------------------------------------------------------------------------------------------------------


class Own(nn.Module):
    """A lazy parameter, a buffer, a non-persistent buffer, and a plain tensor attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(()))
        self.register_buffer("offset", torch.ones(2))
        self.register_buffer("hidden", torch.zeros(3), persistent=False)
        self.plain = torch.ones(1)


LEAVES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 4),
    "wide": lambda: nn.Linear(4, 6, bias=False),
    "conv": lambda: nn.Conv2d(2, 3, 1),
    "norm": lambda: nn.BatchNorm1d(4),
    "layer norm": lambda: nn.LayerNorm(4),
    "embedding": lambda: nn.Embedding(4, 4),
    "activation": nn.ReLU,
    "prelu": nn.PReLU,
    "gru": lambda: nn.GRU(2, 2),
    "own": Own,
}
CHILDREN = ["body", "head", "-1", "a b", "\u00e9", "{x}", "it's", "a:b", "*", "7", "module"]

#: A leaf by its name, an existing module by its number, or a container and its children by name.
Spec = str | int | tuple[str, tuple[tuple[str, Any], ...]]


@dataclass(frozen=True)
class Plan:
    """How to build a model repeatedly: its tree, its tied weights and its frozen parameters."""

    root: Spec
    ties: tuple[tuple[int, int], ...] = ()
    frozen: tuple[int, ...] = ()
    training: bool = True

    def build(self) -> nn.Module:
        model = _made(self.root, [])
        holders = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Embedding)]
        for one, other in self.ties:
            if holders:
                first, second = holders[one % len(holders)], holders[other % len(holders)]
                if first.weight.shape == second.weight.shape:
                    second.weight = first.weight
        parameters = list(model.parameters())
        for number in self.frozen:
            if parameters:
                parameters[number % len(parameters)].requires_grad = False
        return model.train(self.training)

    def seeded(self, seed: int) -> nn.Module:
        """Build the model after `torch.manual_seed`, and restore the generator."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build()


def _made(spec: Spec, there: list[nn.Module]) -> nn.Module:
    if isinstance(spec, str):
        there.append(LEAVES[spec]())
    elif isinstance(spec, int):
        return there[spec % len(there)] if there else nn.Identity()
    else:
        kind, named = spec
        children = OrderedDict((name, _made(child, there)) for name, child in named)
        match kind:
            case "numbered":
                there.append(nn.Sequential(*children.values()))
            case "list":
                there.append(nn.ModuleList(children.values()))
            case "named":
                there.append(nn.Sequential(children))
            case _:
                there.append(nn.ModuleDict(children))
    return there[-1]


def _containers(below: st.SearchStrategy[Spec], least: int = 0) -> st.SearchStrategy[Spec]:
    children = st.lists(
        st.tuples(st.sampled_from(CHILDREN), below), min_size=least, max_size=4, unique_by=lambda item: item[0]
    )
    return st.tuples(st.sampled_from(["numbered", "list", "named", "dict"]), children.map(tuple))


parts: st.SearchStrategy[Spec] = st.recursive(
    st.sampled_from(list(LEAVES)) | st.integers(0, 5), _containers, max_leaves=10
)
small_numbers = st.integers(0, 9)
plans = st.builds(
    Plan,
    _containers(parts, least=2),
    st.lists(st.tuples(small_numbers, small_numbers), max_size=2).map(tuple),
    st.lists(small_numbers, max_size=3).map(tuple),
    st.booleans(),
)


def under_every_name(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters and buffers under all their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def account(model: nn.Module) -> dict[str, Any]:
    """Return everything that PyTorch shows of a model except its values."""
    tensors = under_every_name(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    return {
        "printed": repr(model),
        # A parametrized module has a class of its own, which torch makes anew each time.
        "modules": {path: (type_before_parametrizations(module), module.training) for path, module in modules.items()},
        "shared": _first_names(modules),
        "tensors": {
            name: (type(tensor), tensor.shape, tensor.dtype, tensor.requires_grad) for name, tensor in tensors.items()
        },
        "tied": _first_names(tensors),
        "keys": list(model.state_dict()),
    }


def _first_names(named: dict[str, Any]) -> dict[str, str]:
    first: dict[int, str] = {}
    return {name: first.setdefault(id(value), name) for name, value in named.items()}


def assert_same_numbers(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


# --- the meta device and the real model ----------------------------------------------------------------------------

NEW_MODULES = [
    "Linear(4,5)", "PReLU()", "ReLU()", "BatchNorm1d(3)", "LayerNorm(4)", "Linear(_,3)", "Linear(3,_,bias=_)",
    "Sequential(Linear(4,4),ReLU(),PReLU())", "Embedding(5,4)", "GRU(2,_)", "Linear(4,4,dtype=torch.float64)",
    "Linear(4)",
]  # fmt: skip
#: The importable Python module whose `model` a reference can name.
GENERATED = "generated_for_a_test"
#: Other models whose tensors fit some modules.
GRAFTED = ["Linear(4,4)", "Linear(4,5)", "BatchNorm1d(3)", "LayerNorm(4)", "Sequential(Linear(4,4),ReLU())", "ReLU()"]
WRAPPERS = [
    "Sequential(_,Dropout(0.5))", "Sequential(BatchNorm1d(4),_,Linear(4,4))", "ModuleDict({'inner':_})",
    "Sequential(Sequential(ReLU(),_))", "torch.nn.utils.parametrizations:weight_norm(_)",
    "torch.nn.utils.parametrizations:spectral_norm(_,name='weight')", "Linear(4,4)",
    "TransformerEncoder(_,2,enable_nested_tensor=False)",
]  # fmt: skip
SETTINGS = [
    ("momentum", 0.5), ("eps", 0.25), ("affine", False), ("track_running_stats", False), ("bias", False),
    ("inplace", True), ("batch_first", True), ("padding_mode", "reflect"), ("stride", 2), ("gain", None),
    ("body", None), ("head", None), ("dropout", 0.5),
]  # fmt: skip
SCHEMES = ["xavier_uniform", "normal(0,0.01)", "default", "zeros", "constant(2.0)", "eye", "sparse(0.5)", "nothing"]
WIDE = ["*", "**:Linear", "**.weight", "**:_BatchNorm", "*.*", "-1", "."]


@st.composite
def edits_of(draw: st.DrawFn, model: nn.Module) -> list[Edit]:
    """Draw a few edits. Most of their targets exist in the model before the first edit."""
    modules = dict(model.named_modules(remove_duplicate=False))
    paths = [*filter(None, modules), ""]
    place = st.sampled_from(paths).map(literal)
    named = st.sampled_from([*paths[:-1], *under_every_name(model)]).map(literal)
    target = named | named | st.sampled_from(WIDE)
    several = st.lists(target, min_size=1, max_size=2).map(tuple)
    new = st.sampled_from(NEW_MODULES).map(parse)
    free = st.builds(joined, st.sampled_from(paths), st.sampled_from([*CHILDREN, "new", "gain"])).map(literal)
    sequences = [path for path, module in modules.items() if isinstance(module, nn.Sequential | nn.ModuleList)]
    position = st.sampled_from(["0", "1", "2", "-1"])
    numbered = st.builds(joined, st.sampled_from(sequences or paths).map(lambda path: path and literal(path)), position)
    schemes = st.sampled_from(SCHEMES).map(parse)
    less: dict[str, Any] = {
        "without": st.just(()) | st.just(()) | st.tuples(target),
        "expect": st.sampled_from([None, None, None, 1]),
    }
    given = st.sampled_from(SETTINGS).map(lambda setting: (setting,))
    kinds: list[st.SearchStrategy[Edit]] = [
        st.builds(Replace, target=target, module=new, keep_weights=KEPT, untie=st.booleans(), **less),
        st.builds(Replace, target=target, module=new, keep_weights=KEPT, tie=st.just(True), **less),
        st.builds(Add, path=free, module=new),
        st.builds(Insert, path=numbered | place, module=new, after=st.booleans()),
        st.builds(Append, path=st.sampled_from(sequences or paths).map(literal), module=new),
        st.builds(Remove, targets=several, **less),
        st.builds(Extract, path=place),
        st.builds(Rename, old=target, new=target),
        st.builds(Freeze, targets=several, **less),
        st.builds(Unfreeze, targets=several, **less),
        st.builds(Init, targets=several, scheme=schemes, bias=st.just(Call("zeros")) | schemes, **less),
        st.builds(Cast, targets=several, dtype=st.sampled_from(["float16", "bfloat16", "float64"]), **less),
        st.builds(Dequantize, targets=several, dtype=st.just("bfloat16"), **less),
        st.builds(Resize, targets=several, what=st.just("vocab_size"), size=st.integers(1, 9)),
        st.builds(Set, targets=several.filter(lambda words: "=" not in "".join(words)), settings=given, **less),
        st.builds(Wrap, target=target, module=st.sampled_from(WRAPPERS).map(parse), **less),
        st.builds(
            Slice,
            target=st.sampled_from(sequences or paths).map(literal),
            ranges=st.lists(st.tuples(st.integers(-2, 2), st.integers(-2, 2)), min_size=1, max_size=3).map(tuple),
            tied=st.booleans(),
            **less,
        ),
        st.builds(Tie, names=st.tuples(target, target)),
        st.builds(Untie, names=several),
        st.builds(Fuse, targets=several, into=st.lists(target, max_size=2).map(tuple), **less),
        st.builds(
            Graft,
            path=place,
            other=st.sampled_from(GRAFTED) | place.map(lambda path: f"{GENERATED}:model:{path}"),
            lenient=st.booleans(),
            also_init=st.booleans(),
        ),
        st.builds(Split, old=target, new=st.tuples(target, target).filter(lambda names: names[0] != names[1])),
        st.builds(Concat, old=st.tuples(target, target), new=target),
        st.builds(Stack, old=target, new=target),
        st.builds(Unstack, old=target, new=target),
        st.builds(Permute, targets=several, dims=st.sampled_from([(1, 0), (0,)]), **less),
        st.builds(Reshape, targets=several, shape=st.just((-1,)), **less),
    ]
    return draw(st.lists(st.one_of(kinds), min_size=1, max_size=4))


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """An importable Python module whose `build` a reference can name."""
    module = ModuleType(GENERATED)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@given(plans, st.integers(0, 2**63 - 1), st.booleans(), st.data())
@settings(IN_A_FOLDER, max_examples=90)
def test_an_edit_gives_the_same_on_meta_with_values_and_in_the_file(
    folder: Path, generated: ModuleType, plan: Plan, seed: int, as_instance: bool, data: st.DataObject
) -> None:
    """Both models refuse an edit or both become the same, and the written file has the values of the second."""
    model = plan.seeded(seed)
    generated.__dict__["model"] = plan.seeded(seed) if as_instance else plan.build
    live = open_live(Source(f"{generated.__name__}:model", seed=seed))
    assert account(live.module) == account(model)
    done = []
    for edit in data.draw(edits_of(model)):
        before = account(model)
        problem, model = carried_out(model, edit, seed, live.edit_count + 1)
        assert on_meta(live, edit) == problem
        assert account(live.module) == account(model)
        if problem is None:
            done.append(edit)
        else:
            assert account(model) == before
    again = modelcli.apply(plan.seeded(seed), *map(str, done), seed=seed)
    assert_same_numbers(under_every_name(again), under_every_name(model))
    assume(model.state_dict())
    out = folder / "out.pth"
    writing.write(planning.plan(live, out, "pth"), out, writing.WriteOptions(force=True))
    assert_same_numbers(torch.load(out, weights_only=True), model.state_dict())
    loaded = modelcli.load(out, trust=True)
    assert account(loaded) == account(model)
    assert_same_numbers(loaded.state_dict(), model.state_dict())


def carried_out(model: nn.Module, edit: Edit, seed: int, number: int) -> tuple[str | None, nn.Module]:
    """Apply an edit to a model with values. Returns the error, or None, and the model."""
    try:
        return None, surgery.apply(model, [edit], seed=seed, numbers=[number], sources=SourceModels(open_live)).model
    except ModelcliError as error:
        return str(error), model


def on_meta(live: Live, edit: Edit) -> str | None:
    """Apply an edit to a model on the meta device. Returns the error, or None."""
    try:
        live.apply([edit])
    except ModelcliError as error:
        return str(error)
    return None


# --- done and undone -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Taken:
    """A snapshot of a model: its objects by path, and their contents."""

    account: dict[str, Any]
    modules: dict[str, nn.Module]
    tensors: dict[str, torch.Tensor]
    numbers: dict[str, torch.Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> Taken:
        tensors = under_every_name(model)
        numbers = {name: tensor.detach().clone() for name, tensor in tensors.items() if not tensor.is_meta}
        return cls(account(model), dict(model.named_modules(remove_duplicate=False)), tensors, numbers)

    def assert_is(self, model: nn.Module) -> None:
        now = Taken.of(model)
        assert now.account == self.account
        for before, after in ((self.modules, now.modules), (self.tensors, now.tensors)):
            assert list(after) == list(before)
            assert all(after[name] is before[name] for name in before)
        assert_same_numbers(now.numbers, self.numbers)


def placed(model: nn.Module, meta: bool) -> nn.Module:
    return meta_copy(model, keep_values=True) if meta else model


def sequences_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules in which `insert` accepts a position."""
    return {
        path: module
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Sequential | nn.ModuleList)
        and list(module._modules) == list(map(str, range(len(module))))
    }


@given(plans, st.booleans(), st.data())
@settings(max_examples=60, deadline=None)
def test_inserting_and_removing_restores_the_model(plan: Plan, meta: bool, data: st.DataObject) -> None:
    model = placed(plan.build(), meta)
    assume(sequences := sequences_of(model))
    path = data.draw(st.sampled_from(list(sequences)))
    children, taken = list(sequences[path]._modules.values()), Taken.of(model)
    position = data.draw(st.integers(0, len(children)))
    there = literal(joined(path, str(position)))
    surgery.apply(model, [Insert(path=there, module=Call("Linear", (4, 4)))])
    now = list(sequences[path]._modules.values())
    assert [*now[:position], *now[position + 1 :]] == children
    assert type(now[position]) is nn.Linear
    surgery.apply(model, [Remove(targets=(there,))])
    taken.assert_is(model)


@given(plans, st.booleans(), st.booleans(), st.data())
@settings(max_examples=60, deadline=None)
def test_freezing_and_unfreezing_restores_the_flags(plan: Plan, meta: bool, thaw: bool, data: st.DataObject) -> None:
    """Only requires_grad changes, and only for the targets and the tensors tied to them."""
    model = placed(plan.build(), meta)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assume(parameters)
    paths = [path for path, _ in model.named_modules(remove_duplicate=False)]
    places = st.sampled_from([*parameters, *(path for path in paths if any(_at(name, path) for name in parameters))])
    targets = data.draw(st.lists(places, min_size=1, max_size=3))
    without = data.draw(st.lists(places, max_size=1))
    chosen = [
        parameter
        for name, parameter in parameters.items()
        if any(_at(name, target) for target in targets) and not any(_at(name, target) for target in without)
    ]
    assume(chosen)
    for parameter in chosen:
        parameter.requires_grad = not thaw
    taken, flags = Taken.of(model), {name: parameter.requires_grad for name, parameter in parameters.items()}
    first, second = (Unfreeze, Freeze) if thaw else (Freeze, Unfreeze)
    selected: dict[str, Any] = {"targets": tuple(map(literal, targets)), "without": tuple(map(literal, without))}
    surgery.apply(model, [first(**selected)])
    ids = set(map(id, chosen))
    assert {name: parameter.requires_grad for name, parameter in parameters.items()} == {
        name: thaw if id(parameters[name]) in ids else flag for name, flag in flags.items()
    }
    surgery.apply(model, [second(**selected)])
    taken.assert_is(model)


def _at(name: str, path: str) -> bool:
    """Whether a tensor has this path, or is in the module at it."""
    return not path or name == path or name.startswith(f"{path}.")


@given(plans, st.booleans(), st.data())
@settings(max_examples=60, deadline=None)
def test_if_one_edit_is_refused_none_is_applied(plan: Plan, meta: bool, data: st.DataObject) -> None:
    model = placed(plan.build(), meta)
    taken = Taken.of(model)
    good = data.draw(edits_of(model))
    with pytest.raises(ModelcliError):
        surgery.apply(model, [*good, Freeze(targets=("no such module",))])
    taken.assert_is(model)


# --- a failed apply ------------------------------------------------------------------------------------------------

GOOD = ["freeze conv1", "unfreeze bn.bias", "replace conv1 Conv2d(1,_,1)", "init conv2 ones", "add spare 'ReLU()'"]
BAD = [
    "frezee conv1",
    "freeze 'conv1",
    "freeze nothing.*",
    "freeze bn --expect 7",
    "remove .",
    "rename conv1.* c.*",
    "replace conv2 Linear(4)",
    "replace conv2 'Conv2d(9,5,1)'",
    "replace conv2 'Linear(10**6,10**7)'",
    "replace conv2 no_such:Class",
    "init bn.running_mean zeros",
]


def files_of(folder: Path) -> dict[str, tuple[bytes, int, int, int]]:
    """Return the contents, inode and times of each file."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            state = path.stat()
            found[str(path.relative_to(folder))] = (path.read_bytes(), state.st_mtime_ns, state.st_ino, state.st_mode)
    return found


@pytest.fixture
def project(cli: Cli, folder: Path) -> Path:
    """A folder with a working recipe with an edit, another recipe, a checkpoint, and a file at the output path."""
    cli("load", "nets.py:Net", "--input-size", "1,1,4,4")
    cli("freeze", "conv2")
    cli("save", "model.pth")
    (folder / "out.pth").write_bytes(b"mine")
    (folder / "other.toml").write_text('model = "nets.py:Net"\ninput_size = "1,1,4,4"\nedits = ["freeze bn"]\n')
    return folder


@given(
    st.lists(st.sampled_from(GOOD), max_size=2),
    st.sampled_from(BAD),
    st.lists(st.sampled_from(GOOD), max_size=2),
    st.sampled_from([[], ["other.toml"], ["-m", "model.pth", "--trust"], ["other.toml", "-m", "nets.py:Net"]]),
    st.sampled_from([[], ["-o", "out.pth", "--force"], ["-o", "new/out.pth"], ["-o", "out/"], ["--dry-run"]]),
)
@settings(IN_A_FOLDER, max_examples=45)
def test_a_failed_apply_leaves_recipe_and_files_untouched(
    cli: Cli, project: Path, before: list[str], bad: str, after: list[str], model: list[str], out: list[str]
) -> None:
    taken = files_of(project)
    lines = [word for line in (*before, bad, *after) for word in ("-e", line)]
    failed(cli, "apply", *model, *lines, *out)
    assert files_of(project) == taken


def failed(cli: Cli, *words: str) -> None:
    """Run a command that fails, with whatever exit code an error has."""
    code = main(list(words))
    captured = cli.capsys.readouterr()
    assert code in (2, 3, 5), f"{words} gave {code}: {captured.out}"
    assert "Traceback" not in captured.err
