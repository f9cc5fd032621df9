"""Each use case has one module, which takes a frozen request and returns a frozen result without JSON."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, is_dataclass
from pathlib import Path

import pytest

from modelcli import commands

FOLDER = Path(commands.__file__).parent

#: The module of each use case, and its function.
USE_CASES = {
    "apply": "find_batch",
    "cache": "warm",
    "check": "check",
    "diff": "diff",
    "edit": "edit",
    "identify": "identify",
    "list": "named_models",
    "load": "load",
    "look": "look",
    "recipe_log": "undo",
    "save": "save",
    "script": "script",
}


@pytest.mark.parametrize("name", USE_CASES)
def test_a_use_case_takes_a_frozen_request_and_gives_a_frozen_result(name: str) -> None:
    module = importlib.import_module(f"modelcli.commands.{name}")
    function = getattr(module, USE_CASES[name])
    taken, given = (function.__annotations__[key] for key in (next(iter(function.__annotations__)), "return"))
    assert taken.endswith("Request"), taken
    kinds = [getattr(module, text, None) for text in (taken, given)]
    for kind in filter(None, kinds):
        if is_dataclass(kind):
            one = object.__new__(kind)
            with pytest.raises(FrozenInstanceError):
                setattr(one, fields(kind)[0].name, None)
    assert is_dataclass(kinds[0])


def test_results_are_frozen_everywhere() -> None:
    for path in FOLDER.glob("*.py"):
        module = importlib.import_module(f"modelcli.commands.{path.stem}")
        for name, kind in vars(module).items():
            if name.endswith(("Request", "Result")) and isinstance(kind, type):
                assert kind.__dataclass_params__.frozen, name  # type: ignore[attr-defined]


def test_importing_the_package_imports_no_use_case() -> None:
    code = "import sys, modelcli.commands; print(*[m for m in sys.modules if m.startswith('modelcli.commands')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["modelcli.commands"]


#: Modules that store JSON on disk (a config.json too), and one that makes torch's own `_metadata`. They show nothing.
KEEP_JSON = {"blueprint_cache.py", "identify.py", "known_builders.py", "quantized_folder.py", "state_dict_plan.py"}


def test_only_render_makes_dictionaries_shaped_like_json() -> None:
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            keys = node.keys if isinstance(node, ast.Dict) else []
            texts = [key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str)]
            assert not texts or path.name in KEEP_JSON, (path.name, node)
