"""What timm makes of a checkpoint while it loads pretrained weights, done to tensors on the meta device.

timm gives old checkpoints the keys of today, resamples position embeddings, adapts the first convolution to other
channels and leaves out a classifier of other classes. Here its own function does all this. On the meta device it shows
the shapes, and a tensor that it passes on keeps the way to its bytes. Other tensors are computed by the same function,
on the values of the file, when their bytes are needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from modelcli.checkpoints.storage import Windows
from modelcli.errors import AnswerNoError
from modelcli.live import loading
from modelcli.live.joining import JoinsKeepSources
from modelcli.live.loading import StateDict
from modelcli.live.providers.base import FittedStateDict
from modelcli.live.providers.timm.building import TimmModel, quiet
from modelcli.live.sources import (
    AnySource,
    Computed,
    Value,
    extent,
    real_storage,
    real_tensor,
    require_source,
    source_of,
    tag,
)
from modelcli.wording import counted, listed

Tensors = Mapping[str, torch.Tensor]


def fit(model: TimmModel, module: nn.Module, state: StateDict) -> FittedStateDict:
    """Give a checkpoint the keys and shapes of a model, as `pretrained=True` does.

    A checkpoint that has them already stays as it is: timm would take the classifier from it where its classes are not
    those of the pretrained weights.

    Args:
        model: what timm is called with for the model.
        module: the model as it was built or edited, on the meta device or with values.
        state: the checkpoint, on the meta device or with values, as `module` is.

    Raises AnswerNoError where timm cannot load the checkpoint.
    """
    unwrapped, report = loading.compare(module, state)
    own = module.state_dict()
    if unwrapped.tensors.keys() == own.keys() and not report.mismatched:
        return FittedStateDict(state)
    call = PretrainedCall.of(model)
    inner = module if call.whole is call.model else call.model
    adapted = call.adapted(inner, unwrapped.tensors)
    notes = [report.unwrapping.note()] if report.unwrapping else []
    notes += _notes(unwrapped.tensors, adapted, call)
    tensors, left_out = adapted.tensors, adapted.left_out
    if inner is not module:
        names = call.names_in_whole()
        tensors = {names[name]: tensor for name, tensor in tensors.items() if name in names}
        left_out = frozenset(names[name] for name in left_out if name in names)
    return FittedStateDict(StateDict(dict(tensors), {}, unwrapped.extras), tuple(notes), left_out=left_out)


def overlay_of(module: nn.Module, state: StateDict) -> tuple[dict[str, int], int | None] | None:
    """What `create_model` has to be told for timm to adapt a checkpoint; None where the checkpoint fits as it is.

    Args:
        module: the model as it was built, on the meta device.
        state: the checkpoint, on the meta device.

    Returns:
        The entries of its `pretrained_cfg_overlay`, and the classes of the model where these would change them.
    """
    unwrapped, report = loading.compare(module, state)
    if unwrapped.tensors.keys() == module.state_dict().keys() and not report.mismatched:
        return None
    configured = dict(getattr(module, "pretrained_cfg", {}))
    before = configured.get("num_classes")
    _correct_classes(configured, unwrapped.tensors)
    if configured.get("num_classes") == before:
        return {}, None
    return {"num_classes": configured["num_classes"]}, getattr(module, "num_classes", None)


@dataclass(frozen=True)
class _Adapted:
    """What timm would load.

    Attributes:
        tensors: the state dict.
        left_out: the keys whose values timm leaves to be drawn: those of a classifier with other classes.
    """

    tensors: Tensors
    left_out: frozenset[str] = frozenset()


@dataclass(frozen=True)
class PretrainedCall:
    """The call of timm's `load_pretrained` that `create_model` makes for a model.

    Attributes:
        model: the module that is loaded into, on the meta device and without sources.
        whole: what `create_model` returns: it, or with `features_only` what it is wrapped in.
        configured: the `pretrained_cfg`.
        num_classes: the classes of the model.
        in_chans: the channels of its images.
        filter_fn: what gives checkpoints the keys and shapes of the model; None where the model needs none.
        strict: whether keys have to agree.
    """

    model: nn.Module
    whole: nn.Module
    configured: Mapping[str, Any]
    num_classes: int
    in_chans: int
    filter_fn: Callable[..., Any] | None
    strict: bool

    @classmethod
    def of(cls, model: TimmModel) -> PretrainedCall:
        """See which call timm makes, on a model on the meta device; nothing is loaded."""
        from timm.models import _builder

        calls: list[dict[str, Any]] = []

        def record(model: nn.Module, pretrained_cfg: Any = None, **options: Any) -> None:
            calls.append(
                {"model": model, "configured": pretrained_cfg or getattr(model, "pretrained_cfg", {}), **options}
            )

        with _replaced(_builder, "load_pretrained", record), torch.device("meta"):
            whole = model.create(pretrained=True)
        if len(calls) != 1:
            raise AnswerNoError(f"{model.text} is not loaded as other models of timm are", "--bare-keys edits the keys")
        call = {"num_classes": 1000, "in_chans": 3, "filter_fn": None, "strict": True, **calls[0]}
        call.pop("cache_dir", None)
        return cls(whole=whole, **call)

    def names_in_whole(self) -> dict[str, str]:
        """The names that the model's tensors have in what `features_only` wraps it in, by their own."""
        names = {id(tensor): name for name, tensor in self.model.state_dict(keep_vars=True).items()}
        found = self.whole.state_dict(keep_vars=True).items()
        return {names[id(tensor)]: name for name, tensor in found if id(tensor) in names}

    def adapted(self, model: nn.Module, tensors: Tensors) -> _Adapted:
        """What timm would load into a model. Tensors on the meta device are given sources for their values.

        Args:
            model: the module whose shapes and own tensors timm goes by.
            tensors: those of a checkpoint, on the meta device or with values.

        Raises AnswerNoError where timm cannot do it.
        """
        on_meta = any(tensor.is_meta for tensor in tensors.values())
        versions = {name: tensor._version for name, tensor in tensors.items()}
        try:
            with JoinsKeepSources():
                made = self.run(model, tensors)
            changed_in_place = any(tensors[name]._version != version for name, version in versions.items())
        except Exception as error:
            if not on_meta or _is_timms_own(error):
                raise _refusal(error) from error
            changed_in_place = True  # it looks at values, so that it needs them
        if not on_meta:
            return made
        if changed_in_place:
            return self._adapted_now(model, tensors)
        lost = {name: tensor for name, tensor in made.tensors.items() if tensor.is_meta and source_of(tensor) is None}
        run = _RunWithValues(self, model, tensors, frozenset(lost))
        return _Adapted({n: run.placeholder(n, t) if n in lost else t for n, t in made.tensors.items()}, made.left_out)

    def _adapted_now(self, model: nn.Module, tensors: Tensors) -> _Adapted:
        """The same with values that are read now and stay in memory, except those of tensors that timm passes on."""
        real = {name: _mapped(tensor) for name, tensor in tensors.items()}
        same = {id(tensor): tensors[name] for name, tensor in real.items()}
        versions = {name: tensor._version for name, tensor in real.items()}
        try:
            made = self.run(model, real)
        except Exception as error:
            raise _refusal(error) from error
        for name, version in versions.items():
            if real[name]._version != version:
                same.pop(id(real[name]))
        return _Adapted({n: same.get(id(t), _in_memory(t)) for n, t in made.tensors.items()}, made.left_out)

    def run(self, model: nn.Module, tensors: Tensors) -> _Adapted:
        """Run timm's `load_pretrained` on a state dict, and give what it would load.

        The classes that its configuration says of the checkpoint are corrected by the checkpoint's own classifier.
        """
        from timm.models import _builder, _helpers

        configured: dict[str, Any] = {**self.configured, "source": ""}
        filtered: dict[str, Any] = {}
        loaded: dict[str, Any] = {}

        def filter_fn(state: dict[str, Any], model: nn.Module) -> dict[str, Any]:
            found = state if self.filter_fn is None else _filtered(self.filter_fn, state, model)
            _correct_classes(configured, found)
            filtered.update(found)
            return found

        def load(state: dict[str, Any], strict: bool = True) -> Any:
            loaded.update(state)
            return nn.modules.module._IncompatibleKeys([], [])

        configured["state_dict"] = _helpers.clean_state_dict(dict(tensors))
        with quiet(), torch.no_grad(), _replaced(model, "load_state_dict", load):
            _builder.load_pretrained(
                model,
                pretrained_cfg=configured,
                num_classes=self.num_classes,
                in_chans=self.in_chans,
                filter_fn=filter_fn,
                strict=self.strict,
            )
        left_out = frozenset(filtered.keys() - loaded.keys())
        return _Adapted({name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}, left_out)


def _filtered(filter_fn: Callable[..., Any], state: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The state dict as a model's own function converts it; some take no model, as `load_pretrained` has it too."""
    try:
        found: dict[str, Any] = filter_fn(state, model)
    except TypeError:
        found = filter_fn(state)
    return found


def _correct_classes(configured: dict[str, Any], state: Mapping[str, Any]) -> None:
    """Set the classes of a configuration to those of the classifier in a checkpoint, background class included."""
    names = configured.get("classifier") or ()
    names = (names,) if isinstance(names, str) else names
    rows = [len(weight) for name in names if (weight := state.get(f"{name}.weight")) is not None and weight.dim()]
    if not rows:
        return
    if rows[0] - (configured.get("label_offset") or 0) != configured.get("num_classes"):
        configured |= {"num_classes": rows[0], "label_offset": 0}


class _RunWithValues:
    """timm's function on the values of a file, run when the first of its results is needed.

    The results stay in memory, as those of a model that is built do: to run it again for each would read the file as
    often.
    """

    def __init__(self, call: PretrainedCall, model: nn.Module, tensors: Tensors, names: frozenset[str]) -> None:
        self._call, self._model, self._tensors, self._names = call, model, tensors, names
        self._made: dict[str, torch.Tensor] | None = None

    def placeholder(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """A tensor on the meta device whose bytes are those of the result of this name."""
        made = torch.empty(like.shape, dtype=like.dtype, device="meta")
        size = made.element_size()

        def compute(start: int, nbytes: int) -> torch.UntypedStorage:
            flat = self._result(name).to(like.dtype).contiguous().view(-1)
            return flat[start // size : (start + nbytes) // size].clone().untyped_storage()

        nbytes = made.numel() * size
        reads: tuple[AnySource, ...] = tuple(require_source(tensor) for tensor in self._tensors.values())
        tag(made, Computed(nbytes, compute, reads, step=max(nbytes, 1)))
        return made

    def _result(self, name: str) -> torch.Tensor:
        if self._made is None:
            made = self._call.run(self._model, {key: _mapped(tensor) for key, tensor in self._tensors.items()})
            self._made = {key: real_tensor(made.tensors[key]) for key in self._names}
        return self._made[name]


def _mapped(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with its values, of which those are read that are used."""
    if not tensor.is_meta:
        return tensor
    made, size = torch.empty(0, dtype=tensor.dtype), tensor.element_size()
    part = require_source(tensor).part(int(tensor.storage_offset()) * size, extent(tensor) * size)
    return made.set_(real_storage(part, Windows()), 0, tensor.size(), tensor.stride())


def _in_memory(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor on the meta device whose bytes are those of a real one."""
    if tensor.is_meta:
        return tensor
    made = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    tag(made, Value(tensor.contiguous().clone().untyped_storage()))
    return made


# --- what the user should know ---------------------------------------------------------------------------------------


def _notes(before: Tensors, adapted: _Adapted, call: PretrainedCall) -> list[str]:
    """What timm changed, in a few sentences."""
    after = adapted.tensors
    notes = []
    names = {id(tensor): name for name, tensor in after.items()}
    renamed = {old: names[id(t)] for old, t in before.items() if id(t) in names and names[id(t)] != old}
    if renamed:
        old, new = next(iter(renamed.items()))
        notes.append(f"timm loads {counted(len(renamed), 'tensor')} under another name, such as {old} as {new}")
    converted = [name for name in after if name not in before and name not in renamed.values()]
    if converted:
        notes.append(f"timm makes {listed(converted, 3)} of tensors with other names")
    elif unused := [n for n in before if n not in after and n not in renamed and n not in adapted.left_out]:
        notes.append(f"timm does not load {listed(unused, 3)}")
    resized = {n: (before[n], t) for n, t in after.items() if n in before and before[n].shape != t.shape}
    stems = {f"{path}.weight" for path in _first_convolutions(call)}
    for name in [name for name in resized if name in stems]:
        was, now = resized.pop(name)
        notes.append(f"timm adapts {name} from {was.shape[1]} to {now.shape[1]} input channels")
    if resized:
        name, (was, now) = next(iter(resized.items()))
        others = f", and {counted(len(resized) - 1, 'other tensor')}" if len(resized) > 1 else ""
        notes.append(f"timm resizes {name} from {list(was.shape)} to {list(now.shape)}{others}")
    if adapted.left_out:
        told = listed(sorted(adapted.left_out), 4)
        notes.append(f"timm does not load {told}: the model has {call.num_classes} classes, the file has others")
    return notes


def _first_convolutions(call: PretrainedCall) -> tuple[str, ...]:
    from timm.models._input import get_model_traits

    named = get_model_traits(call.model).get("first_conv", call.configured.get("first_conv"))
    return (named,) if isinstance(named, str) else tuple(named or ())


def _is_timms_own(error: Exception) -> bool:
    """Whether timm itself refuses the checkpoint, whatever its values are."""
    return isinstance(error, RuntimeError) and "inconsistent with input_size" in str(error)


def _refusal(error: Exception) -> AnswerNoError:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return AnswerNoError(f"timm cannot load the checkpoint: {first}", "--bare-keys edits the keys as the file has them")


@contextlib.contextmanager
def _replaced(place: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Let an attribute be another function in the block. That of an object hides the one of its class."""
    had = name in vars(place)
    before = vars(place).get(name)
    setattr(place, name, function)
    try:
        yield
    finally:
        if had:
            setattr(place, name, before)
        else:
            delattr(place, name)


__all__ = ["fit"]
