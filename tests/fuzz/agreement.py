"""Compare modelcli's readers with torch's and safetensors': files that both accept must give the same tensors.

The oracles are `torch.load(weights_only=True)`; `torch.load` with Python's own unpickler, which finds the names that
torch allows and no other, for the opcodes that torch's own does not know; and `safetensors.torch.load_file`. Each runs
in a child process with a limit on its memory and on the time of one input: where one of them crashes or has no end, it
has refused the input.
"""

from __future__ import annotations

import contextlib
import io
import math
import mmap
import os
import pickle
import random
import signal
import struct
import sys
import tempfile
import traceback
import types
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from modelcli import checkpoints
from modelcli.checkpoints import CompositeEntry, Contents, TensorEntry
from modelcli.errors import ModelcliError
from modelcli.live import composites, loading
from tests.fuzz import growing

#: How long one input may take, in seconds, and how much memory a child may take on top of what it has.
SECONDS = 5
MEMORY = 2 << 30
#: Stands for a reader while an input is made.
_NOBODY = -1
#: Tensors of more elements are compared by what they view, not element by element: a view may repeat one number.
MOST_ELEMENTS = 4096


@dataclass
class Outcome:
    """The number of inputs, how many of them both readers accepted, and those on which they differ."""

    inputs: int = 0
    both: int = 0
    crashes: int = 0
    faults: list[str] = field(default_factory=list)


# --- the oracles ---------------------------------------------------------------------------------------------------


def _allowed() -> Mapping[str, Any]:
    return torch._weights_only_unpickler._get_allowed_globals()


class _Unpickler(pickle.Unpickler):
    """Python's own, which finds nothing but what torch allows."""

    def find_class(self, module: str, name: str, /) -> Any:
        try:
            return _allowed()[f"{module}.{name}"]
        except KeyError:
            raise pickle.UnpicklingError(f"Unsupported global: {module}.{name}") from None


def _load(file: Any, **options: Any) -> Any:
    return _Unpickler(file, **options).load()


_PYTHON = types.ModuleType("python_unpickler")
_PYTHON.__dict__.update(Unpickler=_Unpickler, load=_load)


def by_torch(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def by_python(path: Path) -> Any:
    return torch.load(path, weights_only=False, pickle_module=_PYTHON)


def by_safetensors(path: Path) -> Any:
    import safetensors.torch

    return safetensors.torch.load_file(path)


@dataclass(frozen=True)
class Format:
    """A format: how its inputs are made, its other readers, and how many inputs are worth their time."""

    name: str
    made: Callable[[random.Random], bytes]
    oracles: tuple[Callable[[Path], Any], ...]
    suffix: str = ".pth"


def every() -> list[Format]:
    """Return all formats with ways to make inputs for them."""
    pickled = (by_torch, by_python)
    return [
        Format("zip, its pickle grown", growing.archives_of_grown_pickles(), pickled),
        Format("zip, its pickle by tokens", growing.archives_of_tokens(), pickled),
        Format("zip, by bytes", growing.archives_by_bytes(), (by_torch,)),
        Format("before 1.6, grown", growing.legacies_grown(), pickled),
        Format("before 1.6, by tokens", growing.legacies_of_tokens(), pickled),
        Format("before 1.6, by bytes", growing.legacies_by_bytes(), (by_torch,)),
        Format("tar and others at once", growing.tars(), pickled),
        Format("safetensors, by fields", growing.safetensors_by_fields(), (by_safetensors,), ".safetensors"),
        Format("safetensors, by bytes", growing.safetensors_by_bytes(), (by_safetensors,), ".safetensors"),
    ]


# --- the comparison ------------------------------------------------------------------------------------------------


class Disagreement(Exception):  # noqa: N818  an answer, and no error
    """The two readers read different things from the same file."""


def _require(same: bool, what: str) -> None:
    if not same:
        raise Disagreement(what)


def compare(contents: Contents, wanted: Any) -> None:
    """Raise Disagreement if modelcli shows something else than another reader loaded."""
    for key in contents.key or ():
        wanted = wanted[key]
    _require(isinstance(wanted, Mapping), f"a state dict is a {type(wanted).__name__}")
    told = {*contents.unseen, *contents.hidden}
    true: dict[Any, Any] = {}
    for name, value in wanted.items():
        if isinstance(value, torch.Tensor):
            _require(name in contents.tensors or name in contents.unseen, f"{name!r} has no row")
            true[name] = value
            continue
        reached = dict(_reached(name, value))
        true |= reached
        if name not in told:
            missing = _count(value) - len(reached) or len(reached.keys() - contents.inner.keys())
            _require(not missing, f"tensors in {name!r} are not told of")
    mapped = loading.mapped(replace(contents, tensors=contents.rows)).tensors
    for name, entry in contents.rows.items():
        _require(isinstance(true.get(name), torch.Tensor), f"{name!r} is no tensor")
        if isinstance(entry, TensorEntry):
            _compare_plain(name, entry, mapped[name], true[name])
        else:
            _compare_composite(name, entry, true[name])


def _reached(name: str, value: Any, depth: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors in a value, each with the path by which Python reaches it."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif depth <= 50 and type(value) in (dict, OrderedDict):
        for key, item in value.items():
            if isinstance(key, str | int):
                yield from _reached(f"{name}[{key!r}]", item, depth + 1)
    elif depth <= 50 and type(value) in (list, tuple):
        for index, item in enumerate(value):
            yield from _reached(f"{name}[{index}]", item, depth + 1)


def _count(value: Any, depth: int = 0) -> int:
    """Return how many tensors a value contains, counting repetitions."""
    if isinstance(value, torch.Tensor):
        return 1
    if depth > 50:
        return 0
    if isinstance(value, Mapping):
        return sum(_count(item, depth + 1) for pair in value.items() for item in pair)
    return sum(_count(item, depth + 1) for item in value) if isinstance(value, list | tuple | set) else 0


def _compare_plain(name: str, entry: TensorEntry, found: torch.Tensor, wanted: torch.Tensor) -> None:
    _require(not wanted.is_meta and wanted.layout == torch.strided, f"{name!r} is {wanted.layout} on {wanted.device}")
    shown = (found.dtype, tuple(found.shape), found.stride())
    true = (wanted.dtype, tuple(wanted.shape), wanted.stride())
    _require(shown == true, f"{name!r} is {shown} and should be {true}")
    _require(not entry.requires_grad or wanted.requires_grad, f"{name!r} is trained")
    _require(entry.is_parameter == isinstance(wanted, torch.nn.Parameter), f"{name!r}: a parameter or none")
    _require(not entry.is_parameter or entry.requires_grad == wanted.requires_grad, f"{name!r}: its flag")
    _require(_raw(found) == _raw(wanted), f"{name!r} has other values")


def _raw(tensor: torch.Tensor) -> bytes:
    """Return the bytes of a tensor's elements."""
    tensor = tensor.detach()
    if not tensor.numel():
        return b""
    if tensor.numel() > MOST_ELEMENTS:
        last = 1 + sum((size - 1) * step for size, step in zip(tensor.size(), tensor.stride(), strict=True))
        tensor = tensor.as_strided((min(last, MOST_ELEMENTS),), (1,))
    tensor = tensor.resolve_conj().resolve_neg()
    try:
        copy = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
    except NotImplementedError:  # torch has the dtype, and nothing that it could do with it
        return b""
    return bytes(copy.reshape(-1).view(torch.uint8).tolist())


def _compare_composite(name: str, entry: CompositeEntry, wanted: torch.Tensor) -> None:
    layout = str(wanted.layout).removeprefix("torch.")
    shown = (entry.dtype, entry.shape, entry.layout)
    true = (str(wanted.dtype).removeprefix("torch."), tuple(wanted.shape), layout)
    _require(shown == true, f"{name!r} is {shown} and should be {true}")
    _require(entry.is_parameter == isinstance(wanted, torch.nn.Parameter), f"{name!r}: a parameter or none")
    if wanted.is_meta:
        _require(not entry.parts, f"{name!r} has no values")
        return
    found, wanted = composites.real(name, entry), wanted.detach()
    if wanted.is_quantized:
        _compare_quantized(name, found, wanted)
        return
    for part, other in zip(composites.components(found), composites.components(wanted), strict=True):
        same = (part.dtype, part.shape) == (other.dtype, other.shape) and _raw(part) == _raw(other)
        _require(same, f"a part of {name!r} is another")


def _compare_quantized(name: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
    _require(found.qscheme() == wanted.qscheme(), f"{name!r} is of another scheme")
    _require(found.stride() == wanted.stride(), f"{name!r} has another stride")
    if wanted.numel() <= MOST_ELEMENTS and found.dtype not in (torch.quint4x2, torch.quint2x4):
        _require(_raw(found.int_repr()) == _raw(wanted.int_repr()), f"{name!r} has other values")
    if wanted.qscheme() == torch.per_tensor_affine:
        shown, true = (found.q_scale(), found.q_zero_point()), (wanted.q_scale(), wanted.q_zero_point())
        _require(shown == true or math.isnan(true[0]), f"{name!r} has the scale {shown} and should have {true}")
        return
    _require(found.q_per_channel_axis() == wanted.q_per_channel_axis(), f"{name!r} has another axis")
    for what in ("q_per_channel_scales", "q_per_channel_zero_points"):
        _require(_raw(getattr(found, what)()) == _raw(getattr(wanted, what)()), f"{name!r} has other {what}")


# --- the loop ------------------------------------------------------------------------------------------------------


class Board:
    """Shared memory in which a child notes its input, the reader and counts, so that they survive its death."""

    _FIELDS = struct.Struct("<4q")

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, self._FIELDS.size)

    def write(self, number: int, reader: int, both: int, inputs: int) -> None:
        self._FIELDS.pack_into(self.memory, 0, number, reader, both, inputs)

    def read(self) -> tuple[int, int, int, int]:
        return self._FIELDS.unpack_from(self.memory, 0)  # type: ignore[return-value]


def one(form: Format, data: bytes, path: Path, watch: Callable[[int], None] = lambda _reader: None) -> bool:
    """Read one input with all readers. Returns whether modelcli and another accepted it. Raises Disagreement."""
    path.write_bytes(data)
    watch(0)
    try:
        contents = checkpoints.read(path)
    except ModelcliError:
        return False
    took = False
    for number, oracle in enumerate(form.oracles, 1):
        watch(number)
        try:
            wanted = oracle(path)
        except MemoryError:
            continue
        except Exception as error:
            # Python's own takes the names of Python 2 in files of its protocols alone.
            hidden = "Unsupported global" in str(error) and "__builtin__" not in str(error)
            _require(not hidden or bool(contents.foreign), f"a name that torch refuses is not foreign: {error!s:.200}")
            continue
        watch(0)
        try:
            compare(contents, wanted)
        except ModelcliError:  # the values of one tensor are refused
            continue
        took = True
    return took


def _child(form: Format, numbers: range, seed: int, folder: Path, board: Board, pipe: int) -> None:
    """Run some inputs, and write each fault to a pipe."""
    import resource  # not on Windows

    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, 4 * SECONDS)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)
    path = folder / f"made-{os.getpid()}{form.suffix}"
    both = 0
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        for done, number in enumerate(numbers):
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            board.write(number, _NOBODY, both, done)
            data = form.made(random.Random(f"{form.name} {seed} {number}"))
            counts = (both, done)
            try:
                both += one(form, data, path, lambda reader: board.write(number, reader, *counts))  # noqa: B023
            except Disagreement as what:
                _tell(pipe, f"{number}: {what} for {data!r}")
            except Exception:
                _tell(pipe, f"{number}: {' / '.join(traceback.format_exc().splitlines()[-5:])} for {data!r}")
            board.write(number + 1, _NOBODY, both, done + 1)
    signal.setitimer(signal.ITIMER_REAL, 0)
    path.unlink(missing_ok=True)


def _tell(pipe: int, text: str) -> None:
    data = text.encode("utf-8", "replace")[:100_000]
    os.write(pipe, struct.pack("<I", len(data)) + data)


def run(form: Format, inputs: int, seed: int, *, first: int = 0, most_faults: int = 20) -> Outcome:
    """Run inputs of a format, starting with number `first`. If a child process dies, another continues."""
    outcome = Outcome()
    following, end = first, first + inputs
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        while following < end and len(outcome.faults) < most_faults and outcome.crashes < inputs:
            board = Board()
            board.write(following, _NOBODY, 0, 0)
            reading, writing = os.pipe()
            child = os.fork()
            if not child:
                os.close(reading)
                code = 1
                try:
                    _child(form, range(following, end), seed, Path(folder), board, writing)
                    code = 0
                finally:
                    os._exit(code)
            os.close(writing)
            for text in _told(reading):
                outcome.faults.append(f"{form.name}: {text}")
                if len(outcome.faults) >= most_faults:
                    os.kill(child, signal.SIGKILL)
                    break
            os.close(reading)
            _, status = os.waitpid(child, 0)
            number, reader, both, done = board.read()
            outcome.both += both
            outcome.inputs += done
            following = end
            if status:
                outcome.crashes += 1
                # A child may also hang where it begins, as forks of processes with threads do: it is made again.
                following = number if reader == _NOBODY else number + 1
                outcome.inputs += reader != _NOBODY
                if reader == 0 and len(outcome.faults) < most_faults:
                    outcome.faults.append(f"{form.name}: {number}: modelcli's reader ended with status {status}")
    return outcome


def _told(pipe: int) -> Iterator[str]:
    with os.fdopen(os.dup(pipe), "rb") as stream:
        while head := stream.read(4):
            yield stream.read(struct.unpack("<I", head)[0]).decode("utf-8", "replace")


def main(inputs: int, seed: int, words: Sequence[str] = ()) -> int:
    """Divide the inputs among the formats whose names contain all these words, and run them. Returns 1 for any fault.

    Alone: `python -m tests.fuzz.agreement INPUTS SEED [WORD...]`.
    """
    forms = [form for form in every() if all(word in form.name for word in words)]
    broken = 0
    for form in forms:
        outcome = run(form, inputs // len(forms), seed)
        print(
            f"{form.name:26} {outcome.inputs:>10,} inputs {outcome.both:>9,} taken by both and the same, "
            f"{outcome.crashes:,} crashes or hangs of another reader, {len(outcome.faults)} faults",
            flush=True,
        )
        for fault in outcome.faults[:12]:
            print(f"    {fault[: int(os.environ.get('SHOWN', '400'))]}", flush=True)
        broken += len(outcome.faults)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
