"""Every edit on every kind of child of every kind of model does what PyTorch's own statements do, or is refused.

The children are those of a `Sequential`, a `ModuleList` and a `ModuleDict`, a named child, a shared one, and the model
itself. The models are a torchvision builder, a user's class, a checkpoint that modelcli wrote, and files that do not
record their architecture (a state dict, a training checkpoint, a safetensors file), with and without `--arch`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import init
from torch.nn.utils.fusion import fuse_linear_bn_eval

import modelcli
from modelcli.live.surgery import seed_of
from tests import nets
from tests.commands.test_script import both
from tests.conftest import Cli
from tests.sampling import rotated, sampled

State = dict[str, torch.Tensor]
#: The expected result of a cell: statements on a model or a state dict, or the text of an error.
Truth = Callable[[Any], Any] | str


@dataclass(frozen=True)
class Cell:
    """An edit of one child: its lines, and the expected results for a known and for an unknown architecture.

    `on_keys` is None if a bare file gives the same state dict as the model.
    """

    lines: tuple[str, ...]
    on_model: Truth
    on_keys: Truth | None = None


def numbers() -> None:
    """Seed torch as modelcli does for the first edit with seed 0."""
    torch.manual_seed(seed_of(0, 1))


def put(path: str, make: Callable[[], nn.Module], *more: str) -> Callable[[nn.Module], None]:
    def statements(model: nn.Module) -> None:
        numbers()
        new = make()
        for place in (path, *more):
            model.set_submodule(place, new)

    return statements


def put_and_keep(path: str, make: Callable[[], nn.Module], *more: str) -> Callable[[nn.Module], None]:
    def statements(model: nn.Module) -> None:
        old = model.get_submodule(path).state_dict()
        put(path, make, *more)(model)
        for name, tensor in model.get_submodule(path).state_dict().items():
            if name in old and old[name].dim() == tensor.dim():
                part = tuple(slice(min(sizes)) for sizes in zip(old[name].shape, tensor.shape, strict=True))
                tensor[part] = old[name][part]

    return statements


def put_repeated(path: str) -> Callable[[nn.Module], None]:
    """Put a Linear(4, 6) at a path whose rows are the old ones again and again."""

    def statements(model: nn.Module) -> None:
        old, new = model.get_submodule(path), nn.Linear(4, 6)
        new.load_state_dict({name: torch.cat([tensor, tensor])[:6] for name, tensor in old.state_dict().items()})
        model.set_submodule(path, new)

    return statements


def drawn(change: Callable[[nn.Module], Any]) -> Callable[[nn.Module], None]:
    def statements(model: nn.Module) -> None:
        numbers()
        change(model)

    return statements


def filled(path: str) -> Callable[[nn.Module], None]:
    """Fill weights by Xavier, biases with zeros, and normalisation layers with ones and zeros."""

    def statements(model: nn.Module) -> None:
        numbers()
        part = model.get_submodule(path)
        for module in part.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                init.ones_(module.weight)
                init.zeros_(module.bias)
            elif isinstance(module, nn.Linear | nn.Conv2d):
                init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    init.zeros_(module.bias)

    return statements


def filled_keys(state: State) -> State:
    """Do the same by the keys of a file. A module with a running mean is a normalisation layer.

    The keys of a module are consecutive, at the position of its first key.
    """
    numbers()
    done: set[int] = set()
    first: dict[str, int] = {}
    for index, name in enumerate(state):
        for end in (match.start() for match in re.finditer(r"\.", name)):
            first.setdefault(name[:end], index)
    for name in sorted(state, key=lambda name: [first[name[: m.start()]] for m in re.finditer(r"\.", name)]):
        tensor = state[name]
        holder, _, own = name.rpartition(".")
        if own in ("weight", "bias") and tensor.data_ptr() not in done:
            done.add(tensor.data_ptr())
            if own == "bias":
                init.zeros_(tensor)
            elif f"{holder}.running_mean" in state:
                init.ones_(tensor)
            else:
                init.xavier_uniform_(tensor)
    return state


def without(*prefixes: str) -> Callable[[State], State]:
    return lambda state: {key: value for key, value in state.items() if not key.startswith(prefixes)}


def renamed(old: str, new: str) -> Callable[[State], State]:
    def statements(state: State) -> State:
        return {new + key[len(old) :] if key.startswith(old) else key: value for key, value in state.items()}

    return statements


def with_new(path: str, make: Callable[[], nn.Module]) -> Callable[[State], State]:
    def statements(state: State) -> State:
        numbers()
        return state | {f"{path}.{key}": value for key, value in make().state_dict().items()}

    return statements


def around(path: str, *more: str) -> Callable[[nn.Module], nn.Module]:
    def statements(model: nn.Module) -> nn.Module:
        new = nn.Sequential(model.get_submodule(path), nn.Dropout(0.5))
        if not path:
            return new
        for name in (path, *more):
            model.set_submodule(name, new)
        return model

    return statements


def sliced(path: str, *kept: int) -> Callable[[State], State]:
    def statements(state: State) -> State:
        found = {key: value for key, value in state.items() if not key.startswith(f"{path}.")}
        for place, number in enumerate(kept):
            old = f"{path}.{number}."
            for key, value in state.items():
                if key.startswith(old):
                    again = number in kept[:place]
                    found[f"{path}.{place}." + key.removeprefix(old)] = value.clone() if again else value
        return found

    return statements


def taken_apart(take: Callable[[torch.Tensor], Any], *names: tuple[str, ...]) -> Callable[[State], State]:
    """Take tensors apart; each of `names` is a key and the keys of its parts."""

    def statements(state: State) -> State:
        found = dict(state)
        for old, *new in names:
            del found[old]
            found |= {name: part.clone() for name, part in zip(new, take(state[old]), strict=True)}
        return found

    return statements


def put_together(
    put: Callable[[list[torch.Tensor]], torch.Tensor], *names: tuple[str, ...]
) -> Callable[[State], State]:
    """Put tensors together; each of `names` is a new key and the keys of its parts."""

    def statements(state: State) -> State:
        gone = {old for _, *parts in names for old in parts}
        found = {name: value for name, value in state.items() if name not in gone}
        return found | {new: put([state[name] for name in old]) for new, *old in names}

    return statements


def each(pattern: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[State], State]:
    """Change the tensors whose names match a regular expression; those that are tied stay so."""

    def statements(state: State) -> State:
        names = [name for name in state if re.fullmatch(pattern, name)]
        first: dict[int, torch.Tensor] = {}
        for name in names:
            key = state[name].data_ptr()
            first.setdefault(key, change(state[name]).clone(memory_format=torch.contiguous_format))
            state[name] = first[key]
        return state

    return statements


def both_again(state: State) -> State:
    parts = [part.clone() for part in torch.split(state.pop("shared.weight"), 2)]
    state.pop("again.weight")
    return state | {
        f"{path}.{name}": part for path in ("shared", "again") for name, part in zip("ab", parts, strict=True)
    }


def flags(path: str, *, first: bool, then: bool | None = None) -> Callable[[nn.Module], None]:
    def statements(model: nn.Module) -> None:
        model.get_submodule(path).requires_grad_(first)
        if then is not None:
            model.get_submodule(path).requires_grad_(then)

    return statements


def assigned(*values: tuple[str, str, Any]) -> Callable[[nn.Module], None]:
    """Assign attributes: the path of the module, the name, the value."""

    def statements(model: nn.Module) -> None:
        for path, name, value in values:
            setattr(model.get_submodule(path), name, value)

    return statements


def tied(one: str, other: str) -> Callable[[nn.Module], None]:
    def statements(model: nn.Module) -> None:
        model.get_submodule(other).weight = model.get_submodule(one).weight

    return statements


def resized_together(path: str, other: str, *, keep: bool, first: bool = True) -> Callable[[nn.Module], None]:
    """Tie two layers, give both six outputs, and let them share the new weight; the old values may be kept."""

    def statements(model: nn.Module) -> None:
        tied(*((path, other) if first else (other, path)))(model)
        old, follower = model.get_submodule(path), model.get_submodule(other)
        torch.manual_seed(seed_of(0, 2))
        new, bias = nn.Linear(4, 6), nn.Linear(4, 6).bias
        if keep:
            new.weight[:4], new.bias[:4], bias[:4] = old.weight, old.bias, follower.bias
        model.set_submodule(path, new)
        follower.weight, follower.bias, follower.out_features = new.weight, bias, 6

    return statements


def grafted(path: str) -> Callable[[nn.Module], None]:
    def statements(model: nn.Module) -> None:
        numbers()
        model.get_submodule(path).load_state_dict(nets.Places().get_submodule(path).state_dict())

    return statements


def both_replaced(state: State) -> State:
    numbers()
    for name, tensor in nn.Linear(4, 5).state_dict().items():
        state[f"shared.{name}"] = state[f"again.{name}"] = tensor
    return state


def five() -> nn.Module:
    return nn.Linear(4, 5)


def four() -> nn.Module:
    return nn.Linear(4, 4)


NO_SEQUENCE = "is neither"
UNKNOWN = "nothing in the file says that the children of {} are a sequence"
NEEDS_CLASSES = "{} needs the classes of the modules, but the file records no architecture"
NEEDS_KEYS = "changes the keys of a state dict"
ROOT_STAYS = "the model itself cannot be replaced"
NO_FP8 = "nothing to dequantize: {} has no fp8 weights"
NO_NORM = "nothing to fuse: {} has no BatchNorm"


def folded(model: Any) -> None:
    model.seq[0] = fuse_linear_bn_eval(model.seq[0].eval(), model.seq[1].eval()).train()
    model.seq[1] = nn.Identity()


def folded_into_both(model: Any) -> None:
    model.shared = model.again = fuse_linear_bn_eval(model.again.eval(), model.seq[1].eval()).train()
    model.seq[1] = nn.Identity()


#: The table, for `nets.Places` and files of it.
TABLE: dict[tuple[str, str], Cell] = {
    ("replace", "Sequential"): Cell(("replace seq.3 Linear(4,5)",), put("seq.3", five)),
    ("replace", "ModuleList"): Cell(("replace blocks.1 Linear(4,5)",), put("blocks.1", five)),
    ("replace", "ModuleDict"): Cell(("replace heads.left Linear(4,5)",), put("heads.left", five)),
    ("replace", "child"): Cell(("replace fc Linear(_,5)",), put("fc", five)),
    ("replace", "shared"): Cell(
        ("replace {shared,again} Linear(4,5)",),
        put("shared", five, "again"),
        # In a file these are two modules with one tied tensor, which stays tied only with `--also`.
        "shared.weight is tied to again.weight",
    ),
    ("replace", "root"): Cell(("replace . Linear(4,5)",), ROOT_STAYS, ROOT_STAYS),
    ("keep", "Sequential"): Cell(("replace seq.3 Linear(4,5) --keep-weights",), put_and_keep("seq.3", five)),
    ("keep", "ModuleList"): Cell(("replace blocks.1 Linear(4,5) --keep-weights",), put_and_keep("blocks.1", five)),
    ("keep", "ModuleDict"): Cell(("replace heads.left Linear(4,5) --keep-weights",), put_and_keep("heads.left", five)),
    ("keep", "child"): Cell(("replace fc Linear(2,5) --keep-weights",), put_and_keep("fc", lambda: nn.Linear(2, 5))),
    ("keep", "shared"): Cell(
        ("replace {shared,again} Linear(4,5) --keep-weights",),
        put_and_keep("shared", five, "again"),
        "shared.weight is tied to again.weight",
    ),
    ("keep", "root"): Cell(("replace . Linear(4,5) --keep-weights",), ROOT_STAYS, ROOT_STAYS),
    ("replace --tie", "Sequential"): Cell(
        ("tie seq.0.weight seq.3.weight", "replace seq.0 Linear(4,6) --keep-weights --tie"),
        resized_together("seq.0", "seq.3", keep=True),
    ),
    ("replace --tie", "ModuleList"): Cell(
        ("tie blocks.0.weight blocks.1.weight", "replace blocks.1 Linear(_,6) --tie"),
        resized_together("blocks.1", "blocks.0", keep=False, first=False),
    ),
    ("replace --tie", "ModuleDict"): Cell(
        ("replace heads.left Linear(4,5) --tie",),
        "no tensor of heads.left is tied to one of another module",
        "no tensor of heads.left is tied to one of another module",
    ),
    ("replace --tie", "child"): Cell(
        ("tie fc.weight blocks.0.weight", "replace fc Linear(_,6) --keep-weights --tie"),
        resized_together("fc", "blocks.0", keep=True),
    ),
    ("replace --tie", "shared"): Cell(
        ("replace shared Linear(4,5) --tie",), "shared is one module with 2 names", both_replaced
    ),
    ("replace --tie", "root"): Cell(("replace . Linear(4,5) --tie",), ROOT_STAYS, ROOT_STAYS),
    ("repeat", "Sequential"): Cell(("replace seq.3 Linear(4,6) --keep-weights=repeat",), put_repeated("seq.3")),
    ("repeat", "ModuleList"): Cell(("replace blocks.1 Linear(4,6) --keep-weights=repeat",), put_repeated("blocks.1")),
    ("repeat", "child"): Cell(("replace fc Linear(4,6) --keep-weights=repeat",), put_repeated("fc")),
    ("wrap", "Sequential"): Cell(
        ("wrap seq.3 Sequential(_,Dropout(0.5))",), around("seq.3")
    ),
    ("wrap", "ModuleList"): Cell(
        ("wrap blocks.1 Sequential(_,Dropout(0.5))",), around("blocks.1")
    ),
    ("wrap", "ModuleDict"): Cell(
        ("wrap heads.left Sequential(_,Dropout(0.5))",), around("heads.left")
    ),
    ("wrap", "child"): Cell(("wrap fc Sequential(_,Dropout(0.5))",), around("fc")),
    ("wrap", "shared"): Cell(
        ("wrap {shared,again} Sequential(_,Dropout(0.5))",),
        around("shared", "again"),
    ),
    ("wrap", "root"): Cell(("wrap . Sequential(_,Dropout(0.5))",), around("")),
    ("set", "Sequential"): Cell(
        ("set seq.1 momentum=0.5 eps=0.001",),
        assigned(("seq.1", "momentum", 0.5), ("seq.1", "eps", 0.001)),
        NEEDS_CLASSES.format("set"),
    ),
    ("set", "ModuleList"): Cell(
        ("set blocks.1 out_features=5",),
        "changes blocks.1.weight, and set changes no tensor",
        NEEDS_CLASSES.format("set"),
    ),
    ("set", "ModuleDict"): Cell(
        ("set heads left=None",), "a child of a ModuleDict, which calls each", NEEDS_CLASSES.format("set")
    ),
    ("set", "child"): Cell(
        ("set fc bias=False",), "bias=False changes fc.bias, and set changes no tensor", NEEDS_CLASSES.format("set")
    ),
    ("set", "shared"): Cell(("set shared p=1",), "Linear at shared has no setting 'p'", NEEDS_CLASSES.format("set")),
    ("set", "root"): Cell(
        ("set . shared=None again=None",),
        assigned(("", "shared", None), ("", "again", None)),
        NEEDS_CLASSES.format("set"),
    ),
    ("add", "Sequential"): Cell(
        ("add seq.extra Linear(4,4)",), drawn(lambda model: model.seq.add_module("extra", four()))
    ),
    ("add", "ModuleList"): Cell(("add blocks.2 Linear(4,4)",), drawn(lambda model: model.blocks.append(four()))),
    ("add", "ModuleDict"): Cell(
        ("add heads.mid Linear(4,4)",), drawn(lambda model: model.heads.update({"mid": four()}))
    ),
    ("add", "child"): Cell(("add fc.extra Linear(4,4)",), drawn(lambda model: model.fc.add_module("extra", four()))),
    ("add", "shared"): Cell(
        ("add shared.extra Linear(4,4)",),
        drawn(lambda model: model.shared.add_module("extra", four())),
        with_new("shared.extra", four),
    ),
    ("add", "root"): Cell(("add later Linear(4,4)",), drawn(lambda model: setattr(model, "later", four()))),
    ("insert", "Sequential"): Cell(
        ("insert seq.1 Linear(4,4)",), drawn(lambda model: model.seq.insert(1, four())), UNKNOWN.format("seq")
    ),
    ("insert", "ModuleList"): Cell(
        ("insert blocks.-1 Linear(4,4)",),
        drawn(lambda model: model.blocks.insert(1, four())),
        UNKNOWN.format("blocks"),
    ),
    ("insert", "ModuleDict"): Cell(("insert heads.0 Linear(4,4)",), NO_SEQUENCE, "those of heads have names"),
    ("insert", "child"): Cell(("insert fc.0 Linear(4,4)",), NO_SEQUENCE, UNKNOWN.format("fc")),
    ("insert", "shared"): Cell(("insert shared.0 Linear(4,4)",), NO_SEQUENCE, UNKNOWN.format("shared")),
    ("insert", "root"): Cell(("insert 0 Linear(4,4)",), NO_SEQUENCE, "those of . have names"),
    ("append", "Sequential"): Cell(
        ("append seq Linear(4,4)",), drawn(lambda model: model.seq.append(four())), NO_SEQUENCE
    ),
    ("append", "ModuleList"): Cell(
        ("append blocks Linear(4,4)",), drawn(lambda model: model.blocks.append(four())), NO_SEQUENCE
    ),
    ("append", "ModuleDict"): Cell(("append heads Linear(4,4)",), NO_SEQUENCE, NO_SEQUENCE),
    ("append", "child"): Cell(("append fc Linear(4,4)",), NO_SEQUENCE, NO_SEQUENCE),
    ("append", "shared"): Cell(("append shared Linear(4,4)",), NO_SEQUENCE, NO_SEQUENCE),
    ("append", "root"): Cell(("append . Linear(4,4)",), NO_SEQUENCE, NO_SEQUENCE),
    ("remove", "Sequential"): Cell(("remove seq.0",), lambda model: model.seq.pop(0), without("seq.0.")),
    ("remove", "ModuleList"): Cell(("remove blocks.0",), lambda model: model.blocks.pop(0), without("blocks.0.")),
    ("remove", "ModuleDict"): Cell(("remove heads.left",), lambda model: model.heads.pop("left")),
    ("remove", "child"): Cell(("remove fc",), lambda model: model.__delattr__("fc")),
    ("remove", "shared"): Cell(("remove shared",), lambda model: model.__delattr__("shared")),
    ("remove", "root"): Cell(("remove .",), "the model itself cannot be removed", "the model itself cannot be removed"),
    ("slice", "Sequential"): Cell(
        ("slice seq 3,0,1",),
        lambda model: setattr(model, "seq", nn.Sequential(*(model.seq[number] for number in (3, 0, 1)))),
        sliced("seq", 3, 0, 1),
    ),
    ("slice", "ModuleList"): Cell(
        ("slice blocks 1,0-1",),
        lambda model: setattr(
            model, "blocks", nn.ModuleList([model.blocks[1], model.blocks[0], deepcopy(model.blocks[1])])
        ),
        sliced("blocks", 1, 0, 1),
    ),
    ("slice", "ModuleDict"): Cell(("slice heads 0",), "heads is a ModuleDict", "heads has children with names"),
    ("slice", "child"): Cell(("slice fc 0",), "fc is a Linear", "fc has children with names"),
    ("slice", "shared"): Cell(("slice shared 0",), "shared is a Linear", "shared has children with names"),
    ("slice", "root"): Cell(("slice . 0",), "the model itself is a Places", "the model itself has children with names"),
    ("tie", "Sequential"): Cell(("tie seq.0.weight seq.3.weight",), tied("seq.0", "seq.3")),
    ("tie", "ModuleList"): Cell(("tie blocks.0.weight blocks.1.weight",), tied("blocks.0", "blocks.1")),
    ("tie", "ModuleDict"): Cell(
        ("tie heads.left.weight heads.right.weight",), "only tensors of one shape", "only tensors of one shape"
    ),
    ("tie", "child"): Cell(("tie fc.bias seq.1.running_mean",), "fc.bias is a parameter and", "fc.bias is a parameter"),
    ("tie", "shared"): Cell(("tie shared.weight again.weight",), "one tensor already", "one tensor already"),
    ("tie", "root"): Cell(("tie . fc.weight",), "only tensors of one shape", "only tensors of one shape"),
    ("untie", "Sequential"): Cell(("untie seq.0.weight",), "is tied to no other", "is tied to no other"),
    ("untie", "ModuleList"): Cell(("untie blocks.1.weight",), "is tied to no other", "is tied to no other"),
    ("untie", "ModuleDict"): Cell(("untie heads.left.bias",), "is tied to no other", "is tied to no other"),
    ("untie", "child"): Cell(("untie fc.bias",), "fc.bias is tied to no other", "fc.bias is tied to no other"),
    ("untie", "root"): Cell(("untie .",), "is tied to no other tensor", "is tied to no other tensor"),
    ("graft", "Sequential"): Cell(("graft seq nets.py:Places:seq",), grafted("seq")),
    ("graft", "ModuleList"): Cell(("graft blocks nets.py:Places:blocks",), grafted("blocks")),
    ("graft", "ModuleDict"): Cell(("graft heads.left nets.py:Places:heads.left",), grafted("heads.left")),
    ("graft", "child"): Cell(("graft fc nets.py:Places:fc",), grafted("fc")),
    ("graft", "shared"): Cell(("graft again nets.py:Places:shared",), grafted("shared")),
    ("graft", "root"): Cell(("graft . ReLU()",), "ReLU() has no tensors to take", "ReLU() has no tensors to take"),
    ("extract", "Sequential"): Cell(("extract seq",), lambda model: model.seq),
    ("extract", "ModuleList"): Cell(("extract blocks.1",), lambda model: model.blocks[1]),
    ("extract", "ModuleDict"): Cell(("extract heads",), lambda model: model.heads),
    ("extract", "child"): Cell(("extract fc",), lambda model: model.fc),
    ("extract", "shared"): Cell(("extract again",), lambda model: model.again),
    ("extract", "root"): Cell(("extract .",), "is the model already", "is the model already"),
    ("rename", "Sequential"): Cell(("rename seq.** body.**",), "cannot load a state dict", renamed("seq.", "body.")),
    ("rename", "ModuleList"): Cell(
        ("rename blocks.[0-1].* layer[0-1].*",),
        "cannot load a state dict",
        lambda state: renamed("blocks.0.", "layer0.")(renamed("blocks.1.", "layer1.")(state)),
    ),
    ("rename", "ModuleDict"): Cell(
        ("rename heads.left.* left.*",), "cannot load a state dict", renamed("heads.left.", "left.")
    ),
    ("rename", "child"): Cell(("rename fc.* head.*",), "cannot load a state dict", renamed("fc.", "head.")),
    ("rename", "shared"): Cell(("rename again.* twice.*",), "cannot load a state dict", renamed("again.", "twice.")),
    ("rename", "root"): Cell(("rename ** module.**",), "cannot load a state dict", renamed("", "module.")),
    ("split", "Sequential"): Cell(
        ("split seq.3.weight seq.3.a seq.3.b",),
        NEEDS_KEYS,
        taken_apart(lambda value: value.split(2), ("seq.3.weight", "seq.3.a", "seq.3.b")),
    ),
    ("split", "ModuleList"): Cell(
        ("split blocks.*.weight blocks.*.upper blocks.*.lower --dim 1",),
        NEEDS_KEYS,
        taken_apart(
            lambda value: value.split(2, 1),
            *((f"blocks.{number}.weight", f"blocks.{number}.upper", f"blocks.{number}.lower") for number in (0, 1)),
        ),
    ),
    ("split", "ModuleDict"): Cell(
        ("split heads.left.* left.*.a left.*.b",),
        NEEDS_KEYS,
        taken_apart(
            lambda value: value.split(1),
            *((f"heads.left.{name}", f"left.{name}.a", f"left.{name}.b") for name in ("weight", "bias")),
        ),
    ),
    ("split", "child"): Cell(
        ("split fc.weight fc.a fc.b --sizes 1,3",),
        NEEDS_KEYS,
        taken_apart(lambda value: value.split((1, 3)), ("fc.weight", "fc.a", "fc.b")),
    ),
    ("split", "shared"): Cell(
        ("split {shared,again}.weight {shared,again}.a {shared,again}.b",), NEEDS_KEYS, both_again
    ),
    ("split", "root"): Cell(("split ** **.a **.b",), NEEDS_KEYS, "num_batches_tracked 1 gives it an axis"),
    ("concat", "Sequential"): Cell(
        ("concat seq.3.weight seq.0.weight seq.both",),
        NEEDS_KEYS,
        put_together(torch.cat, ("seq.both", "seq.3.weight", "seq.0.weight")),
    ),
    ("concat", "ModuleList"): Cell(
        ("concat blocks.1.* blocks.0.* both.* --dim -1",),
        NEEDS_KEYS,
        put_together(
            lambda parts: torch.cat(parts, -1),
            *((f"both.{name}", f"blocks.1.{name}", f"blocks.0.{name}") for name in ("weight", "bias")),
        ),
    ),
    ("concat", "ModuleDict"): Cell(
        ("concat heads.left.* heads.right.* head.*",),
        NEEDS_KEYS,
        put_together(
            torch.cat, *((f"head.{name}", f"heads.left.{name}", f"heads.right.{name}") for name in ("weight", "bias"))
        ),
    ),
    ("concat", "child"): Cell(
        ("concat fc.weight seq.0.weight fc.weight --dim 1",),
        NEEDS_KEYS,
        put_together(lambda parts: torch.cat(parts, 1), ("fc.weight", "fc.weight", "seq.0.weight")),
    ),
    ("concat", "shared"): Cell(
        ("concat shared.weight shared.bias shared.both",), NEEDS_KEYS, "has the shape [4, 4] and shared.bias [4]"
    ),
    ("stack", "Sequential"): Cell(
        ("stack seq.[0,3].weight seq.weight",),
        NEEDS_KEYS,
        put_together(torch.stack, ("seq.weight", "seq.0.weight", "seq.3.weight")),
    ),
    ("stack", "ModuleList"): Cell(
        ("stack blocks.*.{weight,bias} blocks.{weight,bias} --dim -1",),
        NEEDS_KEYS,
        put_together(
            lambda parts: torch.stack(parts, -1),
            *((f"blocks.{name}", f"blocks.0.{name}", f"blocks.1.{name}") for name in ("weight", "bias")),
        ),
    ),
    ("stack", "ModuleDict"): Cell(("stack heads.*.weight all",), NEEDS_KEYS, "* stands for 'left' in heads.left"),
    ("stack", "child"): Cell(("stack fc.weight fc.all",), NEEDS_KEYS, "one more for the number"),
    ("stack", "shared"): Cell(
        ("stack {shared,again}.weight both",), NEEDS_KEYS, "one more for the number: * or [0-7]"
    ),
    ("stack", "root"): Cell(("stack **.*.weight **.weight",), NEEDS_KEYS, "which is no number"),
    ("unstack", "Sequential"): Cell(
        ("unstack seq.3.weight seq.3.rows.*",),
        NEEDS_KEYS,
        taken_apart(torch.unbind, ("seq.3.weight", *(f"seq.3.rows.{row}" for row in range(4)))),
    ),
    ("unstack", "ModuleList"): Cell(
        ("unstack blocks.*.weight blocks.*.[5-8].column --dim 1",),
        NEEDS_KEYS,
        taken_apart(
            lambda value: torch.unbind(value, 1),
            *((f"blocks.{n}.weight", *(f"blocks.{n}.{column}.column" for column in range(5, 9))) for n in (0, 1)),
        ),
    ),
    ("unstack", "ModuleDict"): Cell(
        ("unstack heads.left.weight heads.left.[0-2]",), NEEDS_KEYS, "which makes 2 tensors, and [0-2] takes 3 numbers"
    ),
    ("unstack", "child"): Cell(
        ("unstack fc.bias fc.bias.*",),
        NEEDS_KEYS,
        taken_apart(torch.unbind, ("fc.bias", *(f"fc.bias.{place}" for place in range(4)))),
    ),
    ("unstack", "shared"): Cell(("unstack again again.*",), NEEDS_KEYS, "'again' is a module, not a key"),
    ("unstack", "root"): Cell(("unstack ** **.*",), NEEDS_KEYS, "and so no axis 0"),
    ("permute", "Sequential"): Cell(("permute seq.3.weight 1,0",), NEEDS_KEYS, each("seq.3.weight", torch.t)),
    ("permute", "ModuleList"): Cell(
        ("permute blocks.*.weight 1,0",), NEEDS_KEYS, each("blocks.[01].weight", torch.t)
    ),
    ("permute", "ModuleDict"): Cell(
        ("permute heads 1,0 --except **.bias",), NEEDS_KEYS, each(r"heads\..*\.weight", torch.t)
    ),
    ("permute", "child"): Cell(("permute fc.weight 0,1",), NEEDS_KEYS, each("fc.weight", torch.clone)),
    ("permute", "shared"): Cell(
        ("permute again.weight 1,0",), NEEDS_KEYS, each("(shared|again).weight", torch.t)
    ),
    ("permute", "root"): Cell(("permute . 1,0",), NEEDS_KEYS, "[4], which is 1 axis, not 2"),
    ("reshape", "Sequential"): Cell(
        ("reshape seq.3.weight 2,-1",), NEEDS_KEYS, each("seq.3.weight", lambda value: value.reshape(2, -1))
    ),
    ("reshape", "ModuleList"): Cell(
        ("reshape blocks -- -1,1",), NEEDS_KEYS, each(r"blocks\..*", lambda value: value.reshape(-1, 1))
    ),
    ("reshape", "ModuleDict"): Cell(
        ("reshape heads.left.weight 8",), NEEDS_KEYS, each("heads.left.weight", torch.flatten)
    ),
    ("reshape", "child"): Cell(("reshape fc.bias 3",), NEEDS_KEYS, "which are 4 elements, and 3 has 3"),
    ("reshape", "shared"): Cell(
        ("reshape {shared,again}.weight 16,1",),
        NEEDS_KEYS,
        each("(shared|again).weight", lambda value: value.reshape(16, 1)),
    ),
    ("reshape", "root"): Cell(("reshape . 4,-1",), NEEDS_KEYS, "1 elements do not fit into 4,-1"),
    ("concat", "root"): Cell(("concat **.weight **.other **.both",), NEEDS_KEYS, ".other is not"),
    ("fuse", "Sequential"): Cell(("fuse seq.1 --into seq.0",), folded, NEEDS_CLASSES.format("fuse")),
    ("fuse", "ModuleList"): Cell(("fuse blocks",), NO_NORM.format("blocks"), NEEDS_CLASSES.format("fuse")),
    ("fuse", "ModuleDict"): Cell(
        ("fuse heads.left --into fc",), "heads.left is no BatchNorm", NEEDS_CLASSES.format("fuse")
    ),
    ("fuse", "child"): Cell(("fuse fc",), NO_NORM.format("fc"), NEEDS_CLASSES.format("fuse")),
    ("fuse", "shared"): Cell(("fuse seq.1 --into again",), folded_into_both, NEEDS_CLASSES.format("fuse")),
    ("fuse", "root"): Cell(("fuse .",), "no forward pass shows which layer", NEEDS_CLASSES.format("fuse")),
    ("freeze", "Sequential"): Cell(("freeze seq.0",), flags("seq.0", first=False)),
    ("freeze", "ModuleList"): Cell(("freeze blocks",), flags("blocks", first=False)),
    ("freeze", "ModuleDict"): Cell(("freeze heads.left",), flags("heads.left", first=False)),
    ("freeze", "child"): Cell(("freeze fc",), flags("fc", first=False)),
    ("freeze", "shared"): Cell(("freeze again",), flags("again", first=False)),
    ("freeze", "root"): Cell(("freeze .",), flags("", first=False)),
    ("unfreeze", "Sequential"): Cell(("freeze seq", "unfreeze seq"), flags("seq", first=False, then=True)),
    ("unfreeze", "ModuleList"): Cell(("freeze blocks", "unfreeze blocks"), flags("blocks", first=False, then=True)),
    ("unfreeze", "ModuleDict"): Cell(("freeze heads", "unfreeze heads"), flags("heads", first=False, then=True)),
    ("unfreeze", "child"): Cell(("freeze fc", "unfreeze fc"), flags("fc", first=False, then=True)),
    ("unfreeze", "shared"): Cell(("freeze shared", "unfreeze again"), flags("again", first=False, then=True)),
    ("unfreeze", "root"): Cell(("freeze .", "unfreeze ."), flags("", first=False, then=True)),
    ("init", "Sequential"): Cell(("init seq xavier_uniform",), filled("seq")),
    ("init", "ModuleList"): Cell(("init blocks xavier_uniform",), filled("blocks")),
    ("init", "ModuleDict"): Cell(("init heads.left xavier_uniform_",), filled("heads.left")),
    ("init", "child"): Cell(("init fc xavier_uniform",), filled("fc")),
    ("init", "shared"): Cell(("init again xavier_uniform",), filled("again")),
    ("init", "root"): Cell(("init . xavier_uniform",), filled(""), filled_keys),
    ("cast", "Sequential"): Cell(("cast seq bfloat16",), lambda model: model.seq.bfloat16() and None),
    ("cast", "ModuleList"): Cell(("cast blocks.1 half",), lambda model: model.blocks[1].half() and None),
    ("cast", "ModuleDict"): Cell(("cast heads.left float64",), lambda model: model.heads["left"].double() and None),
    ("cast", "child"): Cell(("cast fc bfloat16",), lambda model: model.fc.bfloat16() and None),
    ("cast", "shared"): Cell(("cast again bfloat16",), lambda model: model.again.bfloat16() and None),
    ("cast", "root"): Cell(("cast . bfloat16",), lambda model: model.bfloat16() and None),
    ("dequantize", "Sequential"): Cell(("dequantize seq bfloat16",), NO_FP8.format("seq")),
    ("dequantize", "ModuleList"): Cell(("dequantize blocks.1 bfloat16",), NO_FP8.format("blocks.1")),
    ("dequantize", "ModuleDict"): Cell(("dequantize heads.left bfloat16",), NO_FP8.format("heads.left")),
    ("dequantize", "child"): Cell(("dequantize fc bfloat16",), NO_FP8.format("fc")),
    ("dequantize", "shared"): Cell(("dequantize again bfloat16",), NO_FP8.format("again")),
    ("dequantize", "root"): Cell(("dequantize . bfloat16",), NO_FP8.format(".")),
}  # fmt: skip


def plain() -> nets.Places:
    torch.manual_seed(0)
    return nets.Places()


def after(truth: Callable[[Any], Any], model: nn.Module) -> nn.Module:
    """Apply plain statements. Returns the model, or the submodule or wrapper that they return."""
    kinds = list(model.modules())
    with torch.no_grad():
        result = truth(model)
    extracted = any(part is result for part in kinds) and any(part is result for part in model.modules())
    around_it = isinstance(result, nn.Module) and any(part is model for part in result.modules())
    return result if extracted or around_it else model


def assert_same_state(found: State, expected: State) -> None:
    """Require equal keys, dtypes and values, and equal groups of names that share a storage."""
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    assert _ties(found) == _ties(expected)


def _ties(state: State) -> set[frozenset[str]]:
    groups: dict[int, set[str]] = {}
    for name, tensor in state.items():
        groups.setdefault(tensor.untyped_storage().data_ptr(), set()).add(name)
    return {frozenset(names) for names in groups.values()}


def frozen_of(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad}


def run(cli: Cli, cell: Cell, *words: str, refusal: str | None = None) -> str:
    edits = [word for line in cell.lines for word in ("-e", line)]
    told = cli("apply", *edits, *words, code=0 if refusal is None else 2).err
    if refusal is not None:
        assert refusal in " ".join(told.split())
        assert any(text in told for text in ("hint: ", "cannot be removed", "neither has the rest of the model"))
    return told


KNOWN = {
    "own class": ("-m", "nets.py:Places"),
    "modelcli checkpoint": ("-m", "made.pth", "--trust"),
    "training checkpoint": ("-m", "train.pth", "--arch", "nets.py:Places"),
}


@pytest.mark.parametrize(("key", "source"), rotated([*TABLE], [*KNOWN]))
def test_a_model(cli: Cli, folder: Path, key: tuple[str, str], source: str) -> None:
    cell, model = TABLE[key], plain()
    if source == "modelcli checkpoint":
        cli("save", "made.pth", "-m", "nets.py:Places")
    if source == "training checkpoint":
        torch.save({"epoch": 3, "state_dict": model.state_dict(), "seen": [1, 2]}, "train.pth")
    refusal = cell.on_model if isinstance(cell.on_model, str) else None
    run(cli, cell, *KNOWN[source], "-o", "out.pth", refusal=refusal)
    if isinstance(cell.on_model, str):
        assert not Path("out.pth").exists()
        return
    expected = after(cell.on_model, model)
    written = torch.load("out.pth", weights_only=True)
    if source == "training checkpoint":
        assert (written["epoch"], written["seen"]) == (3, [1, 2])
        written = written["state_dict"]
    assert_same_state(written, expected.state_dict())
    loaded = modelcli.load("out.pth", trust=True)
    assert frozen_of(loaded) == frozen_of(expected)
    assert repr(loaded) == repr(expected)
    assert_same_state(loaded.state_dict(), expected.state_dict())


#: safetensors stores each tensor once, so such files have no second name for it.
SAFETENSORS = ("bare.safetensors", "shards")
#: Of the edits of shards, one in six is not marked `sweep`: they are carried out as those of one file.
ON_FILES = [
    pytest.param(
        source,
        cell,
        id=f"{edit}-{place}-{source}",
        marks=pytest.mark.sweep if source == "shards" and position % 6 else (),
    )
    for position, ((edit, place), cell) in enumerate(TABLE.items())
    for source in ("bare.pth", "bare.safetensors", "train.pth", "shards")
    if source not in SAFETENSORS or not {"again", "tie"} & set(re.findall(r"\w+", " ".join(cell.lines)))
]


def as_file(state: State, name: str) -> State:
    """Save a state dict as safetensors. Returns it in the order of the file."""
    save_file(state, name)
    return load_file(name)


def as_shards(state: State) -> State:
    """Save a state dict as two shards with their index in `shards/`. Returns it in the order of the index."""
    folder = Path("shards")
    folder.mkdir()
    names, half = list(state), len(state) // 2
    weight_map: dict[str, str] = {}
    found: State = {}
    for number, part in enumerate((names[:half], names[half:]), 1):
        shard = f"model-{number:05}-of-00002.safetensors"
        found |= as_file({name: state[name] for name in part}, str(folder / shard))
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in state.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return {name: found[name] for name in weight_map}


@pytest.mark.parametrize(("source", "cell"), ON_FILES)
def test_every_edit_of_a_file_without_an_architecture(cli: Cli, source: str, cell: Cell) -> None:
    model = plain()
    state = model.state_dict()
    if source in SAFETENSORS:
        single = {name: tensor for name, tensor in state.items() if not name.startswith("again")}
        state = as_shards(single) if source == "shards" else as_file(single, source)
    else:
        torch.save(state if source == "bare.pth" else {"epoch": 3, "model": state}, source)
    out = "out.safetensors" if source in SAFETENSORS else "out.pth"
    truth = cell.on_model if cell.on_keys is None else cell.on_keys
    run(cli, cell, "-m", source, "-o", out, refusal=truth if isinstance(truth, str) else None)
    if isinstance(truth, str):
        assert not Path(out).exists()
        return
    expected = truth(dict(state)) if cell.on_keys is not None else after(truth, model).state_dict()
    if source in SAFETENSORS:
        expected = {
            name: tensor for name, tensor in expected.items() if not name.removeprefix("0.").startswith("again")
        }
        assert_same_state(load_file(out), expected)
    else:
        written = torch.load(out, weights_only=True)
        if source == "train.pth":
            assert written["epoch"] == 3
            written = written["model"]
        assert_same_state(written, expected)
    if cell.on_keys is None:
        kept = frozen_of(after(truth, plain()))
        rows = cli("params", out, "--json").json["tensors"]
        assert {row["name"] for row in rows if row["trainable"] is False} == kept & {row["name"] for row in rows}


def test_a_note_says_that_a_file_without_an_architecture_was_not_checked(cli: Cli) -> None:
    torch.save(plain().state_dict(), "bare.pth")
    assert (
        "check:       not made: the file records no architecture: pass --arch REFERENCE"
        in cli("replace", "fc", "Linear(_,5)", "-m", "bare.pth").out
    )


# --- the script that does the same ---------------------------------------------------------------------------------

#: The sources of each cell of which one script in five, in turn, is not marked `sweep`.
SCRIPTED = [
    pytest.param(
        source,
        cell,
        id=f"{edit}-{place}-{source}",
        marks=() if (position + number) % 5 == 0 else pytest.mark.sweep,
    )
    for position, ((edit, place), cell) in enumerate(TABLE.items())
    for number, (source, truth) in enumerate(
        (
            *((source, cell.on_model) for source in KNOWN),
            ("bare.pth", cell.on_model if cell.on_keys is None else cell.on_keys),
            ("bare.safetensors", cell.on_model if cell.on_keys is None else cell.on_keys),
        )
    )
    if not isinstance(truth, str)
    and (source != "bare.safetensors" or not {"again", "tie"} & set(re.findall(r"\w+", " ".join(cell.lines))))
]


@pytest.mark.parametrize(("source", "cell"), SCRIPTED)
def test_the_script(cli: Cli, source: str, cell: Cell) -> None:
    """Without modelcli, the script saves what modelcli saves, random values included."""
    state = plain().state_dict()
    if source == "bare.safetensors":
        save_file({name: tensor for name, tensor in state.items() if not name.startswith("again")}, source)
    torch.save(state, "bare.pth")
    torch.save({"epoch": 3, "state_dict": state}, "train.pth")
    if source == "modelcli checkpoint":
        cli(
            "apply",
            "-e",
            "replace heads.right Linear(4,6)",
            "-e",
            "freeze fc",
            "-m",
            "nets.py:Places",
            "-o",
            "made.pth",
        )
    edits = [word for line in cell.lines for word in ("-e", line)]
    both(cli, *KNOWN.get(source, ("-m", source)), *edits)


# --- a builder -----------------------------------------------------------------------------------------------------

#: One builder has three of the kinds of children. None has a shared module (`test_builders_edited.py` checks all).
BUILDER = "deeplabv3_mobilenet_v3_large(num_classes=3)"


def conv(given: int, made: int) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(given, made, 1)


def out_of_dict(model: nn.Module) -> None:
    del model.backbone["16"]


ON_BUILDER: dict[tuple[str, str], Cell] = {
    ("replace", "Sequential"): Cell(("replace classifier.4 Conv2d(_,7,1)",), put("classifier.4", conv(256, 7))),
    ("replace", "ModuleList"): Cell(
        ("replace classifier.0.convs.0 Conv2d(960,256,1)",), put("classifier.0.convs.0", conv(960, 256))
    ),
    ("replace", "ModuleDict"): Cell(("replace backbone.16 Conv2d(_,960,1)",), put("backbone.16", conv(160, 960))),
    ("replace", "child"): Cell(
        ("replace classifier.0.project Conv2d(1280,256,1)",), put("classifier.0.project", conv(1280, 256))
    ),
    ("replace", "root"): Cell(("replace . Identity",), ROOT_STAYS),
    ("keep", "Sequential"): Cell(
        ("replace classifier.4 Conv2d(256,7,1) --keep-weights",), put_and_keep("classifier.4", conv(256, 7))
    ),
    ("add", "Sequential"): Cell(
        ("add classifier.end Conv2d(3,3,1)",),
        drawn(lambda model: model.classifier.add_module("end", nn.Conv2d(3, 3, 1))),
    ),
    ("add", "ModuleDict"): Cell(
        ("add backbone.17 Conv2d(960,960,1)",),
        drawn(lambda model: model.backbone.add_module("17", nn.Conv2d(960, 960, 1))),
    ),
    ("insert", "Sequential"): Cell(
        ("insert classifier.1 Conv2d(_,256,1)",),
        drawn(lambda model: model.classifier.insert(1, nn.Conv2d(256, 256, 1))),
    ),
    ("insert", "ModuleDict"): Cell(("insert backbone.3 Identity",), NO_SEQUENCE),
    ("append", "Sequential"): Cell(
        ("append classifier Conv2d(_,2,1)",), drawn(lambda model: model.classifier.append(nn.Conv2d(3, 2, 1)))
    ),
    ("append", "ModuleDict"): Cell(("append backbone Identity",), NO_SEQUENCE),
    ("append", "root"): Cell(("append . Identity",), NO_SEQUENCE),
    ("remove", "Sequential"): Cell(("remove classifier.1",), lambda model: model.classifier.pop(1)),
    ("remove", "ModuleList"): Cell(
        ("remove classifier.0.convs.0",), "classifier.0.project.0 Conv2d(1280, 256"
    ),
    ("remove", "ModuleDict"): Cell(("remove backbone.16",), "'out'"),
    ("remove", "child"): Cell(("remove classifier.0.project",), "uses a module that the edit removed"),
    ("extract", "Sequential"): Cell(("extract classifier",), lambda model: model.classifier),
    ("extract", "ModuleDict"): Cell(("extract backbone",), lambda model: model.backbone),
    ("rename", "child"): Cell(("rename classifier.** head.**",), "cannot load a state dict"),
    ("freeze", "ModuleDict"): Cell(("freeze backbone",), flags("backbone", first=False)),
    ("unfreeze", "Sequential"): Cell(("freeze .", "unfreeze ."), flags("", first=False, then=True)),
    ("init", "Sequential"): Cell(("init classifier xavier_uniform",), filled("classifier")),
    ("cast", "root"): Cell(("cast . bfloat16",), lambda model: model.bfloat16() and None),
}  # fmt: skip


@pytest.mark.parametrize("key", sampled([*ON_BUILDER], one_in=2))
def test_a_builder(cli: Cli, key: tuple[str, str]) -> None:
    """The check before writing runs, because the input is known, and refuses edits that do not fit."""
    cell = ON_BUILDER[key]
    refusal = cell.on_model if isinstance(cell.on_model, str) else None
    run(cli, cell, "-m", BUILDER, "-o", "out.pth", refusal=refusal)
    if isinstance(cell.on_model, str):
        return
    torch.manual_seed(0)
    model = torchvision.models.get_model(BUILDER.partition("(")[0], weights_backbone=None, num_classes=3)
    expected = after(cell.on_model, model)
    assert_same_state(torch.load("out.pth", weights_only=True), expected.state_dict())
    loaded = modelcli.load("out.pth")
    assert frozen_of(loaded) == frozen_of(expected)
    assert re.sub(r"\s", "", repr(loaded)) == re.sub(r"\s", "", repr(expected))
