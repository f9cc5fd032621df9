"""The page of a model in a real browser, and the data in it."""

from __future__ import annotations

import json
import random
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from modelcli.commands.report import Origin, Report
from modelcli.errors import RequestError
from modelcli.language import selectors
from modelcli.model.blueprint import Blueprint, from_keys
from modelcli.model.tensors import TensorInfo
from modelcli.render import page
from modelcli.render.page import data, heatmap
from modelcli.values.differences import Distance
from tests import browser as browsers
from tests.browser import Browser
from tests.conftest import Cli


def named(*names: str, shape: tuple[int, ...] = (4, 4), dtype: str = "float32") -> Blueprint:
    return from_keys([TensorInfo(name, shape, dtype) for name in names])


def report_of(blueprint: Blueprint) -> Report:
    return Report(blueprint, Origin("made.pth"))


def data_in(text: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def layers(count: int) -> Blueprint:
    """Return a transformer whose layers have 10 modules and 12 tensors each."""
    kinds = ("q", "k", "v", "o", "up", "gate", "down")
    tensors = [f"model.layers.{n}.{kind}.weight" for n in range(count) for kind in kinds]
    norms = [
        f"model.layers.{n}.{kind}.{own}" for n in range(count) for kind in ("n1", "n2") for own in ("weight", "bias")
    ]
    return named(
        "model.embed.weight", *sorted(tensors + norms, key=lambda name: int(name.split(".")[2])), "head.weight"
    )


def all_different(tensors: int) -> Blueprint:
    """Return modules that never fold: no two shapes are the same."""
    return from_keys(
        [TensorInfo(f"encoder.part{n % 97}.layer{n}.weight", (n + 1, 3), "float32") for n in range(tensors)]
    )


# --- without a browser -----------------------------------------------------------------------------------------------


def unfolded(document: dict[str, Any]) -> list[str]:
    """Return the paths of all nodes in the data of a page, in the order of their numbers."""
    found = []

    def walk(path: str, kind: int) -> None:
        found.append(path)
        below = iter(document["modules"][kind][0] if kind >= 0 else ())
        for entry in below:
            if isinstance(entry, str | int):
                name = entry if isinstance(entry, str) else document["names"][entry]
                walk(f"{path}.{name}" if path else name, next(below))
            else:
                prefix, first, count, kind_of_run = entry
                for number in range(first, first + count):
                    walk(f"{path}.{prefix}{number}" if path else f"{prefix}{number}", kind_of_run)

    walk("", len(document["modules"]) - 1)
    return found


@pytest.mark.parametrize(
    "blueprint", [layers(5), all_different(20), named("a", "b.0", "b.1", "b.2", "b.3.w", "b.x y.w")]
)
def test_the_data_has_every_module_and_tensor_once(blueprint: Blueprint) -> None:
    tree = data.Tree(blueprint)
    found = unfolded(json.loads(json.dumps(data.document(blueprint, tree))))
    modules, tensors = tree.numbers()
    expected = [module.path for module in blueprint.modules] + [tensor.name for tensor in blueprint.tensors]
    assert sorted(found) == sorted(expected)
    assert all(found[number] == name for name, number in (*modules.items(), *tensors.items()))


def test_equal_layers_are_stored_once() -> None:
    few, many = (page.html(report_of(layers(count))) for count in (4, 400))
    assert len(many) - len(few) < 200


def test_large_models_make_small_pages() -> None:
    assert len(page.html(report_of(all_different(10_000)))) < 3_000_000


@pytest.mark.sweep
@pytest.mark.parametrize("make", [lambda: layers(9_000), lambda: all_different(100_000)])
def test_100_000_tensors_make_a_page_of_at_most_5_megabytes(make: Callable[[], Blueprint]) -> None:
    assert len(page.html(report_of(make()))) < 5_000_000


def test_a_deep_model_does_not_exhaust_the_stack() -> None:
    text = page.html(report_of(named(".".join(["m"] * 3000))))
    assert len(data_in(text)["tree"]["modules"]) == 3000


HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(2)>",
    '" onmouseover="alert(3)" x="',
    "{{ 7 * 7 }}{% raw %}",
    "</style><style>*{display:none}",
    "javascript:alert(4)",
    "<!--<script>",
    "&lt;b&gt;",
    "\u202egnp.exe",
    "__proto__",
    "constructor",
    "]]>",
]


class Tags(HTMLParser):
    """Collects the elements of a page, and the names of their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[str, ...]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, tuple(name for name, _ in attrs)))


def hostile_names() -> list[str]:
    names = [f"{text}.{n}.weight" for n, text in enumerate(HOSTILE)]
    return [name.replace("..", ".") for name in names]


def test_names_are_never_markup() -> None:
    """The page of hostile names has the elements and attributes of the page of harmless ones."""
    harmless = [re.sub(r"[^.]", "x", name.partition(".")[0]) + f"{n}.weight" for n, name in enumerate(hostile_names())]
    blueprint = named(*hostile_names())
    text = page.html(Report(blueprint, Origin(HOSTILE[0], HOSTILE[1], edits=tuple(HOSTILE)), notes=tuple(HOSTILE)))
    edits = tuple("harmless" for _ in HOSTILE)
    plain = page.html(Report(named(*harmless), Origin("x.pth", "y.pth", edits=edits), notes=edits))
    assert set(Tags(text).found) == set(Tags(plain).found)
    assert not [
        tag for tag, names in Tags(text).found if "style" in names or any(name.startswith("on") for name in names)
    ]
    assert unfolded(data_in(text)["tree"]) != []


def test_the_policy_allows_only_the_page_itself() -> None:
    text = page.html(report_of(layers(3)))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    rules = dict(rule.split(" ", 1) for rule in policy[1].replace("&#39;", "'").split("; "))
    assert rules["default-src"] == "'none'"
    assert re.fullmatch(r"'sha256-[\w+/]{43}='", rules["script-src"])
    assert re.fullmatch(r"'sha256-[\w+/]{43}='", rules["style-src"])
    assert not re.search(r"(src|href)=\"(?!#)", text)


def test_the_same_report_gives_the_same_page() -> None:
    assert page.html(report_of(layers(3))) == page.html(report_of(layers(3)))


def luminance(colour: str) -> float:
    """Return the relative luminance of a colour: Web Content Accessibility Guidelines 2.2."""
    digits = colour.removeprefix("#")
    digits = digits if len(digits) == 6 else "".join(2 * digit for digit in digits)
    parts = [int(digits[start : start + 2], 16) / 255 for start in (0, 2, 4)]
    red, green, blue = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def test_all_text_can_be_read_in_light_and_in_dark() -> None:
    """A contrast of 4.5 or more for every colour of text on every colour behind it, cells and heatmap included."""
    style = (Path(page.__file__).parent / "page.css").read_text(encoding="utf-8")
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]+)", block))
        for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL)[:2]
    )
    checked = 0
    for colours in (light, light | dark):
        for text in ("ink", "soft", "accent"):
            for behind in ("paper", "raised", "lit", "chosen"):
                assert contrast(colours[text], colours[behind]) >= 4.5, (text, behind)
                checked += 1
        for badge in ("mark", "alarm"):
            assert contrast(colours["paper"], colours[badge]) >= 4.5, badge
        for family in ("f32", "bf16", "f16", "f8", "f64", "int", "other", "frozen"):
            written = re.search(rf"\.{family} text[^{{]*{{ fill: (#[0-9a-f]+)", style)
            assert written is not None
            assert contrast(colours[family], written[1]) >= 4.5, family
        assert contrast(colours["none"], colours["on-none"]) >= 4.5
    for behind, text in re.findall(r"\.h\d { background: (#[0-9a-f]+); color: (#[0-9a-f]+)", style):
        assert contrast(behind, text) >= 4.5, behind
        checked += 1
    assert checked == 34


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1234, "1.23 kB"),
        (999_999, "1 MB"),
        (244_403_360, "244 MB"),
        (15 * 10**11, "1.5 TB"),
    ],
)
def test_sizes_have_three_digits_and_a_unit(nbytes: int, text: str) -> None:
    assert page.size(nbytes) == text


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.mlp.up.weight", ("model.layers.3", "mlp.up.weight")),
        ("layers.0.mlp.experts.7.w1.weight", ("layers.0", "mlp.experts.*.w1.weight")),
        ("encoder.layer_2.ln.bias", ("encoder.layer_2", "ln.bias")),
        ("conv1.weight", ("conv1", "weight")),
        ("bias", ("", "bias")),
    ],
)
def test_layers_and_kinds(name: str, place: tuple[str, str]) -> None:
    assert heatmap.place_of(name) == place


def test_a_heatmap_has_a_limit_and_keeps_the_largest() -> None:
    distances = {f"layers.{n}.kind{n}.weight": Distance(float(n), 1.0) for n in range(500)}
    found = heatmap.heatmap(distances)
    assert (len(found.rows), len(found.columns)) == (heatmap.MOST_ROWS, heatmap.MOST_COLUMNS)
    assert found.rows[-1] == "layers.499"
    assert found.left_out == (300, 460)


# --- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if browsers.executable() is None:
        pytest.skip("there is no Chromium: apt-get install chromium, or its like")
    with Browser() as opened:
        yield opened


def saved(folder: Path, found: Report) -> Path:
    path = folder / "page.html"
    path.write_text(page.html(found), encoding="utf-8")
    return path


ROWS = "[...document.querySelectorAll('#rows .row')].filter((row) => row.offsetParent)"


def names_shown(browser: Browser) -> list[str]:
    found: list[str] = browser.run(f"{ROWS}.map((row) => row.querySelector('.path').textContent)")
    return found


def search_for(browser: Browser, text: str) -> str:
    """Type a text into the search field, press Enter, and return what the page says it found."""
    browser.run("document.getElementById('search').value = ''; document.getElementById('search').focus()")
    browser.type(text)
    browser.press("Enter")
    found: str = browser.run("document.getElementById('found').textContent")
    return found


def test_hostile_names_in_a_browser(browser: Browser, folder: Path) -> None:
    blueprint = named(*hostile_names())
    browser.open(saved(folder, Report(blueprint, Origin(HOSTILE[0], edits=tuple(HOSTILE)), notes=tuple(HOSTILE))))
    browser.run("document.getElementById('unfold').click()")
    shown = "\n".join(names_shown(browser))
    assert all(text.partition(".")[0] in shown for text in HOSTILE if "\u202e" not in text)
    assert "\\u{202e}" in shown
    assert "\u202e" not in browser.run("document.body.innerText")
    for row in range(3):
        browser.run(f"{ROWS}[{row + 1}].click()")
    assert browser.complaints() == []
    assert browser.requests() == []
    assert browser.run("document.scripts.length") == 2
    assert browser.run("document.querySelectorAll('img').length") == 0


def test_the_policy_stops_injected_script_and_style(browser: Browser, folder: Path) -> None:
    path = saved(folder, report_of(layers(2)))
    text = path.read_text(encoding="utf-8").replace("<footer>", "<script>window.hacked = 1</script><footer>")
    path.write_text(text.replace("<main ", '<main onclick="window.hacked = 2" '), encoding="utf-8")
    browser.open(path)
    browser.run("document.querySelector('main').click()")
    assert browser.run("window.hacked === undefined")
    assert any("Content Security Policy" in text for text in browser.complaints())


def test_keys_walk_and_fold_the_tree(browser: Browser, cli: Cli, folder: Path) -> None:
    cli("report", "Sequential(Linear(2,3),ReLU(),Sequential(Linear(3,4),Linear(4,5)))", "-o", "net.html")
    browser.open(folder / "net.html")
    assert names_shown(browser)[:3] == [".", "0", "weight"]
    browser.run(f"{ROWS}[0].focus()")
    focused = "document.activeElement"
    state = f"[{focused}.querySelector('.path').textContent, {focused}.getAttribute('aria-expanded')]"
    seen = []
    for key in ("ArrowDown", "ArrowLeft", "ArrowRight", "ArrowRight", "ArrowLeft", "End", "Home", "ArrowLeft"):
        browser.press(key)
        seen.append(tuple(browser.run(state)))
    assert seen == [
        ("0", "true"), ("0", "false"), ("0", "true"), ("weight", None), ("0", "true"), ("bias", None), (".", "true"),
        (".", "false"),
    ]  # fmt: skip
    assert names_shown(browser) == ["."]
    assert browser.run("document.querySelectorAll('#rows .row[tabindex=\"0\"]').length") == 1
    browser.press("Enter")
    assert browser.run("document.querySelector('#details h3').textContent") == "."
    assert browser.complaints() == []


def test_tree_and_map_point_at_each_other(browser: Browser, cli: Cli, folder: Path) -> None:
    cli("report", "Sequential(Linear(20,30),ReLU(),Linear(30,40))", "--input-size", "1,20", "-o", "net.html")
    browser.open(folder / "net.html")
    cells = "[...document.querySelectorAll('#map-params .lit')]"
    lit = f"{cells}.map((cell) => cell.getAttribute('aria-label').split(',')[0])"
    browser.run(f"{ROWS}.find((row) => row.querySelector('.path').textContent === '2').id = 'two'")
    browser.move_to("#two .path")
    assert browser.run(lit) == ["2"]
    browser.move_to("#map-params [aria-label^='0,']")
    assert browser.run("document.querySelector('#rows .lit .path').textContent") == "0"
    assert "630 parameters" in browser.run("document.getElementById('hovered').textContent")
    browser.click("#map-params [aria-label^='2,']")
    assert browser.run("document.querySelector('#rows [aria-selected=true] .path').textContent") == "2"
    assert browser.run("document.querySelector('#details h3').textContent") == "2"
    browser.run("document.getElementById('map-macs').focus()")
    browser.press("End")
    browser.press("Enter")
    active = browser.run(
        "document.getElementById(document.getElementById('map-macs').getAttribute('aria-activedescendant')).getAttribute('aria-label')"
    )
    assert active.startswith(browser.run("document.querySelector('#details h3').textContent") + ",")


SELECTORS = (
    *(".", "**", "*", "@head", "@stem", "**:Conv2d", ":_BatchNorm", "**.-1", "layer?.-2.**", "**.[0-1].*", "[0-3"),
    *("a}b", "", "x..y", "{layer1,layer[2-3]}.*", "**.{conv,bn}?", "**:*Norm*", "layer1.0\\.conv1", "**.wei*"),
    *("*.*.[2-7,11]", "m.layers.-3.*", "**.**"),
)


@pytest.mark.parametrize("model", ["resnet18", "own"])
def test_search_agrees_with_the_selectors_of_the_command_line(
    browser: Browser, cli: Cli, folder: Path, model: str
) -> None:
    from modelcli.commands.look import LookRequest, look
    from modelcli.commands.target import find_target

    if model == "own":
        names = [f"m.layers.{n}.{k}.weight" for n in range(12) for k in ("q", "k_proj")] + ["m.a-b.w", "m.x.0", "m.x.1"]
        torch.save(dict.fromkeys(names, torch.ones(2)), "own.pth")
        model = "own.pth"
    cli("report", model, "-o", "net.html")
    browser.open(folder / "net.html")
    blueprint = look(LookRequest(find_target(model, {}))).blueprint
    chosen = random.Random(0)
    paths = [module.path for module in blueprint.modules[1:]] + [tensor.name for tensor in blueprint.tensors]
    texts = [*SELECTORS]
    for path in chosen.sample(paths, 12):
        parts = path.split(".")
        parts[chosen.randrange(len(parts))] = chosen.choice(("*", "**", "?" * 5, parts[-1], "[0-9]"))
        texts += [path, ".".join(parts)]
    for text in texts:
        wanted: Any
        try:
            selector = selectors.parse(text)
            modules = selectors.matched_modules(selector, blueprint)
            direct = selectors.matched_tensors(selector, blueprint) - set(
                selectors.outermost_of_tensors(modules, blueprint) if modules else ()
            )
            below = selectors.matched_tensors(selector, blueprint) - direct
            wanted = sorted(modules | direct | {name for name in below if matches(text, name, blueprint)})
        except RequestError:
            wanted = "refused"
        paths_found = f"modelcliPage.find({json.dumps(text)}).map((id) => modelcliPage.nodeAt(id).path)"
        code = f"(() => {{ try {{ return {paths_found}; }}"
        found = browser.run(f"{code} catch (error) {{ return 'refused'; }} }})()")
        assert (sorted(found) if isinstance(found, list) else found) == wanted, text


def matches(text: str, name: str, blueprint: Blueprint) -> bool:
    """Whether a selector matches the name of a tensor itself, not only a module above it."""
    selector = selectors.parse(text)
    return selector.type is None and all(
        selectors._matcher(each, blueprint)(name) for each in selectors._at_landmarks(selector, blueprint)
    )


@pytest.mark.parametrize("model", ["resnet18", "nets.py:Tied", "nets.py:TiedAndNormed", "kinds.pth", "mixed.pth"])
def test_the_rows_have_the_figures_of_the_blueprint(browser: Browser, cli: Cli, folder: Path, model: str) -> None:
    """The script adds up what a page holds of kinds; here it is compared with torch's tensors and the command line."""
    shared = torch.randn(10, 4)
    torch.save(
        {"emb.weight": shared, "head.weight": shared, "head.bias": torch.ones(10), "n.0.steps": torch.tensor(3)},
        "kinds.pth",
    )
    mixed = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)), nn.Sequential(nn.Linear(4, 4).half(), nn.Linear(4, 5)))
    mixed[2].requires_grad_(False)
    mixed[6][1].bias.requires_grad_(False)
    torch.save(mixed, "mixed.pth")
    document = cli("report", model, "-o", "net.html", "--json").json
    browser.open(folder / "net.html")
    code = """(() => {
        const { root, below, isModule, paramsOf, macsOf, trainedOf, dtypeText, shapeText, lastOf } = modelcliPage;
        const found = {};
        const walk = (node) => {
            if (!node.run)
                found[(isModule(node) ? "module " : "tensor ") + (node.path || ".")] =
                    [paramsOf(node), macsOf(node), trainedOf(node), dtypeText(node), shapeText(node)];
            below(node).forEach(walk);
        };
        walk(root);
        return [found, lastOf(root)];
    })()"""
    found, nodes = browser.run(code)
    assert nodes == len(found) == len(document["modules"]) + len(document["tensors"])
    flags = {True: 1, False: 0, None: None, "partial": 2}
    for module in document["modules"]:
        path = module["path"]
        inside = [each for each in document["tensors"] if path == "." or each["name"].startswith(f"{path}.")]
        dtypes = {each["dtype"] for each in inside if each["kind"] == "parameter"}
        assert found[f"module {path}"][:4] == [
            module["params"],
            module["macs"],
            flags[module["trainable"]],
            "mixed" if len(dtypes) > 1 else dtypes.pop() if dtypes else "–",
        ]
    for tensor in document["tensors"]:
        params = tensor["elements"] if tensor["kind"] == "parameter" else 0
        shape = str(tensor["shape"]).replace(" ", "")
        assert found[f"tensor {tensor['name']}"] == [params, None, flags[tensor["trainable"]], tensor["dtype"], shape]


def test_the_page_says_what_it_found(browser: Browser, cli: Cli, folder: Path) -> None:
    cli("report", "resnet18", "-o", "net.html")
    browser.open(folder / "net.html")
    assert search_for(browser, "layer1.**:Conv2d") == "4 modules and 0 tensors"
    assert browser.run("document.querySelector('#details h3').textContent") == "layer1.0.conv1"
    browser.press("Enter")
    assert browser.run("document.querySelector('#details h3').textContent") == "layer1.0.conv2"
    assert search_for(browser, "fc.bias") == "0 modules and 1 tensor"
    assert search_for(browser, "ownsamp").endswith("; 3 modules and 0 tensors contain this text")
    assert search_for(browser, "[1") == "[ without ]; no name contains this text"
    assert browser.complaints() == []


def test_areas_are_in_proportion(browser: Browser, cli: Cli, folder: Path) -> None:
    """The areas of the map of one level are those of the values, and lie side by side in the rectangle."""
    browser.open(saved(folder, report_of(layers(2))))
    values = [1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 0.5]
    items = json.dumps([{"value": value} for value in values])
    placed = browser.run(f"modelcliPage.squarify({items}, 10, 20, 400, 150)")
    scale = 400 * 150 / sum(values)
    for place in placed:
        assert place["width"] * place["height"] == pytest.approx(place["item"]["value"] * scale)
        assert 10 - 1e-6 <= place["x"] <= 410 - place["width"] + 1e-6
        assert 20 - 1e-6 <= place["y"] <= 170 - place["height"] + 1e-6
    for one in range(len(placed)):
        for other in range(one):
            a, b = placed[one], placed[other]
            wide = min(a["x"] + a["width"], b["x"] + b["width"]) - max(a["x"], b["x"])
            high = min(a["y"] + a["height"], b["y"] + b["height"]) - max(a["y"], b["y"])
            assert wide < 1e-6 or high < 1e-6


@pytest.mark.parametrize(
    ("width", "dark"),
    [
        *((360, True), (1280, False)),
        *(
            pytest.param(*more, marks=pytest.mark.sweep)
            for more in ((360, False), (1280, True), (2000, False), (2000, True))
        ),
    ],
)
def test_no_serious_violation_of_accessibility(
    browser: Browser, cli: Cli, folder: Path, width: int, dark: bool
) -> None:
    script = browsers.axe()
    if script is None:
        pytest.skip("axe-core is not installed: npm install --no-save --prefix .venv/npm axe-core@4")
    one, other = (
        nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)),
        nn.Sequential(nn.Linear(4, 5).half(), nn.Linear(5, 6)),
    )
    other[0].weight.requires_grad_(False)
    torch.save(one.state_dict(), "one.pth")
    torch.save(other.state_dict(), "other.pth")
    cli("report", "other.pth", "--against", "one.pth", "--stats", "-o", "net.html")
    browser.open(folder / "net.html", width=width, dark=dark)
    search_for(browser, "0.weight")
    browser.run(script)
    told = "(found) => [found.impact, found.id, found.nodes.map((node) => node.html + node.failureSummary)]"
    violations = browser.run(f"axe.run(document, {{preload: false}}).then((all) => all.violations.map({told}))")
    assert violations == []
    assert browser.run("document.documentElement.scrollWidth") <= width


def test_names_and_roles_for_screen_readers(browser: Browser, cli: Cli, folder: Path) -> None:
    """The browser's own tree of accessibility has every row with its level and state, and a name for each control."""
    cli("report", "Sequential(Linear(2,3),ReLU())", "-o", "net.html")
    browser.open(folder / "net.html")
    nodes = [node for node in browser.send("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
    roles: dict[str, list[dict[str, Any]]] = {}
    for node in nodes:
        roles.setdefault(node["role"]["value"], []).append(node)
    rows = roles["row"][1:]
    levels = [next(each["value"]["value"] for each in row["properties"] if each["name"] == "level") for row in rows]
    assert levels == [1, 2, 3, 3, 2]
    for role in ("button", "searchbox", "treegrid", "listbox", "option", "heading", "region"):
        assert all(node["name"]["value"] for node in roles.get(role, ())), role
    assert {"treegrid", "listbox", "main", "columnheader", "gridcell"} <= roles.keys()


def test_without_script_the_totals_and_the_top_are_there(browser: Browser, cli: Cli, folder: Path) -> None:
    cli("report", "resnet18", "-o", "net.html")
    browser.open(folder / "net.html", script=False)
    root = browser.send("DOM.getDocument")["root"]["nodeId"]
    text = browser.send("DOM.getOuterHTML", nodeId=root)["outerHTML"]
    assert "11,689,512" in text
    assert ">layer1.0<" in text
    box = browser.send("DOM.querySelector", nodeId=root, selector="#top")["nodeId"]
    assert browser.send("DOM.getBoxModel", nodeId=box)["model"]["height"] > 200


def test_the_page_prints(browser: Browser, cli: Cli, folder: Path) -> None:
    cli("report", "resnet18", "-o", "net.html")
    browser.open(folder / "net.html")
    printed = browser.pdf()
    assert printed.startswith(b"%PDF")
    assert 1 <= printed.count(b"/Type /Page\n") <= 6


def test_a_large_model_loads_and_folds_fast(browser: Browser, folder: Path) -> None:
    """The bounds leave room for a loaded machine; `tests.benchmarks.bench_report` measures the times."""
    browser.open(saved(folder, report_of(all_different(10_000))))
    assert browser.run("performance.timing.loadEventEnd - performance.timing.navigationStart") < 6000
    clock = "performance.now()"
    timed = f"(() => {{ const start = {clock}; %s; document.body.offsetHeight; return {clock} - start; }})()"
    row = f"{ROWS}.find((row) => row.querySelector('.path').textContent === 'part5')"
    search_for(browser, "encoder.part5")
    shown = len(names_shown(browser))
    times = []
    for _ in range(3):
        times.append(browser.run(timed % f"modelcliPage.open({row})"))
        assert len(names_shown(browser)) == shown + 104  # the layers of this part
        times.append(browser.run(timed % f"modelcliPage.fold({row})"))
        assert len(names_shown(browser)) == shown
    assert min(times) < 100


def test_nan_and_infinities_are_marked(browser: Browser, cli: Cli, folder: Path) -> None:
    torch.save({"a.0.weight": torch.tensor([1.0, torch.nan]), "a.1.weight": torch.ones(2)}, "net.pth")
    cli("report", "net.pth", "--stats", "-o", "net.html")
    browser.open(folder / "net.html")
    assert "1 tensor" in browser.run("document.querySelector('.totals').innerText")
    marked = f"{ROWS}.filter((row) => row.querySelector('.alarmed')).map((row) => modelcliPage.pathOf(row))"
    assert browser.run(marked) == ["", "a", "a.0", "a.0.weight"]
    search_for(browser, "a.0.weight")
    details = browser.run("document.getElementById('details').innerText")
    assert "1, 0" in details.partition("NaN, Inf")[2]
    assert browser.run("document.querySelectorAll('#details .histogram rect').length") == 32


def test_a_deep_model_unfolds(browser: Browser, folder: Path) -> None:
    browser.open(saved(folder, report_of(named(".".join(["m"] * 1500), ".".join(["m"] * 1000 + ["x"])))))
    browser.run("document.getElementById('unfold').click()")
    assert browser.run("document.querySelectorAll('#rows .row').length") == 1502
    assert search_for(browser, "**.x") == "0 modules and 1 tensor"
    assert browser.run("document.querySelector('#details h3').textContent.length") == 2001
    assert browser.complaints() == []


def test_many_siblings_come_in_portions(browser: Browser, folder: Path) -> None:
    browser.open(saved(folder, report_of(all_different(97 * 300))))
    search_for(browser, "encoder.part5.layer28911")
    assert browser.run("document.querySelector('#details h3').textContent") == "encoder.part5.layer28911"
    search_for(browser, "encoder.part3")
    browser.run("modelcliPage.open(document.querySelector('#rows [aria-selected=true]'))")
    assert browser.run("document.querySelector('.more').textContent") == "Show 100 more of 100"
    browser.run("document.querySelector('.more').click()")
    assert browser.run("document.querySelector('.more')") is None


def png_size(picture: bytes) -> tuple[int, int]:
    assert picture.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", picture[16:24])
    assert zlib.crc32(picture[12:29]) == struct.unpack(">I", picture[29:33])[0]
    return width, height


def test_screenshots_have_the_size_of_the_window(browser: Browser, folder: Path) -> None:
    browser.open(saved(folder, report_of(layers(3))), width=900, height=700)
    assert png_size(browser.screenshot()) == (900, 700)
