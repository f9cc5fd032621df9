"""Malicious configurations: wrong or huge values, and names of code, files and models elsewhere, are not followed."""

from __future__ import annotations

import importlib
import json
import logging
import random
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

import modelcli
from modelcli.cli import main
from tests.conftest import Cli
from tests.live.providers.huggingface.tiny import model, saved

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}
CLIP_VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
LLAVA = {
    "model_type": "llava",
    "architectures": ["LlavaForConditionalGeneration"],
    "text_config": LLAMA,
    "vision_config": CLIP_VISION,
}
DETR = {"model_type": "detr", "architectures": ["DetrForObjectDetection"], "d_model": 32}
TIMM = {
    "model_type": "timm_wrapper",
    "architectures": ["TimmWrapperForImageClassification"],
    "architecture": "resnet10t",
}

#: Entries that name code or other files, which are added to a plain configuration, and the text of the error.
UNSAFE: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "attention": (LLAMA, {"_attn_implementation": "org/kernel"}, "code of the Hub"),
    "attention, public name": (LLAMA, {"attn_implementation": "org/kernel"}, "code of the Hub"),
    "attention, internal name": (LLAMA, {"_attn_implementation_internal": "org/kernel"}, "code of the Hub"),
    "experts": (LLAMA, {"experts_implementation": {"": "org/kernel"}}, "code of the Hub"),
    "absolute path": (LLAMA, {"tokenizer_file": "/etc/passwd"}, "tokenizer_file is '/etc/passwd'"),
    "path of Windows": (LLAMA, {"x": r"C:\x"}, "names something to load"),
    "relative path": (LLAMA, {"x": ["../../x"]}, "x.0 is '../../x'"),
    "pickle": (LLAMA, {"index_path": "evil.pkl"}, "index_path is 'evil.pkl'"),
    "address": (LLAMA, {"x": "https://evil.example/x"}, "names something to load"),
    "model type of its own": (
        LLAMA,
        {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M"}, "architectures": ["M"]},
        "only code that comes with ./model can build it",
    ),
    "class of its own": (
        LLAMA,
        {"auto_map": {"AutoModel": "evil.M"}, "architectures": ["M"]},
        "does not have its class 'M'",
    ),
    "part of its own": (
        LLAVA,
        {"vision_config": {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C"}}},
        "the model type of its vision_config is 'evil'",
    ),
    "backbone of the Hub": (
        DETR,
        {"backbone": "org/x", "use_timm_backbone": False, "use_pretrained_backbone": True, "backbone_config": None},
        "not in its folder: org/x",
    ),
    "backbone with arguments": (DETR, {"backbone": "evil", "backbone_kwargs": {"a": 1}}, "not in its folder: evil"),
    "backbone of timm's Hub": (DETR, {"backbone": "hf-hub:org/x", "use_timm_backbone": True}, "something to load"),
    "weights of timm": (TIMM, {"model_args": {"pretrained": True}}, "asks timm to load something"),
    "checkpoint of timm": (TIMM, {"model_args": {"checkpoint_path": "evil"}}, "asks timm to load something"),
    "model of timm's Hub": (TIMM, {"architecture": "hf-hub:org/x"}, "something to load"),
}

#: Entries with impossible values, and the text and the exit code of the error.
WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "a billion layers": (LLAMA, {"num_hidden_layers": 10**9}, 3),
    "a number that no machine holds": (LLAMA, {"hidden_size": 10**30}, 4),
    "petabytes": (LLAMA, {"hidden_size": 10**15}, 4),
    "a billion labels": (LLAMA, {"num_labels": 10**9}, 4),
    "negative size": (LLAMA, {"hidden_size": -32}, 4),
    "no heads": (LLAMA, {"num_attention_heads": 0}, 4),
    "text for a number": (LLAMA, {"num_hidden_layers": "two"}, 4),
    "infinite size": (LLAMA, {"hidden_size": float("inf")}, 4),
    "nothing for a number": (LLAMA, {"hidden_size": None}, 4),
    "dtype that is none": (LLAMA, {"torch_dtype": "evil"}, 4),
    "module of torch as dtype": (LLAMA, {"dtype": "nn"}, 4),
    "number as dtype": (LLAMA, {"dtype": 3}, 4),
    "method": (LLAMA, {"to_dict": "evil"}, 4),
    "class of the object": (LLAMA, {"__class__": "evil"}, 4),
    "activation that is none": (LLAMA, {"hidden_act": "os.system"}, 4),
    "function as class": (LLAMA, {"architectures": ["pipeline"]}, 2),
    "function of os as class": (LLAMA, {"architectures": ["os.system"]}, 2),
    "base class": (LLAMA, {"architectures": ["PreTrainedModel"]}, 2),
    "number as class": (LLAMA, {"architectures": [3]}, 2),
    "no class": (LLAMA, {"architectures": None}, 4),
    "part of unknown type": (LLAVA, {"vision_config": {"model_type": "evil"}}, 4),
    "text for a part": (LLAVA, {"vision_config": "evil"}, 4),
    "itself as a part": (LLAVA, {"vision_config": LLAVA}, 4),
    "patches of no size": (LLAVA, {"vision_config": {**CLIP_VISION, "patch_size": 0}}, 4),
    "deeply nested": (LLAMA, {"x": [[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]]}, 4),
}

#: Entries that do not change the model.
HARMLESS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "code beside the class": {"auto_map": {"AutoModel": "evil.M"}},
    "pipelines": {"custom_pipelines": {"x": {"impl": "evil.P"}}},
    "trust": {"trust_remote_code": True},
    "fused attention": {"attn_implementation": "flash_attention_2"},
    "where it was": {"_name_or_path": "/home/somebody/model.pkl"},
    "labels": {"id2label": {"0": "/etc/x.pkl", "1": "../x"}},
    "quantization": {"quantization_config": {"quant_method": "os.system"}},
    "image of a kilometre": {"image_size": 10**9},
}


@pytest.fixture(autouse=True)
def nothing_runs_and_nothing_is_fetched(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Forbid network access, and put code beside the configuration that creates a file when it is imported."""

    def refuse(*_args: Any, **_kwargs: Any) -> Any:
        raise AssertionError("the network was asked")

    for place, name in ((socket.socket, "connect"), (socket, "create_connection"), (socket, "getaddrinfo")):
        monkeypatch.setattr(place, name, refuse)
    for module in ("transformers.dynamic_module_utils", "transformers.utils.hub"):
        monkeypatch.setattr(importlib.import_module(module), "HF_MODULES_CACHE", str(folder / "modules"))


def written(folder: Path, document: Mapping[str, Any]) -> None:
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(document))
    (folder / "model" / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\n")


@pytest.mark.parametrize("name", UNSAFE)
def test_a_configuration_that_names_code_or_files_is_refused(cli: Cli, folder: Path, name: str) -> None:
    plain, added, told = UNSAFE[name]
    written(folder, {**plain, **added})
    found = cli("params", "./model", "--no-cache", code=3)
    assert told in found.err
    assert found.err.count("error:") == 1
    assert not found.out
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("name", WRONG)
def test_an_impossible_configuration_is_one_error(cli: Cli, folder: Path, name: str) -> None:
    plain, added, code = WRONG[name]
    written(folder, {**plain, **added})
    found = cli("params", "./model", "--no-cache", code=code)
    assert found.err.startswith("error:")
    assert len(found.err.splitlines()) <= 2
    assert not found.out


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_entries_of_a_configuration_are_ignored(cli: Cli, folder: Path, name: str) -> None:
    written(folder, {**LLAMA, **HARMLESS[name]})
    found = cli("summary", "./model", "--no-cache", "--json")
    assert found.json["totals"]["params"] == 27_040
    assert all(line.startswith("note:") for line in found.err.splitlines())
    assert not (folder / "ran").exists()


def test_more_modules_than_the_tensors_need_are_refused(cli: Cli, folder: Path) -> None:
    """A thousand layers with the tensors of two exceed the limit, which is proportional to the number of tensors."""
    saved("LlamaForCausalLM", folder / "model")
    path = folder / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 1_000}))
    assert "modules to build" in cli("params", "./model", "--no-cache", code=4).err


def test_trust_imports_only_the_code_of_the_folder(cli: Cli, folder: Path) -> None:
    written(folder, {**LLAMA, "model_type": "own", "architectures": ["Own"], **CODE})
    (folder / "model" / "evil.py").write_text(OWN_CODE.format(ran=str(folder / "ran")))
    cli("params", "./model", "--no-cache", code=3)
    assert not (folder / "ran").exists()
    found = cli("summary", "./model", "--no-cache", "--trust", "--json")
    assert (folder / "ran").exists()
    assert found.json["totals"]["params"] == 27_040
    assert found.json["layers"][0]["type"] == "Own"
    assert type(modelcli.load("./model", trust=True)).__name__ == "Own"


CODE = {"auto_map": {"AutoConfig": "evil.OwnConfig", "AutoModelForCausalLM": "evil.Own"}}
OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

open({ran!r}, "w").close()


class OwnConfig(LlamaConfig):
    model_type = "own"


class Own(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_of_another_repository_is_refused_with_trust(cli: Cli, folder: Path) -> None:
    written(folder, {**LLAMA, "auto_map": {"AutoConfig": "org/x--evil.C", "AutoModel": "org/x--evil.M"}})
    assert "of another repository" in cli("params", "./model", "--no-cache", "--trust", code=2).err


def test_what_transformers_logs_does_not_reach_the_user(cli: Cli, folder: Path) -> None:
    document = {**LLAMA, "rope_parameters": {"rope_type": "linear", "factor": 0.5, "rope_theta": 10_000.0}}
    written(folder, document)
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(handler)
    try:
        LlamaConfig.from_dict(document)
        assert records
        records.clear()
        found = cli("summary", "./model", "--no-cache")
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert not records
    assert all(line.startswith("note: ") for line in found.err.splitlines())


#: Values that randomly replace others.
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 10**4, 10**6, 10**9, 10**18, -(10**9), 0.5, float("nan"), float("inf")),
    *("", "evil", "os.system", "org/x", "../x", "x.pkl", "gelu", "\x1b[31m", "[bold]", "a\nb", "x" * 5_000),
    *([], [1], [0, 0], [[1]], ["a"], {}, {"a": 1}, {"model_type": "llama"}, {"model_type": "evil"}, [10**9] * 4),
)
MUTATED = (
    *("LlamaForCausalLM", "BertForSequenceClassification", "LlavaForConditionalGeneration", "DetrForObjectDetection"),
    *("WhisperForConditionalGeneration", "SwinForImageClassification", "Wav2Vec2ForCTC", "DeepseekV3ForCausalLM"),
    *("CLIPModel", "MambaForCausalLM", "Qwen2VLForConditionalGeneration", "T5ForConditionalGeneration"),
)


def entries_of(document: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    for name, value in document.items():
        yield document, name
        if isinstance(value, dict):
            yield from entries_of(value)


@pytest.mark.sweep
@pytest.mark.parametrize("name", MUTATED)
def test_random_changes_end_in_a_model_or_in_one_error(cli: Cli, folder: Path, name: str) -> None:
    draw = random.Random(name)
    config = model(name).config
    config.architectures = [name]
    plain = config.to_json_string(use_diff=False)
    written(folder, {})
    for _ in range(20):
        document = json.loads(plain)
        for _ in range(draw.choice((1, 1, 1, 2, 3))):
            place, key = draw.choice(list(entries_of(document)))
            place[key] = draw.choice(ODD_VALUES)
        (folder / "model" / "config.json").write_text(json.dumps(document))
        code = main(["summary", "./model", "--no-cache"])
        found = cli.capsys.readouterr()
        assert code in (0, 2, 3, 4), json.dumps(document)
        assert all(line.startswith(("error:", "hint:", "note:")) for line in found.err.splitlines()), found.err
        assert "\x1b" not in found.err
        assert not (folder / "ran").exists()
