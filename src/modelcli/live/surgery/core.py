"""What the handlers of edits have in common: find modules, and describe one in a line."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from torch import nn

from modelcli.edits.applied import Context
from modelcli.errors import RequestError
from modelcli.language import expressions
from modelcli.live import signatures
from modelcli.live.describe import configuration, describe
from modelcli.live.sources import is_composite, is_lazy, named_tensors
from modelcli.model.blueprint import Blueprint


def blueprint_of(module: nn.Module, context: Context) -> Blueprint:
    """Return the blueprint of the model that an edit works on."""
    return describe(module) if context.blueprint is None else context.blueprint


def is_meta(module: nn.Module) -> bool:
    """Whether a model is on the meta device, so that its values are made or read when they are needed."""
    tensors = [tensor for tensor in named_tensors(module).values() if not is_lazy(tensor) and not is_composite(tensor)]
    return bool(tensors) and all(tensor.is_meta for tensor in tensors)


def paths_of_modules(module: nn.Module) -> dict[int, list[str]]:
    """Return every path of each module, by its `id`. A shared module has several."""
    found: dict[int, list[str]] = {}
    for path, child in module.named_modules(remove_duplicate=False):
        found.setdefault(id(child), []).append(path)
    return found


def is_numbered(module: nn.Module) -> bool:
    """Whether a module is a sequence whose children are called 0, 1, 2 and so on."""
    return isinstance(module, nn.Sequential | nn.ModuleList) and list(module._modules) == [
        str(number) for number in range(len(module._modules))
    ]


def put_children(module: nn.Module, children: Mapping[str, nn.Module | None]) -> None:
    """Replace the children of a module by these, in this order."""
    found = dict(children)
    module._modules.clear()
    module._modules.update(found)


def submodule(module: nn.Module, path: str) -> nn.Module:
    """Return the module at an existing path, even if its name is that of a method, such as `train`."""
    for name in path.split(".") if path else ():
        child = module._modules[name]
        assert child is not None
        module = child
    return module


def brief(module: nn.Module) -> str:
    """Describe a module in one short line, as the call that makes it if its `repr` shows that.

    `Linear(in_features=4096, out_features=10, bias=True)` is `Linear(4096, 10)`: defaults are left out, and leading
    arguments lose their names.
    """
    name, config = str(module._get_name()), configuration(module)
    if len(module._modules) or "\n" in config:
        return name
    try:
        parameters = list(signatures.of(type(module)).parameters.values())
        call = expressions.parse(f"{name}({config})")
    except (RequestError, ValueError, TypeError):
        return f"{name}({config})"
    defaults = {parameter.name: parameter.default for parameter in parameters}
    args, kwargs = list(call.args), dict(call.kwargs)
    for parameter in parameters[len(args) :]:
        if parameter.default is not inspect.Parameter.empty or parameter.name not in kwargs:
            break
        args.append(kwargs.pop(parameter.name))
    kept = {key: value for key, value in kwargs.items() if key not in defaults or value != defaults[key]}
    parts = list(map(expressions.to_text, args))
    parts += [f"{key}={expressions.to_text(value)}" for key, value in kept.items()]
    return f"{name}({', '.join(parts)})"


def count(module: nn.Module) -> int:
    """Return `sum(p.numel() for p in module.parameters())`; lazy parameters count as 0."""
    return sum(parameter.numel() for parameter in module.parameters() if not is_lazy(parameter))
