"""Completion of words on the command line, in bash, zsh, fish and PowerShell.

The completers do not import torch and do not run a user's code, so that they answer within the time of a key press. If
they offer nothing, the shell completes file names.
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

#: The signature that Typer requires: it recognises a completer's parameters by their names and types.
_Completer = Callable[[typer.Context, str], Iterable[str]]

#: Limits for reading checkpoints during completion. Larger ones would take longer than a user waits for a word.
_LIMITS = {
    "MODELCLI_MAX_OPCODES": "300000",
    "MODELCLI_MAX_HEADER_BYTES": "4000000",
    "MODELCLI_MAX_INDEX_BYTES": "4000000",
}


def _completer(function: _Completer) -> Callable[..., list[str]]:
    """Make a completer of a function: it offers only words that start with the typed text, and nothing after an error.

    An error message would break the line that the user is typing. The command itself will report the error.
    """

    def complete(ctx: typer.Context, incomplete: str) -> list[str]:
        try:
            return [word for word in function(ctx, incomplete) if word.startswith(incomplete)]
        except Exception:
            return []

    return complete


def one_of(*words: str) -> Callable[..., list[str]]:
    """Return a completer for a value that is one of a few words."""
    return _completer(lambda _ctx, _incomplete: words)


@_completer
def models(_ctx: typer.Context, incomplete: str) -> Iterable[str]:
    """Complete a model: the names of builders, and files and folders."""
    return [*_names(incomplete), *_files(incomplete)]


@_completer
def builders(_ctx: typer.Context, incomplete: str) -> Iterable[str]:
    return _names(incomplete)


@_completer
def weights(ctx: typer.Context, incomplete: str) -> Iterable[str]:
    """Complete the name of pretrained weights: those of the command's model, where a prefix says whose it is."""
    from modelcli import providers

    models = [target.source.arch or target.source.model for target in _targets(ctx)]
    named = [name for model in models for name in _weights_of(model)]
    if not named and not any(providers.prefix_of(model) for model in models):
        named = [name for known in providers.built_in() for name in known.weights_names()]
    return ["none", *dict.fromkeys(named), *_files(incomplete)]


def _weights_of(model: str) -> Sequence[str]:
    """The names of the pretrained weights of a model with a prefix."""
    from modelcli import providers

    prefix = providers.prefix_of(model)
    provider = None if prefix is None else providers.by_prefix(prefix)
    return () if provider is None else provider.weights_names_of(model.partition(":")[2].partition("(")[0])


@_completer
def modules(ctx: typer.Context, incomplete: str) -> Iterable[str]:
    """Complete the path of a module of the command's model."""
    return _paths(ctx, incomplete, tensors=False)


@_completer
def targets(ctx: typer.Context, incomplete: str) -> Iterable[str]:
    """Complete the path of a module or tensor of the command's model."""
    return _paths(ctx, incomplete, tensors=True)


def of_operand(declared: Operand) -> Callable[..., list[str]] | None:
    """Return the completer for a word of an edit, as the edit declares it; None if it declares no completion."""
    if not declared.completes and not declared.completes_later:
        return None

    def words(ctx: typer.Context, incomplete: str) -> Iterable[str]:
        later = declared.several and ctx.params.get(declared.name)
        return _completions(declared.completes_later if later else declared.completes, ctx, incomplete)

    return _completer(words)


def of_option(declared: Option) -> Callable[..., list[str]] | None:
    """Return the completer for the value of an edit's option, as the edit declares it; None if it declares none."""
    if not declared.completes:
        return None
    return _completer(lambda ctx, incomplete: _completions(declared.completes, ctx, incomplete))


def _completions(declared: Sequence[Completion], ctx: typer.Context, incomplete: str) -> Iterable[str]:
    """Iterate over the words that the declared completions offer."""
    from modelcli import providers
    from modelcli.edits import declaring

    known: dict[Completion, Callable[[], Iterable[str]]] = {
        declaring.MODULES: lambda: _paths(ctx, incomplete, tensors=False),
        declaring.TENSORS: lambda: _paths(ctx, incomplete, tensors=True),
        declaring.CLASSES: providers.class_names,
        declaring.REFERENCES: lambda: [*_names(incomplete), *_files(incomplete)],
        declaring.SCHEMES: _schemes,
    }
    for completion in declared:
        yield from (completion if callable(completion) else known[completion])()


@_completer
def dtypes(_ctx: typer.Context, _incomplete: str) -> Iterable[str]:
    from modelcli.model.dtypes import ITEM_BYTES

    return sorted(name for name in ITEM_BYTES if not name.startswith("q"))


@_completer
def columns(_ctx: typer.Context, _incomplete: str) -> Iterable[str]:
    """Complete the column that `params` is sorted by."""
    from modelcli.render.documents import params as documents

    return [*documents.SORT_KEYS, *documents.STATS]


@_completer
def keys(ctx: typer.Context, _incomplete: str) -> Iterable[str]:
    """Complete the key of a state dict in the command's training checkpoint."""
    from modelcli import checkpoints, resolve
    from modelcli.checkpoints.torch_pickle import state_dicts
    from modelcli.language.references import CheckpointFile

    files = [resolve.reference_of(target.source) for target in _targets(ctx)]
    found: list[str] = []
    for file in files:
        if isinstance(file, CheckpointFile):
            try:
                found += state_dicts.keys_in(checkpoints.read(file.path).tree)
            except state_dicts.SeveralStateDictsError as error:  # this checkpoint needs `--key`
                found += error.keys
    return dict.fromkeys(found)


def _schemes() -> list[str]:
    from modelcli.providers import torch_nn

    return [*torch_nn.init_names(), "default"]


def _names(incomplete: str) -> list[str]:
    """Return the names of models; after a prefix, those of its provider, which may import another package."""
    from modelcli import providers

    prefix, colon, _ = incomplete.partition(":")
    return providers.full_names_after(prefix) if colon else providers.names()


def _files(incomplete: str) -> list[str]:
    """Return the folders, checkpoints and Python files whose paths start with a word."""
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
    """Return paths of the command's model that start with a word and have as many components as it.

    If there is only one such path, its children are returned as well. Otherwise the shell would take the path as
    complete, and the user could not go on to the children.
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
    except (ModelcliError, OSError):  # the model cannot be read; other completions may still apply
        return []
    if blueprint is None:
        return []
    paths = [*(f"@{word}" for word in blueprint.landmarks), *(module.path for module in blueprint.modules[1:])]
    return paths + ([tensor.name for tensor in blueprint.tensors] if tensors else [])


def _targets(ctx: typer.Context) -> list[Target]:
    """Return the command's model, both models of `diff`, or nothing if there is neither a model nor a recipe yet."""
    from modelcli.commands.target import find_target, options_given

    for variable, number in _LIMITS.items():
        os.environ.setdefault(variable, number)
    arguments = [parameter.name for parameter in ctx.command.params if parameter.param_type_name == "argument"]
    # While the last option has no value yet, Typer does not assign the arguments, so they are assigned here.
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
