"""Remove the names that wrappers add to the keys of a state dict (DataParallel, FSDP, torch.compile, Lightning)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from modelcli.model.paths import parent_of
from modelcli.model.tensors import Shape
from modelcli.wording import listed

#: The attributes in which wrappers keep the wrapped module, anywhere in a model: DataParallel, DDP and AveragedModel
#: (`module`), torch.compile, FSDP, activation checkpointing, Lightning's Fabric, Opacus.
MARKERS = (
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_forward_module",
    "_module",
)
#: The attributes in which people keep a model inside a LightningModule or an own class; they start the keys.
ATTRIBUTES = ("model", "net", "network", "backbone")
#: The buffer beside `module` in which AveragedModel counts its averages.
AVERAGED = "n_averaged"

#: The names of tensors, each with its shape, or None if it has none.
Keys = Mapping[str, Shape | None]


@dataclass(frozen=True)
class Unwrapping:
    """The changes that turn the keys of a file into those of an architecture.

    Attributes:
        prefix: removed from the front of each key, after `markers`.
        markers: path components that are removed wherever they occur.
        dropped: the wrapper's own keys, which the wrapped model does not have.
        everywhere: whether removing `prefix` is the only change to every other key.
        elsewhere: the prefixes under which some tensors of the architecture exist, if none is removed because more
            than one is possible.
    """

    prefix: str = ""
    markers: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    everywhere: bool = True
    elsewhere: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.prefix or self.markers)

    def key(self, key: str) -> str:
        """Return the architecture's key for a key of the file."""
        return without(key, self.markers).removeprefix(self.prefix)

    def path(self, path: str) -> str | None:
        """Return the architecture's path for a module path of the file; None for a module outside the architecture."""
        path = without(path, self.markers)
        if not self.prefix:
            return path
        if f"{path}." == self.prefix:
            return ""
        return path.removeprefix(self.prefix) if path.startswith(self.prefix) else None

    @property
    def parts(self) -> tuple[str, ...]:
        """What is removed, for use in messages."""
        return (*self.markers, self.prefix) if self.prefix else self.markers

    def note(self) -> str:
        """Return the note that reports the change."""
        parts = [repr(part) for part in self.parts]
        if self.everywhere and not self.markers:
            note = f"stripped {self.prefix!r} from every key"
        else:
            note = f"stripped {listed(parts, 6)} from the keys"
        them = "it" if len(parts) == 1 else "them"
        note += f": a wrapper had added {them}"
        if self.dropped:
            note += f"; {listed(list(self.dropped), 3)} counts its averages and was left out"
        return note


def without(key: str, markers: Iterable[str]) -> str:
    """Remove components from a key or path: `layer._orig_mod.weight` becomes `layer.weight`."""
    for marker in markers:
        if marker in key:
            key = ".".join(part for part in key.split(".") if part != marker)
    return key


def fit(found: Keys, own: Keys) -> Unwrapping:
    """Find the change of a file's keys that matches as many as possible of an architecture's keys.

    It removes nothing that also occurs in the architecture's names, and nothing that does not match more keys.

    Args:
        found: the keys and shapes of the file.
        own: the keys and shapes of the architecture.
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


def markers_in(names: Iterable[str]) -> Unwrapping:
    """Find the change that removes only the names that nothing but wrappers use."""
    keys = list(names)
    markers = tuple(sorted(_components(keys) & set(MARKERS), key=MARKERS.index))
    bare = {key: without(key, markers) for key in keys}
    if not markers or len(set(bare.values())) < len(bare):
        return Unwrapping()
    return _plain(Unwrapping("", markers, _counts(keys)), bare)


def known(names: Iterable[str]) -> Unwrapping:
    """Find the change if no architecture is known: the names that only wrappers use, and a prefix of all keys."""
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
    """Return the same change as one prefix, if it removes the same prefix from every key."""
    kept = [key for key in names if key not in found.dropped]
    fronts = {key.removesuffix(names[key]) if key.endswith(names[key]) else None for key in kept}
    if len(fronts) == 1 and (front := fronts.pop()) is not None:
        return Unwrapping(front, (), found.dropped, elsewhere=found.elsewhere)
    return Unwrapping(found.prefix, found.markers, found.dropped, everywhere=False, elsewhere=found.elsewhere)


def _prefix(found: Keys, own: Keys) -> tuple[str, tuple[str, ...]]:
    """Return the prefix under which the file has most of the architecture's names.

    The prefix must match half of the keys with their shapes, or consist of `ATTRIBUTES` and `MARKERS`, because layers
    of the same type share names. If there is none, the second value lists all prefixes under which some names and
    shapes match, the one with the most matches first.
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
    """Yield each way to cut a name into a prefix and the rest, the empty prefix first."""
    place = 0
    yield "", name
    while (place := name.find(".", place) + 1) > 0:
        yield name[:place], name[place:]


def _counts(keys: Iterable[str]) -> tuple[str, ...]:
    """Return the keys that are AveragedModel's counter, which is beside a child `module`."""
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
