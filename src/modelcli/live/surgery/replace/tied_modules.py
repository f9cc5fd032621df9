"""replace --tie: modules with a tensor of the replaced module get its new size, and the tensor stays one.

The module itself stays, with its class and hooks: it takes the new tensor as its weight, its sizes follow, and its bias
gets as many elements as the weight has rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import nn

from modelcli.edits.applied import Change
from modelcli.errors import RequestError
from modelcli.language.expressions import Call
from modelcli.language.quoting import command
from modelcli.live.script import access_paths
from modelcli.live.sources import flag_of, named_tensors, set_flag
from modelcli.live.surgery.core import brief, count, submodule
from modelcli.live.surgery.kept_weights import KeptFrom
from modelcli.live.surgery.layouts import CopyRule
from modelcli.live.surgery.state_dicts import meta_tensors, new_module
from modelcli.live.surgery.tie import assignment
from modelcli.model.paths import ancestors, joined, parent_of
from modelcli.model.state_dict import StateDictModel, StateDictTensor
from modelcli.model.tensors import Shape


@dataclass(frozen=True)
class TiedName:
    """A tensor outside the replaced modules that is tied to one inside.

    Attributes:
        index: the number of the replaced module.
        own: the name of its tensor, inside it: `weight`.
        name: the name of the tensor outside: `head.weight`.
    """

    index: int
    own: str
    name: str


def tied_names(paths: Sequence[Sequence[str]], groups: Iterable[Sequence[str]]) -> list[TiedName]:
    """Return the tensors outside the replaced modules that are tied to a tensor inside one.

    Args:
        paths: the paths of each replaced module.
        groups: the names of tensors that are one, or share bytes.

    Raises RequestError for tensors of two replaced modules that are tied to each other, and if nothing is tied.
    """
    index_of = {path: index for index, several in enumerate(paths) for path in several}
    found = []
    for group in groups:
        inside: dict[int, str] = {}
        outside = []
        for name in group:
            above = next((path for path in ancestors(parent_of(name)) if path in index_of), None)
            if above is None:
                outside.append(name)
            else:
                inside.setdefault(index_of[above], name.removeprefix(joined(above, "")))
        if len(inside) > 1:
            both = " and ".join(paths[index][0] for index in inside)
            raise RequestError(
                f"{both} are tied to each other, and both are replaced", "name one of them: --tie resizes the other"
            )
        found += [TiedName(index, own, name) for index, own in inside.items() for name in outside]
    if not found:
        raise RequestError(f"--tie: no tensor of {paths[0][0]} is tied to one of another module", "leave --tie out")
    return found


def _by_owner(names: Sequence[TiedName]) -> list[tuple[TiedName, TiedName | None]]:
    """Return the tied tensors by the module outside that has them: its weight, and its bias if that is tied as well."""
    owners: dict[tuple[int, str], list[TiedName]] = {}
    for tied in names:
        owners.setdefault((tied.index, parent_of(tied.name)), []).append(tied)
    found = []
    for several in owners.values():
        bias = [tied for tied in several if tied.name.rpartition(".")[2] == "bias"]
        rest = [tied for tied in several if tied not in bias]
        found += [(tied, bias[0] if bias else None) for tied in rest] or [(tied, None) for tied in bias]
    return found


def _new_shape(new: nn.Module, tied: TiedName, bias: TiedName | None) -> Shape:
    """Return the shape of the new weight. Raises RequestError if the new module has none that can be shared."""
    tensors = named_tensors(new)
    weight = tensors.get(tied.own)
    if weight is None or weight.dim() != 2:
        what = f"has no {tied.own}" if weight is None else f"has a {tied.own} of {weight.dim()} dimensions"
        raise RequestError(
            f"{tied.name} cannot be tied to the new module: {brief(new)} {what}", "--untie replaces the module alone"
        )
    rows = weight.shape[0]
    if bias is not None and (bias.own not in tensors or tensors[bias.own].shape != (rows,)):
        raise RequestError(
            f"{bias.name} cannot be tied to the new module: {brief(new)} has no {bias.own} of {rows} elements",
            "--untie replaces the module alone",
        )
    return tuple(weight.shape)


def _cannot_resize(tied: TiedName, target: str, why: str) -> RequestError:
    path = parent_of(tied.name)
    steps = [
        f"{command(['replace', target])} MODULE --untie",
        f"{command(['replace', path])} MODULE",
        command(["tie", joined(target, tied.own), tied.name]),
    ]
    return RequestError(
        f"--tie cannot give {path or 'the model'} the new size: {why}", "three edits can: " + ", ".join(steps)
    )


def donor_call(shape: Shape) -> Call:
    """Return the expression for a layer of the new size, whose bias a tied module takes."""
    return Call("Linear", (shape[1], shape[0]), {})


# --- modules ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TiedModule:
    """A module that takes the size of a replaced one.

    Attributes:
        tied: the name of its weight, and the tensor of the replaced module that this is.
        module: the module.
        paths: all its paths.
        shape: the shape of the new tensor.
        tied_bias: the same for its bias, if that is tied as well.
    """

    tied: TiedName
    module: nn.Linear | nn.Embedding
    paths: tuple[str, ...]
    shape: Shape
    tied_bias: TiedName | None = None

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias of its own, if it gets another size."""
        bias = self.module._parameters.get("bias")
        return None if bias is None or self.tied_bias is not None or bias.shape[0] == self.shape[0] else bias

    @property
    def sizes(self) -> dict[str, int | None]:
        """The attributes that change, with their new values."""
        rows, columns = self.shape
        names = (
            ("out_features", "in_features")
            if isinstance(self.module, nn.Linear)
            else ("num_embeddings", "embedding_dim")
        )
        found: dict[str, int | None] = dict(zip(names, (rows, columns), strict=True))
        if (
            isinstance(self.module, nn.Embedding)
            and self.module.padding_idx is not None
            and self.module.padding_idx >= rows
        ):
            found["padding_idx"] = None
        return {name: value for name, value in found.items() if getattr(self.module, name) != value}

    def kept(self, donor: nn.Module) -> KeptFrom:
        """What the bias keeps of its values."""
        bias = self.bias
        assert bias is not None
        return KeptFrom({"bias": bias}, brief(self.module), self.paths[0], donor, lambda _name, _resampled: CopyRule())

    def take(self, new: nn.Module, donor: nn.Module | None, action: str) -> list[Change]:
        """Take the tensor of the new module, and the bias of the donor. Returns a row for each path."""
        before, size, bias = brief(self.module), count(self.module), self.bias
        tensors = named_tensors(new)
        for name, tied in (("weight", self.tied), ("bias", self.tied_bias)):
            if tied is not None:
                tensor = tensors[tied.own]
                assert isinstance(tensor, nn.Parameter)
                self.module._parameters[name] = tensor
        if donor is not None and bias is not None:
            made = donor._parameters["bias"]
            assert made is not None
            set_flag(made, flag_of(bias))
            self.module._parameters["bias"] = made
        for name, value in self.sizes.items():
            setattr(self.module, name, value)
        return [Change(path, action, before, brief(self.module), size, count(self.module)) for path in self.paths]

    def statements(self, before: nn.Module, target: str, donor: str | None) -> list[str]:
        """Return the statements of a script that does the same.

        Args:
            before: the model before the edit.
            target: the path of the replaced module, which the script has replaced already.
            donor: the expression for the layer whose bias this module takes.
        """
        at = access_paths.module_expression(before, self.paths[0])
        lines, bias = list[str](), self.bias
        if donor is not None and bias is not None:
            frozen = "" if bias.requires_grad else ".requires_grad_(False)"
            lines.append(assignment(before, joined(self.paths[0], "bias"), f"{donor}.bias{frozen}"))
        for tied in filter(None, (self.tied, self.tied_bias)):
            new = access_paths.tensor_expression(before, joined(target, tied.own))
            lines.append(assignment(before, tied.name, new))
        return [*lines, *(f"{at}.{name} = {value}" for name, value in self.sizes.items())]


def tied_modules(
    module: nn.Module, paths: Sequence[Sequence[str]], groups: Sequence[Sequence[str]], news: Sequence[nn.Module]
) -> list[TiedModule]:
    """Return the modules that follow the replaced ones in size, in the order of those.

    Args:
        module: the model before the edit.
        paths: the paths of each replaced module.
        groups: the names of tensors that are one, or share bytes.
        news: the new modules; their values do not matter.

    Raises RequestError for a module other than Linear or Embedding, and for one that cannot follow.
    """
    tensors = named_tensors(module)
    found: dict[int, TiedModule] = {}
    for tied, bias in _by_owner(tied_names(paths, groups)):
        target, new, path = paths[tied.index][0], news[tied.index], parent_of(tied.name)
        shape = _new_shape(new, tied, bias)
        owner = submodule(module, path)
        if not isinstance(owner, nn.Linear | nn.Embedding) or tied.name != joined(path, "weight"):
            raise _cannot_resize(tied, target, f"{tied.name} is of {brief(owner)}, no Linear or Embedding")
        for each in filter(None, (tied, bias)):
            if tensors[each.name] is not tensors[joined(target, each.own)]:
                raise _cannot_resize(tied, target, f"{each.name} shares bytes with another tensor of {target}")
        if id(owner) in found:
            known = found[id(owner)]
            found[id(owner)] = replace(known, paths=(*known.paths, path))
        else:
            found[id(owner)] = TiedModule(tied, owner, (path,), shape, bias)
    for follower in found.values():
        own = {joined(path, "bias") for path in follower.paths}
        others = {name for group in groups if own & set(group) for name in group} - own
        if follower.bias is not None and others:
            target = paths[follower.tied.index][0]
            raise _cannot_resize(follower.tied, target, f"its bias is tied to {min(others)}")
    return sorted(found.values(), key=lambda each: each.tied.index)


# --- state-dict models -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TiedKeys:
    """The keys of a module that takes the size of a replaced one: the same as `TiedModule`.

    `bias` is its bias, if that is its own and gets another size.
    """

    tied: TiedName
    path: str
    shape: Shape
    bias: StateDictTensor | None
    tied_bias: TiedName | None = None

    def kept(self, model: StateDictModel, donor: nn.Module, told: str) -> KeptFrom:
        """What the bias keeps of its values; `told` describes the module."""
        bias = meta_tensors(model, [joined(self.path, "bias")])[joined(self.path, "bias")]
        return KeptFrom({"bias": bias}, told, self.path, donor, lambda _name, _resampled: CopyRule())


def tied_keys(
    model: StateDictModel, paths: Sequence[Sequence[str]], groups: Iterable[Sequence[str]], news: Sequence[nn.Module]
) -> list[TiedKeys]:
    """Return the keys of the modules that follow the replaced ones in size. The rest is as in `tied_modules`."""
    found = []
    for tied, tied_bias in _by_owner(tied_names(paths, groups)):
        target, path = paths[tied.index][0], parent_of(tied.name)
        shape = _new_shape(news[tied.index], tied, tied_bias)
        own = {name.removeprefix(joined(path, "")): name for name in model.names_below(path)}
        weight = model.tensors.get(own.get("weight", ""))
        if not own.keys() <= {"weight", "bias"} or weight is None or tied.name != own["weight"]:
            raise _cannot_resize(tied, target, f"it has other tensors than weight and bias: {', '.join(own)}")
        for each in filter(None, (tied, tied_bias)):
            if model.tensors[each.name].identity != model.tensors[joined(target, each.own)].identity:
                raise _cannot_resize(tied, target, f"{each.name} shares bytes with another tensor of {target}")
        if model.modules[path].made is not None:
            raise _cannot_resize(tied, target, "an earlier edit has made it")
        bias = model.tensors.get(own.get("bias", ""))
        if "bias" in own and (bias is None or bias.shape != (weight.shape or ())[:1]):
            raise _cannot_resize(tied, target, "its bias does not have one element for each row of the weight")
        if bias is not None and tied_bias is None:
            others = [name for name, tensor in model.tensors.items() if tensor.identity == bias.identity]
            if len(others) > 1:
                raise _cannot_resize(tied, target, f"its bias is tied to {min(set(others) - {own['bias']})}")
        resized = bias is not None and tied_bias is None and bias.shape != shape[:1]
        found.append(TiedKeys(tied, path, shape, bias if resized else None, tied_bias))
    return sorted(found, key=lambda each: each.tied.index)


def with_tied_keys(
    model: StateDictModel,
    followers: Sequence[TiedKeys],
    paths: Sequence[Sequence[str]],
    donors: Mapping[str, nn.Module],
    number: int,
) -> StateDictModel:
    """Return the model, in which modules are replaced already, with the keys of those that follow.

    Args:
        model: the model.
        followers: the modules that follow.
        paths: the paths of each replaced module.
        donors: layers whose biases they take, by their paths.
        number: the first free identity of a tensor.
    """
    entries, modules = dict(model.entries), dict(model.modules)
    for each in followers:
        for tied in filter(None, (each.tied, each.tied_bias)):
            entries[tied.name] = entries[joined(paths[tied.index][0], tied.own)]
        if each.bias is not None:
            made = new_module(donors[each.path], number)
            number += made.identities
            [(_, _, [(_, bias)])] = [(path, module, [*own]) for path, module, own in made.parts]
            assert isinstance(bias, StateDictTensor)
            entries[joined(each.path, "bias")] = replace(bias, requires_grad=each.bias.requires_grad)
        if modules[each.path].info is not None:  # it describes the old size
            modules[each.path] = replace(modules[each.path], info=None, brief=None)
    return StateDictModel(entries, modules)


_Follower = TypeVar("_Follower", TiedModule, TiedKeys)


def in_order(count: int, followers: Sequence[_Follower]) -> list[tuple[int, _Follower | None]]:
    """Return the number of each replaced module, and behind it the modules that follow it and get a new bias.

    New values are drawn in this order.
    """
    found: list[tuple[int, _Follower | None]] = []
    for index in range(count):
        found.append((index, None))
        found += [(index, each) for each in followers if each.tied.index == index and each.bias is not None]
    return found
