"""Showing a folder again uses the cached blueprint, unless the folder has changed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from modelcli.commands import blueprint_cache
from tests.conftest import Cli
from tests.live.providers.huggingface.tiny import saved

CONFIGURATIONS = Path(__file__).parent / "configurations"

#: Configurations of large models, with the published numbers of parameters in billions: all, and those that one token
#: uses.
PUBLISHED = {
    "llama-3-70b": (70.6, 70.6),
    "mixtral-8x22b": (140.6, 39),
    "deepseek-v3": (671, 37),
    "qwen3-235b-a22b": (235, 22),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELCLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MODELCLI_NO_CACHE", raising=False)


def without_torch(*words: str) -> str:
    code = "import sys; from modelcli.cli import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_second_look_needs_no_torch(cli: Cli, folder: Path) -> None:
    saved("LlamaForCausalLM", folder / "model")
    first = cli("summary", "./model").out
    assert without_torch("summary", "./model") == first
    assert cli("params", "./model", "--no-cache").out == without_torch("params", "./model")


@pytest.mark.parametrize("changed", ["configuration", "weights"])
def test_a_folder_that_changes_is_opened_anew(cli: Cli, folder: Path, changed: str) -> None:
    model = saved("LlamaForCausalLM", folder / "model")
    before = cli("params", "./model", "--json").json
    if changed == "configuration":
        path = folder / "model" / "config.json"
        path.write_text(path.read_text().replace('"max_position_embeddings": 2048', '"max_position_embeddings": 64'))
        assert cli("summary", "./model", "--json").json["input"] == [[1, 64]]
    else:
        model.half().save_pretrained(folder / "model")
        assert cli("params", "./model", "--json").json != before


def test_answers_about_files_do_not_come_from_the_cache(cli: Cli, folder: Path) -> None:
    saved("LlamaForCausalLM", folder / "model")
    cli("summary", "./model")
    assert len(blueprint_cache.entries()) == 1
    assert "no file" not in cli("check", "./model", "--safe").out
    cli("diff", "./model", "./model", "--json")  # exit code 1 if they differ


@pytest.mark.sweep
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_folder_with_only_a_configuration_is_shown(cli: Cli, folder: Path, name: str) -> None:
    (folder / "model").mkdir()
    shutil.copy(CONFIGURATIONS / f"{name}.json", folder / "model" / "config.json")
    first = cli("summary", "./model", "--json").json
    everything, of_a_token = PUBLISHED[name]
    bytes_of_bfloat16 = 2 * first["totals"]["params"]  # routers may be float32
    assert first["totals"]["param_bytes"] == pytest.approx(bytes_of_bfloat16, rel=2e-4)
    assert first["totals"]["params"] / 1e9 == pytest.approx(everything, rel=0.005)
    assert first["totals"]["macs"] / 128 / 1e9 == pytest.approx(of_a_token, rel=0.04)
    assert json.loads(without_torch("summary", "./model", "--json")) == first
