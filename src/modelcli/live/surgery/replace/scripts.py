"""replace: the statements of a script that do the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modelcli.edits.replace import Replace
from modelcli.language import selectors
from modelcli.live import modules
from modelcli.live.describe import describe
from modelcli.live.script import access_paths
from modelcli.live.script.new_modules import constructor_call, new_statements, seed_statements, tensor_names
from modelcli.live.script.source_text import STATEMENTS, InexpressibleError, SourceText, dedented, loop
from modelcli.live.script.source_text import quoted as literal
from modelcli.live.script.state import State
from modelcli.live.script.step import StateDictStep, Step
from modelcli.live.sources import named_tensors
from modelcli.live.surgery import layouts
from modelcli.live.surgery.replace.tied_modules import TiedModule, donor_call, tied_keys, tied_modules
from modelcli.live.surgery.state_dicts import meta_tensors
from modelcli.live.surgery.storages import shown_by
from modelcli.live.surgery.value_rules import ValueRule, in_script, rule_for
from modelcli.model.paths import joined
from modelcli.model.shared_bytes import tied

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


def script_lines(edit: Replace, step: Step) -> list[str]:
    return script_lines_together([edit], step)


def script_lines_together(edits: Sequence[Replace], step: Step) -> list[str]:
    """Write the replacements that one edit resolved to. None of the modules is inside another one."""
    script, before, after = step.script, step.before, step.after
    blueprint = describe(before)
    news: dict[int, tuple[Replace, list[str]]] = {}
    for edit in edits:
        for path in selectors.select_modules(blueprint, edit.targets, without=edit.without):
            news.setdefault(id(after.get_submodule(path)), (edit, []))[1].append(path)
    lines = seed_statements(step.seed, [after.get_submodule(paths[0]) for _, paths in news.values()])
    made = [
        (constructor_call(script, edit.module, after.get_submodule(paths[0])), edit, paths)
        for edit, paths in news.values()
    ]
    followers = _followers(before, after, [(edit, paths) for edit, paths in news.values()])
    # All draw from one generator, so their order is kept; runs of equal ones become loops.
    while made:
        text, edit, paths = made[0]
        alike = 0
        while alike < len(made) and made[alike][0] == text and len(made[alike][2]) == 1:
            alike += 1
        names = [paths[0] for _, _, paths in made[:alike]]
        carried = [_carried(edit, before.get_submodule(path), after.get_submodule(path)) for path in names]
        if (
            alike > STATEMENTS
            and not edit.tie
            and all(access_paths.is_plain_assignment(before, path) for path in names)
            and len(set(carried)) == 1
        ):
            new = carried[0].written(script, "model.get_submodule(name).state_dict()", text)
            lines += loop("name", names, f"model.set_submodule(name, {new})")
            made = made[alike:]
            continue
        how = _carried(edit, before.get_submodule(paths[0]), after.get_submodule(paths[0]))
        new = how.written(script, f"{access_paths.module_expression(before, paths[0])}.state_dict()", text)
        lines.append(access_paths.replace_statement(before, paths[0], new))
        lines += [
            access_paths.replace_statement(before, path, access_paths.module_expression(after, paths[0]))
            for path in paths[1:]
        ]
        for each in followers.get(paths[0], ()):
            donor = None
            if each.bias is not None:
                donor = constructor_call(script, donor_call(each.shape), after.get_submodule(each.paths[0]))
                old_state = f"{access_paths.module_expression(before, each.paths[0])}.state_dict()"
                made_for, was = after.get_submodule(each.paths[0]), before.get_submodule(each.paths[0])
                rules = _rules(edit.keep_weights, {"bias": named_tensors(was)["bias"]}, made_for)
                donor = _Carried(edit.keep_weights, rules=rules).written(script, old_state, donor)
            lines += each.statements(before, paths[0], donor)
        made = made[1:]
    return lines


def _followers(
    before: nn.Module, after: nn.Module, replaced: Sequence[tuple[Replace, list[str]]]
) -> dict[str, list[TiedModule]]:
    """Return the modules that follow replaced ones in size, by the first path of each replaced one."""
    tying = [paths for edit, paths in replaced if edit.tie]
    if not tying:
        return {}
    news = [after.get_submodule(paths[0]) for paths in tying]
    found: dict[str, list[TiedModule]] = {}
    for each in tied_modules(before, tying, tied(shown_by(before)), news):
        found.setdefault(tying[each.tied.index][0], []).append(each)
    return found


@dataclass(frozen=True)
class _Carried:
    """How a script carries weights over: `swapped` axes, and the tensors that get another shape first, by `how`."""

    how: str | None
    swapped: tuple[str, ...] = ()
    rules: tuple[tuple[str, ValueRule], ...] = ()

    def written(self, script: SourceText, old: str, new: str) -> str:
        """The expression for a new module with the weights of an old one, and the functions that it calls.

        Args:
            script: the script, to which these functions are added.
            old: the expression for the old module's state dict.
            new: the expression for the new module.
        """
        if self.how is None:
            return new
        script.helpers.setdefault(KEEP_WEIGHTS)
        more = f", swapped={self.swapped!r}" if self.swapped else ""
        return f"keep_weights({in_script(script, old, dict(self.rules))}, {new}{more})"


def _carried(edit: Replace, old: nn.Module, new: nn.Module) -> _Carried:
    if edit.keep_weights is None:
        return _Carried(None)
    swapped = layouts.transposed(old, new)
    return _Carried(edit.keep_weights, swapped, _rules(edit.keep_weights, named_tensors(old), new, swapped))


def _rules(
    how: str | None, old: Mapping[str, Tensor], new: nn.Module, swapped: Sequence[str] = ()
) -> tuple[tuple[str, ValueRule], ...]:
    """The tensors of a new module whose old values get another shape first."""
    if how is None:
        return ()
    names = [name for name in named_tensors(new) if name in old]
    rules = {name: rule_for(name, old[name], new, how, transposed=name in swapped) for name in names}
    return tuple((name, rule) for name, rule in rules.items() if rule is not None)


def state_dict_script_lines(edit: Replace, step: StateDictStep, state: State) -> list[str]:
    """Write the new tensors at the position of the first old one."""
    script, before = step.script, step.before
    paths = selectors.select_modules(before.blueprint, edit.targets, without=edit.without)
    if len({id(step.new(path)) for path in paths}) != 1:
        raise InexpressibleError("one module would have to be several")
    lines = new_statements(script, edit.module, step.new(paths[0]), step.seed)
    names = list(before.keys)
    for path in paths:
        prefix = f"{path}."
        if edit.keep_weights:
            dense = [name for name in names if name.startswith(prefix) and name in before.tensors]
            tensors = {name.removeprefix(prefix): each for name, each in meta_tensors(before, dense).items()}
            rules = _rules(edit.keep_weights, tensors, step.new(path))
            script.helpers.setdefault(KEEP_WEIGHTS)
            lines.append(f"keep_weights({in_script(script, _below(prefix), dict(rules))}, new)")
        lines += state.put_new_module(
            prefix, tensor_names(step.new(path)), [name for name in names if name.startswith(prefix)]
        )
    if edit.tie:
        for each in tied_keys(before, [paths], tied(before.shown), [step.new(paths[0])]):
            for one in filter(None, (each.tied, each.tied_bias)):
                lines.append(f"state[{literal(one.name)}] = state[{literal(joined(paths[0], one.own))}]")
            if each.bias is not None:
                dtype = "" if each.bias.dtype == "float32" else f".to(torch.{each.bias.dtype})"
                lines.append(f"new = {script.value(donor_call(each.shape))}{dtype}")
                if edit.keep_weights:
                    bias = {"bias": meta_tensors(before, [joined(each.path, "bias")])[joined(each.path, "bias")]}
                    with torch.device("meta"):
                        rules = _rules(edit.keep_weights, bias, modules.make(donor_call(each.shape)))
                    script.helpers.setdefault(KEEP_WEIGHTS)
                    lines.append(f"keep_weights({in_script(script, _below(f'{each.path}.'), dict(rules))}, new)")
                lines.append(f"state[{literal(joined(each.path, 'bias'))}] = new.state_dict()[{literal('bias')}]")
    return lines


def _below(prefix: str) -> str:
    """The expression for the entries of `state` whose keys have this prefix, without it."""
    below = f"key.removeprefix({literal(prefix)}): value for key, value in state.items()"
    return f"{{{below} if key.startswith({literal(prefix)})}}"
