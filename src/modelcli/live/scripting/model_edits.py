"""Edits of a model as the statements that a person would write."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Sequence

from torch import nn

from modelcli.edits import Edit
from modelcli.edits.add import Add
from modelcli.edits.append import Append
from modelcli.edits.cast import Cast
from modelcli.edits.extract import Extract
from modelcli.edits.freeze import Freeze
from modelcli.edits.init import Init
from modelcli.edits.insert import Insert
from modelcli.edits.remove import Remove
from modelcli.edits.replace import Replace
from modelcli.edits.unfreeze import Unfreeze
from modelcli.language import expressions, selectors
from modelcli.live.describe import describe, dtype_name
from modelcli.live.scripting import places
from modelcli.live.scripting.page import STATEMENTS, InexpressibleError, Page, call, dedented, loop
from modelcli.live.scripting.places import is_of_torch, place, tensor
from modelcli.live.sources import named_tensors
from modelcli.live.surgery import layouts
from modelcli.live.surgery.core import is_numbered
from modelcli.live.surgery.init import DEFAULT, is_bias, scheme_name
from modelcli.live.surgery.storages import has_storage, key_of
from modelcli.live.walking import modules_in
from modelcli.model.blueprint import Blueprint
from modelcli.model.dtypes import FLOATING
from modelcli.model.paths import joined, lies_in, parent_of
from modelcli.model.tensors import TensorInfo

KEEP_WEIGHTS = dedented('''
    def keep_weights(old, new, swapped=()):
        """Copy the overlapping part of each tensor of the same name out of a state dict, and give `new` back.

        The axes of those in `swapped` are the other way round in the old module.
        """
        for name, tensor in new.state_dict().items():
            if name in old and tensor.dim() == old[name].dim():
                values = old[name].t() if name in swapped else old[name]
                part = tuple(slice(min(sizes)) for sizes in zip(tensor.shape, values.shape))
                tensor[part] = values[part]
        return new
''')

CAST_VIEWS = dedented('''
    def cast_views(tensors, dtype):
        """Convert tensors that are views of one storage, and let them be views of one storage again."""
        first = tensors[0].data
        size = first.untyped_storage().nbytes() // first.element_size()
        whole = first.as_strided((size,), (1,), 0).to(dtype)
        for tensor in tensors:
            tensor.data = whole.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
''')


def statements(page: Page, edits: Sequence[Edit], before: nn.Module, after: nn.Module, seed: int | None) -> list[str]:
    """What one edit does, from what it was resolved to: `edits` without patterns and holes.

    `before` and `after` are the model around them. `seed` is that of the edit's numbers, None where nobody needs them.

    Raises InexpressibleError.
    """
    if all(isinstance(edit, Replace) for edit in edits):
        return _replace(page, [edit for edit in edits if isinstance(edit, Replace)], before, after, seed)
    (edit,) = edits
    match edit:
        case Add() | Insert() | Append():
            return _place(page, edit, before, after, seed)
        case Remove():
            paths = _distinct(before, edit.targets)
            return [line for path in reversed(paths) for line in places.take_out(before, path)]
        case Extract():
            (path,) = selectors.select_modules(describe(before), [edit.path])
            return [f"model = {place(before, path)}"]
        case Freeze() | Unfreeze():
            return flags(before, describe(before), describe(after))
        case Cast():
            return casts(page, before, describe(before), describe(after))
        case Init():
            return _init(page, edit, before, seed)
    raise InexpressibleError(f"there are no statements of PyTorch for {edit.name}")


# --- new modules ---------------------------------------------------------------------------------------------------


def _replace(page: Page, edits: Sequence[Replace], before: nn.Module, after: nn.Module, seed: int | None) -> list[str]:
    blueprint = describe(before)
    news: dict[int, tuple[Replace, list[str]]] = {}
    for edit in edits:
        for path in selectors.select_modules(blueprint, edit.targets, without=edit.without):
            news.setdefault(id(after.get_submodule(path)), (edit, []))[1].append(path)
    lines = _seeded(seed, [after.get_submodule(paths[0]) for _, paths in news.values()])
    if any(edit.keep_weights for edit in edits):
        page.helpers.setdefault(KEEP_WEIGHTS)
    made = [(new_module(page, edit, after.get_submodule(paths[0])), edit, paths) for edit, paths in news.values()]
    # The generator goes on from one to the next, so they stay in their order: runs of equal ones become loops.
    while made:
        text, edit, paths = made[0]
        alike = 0
        while alike < len(made) and made[alike][0] == text and len(made[alike][2]) == 1:
            alike += 1
        names = [paths[0] for _, _, paths in made[:alike]]
        swapped = [layouts.transposed(before.get_submodule(path), after.get_submodule(path)) for path in names]
        if alike > STATEMENTS and all(places.can_be_set(before, path) for path in names) and len(set(swapped)) == 1:
            new = _kept("model.get_submodule(name)", text, swapped[0]) if edit.keep_weights else text
            lines += loop("name", names, f"model.set_submodule(name, {new})")
            made = made[alike:]
            continue
        new = text
        if edit.keep_weights:
            old = before.get_submodule(paths[0])
            new = _kept(place(before, paths[0]), text, layouts.transposed(old, after.get_submodule(paths[0])))
        lines.append(places.put(before, paths[0], new))
        lines += [places.put(before, path, place(after, paths[0])) for path in paths[1:]]
        made = made[1:]
    return lines


def _kept(old: str, new: str, swapped: Sequence[str]) -> str:
    more = f", swapped={tuple(swapped)!r}" if swapped else ""
    return f"keep_weights({old}.state_dict(), {new}{more})"


def _place(page: Page, edit: Add | Insert | Append, before: nn.Module, after: nn.Module, seed: int | None) -> list[str]:
    """A new module at a place of its own."""
    path = edit.path if isinstance(edit, Append) else _parent_selector(edit.path)
    (holder_path,) = selectors.select_modules(describe(before), [path])
    holder, changed = before.get_submodule(holder_path), after.get_submodule(holder_path)
    own = list(changed._modules)[-1]
    if not isinstance(edit, Append):
        own = selectors.plain(selectors.parse(edit.path).components[-1]) or own
    new = changed._modules[own]
    assert new is not None
    text, path = new_module(page, edit, new), joined(holder_path, own)
    if not isinstance(edit, Insert):
        return [*_seeded(seed, [new]), places.put_new(before, path, text)]
    if not is_numbered(holder):
        raise InexpressibleError(f"{holder_path or 'the model'} is no sequence with children 0, 1, 2")
    return [*_seeded(seed, [new]), *places.insert(before, path, text)]


def _parent_selector(path: str) -> str:
    return ".".join(selectors.parse(path).components[:-1]) or "."


def _distinct(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """The paths that selectors pick, less those that lead to the same child of the same module again."""
    found: dict[tuple[int, str], str] = {}
    for path in selectors.select_modules(describe(model), targets):
        above, _, own = path.rpartition(".")
        found.setdefault((id(model.get_submodule(above)), own), path)
    return list(found.values())


def new_module(page: Page, edit: Replace | Add | Insert | Append, new: nn.Module) -> str:
    """The call that makes a module, with the dtype and mode that it has in the model."""
    text = page.value(edit.module)
    if not expressions.gives(edit.module, "dtype"):
        dtypes = [dtype_name(t.dtype) for t in named_tensors(new).values() if t.dtype.is_floating_point]
        if dtypes and dtypes[0] != "float32":
            text += f".to(torch.{dtypes[0]})"
    return text if new.training else f"{text}.eval()"


def _seeded(seed: int | None, news: Iterable[nn.Module]) -> list[str]:
    """What sets the generator, where one of the new modules has numbers."""
    if seed is None or not any(map(named_tensors, news)):
        return []
    return [f"torch.manual_seed({seed})"]


# --- flags and dtypes ----------------------------------------------------------------------------------------------


def flags(model: nn.Module, before: Blueprint, after: Blueprint) -> list[str]:
    """What gives each parameter the flag that it has in `after`: for whole modules where all of one take it."""
    lines = []
    for wanted in (False, True):
        named = {t.name for t in after.tensors if t.kind == "parameter" and t.requires_grad is wanted}
        changed = {t.name for t in before.tensors if t.name in named and t.requires_grad is not wanted}

        def is_meant(info: TensorInfo, named: set[str] = named, wanted: bool = wanted) -> bool:
            # Whole numbers cannot be trained: a module with such a parameter refuses.
            return info.kind == "buffer" or (info.name in named and not (wanted and not info.is_differentiable))

        modules, tensors = _largest(model, before, changed, is_meant, "requires_grad_")
        statement = f".requires_grad_({wanted})"
        lines += _each(modules, lambda path: place(model, path), "get_submodule", statement)
        lines += _each(tensors, lambda name: tensor(model, name), "get_parameter", statement)
    return lines or ["# nothing changes: the flags are set already"]


def casts(page: Page, model: nn.Module, before: Blueprint, after: Blueprint) -> list[str]:
    """What gives each tensor the dtype that it has in `after`: whole modules by their `to`, others one by one."""
    dtypes = {t.name: after.by_name[t.name].dtype for t in before.tensors if after.by_name[t.name].dtype != t.dtype}
    lines = []
    for dtype in dict.fromkeys(dtypes.values()):
        changed = {name for name, wanted in dtypes.items() if wanted == dtype}
        # `to` would part what is one tensor, or one storage: it finds those of the right dtype already.
        apart, together = _shared(model, changed)
        lines += [_in_place(tensor(model, name), dtype) for name in apart]
        for names in together:
            page.helpers.setdefault(CAST_VIEWS)
            lines += call("cast_views", [tensor(model, name) for name in names], f"torch.{dtype}")
        done = {*apart, *itertools.chain(*together)}
        changed = {name for name in changed if before.by_name[name].identity not in done}

        def is_meant(info: TensorInfo, dtype: str = dtype) -> bool:
            # `to` converts complex numbers as well, and drops their imaginary parts.
            return not info.dtype.startswith("complex") and (
                info.dtype not in FLOATING or after.by_name[info.name].dtype == dtype
            )

        floating = {name for name in changed if dtype in FLOATING and before.by_name[name].dtype in FLOATING}
        modules, tensors = _largest(model, before, floating, is_meant, "to")
        lines += _each(modules, lambda path: place(model, path), "get_submodule", f".to(torch.{dtype})")
        tensors += dict.fromkeys(
            before.by_name[t.name].identity for t in before.tensors if t.name in changed - floating
        )
        lines += [_in_place(tensor(model, name), dtype) for name in tensors]
    return lines or ["# nothing changes: the dtype is that already"]


def has_ties(model: nn.Module) -> bool:
    """Whether tensors of a model share a storage."""
    keys = [key_of(value) for value in named_tensors(model).values() if has_storage(value)]
    return len(set(keys)) < len(keys)


def _in_place(text: str, dtype: str) -> str:
    """What converts a tensor that stays the one that it is, whoever else holds it."""
    return f"{text}.data = {text}.data.to(torch.{dtype})"


def _shared(model: nn.Module, names: Collection[str]) -> tuple[list[str], list[list[str]]]:
    """Of the tensors of these names, the buffers that several modules hold, and groups of those that share a storage.

    Each tensor is named once, by its first name.
    """
    first: dict[int, str] = {}
    holders: dict[int, set[tuple[int, str]]] = {}
    storages: dict[object, dict[int, str]] = {}
    buffers = dict(model.named_buffers(remove_duplicate=False))
    for name, value in named_tensors(model).items():
        original = first.setdefault(id(value), name)
        above, _, own = name.rpartition(".")
        holders.setdefault(id(value), set()).add((id(model.get_submodule(above)), own))
        if name in names and has_storage(value):
            storages.setdefault((key_of(value), value.dtype), {}).setdefault(id(value), original)
    together = [list(group.values()) for group in storages.values() if len(group) > 1]
    grouped = set(itertools.chain(*together))
    apart = [name for key, name in first.items() if name in names and name in buffers and len(holders[key]) > 1]
    return [name for name in apart if name not in grouped], together


def _largest(
    model: nn.Module, blueprint: Blueprint, changed: set[str], is_meant: Callable[[TensorInfo], bool], method: str
) -> tuple[list[str], list[str]]:
    """The outermost modules that hold changed tensors and only such as are meant, and the changed tensors elsewhere.

    `method` is what the modules are asked to do: those with a method of their own are left to what is in them.
    """
    wanted: dict[str, bool] = {}
    useful: set[str] = set()
    for info in blueprint.tensors:
        path = info.name
        while path:
            path = parent_of(path)
            wanted[path] = wanted.get(path, True) and is_meant(info)
            if info.name in changed:
                useful.add(path)
    modules: dict[str, None] = {}
    for module in blueprint.modules:
        path = module.path
        if path in useful and wanted[path] and not lies_in(path, modules) and _does(model.get_submodule(path), method):
            modules[path] = None
    # A tied tensor is the same one under all its names.
    done = {blueprint.by_name[name].identity for name in changed if lies_in(parent_of(name), modules)}
    tensors: dict[str, str] = {}
    for info in blueprint.tensors:
        if info.name in changed and info.identity not in done:
            tensors.setdefault(info.identity, info.name)
    return list(modules), list(tensors.values())


def _does(module: nn.Module, method: str) -> bool:
    """Whether a module does with its tensors what torch's method does: nothing that has a part in that is its own."""
    return is_of_torch(module, method) and all(
        is_of_torch(part, "_apply", "parameters", "named_parameters", "named_modules", "children")
        for part in modules_in(module)
    )


def _each(names: Sequence[str], text: Callable[[str], str], getter: str, statement: str) -> list[str]:
    """The same call for each name: one below the other, or in a loop where there are many."""
    if len(names) <= STATEMENTS:
        return [f"{text(name)}{statement}" for name in names]
    return loop("name", names, f"model.{getter}(name){statement}")


# --- numbers -------------------------------------------------------------------------------------------------------


def _init(page: Page, edit: Init, model: nn.Module, seed: int | None) -> list[str]:
    lines = [] if seed is None else [f"torch.manual_seed({seed})"]
    blueprint = describe(model)
    if scheme_name(edit.scheme) == DEFAULT:
        if edit.without:
            raise InexpressibleError("reset_parameters draws all the tensors of a module, and some are kept here")
        paths = selectors.select_modules(blueprint, edit.targets)
        return [*lines, *_each(paths, lambda path: place(model, path), "get_submodule", ".reset_parameters()")]
    names = selectors.select_tensors(blueprint, edit.targets, without=edit.without)
    infos = {blueprint.by_name[name].identity: name for name in reversed(names)}
    chosen = [name for name in names if name in infos.values() and blueprint.by_name[name].kind == "parameter"]
    page.imports.add("from torch.nn import init")
    return lines + fills(page, chosen, edit, lambda name: tensor(model, name), "model.get_parameter(name)")


def fills(page: Page, names: Sequence[str], edit: Init, text: Callable[[str], str], any_text: str) -> list[str]:
    """The calls that fill tensors in their order; runs of the same call become loops.

    `any_text` is the expression for the tensor that is called `name`.
    """
    lines: list[str] = []
    rest = list(names)
    if scheme_name(edit.bias) in ("zeros", "ones", "constant"):  # draws nothing, and so may come last
        rest = [name for name in names if not is_bias(name)] + [name for name in names if is_bias(name)]
    while rest:
        scheme = edit.bias if is_bias(rest[0]) else edit.scheme
        run = [rest[0]]
        while len(run) < len(rest) and is_bias(rest[len(run)]) == is_bias(run[0]):
            run.append(rest[len(run)])
        arguments = page.arguments(scheme.args, scheme.kwargs)
        arguments = f", {arguments}" if arguments else ""
        function = f"init.{scheme_name(scheme)}_"
        if len(run) > STATEMENTS:
            lines += loop("name", run, f"{function}({any_text}{arguments})")
        else:
            lines += [f"{function}({text(name)}{arguments})" for name in run]
        rest = rest[len(run) :]
    return lines


__all__ = ["KEEP_WEIGHTS", "fills", "flags", "new_module", "statements"]
