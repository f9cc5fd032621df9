"""What a word on the command line can become: completion in bash, zsh, fish and PowerShell.

Nothing here imports torch or runs a line of anybody's code, and everything is done in the time of a key press. Where
nothing is offered the shell completes names of files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from modelcli.errors import ModelcliError

if TYPE_CHECKING:
    from modelcli.commands.target import Target
    from modelcli.edits.declaring import Completion, Operand, Option

#: What Typer calls: it tells parameters by their names and types.
_Completer = Callable[[typer.Context, str], Iterable[str]]

#: Reading what is larger in a checkpoint takes longer than somebody waits for a word.
_LIMITS = {
    "MODELCLI_MAX_OPCODES": "300000",
    "MODELCLI_MAX_HEADER_BYTES": "4000000",
    "MODELCLI_MAX_INDEX_BYTES": "4000000",
}


def _completer(function: _Completer) -> Callable[..., list[str]]:
    """A completer that gives what starts with the word so far, and nothing where anything is wrong.

    A message in the middle of a line that is being typed would help nobody; the command itself will say it.
    """

    def complete(ctx: typer.Context, incomplete: str) -> list[str]:
        try:
            return [word for word in function(ctx, incomplete) if word.startswith(incomplete)]
        except Exception:
            return []

    return complete


def one_of(*words: str) -> Callable[..., list[str]]:
    """Completes a value that is one of a few words."""
    return _completer(lambda _ctx, _incomplete: words)


@_completer
def models(_ctx: typer.Context, incomplete: str) -> Iterable[str]:
    """Builders, and the files and folders that may be a model."""
    return [*_names(incomplete), *_files(incomplete)]


@_completer
def builders(_ctx: typer.Context, incomplete: str) -> Iterable[str]:
    return _names(incomplete)


@_completer
def weights(_ctx: typer.Context, incomplete: str) -> Iterable[str]:
    from modelcli import providers

    return ["none", *(name for known in providers.built_in() for name in known.weights_names()), *_files(incomplete)]


@_completer
def modules(ctx: typer.Context, incomplete: str) -> Iterable[str]:
    """Paths of modules of the model at hand."""
    return _paths(ctx, incomplete, tensors=False)


@_completer
def targets(ctx: typer.Context, incomplete: str) -> Iterable[str]:
    """Paths of its modules and tensors."""
    return _paths(ctx, incomplete, tensors=True)


def operand(declared: Operand) -> Callable[..., list[str]] | None:
    """Completes a word of an edit as the edit declares it."""
    if not declared.completes and not declared.completes_later:
        return None

    def words(ctx: typer.Context, incomplete: str) -> Iterable[str]:
        later = declared.several and ctx.params.get(declared.name)
        return _of_all(declared.completes_later if later else declared.completes, ctx, incomplete)

    return _completer(words)


def of_option(declared: Option) -> Callable[..., list[str]] | None:
    """Completes the value of an edit's option as the edit declares it."""
    if not declared.completes:
        return None
    return _completer(lambda ctx, incomplete: _of_all(declared.completes, ctx, incomplete))


def _of_all(completions: Sequence[Completion], ctx: typer.Context, incomplete: str) -> Iterable[str]:
    from modelcli import providers
    from modelcli.edits import declaring

    known: dict[Completion, Callable[[], Iterable[str]]] = {
        declaring.MODULES: lambda: _paths(ctx, incomplete, tensors=False),
        declaring.TENSORS: lambda: _paths(ctx, incomplete, tensors=True),
        declaring.CLASSES: providers.class_names,
        declaring.SCHEMES: _schemes,
    }
    for each in completions:
        yield from (each if callable(each) else known[each])()


@_completer
def dtypes(_ctx: typer.Context, _incomplete: str) -> Iterable[str]:
    from modelcli.model.dtypes import ITEM_BYTES

    return sorted(name for name in ITEM_BYTES if not name.startswith("q"))


@_completer
def columns(_ctx: typer.Context, _incomplete: str) -> Iterable[str]:
    """What `params` can be sorted by."""
    from modelcli.render.documents import params as documents

    return [*documents.SORT_KEYS, *documents.STATS]


@_completer
def keys(ctx: typer.Context, _incomplete: str) -> Iterable[str]:
    """The state dicts in the training checkpoint at hand."""
    from modelcli import checkpoints, resolve
    from modelcli.checkpoints.torch_pickle import state_dicts
    from modelcli.language.references import CheckpointFile

    files = [resolve.reference_of(target.source) for target in _targets(ctx)]
    found: list[str] = []
    for file in files:
        if isinstance(file, CheckpointFile):
            try:
                found += state_dicts.keys_in(checkpoints.read(file.path).tree)
            except state_dicts.SeveralStateDictsError as error:  # where a key is most needed
                found += error.keys
    return dict.fromkeys(found)


def _schemes() -> list[str]:
    from modelcli.providers import torch_nn

    return [*torch_nn.init_names(), "default"]


def _names(incomplete: str) -> list[str]:
    """Names of models: after a prefix those of its provider, for which another package may be imported."""
    from modelcli import providers

    prefix, colon, _ = incomplete.partition(":")
    return providers.full_names_after(prefix) if colon else providers.names()


def _files(incomplete: str) -> list[str]:
    """Folders, checkpoints and Python files that start with a word."""
    from modelcli.checkpoints import formats

    folder, name = os.path.split(incomplete)
    found = []
    for entry in sorted(Path(folder or ".").iterdir()):
        if not entry.name.startswith(name) or (entry.name.startswith(".") and not name):
            continue
        if entry.is_dir():
            found.append(os.path.join(folder, entry.name) + "/")  # noqa: PTH118 -- `./` in front stays
        elif entry.suffix == ".py" or formats.has_known_suffix(entry.name):
            found.append(os.path.join(folder, entry.name))  # noqa: PTH118
    return found


def _paths(ctx: typer.Context, incomplete: str, *, tensors: bool) -> list[str]:
    """Paths of the model at hand that are as deep as the word; what lies below where there is but one such path.

    So that a shell, which ends a word that can become one thing only, lets one go on to the children.
    """
    paths = [path for target in _targets(ctx) for path in _paths_of(target, tensors=tensors)]
    starting = [path for path in dict.fromkeys(paths) if path.startswith(incomplete)]
    level = [path for path in starting if path.count(".") == incomplete.count(".")]
    if len(level) == 1:
        level += [path for path in starting if path.rpartition(".")[0] == level[0]]
    return level


def _paths_of(target: Target, *, tensors: bool) -> list[str]:
    from modelcli.commands.look import known_blueprint

    try:
        blueprint = known_blueprint(target)
    except (ModelcliError, OSError):  # none that can be read: other words may fit all the same
        return []
    if blueprint is None:
        return []
    paths = [*(f"@{word}" for word in blueprint.landmarks), *(module.path for module in blueprint.modules[1:])]
    return paths + ([tensor.name for tensor in blueprint.tensors] if tensors else [])


def _targets(ctx: typer.Context) -> list[Target]:
    """The model at hand, or the two of `diff`; none where there is no model yet, nor a recipe."""
    from modelcli.commands.target import find_target, options_given

    for variable, number in _LIMITS.items():
        os.environ.setdefault(variable, number)
    arguments = [parameter.name for parameter in ctx.command.params if parameter.param_type_name == "argument"]
    # An option that waits for its value keeps arguments from being told apart.
    given: dict[str, Any] = dict(zip([name or "" for name in arguments], ctx.args, strict=False))
    given |= options_given(ctx.params)
    models = [given[name] for name in ("model", "option_model", "a", "b", "checkpoint") if name in given]
    several = given.get("models") or ()  # of `check`, which takes any number of them
    models += [several] if isinstance(several, str) else several
    source = {name: given.get(name) for name in ("weights", "arch")}
    keys = given.get("key")
    keys = keys if isinstance(keys, list | tuple) and keys else [keys or None]
    try:
        return [
            find_target(model, {**source, "key": key}, given.get("recipe"))
            for model, key in zip(models or [None], (*keys, keys[-1]), strict=False)
        ]
    except (ModelcliError, OSError):
        return []
