"""Files read by modelcli equal torch's tensors in memory, for every torchvision builder and generated state dicts."""

from __future__ import annotations

import itertools
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from modelcli import checkpoints, writing
from modelcli.checkpoints import CompositeEntry, Contents, TensorEntry
from modelcli.checkpoints import record as records
from modelcli.commands.editable import open_editable
from modelcli.language.references import Source
from modelcli.live import composites, loading
from modelcli.live.opening import open_live
from modelcli.live.providers import torchvision as builders
from modelcli.live.sources import Value
from modelcli.model.dtypes import ITEM_BYTES
from modelcli.writing import Plan
from tests.checkpoints.test_checkpoints import saved, tensor_of
from tests.sampling import sampled
from tests.writing.test_writing import planned

#: Warnings of torch about quantized, sparse and unusual tensors.
QUIET = [
    pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions"),
    pytest.mark.filterwarnings("ignore:Validating sparse tensor"),
    pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta"),
    pytest.mark.filterwarnings("ignore:B?Complex(Half|32) support is experimental"),
    pytest.mark.filterwarnings("ignore:Detected pickle protocol"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),  # torch's own use of it, for quantized tensors
]

pytestmark = QUIET

NAMES = builders.builder_names()
FLOAT32_BYTES = {name: 4 * builders.describe(name).params for name in NAMES}
SMALL, MEDIUM = 20_000_000, 100_000_000


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def partition(storages: Mapping[str, object]) -> set[frozenset[str]]:
    """Return the groups of names that share a storage."""
    groups: dict[object, set[str]] = defaultdict(set)
    for name, storage in storages.items():
        groups[storage].add(name)
    return {frozenset(names) for names in groups.values()}


def view_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), dtype_name(tensor.dtype), tensor.stride(), tensor.storage_offset()


def ties_of(state: Mapping[str, torch.Tensor]) -> dict[str, str | None]:
    """Return, for each name, the first name of the same view of the same storage; None for that first name."""
    first: dict[object, str] = {}
    ties: dict[str, str | None] = {}
    for name, tensor in state.items():
        storage = tensor.untyped_storage()
        original = first.setdefault((storage._cdata, view_of(tensor)), name) if storage.nbytes() else name
        ties[name] = None if original == name else original
    return ties


def assert_described(contents: Contents, state: Mapping[str, torch.Tensor], *, strides: bool = True) -> None:
    """Require that a file's blueprint equals the state dict: names in order, shapes, dtypes, views, ties, sizes."""
    tensors = contents.bare_blueprint().tensors
    assert [tensor.name for tensor in tensors] == list(state)
    assert [(tensor.shape, tensor.dtype) for tensor in tensors] == [view_of(t)[:2] for t in state.values()]
    assert [tensor.elements for tensor in tensors] == [tensor.numel() for tensor in state.values()]
    assert [tensor.nbytes for tensor in tensors] == [tensor.nbytes for tensor in state.values()]
    entries = {name: entry for name, entry in contents.tensors.items() if isinstance(entry, TensorEntry)}
    assert {name: (e.shape, e.dtype, e.stride, e.offset) for name, e in entries.items()} == {
        name: view_of(tensor if strides else tensor.contiguous()) for name, tensor in state.items()
    }
    if strides:
        assert {tensor.name: tensor.tied_to for tensor in tensors} == ties_of(state)
        full = {name: tensor.untyped_storage() for name, tensor in state.items() if tensor.untyped_storage().nbytes()}
        assert partition({name: entries[name].storage for name in full}) == partition(
            {name: storage._cdata for name, storage in full.items()}
        )


# --- every builder -------------------------------------------------------------------------------------------------


def state_dict_without_numbers(name: str) -> dict[str, torch.Tensor]:
    """Return a builder's state dict with storages that are never written, so that they take no memory."""
    storages: dict[int, torch.UntypedStorage] = {}
    state = {}
    for key, tensor in open_live(Source(name)).module.state_dict().items():
        meta = tensor.untyped_storage()
        if meta._cdata not in storages:
            storages[meta._cdata] = torch.UntypedStorage(meta.nbytes())
        empty = torch.empty(0, dtype=tensor.dtype)
        state[key] = empty.set_(storages[meta._cdata], tensor.storage_offset(), tensor.size(), tensor.stride())
    return state


@pytest.mark.parametrize("name", sampled(NAMES, one_in=7))
def test_every_builder(tmp_path: Path, name: str) -> None:
    """`torch.save` leaves holes for the bytes, so that a file of 2.5 GB takes only its header on the disk."""
    state = state_dict_without_numbers(name)
    with torch.serialization.skip_data():
        path = saved(tmp_path / "m.pth", state)
    assert_described(checkpoints.read(path), state)
    path.unlink()


@pytest.mark.parametrize(
    "name",
    sampled(sorted((name for name, size in FLOAT32_BYTES.items() if size <= MEDIUM), key=FLOAT32_BYTES.__getitem__), 5),
)
def test_builders_in_formats_whose_bytes_are_written(tmp_path: Path, name: str) -> None:
    """torch's old format and safetensors, for builders up to 100 MB, because these formats cannot have holes."""
    state = state_dict_without_numbers(name)
    path = tmp_path / "m.pth"
    assert_described(checkpoints.read(saved(path, state, _use_new_zipfile_serialization=False)), state)
    safetensors.torch.save_file(state, path)
    contents = checkpoints.read(path)
    assert_described(Contents(path, contents.format, {key: contents.tensors[key] for key in state}), state)
    path.unlink()


# --- dtypes --------------------------------------------------------------------------------------------------------

ALL_DTYPES = {dtype_name(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
#: dtypes that torch has names for, but no storage.
UNSAVED = {f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)}
QUANTIZED = ("qint8", "quint8", "qint32", "quint4x2", "quint2x4")
PLAIN = tuple(sorted(ALL_DTYPES.keys() - UNSAVED - set(QUANTIZED)))
#: dtypes that torch can read from its own old format.
TYPED = tuple(name for name in PLAIN if ALL_DTYPES[name] in torch.storage._dtype_to_storage_type_map())
#: dtypes that safetensors' `save_file` writes and its reader returns.
IN_SAFETENSORS = tuple(name for name in PLAIN if ALL_DTYPES[name] in safetensors.torch._SIZE)


def test_the_size_of_every_dtype_is_torch_s() -> None:
    assert {name: ITEM_BYTES[name] for name in ALL_DTYPES} == {n: dtype.itemsize for n, dtype in ALL_DTYPES.items()}


@pytest.mark.parametrize("name", sorted(UNSAVED))
def test_dtypes_that_torch_cannot_save(tmp_path: Path, name: str) -> None:
    with pytest.raises(KeyError, match="is not recognized"):
        saved(tmp_path / "m.pth", {"w": torch.empty(2, dtype=ALL_DTYPES[name])})


@pytest.mark.parametrize("name", PLAIN)
def test_every_dtype_that_torch_saves(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path / "m.pth", {"w": tensor_of(name, 2, 3)})
    wanted = torch.load(path, weights_only=True)
    assert_described(checkpoints.read(path), wanted)
    assert_bytes(loading.mapped(checkpoints.read(path)).tensors, wanted)


# --- generated state dicts -----------------------------------------------------------------------------------------

COUNTER = itertools.count()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A new path for each example, with a suffix."""
    folder = tmp_path_factory.mktemp("generated")
    return lambda suffix: folder / f"{next(COUNTER)}{suffix}"


@st.composite
def views(draw: st.DrawFn, base: torch.Tensor) -> torch.Tensor:
    """Draw a view of a tensor's storage with any offset, shape and strides inside it."""
    room = base.untyped_storage().nbytes() // base.element_size()
    offset = draw(st.integers(0, room))
    left, shape, stride = room - offset - 1, [], []
    for _ in range(draw(st.integers(0, 3))):
        step = draw(st.integers(0, 4))
        most = 3 if step == 0 else min(3, left // step + 1)
        size = draw(st.integers(0, max(most, 0)))
        left -= max(size - 1, 0) * step
        shape.append(size)
        stride.append(step)
    if left < 0 and 0 not in shape:
        shape, stride = [0, *shape], [1, *stride]
    return torch.empty(0, dtype=base.dtype).set_(base.untyped_storage(), offset, shape, stride)


@st.composite
def plain_tensors(draw: st.DrawFn, dtypes: tuple[str, ...]) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 3), max_size=4))
    tensor = tensor_of(draw(st.sampled_from(dtypes)), *shape)
    kind = draw(st.sampled_from(("whole", "view", "transposed", "every other", "expanded")))
    if kind == "view":
        return draw(views(tensor))
    if kind == "transposed" and tensor.dim() > 1:
        return tensor.transpose(0, -1)
    if kind == "every other" and tensor.dim():
        return tensor[1::2]
    if kind == "expanded":
        return tensor.expand(2, *tensor.shape)
    return tensor


@st.composite
def quantized_tensors(draw: st.DrawFn, dtypes: tuple[str, ...] = QUANTIZED[:4]) -> torch.Tensor:
    dtype = draw(st.sampled_from(dtypes))
    rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    numbers = torch.arange(float(rows * columns)).reshape(rows, columns)
    scales = torch.arange(1.0, rows + 1)
    if dtype == "quint4x2":
        return torch.quantize_per_channel(numbers, scales, scales, 0, torch.quint4x2)
    if draw(st.booleans()):
        whole = torch.quantize_per_tensor(numbers, 0.5, draw(st.integers(0, 5)), ALL_DTYPES[dtype])
        return draw(st.sampled_from((whole, whole.t(), whole[1:], whole[:, 0])))
    return torch.quantize_per_channel(numbers, scales.double(), torch.arange(rows), 0, ALL_DTYPES[dtype])


@st.composite
def sparse_tensors(draw: st.DrawFn) -> torch.Tensor:
    rows, columns = 2 * draw(st.integers(1, 2)), 2 * draw(st.integers(1, 2))
    dtype = ALL_DTYPES[draw(st.sampled_from(("float32", "float64", "float16", "bfloat16", "complex64", "int64")))]
    chosen = draw(st.lists(st.integers(0, rows * columns - 1), max_size=5))
    kind = draw(st.sampled_from(("twice", "coo", "hybrid", "csr", "csc", "bsr", "bsc")))
    if kind == "twice":  # not coalesced: the same index may occur twice
        places = torch.tensor([[place // columns, place % columns] for place in chosen]).reshape(-1, 2).t()
        return torch.sparse_coo_tensor(
            places, torch.ones(len(chosen), dtype=dtype), (rows, columns), check_invariants=True
        )
    dense = torch.zeros(rows * columns, dtype=dtype)
    dense[chosen] = torch.arange(1, len(chosen) + 1).to(dtype)
    dense = dense.reshape(rows, columns)
    if kind in ("bsr", "bsc"):
        return getattr(dense, f"to_sparse_{kind}")((2, 2))
    return {
        "coo": dense.to_sparse,
        "hybrid": lambda: dense.to_sparse(1),
        "csr": dense.to_sparse_csr,
        "csc": dense.to_sparse_csc,
    }[kind]()


@st.composite
def state_dicts(
    draw: st.DrawFn, dtypes: tuple[str, ...] = PLAIN, *, only_plain: bool = False, parameters: bool = True
) -> OrderedDict[str, torch.Tensor]:
    """Draw a state dict of all kinds of tensors and names; some tensors are tied to others, or views of them."""
    words = st.sampled_from(
        ("weight", "bias", "0", "1", "running_mean", "layer", "", "é中", "\x1b[31m", "\n", "\u202e")
    )
    names = st.lists(words, min_size=1, max_size=4).map(".".join) | st.text(max_size=6)
    state: OrderedDict[str, torch.Tensor] = OrderedDict()
    for name in draw(st.lists(names, min_size=1, max_size=6, unique=True)):
        kind = draw(st.sampled_from(("plain", "plain", "tied", "view") if only_plain else KINDS))
        others = [tensor for tensor in state.values() if is_plain(tensor)]
        if kind == "quantized":
            tensor = draw(quantized_tensors())
        elif kind == "sparse":
            tensor = draw(sparse_tensors())
        elif kind == "plain" or not others:
            tensor = draw(plain_tensors(dtypes))
        else:
            tensor = draw(st.sampled_from(others))
            tensor = draw(views(tensor.detach())) if kind == "view" else tensor.detach()
        if parameters and draw(st.booleans()):
            trained = (tensor.is_floating_point() or tensor.is_complex()) and draw(st.booleans())
            tensor = nn.Parameter(tensor, requires_grad=trained)
        state[name] = tensor
    return state


KINDS = ("plain", "plain", "tied", "view", "quantized", "sparse")


def is_plain(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_quantized


def around(state: Mapping[str, torch.Tensor], how: str) -> tuple[Any, str | None]:
    """Return a training checkpoint around a state dict, and the key if modelcli needs one to find it."""
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    match how:
        case "state_dict" | "model":
            return {"epoch": 3, how: state, "optimizer": optimizer, "args": ["a", (1, None)]}, None
        case "deep":
            return {"runs": {"best.1": {"inner": state}, "last": [state, {}]}, "lr": 0.5}, "runs.best.1.inner"
    return state, None


def groups_of(state: Mapping[str, torch.Tensor]) -> set[frozenset[str]]:
    storages = {name: tensor.untyped_storage() for name, tensor in state.items()}
    return partition({name: storage._cdata for name, storage in storages.items() if storage.nbytes()})


def bytes_of(storage: torch.UntypedStorage) -> bytes:
    return bytes(storage.tolist())


def assert_bytes(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    """Require equal views of equal bytes, for dtypes that torch cannot compare too."""
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert view_of(found[name]) == view_of(tensor)
        assert bytes_of(found[name].untyped_storage()) == bytes_of(tensor.untyped_storage())


def assert_equal(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Require that two tensors of any kind are equal in every property and every bit."""
    assert type(found) is type(wanted)
    assert (found.dtype, found.shape, found.layout) == (wanted.dtype, wanted.shape, wanted.layout)
    found, wanted = found.detach(), wanted.detach()
    if wanted.layout == torch.sparse_coo:
        assert found.is_coalesced() == wanted.is_coalesced()
    if wanted.is_quantized:
        assert found.qscheme() == wanted.qscheme()
        assert found.stride() == wanted.stride()
        assert found.dequantize().equal(wanted.dequantize())
    elif wanted.layout == torch.strided:
        # safetensors stores the elements of a view; a .pth stores it as a view.
        assert bytes_shown(found) == bytes_shown(wanted)
    else:
        for ours, theirs in zip(composites.components(found), composites.components(wanted), strict=True):
            assert ours.equal(theirs)


def bytes_shown(tensor: torch.Tensor) -> bytes:
    """A tensor's bytes, row-major."""
    itemsize = tensor.dtype.itemsize
    data = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    shape, stride = (*tensor.shape, itemsize), (*(step * itemsize for step in tensor.stride()), 1)
    return bytes(data.as_strided(shape, stride, tensor.storage_offset() * itemsize).flatten().tolist())


def bytes_taken(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor, including the indices of a sparse and the scales of a quantized one."""
    tensor = tensor.detach()
    if tensor.layout == torch.sparse_coo:
        return tensor._indices().nbytes + tensor._values().nbytes
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices().nbytes + tensor.col_indices().nbytes + tensor.values().nbytes
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.ccol_indices().nbytes + tensor.row_indices().nbytes + tensor.values().nbytes
    nbytes = tensor.nbytes
    if tensor.dtype == torch.quint4x2:
        nbytes = tensor.shape[0] * ((tensor.shape[1] + 1) // 2)
    if tensor.is_quantized and tensor.qscheme() != torch.per_tensor_affine:
        nbytes += tensor.q_per_channel_scales().nbytes + tensor.q_per_channel_zero_points().nbytes
    return nbytes


def info_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    is_parameter = isinstance(tensor, nn.Parameter)
    return (
        *(tuple(tensor.shape), dtype_name(tensor.dtype), str(tensor.layout).removeprefix("torch.")),
        *(tensor.numel(), bytes_taken(tensor), tensor.requires_grad if is_parameter else None),
    )


def assert_read_as(contents: Contents, wanted: Mapping[str, torch.Tensor]) -> None:
    """Require that everything read from a file equals the result of `torch.load`."""
    infos = contents.infos()
    assert list(infos) == list(wanted)
    assert {
        name: (info.shape, info.dtype, info.layout, info.elements, info.nbytes, info.requires_grad)
        for name, info in infos.items()
    } == {name: info_of(tensor) for name, tensor in wanted.items()}
    assert all(info.kind == "parameter" for name, info in infos.items() if isinstance(wanted[name], nn.Parameter))
    assert [tensor.name for tensor in contents.bare_blueprint().tensors] == list(wanted)
    plain = {name: tensor for name, tensor in wanted.items() if is_plain(tensor)}
    entries = {name: entry for name, entry in contents.tensors.items() if isinstance(entry, TensorEntry)}
    assert list(entries) == list(plain)
    assert {name: info.tied_to for name, info in infos.items() if name in plain} == ties_of(plain)
    assert {name: entry.requires_grad for name, entry in entries.items()} == {
        name: tensor.requires_grad for name, tensor in plain.items()
    }
    assert partition({n: e.storage for n, e in entries.items() if e.storage.nbytes}) == groups_of(plain)
    for name, entry in entries.items():
        assert (entry.shape, entry.dtype, entry.stride, entry.offset) == view_of(plain[name])
        assert entry.storage.bytes() == bytes_of(plain[name].untyped_storage())
    assert_bytes(loading.mapped(contents).tensors, plain)
    for name, tensor in contents.tensors.items():
        if isinstance(tensor, CompositeEntry):
            assert_equal(composites.real(name, tensor), wanted[name])


LAYOUTS = st.sampled_from(("bare", "state_dict", "model", "deep"))


@given(state=state_dicts(), how=LAYOUTS, protocol=st.integers(2, 5))
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
def test_generated_state_dicts(
    place: Callable[[str], Path], state: dict[str, torch.Tensor], how: str, protocol: int
) -> None:
    assert_reads_as_torch(place(".pth"), state, how, pickle_protocol=protocol)


@given(state=state_dicts(TYPED), how=LAYOUTS, protocol=st.integers(2, 5))
@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
def test_generated_in_the_old_format(
    place: Callable[[str], Path], state: dict[str, torch.Tensor], how: str, protocol: int
) -> None:
    assert_reads_as_torch(place(".pth"), state, how, pickle_protocol=protocol, _use_new_zipfile_serialization=False)


def assert_reads_as_torch(path: Path, state: Mapping[str, torch.Tensor], how: str, **options: Any) -> None:
    tree, key = around(state, how)
    saved(path, tree, **options)
    # torch.load with weights_only reads only protocol 2; this file is trusted.
    loaded = torch.load(path, weights_only=options["pickle_protocol"] == 2, mmap=False)
    contents = checkpoints.read(path, key=key)
    wanted = loaded["runs"]["best.1"]["inner"] if how == "deep" else loaded if how == "bare" else loaded[how]
    assert_read_as(contents, wanted)
    assert contents.foreign == ()
    assert contents.extras == {}


@given(state=state_dicts(IN_SAFETENSORS, only_plain=True, parameters=False))
@settings(deadline=None, max_examples=100)
def test_generated_safetensors(place: Callable[[str], Path], state: dict[str, torch.Tensor]) -> None:
    """safetensors stores the elements of views and refuses shared storages, so each tensor is copied here."""
    path = place(".safetensors")
    own = {name: owned(tensor) for name, tensor in state.items() if not is_pair_without_dimension(tensor)}
    safetensors.torch.save_file(own, path)
    contents = checkpoints.read(path)
    assert contents.tensors.keys() == own.keys()
    with safetensors.safe_open(path, "pt") as reader:
        wanted = {name: reader.get_tensor(name) for name in contents.tensors}
    assert_described(contents, wanted, strides=False)
    for name, tensor in loading.mapped(contents).tensors.items():
        assert_equal(tensor, wanted[name])
        assert bytes_shown(tensor) == bytes_shown(own[name])


def owned(tensor: torch.Tensor) -> torch.Tensor:
    """Return a row-major copy with a storage of its own."""
    data = bytearray(bytes_shown(tensor))
    if not data:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    return torch.frombuffer(data, dtype=torch.uint8).view(tensor.dtype).reshape(tensor.shape)


def is_pair_without_dimension(tensor: torch.Tensor) -> bool:
    """safetensors counts both values of a `float4_e2m1fn_x2` element in the last dimension."""
    return dtype_name(tensor.dtype) == "float4_e2m1fn_x2" and not tensor.dim()


# --- what is written again -----------------------------------------------------------------------------------------


def written_again(source: Path, out: Path) -> Path:
    opened = open_editable(Source(model=str(source)))
    writing.write(opened.plan(out, writing.format_of(out)), out)
    return out


def assert_record_holds(contents: Contents) -> None:
    assert contents.record is not None
    assert records.disagreement(contents.record, contents.infos(), known_code=True) is None


@given(state=state_dicts(parameters=False))
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
def test_generated_and_written_again(place: Callable[[str], Path], state: dict[str, torch.Tensor]) -> None:
    """torch loads a bare checkpoint written by modelcli as the original, with quantized and sparse tensors."""
    source = saved(place(".pth"), state)
    out = written_again(source, place(".pth"))
    for mmap in (False, True):
        loaded = torch.load(out, weights_only=True, mmap=mmap)
        assert loaded.keys() == state.keys()
        for name, tensor in loaded.items():
            assert_equal(tensor, state[name])
        plain = {name: tensor for name, tensor in state.items() if is_plain(tensor)}
        assert groups_of({name: loaded[name] for name in plain}) == groups_of(plain)
        assert {name: view_of(loaded[name]) for name in plain} == {name: view_of(t) for name, t in plain.items()}
    contents = checkpoints.read(out)
    assert_record_holds(contents)
    assert_read_as(contents, torch.load(out, weights_only=True))


@given(tensor=quantized_tensors() | sparse_tensors())
@settings(deadline=None, max_examples=150)
def test_generated_quantized_and_sparse_tensors_of_a_live_model(
    place: Callable[[str], Path], tensor: torch.Tensor
) -> None:
    storages: dict[int, Value] = {}
    entry = composites.planned(tensor, lambda part: planned(part, storages))
    assert entry.stored_bytes == bytes_taken(tensor)
    path = place(".pth")
    writing.write(Plan({}, "{}", extras={"t": entry}), path)
    assert_equal(torch.load(path, weights_only=True)["t"], tensor)


@given(state=state_dicts(IN_SAFETENSORS, only_plain=True, parameters=False))
@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
def test_generated_and_written_as_safetensors(place: Callable[[str], Path], state: dict[str, torch.Tensor]) -> None:
    state = {name: tensor for name, tensor in state.items() if not is_pair_without_dimension(tensor)}
    out = written_again(saved(place(".pth"), {**state, "one": torch.ones(1)}), place(".safetensors"))
    contents = checkpoints.read(out)
    assert_record_holds(contents)
    assert contents.tensors.keys() == {*state, "one"}
    for name, tensor in loading.mapped(contents).tensors.items():
        assert name == "one" or bytes_shown(tensor) == bytes_shown(state[name])
    with safetensors.safe_open(out, "pt") as reader:
        for name in reader.keys():  # noqa: SIM118 - it is no dict
            assert name == "one" or bytes_shown(reader.get_tensor(name)) == bytes_shown(state[name])
