"""Selectors (section 3 of the contract)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelcli.errors import RequestError
from modelcli.language import selectors
from modelcli.language.selectors import literal, refuse_nested, select_modules, select_tensors
from modelcli.model.blueprint import Blueprint, ModuleInfo, from_keys
from modelcli.model.tensors import TensorInfo

NORM = ("BatchNorm2d", "_BatchNorm", "_NormBase")


def sequence(path: str, kind: str = "Sequential") -> ModuleInfo:
    return ModuleInfo(path, kind, (kind,))


def module(path: str, *bases: str) -> ModuleInfo:
    return ModuleInfo(path, bases[0], bases)


def tensor(name: str) -> TensorInfo:
    return TensorInfo(name, (1,), "float32")


#: A small vision model: a stem, two layers with a nested block, an encoder of 12 layers, a classifier of 7 modules.
NET = Blueprint(
    modules=(
        module("", "Net"),
        module("bn", *NORM),
        sequence("features"),
        module("features.0", "Conv2d", "_ConvNd"),
        module("features.1", *NORM),
        sequence("features.2"),
        module("features.2.0", "Conv2d", "_ConvNd"),
        sequence("layer1"),
        module("layer1.0", "Block"),
        module("layer1.0.bn1", *NORM),
        module("layer1.0.bn12", *NORM),
        sequence("layer2"),
        module("layer2.0", "Block"),
        module("layer2.0.bn1", *NORM),
        sequence("layers", "ModuleList"),
        *(module(f"layers.{number}", "Block") for number in range(12)),
        sequence("classifier"),
        *(module(f"classifier.{number}", "Linear") for number in range(7)),
    ),
    tensors=(
        tensor("scale"),
        *map(tensor, ("bn.weight", "bn.bias", "features.0.weight", "features.1.weight", "features.2.0.weight")),
        *map(tensor, ("layer1.0.bn1.weight", "layer1.0.bn12.weight", "layer2.0.bn1.weight")),
        *(tensor(f"layers.{number}.w") for number in range(12)),
        *(tensor(f"classifier.{number}.{name}") for number in range(7) for name in ("weight", "bias")),
    ),
)
LAYER1 = ["layer1", "layer1.0", "layer1.0.bn1", "layer1.0.bn12"]
LAYER2 = ["layer2", "layer2.0", "layer2.0.bn1"]
NORMS = ["bn", "features.1", "layer1.0.bn1", "layer1.0.bn12", "layer2.0.bn1"]


@pytest.mark.parametrize(
    ("selector", "picked"),
    [
        # a path is itself and nothing else
        ("classifier.6", ["classifier.6"]),
        ("features", ["features"]),
        # the last child of a sequence
        ("classifier.-1", ["classifier.6"]),
        ("classifier.-7", ["classifier.0"]),
        ("layers.-1", ["layers.11"]),
        ("features.-1.-1", ["features.2.0"]),
        ("layer?.-1.bn1", ["layer1.0.bn1", "layer2.0.bn1"]),
        # direct children: *, ? and {} stay inside one component
        ("features.*", ["features.0", "features.1", "features.2"]),
        ("*.0", ["features.0", "layer1.0", "layer2.0", "layers.0", "classifier.0"]),
        ("layer?", ["layer1", "layer2", "layers"]),
        ("l*er?", ["layer1", "layer2", "layers"]),
        ("features.{0,2}", ["features.0", "features.2"]),
        ("{features,layer1}.0", ["features.0", "layer1.0"]),
        ("layer{1,{2,s}}", ["layer1", "layer2", "layers"]),
        ("layer1.0.bn1{,2}", ["layer1.0.bn1", "layer1.0.bn12"]),
        # ranges of numbers, ends included
        ("layers.[0-2]", ["layers.0", "layers.1", "layers.2"]),
        ("layers.[9-11]", ["layers.9", "layers.10", "layers.11"]),
        ("layers.[0,3-4]", ["layers.0", "layers.3", "layers.4"]),
        ("layer[1-2]", ["layer1", "layer2"]),
        ("layers.{[0-1],11}", ["layers.0", "layers.1", "layers.11"]),
        # any depth, none included
        ("**.bn?", ["layer1.0.bn1", "layer2.0.bn1"]),
        ("**.bn", ["bn"]),
        ("layer1.**", LAYER1),
        ("layer[1-2].**", [*LAYER1, *LAYER2]),
        ("layer1.**.bn1", ["layer1.0.bn1"]),
        ("**.features.**.0", ["features.0", "features.2.0"]),
        ("**", [info.path for info in NET.modules]),
        ("**.**", [info.path for info in NET.modules]),
        # of a type; a base class matches too
        ("**:BatchNorm2d", NORMS),
        ("**:_BatchNorm", NORMS),
        ("**:*Norm*", NORMS),
        ("features.*:Conv2d", ["features.0"]),
        ("features.**:Conv2d", ["features.0", "features.2.0"]),
        ("**:Net", [""]),
        (":Linear", [f"classifier.{number}" for number in range(7)]),
        # the whole model
        (".", [""]),
        (".:Net", [""]),
    ],
)
def test_which_modules_a_selector_picks(selector: str, picked: list[str]) -> None:
    assert select_modules(NET, [selector]) == picked


@pytest.mark.parametrize(
    ("selector", "picked"),
    [
        ("classifier.6.weight", ["classifier.6.weight"]),  # a tensor by its own name
        ("classifier.6", ["classifier.6.weight", "classifier.6.bias"]),  # all those of a module
        ("classifier.-1.bias", ["classifier.6.bias"]),
        ("features", ["features.0.weight", "features.1.weight", "features.2.0.weight"]),
        ("scale", ["scale"]),
        ("**.bias", ["bn.bias", *(f"classifier.{number}.bias" for number in range(7))]),
        ("features.**:Conv2d", ["features.0.weight", "features.2.0.weight"]),
        (".", [info.name for info in NET.tensors]),
        ("*", [info.name for info in NET.tensors]),  # every direct child, and all below each
    ],
)
def test_which_tensors_a_selector_picks(selector: str, picked: list[str]) -> None:
    assert select_tensors(NET, [selector]) == picked


@pytest.mark.parametrize("selector", ["Features.*", "**:batchnorm2d", "LAYER1"])
def test_selectors_are_case_sensitive(selector: str) -> None:
    with pytest.raises(RequestError, match="no module matches"):
        select_modules(NET, [selector])


@pytest.mark.parametrize("selector", ["feat", "eatures", "classifier", "layer1.0.bn1"])
def test_a_selector_must_match_the_full_path(selector: str) -> None:
    paths = {info.path for info in NET.modules}
    if selector in paths:
        assert select_modules(NET, [selector]) == [selector]
    else:
        with pytest.raises(RequestError):
            select_modules(NET, [selector])


@pytest.mark.parametrize("selector", ["features.+", "layer(1|2)", "classifier.^6", "layers.\\d", "f.atures"])
def test_no_regular_expression_has_a_meaning(selector: str) -> None:
    with pytest.raises(RequestError, match="no module matches"):
        select_modules(NET, [selector])


def test_a_minus_one_is_only_for_sequences() -> None:
    with pytest.raises(RequestError, match=r"no module matches 'layer1\.0\.-1'"):
        select_modules(NET, ["layer1.0.-1"])
    with pytest.raises(RequestError, match=r"no module matches 'classifier\.-8'"):
        select_modules(NET, ["classifier.-8"])


def test_a_minus_one_is_the_last_position_whatever_its_name() -> None:
    named = Blueprint((module("", "Net"), sequence("s"), module("s.9", "ReLU"), module("s.act", "ReLU")), ())
    assert select_modules(named, ["s.-1"]) == ["s.act"]


def test_minus_one_in_a_bare_checkpoint_with_numbered_children() -> None:
    bare = from_keys([tensor("net.0.weight"), tensor("net.2.weight"), tensor("net.1.weight"), tensor("body.0.w")])
    with pytest.raises(RequestError):
        select_modules(bare, ["net.-1"])  # 0, 2, 1: nothing says which is last
    assert select_modules(bare, ["body.-1"]) == ["body.0"]


def test_number_ranges_match_numbers_without_leading_zeros() -> None:
    paths = ("", "l", "l.1", "l.01", "l.10", "l.100", "l.1x")
    found = select_modules(Blueprint(tuple(module(path, "Block") for path in paths), ()), ["l.[1-10]"])
    assert found == ["l.1", "l.10"]


def test_several_selectors_are_a_union_in_the_order_of_the_model() -> None:
    assert select_modules(NET, ["layer2", "features.0", "layer[1-2]"]) == ["features.0", "layer1", "layer2"]


def test_except_takes_away() -> None:
    assert select_modules(NET, ["features.*"], without=["features.1"]) == ["features.0", "features.2"]
    assert select_tensors(NET, ["features"], without=["**:BatchNorm2d"]) == [
        "features.0.weight",
        "features.2.0.weight",
    ]


def test_except_may_not_take_away_everything() -> None:
    with pytest.raises(RequestError, match="--except takes away all modules"):
        select_modules(NET, ["features"], without=["features"])


@pytest.mark.parametrize("arguments", [(["features", "fetures"], []), (["features"], ["fetures"])])
def test_every_selector_is_checked_by_itself(arguments: tuple[list[str], list[str]]) -> None:
    chosen, without = arguments
    with pytest.raises(RequestError, match="no module matches 'fetures'") as caught:
        select_modules(NET, chosen, without=without)
    assert caught.value.exit_code == 2
    assert (caught.value.hint or "").startswith("nearest: features")


@pytest.mark.parametrize(
    ("selector", "hint"),
    [
        ("clasifier.6", "nearest: classifier.6"),
        ("features.77", "nearest: features"),
        ("**:BatchNorm3d", "no module is of type BatchNorm3d; nearest: BatchNorm2d"),
        ("**:Transformer", "no module is of type Transformer"),
        ("zzz", "there are: bn, features, layer1"),
    ],
)
def test_the_error_for_no_match_names_the_nearest_paths(selector: str, hint: str) -> None:
    with pytest.raises(RequestError) as caught:
        select_modules(NET, [selector])
    assert caught.value.message == f"no module matches {selector!r}"
    assert caught.value.hint is not None
    assert hint in caught.value.hint


def test_the_error_for_no_match_among_tensors_names_tensors() -> None:
    with pytest.raises(RequestError, match=r"no tensor matches 'classifier\.6\.wieght'") as caught:
        select_tensors(NET, ["classifier.6.wieght"])
    assert "classifier.6.weight" in (caught.value.hint or "")


def test_a_bare_checkpoint_says_why_no_type_matches() -> None:
    with pytest.raises(RequestError) as caught:
        select_modules(from_keys([tensor("a.weight")]), ["**:Linear"])
    assert "--arch" in (caught.value.hint or "")


def test_the_hint_for_words_that_a_shell_expanded(folder: Path) -> None:
    (folder / "feature").touch()
    with pytest.raises(RequestError) as caught:
        select_modules(NET, ["feature"])
    hint = caught.value.hint or ""
    assert "'feature' is a file here" in hint
    assert "quote" in hint
    assert "nearest: features" in hint


LANDMARKED = replace(NET, landmarks={"head": ("classifier.6", "classifier.0"), "stem": ("features.0",)})


@pytest.mark.parametrize(
    ("selector", "picked"),
    [
        ("@head", ["classifier.0", "classifier.6"]),
        ("@stem", ["features.0"]),
        ("@head:Linear", ["classifier.0", "classifier.6"]),
        ("@stem:Linear", None),
    ],
)
def test_a_landmark_picks_the_module_that_the_library_names(selector: str, picked: list[str] | None) -> None:
    if picked is None:
        with pytest.raises(RequestError, match="no module matches '@stem:Linear'"):
            select_modules(LANDMARKED, [selector])
    else:
        assert select_modules(LANDMARKED, [selector]) == picked


def test_paths_below_a_landmark() -> None:
    assert select_tensors(LANDMARKED, ["@stem.weight"]) == ["features.0.weight"]
    assert select_tensors(LANDMARKED, ["@stem.*"]) == select_tensors(LANDMARKED, ["features.0.*"])


def test_an_unavailable_or_unknown_landmark_is_an_error() -> None:
    with pytest.raises(RequestError, match=r"no library says which module of this model is the classifier \(@head\)"):
        select_modules(NET, ["@head"])
    with pytest.raises(RequestError, match=r"'@hed' in selector '@hed' has no meaning") as error:
        select_modules(LANDMARKED, ["@hed"])
    assert error.value.hint == "there are @head (the classifier) and @stem (the first layer)"


def test_a_backslash_names_a_module_that_begins_with_an_at_sign() -> None:
    odd = replace(NET, modules=(*NET.modules, module("@head", "Linear")))
    assert literal("@head") == "\\@head"
    assert select_modules(odd, [literal("@head")]) == ["@head"]


def test_expect_makes_any_other_number_an_error() -> None:
    assert len(select_modules(NET, ["features.*"], expect=3)) == 3
    with pytest.raises(RequestError, match=r"3 modules match, not the 2 expected: features\.0, features\.1, feat"):
        select_modules(NET, ["features.*"], expect=2)
    with pytest.raises(RequestError, match="14 tensors match, not the 15 expected"):
        select_tensors(NET, ["classifier"], expect=15)


def test_matches_inside_one_another_are_refused_where_one_would_be_destroyed() -> None:
    refuse_nested(["features.0", "features.1", "features", "features2"][:2])
    with pytest.raises(RequestError, match=r"features\.2\.0 lies inside features\.2, and both match: it is why"):
        refuse_nested(select_modules(NET, ["features.2.**"]), "it is why")
    with pytest.raises(RequestError, match=r"bn lies inside \., and both match"):
        refuse_nested(["", "bn"])
    refuse_nested(["layer1", "layer1x", "layer"])  # alike, not inside


@pytest.mark.parametrize(
    ("selector", "words"),
    [
        ("", "selector is empty"),
        ("a..b", "empty component"),
        (".a", "empty component"),
        ("a.", "empty component"),
        ("a.**b", r"\*\* matches whole components.*'\*\*b'"),
        ("a[", r"\[ without \]"),
        ("a]", r"\] without \["),
        ("{a", r"\{ without \}"),
        ("a}", r"\} without \{"),
        ("{a.b}", "cannot contain a dot"),
        ("a.[3-1]", r"\[3-1\].*3 is more than 1"),
        ("a.[x]", r"\[x\].*not a range of numbers"),
        ("a.[]", r"\[\].*not a range of numbers"),
        ("a\\", "ends in a backslash"),
        ("a:", "'' in selector 'a:' is not the name of a class"),
        ("a:b-c", "'b-c' in selector"),
        ("a" * 5000, "5000 characters; the limit is 4096"),
        ("{" * 500 + "}" * 500, "nested deeper than 10"),
    ],
)
def test_the_error_names_the_invalid_part_of_a_selector(selector: str, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        selectors.parse(selector)


def test_a_backslash_takes_the_next_character_as_it_is() -> None:
    odd = Blueprint(tuple(module(path, "ReLU") for path in ("", "a*", "ab", "a,b", "a}", "[0]", "-1", "x:y")), ())
    assert select_modules(odd, ["a*"]) == ["a*", "ab", "a,b", "a}"]
    assert select_modules(odd, ["a\\*"]) == ["a*"]
    assert select_modules(odd, ["{a\\,b,a\\}}"]) == ["a,b", "a}"]
    assert select_modules(odd, ["\\[0\\]"]) == ["[0]"]
    assert select_modules(odd, ["\\-1"]) == ["-1"]
    assert select_modules(odd, ["x\\:y"]) == ["x:y"]


names = st.text(st.characters(exclude_characters=".", exclude_categories=["Cs"]), min_size=1, max_size=8)


@given(st.lists(names, min_size=1, max_size=3), st.lists(names, max_size=3))
@settings(deadline=None)
def test_literal_picks_exactly_its_path(parts: list[str], others: list[str]) -> None:
    path = ".".join(parts)
    model = from_keys([tensor(f"{path}.w"), *(tensor(f"{other}.w") for other in others)])
    assert select_modules(model, [literal(path)]) == [path]
    assert select_modules(model, [literal("")]) == [""]


paths = st.lists(st.sampled_from(["a", "b", "ab"]), min_size=1, max_size=4)


def picks(wanted: Sequence[str], parts: Sequence[str]) -> bool:
    """Whether selector components match a path, by definition: `**` is any number of components, others are globs."""
    if not wanted:
        return not parts
    first, *rest = wanted
    if first == "**":
        return picks(rest, parts) or (bool(parts) and picks(wanted, parts[1:]))
    return bool(parts) and fnmatchcase(parts[0], first) and picks(rest, parts[1:])


@given(st.lists(st.sampled_from(["a", "b", "*", "?", "a*", "**"]), min_size=1, max_size=4), st.lists(paths, min_size=1))
@settings(deadline=None)
def test_matching_many_paths_equals_matching_each_path(wanted: list[str], found: list[list[str]]) -> None:
    """A tensor matches by its own name, or by the path of a module above it."""
    model = from_keys([tensor(".".join([*path, "w"])) for path in found])
    modules = {module.path for module in model.modules if picks(wanted, module.path.split(".") if module.path else ())}
    selector = selectors.parse(".".join(wanted))
    assert selectors.matched_modules(selector, model) == modules
    above = {name: {name[:end] for end, letter in enumerate(name) if letter == "."} | {""} for name in model.by_name}
    assert selectors.matched_tensors(selector, model) == {
        name for name in model.by_name if picks(wanted, name.split(".")) or above[name] & modules
    }
    outermost = selectors.outermost_of_tensors(modules, model)
    assert outermost == {name: min(above[name] & modules, key=len) for name in above if above[name] & modules}


@given(st.text(max_size=60) | st.text("ab.*?[]{},:\\-019", max_size=30))
@settings(deadline=None)
def test_any_text_is_a_selector_or_a_modelcli_error(text: str) -> None:
    try:
        parsed = selectors.parse(text)
    except RequestError:
        return
    assert parsed.text == text
    assert selectors.matched_modules(parsed, NET) <= set(NET.by_path)


@pytest.mark.parametrize("selector", ["*a" * 40 + "b", "{a,aa}" * 40 + "b", "**.a." * 12 + "b", "**.-1." * 12 + "b"])
def test_no_selector_takes_long(selector: str) -> None:
    """A selector can come from a file, so matching must not try every way to divide a name among its wildcards."""
    model = from_keys([tensor("a" * 200 + ".w"), tensor(".".join("a" * 100) + ".w"), tensor("0." * 60 + "w")])
    start = time.process_time()
    with pytest.raises(RequestError, match="no module matches"):
        select_modules(model, [selector])
    assert time.process_time() - start < 5


@pytest.mark.parametrize(("asked", "there"), [("fc", "module.fc"), ("model.module.fc", "module.fc")])
def test_the_hint_for_a_missing_wrapper_prefix(asked: str, there: str) -> None:
    names = ("module.conv1.weight", "module.fc.weight", "module.fc.bias")
    blueprint = from_keys([TensorInfo(name, (1,), "float32") for name in names])
    with pytest.raises(RequestError, match="no module matches") as caught:
        select_modules(blueprint, [asked])
    assert caught.value.hint == f"nearest: {there}"
