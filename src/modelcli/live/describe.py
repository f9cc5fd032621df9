"""Make a blueprint, which contains no torch objects, from an `nn.Module`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from modelcli.live import apart, composites, landmarks
from modelcli.live.sources import flag_of, is_composite, is_lazy
from modelcli.model.blueprint import Blueprint, ModuleInfo
from modelcli.model.tensors import Kind, TensorInfo


def describe(module: nn.Module) -> Blueprint:
    """Return the blueprint of a model: its modules and tensors, without values."""
    modules, tensors = [], []
    first_path: dict[int, str] = {}
    first_name: dict[int, str] = {}
    for path, child in walk(module):
        original = first_path.setdefault(id(child), path)
        modules.append(_module_info(path, child, None if original == path else original))
        tables: list[tuple[Kind, dict[str, torch.Tensor | None]]]
        tables = [("parameter", child._parameters), ("buffer", child._buffers)]  # type: ignore[list-item]
        for kind, table in tables:
            for own_name, tensor in table.items():
                if tensor is not None:
                    name = f"{path}.{own_name}" if path else own_name
                    original = first_name.setdefault(id(tensor), name)
                    persistent = kind == "parameter" or own_name not in child._non_persistent_buffers_set
                    tensors.append(
                        TensorInfo(
                            name=name,
                            shape=None if is_lazy(tensor) else tuple(tensor.shape),
                            dtype=dtype_name(tensor.dtype),
                            kind=kind,
                            requires_grad=flag_of(tensor) if kind == "parameter" else None,
                            tied_to=None if original == name else original,
                            persistent=persistent,
                            layout=str(tensor.layout).removeprefix("torch."),
                            stored_bytes=composites.stored_bytes(tensor) if is_composite(tensor) else None,
                        )
                    )
    return Blueprint(tuple(modules), (*tensors, *apart.rows(module)), landmarks=landmarks.of(module))


def walk(module: nn.Module, path: str = "", above: tuple[int, ...] = ()) -> Iterator[tuple[str, nn.Module]]:
    """Yield every path and its module, parents first. A shared module appears at each of its paths; cycles are cut."""
    yield path, module
    for name, child in module._modules.items():
        if child is not None and id(child) not in above and child is not module:
            yield from walk(child, f"{path}.{name}" if path else name, (*above, id(module)))


def _module_info(path: str, module: nn.Module, shared_with: str | None) -> ModuleInfo:
    kind = type(module)
    bases = tuple(base.__name__ for base in kind.__mro__ if issubclass(base, nn.Module) and base is not nn.Module)
    absent = tuple((index, name) for index, (name, child) in enumerate(module._modules.items()) if child is None)
    return ModuleInfo(path, module._get_name(), bases, configuration(module), shared_with, _own_repr(module), absent)


def configuration(module: nn.Module) -> str:
    """Return a module's `extra_repr()`, or the inside of its `Name(...)` if its class overrides `__repr__` that way."""
    config, name = module.extra_repr(), module._get_name()
    printed = None if config else _own_repr(module)
    if printed is None or "\n" in printed or not (printed.startswith(f"{name}(") and printed.endswith(")")):
        return config
    return printed.removeprefix(f"{name}(").removesuffix(")")


def _own_repr(module: nn.Module) -> str | None:
    """Return the `repr` of a module whose class overrides it; None if it does not or if that raises."""
    if type(module).__repr__ in (nn.Module.__repr__, nn.ModuleList.__repr__):
        return None
    try:
        return repr(module)
    except Exception:  # the class may be the user's own
        return None


def floating_dtype(module: nn.Module) -> str | None:
    """Return the dtype of the first floating-point parameter, which is the dtype of the input as well; None if none."""
    parameters = nn.Module.parameters(module)  # a class may have an attribute of that name
    return next((dtype_name(p.dtype) for p in parameters if p.dtype.is_floating_point), None)


def dtype_name(dtype: torch.dtype) -> str:
    """Return `float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")
