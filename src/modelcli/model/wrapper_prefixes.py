"""Names that wrappers put into the keys of a state dict: DataParallel, FSDP, torch.compile, Lightning and others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from modelcli.model.paths import parent_of
from modelcli.model.tensors import Shape
from modelcli.wording import listed

#: Attributes in which a wrapper keeps the module that it wraps, wherever in a model that is: DataParallel, DDP and
#: AveragedModel (`module`), torch.compile, FSDP, activation checkpointing, Lightning's Fabric, Opacus.
MARKERS = (
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_forward_module",
    "_module",
)
#: Attributes in which people keep a model inside a LightningModule or a model of their own, at the front of a key.
ATTRIBUTES = ("model", "net", "network", "backbone")
#: AveragedModel's count of the averages that it took, a buffer beside `module`.
AVERAGED = "n_averaged"

#: The names of tensors, each with its shape, or None where it has none.
Keys = Mapping[str, Shape | None]


@dataclass(frozen=True)
class Unwrapping:
    """What is taken out of the keys of a file to get those of an architecture.

    `markers` are components of a path that are removed wherever they stand, then `prefix` is removed from the front.
    `dropped` are keys of a wrapper's own, which no wrapped model has. `everywhere` says that every other key changes
    by `prefix` alone. `elsewhere` are prefixes below which some of the architecture's tensors stand, where none is
    removed because nothing says which is meant.
    """

    prefix: str = ""
    markers: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    everywhere: bool = True
    elsewhere: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.prefix or self.markers)

    def key(self, key: str) -> str:
        """A key of the file as the architecture has it."""
        return without(key, self.markers).removeprefix(self.prefix)

    def path(self, path: str) -> str | None:
        """The path of a module in the file as the architecture has it; None for what lies outside of it."""
        path = without(path, self.markers)
        if not self.prefix:
            return path
        if f"{path}." == self.prefix:
            return ""
        return path.removeprefix(self.prefix) if path.startswith(self.prefix) else None

    @property
    def parts(self) -> tuple[str, ...]:
        """What is removed, for messages."""
        return (*self.markers, self.prefix) if self.prefix else self.markers

    def note(self) -> str:
        """What to tell of it, once it is done."""
        parts = [repr(part) for part in self.parts]
        if self.everywhere and not self.markers:
            told = f"stripped {self.prefix!r} from every key"
        else:
            told = f"stripped {listed(parts, 6)} from the keys"
        them = "it" if len(parts) == 1 else "them"
        told += f": a wrapper had put {them} there"
        if self.dropped:
            told += f"; {listed(list(self.dropped), 3)} counts its averages, and was left out"
        return told


def without(key: str, markers: Iterable[str]) -> str:
    """A key, or the path of a module, without some components: `layer._orig_mod.weight` as `layer.weight`."""
    for marker in markers:
        if marker in key:
            key = ".".join(part for part in key.split(".") if part != marker)
    return key


def fit(found: Keys, own: Keys) -> Unwrapping:
    """What has to be taken out of a file's keys so that as many as can be are those of an architecture.

    Nothing is removed that the architecture's own names have too, and nothing that does not bring more keys together.
    """
    if all(key in own for key in found):
        return Unwrapping()
    used = _components(own)
    markers = tuple(sorted((_components(found) - used) & set(MARKERS), key=MARKERS.index))
    bare = {key: without(key, markers) for key in found}
    if len(set(bare.values())) < len(bare):
        markers, bare = (), {key: key for key in found}
    prefix, elsewhere = _prefix({name: found[key] for key, name in bare.items()}, own)
    names = {key: name.removeprefix(prefix) for key, name in bare.items()}
    if len(set(names.values())) < len(names):
        prefix, names = "", bare
    if sum(name in own for name in names.values()) <= sum(key in own for key in found):
        return Unwrapping(elsewhere=elsewhere)
    dropped = tuple(key for key in _counts(found) if names[key] not in own)
    return _plain(Unwrapping(prefix, markers, dropped, elsewhere=elsewhere), names)


def known(names: Iterable[str]) -> Unwrapping:
    """The same where no architecture is known: what wrappers alone use, and what all keys begin with."""
    keys = list(names)
    markers = tuple(sorted(_components(keys) & set(MARKERS), key=MARKERS.index))
    bare = {key: without(key, markers) for key in keys}
    if len(set(bare.values())) < len(bare):
        markers, bare = (), {key: key for key in keys}
    dropped = _counts(keys)
    left = [name for key, name in bare.items() if key not in dropped]
    prefix = ""
    while left:
        found = next((a for a in ATTRIBUTES if all(name.startswith(f"{prefix}{a}.") for name in left)), None)
        if found is None:
            break
        prefix += f"{found}."
    if not (prefix or markers):
        return Unwrapping()
    return _plain(Unwrapping(prefix, markers, dropped), {key: name.removeprefix(prefix) for key, name in bare.items()})


def _plain(found: Unwrapping, names: Mapping[str, str]) -> Unwrapping:
    """The same as one prefix, where that is all that it comes to for every key."""
    kept = [key for key in names if key not in found.dropped]
    fronts = {key.removesuffix(names[key]) if key.endswith(names[key]) else None for key in kept}
    if len(fronts) == 1 and (front := fronts.pop()) is not None:
        return Unwrapping(front, (), found.dropped, elsewhere=found.elsewhere)
    return Unwrapping(found.prefix, found.markers, found.dropped, everywhere=False, elsewhere=found.elsewhere)


def _prefix(found: Keys, own: Keys) -> tuple[str, tuple[str, ...]]:
    """The prefix below which most of an architecture's names stand in a file; else all below which some do, with their
    shapes, those of the most first.

    It has to be that of half of the keys, shapes included, or be made of `ATTRIBUTES` and `MARKERS`: layers of one
    type have the same names.
    """
    votes: Counter[str] = Counter()
    alike: Counter[str] = Counter()
    for name, shape in found.items():
        for prefix, rest in _cuts(name):
            if rest in own:
                votes[prefix] += 1
                alike[prefix] += own[rest] == shape
    elsewhere = tuple(prefix for prefix, count in alike.most_common() if prefix and count)
    most = max(votes.values(), default=0)
    best = [prefix for prefix, count in votes.items() if count == most]
    if "" not in best:
        nearest = max((alike[prefix] for prefix in best), default=0)
        best = [prefix for prefix in best if alike[prefix] == nearest]
        best = [prefix for prefix in best if _is_usual(prefix)] or best
        if len(best) == 1:
            prefix = best[0]
            needed = min(len(found), len(own)) if _is_usual(prefix) else max(len(found), len(own))
            if 2 * (most if _is_usual(prefix) else alike[prefix]) >= needed:
                return prefix, ()
    return "", elsewhere


def _is_usual(prefix: str) -> bool:
    return all(part in ATTRIBUTES or part in MARKERS for part in prefix.removesuffix(".").split("."))


def _cuts(name: str) -> Iterator[tuple[str, str]]:
    """The ways to cut a name into a prefix and the rest, the whole first."""
    place = 0
    yield "", name
    while (place := name.find(".", place) + 1) > 0:
        yield name[:place], name[place:]


def _counts(keys: Iterable[str]) -> tuple[str, ...]:
    """The keys that are AveragedModel's own count: beside a child `module`."""
    keys = list(keys)
    found = [key for key in keys if key.rpartition(".")[2] == AVERAGED]
    if not found:
        return ()
    wrapping = {
        ".".join(parts[:place])
        for parts in (key.split(".") for key in keys)
        for place, part in enumerate(parts)
        if part == "module"
    }
    return tuple(key for key in found if parent_of(key) in wrapping)


def _components(names: Iterable[str]) -> set[str]:
    return {part for name in names for part in name.split(".")[:-1]}
