"""The modules of modelcli that showing a file imports. More of them would slow down every command."""

from __future__ import annotations

import json
import pickletools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from modelcli.checkpoints.torch_pickle import pickles
from tests.conftest import Cli

#: Modules that every command needs: the program, its options, its output.
PROGRAM = {
    *("", "_version", "errors", "interrupts", "wording", "installed", "commands"),
    *("cli", "cli.app", "cli.completing", "cli.failures", "cli.inspect", "cli.main", "cli.mounting", "cli.options"),
    *("cli.output", "cli.parallel", "cli.progress", "cli.synonyms", "ranks", "ranks.group"),
}
#: Modules that find out which model the command line names.
REFERENCE = {
    *("resolve", "language", "language.quoting", "language.references", "commands.look", "commands.target"),
    *("providers", "providers.base", "providers.known_code"),
    *("checkpoints", "checkpoints.format", "checkpoints.formats"),
}
#: Modules for the contents of any file and for showing them.
CONTENTS = {
    *(f"checkpoints.{name}" for name in ("contents", "entries", "storage", "limits", "shapes", "strict_json")),
    *("checkpoints.record", "checkpoints.record_of_keys", "checkpoints.record_reading"),
    *("model", "model.blueprint", "model.dtypes", "model.json_form", "model.paths", "model.strides", "model.tensors"),
    "model.totals",
    *("render", "render.documents", "render.documents.common", "render.views", "render.writers"),
}
COMMANDS = {
    "params": {"commands.params", "commands.tensor_values", "render.documents.params"},
    "modules": {"model.printed", "render.documents.modules", "render.folding", "render.runs"},
}
PROVIDERS = {f"providers.{name}" for name in ("torchvision", "torch_nn", "python_objects")}
#: Modules that find the builder that a bare state dict fits.
LIKENESS = {
    *("commands.blueprint_cache", "commands.known_builders", "files", "files.open_folder"),
    *("model.state_dict_match", *PROVIDERS),
}
#: The reader of each format, and the declarations of the formats that are tried before it.
READERS = {
    "pth": {
        *("checkpoints.torch_programs", "checkpoints.torch_pickle", "checkpoints.torch_pickle.names"),
        "checkpoints.torch_pickle.recognition",
        *("checkpoints.zip_archives", "checkpoints.zip_archives.directory", "checkpoints.zip_archives.inflating"),
        *(
            f"checkpoints.torch_pickle.{name}"
            for name in (
                *("zip_format", "pickles", "allow_list", "inert_values", "value_builder"),
                *("trees", "state_dicts", "deepspeed", "composite_tensors", "nested_tensors", "pickled_modules"),
            )
        ),
    },
    "safetensors": {
        *("checkpoints.torch_programs", "checkpoints.torch_pickle", "checkpoints.torch_pickle.names"),
        "checkpoints.torch_pickle.recognition",
        *("checkpoints.sharded", "checkpoints.sharded.names"),
        *("checkpoints.distributed", "checkpoints.distributed.names"),
        *("checkpoints.safetensors", "checkpoints.safetensors.reading"),
    },
}
#: More modules for a file with a record, which check the record.
RECORD = {"checkpoints.record_consistency", *PROVIDERS}

LOOKED = """
import contextlib, io, json, sys
from modelcli.cli import main

with contextlib.redirect_stdout(io.StringIO()):
    assert main(sys.argv[1:]) == 0
found = [name.removeprefix("modelcli").removeprefix(".") for name in sys.modules if name.split(".")[0] == "modelcli"]
heavy = ("torch", "numpy", "safetensors", "tomlkit", "rich", "jinja2", "pickletools")
others = [name for name in heavy if name in sys.modules]
print(json.dumps([found, others]))
"""


def imported(*words: str) -> tuple[set[str], list[str]]:
    """Return the modules of modelcli, and the heavy packages, that a command imported."""
    done = subprocess.run([sys.executable, "-c", LOOKED, *words], capture_output=True, text=True, check=True)
    own, others = json.loads(done.stdout)
    return set(own), others


@pytest.mark.parametrize("command", list(COMMANDS))
@pytest.mark.parametrize("kind", list(READERS))
def test_showing_a_file_imports_only_these_modules(command: str, kind: str, cli: Cli, folder: Path) -> None:
    """One file is a state dict saved by torch, the other was written by modelcli with an edit in its record."""
    state = nn.Sequential(nn.Linear(2, 3)).state_dict()
    torch.save(state, "bare.pth") if kind == "pth" else save_file(state, "bare.safetensors")
    needed = PROGRAM | REFERENCE | CONTENTS | COMMANDS[command] | READERS[kind]
    own, others = imported(command, f"bare.{kind}")
    assert sorted(own - needed - LIKENESS) == []
    assert others == []
    cli("replace", "0", "Linear(2,4)", "-m", "Sequential(Linear(2,3))", "-o", f"out.{kind}", "-q")
    own, others = imported(command, f"out.{kind}")
    expected = {"edits", "edits.registry", "language.expressions"}  # the names of edits, and the reference
    assert sorted(own - needed - RECORD - expected) == []
    assert others == []


def test_opcodes_are_called_as_pickletools_calls_them() -> None:
    for opcode in pickletools.opcodes:
        name, argument = pickles._USUAL.get(ord(opcode.code), (opcode.name, None))
        assert name == opcode.name
        if argument is not None:
            assert opcode.arg is not None
            assert argument.size == opcode.arg.n


def test_a_recorded_builder_needs_no_expressions(cli: Cli, folder: Path) -> None:
    cli("save", "net.pth", "-m", "squeezenet1_1", "-q")
    own, _ = imported("params", "net.pth")
    needed = PROGRAM | REFERENCE | CONTENTS | COMMANDS["params"] | READERS["pth"] | RECORD
    assert sorted(own - needed) == []
