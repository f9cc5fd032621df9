"""Models of the Hub: showing one requests only its configuration and headers, and values are downloaded once."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

import modelcli
from modelcli.commands import look
from modelcli.commands.target import Target
from modelcli.errors import RequestError
from modelcli.language.references import Source
from modelcli.live import downloads, opening, value_entries
from tests.conftest import Cli
from tests.live.providers.huggingface import tiny
from tests.live.providers.huggingface.hub_server import Hub, serving

#: Embeddings of 256 kB, more than a request for a header reads.
LARGE = {"vocab_size": 2000}
NAME = "org/bert"
LOOKS = (
    ("summary", "{}", "--json"),
    ("params", "{}", "--json"),
    ("modules", "{}", "--json"),
    ("check", "{}", "--max-params", "1M", "--safe", "--json"),
)


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A local Hub, and an empty cache instead of huggingface_hub's."""
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with serving() as found:
        monkeypatch.setenv("HF_ENDPOINT", found.url)
        monkeypatch.setenv("HF_HOME", str(folder / "hf"))
        for name, value in {
            "ENDPOINT": found.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": found.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(folder / "hf" / "hub"),
            "HF_TOKEN_PATH": str(folder / "hf" / "token"),
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(constants, name, value)
        yield found


@pytest.fixture
def model(hub: Hub, folder: Path) -> Path:
    """A model in the folder `local` that is on the Hub as well."""
    tiny.saved("BertForSequenceClassification", folder / "local", **LARGE)
    (folder / "local" / "tokenizer.json").write_text("{}")
    hub.add(NAME, folder / "local")
    return folder / "local"


def commit_of(hub: Hub, name: str = NAME) -> str:
    return hub.repositories[name].refs["main"]


def without_names(text: str) -> dict[str, object]:
    """Return a JSON document without the names of the model."""
    document = json.loads(text)
    return {key: value for key, value in document.items() if key not in ("model", "notes")}


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


# --- looking ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", LOOKS)
def test_showing_a_remote_model_equals_its_folder_and_requests_no_weights(
    cli: Cli, hub: Hub, model: Path, words: tuple[str, ...]
) -> None:
    found = cli(*(word.format(f"hf:{NAME}") for word in words))
    local = cli(*(word.format("./local") for word in words))
    assert without_names(found.out) == without_names(local.out)
    shard = hub.of_file("model.safetensors")
    assert [asked.range for asked in shard] == ["bytes=0-100000"]
    assert shard[0].sent == 100_001 < (model / "model.safetensors").stat().st_size
    assert {asked.file for asked in hub.asked} == {"config.json", None, "model.safetensors"}
    assert len(hub.asked) == 5  # the commit, the configuration (twice), the list of files, the header


def test_each_shards_header_is_requested_once(cli: Cli, hub: Hub, folder: Path) -> None:
    tiny.model("LlamaForCausalLM", **LARGE).save_pretrained(folder / "local", max_shard_size="100KB")
    hub.add(NAME, folder / "local")
    error = cli("check", f"hf:{NAME}", "--complete", "--json", code=2).error
    assert "not on this machine" in error["message"]
    shards = [path.name for path in (folder / "local").glob("*.safetensors")]
    assert len(shards) > 1
    assert without_names(cli("params", f"hf:{NAME}", "--json").out) == without_names(
        cli("params", "./local", "--json").out
    )
    assert all([asked.range for asked in hub.of_file(shard)] == ["bytes=0-100000"] for shard in shards)
    cli("diff", f"hf:{NAME}", "./local", "--no-values")


def test_a_long_header_takes_two_requests(cli: Cli, hub: Hub, folder: Path, model: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in modelcli.load(str(model)).state_dict().items()}
    save_file(tensors, model / "model.safetensors", {"format": "pt", "long": "x" * 200_000})
    hub.add(NAME, model)
    cli("params", f"hf:{NAME}")
    first, second = hub.of_file("model.safetensors")
    assert (first.range, first.sent) == ("bytes=0-100000", 100_001)
    with (model / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
    assert second.range == f"bytes=8-{length + 7}"


def test_showing_a_model_again_requests_at_most_its_commit(cli: Cli, hub: Hub, model: Path) -> None:
    first = cli("summary", f"hf:{NAME}").out
    hub.forget()
    assert cli("summary", f"hf:{NAME}").out == first
    assert [(asked.method, asked.file) for asked in hub.asked] == [("HEAD", "config.json")]
    hub.forget()
    cli("summary", f"hf:{NAME}@{commit_of(hub)}")
    assert not hub.asked


def test_a_branch_that_moved_is_shown_anew(cli: Cli, hub: Hub, folder: Path, model: Path) -> None:
    before = cli("params", f"hf:{NAME}", "--json").json["totals"]
    old = commit_of(hub)
    tiny.saved("BertForSequenceClassification", folder / "wider", vocab_size=3000)
    hub.add(NAME, folder / "wider")
    assert cli("params", f"hf:{NAME}", "--json").json["totals"] != before
    assert cli("params", f"hf:{NAME}@{old}", "--json").json["totals"] == before


def test_headers_give_keys_dtypes_and_ties(cli: Cli, hub: Hub, folder: Path) -> None:
    """The dtypes are those of the weights, even if the configuration has another, and keys are converted."""
    made = tiny.model("MixtralForCausalLM").half()
    made.save_pretrained(folder / "local")
    config = folder / "local" / "config.json"
    config.write_text(config.read_text().replace('"float16"', '"float32"'))
    hub.add(NAME, folder / "local")
    tensors = cli("params", f"hf:{NAME}", "--json").json["tensors"]
    rows = {row["name"]: row["dtype"] for row in tensors if row["kind"] == "parameter"}
    assert rows == {name: "float16" for name, _ in made.named_parameters(remove_duplicate=False)}


def test_an_edit_that_writes_nothing_downloads_nothing(cli: Cli, hub: Hub, model: Path) -> None:
    cli("replace", "classifier", "Linear(_,7)", "-m", f"hf:{NAME}")
    cli("replace", "classifier", "Linear(_,7)", "-m", f"hf:{NAME}", "-o", "out.pth", "--dry-run")
    assert all(asked.method == "HEAD" or asked.range for asked in hub.of_file("model.safetensors"))


def test_the_error_for_missing_values_names_the_command_that_downloads_them(hub: Hub, model: Path) -> None:
    live = opening.open_live(Source(f"hf:{NAME}"))
    entry = value_entries.of_live(live)["classifier.weight"]
    commit = commit_of(hub)
    with pytest.raises(RequestError, match="not on this machine") as caught:
        entry.storage.bytes()  # type: ignore[union-attr]
    assert caught.value.hint == f"modelcli load hf:{NAME}@{commit} downloads them"


def test_weights_in_pytorchs_format_have_to_be_downloaded(cli: Cli, hub: Hub, model: Path) -> None:
    state = modelcli.load(str(model)).state_dict()
    torch.save(state, model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    hub.add(NAME, model)
    error = cli("params", f"hf:{NAME}", "--json", code=2).error
    assert "pytorch_model.bin alone" in error["message"]
    assert error["hint"].startswith(f"modelcli load hf:{NAME}")
    assert not hub.of_file("pytorch_model.bin")
    cli("params", f"hf:{NAME}", "--weights", "none")
    cli("load", f"hf:{NAME}")
    assert cli("params", f"hf:{NAME}", "--json").json["totals"]["params"] == sum(map(torch.numel, state.values()))


# --- values ----------------------------------------------------------------------------------------------------------


def test_an_edit_downloads_the_model_and_what_belongs_to_it(cli: Cli, hub: Hub, folder: Path, model: Path) -> None:
    (model / "modeling_own.py").write_text("raise SystemExit")
    (model / "flax_model.msgpack").write_bytes(b"x")
    (model / "pytorch_model.bin").write_bytes(b"x")
    hub.add(NAME, model)
    cli("init", "classifier", "zeros", "-m", f"hf:{NAME}", "-o", "out/")
    files = {asked.file for asked in hub.asked if asked.method == "GET"} - {None}
    assert files == {"config.json", "model.safetensors", "tokenizer.json"}
    expected = modelcli.load(str(model)).state_dict()
    found, report = tiny.loaded(folder / "out")
    assert not any(report.values())
    assert torch.equal(found.state_dict()["bert.pooler.dense.weight"], expected["bert.pooler.dense.weight"])
    assert (folder / "out" / "tokenizer.json").is_file()


def test_all_shards_are_downloaded(cli: Cli, hub: Hub, folder: Path) -> None:
    made = tiny.model("LlamaForCausalLM", **LARGE)
    made.save_pretrained(folder / "local", max_shard_size="100KB")
    hub.add(NAME, folder / "local")
    cli("summary", f"hf:{NAME}")  # this leaves the index in the cache, and no shard
    cli("save", "out.pth", "-m", f"hf:{NAME}")
    found, expected = torch.load("out.pth", weights_only=True), made.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    "words",
    [
        ("params", "{}", "--stats"),
        ("params", "{}", "--values"),
        ("diff", "{}", "./local"),
        ("check", "{}", "--finite", "--same-as", "./local"),
        ("save", "out.pth", "-m", "{}"),
        ("load", "{}"),
    ],
)
def test_commands_that_need_values_download_them(cli: Cli, hub: Hub, model: Path, words: tuple[str, ...]) -> None:
    cli(*(word.format(f"hf:{NAME}") for word in words))
    assert [asked.method for asked in hub.of_file("model.safetensors") if not asked.range] == ["HEAD", "GET"]


def test_loading_in_python_gives_the_values(hub: Hub, model: Path) -> None:
    found, expected = modelcli.load(f"hf:{NAME}").state_dict(), modelcli.load(str(model)).state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_downloaded_files_are_used_without_a_request(
    cli: Cli, hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli("load", f"hf:{NAME}")
    hub.forget()
    cli("save", "out.pth", "-m", f"hf:{NAME}@{commit_of(hub)}")
    assert not hub.asked
    cli("save", "out2.pth", "-m", f"hf:{NAME}")
    assert {asked.file for asked in hub.asked} == {"config.json", None}  # the commit, and its list of files
    hub.forget()
    go_offline(monkeypatch)
    cli("save", "out3.pth", "-m", f"hf:{NAME}")
    cli("params", f"hf:{NAME}", "--no-cache")
    cli("check", f"hf:{NAME}", "--complete")
    assert not hub.asked


def test_a_hub_that_cannot_be_reached_leaves_the_cache(
    cli: Cli, hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli("load", f"hf:{NAME}")
    hub.status = 503
    cli("save", "out.pth", "-m", f"hf:{NAME}")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}")
    cli("params", f"hf:{NAME}", "--no-cache")


def test_the_bar_is_shown_on_a_terminal_only(cli: Cli, hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "%" not in cli("load", f"hf:{NAME}").err
    shutil.rmtree(constants.HF_HUB_CACHE)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert "%" in cli("load", f"hf:{NAME}", "--force").err


def test_a_script_names_the_model_and_the_commit(cli: Cli, hub: Hub, folder: Path, model: Path) -> None:
    edit = ("-e", "init classifier zeros")
    text = cli("script", "-m", f"hf:{NAME}", *edit, "-o", "out.pth").out
    assert not [asked for asked in hub.of_file("model.safetensors") if not asked.range]
    assert f'BertForSequenceClassification.from_pretrained("{NAME}", revision="{commit_of(hub)}")' in text
    exec(compile(text, "script", "exec"), {"__name__": "__main__"})
    cli("apply", "-m", "./local", *edit, "-o", "expected.pth")
    found, expected = (torch.load(name, weights_only=True) for name in ("out.pth", "expected.pth"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    text = cli("script", "-m", f"hf:{NAME}", "--weights", "none", *edit, "-o", "out.pth").out
    assert f'AutoConfig.from_pretrained("{NAME}", revision="{commit_of(hub)}")' in text


def test_completion_asks_for_nothing(hub: Hub, model: Path, cli: Cli) -> None:
    target = Target(Source(f"hf:{NAME}"))
    assert look.known_blueprint(target) is None
    assert not hub.asked
    cli("summary", f"hf:{NAME}")
    hub.forget()
    assert look.known_blueprint(target) is not None
    assert not hub.asked


def test_a_recipe_names_the_model_as_the_user_did(cli: Cli, hub: Hub, folder: Path, model: Path) -> None:
    cli("load", f"hf:{NAME}")
    assert f'model = "hf:{NAME}"' in (folder / "modelcli.toml").read_text()
    cli("freeze", "bert")
    cli("save", "out.pth")
    assert cli("summary", "--json").json["model"]["reference"] == f"hf:{NAME}"


# --- names -----------------------------------------------------------------------------------------------------------


def test_names_of_all_forms(cli: Cli, hub: Hub, folder: Path, model: Path) -> None:
    hub.add("gpt2", model)
    wider = tiny.model("BertForSequenceClassification", vocab_size=3000, num_labels=5)
    wider.save_pretrained(folder / "wider")
    files = {path.name: path.read_bytes() for path in (folder / "wider").iterdir()}
    commit = hub.repositories[NAME].commit(files, "refs/pr/1")
    expected = sum(parameter.numel() for parameter in wider.parameters())
    for revision in ("refs/pr/1", commit):
        assert cli("params", f"hf:{NAME}@{revision}", "--json").json["totals"]["params"] == expected
    assert cli("params", "hf:gpt2", "--json").json["totals"]["params"] < expected
    changed = cli("params", f"hf:{NAME}@refs/pr/1(num_labels=7)", "--json").json
    assert {row["name"]: row["shape"] for row in changed["tensors"]}["classifier.weight"] == [7, 32]
    hub.forget()
    cli("params", "hf:BertForSequenceClassification(hidden_size=32, num_attention_heads=4, num_hidden_layers=1)")
    assert not hub.asked


def test_a_folder_of_the_same_name_is_named_by_its_path(cli: Cli, hub: Hub, folder: Path, model: Path) -> None:
    tiny.saved("BertForSequenceClassification", folder / NAME, vocab_size=100)
    assert f"write ./{NAME} to name the folder {NAME}" in cli("params", f"hf:{NAME}").err
    hub.forget()
    for path in (NAME, f"./{NAME}", f"hf:./{NAME}", f"hf:./{NAME}(num_labels=2)"):
        rows = {row["name"]: row["shape"] for row in cli("params", path, "--json").json["tensors"]}
        assert rows["bert.embeddings.word_embeddings.weight"] == [100, 32]
    assert not hub.asked


def test_an_architecture_of_the_hub_for_a_file(cli: Cli, hub: Hub, model: Path) -> None:
    shutil.copy(model / "model.safetensors", "own.safetensors")
    found = cli("summary", "own.safetensors", "--arch", f"hf:{NAME}", "--json").json
    assert found["model"]["class"] == "BertForSequenceClassification"
    assert not hub.of_file("model.safetensors")


def test_a_record_does_not_lead_back_to_the_hub(cli: Cli, hub: Hub, folder: Path, model: Path) -> None:
    cli("save", "out.pth", "-m", f"hf:{NAME}")
    shutil.rmtree(constants.HF_HUB_CACHE)
    hub.forget()
    assert cli("summary", "out.pth", "--json").json["model"]["class"] == "BertForSequenceClassification"
    modelcli.load("out.pth")
    data = (folder / "out.pth").read_bytes()
    assert NAME.encode() not in data
    assert not hub.asked


# --- settings --------------------------------------------------------------------------------------------------------


def in_process(hub: Hub, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Fetch the configuration of a gated model in a process of its own, which sees these variables."""
    code = "from modelcli.providers.huggingface import PROVIDER; from pathlib import Path; "
    code += "print(PROVIDER.pinned('org/gated', Path()))"
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "other"), **variables}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


def test_the_variables_of_huggingface_hub_are_honoured(hub: Hub, folder: Path) -> None:
    commit = hub.add("org/gated", {"config.json": b"{}"}, gated=True)
    assert in_process(hub, folder).returncode != 0
    assert in_process(hub, folder, HF_TOKEN="hf_right").stdout.strip() == f"org/gated@{commit}"
    assert {asked.token for asked in hub.asked} == {None, "hf_right"}
    assert (folder / "other" / "hub" / "models--org--gated" / "snapshots" / commit / "config.json").is_file()
    hub.forget()
    assert in_process(hub, folder, HF_HUB_OFFLINE="1").stdout.strip() == f"org/gated@{commit}"
    elsewhere = in_process(hub, folder, HF_HUB_OFFLINE="1", HF_HOME=str(folder / "third"))
    assert "HF_HUB_OFFLINE forbids to ask the Hub" in elsewhere.stderr
    assert not hub.asked


def test_a_token_is_sent_for_every_request(cli: Cli, hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories[NAME].private = True
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    cli("params", f"hf:{NAME}")
    cli("load", f"hf:{NAME}")
    assert {asked.token for asked in hub.asked} == {"hf_right"}


# --- errors ----------------------------------------------------------------------------------------------------------

CONFIG = {"config.json": b'{"model_type": "bert", "architectures": ["BertModel"]}'}


@pytest.mark.parametrize(
    ("files", "flags", "reference", "code", "message", "hint"),
    [
        (CONFIG, {}, "hf:org/nothing", 2, "the Hub has no model org/nothing", "hf auth login, or set HF_TOKEN"),
        (CONFIG, {}, "hf:org/namely", 2, "the Hub has no model org/namely", "HF_TOKEN"),
        (CONFIG, {"private": True}, "hf:org/name", 2, "you may not see it", "HF_TOKEN"),
        (CONFIG, {"gated": True}, "hf:org/name", 5, "gated, and no token was sent", "accept its terms at http://127"),
        (CONFIG, {}, "hf:org/name@maim", 2, "no branch, tag or commit maim", "did you mean main?"),
        (CONFIG, {}, f"hf:org/name@{'0' * 40}", 2, "no branch, tag or commit 0", "it has main"),
        ({"a.gguf": b"x"}, {}, "hf:org/name", 2, "it is a model in the GGUF format", "converted from"),
        ({"adapter_config.json": b"{}"}, {}, "hf:org/name", 2, "it is an adapter for another model", ""),
        ({"x.pth": b"x"}, {}, "hf:org/name", 2, "has no config.json", "hf download org/name x.pth"),
        ({}, {}, "hf:org/name", 2, "has no config.json", "from_pretrained"),
        (CONFIG, {}, "hf:org/na--me", 2, "there is no folder", ""),
        (CONFIG, {}, "hf:../x", 2, "there is no folder", ""),
    ],
)
def test_a_missing_model_or_file_is_one_error(
    cli: Cli,
    hub: Hub,
    files: dict[str, bytes],
    flags: dict[str, bool],
    reference: str,
    code: int,
    message: str,
    hint: str,
) -> None:
    hub.add("org/name", files, **flags)
    error = cli("params", reference, "--json", code=code).error
    assert message in error["message"]
    assert hint in (error["hint"] or "")


def test_the_error_for_a_missing_repository_names_the_nearest(cli: Cli, hub: Hub, folder: Path, model: Path) -> None:
    cli("params", f"hf:{NAME}")
    assert f"did you mean {NAME}?" in cli("params", "hf:org/brt", "--json", code=2).error["hint"]


def test_a_hub_that_does_not_answer_is_told_with_a_folder_that_can_be_read(
    cli: Cli, hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hint = "-m ./bert names the folder of that name"
    (folder / "bert").mkdir()
    assert hint not in cli("params", "hf:bert", "--json", code=2).error["hint"]  # there is nothing in it
    (folder / "bert" / "model.safetensors").write_bytes(b"damaged")
    assert hint not in cli("params", "hf:bert", "--json", code=2).error["hint"]
    tiny.saved("BertForSequenceClassification", folder / "bert")
    assert hint in cli("params", "hf:bert", "--json", code=2).error["hint"]
    assert hint in cli("save", "out.pth", "-m", "hf:bert@v2(num_labels=3)", "--json", code=2).error["hint"]
    hub.status = 503
    assert hint in cli("params", "hf:bert", "--json", code=5).error["hint"]
    hub.status = None
    go_offline(monkeypatch)
    assert hint in cli("params", "hf:bert", "--json", code=5).error["hint"]
    assert cli("params", "-m", "./bert", "--json").json["tensors"]
    (folder / "bert" / "config.json").unlink()  # a checkpoint alone
    assert hint in cli("params", "hf:bert", "--json", code=5).error["hint"]


def test_a_gated_model_with_a_token_that_has_no_access(cli: Cli, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/name", CONFIG, gated=True)
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    error = cli("params", "hf:org/name", "--json", code=5).error
    assert "your token has no access" in error["message"]
    assert f"{hub.url}/org/name" in error["hint"]


def test_failures_of_the_network_have_exit_code_5(cli: Cli, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/name", CONFIG)
    for status, message in ((503, "answers 503"), (429, "asks for fewer requests"), (401, "does not accept")):
        hub.status = status
        assert message in cli("params", "hf:org/name", "--json", code=5).error["message"]
    hub.status, hub.delay = None, 0.5
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.1)
        assert "did not answer in time" in cli("params", "hf:org/name", "--json", code=5).error["message"]
    hub.delay = 0
    go_offline(monkeypatch)
    error = cli("params", "hf:org/name", "--json", code=5).error
    assert "is not in the cache" in error["message"]
    assert "modelcli load hf:org/name" in error["hint"]


def test_a_full_disk_is_an_error(cli: Cli, hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    error = cli("save", "out.pth", "-m", f"hf:{NAME}", "--json", code=5).error
    assert "no space is left for the download" in error["message"]
    assert "HF_HOME" in error["hint"]


def test_without_huggingface_hub_the_extra_is_named(cli: Cli, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelcli.installed.folder", lambda _: None)
    assert cli("params", "hf:org/name", "--json", code=2).error["hint"] == "pip install 'modelcli[hf]'"


# --- safety ----------------------------------------------------------------------------------------------------------


def test_a_configuration_that_is_too_large_is_not_downloaded(cli: Cli, hub: Hub) -> None:
    hub.add("org/name", CONFIG)
    hub.stated_sizes["config.json"] = 20_000_000
    assert "20,000,000 bytes" in cli("params", "hf:org/name", "--json", code=4).error["message"]
    assert [asked.method for asked in hub.of_file("config.json")] == ["HEAD"]


@pytest.mark.parametrize("file", ["../../escaped.safetensors", "/tmp/x.safetensors", "a\\b.safetensors", ".hidden", 3])
def test_an_index_that_names_files_elsewhere_is_refused(cli: Cli, hub: Hub, model: Path, file: object) -> None:
    files = {"config.json": (model / "config.json").read_bytes(), str(file): b"x"}
    files["model.safetensors.index.json"] = json.dumps({"weight_map": {"bert.x": file}}).encode()
    hub.add("org/name", files)
    for words in (("params", "hf:org/name"), ("save", "out.pth", "-m", "hf:org/name")):
        assert "names the file" in cli(*words, "--json", code=4).error["message"]
    assert not hub.of_file(str(file))


def test_an_index_that_names_a_file_that_is_not_there_is_refused(cli: Cli, hub: Hub, model: Path) -> None:
    files = {"config.json": (model / "config.json").read_bytes()}
    files["model.safetensors.index.json"] = json.dumps({"weight_map": {"a": "b.safetensors"}}).encode()
    hub.add("org/name", files)
    message = cli("params", "hf:org/name", "--json", code=4).error["message"]
    assert "names the file b.safetensors, which the repository does not have" in message


def test_an_invalid_header_is_refused(cli: Cli, hub: Hub, model: Path) -> None:
    hub.stated_sizes["model.safetensors"] = 5000
    assert "damaged" in cli("params", f"hf:{NAME}", "--json", code=4).error["message"]
    hub.stated_sizes.clear()
    header = json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]}}).encode()
    files = {"config.json": (model / "config.json").read_bytes()}
    hub.add("org/name", files | {"model.safetensors": struct.pack("<Q", len(header)) + header + b"1234"})
    assert "damaged" in cli("params", "hf:org/name", "--json", code=4).error["message"]
    hub.add("org/name", files | {"model.safetensors": b"not a header"})
    assert "damaged" in cli("params", "hf:org/name", "--json", code=4).error["message"]


def test_files_of_other_names_are_never_requested(cli: Cli, hub: Hub, folder: Path, model: Path) -> None:
    config = json.loads((model / "config.json").read_text()) | {"auto_map": {"AutoModel": "own.Own"}}
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    strange = {"own.py": b"x", "../up.json": b"{}", "sub/x.json": b"{}", ".git.json": b"{}", "training_args.bin": b"x"}
    hub.add(NAME, files | {"config.json": json.dumps(config).encode()} | strange)
    assert "is not run" in cli("params", f"hf:{NAME}").err
    cli("save", "out/", "-m", f"hf:{NAME}")
    assert not {asked.file for asked in hub.asked} & strange.keys()
    assert not list(folder.rglob("up.json"))


@pytest.mark.parametrize("where", ["own.Own", "org/other--own.Own"])
def test_code_that_a_configuration_names_is_never_downloaded(cli: Cli, hub: Hub, where: str) -> None:
    config = {"model_type": "own", "architectures": ["Own"], "auto_map": {"AutoConfig": where, "AutoModel": where}}
    for name in (NAME, "org/other"):
        hub.add(name, {"config.json": json.dumps(config).encode(), "own.py": b"raise SystemExit"})
    for words in (("params", f"hf:{NAME}"), ("save", "out/", "-m", f"hf:{NAME}", "--trust")):
        hint = cli(*words, "--json", code=3).error["hint"]
        assert f"modelcli downloads no code: hf download {NAME} --local-dir bert does" in hint
    assert not hub.of_file("own.py")


def test_a_name_with_characters_of_a_pattern_is_one_file(cli: Cli, hub: Hub, model: Path) -> None:
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    hub.add(NAME, files | {"a[b].json": b"[1]", "ab.py": b"x"})
    cli("load", f"hf:{NAME}")
    assert len(hub.of_file("a[b].json")) == 2


def test_requests_are_refused_where_downloads_are_forbidden(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda name, *_: names.append(name))
    with downloads.forbidden():
        assert constants.HF_HUB_OFFLINE
        with pytest.raises(downloads.DownloadError):
            socket.getaddrinfo("one.example", 80)
        with downloads.allowed():
            assert not constants.HF_HUB_OFFLINE
            socket.getaddrinfo("two.example", 80)
        assert constants.HF_HUB_OFFLINE
        with pytest.raises(downloads.DownloadError):
            socket.getaddrinfo("three.example", 80)
    assert not constants.HF_HUB_OFFLINE
    with downloads.allowed():
        socket.getaddrinfo("four.example", 80)
    assert names == ["two.example", "four.example"]


# --- what is in the cache --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("model")
def test_list_shows_what_is_in_the_cache(cli: Cli, hub: Hub, folder: Path) -> None:
    place = f"huggingface_hub's cache ({folder / 'hf' / 'hub'})"
    told = cli("list", "hf:*", code=2).err
    assert f"none of 0 models in {place} matches 'hf:*'" in told
    assert "a model need not be there: a Hugging Face model (hf:ORG/NAME" in told
    cli("params", f"hf:{NAME}")
    asked = len(hub.asked)
    found = cli("list", "hf:*", "--json")
    assert [(row["name"], row["group"]) for row in found.json["models"]] == [(f"hf:{NAME}", "configuration")]
    assert f"these models are in {place}" in found.json["notes"][0]
    cli("load", f"hf:{NAME}")
    assert [row["group"] for row in cli("list", "hf:ber", "--json").json["models"]] == ["weights"]
    assert f"nearest: hf:{NAME}" in cli("list", "hf:org/bart", code=2).err
    assert len(hub.asked) > asked  # by `load` alone: see below
    before = len(hub.asked)
    cli("list", "hf:org/*")
    assert len(hub.asked) == before


def test_list_of_the_cache_imports_no_torch(folder: Path) -> None:
    code = "import sys; from modelcli.cli import main; main(['list', 'hf:*']); sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "HF_HOME": str(folder / "hf")}
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "none of 0 models" in done.stderr
