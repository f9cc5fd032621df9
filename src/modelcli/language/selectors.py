"""Selectors: `features.*:Conv2d` picks modules or tensors of a blueprint.

A selector is matched against the full dotted path, case-sensitively: `*`, `?` and `{a,b}` match inside one component,
`[0-11]` matches the numbers 0 to 11, `**` any number of components, `-1` the last child of a sequence, `:Type` a class
or a subclass of it, `.` the root, and a backslash makes the next character literal. `@head` and `@stem` are the modules
that the model's library calls its classifier and its first layer; `@head.weight` is a tensor in them.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import pairwise
from typing import TypeAlias

from modelcli.errors import RequestError, closest
from modelcli.model.blueprint import Blueprint, ModuleInfo
from modelcli.model.paths import ancestors, shown
from modelcli.wording import listed

MAX_BRACES = 10
MAX_LENGTH = 4096


class _Wildcard(Enum):
    ANY = "*"
    ONE = "?"


@dataclass(frozen=True, slots=True)
class _Range:
    """`[0-3,7]`: ranges of numbers, both ends included."""

    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class _Options:
    """`{a,b}`: any one of these."""

    options: tuple[tuple[_Token, ...], ...]


_Token: TypeAlias = "str | _Wildcard | _Range | _Options"


@dataclass(frozen=True)
class Selector:
    """A parsed selector.

    Attributes:
        text: as it was written.
        components: the components of its path pattern; with a landmark, those behind it.
        type: the name behind the colon; None without `:Type`.
        landmark: the word behind the `@`; None without one.
    """

    text: str
    components: tuple[str, ...]
    type: str | None = None
    landmark: str | None = None


#: The words that may follow `@`, with what each means.
LANDMARKS = {"head": "the classifier", "stem": "the first layer"}


def parse(text: str) -> Selector:
    """Parse one selector. Raises RequestError for a text that is not a selector."""
    if len(text) > MAX_LENGTH:
        raise RequestError(f"selector of {len(text)} characters; the limit is {MAX_LENGTH}")
    path, colon, kind = _split_type(text)
    if colon and not re.fullmatch(r"[A-Za-z_*?][\w*?]*", kind):
        raise RequestError(f"{kind!r} in selector {text!r} is not the name of a class", "write **:Conv2d")
    if not path and not kind:
        raise RequestError("the selector is empty", "'.' is the whole model, '**' every module")
    if path == ".":
        return Selector(text, (), kind or None)
    components = tuple(_split_components(path)) if path else ("**",)
    landmark = _landmark(components[0], text)
    if landmark is not None:
        components = components[1:]
    if "" in components:
        raise RequestError(f"selector {text!r} has an empty component", "write it as classifier.6")
    for component in components:
        if component != "**":
            _read(component, text)
    return Selector(text, components, kind or None, landmark)


def _landmark(component: str, text: str) -> str | None:
    """The word of a component that begins with `@`. Raises RequestError for a word that is none."""
    if not component.startswith("@"):
        return None
    word = component[1:]
    if word not in LANDMARKS:
        known = " and ".join(f"@{name} ({meaning})" for name, meaning in LANDMARKS.items())
        raise RequestError(f"{component!r} in selector {text!r} has no meaning", f"there are {known}")
    return word


def _split_type(text: str) -> tuple[str, str, str]:
    """Split at the last colon that is outside brackets and not escaped."""
    depth, cut, skip = 0, -1, False
    for position, character in enumerate(text):
        if skip:
            skip = False
        elif character == "\\":
            skip = True
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        elif character == ":" and depth == 0:
            cut = position
    return (text, "", "") if cut < 0 else (text[:cut], ":", text[cut + 1 :])


def _split_components(path: str) -> list[str]:
    found, current, depth, skip = [], "", 0, False
    for character in path:
        if character == "." and depth == 0 and not skip:
            found.append(current)
            current = ""
            continue
        current += character
        if skip:
            skip = False
        elif character == "\\":
            skip = True
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
    return [*found, current]


def _read(component: str, text: str) -> tuple[_Token, ...]:
    """Split one component into tokens. `text` is the whole selector, for error messages."""
    tokens, end = _read_until(component, 0, 0, text)
    assert end == len(component)
    return tokens


def _read_until(component: str, position: int, depth: int, text: str) -> tuple[tuple[_Token, ...], int]:
    """Read tokens up to the end, or, inside braces, up to the comma or brace that ends the option."""
    tokens: list[_Token] = []
    while position < len(component):
        character = component[position]
        if depth and character in ",}":
            break
        position += 1
        match character:
            case "\\":
                if position == len(component):
                    raise RequestError(f"selector {text!r} ends in a backslash")
                tokens.append(component[position])
                position += 1
            case "*":
                if component[position : position + 1] == "*":
                    raise RequestError(
                        f"** matches whole components, so {component!r} in selector {text!r} cannot contain it",
                        "write **.name or name.**",
                    )
                tokens.append(_Wildcard.ANY)
            case "?":
                tokens.append(_Wildcard.ONE)
            case "[":
                end = component.find("]", position)
                if end < 0:
                    raise RequestError(f"selector {text!r}: [ without ]")
                tokens.append(_read_range(component[position:end], text))
                position = end + 1
            case "{":
                options, position = _read_options(component, position, depth + 1, text)
                tokens.append(options)
            case "]" | "}":
                raise RequestError(f"selector {text!r}: {character} without {'[' if character == ']' else '{'}")
            case "." if depth:
                raise RequestError(
                    f"{{}} cannot contain a dot: {component!r} in selector {text!r}",
                    "write one selector for each; replace takes more of them with --also",
                )
            case _:
                tokens.append(character)
    return tuple(tokens), position


def _read_options(component: str, position: int, depth: int, text: str) -> tuple[_Options, int]:
    if depth > MAX_BRACES:
        raise RequestError(f"selector {text!r}: braces nested deeper than {MAX_BRACES}")
    options = []
    while True:
        option, position = _read_until(component, position, depth, text)
        options.append(option)
        if position == len(component):
            raise RequestError(f"selector {text!r}: {{ without }}")
        position += 1
        if component[position - 1] == "}":
            return _Options(tuple(options)), position


def _read_range(body: str, text: str) -> _Range:
    spans = []
    for piece in body.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", piece.strip(), re.ASCII)
        if not match:
            raise RequestError(
                f"[{body}] in selector {text!r} is not a range of numbers",
                f"write .{body} for a child of a ModuleDict, {{a,b}} for one of several names, [0-11] for numbers",
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise RequestError(f"[{body}] in selector {text!r} is empty: {first} is more than {last}")
        spans.append((first, last))
    return _Range(tuple(spans))


def _ends(tokens: Sequence[_Token], name: str, starts: set[int]) -> set[int]:
    """Return the positions in `name` where a match of the tokens can end if it begins at one of `starts`.

    All positions advance together, so a match takes at most len(tokens) * len(name) steps. A backtracking regular
    expression for `*a*a*a*a*b` would take exponential time.
    """
    for token in tokens:
        match token:
            case _Wildcard.ANY:
                starts = set(range(min(starts), len(name) + 1))
            case _Wildcard.ONE:
                starts = {start + 1 for start in starts if start < len(name)}
            case _Range():
                starts = {end for start in starts for end in _number_ends(token, name, start)}
            case _Options():
                starts = set().union(*(_ends(option, name, starts) for option in token.options))
            case _:
                starts = {start + 1 for start in starts if name[start : start + 1] == token}
        if not starts:
            break
    return starts


def _number_ends(wanted: _Range, name: str, start: int) -> Iterator[int]:
    """Yield the ends of the numbers in the range that begin at `start`. `01` does not match: no child has that name."""
    digits = re.compile(r"0|[1-9]\d{0,8}", re.ASCII).match(name, start)
    for end in range(start + 1, digits.end() + 1 if digits else start):
        number = int(name[start:end])
        if any(first <= number <= last for first, last in wanted.spans):
            yield end


def _matcher(selector: Selector, blueprint: Blueprint) -> Callable[[str], bool]:
    """Return a function that says whether the selector's components match a full path."""
    from_end: Mapping[str, int] = {}
    if any(_is_negative(component) for component in selector.components):
        from_end = _numbered_from_end(blueprint)
    steps = [_step(component, selector.text, from_end) for component in selector.components]

    def opened(states: Iterable[int]) -> set[int]:
        """Add the states after each `**`, because `**` may match no component at all."""
        found = set()
        for state in states:
            found.add(state)
            while state < len(steps) and steps[state] is None:
                state += 1
                found.add(state)
        return found

    def after(states: frozenset[int], part: str, path: str) -> frozenset[int]:
        """Return the states that a component, given with the path up to it, leads to from any of these."""
        reached = set()
        for state in states:
            if state < len(steps):
                step = steps[state]
                if step is None:
                    reached.add(state)
                elif step(part, path):
                    reached.add(state + 1)
        return frozenset(opened(reached))

    first = frozenset(opened({0}))
    if from_end:

        def matches_counted(path: str) -> bool:
            states, end = first, -1
            for part in path.split(".") if path else ():
                end += 1 + len(part)
                if not (states := after(states, part, path[:end])):
                    return False
            return len(steps) in states

        return matches_counted

    known: dict[tuple[frozenset[int], str], frozenset[int]] = {}  # many paths share a few component names

    def matches(path: str) -> bool:
        states = first
        for part in path.split(".") if path else ():
            place = (states, part)
            if (reached := known.get(place)) is None:
                reached = known[place] = after(states, part, "")
            if not reached:
                return False
            states = reached
        return len(steps) in states

    return matches


def _step(component: str, text: str, from_end: Mapping[str, int]) -> Callable[[str, str], bool] | None:
    """Return a function that says whether a path component (given with the path up to it) matches; None for `**`."""
    if component == "**":
        return None
    if _is_negative(component):
        index = int(component)
        return lambda part, path: from_end.get(path) == index
    tokens = _read(component, text)
    known: dict[str, bool] = {}  # many paths share a few component names

    def matches(part: str, path: str) -> bool:
        if part not in known:
            known[part] = len(part) in _ends(tokens, part, {0})
        return known[part]

    return matches


def _is_negative(component: str) -> bool:
    return re.fullmatch(r"-\d{1,9}", component, re.ASCII) is not None


def _numbered_from_end(blueprint: Blueprint) -> dict[str, int]:
    """Return the index from the end (-1 is the last) of each child of a sequence.

    Where types are not known, a module whose children are named 0, 1, 2, ... counts as a sequence.
    """
    found = {}
    for above, children in blueprint.children.items():
        names = [child.path.rpartition(".")[2] for child in children]
        module = blueprint.by_path.get(above)
        if module is None or not (
            module.is_sequence or (module.type is None and names == [str(number) for number in range(len(names))])
        ):
            continue
        found.update({child.path: number - len(children) for number, child in enumerate(children)})
    return found


def _is_type(module: ModuleInfo, wanted: str) -> bool:
    return any(fnmatch.fnmatchcase(name, wanted) for name in (module.type, *module.bases) if name)


def renaming(
    old: str, new: str, blueprint: Blueprint, example: str = "rename 'module.**' '**'"
) -> Callable[[str], str | None]:
    """Return a function that maps a name to its new name, or to None if `old` does not match it.

    The text that each wildcard of `old` matches replaces the wildcard of `new` at the same position. Wildcards are
    greedy, the first one first, as in a regular expression; a `**` that matches nothing leaves no dot.

    Args:
        old: the selector that names must match.
        new: the new name, with the same wildcards in the same order.
        blueprint: the model, for the sequences that `-1` counts in.
        example: a line of the edit that asks, for errors.

    Raises:
        RequestError: the wildcards of `old` and `new` differ, or one of the two has a type.
    """
    verb = example.partition(" ")[0]
    before, after = _of_names(old, verb), _of_names(new, verb)
    if any(map(_is_negative, after.components)):
        raise RequestError(f"{new!r} counts from the end, but a new name must be written out")
    theirs, ours = _wildcards(before), _wildcards(after)
    if theirs != ours:
        raise RequestError(
            f"{old!r} has {_listed(theirs)}, and {new!r} has {_listed(ours)}",
            f"both names need the same wildcards in the same order: {example}",
        )
    if (prefixes := _prefixes(before, after)) is not None:
        return _with_prefix(*prefixes)
    captured, filled = _capturer(before, blueprint), _filling(after)

    def renamed(name: str) -> str | None:
        found = captured(name)
        return None if found is None else filled(found)

    return renamed


def capturing(pattern: str, blueprint: Blueprint, verb: str) -> Callable[[str], list[str] | None]:
    """Return a function that lists what each wildcard captures of a name, or gives None if the name does not match.

    Raises RequestError for a selector with a type, or of modules alone; `verb` is the edit that asks.
    """
    return _capturer(_of_names(pattern, verb), blueprint)


def filling(pattern: str, verb: str) -> Callable[[Sequence[str]], str]:
    """Return a function that makes a name of a pattern and a text for each of its wildcards.

    Raises RequestError as `capturing` does, and for a pattern that counts from the end.
    """
    selector = _of_names(pattern, verb)
    if any(map(_is_negative, selector.components)):
        raise RequestError(f"{pattern!r} counts from the end, but a new name must be written out")
    return _filling(selector)


def wildcards(pattern: str) -> list[str]:
    """Return the wildcards of a selector in order, as they are written."""
    return _wildcards(parse(pattern))


def _of_names(text: str, verb: str) -> Selector:
    """Parse a selector of names of tensors. Raises RequestError for a type, or a landmark."""
    selector = parse(text)
    if selector.type is not None:
        raise RequestError(f"{selector.text!r} asks for a type, but tensors have no type", "write '**.weight'")
    if selector.landmark is not None:
        raise RequestError(f"{selector.text!r} names modules, but {verb} takes the names of tensors")
    return selector


def _filling(selector: Selector) -> Callable[[Sequence[str]], str]:
    """Return a function that puts texts in the places of a selector's wildcards."""
    parts = [None if part == "**" else _read(part, selector.text) for part in selector.components]

    def filled(texts: Sequence[str]) -> str:
        rest = iter(texts)
        found = [
            next(rest) if part is None else "".join(t if isinstance(t, str) else next(rest) for t in part)
            for part in parts
        ]
        return ".".join(part for part in found if part)

    return filled


def _prefixes(before: Selector, after: Selector) -> tuple[str, str] | None:
    """Return the paths in front of the `**` of `a.b.**` and `c.**`; None where a selector has another form."""
    found = []
    for selector in (before, after):
        *names, last = selector.components or ("",)
        prefix = _plain_path(replace(selector, components=tuple(names)))
        if last != "**" or prefix is None:
            return None
        found.append(prefix)
    return found[0], found[1]


def _with_prefix(old: str, new: str) -> Callable[[str], str | None]:
    """Return the function of `renaming` for `old.**` and `new.**`: 100,000 names may get another prefix."""
    below, length = f"{old}.", len(old) + 1 if old else 0

    def renamed(name: str) -> str | None:
        if length and not name.startswith(below):
            return new if name == old else None
        rest = name[length:]
        return f"{new}.{rest}" if rest and new else rest or new

    return renamed


def _wildcards(selector: Selector) -> list[str]:
    """Return the wildcards of a selector in order, as they are written."""
    found = []
    for component in selector.components:
        if component == "**":
            found.append(component)
        elif not _is_negative(component):
            found += [_spelt(token) for token in _read(component, selector.text) if not isinstance(token, str)]
    return found


def _spelt(token: _Token) -> str:
    match token:
        case _Wildcard():
            return token.value
        case _Range(spans):
            return f"[{','.join(f'{first}-{last}' if last > first else str(first) for first, last in spans)}]"
        case _Options(options):
            return f"{{{','.join(''.join(map(_spelt, option)) for option in options)}}}"
    return token if token.isalnum() or token in "_-" else f"\\{token}"


def _listed(wildcards: Sequence[str]) -> str:
    return f"the wildcard{'s' if len(wildcards) > 1 else ''} {' '.join(wildcards)}" if wildcards else "no wildcard"


def _capturer(selector: Selector, blueprint: Blueprint) -> Callable[[str], list[str] | None]:
    """Return a function that lists what each wildcard captures of a full path, or None if the path does not match."""
    from_end = _numbered_from_end(blueprint) if any(map(_is_negative, selector.components)) else {}
    steps = [_step(component, selector.text, from_end) for component in selector.components]
    tokens = [
        () if step is None or _is_negative(component) else _read(component, selector.text)
        for component, step in zip(selector.components, steps, strict=True)
    ]
    inside: dict[tuple[int, str], list[str]] = {}  # many paths share a few component names
    any_length = [number for number, step in enumerate(steps) if step is None]
    # With at most one `**` there is one way to cut: the length of the path says how much that takes. Components behind
    # it are counted from the end.
    behind = any_length[0] + 1 if any_length else len(steps)
    placed = [(number - len(steps) * (number >= behind), step) for number, step in enumerate(steps) if step is not None]

    def matches(step: Callable[[str, str], bool], parts: Sequence[str], place: int) -> bool:
        # Only a step that counts from the end looks at the path.
        path = ".".join(parts[: place % len(parts) + 1]) if from_end else ""
        return step(parts[place], path)

    def cuts_of(parts: Sequence[str]) -> list[int] | None:
        def ends(number: int, start: int) -> Iterable[int]:
            step = steps[number]
            if step is None:
                return range(start, len(parts) + 1)
            return (start + 1,) if start < len(parts) and matches(step, parts, start) else ()

        if len(any_length) > 1:
            return _cuts(len(steps), ends, len(parts))
        more = len(parts) - len(steps)
        if more < -len(any_length) or (more and not any_length):
            return None
        for place, step in placed:
            if not matches(step, parts, place):
                return None
        return [*range(behind), *range(behind + more, len(parts) + 1)]

    def captured(path: str) -> list[str] | None:
        parts = path.split(".") if path else []
        cuts = cuts_of(parts)
        if cuts is None:
            return None
        found: list[str] = []
        for number, (start, end) in enumerate(pairwise(cuts)):
            if steps[number] is None:
                found.append(".".join(parts[start:end]))
            elif tokens[number]:
                key = (number, parts[start])
                if key not in inside:
                    inside[key] = _captured_inside(tokens[number], parts[start])
                found += inside[key]
        return found

    return captured


def _captured_inside(tokens: Sequence[_Token], name: str) -> list[str]:
    """Return what each wildcard of a component captures of a name that the component matches."""
    cuts = _cuts(len(tokens), lambda number, start: _ends(tokens[number : number + 1], name, {start}), len(name))
    assert cuts is not None
    return [
        name[start:end]
        for token, (start, end) in zip(tokens, pairwise(cuts), strict=True)
        if not isinstance(token, str)
    ]


def _cuts(count: int, ends: Callable[[int, int], Iterable[int]], length: int) -> list[int] | None:
    """Return the cuts that split `length` items into `count` pieces, each as long as possible, the first ones first.

    `ends(number, start)` gives the ends that piece `number` may have if it begins at `start`. Each position is tried
    once for each piece, so no pattern takes exponential time. None if no split exists.
    """
    starts = [{0}]
    for number in range(count):
        starts.append({end for start in starts[-1] for end in ends(number, start)})
    good = starts[-1] & {length}
    for number in reversed(range(count)):
        starts[number + 1] = good
        good = {start for start in starts[number] if not good.isdisjoint(ends(number, start))}
    if not good:
        return None
    cuts = [0]
    for number in range(count):
        cuts.append(max(starts[number + 1].intersection(ends(number, cuts[-1]))))
    return cuts


def _escaped(name: str) -> str:
    escaped = re.sub(r"([\\*?\[\]{}:])", r"\\\1", name)
    return "\\" + escaped if re.fullmatch(r"-\d+|@.*", escaped, re.DOTALL) else escaped


def literal(path: str) -> str:
    """Return a selector that picks exactly this path."""
    return ".".join(_literal_parts(path)) if path else "."


def _literal_parts(path: str) -> list[str]:
    """Return the components of a selector that picks exactly this path."""
    return [_escaped(part) for part in path.split(".")]


def plain(component: str) -> str | None:
    """Return the name that a selector component matches, without its backslashes; None for a pattern."""
    if component == "**" or _is_negative(component):
        return None
    tokens = _read(component, component)
    return "".join(map(str, tokens)) if all(isinstance(token, str) for token in tokens) else None


def select_one(blueprint: Blueprint, selector: str, verb: str) -> str:
    """Return the one path that a selector picks. Raises RequestError if it picks none or several."""
    found = select_modules(blueprint, [selector])
    if len(found) > 1:
        names = listed([*map(shown, found)], 5)
        raise RequestError(f"{selector!r} matches {len(found)} modules, but {verb} takes one: {names}")
    return found[0]


def _at_landmarks(selector: Selector, blueprint: Blueprint) -> list[Selector]:
    """The selector with the path of each module in the place of `@head`; the selector itself if it has no landmark."""
    if selector.landmark is None:
        return [selector]
    paths = blueprint.landmarks.get(selector.landmark, ())
    return [replace(selector, components=(*_literal_parts(path), *selector.components)) for path in paths]


def matched_modules(selector: Selector, blueprint: Blueprint) -> set[str]:
    """Return the paths of the modules that a selector picks."""
    return set().union(*(_matched_modules(each, blueprint) for each in _at_landmarks(selector, blueprint)))


def _matched_modules(selector: Selector, blueprint: Blueprint) -> set[str]:
    if (path := _plain_path(selector)) is not None:
        found = {path} & blueprint.by_path.keys()
    else:
        matches = _matcher(selector, blueprint)
        found = {module.path for module in blueprint.modules if matches(module.path)}
    if selector.type is not None:
        found = {path for path in found if _is_type(blueprint.by_path[path], selector.type)}
    return found


def matched_tensors(selector: Selector, blueprint: Blueprint) -> set[str]:
    """Return the names of the tensors that a selector picks, and of all tensors in the modules that it picks."""
    modules = matched_modules(selector, blueprint)
    known = blueprint.by_name
    found = set(outermost_of_tensors(modules, blueprint)) if modules else set()
    if selector.type is not None:
        return found
    # A tensor inside an entry that is not a tensor has brackets in its name (`packed[0]`), so compare it literally.
    found |= {selector.text} & known.keys()
    for each in _at_landmarks(selector, blueprint):
        if (path := _plain_path(each)) is not None:
            found |= {path} & known.keys()
        else:
            found |= set(filter(_matcher(each, blueprint), known))
    return found


def outermost_of_tensors(modules: Collection[str], blueprint: Blueprint) -> dict[str, str]:
    """Return, for each tensor in these modules or below them, the outermost of these modules that it lies in."""
    if "" in modules:
        return dict.fromkeys(blueprint.by_name, "")
    if len(modules) == 1:
        (top,) = modules
        below = f"{top}."
        return {name: top for name in blueprint.by_name if name.startswith(below)}
    outermost: dict[str, str] = {}  # of each module at or below one of them
    for module in blueprint.modules:  # a module comes after the one that holds it
        path = module.path
        found_top = outermost.get(path.rpartition(".")[0], path if path in modules else None)
        if found_top is not None:
            outermost[path] = found_top
    found: dict[str, str] = {}
    for name in blueprint.by_name:
        path = name.rpartition(".")[0]
        found_top = outermost.get(path)
        if found_top is None and path not in blueprint.by_path:  # a tensor inside an entry: `packed["a.b"]`
            found_top = next((outermost[above] for above in ancestors(path) if above in outermost), None)
        if found_top is not None:
            found[name] = found_top
    return found


def _plain_path(selector: Selector) -> str | None:
    """Return the only path that the components of a selector can match; None for a pattern."""
    names = []
    for component in selector.components:
        name = plain(component)
        if not name or "." in name:  # an escaped dot is not between two components, so it matches no path
            return None
        names.append(name)
    return ".".join(names)


def select_modules(
    blueprint: Blueprint, selectors: Iterable[str], *, without: Iterable[str] = (), expect: int | None = None
) -> list[str]:
    """Return the paths of the modules that the selectors pick, in the model's order.

    Args:
        blueprint: the model.
        selectors: the texts that pick modules.
        without: the selectors of `--except`, whose modules are left out.
        expect: the number of `--expect`, if any.

    Raises:
        RequestError: a selector matches nothing, or the number of matches is not `expect`.
    """
    candidates = [module.path for module in blueprint.modules]
    return _select(blueprint, selectors, without, expect, matched_modules, candidates, "modules")


def select_tensors(
    blueprint: Blueprint, selectors: Iterable[str], *, without: Iterable[str] = (), expect: int | None = None
) -> list[str]:
    """Return the names of the tensors that the selectors pick, by their own name or by a module above them.

    Arguments and errors are those of `select_modules`.
    """
    candidates = [tensor.name for tensor in blueprint.tensors]
    return _select(blueprint, selectors, without, expect, matched_tensors, candidates, "tensors")


def _select(
    blueprint: Blueprint,
    selectors: Iterable[str],
    without: Iterable[str],
    expect: int | None,
    match: Callable[[Selector, Blueprint], set[str]],
    candidates: list[str],
    noun: str,
) -> list[str]:
    taken: set[str] = set()
    for text in selectors:
        taken |= _checked(text, blueprint, match, noun)
    for text in without:
        taken -= _checked(text, blueprint, match, noun)
    found = [candidate for candidate in candidates if candidate in taken]
    if not found:
        raise RequestError(f"--except takes away all {noun} that were selected")
    require_expected(expect, found, f" {noun}")
    return found


def require_expected(expect: int | None, found: Sequence[str], noun: str = "") -> None:
    """Raise RequestError if `expect` is given and is not the number of the paths found. `noun` words the message."""
    if expect is None or len(found) == expect:
        return
    names = listed([*map(shown, found)], 5)
    match = f"1{noun.removesuffix('s')} matches" if len(found) == 1 else f"{len(found)}{noun} match"
    raise RequestError(f"{match}, not the {expect} expected: {names}")


def _checked(text: str, blueprint: Blueprint, match: Callable[[Selector, Blueprint], set[str]], noun: str) -> set[str]:
    selector = parse(text)
    found = match(selector, blueprint)
    if not found:
        raise no_match(selector, blueprint, noun)
    return found


def no_match(selector: Selector, blueprint: Blueprint, noun: str = "modules") -> RequestError:
    """Return the error for a selector that picks nothing.

    Its hint names the closest paths, and says whether the shell may have expanded a pattern.
    """
    if noun == "tensors" and matched_modules(selector, blueprint):
        return RequestError(f"{selector.text!r} has no tensors", "modelcli params lists the parameters")
    if selector.landmark is not None and selector.landmark not in blueprint.landmarks:
        return RequestError(
            f"no library says which module of this model is {LANDMARKS[selector.landmark]} ({selector.text})",
            "name its path: modelcli modules lists them",
        )
    hint = _in_words(selector.text) or _nearest(selector, blueprint, noun)
    if os.path.lexists(selector.text) and selector.text != ".":
        hint += f"; {selector.text!r} is a file here: if the shell expanded a pattern to it, quote the pattern"
    return RequestError(f"no {noun[:-1]} matches {selector.text!r}", hint)


def _in_words(text: str) -> str | None:
    """Return the hint for several selectors that came as one word with commas, such as `layer1,layer2`; else None."""
    parts = [part.strip() for part in text.split(",")]
    if len(parts) < 2 or not all(re.fullmatch(r"[\w.*?-]+", part) for part in parts):
        return None
    if "." not in text:
        return f"write '{{{','.join(parts)}}}', in quotes"
    return f"write several targets as separate words ({' '.join(parts)}); some edits take only one target"


def _nearest(selector: Selector, blueprint: Blueprint, noun: str) -> str:
    if selector.type is not None:
        types = {name for module in blueprint.modules for name in (module.type, *module.bases) if name}
        if not types:
            return "a plain state dict records no classes: pass --arch REFERENCE"
        if not any(_is_type(module, selector.type) for module in blueprint.modules):
            near = closest(selector.type, types)
            return f"no module is of type {selector.type}" + (f"; nearest: {', '.join(near)}" if near else "")
    paths = [module.path for module in blueprint.modules[1:]]
    names = [tensor.name for tensor in blueprint.tensors]
    bare = selector.text.partition(":")[0]
    known = (paths + names if noun == "tensors" else paths)[:20_000]
    # The selector or the model may have a wrapper's prefix that the other lacks: `module.fc` for `fc`, or the reverse.
    below = [path for path in known if path.endswith(f".{bare}")]
    above = sorted((path for path in known if bare.endswith(f".{path}")), key=len)
    if near := below[:3] or above[-1:] or closest(bare, known):
        return f"nearest: {', '.join(near)}"
    children = [child.path for child in blueprint.children.get(_longest_existing(bare, blueprint), ())]
    if children:
        shown_children = [*children[:6], "...", children[-1]] if len(children) > 8 else children
        return f"there are: {', '.join(shown_children)}"  # the last one is usually the head
    return "modelcli modules lists the paths"


def _longest_existing(path: str, blueprint: Blueprint) -> str:
    return next((above for above in ancestors(path) if above in blueprint.by_path), "")


def refuse_nested(
    paths: Sequence[str], why: str = "", hint: str = "narrow the selector, or take one away with --except"
) -> None:
    """Raise RequestError if one of the matches lies inside another one; `why` says what that would do."""
    taken = set(paths)
    for path in paths:
        for above in list(ancestors(path))[1:]:
            if above in taken:
                reason = f": {why}" if why else ""
                raise RequestError(f"{path} lies inside {shown(above)}, and both match{reason}", hint)
