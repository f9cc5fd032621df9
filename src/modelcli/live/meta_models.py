"""Build models without values on the meta device, and copy models to it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from modelcli.checkpoints.copied import Copied
from modelcli.live import memory
from modelcli.live.bounds import Bounds, enforced
from modelcli.live.closures import Functions
from modelcli.live.modules import ConstructorError
from modelcli.live.sources import (
    AnySource,
    Value,
    is_composite,
    is_lazy,
    named_tensors,
    real_tensor,
    row_major,
    source_of,
    tag,
)
from modelcli.live.walking import modules_in, require_methods

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode

Constructor = Callable[[], nn.Module]


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """In the block, torch draws as after `torch.manual_seed(seed)`. The caller's generator does not change."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def build_on_meta(construct: Constructor, *, only_if_needed: bool = False, bounds: Bounds | None = None) -> nn.Module:
    """Construct a module whose parameters and buffers are all on the meta device.

    It tries three ways: under `torch.device("meta")`; with each parameter moved to meta when it is registered, and
    buffers real until the end (for constructors that compute with plain tensors); real, and copied to meta afterwards.
    It does not try a way whose tensors, judged by those registered so far, would not fit in memory.

    Args:
        construct: makes the module.
        only_if_needed: whether to raise an error at once if it has nothing to do with the meta device.
        bounds: limits for each attempt.

    Raises:
        ConstructorError: the last way that was tried failed.
    """
    rungs: tuple[Callable[[Constructor], nn.Module], ...] = (_under_meta, _parameters_on_meta, lambda make: make())
    for number, rung in enumerate(rungs):
        with seeded(0), _sizes_registered() as sizes, enforced(bounds):
            try:
                module = moved_to_meta(require_methods(rung(construct)))
                if any(t.is_meta and is_composite(t) for t in named_tensors(module).values()) and rung is _under_meta:
                    continue  # a sparse tensor on meta does not know its number of elements
                return module
            except ConstructorError as error:
                if number == len(rungs) - 1 or (only_if_needed and not error.may_need_values):
                    raise
                one_by_one = rungs[number + 1] is _parameters_on_meta
                if sizes and not memory.fits(max(sizes) if one_by_one else sum(sizes)):
                    raise
    raise AssertionError("the last rung returns or raises")


@contextlib.contextmanager
def _sizes_registered() -> Iterator[list[int]]:
    """Record the bytes of each parameter that is registered in the block."""
    sizes: list[int] = []

    def note(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not is_lazy(parameter) and not is_composite(parameter):
            sizes.append(parameter.nbytes)

    hook = register_module_parameter_registration_hook(note)
    try:
        yield sizes
    finally:
        hook.remove()


def _under_meta(construct: Constructor) -> nn.Module:
    with _ValuesNotDrawn(), torch.device("meta"):
        return construct()


#: Methods that give a tensor other values in place, whatever its shape is.
_FILLING = frozenset(
    getattr(torch.Tensor, name)
    for name in ("normal_", "uniform_", "fill_", "zero_", "clamp_", "erfinv_", "mul_", "add_", "div_", "sub_")
)


_KAIMING = frozenset({nn.init.kaiming_uniform_, nn.init.kaiming_normal_})


class _ValuesNotDrawn(TorchFunctionMode):
    """Leaves out what would fill tensors that have no values: torch takes longer for it than for all else.

    Only what is given numbers is left out. Another tensor might not fit, and torch says so.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _KAIMING:  # torch's layers call them, and what they call in turn does not come here
            tensor = kwargs.get("tensor")
            known = kwargs.get("mode") in ("fan_in", "fan_out") and kwargs.get("nonlinearity") in ("leaky_relu", "relu")
            if known and tensor is not None and tensor.dim() > 1 and _is_plain_without_values(tensor.detach()):
                return tensor
        elif func in _FILLING and _is_plain_without_values(args[0]):
            given = (*args[1:], *kwargs.values())
            if all(value is None or type(value) in (int, float, torch.Generator) for value in given):
                return args[0]
        return func(*args, **kwargs)


def _is_plain_without_values(tensor: torch.Tensor) -> bool:
    """Whether torch would let any number be written into a tensor, and nothing would come of it."""
    return (
        type(tensor) in _PLAIN
        and tensor.is_meta
        and tensor.is_floating_point()
        and tensor.is_contiguous()
        and not (tensor.requires_grad and torch.is_grad_enabled())
    )


_PLAIN = (torch.Tensor, nn.Parameter)


def _parameters_on_meta(construct: Constructor) -> nn.Module:
    register = nn.Module.register_parameter
    copies: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if isinstance(param, nn.Parameter) and not (param.is_meta or is_lazy(param) or is_composite(param)):
            # The original must live as long as its copy; otherwise another parameter could get the same id.
            _, param = copies.setdefault(
                id(param), (param, nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad))
            )
        register(self, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        return construct()
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def moved_to_meta(module: nn.Module) -> nn.Module:
    """Replace every parameter and buffer of the module by its copy on meta. Tied tensors and views stay so."""
    copies: dict[int, torch.Tensor] = {}
    storages: dict[int, torch.UntypedStorage] = {}
    kept: list[torch.Tensor] = []
    for child in modules_in(module):
        tables: tuple[dict[str, Any], ...] = (child._parameters, child._buffers)
        for table in tables:
            for name, tensor in table.items():
                if tensor is not None and (not tensor.is_meta or _is_marked(tensor)):
                    kept.append(tensor)  # so that no other tensor gets its id
                    if id(tensor) not in copies:
                        copies[id(tensor)] = _tensor_copy(tensor, storages, keep_values=False)
                    table[name] = copies[id(tensor)]
    return module


def meta_copy(module: nn.Module, *, keep_values: bool = False, plain_tensors: bool = False) -> nn.Module:
    """Copy a model to the meta device without copying values. Tied tensors, views and sources are preserved.

    Functions of the copy, such as the hooks of a feature extractor, refer to modules and tensors of the copy.

    Args:
        module: the model.
        keep_values: whether the copy of a real tensor has the real storage as its source.
        plain_tensors: whether tensors in plain attributes move to meta too, which a forward pass there needs.
    """
    storages: dict[int, torch.UntypedStorage] = {}

    def plain(tensor: torch.Tensor) -> torch.Tensor | None:
        if plain_tensors:
            return tensor.detach().to("meta")
        return tensor.detach() if tensor.grad_fn is not None else None  # deepcopy refuses a computed tensor

    return _copied(module, lambda tensor: _tensor_copy(tensor, storages, keep_values), plain)


def separate_meta_copy(module: nn.Module) -> nn.Module:
    """Copy a module on the meta device with storages of its own, whose values are copies. Ties inside it stay."""
    storages: dict[int, torch.UntypedStorage] = {}

    def separate(tensor: torch.Tensor) -> torch.Tensor:
        if is_lazy(tensor) or is_composite(tensor) or hasattr(tensor, "__tensor_flatten__"):
            return _tensor_copy(tensor, {}, keep_values=True)
        data = tensor.detach()
        old = data.untyped_storage()
        if old._cdata not in storages:
            storages[old._cdata] = torch.UntypedStorage(old.nbytes(), device="meta")
            if (source := source_of(data)) is not None:
                storages[old._cdata].source = Copied(source)  # type: ignore[attr-defined]
        view = torch.empty(0, dtype=data.dtype, device="meta")
        view.set_(storages[old._cdata], data.storage_offset(), data.size(), data.stride())
        return nn.Parameter(view, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else view

    return _copied(module, separate, lambda tensor: tensor.detach() if tensor.grad_fn is not None else None)


def real_copy(module: nn.Module, *, values: bool) -> nn.Module:
    """Copy a module on the meta device to tensors on the CPU.

    Args:
        module: the module. Its tensors have sources if `values` is true.
        values: whether to read the values of its tensors; else they are whatever is in the memory.
    """

    def real(tensor: torch.Tensor) -> torch.Tensor:
        if is_lazy(tensor):
            kind: Any = type(tensor)
            lazy: torch.Tensor = kind(dtype=tensor.dtype, requires_grad=tensor.requires_grad)
            return lazy
        if is_composite(tensor) or not tensor.is_meta:
            return tensor
        made = real_tensor(tensor.detach()) if values else _unset(tensor)
        return nn.Parameter(made, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made

    return _copied(module, real, lambda tensor: tensor.detach() if tensor.grad_fn is not None else None)


def _unset(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")


def fake_copy(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Copy a model to fake tensors of `mode` that claim to be on the CPU."""
    from torch._subclasses.fake_tensor import FakeTensor

    storages: dict[int, torch.UntypedStorage] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        copied = _tensor_copy(tensor, storages, keep_values=False)
        made: torch.Tensor = FakeTensor(mode, copied.detach(), torch.device("cpu"))
        return nn.Parameter(made, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made

    return _copied(module, fake, lambda tensor: FakeTensor(mode, tensor.detach().to("meta"), torch.device("cpu")))


def _copied(
    module: nn.Module,
    registered: Callable[[torch.Tensor], torch.Tensor],
    plain: Callable[[torch.Tensor], torch.Tensor | None],
) -> nn.Module:
    """Make a deep copy with other tensors.

    Args:
        module: the model.
        registered: makes the copy of a parameter or buffer.
        plain: makes the copy of a tensor in a plain attribute; None means an ordinary copy.
    """
    memo: dict[int, Any] = {}
    kept: list[Any] = []
    for tensor in named_tensors(module).values():
        memo.setdefault(id(tensor), registered(tensor))
        kept.append(tensor)
    for tensor in _plain_tensors(module):
        if id(tensor) not in memo and (other := plain(tensor)) is not None:
            memo[id(tensor)] = other
            kept.append(tensor)
    functions = Functions(module, memo)
    made = copy.deepcopy(module, memo)
    functions.fill()
    return made


def _tensor_copy(tensor: torch.Tensor, storages: dict[int, torch.UntypedStorage], keep_values: bool) -> torch.Tensor:
    if is_lazy(tensor):
        kind: Any = type(tensor)
        lazy: torch.Tensor = kind(device="meta", dtype=tensor.dtype, requires_grad=tensor.requires_grad)
        return lazy
    if is_composite(tensor):
        return tensor
    data = tensor.detach()
    if _is_marked(data):
        # Its bytes are not its values, so the copy gets the resolved values in its own storage.
        copied = torch.empty(data.size(), dtype=data.dtype, device="meta")
        if keep_values and not data.is_meta:
            tag(copied, row_major(data))
        data = copied
    elif not data.is_meta:
        real = data.untyped_storage()
        storage = storages.setdefault(real._cdata, torch.UntypedStorage(real.nbytes(), device="meta"))
        has_bytes = not hasattr(tensor, "__tensor_flatten__")  # else its values are in its attributes
        if keep_values and has_bytes and not hasattr(storage, "source"):
            storage.source = Value(real)  # type: ignore[attr-defined]
        shape, stride, offset = data.size(), data.stride(), data.storage_offset()
        data = torch.empty(0, dtype=data.dtype, device="meta").set_(storage, offset, shape, stride)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(data, requires_grad=tensor.requires_grad)
    return data


def _is_marked(tensor: torch.Tensor) -> bool:
    """Whether a tensor has torch's conjugation or negation bit, so that its bytes are not its values."""
    return not is_lazy(tensor) and (tensor.is_conj() or tensor.is_neg())


def _plain_tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """Yield the tensors in plain attributes of the modules, also inside lists and dicts."""
    hidden = ("_parameters", "_buffers", "_modules")
    stack: list[Any] = [
        value for child in modules_in(module) for name, value in vars(child).items() if name not in hidden
    ]
    for _ in range(100_000):
        if not stack:
            return
        value = stack.pop()
        if isinstance(value, torch.Tensor):
            if not is_lazy(value) and not is_composite(value):
                yield value
        elif type(value) in (list, tuple):
            stack.extend(value)
        elif type(value) is dict:
            stack.extend(value.values())


def tagged(storage_bytes: int, source: AnySource) -> torch.UntypedStorage:
    """Return a meta storage whose bytes come from `source`."""
    storage = torch.UntypedStorage(storage_bytes, device="meta")
    storage.source = source  # type: ignore[attr-defined]
    return storage
