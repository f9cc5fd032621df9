"""Read a folder of DeepSpeed as the model in float32 that `zero_to_fp32.py` makes of it: names, order, dtypes, values.

Only the pickles of the files are read. A parameter is a list of spans: the flat vectors of the ranks contain it.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any, NoReturn

from modelcli.checkpoints import limits, named_files, shapes
from modelcli.checkpoints.contents import Contents
from modelcli.checkpoints.deepspeed.names import UNIVERSAL, StateFiles, states_in
from modelcli.checkpoints.deepspeed.parts_of_ranks import WIDENED, Gathered, as_float32
from modelcli.checkpoints.entries import TensorEntry
from modelcli.checkpoints.format import Candidate
from modelcli.checkpoints.storage import JoinedSpan, Storage
from modelcli.checkpoints.torch_pickle import nested_tensors, state_dicts, trees
from modelcli.checkpoints.torch_pickle.inert_values import Opaque, sizes_in
from modelcli.checkpoints.torch_pickle.pickled_files import pickle_of
from modelcli.errors import FileFormatError, RequestError, SystemFailureError
from modelcli.model.dtypes import ITEM_BYTES
from modelcli.model.tensors import Kind, Shape
from modelcli.wording import brief_repr, counted, is_or_are, listed

#: The enum of the stages, which is pickled by its value, or by its name (some versions of Python 3.11).
_STAGE = "deepspeed.runtime.zero.config.ZeroStageEnum"
_STAGES = {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3}
#: The names in its files besides those that any file of tensors may have: they describe the training, not the model.
_EXPECTED = frozenset(
    {
        _STAGE,
        "argparse.Namespace",
        "deepspeed.checkpoint.universal_checkpoint.SubparamShape",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.utils.tensor_fragment.fragment_address",
    }
)
#: What the model states contain besides the model, and the training that is not part of it.
_OF_TRAINING = frozenset({"optimizer", "lr_scheduler", "data_sampler", "random_ltd", "ds_config", "random_rng_state"})
_MODEL_PARTS = frozenset({"module", "buffer_names", "param_shapes", "frozen_param_shapes", "frozen_param_fragments"})


def read(path: Path) -> Contents:
    """Read the folder of a step, or a universal checkpoint. `path` is a file of states in it.

    The tensors are those that DeepSpeed's `zero_to_fp32.py` gives, in its order: buffers, then frozen parameters in the
    dtype of training, then the trained ones from the float32 copies of the optimizer, then shared ones. Behind them are
    those that it leaves out: with ZeRO-1, frozen parameters are only in the model states.

    Raises:
        RequestError: model parallelism or a pipeline has split the model.
        FileFormatError: files of ranks are missing, or what they state does not agree.
    """
    folder = path.parent
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise SystemFailureError(f"cannot read {folder}: {error.strerror or error}") from None
    files = states_in(names)
    _refuse_other_parts(folder, files)
    if not files.optim and UNIVERSAL in names and (folder / UNIVERSAL).is_dir():
        return _Reading(folder, files).universal()
    if not files.optim:
        return _weights_of_training(folder, files)
    return _Reading(folder, files).consolidated()


def _refuse_other_parts(folder: Path, files: StateFiles) -> None:
    """Raise RequestError for a model that is split in a way that zero_to_fp32.py does not join either."""
    hint = "load it with the program that trained it, and save model.state_dict() there with torch.save"
    if files.layers:
        raise RequestError(
            f"{folder} holds the layers of a pipeline of DeepSpeed ({listed(files.layers, 2)}), which modelcli does "
            "not join",
            hint,
        )
    if files.experts:
        raise RequestError(
            f"{folder} holds the experts of DeepSpeed's mixture of experts in files of their own "
            f"({listed(files.experts, 2)}), which modelcli does not join",
            hint,
        )
    if len(files.parts) > 1 or 0 not in files.parts:
        raise RequestError(
            f"{folder} holds the parts of {counted(len(files.parts), 'rank')} of model parallelism "
            f"({listed([f'mp_rank_{part:02}' for part in sorted(files.parts)], 4)}), and modelcli joins only the ranks "
            "of ZeRO",
            hint,
        )
    if files.twice is not None:
        raise FileFormatError(
            f"{folder} holds two files of the same rank: {files.twice[0]} and {files.twice[1]}",
            "remove the file that is left from another run",
        )


def _weights_of_training(folder: Path, files: StateFiles) -> Contents:
    """Return the weights in the model states, for a folder without optimizer states."""
    if 0 not in files.whole:
        raise FileFormatError(
            f"{folder} holds no optimizer states (*_optim_states.pt), in which ZeRO-3 keeps the values of the model",
            "copy the files of all ranks into it",
        )
    file = Candidate(folder / files.whole[0])
    pickled = pickle_of(file)
    tree = _dict(file.path, pickled.value, "its content")
    _refuse_model_parallelism(file.path, tree)
    contents = trees.contents_of(file.path, pickled, "module" if "module" in tree else None)
    note = f"{folder.name} holds no optimizer states: took the weights of {file.path.name}, in the dtype of training"
    return replace(contents, notes=(note, *contents.notes))


def _refuse_model_parallelism(path: Path, states: Mapping[Any, Any]) -> None:
    ranks = states.get("mp_world_size")
    if isinstance(ranks, int) and ranks > 1:
        raise RequestError(
            f"{path} holds one of the {ranks:,} parts into which DeepSpeed's model parallelism splits the model, and "
            "modelcli joins only the ranks of ZeRO",
            "load it with the program that trained it, and save model.state_dict() there with torch.save",
        )


@dataclass(frozen=True)
class _Vector:
    """A flat vector of a rank: its dtype, its number of elements, and its bytes."""

    dtype: str
    count: int
    storage: Storage


@dataclass
class _Reading:
    """What is found in a folder while its files are read."""

    folder: Path
    files: StateFiles
    foreign: dict[str, None] = field(default_factory=dict)
    hidden: dict[str, None] = field(default_factory=dict)
    tensors: dict[str, TensorEntry] = field(default_factory=dict)
    kinds: dict[str, Kind] = field(default_factory=dict)
    trained: dict[str, bool] = field(default_factory=dict)
    budget: limits.Budget | None = None

    # --- the folder of a step --------------------------------------------------------------------------------------

    def consolidated(self) -> Contents:
        """Return the model from the states of all ranks."""
        first = self._rank_file(self.files.optim, 0, "optim")
        states = self._optimizer_states(first)
        stage = self._stage(first, states)
        world = self._world_size(first, states)
        here = sum(rank < world for rank in self.files.optim)
        if not here == world == len(self.files.optim):
            missing = itertools.islice((rank for rank in range(world) if rank not in self.files.optim), 4)
            names = ", ".join(map(str, missing)) + (f" and {world - here - 4:,} more" if world - here > 4 else "")
            what = (
                f"the optimizer states of rank {names} are missing"
                if names
                else f"there are {len(self.files.optim):,} files of optimizer states"
            )
            raise FileFormatError(
                f"{first} says that {counted(world, 'rank')} wrote {self.folder.name}, but {what}",
                "copy the files of all ranks into it, and none of another run",
            )
        key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        groups = [self._vectors(first, states.get(key), key)]
        for rank in range(1, world):
            path = self._rank_file(self.files.optim, rank, "optim")
            groups.append(self._vectors(path, self._optimizer_states(path).get(key), key))
            self._require_alike(path, groups, same_sizes=stage == 3)
        model = self._rank_file(self.files.model if stage == 3 else self.files.whole, 0, "model")
        module = self._model_states(model)
        self._add_buffers(model, module)
        self._add_frozen(model, module, world if stage == 3 else 1)
        shapes_of = self._param_shapes(model, module)
        if stage == 3:
            self._add_gathered(model, first, shapes_of, groups)
        else:
            self._add_cut(model, first, shapes_of, groups, states.get("param_alignment_paddings"))
        self._add_shared(model, module)
        return self._contents(
            module, f"from {counted(world, 'rank')} of DeepSpeed ZeRO-{stage}, as zero_to_fp32.py joins them"
        )

    def _rank_file(self, files: Mapping[int, str], rank: int, what: str) -> Path:
        """Return the path of the states of a rank."""
        if rank not in files:
            name = f"mp_rank_00_{what}_states.pt"
            if files is not self.files.whole:
                name = f"zero_pp_rank_{rank}_{name}"
            raise FileFormatError(
                f"{self.folder} has no file {name}", "copy the files of all ranks into it, as DeepSpeed wrote them"
            )
        return self.folder / files[rank]

    def _states(self, path: Path) -> dict[Any, Any]:
        """Read the pickle of a file, and note the classes that it names. The bytes of tensors are not read."""
        pickled = pickle_of(Candidate(path))
        self.budget = pickled.budget
        self.foreign.update(dict.fromkeys(name for name in pickled.foreign if name not in _EXPECTED))
        self.hidden.update(
            dict.fromkeys(
                f"the attribute {name!r} of a tensor"
                for name, value in pickled.attributes
                if nested_tensors.may_hold_tensors(value, pickled.budget)
            )
        )
        return _dict(path, pickled.value, "its content")

    def _optimizer_states(self, path: Path) -> dict[Any, Any]:
        return _dict(path, self._states(path).get("optimizer_state_dict"), "optimizer_state_dict")

    def _model_states(self, path: Path) -> dict[Any, Any]:
        states = self._states(path)
        _refuse_model_parallelism(path, states)
        return states

    def _stage(self, path: Path, states: Mapping[Any, Any]) -> int:
        stage = states.get("zero_stage", 1 if "single_partition_of_fp32_groups" in states else None)
        if isinstance(stage, Opaque) and isinstance(stage.args, tuple) and stage.args:
            # The call of the enum with its value, or of getattr with its name.
            stage = _STAGES.get(stage.args[-1]) if isinstance(stage.args[-1], str) else stage.args[-1]
        if type(stage) is not int or stage not in (1, 2, 3):
            raise _damaged(path, f"its zero_stage is {brief_repr(stage)}, not 1, 2 or 3")
        return stage

    def _world_size(self, path: Path, states: Mapping[Any, Any]) -> int:
        """Return the number of ranks, which ZeRO-1 and ZeRO-2 state for each group of parameters."""
        stated = states.get("partition_count")
        counts = stated if isinstance(stated, list) else [stated]
        if not counts or not all(type(count) is int and count > 0 for count in counts):
            raise _damaged(path, f"its partition_count is {brief_repr(stated)}, not a number of ranks")
        world: int = max(counts)
        return world

    def _vectors(self, path: Path, value: Any, key: str) -> list[_Vector]:
        """Return the flat vectors of a rank, one a group."""
        found = []
        for number, item in enumerate(_list(path, value, key)):
            if not isinstance(item, TensorEntry) or len(item.shape) != 1 or (item.stride != (1,) and item.shape[0] > 1):
                raise _damaged(path, f"{key}[{number}] should be a vector")
            found.append(_Vector(item.dtype, item.shape[0], _bytes_of(item)))
        return found

    def _require_alike(self, path: Path, groups: Sequence[Sequence[_Vector]], *, same_sizes: bool) -> None:
        """Raise FileFormatError if the vectors of the last rank are not such as those of the first."""
        first, last = groups[0], groups[-1]
        if len(first) != len(last):
            raise _damaged(path, f"it has {len(last):,} groups of parameters, but rank 0 has {len(first):,}")
        for number, (one, other) in enumerate(zip(first, last, strict=True)):
            if one.dtype != other.dtype:
                raise _damaged(path, f"its group {number} is {other.dtype}, but that of rank 0 is {one.dtype}")
            if same_sizes and one.count != other.count:
                raise _damaged(
                    path, f"its group {number} has {other.count:,} elements, but that of rank 0 has {one.count:,}"
                )

    # --- the tensors of the model states ---------------------------------------------------------------------------

    def _add_buffers(self, path: Path, states: Mapping[Any, Any]) -> None:
        """Add the buffers, those of a floating dtype in float32."""
        module = _dict(path, states.get("module"), "module")
        names = {name for name in _list(path, states.get("buffer_names"), "buffer_names") if isinstance(name, str)}
        widened: dict[int, Storage] = {}
        for name, entry in module.items():
            if name not in names:
                continue
            if not isinstance(entry, TensorEntry):
                raise _damaged(path, f"the buffer {brief_repr(name)} is not a dense tensor")
            made = replace(entry, requires_grad=None, is_parameter=False)
            if entry.dtype in WIDENED:
                storage = widened.setdefault(id(entry.storage), as_float32(entry.storage, entry.dtype))
                made = replace(made, dtype="float32", storage=storage)
            self._add(path, name, made, "buffer", None)

    def _add_frozen(self, path: Path, states: Mapping[Any, Any], world: int) -> None:
        """Add the frozen parameters: whole ones, or the parts that `world` ranks hold."""
        if not states.get("frozen_param_shapes"):
            return
        stated = _dict(path, states["frozen_param_shapes"], "frozen_param_shapes")
        parts = [_dict(path, states.get("frozen_param_fragments"), "frozen_param_fragments")]
        paths = [path]
        for rank in range(1, world):
            paths.append(self._rank_file(self.files.model, rank, "model"))
            other = self._states(paths[-1]).get("frozen_param_fragments")
            parts.append(_dict(paths[-1], other, "frozen_param_fragments"))
        for name, value in stated.items():
            shape = _shape(path, name, value)
            found = []
            for source, fragments in zip(paths, parts, strict=True):
                entry = fragments.get(name)
                if not isinstance(entry, TensorEntry):
                    raise _damaged(source, f"frozen_param_fragments has no dense tensor {brief_repr(name)}")
                found.append(entry)
            if world == 1 and found[0].shape == shape:
                self._add(path, name, replace(found[0], requires_grad=None, is_parameter=False), "parameter", False)
            else:
                self._add_parts(paths, name, shape, found)

    def _add_parts(self, paths: Sequence[Path], name: Any, shape: Shape, parts: Sequence[TensorEntry]) -> None:
        """Add a frozen parameter of ZeRO-3, of which each rank holds a part of the same length."""
        length = -(-prod(shape) // len(parts))
        for path, part in zip(paths, parts, strict=True):
            if part.dtype != parts[0].dtype or part.shape != (length,) or (part.stride != (1,) and length > 1):
                raise _damaged(
                    path,
                    f"its part of {brief_repr(name)} is {part.dtype} {list(part.shape)}, but should be "
                    f"{parts[0].dtype} [{length}]: {list(shape)} on {counted(len(parts), 'rank')}",
                )
        vectors = tuple(map(_bytes_of, parts))
        item = ITEM_BYTES[parts[0].dtype]
        storage = Gathered(vectors, 0, length * item, 0, prod(shape) * item)
        self._add(paths[0], name, _row_major(shape, parts[0].dtype, storage), "parameter", False)

    def _param_shapes(self, path: Path, states: Mapping[Any, Any]) -> list[dict[str, Shape]]:
        """Return the shapes of the trained parameters by name, a dict for each group."""
        budget = limits.Budget(f"{path}: param_shapes", path.stat().st_size)
        groups = []
        for number, group in enumerate(_list(path, states.get("param_shapes"), "param_shapes")):
            items = _dict(path, group, f"param_shapes[{number}]")
            budget.spend(limits.ENTRY * (1 + len(items)))
            groups.append({name: _shape(path, name, value) for name, value in items.items()})
        return groups

    def _add_shared(self, path: Path, states: Mapping[Any, Any]) -> None:
        """Add the further names of parameters that are shared."""
        shared = states.get("shared_params")
        pairs = shared.items() if isinstance(shared, dict) else _pairs(path, shared)
        for name, first in pairs:
            if not isinstance(name, str) or not isinstance(first, str):
                raise _damaged(path, "shared_params should map names to names")
            if first not in self.tensors:
                continue
            self.tensors[name] = self.tensors[first]
            self.kinds[name] = self.kinds[first]
            if first in self.trained:
                self.trained[name] = self.trained[first]

    # --- the tensors of the optimizer states -----------------------------------------------------------------------

    def _add_cut(
        self,
        model: Path,
        optim: Path,
        shapes_of: Sequence[Mapping[str, Shape]],
        groups: Sequence[Sequence[_Vector]],
        paddings: Any,
    ) -> None:
        """Add parameters of ZeRO-1 and ZeRO-2: the parts of all ranks in a row, cut by the shapes."""
        if len(shapes_of) != len(groups[0]):
            raise _damaged(
                optim,
                f"it has {counted(len(groups[0]), 'group')} of parameters, but {model.name} has the shapes of "
                f"{len(shapes_of):,}",
            )
        if paddings is not None and len(_list(optim, paddings, "param_alignment_paddings")) < len(shapes_of):
            raise _damaged(optim, "param_alignment_paddings should have a list for each group")
        for number, shapes_here in enumerate(shapes_of):
            vectors = [rank[number] for rank in groups]
            dtype, item = vectors[0].dtype, ITEM_BYTES[vectors[0].dtype]
            row = _Row([vector.storage for vector in vectors])
            after = self._paddings(optim, None if paddings is None else paddings[number], number, len(shapes_here))
            have, offset = sum(vector.count for vector in vectors), 0
            for (name, shape), padding in zip(shapes_here.items(), after, strict=True):
                count = prod(shape)
                if offset + count > have:
                    raise _damaged(
                        optim,
                        f"the vectors of group {number} have {have:,} elements, and {name} of shape {list(shape)} in "
                        f"{model.name} would end at {offset + count:,}",
                    )
                entry = _row_major(shape, dtype, row.part(offset * item, count * item))
                self._add(model, name, entry, "parameter", True)
                offset += count + padding
            # DeepSpeed pads a group to a multiple of twice the number of ranks.
            unit = 2 * len(groups)
            if -(-offset // unit) != -(-have // unit):
                raise _damaged(
                    optim,
                    f"the vectors of group {number} have {have:,} elements, and the shapes in {model.name} need "
                    f"{offset:,}",
                )

    def _paddings(self, path: Path, value: Any, number: int, count: int) -> list[int]:
        """Return the elements of padding behind each parameter of a group."""
        if value is None:
            return [0] * count
        found = _list(path, value, f"param_alignment_paddings[{number}]")
        if len(found) != count or not all(type(padding) is int and 0 <= padding < 2**62 for padding in found):
            raise _damaged(path, f"param_alignment_paddings[{number}] should have {counted(count, 'number')}")
        return found

    def _add_gathered(
        self,
        model: Path,
        optim: Path,
        shapes_of: Sequence[Mapping[str, Shape]],
        groups: Sequence[Sequence[_Vector]],
    ) -> None:
        """Add parameters of ZeRO-3, of which each rank has one part; its vectors hold the parts in a row."""
        dtypes = {vector.dtype for vector in groups[0]}
        if len(dtypes) > 1:
            raise _damaged(optim, f"its groups have several dtypes: {listed(sorted(dtypes), 4)}")
        world = len(groups)
        have = sum(vector.count for vector in groups[0])
        need = sum(-(-prod(shape) // world) for shapes_here in shapes_of for shape in shapes_here.values())
        if have != need:
            raise _damaged(
                optim,
                f"its vectors have {have:,} elements, and the shapes in {model.name} need {need:,} on each of "
                f"{counted(world, 'rank')}",
            )
        if not dtypes:
            return
        dtype = dtypes.pop()
        item = ITEM_BYTES[dtype]
        ranks = tuple(_joined([vector.storage for vector in rank]) for rank in groups)
        offset = 0
        for shapes_here in shapes_of:
            for name, shape in shapes_here.items():
                length = -(-prod(shape) // world)
                storage: Storage = Gathered(ranks, offset * item, length * item, 0, prod(shape) * item)
                self._add(model, name, _row_major(shape, dtype, storage), "parameter", True)
                offset += length

    # --- a universal checkpoint ------------------------------------------------------------------------------------

    def universal(self) -> Contents:
        """Return the model of a universal checkpoint, which has a folder with the whole of each parameter."""
        stage3 = 0 not in self.files.whole
        model = self._rank_file(self.files.model if stage3 else self.files.whole, 0, "model")
        states = self._model_states(model)
        self._add_buffers(model, states)
        self._add_frozen(model, states, len(self.files.model) if stage3 else 1)
        homes = named_files.homes_of(model)
        for shapes_here in self._param_shapes(model, states):
            for name, shape in shapes_here.items():
                path = named_files.inside(model, f"{UNIVERSAL}/{name}/fp32.pt", homes)
                entry = self._whole_parameter(path, shape)
                self._add(model, name, entry, "parameter", True)
        self._add_shared(model, states)
        return self._contents(states, "a universal checkpoint of DeepSpeed")

    def _whole_parameter(self, path: Path, shape: Shape) -> TensorEntry:
        """Return the parameter in a file: a tensor of its shape, or (from ZeRO-3) a vector."""
        pickled = pickle_of(Candidate(path))
        self.foreign.update(dict.fromkeys(name for name in pickled.foreign if name not in _EXPECTED))
        value = pickled.value
        entry = value.get("param") if isinstance(value, dict) else value
        if not isinstance(entry, TensorEntry):
            raise _damaged(path, "it should contain a dense tensor")
        entry = replace(entry, requires_grad=None, is_parameter=False)
        if entry.shape == shape:
            return entry
        # A padded vocabulary is saved without the padding.
        is_cut = isinstance(value, dict) and value.get("vocab_tensor") is True
        if is_cut and len(entry.shape) == len(shape) and entry.shape[1:] == shape[1:] and entry.shape[0] < shape[0]:
            return entry
        if entry.shape != (prod(shape),) or (entry.stride != (1,) and prod(shape) > 1):
            raise _damaged(path, f"it has a tensor of shape {list(entry.shape)}, but should have one of {list(shape)}")
        return _row_major(shape, entry.dtype, _bytes_of(entry))

    # --- all of it -------------------------------------------------------------------------------------------------

    def _add(self, path: Path, name: Any, entry: TensorEntry, kind: Kind, trained: bool | None) -> None:
        if not isinstance(name, str):
            raise _damaged(path, f"the name of a tensor is {brief_repr(name)}, not a text")
        if name in self.tensors:
            raise _damaged(path, f"it names the tensor {name} twice")
        self.tensors[name] = entry
        self.kinds[name] = kind
        if trained is not None:
            self.trained[name] = trained

    def _contents(self, states: Mapping[Any, Any], origin: str) -> Contents:
        """Return the contents with the tensors that were found.

        Args:
            states: the model states of the first rank.
            origin: what the tensors come from, for the note.
        """
        module = _dict(self.folder, states.get("module"), "module")
        rest = {name: value for name, value in module.items() if name not in self.tensors}
        added = [name for name, value in rest.items() if isinstance(value, TensorEntry) and 0 not in value.shape]
        for name in added:
            entry = replace(rest[name], requires_grad=None, is_parameter=False)
            self._add(self.folder, name, entry, "parameter", False)
        left_out = [str(name) for name, value in rest.items() if not isinstance(value, TensorEntry)]
        limits.check_names(self.tensors, str(self.folder))
        what = counted(len(self.tensors), "tensor")
        notes = [f"{what} of {self.folder.name}, {origin}; the optimizer states are left out"]
        if added:
            notes.append(
                f"{listed(added, 4)} {is_or_are(len(added))} as in the model states, in the dtype of training: "
                "zero_to_fp32.py leaves out what the optimizer does not have"
            )
        if left_out:
            notes.append(f"{listed(left_out, 4)} in its model states {is_or_are(len(left_out))} left out: no tensors")
        budget = self.budget or limits.Budget(str(self.folder), 0)
        beside = [
            name
            for name, value in states.items()
            if isinstance(name, str)
            and name not in _MODEL_PARTS | _OF_TRAINING
            and state_dicts.may_be_of_a_model(name, value, budget)
        ]
        if beside:
            notes.append(f"{listed(beside, 4)} in its model states {is_or_are(len(beside))} not shown")
        return Contents(
            self.folder,
            "deepspeed",
            self.tensors,
            foreign=tuple(self.foreign),
            notes=tuple(notes),
            kinds=self.kinds,
            trained=self.trained,
            unseen=(*left_out, *beside),
            hidden=tuple(self.hidden),
        )


class _Row:
    """The parts of several ranks in a row. Each tensor is in few of them, which are found by bisection."""

    def __init__(self, parts: Sequence[Storage]) -> None:
        self._parts = parts
        self._ends = list(accumulate(part.nbytes for part in parts))

    def part(self, start: int, nbytes: int) -> Storage:
        found = []
        number = bisect_right(self._ends, start)
        while nbytes:
            inside = start - (self._ends[number - 1] if number else 0)
            count = min(nbytes, self._parts[number].nbytes - inside)
            if count:
                found.append(self._parts[number].part(inside, count))
            start, nbytes, number = start + count, nbytes - count, number + 1
        return _joined(found) if found else self._parts[0].part(0, 0)


def _joined(parts: Sequence[Storage]) -> Storage:
    return parts[0] if len(parts) == 1 else JoinedSpan(tuple(parts))


def _bytes_of(entry: TensorEntry) -> Storage:
    """Return the bytes of a row-major tensor alone, without those around it in its storage."""
    item = ITEM_BYTES[entry.dtype]
    return entry.storage.part(entry.offset * item, prod(entry.shape) * item)


def _row_major(shape: Shape, dtype: str, storage: Storage) -> TensorEntry:
    return TensorEntry(shape, dtype, shapes.row_major(shape), 0, storage)


def _shape(path: Path, name: Any, value: Any) -> Shape:
    try:
        return shapes.shape(sizes_in(value), f"{path}: {brief_repr(name)}")
    except (ValueError, TypeError) as error:
        raise _damaged(path, f"the shape of {brief_repr(name)} is wrong: {error}") from None


def _dict(path: Path, value: Any, what: str) -> dict[Any, Any]:
    return value if isinstance(value, dict) else _not_a(path, what, "dict")


def _list(path: Path, value: Any, what: str) -> list[Any]:
    return value if isinstance(value, list) else _not_a(path, what, "list")


def _pairs(path: Path, value: Any) -> list[tuple[Any, Any]]:
    """Return the pairs of names in `shared_params` as DeepSpeed before 0.9 wrote them; none where there is nothing."""
    pairs = [] if value is None else _list(path, value, "shared_params")
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise _damaged(path, "shared_params should consist of pairs of names")
    return [(pair[0], pair[1]) for pair in pairs]


def _not_a(path: Path, what: str, kind: str) -> NoReturn:
    raise _damaged(path, f"{what} should be a {kind}")


def _damaged(path: Path, what: str) -> FileFormatError:
    return FileFormatError.damaged(str(path), what)
