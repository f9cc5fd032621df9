"""`identify CHECKPOINT` on state dicts of torchvision's constructors, and the note on files that fit a builder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn

from modelcli.commands import blueprint_cache
from modelcli.live.providers import torchvision as builders
from modelcli.model import state_dict_match
from tests.commands.test_completeness import change_config
from tests.commands.test_completeness import llama as save_llama
from tests.commands.test_diff import fresh
from tests.conftest import Cli
from tests.live.providers.test_torchvision import NAMES, plain


@pytest.fixture
def known(cli: Cli, warm_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """A command line with the cache that tests share, so that each builder is built once."""
    monkeypatch.setenv("MODELCLI_CACHE", str(warm_cache))
    monkeypatch.setattr("modelcli.providers.timm.Timm.names_like", lambda _self, _keys: ())  # tested elsewhere
    return cli


def save(model: nn.Module, path: str = "bare.pth") -> dict[str, tuple[int, ...]]:
    """Save a state dict without its values. Returns its names and shapes."""
    state = model.state_dict()
    with torch.serialization.skip_data():
        torch.save(dict(state), path)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def exact(document: Any) -> list[str]:
    return [match["model"] for match in document["matches"] if match["exact"]]


def test_the_only_matching_builder(known: Cli) -> None:
    save(torchvision.models.alexnet())
    document = known("identify", "bare.pth", "--json").json
    assert document.keys() >= {"schema", "matches"}
    assert document["matches"] == [
        {"model": "alexnet", "exact": True, "matched": 16, "missing": [], "unexpected": [], "mismatched": []}
    ]
    result = known("identify", "bare.pth")
    assert result.out.splitlines()[1].split() == ["alexnet", "exactly", "16", "-"]
    assert "modelcli load bare.pth --arch alexnet" in result.err


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("resnet18", ["quantized_resnet18"]),
        ("quantized_mobilenet_v2", ["mobilenet_v2"]),
        ("fasterrcnn_mobilenet_v3_large_fpn", ["fasterrcnn_mobilenet_v3_large_320_fpn"]),
        ("squeezenet1_1", []),
        ("vgg11_bn", []),
    ],
)
def test_all_builders_with_the_same_names_and_shapes(known: Cli, name: str, others: list[str]) -> None:
    save(plain(name))
    found = exact(known("identify", "bare.pth", "--json").json)
    assert sorted(found) == sorted([name, *others])
    assert not found[0].startswith("quantized_")


@pytest.mark.parametrize(
    ("name", "arguments", "wanted"),
    [
        ("googlenet", {"aux_logits": False, "init_weights": False}, "googlenet(aux_logits=False)"),
        ("inception_v3", {"aux_logits": False, "init_weights": False}, "inception_v3(aux_logits=False)"),
        ("fcn_resnet50", {"aux_loss": True}, "fcn_resnet50(aux_loss=True)"),
        ("vit_b_16", {"image_size": 384}, "vit_b_16(image_size=384)"),
    ],
)
def test_builder_arguments_are_identified(known: Cli, name: str, arguments: dict[str, Any], wanted: str) -> None:
    save(plain(name, **arguments))
    assert exact(known("identify", "bare.pth", "--json").json)[0] == wanted
    known("load", "bare.pth", "--arch", wanted, "--dry-run")


def test_a_replaced_head(known: Cli) -> None:
    model = torchvision.models.resnet50(num_classes=10)
    save(model)
    result = known("identify", "bare.pth", "--json")
    first = result.json["matches"][0]
    assert (first["model"], first["exact"]) == ("resnet50", False)
    assert first["missing"] == first["unexpected"] == []
    assert first["mismatched"] == [
        {"name": "fc.weight", "expected": [1000, 2048], "found": [10, 2048]},
        {"name": "fc.bias", "expected": [1000], "found": [10]},
    ]
    assert len(result.json["matches"]) <= 3
    assert "resnet50(num_classes=10) fits exactly" in known("identify", "bare.pth").err
    model.fc = nn.Sequential(nn.Linear(2048, 9), nn.Linear(9, 3))
    save(model)
    first = known("identify", "bare.pth", "--json").json["matches"][0]
    assert first["missing"] == ["fc.weight", "fc.bias"]
    assert first["unexpected"] == ["fc.0.weight", "fc.0.bias", "fc.1.weight", "fc.1.bias"]
    assert "resnet50" in known("identify", "bare.pth").out


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        *((name, {}) for name in ("resnet18", "alexnet", "vgg11", "mobilenet_v3_small", "densenet121")),
        *((name, {}) for name in ("squeezenet1_0", "vit_b_16")),
        ("googlenet", {"aux_logits": False, "init_weights": False}),
        ("googlenet", {"init_weights": False}),
    ],
)
def test_a_head_of_another_width_in_every_family(known: Cli, name: str, arguments: dict[str, Any]) -> None:
    with torch.device("meta"):
        shapes = plain(name, num_classes=10, **arguments).state_dict()
    torch.save({key: torch.empty(()).expand(tensor.shape) for key, tensor in shapes.items()}, "bare.pth")
    written = f"{name}({'aux_logits=False, ' if 'aux_logits' in arguments else ''}num_classes=10)"
    result = known("identify", "bare.pth")
    assert f"{written} fits exactly: modelcli load bare.pth --arch '{written}'" in result.err
    known("load", "bare.pth", "--arch", written, "--dry-run")


def test_wrappers_training_checkpoints_and_files_of_before_0_4_1(known: Cli) -> None:
    state = torchvision.models.resnet18().state_dict()
    torch.save({"model": {f"module.{name}": tensor.half() for name, tensor in state.items()}, "epoch": 3}, "bare.pth")
    result = known("identify", "bare.pth")
    assert "stripped 'module.' from every key" in result.err
    assert result.out.splitlines()[1].split()[:2] == ["resnet18", "exactly"]
    torch.save({name: tensor for name, tensor in state.items() if "num_batches" not in name}, "bare.pth")
    assert exact(known("identify", "bare.pth", "--json").json)[0] == "resnet18"


def test_a_checkpoint_that_no_builder_comes_near(known: Cli) -> None:
    torch.save({"w": torch.zeros(3)}, "bare.pth")
    assert known("identify", "bare.pth", code=1).out == "no model that modelcli list shows is close to bare.pth\n"
    assert known("identify", "bare.pth", "--json", code=1).json["matches"] == []
    torch.save({"only.num_batches_tracked": torch.tensor(1)}, "bare.pth")
    known("identify", "bare.pth", code=1)


@pytest.fixture
def llama(folder: Path) -> Path:
    """A tiny Llama in three shards with an index, as transformers saves it."""
    pytest.importorskip("transformers")
    return save_llama(folder / "model")


def test_a_folder_with_a_configuration_that_fits(known: Cli, llama: Path) -> None:
    document = known("identify", "./model", "--json").json
    assert document["configuration"] == {"architecture": "LlamaForCausalLM", "library": "transformers"}
    keys = sum(len(load_file(path)) for path in llama.glob("*.safetensors"))
    (match,) = document["matches"]
    assert (match["model"], match["exact"], match["matched"]) == ("hf:./model", True, keys)
    result = known("identify", "model")
    assert result.out.splitlines()[1].split() == [
        "hf:./model",
        "LlamaForCausalLM",
        "transformers",
        "exactly",
        "30",
        "-",
    ]
    assert "the configuration fits: modelcli load model" in result.err


def test_a_folder_whose_configuration_does_not_fit(known: Cli, llama: Path) -> None:
    change_config(llama, vocab_size=21)
    document = known("identify", "./model", "--json").json
    (match,) = document["matches"]
    assert not match["exact"]
    assert sorted(match["mismatched"], key=lambda item: item["name"]) == [
        {"name": name, "expected": [21, 8], "found": [20, 8]}
        for name in ("lm_head.weight", "model.embed_tokens.weight")
    ]
    assert "the configuration does not fit: modelcli check ./model --arch-check" in known("identify", "./model").err
    change_config(llama, num_hidden_layers=0, intermediate_size=5)
    result = known("identify", "./model", code=1)  # no layer is left of what it describes
    assert (
        "the configuration of ./model describes LlamaForCausalLM of transformers, which has 1 tensor in common"
        in result.err
    )


def test_folders_whose_keys_alone_say_what_they_are(known: Cli, llama: Path) -> None:
    (llama / "config.json").unlink()
    assert "configuration" not in known("identify", "./model", "--json", code=1).json
    for path in llama.iterdir():
        path.unlink()
    save_file(torchvision.models.squeezenet1_1().state_dict(), llama / "model.safetensors")
    assert exact(known("identify", "./model", "--json").json) == ["squeezenet1_1"]
    (llama / "config.json").write_text('{"model_type": "no such type"}')
    result = known("identify", "./model")
    assert "the configuration of ./model was not compared: " in result.err
    assert result.out.splitlines()[1].split()[0] == "squeezenet1_1"


def test_a_folder_without_weights(known: Cli, llama: Path) -> None:
    for path in llama.glob("model*"):
        path.unlink()
    assert "./model holds no weights, so there is nothing to identify" in known("identify", "./model", code=2).err


def test_a_folder_of_timm(known: Cli, folder: Path) -> None:
    timm = pytest.importorskip("timm")
    from timm.models import save_for_hf

    save_for_hf(timm.create_model("test_resnet", num_classes=7), "model", {})
    document = known("identify", "./model", "--json").json
    assert document["configuration"] == {"architecture": "test_resnet", "library": "timm"}
    assert [match["exact"] for match in document["matches"]] == [True]


def test_wrong_requests(known: Cli) -> None:
    assert "alexnet is a model reference, not a checkpoint" in known("identify", "alexnet", code=2).err
    assert "no such file" in known("identify", "gone.pth", code=2).err


def test_a_second_run_needs_no_torch(known: Cli, folder: Path) -> None:
    save(torchvision.models.alexnet())
    known("identify", "bare.pth")
    for words in ("identify bare.pth", "params bare.pth", "summary bare.pth"):
        modules, code, _ = fresh(folder, words)
        assert (code, "torch" in modules) == (0, False), words


# --- the note on files that fit ------------------------------------------------------------------------------------


def test_a_note_says_which_builder_a_file_fits(cli: Cli) -> None:
    save(torchvision.models.squeezenet1_1())
    note = "looks like torchvision squeezenet1_1: --arch squeezenet1_1"
    assert "looks like" not in cli("params", "bare.pth").err  # no builder is built for this note
    cli("cache", "warm", "squeezenet1_1")
    for words in (("params",), ("summary",), ("modules",), ("freeze", "features", "-m"), ("load",)):
        assert f"note: {note}\n" in cli(*words, "bare.pth").err
        assert note in cli(*words, "bare.pth", "--json").json["notes"]
    assert "looks like" not in cli("params", "bare.pth", "-q").err
    assert "looks like" not in cli("params", "bare.pth", "--arch", "squeezenet1_1").err
    assert "looks like" not in cli("load", "bare.pth", "--arch", "squeezenet1_1").err
    assert f"note: {note}\n" in cli("load", "bare.pth", "--arch", "Linear(2,3)", code=1).err
    assert "looks like" not in cli("summary", "squeezenet1_1").err
    cli("save", "own.pth", "-m", "squeezenet1_1")
    assert "looks like" not in cli("params", "own.pth").err
    save(torchvision.models.squeezenet1_1(num_classes=3))
    assert "looks like" not in cli("params", "bare.pth").err
    cli("cache", "clear")
    save(torchvision.models.squeezenet1_1())
    assert "looks like" not in cli("params", "bare.pth").err


@pytest.mark.parametrize("words", [("summary", "squeezenet1_1"), ("load", "squeezenet1_1")])
def test_a_file_fits_a_builder_that_was_shown_before(cli: Cli, words: tuple[str, ...]) -> None:
    save(torchvision.models.squeezenet1_1())
    cli(*words)
    assert "looks like torchvision squeezenet1_1" in cli("params", "bare.pth").err
    # Later entries do not remove it. A builder with arguments, or a class, gives no note.
    cli("summary", "squeezenet1_1(num_classes=3)")
    cli("summary", "Linear(2,2)")
    cli("cache", "warm", "alexnet")
    assert "looks like torchvision squeezenet1_1" in cli("params", "bare.pth").err
    save(torchvision.models.squeezenet1_1(num_classes=3))
    assert "looks like" not in cli("params", "bare.pth").err


def test_a_damaged_index_is_ignored(cli: Cli) -> None:
    save(torchvision.models.squeezenet1_1())
    cli("cache", "warm", "squeezenet1_1")
    for path in blueprint_cache.folder().glob("*.index"):
        path.write_bytes(path.read_bytes()[:-3])
    assert "looks like" not in cli("params", "bare.pth").err


def test_without_the_cache(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builders, "builder_names", lambda: ["squeezenet1_0", "squeezenet1_1"])
    monkeypatch.setenv("MODELCLI_NO_CACHE", "1")
    save(torchvision.models.squeezenet1_1())
    assert exact(cli("identify", "bare.pth", "--json").json) == ["squeezenet1_1"]
    assert not blueprint_cache.folder().exists()


# --- the comparison itself -----------------------------------------------------------------------------------------


def test_the_nearest_builders_come_first() -> None:
    models = {
        "far": {"a": (1,), "b": (2,), "c": (3,), "d": (4,)},
        "near": {"a": (1,), "b": (2,), "x": (1,)},
        "other": {"z": (1,)},
    }
    found = {"a": (1,), "b": (2,)}
    assert [match.model for match in state_dict_match.best(found, models, 3)] == ["near", "far"]
    assert [match.model for match in state_dict_match.best(found, models, 1)] == ["near"]
    assert state_dict_match.best({}, models, 3) == []
    match = state_dict_match.compare("m", {"a": (1,), "b": (2,)}, {"b": (3,), "c": (4,)})
    assert (match.matched, match.missing, match.unexpected) == (0, ("a",), ("c",))
    assert match.mismatched == (state_dict_match.Mismatch("b", (2,), (3,)),)


def test_a_fingerprint_depends_on_names_and_shapes() -> None:
    one = {"a": (1, 2), "b": ()}
    assert state_dict_match.fingerprint(one) == state_dict_match.fingerprint({"b": (), "a": (1, 2)})
    others = [{"a": (2, 1), "b": ()}, {"a": (1, 2)}, {"a": (1, 2), "c": ()}, {"a": (1,), "b": ()}]
    assert len({state_dict_match.fingerprint(shapes) for shapes in (one, *others)}) == 5


@pytest.mark.sweep
@pytest.mark.parametrize("name", NAMES)
def test_every_builder_is_identified_by_its_state_dict(known: Cli, name: str) -> None:
    """The matches are this builder and those whose constructors give the same names and shapes, and no others."""
    shapes = {name: shape for name, shape in save(plain(name)).items() if not name.endswith("num_batches_tracked")}
    found = exact(known("identify", "bare.pth", "--json").json)
    assert name in found
    for other in found:
        reference, _, arguments = other.partition("(")
        given = eval(f"dict({arguments or ')'}")
        state = plain(reference, **given).state_dict()
        assert {n: tuple(t.shape) for n, t in state.items() if not n.endswith("num_batches_tracked")} == shapes
