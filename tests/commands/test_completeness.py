"""`check FOLDER --complete` names every fault of a folder of shards. It reads only headers and texts."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import Cli

INDEX = "model.safetensors.index.json"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": 20,
    "tie_word_embeddings": False,
    "dtype": "float32",
}


def llama(folder: Path, shards: int = 3, **changed: Any) -> Path:
    """Save a tiny Llama in `shards` shards, with a tokenizer, by `save_pretrained`."""
    import transformers

    config = transformers.LlamaConfig(**{**CONFIG, **changed})
    model = transformers.LlamaForCausalLM(config)
    nbytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    model.save_pretrained(folder, max_shard_size=nbytes // shards + 400 if shards > 1 else "1GB")
    tokens = {f"token{number}": number for number in range(20)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": tokens}, "added_tokens": []}))
    return folder


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture
def model(template: Path, folder: Path) -> Path:
    """A copy of the model in the current folder, for a test to damage."""
    return Path(shutil.copytree(template, folder / "model"))


def faults(cli: Cli, code: int = 1) -> list[str]:
    return [row["found"] for row in cli("check", "./model", "--complete", "--json", code=code).json["checks"]]


def shards_of(model: Path) -> list[Path]:
    return sorted(model.glob("model-*.safetensors"))


def change_json(path: Path, change: Callable[[Any], None]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def change_config(model: Path, **values: Any) -> None:
    change_json(model / "config.json", lambda document: document.update(values))


def change_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def test_a_complete_folder_passes_and_the_result_names_what_agrees(cli: Cli, model: Path) -> None:
    (row,) = cli("check", "./model", "--complete", "--json").json["checks"]
    count = len(shards_of(model))
    assert count > 1
    assert row == {
        "check": "complete",
        "passed": True,
        "found": f"{count} files, 30 tensors, {INDEX}, config.json, tokenizer.json",
        "wanted": "all files agree",
    }


def test_one_file_of_weights_passes_as_well(cli: Cli, folder: Path) -> None:
    llama(folder / "model", shards=1)
    assert faults(cli, code=0) == ["1 file, 30 tensors, config.json, tokenizer.json"]


def test_a_missing_shard(cli: Cli, model: Path) -> None:
    lost = shards_of(model)[1]
    held = len(load_file(lost))
    lost.unlink()
    assert f"{lost.name} is missing: {INDEX} says that {held} tensors are in it" in faults(cli)


def test_a_truncated_shard(cli: Cli, model: Path) -> None:
    cut = shards_of(model)[0]
    cut.write_bytes(cut.read_bytes()[:-5])
    assert any(cut.name in fault and "bytes" in fault for fault in faults(cli))


def test_a_key_that_is_in_no_shard(cli: Cli, model: Path) -> None:
    change_json(model / INDEX, lambda index: index["weight_map"].update(lost=shards_of(model)[0].name))
    assert f"{INDEX} says that lost is in {shards_of(model)[0].name}, and it is not" in faults(cli)


def test_a_key_that_the_index_leaves_out(cli: Cli, model: Path) -> None:
    change_json(model / INDEX, lambda index: index["weight_map"].pop("model.norm.weight"))
    assert any("has model.norm.weight, which" in fault for fault in faults(cli))


def test_a_key_in_two_shards(cli: Cli, model: Path) -> None:
    first, last = shards_of(model)[0], shards_of(model)[-1]
    key = next(iter(load_file(first)))
    change_tensors(last, lambda tensors: tensors.update({key: torch.zeros(1)}))
    assert any(fault == f"{first.name} and {last.name} both have {key}" for fault in faults(cli))


def test_a_shard_that_the_index_does_not_name(cli: Cli, model: Path) -> None:
    count = len(shards_of(model))
    extra = model / f"model-{count + 1:05}-of-{count:05}.safetensors"
    save_file({"extra": torch.zeros(1)}, extra)
    assert f"{extra.name} is in the folder, and {INDEX} does not name it" in faults(cli)


def test_an_index_that_skips_a_number(cli: Cli, model: Path) -> None:
    skipped = shards_of(model)[1].name
    change_json(
        model / INDEX,
        lambda index: index.update(weight_map={k: v for k, v in index["weight_map"].items() if v != skipped}),
    )
    assert any("the names of the shards say that there are" in fault and skipped in fault for fault in faults(cli))


def test_an_index_that_leads_out_of_its_folder(cli: Cli, model: Path) -> None:
    change_json(model / INDEX, lambda index: index["weight_map"].update({"model.norm.weight": "../other.safetensors"}))
    assert any("outside its folder" in fault for fault in faults(cli))


def test_a_damaged_index_and_a_damaged_configuration(cli: Cli, model: Path) -> None:
    (model / "config.json").write_text('{"model_type": "llama"')
    assert any("config.json is not valid JSON" in fault for fault in faults(cli))
    (model / INDEX).write_text("{")
    assert any(INDEX in fault for fault in faults(cli))


def test_a_single_file_and_shards_in_one_folder(cli: Cli, model: Path) -> None:
    save_file({"a": torch.zeros(1)}, model / "model.safetensors")
    assert any("both claim to be the weights" in fault for fault in faults(cli))


def test_a_configuration_with_another_vocabulary(cli: Cli, model: Path) -> None:
    change_config(model, vocab_size=21)
    assert "config.json says vocab_size 21, and model.embed_tokens.weight has 20 rows" in faults(cli)


def test_a_configuration_with_other_ties(cli: Cli, model: Path) -> None:
    change_config(model, tie_word_embeddings=True)
    assert any("tie_word_embeddings true, and the files have both" in fault for fault in faults(cli))


def test_a_configuration_without_ties_for_tied_tensors(cli: Cli, folder: Path) -> None:
    model = llama(folder / "model", tie_word_embeddings=True)
    assert len(faults(cli, code=0)) == 1
    change_config(model, tie_word_embeddings=False)
    assert "config.json says tie_word_embeddings false, and the files have no lm_head.weight" in faults(cli)


@pytest.mark.parametrize(
    ("layers", "fault"),
    [
        (4, "config.json says num_hidden_layers 4, and the files have no model.layers.3"),
        (2, "config.json says num_hidden_layers 2, and the files have model.layers.2 as well"),
    ],
)
def test_a_configuration_with_another_number_of_layers(cli: Cli, model: Path, layers: int, fault: str) -> None:
    change_config(model, num_hidden_layers=layers)
    assert fault in faults(cli)


def test_a_configuration_with_another_dtype(cli: Cli, model: Path) -> None:
    change_config(model, dtype="bfloat16")
    assert "config.json says dtype bfloat16, and most elements are float32" in faults(cli)


def test_a_tokenizer_that_is_larger_than_the_embedding(cli: Cli, model: Path) -> None:
    change_json(model / "tokenizer.json", lambda document: document["added_tokens"].append({"id": 20}))
    expected = "tokenizer.json has entries up to number 20, and model.embed_tokens.weight has 20 rows"
    assert expected in faults(cli)
    (model / "tokenizer.json").write_text("[]")
    assert any("tokenizer.json cannot be read" in fault for fault in faults(cli))


def test_several_faults_are_all_named(cli: Cli, model: Path) -> None:
    shards_of(model)[0].unlink()
    change_config(model, vocab_size=19, dtype="float16")
    found = cli("check", "./model", "--complete", code=1)
    assert found.out.count("FAILED") >= 3


def test_the_architecture_is_built_only_on_request(cli: Cli, model: Path) -> None:
    (row,) = cli("check", "./model", "--arch-check", "--json").json["checks"]
    assert row["found"] == "30 keys match"
    change_config(model, intermediate_size=17)
    assert faults(cli, code=0)  # headers alone do not show this fault
    rows = cli("check", "./model", "--arch-check", "--json", code=1).json["checks"]
    assert any("and the configuration builds [17, 8]" in row["found"] for row in rows)


def test_a_key_that_the_configuration_does_not_build(cli: Cli, model: Path) -> None:
    shard = shards_of(model)[0]
    change_tensors(shard, lambda tensors: tensors.update({"model.other.weight": torch.zeros(1)}))
    change_json(model / INDEX, lambda index: index["weight_map"].update({"model.other.weight": shard.name}))
    assert len(faults(cli, code=0)) == 1
    rows = cli("check", "./model", "--complete", "--arch-check", "--json", code=1).json["checks"]
    assert "model.other.weight is not in the model" in [row["found"] for row in rows]


def test_a_path_that_is_no_folder_is_a_wrong_request(cli: Cli, folder: Path) -> None:
    torch.save({"a": torch.zeros(1)}, "a.pth")
    assert "--complete is about a folder" in cli("check", "a.pth", "--complete", code=2).err
    (folder / "empty").mkdir()
    assert "neither an index of shards nor a whole file" in cli("check", "./empty", "--complete", code=2).err


def test_complete_can_be_combined_with_other_assertions(cli: Cli, model: Path) -> None:
    rows = cli("check", "./model", "--complete", "--dtype", "float32", "--json").json["checks"]
    assert [row["check"] for row in rows] == ["complete", "dtype"]


def test_a_hundred_shards_need_no_torch(folder: Path) -> None:
    """The command runs in a subprocess, because the test checks what is imported."""
    weight_map: dict[str, str] = {}
    (folder / "many").mkdir()
    for number in range(1, 101):
        name = f"model-{number:05}-of-00100.safetensors"
        tensors = {f"model.layers.{number - 1}.part{part}.weight": torch.zeros(2) for part in range(10)}
        save_file(tensors, folder / "many" / name)
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "many" / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {**CONFIG, "num_hidden_layers": 100}
    (folder / "many" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    program = (
        "import sys; from modelcli.cli import main; code = main(sys.argv[1:]); "
        "print('torch' in sys.modules, 'transformers' in sys.modules, file=sys.stderr); sys.exit(code)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, "check", "./many", "--complete"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stderr.split() == ["False", "False"]
