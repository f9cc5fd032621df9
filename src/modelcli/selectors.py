"""Selectors: `features.*:Conv2d` picks modules or tensors of a blueprint.

The language, matched against the full dotted path, case-sensitive: `*`, `?` and `{a,b}` stay inside one component,
`[0-11]` is a range of numbers with its ends, `**` is any number of components, `-1` the last child of a sequence,
`:Type` asks for a class or one of its bases, `.` is the root, and a backslash takes the next character as it is.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from modelcli.blueprint import Blueprint, ModuleInfo, ancestors, parent_of, shown
from modelcli.errors import RequestError, closest

MAX_RANGE = 10_000
MAX_LENGTH = 4096


@dataclass(frozen=True)
class Selector:
    """A parsed selector: the components of its path pattern, and the type asked for."""

    text: str
    components: tuple[str, ...]
    type: str | None = None


def parse(text: str) -> Selector:
    """Parse one selector. Raises RequestError that says what cannot be read."""
    if len(text) > MAX_LENGTH:
        raise RequestError(f"selector of {len(text)} characters; the limit is {MAX_LENGTH}")
    path, colon, kind = _split_type(text)
    if colon and not re.fullmatch(r"[A-Za-z_*?][\w*?]*", kind):
        raise RequestError(f"{kind!r} in selector {text!r} is not the name of a class", "write **:Conv2d")
    if not path and not kind:
        raise RequestError("an empty selector", "'.' is the whole model, '**' every module")
    if path == ".":
        return Selector(text, (), kind or None)
    components = tuple(_split_components(path)) if path else ("**",)
    if "" in components:
        raise RequestError(f"selector {text!r} has an empty component", "write it as classifier.6")
    for component in components:
        _component_regex(component, text)
    return Selector(text, components, kind or None)


def _split_type(text: str) -> tuple[str, str, str]:
    """Cut at the last colon that no bracket or backslash hides."""
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


def _component_regex(component: str, text: str) -> str:
    """One component as a regular expression over the characters between two dots."""
    out, position = "", 0
    while position < len(component):
        character = component[position]
        if character == "\\":
            if position + 1 == len(component):
                raise RequestError(f"selector {text!r} ends in a backslash")
            out += re.escape(component[position + 1])
            position += 2
            continue
        if character == "*":
            if component[position : position + 2] == "**":
                raise RequestError(
                    f"** stands for whole components, not inside one: {component!r} in selector {text!r}",
                    "write **.name or name.**",
                )
            out += "[^.]*"
        elif character == "?":
            out += "[^.]"
        elif character == "[":
            end = component.find("]", position)
            if end < 0:
                raise RequestError(f"selector {text!r}: [ without ]")
            out += _range_regex(component[position + 1 : end], text)
            position = end
        elif character == "{":
            end = _closing_brace(component, position, text)
            options = _split_options(component[position + 1 : end])
            if any("." in option for option in options):
                raise RequestError(
                    f"{{}} stays inside one component: {component!r} in selector {text!r}",
                    "give two selectors",
                )
            out += "(?:" + "|".join(_component_regex(option, text) for option in options) + ")"
            position = end
        elif character in "]}":
            raise RequestError(f"selector {text!r}: {character} without {'[' if character == ']' else '{'}")
        else:
            out += re.escape(character)
        position += 1
    return out


def _range_regex(body: str, text: str) -> str:
    numbers: list[str] = []
    for piece in body.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", piece.strip(), re.ASCII)
        if not match:
            raise RequestError(
                f"[{body}] in selector {text!r} is not a range of numbers", "write [0-11]; {a,b} for names"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise RequestError(f"[{body}] in selector {text!r} is empty: {first} is more than {last}")
        if last - first >= MAX_RANGE:
            raise RequestError(f"[{body}] in selector {text!r} spans more than {MAX_RANGE} numbers")
        numbers += [str(number) for number in range(first, last + 1)]
    return "(?:" + "|".join(numbers) + ")"


def _closing_brace(component: str, start: int, text: str) -> int:
    depth = 0
    for position in range(start, len(component)):
        depth += {"{": 1, "}": -1}.get(component[position], 0)
        if depth == 0:
            return position
    raise RequestError(f"selector {text!r}: {{ without }}")


def _split_options(body: str) -> list[str]:
    found, depth = [""], 0
    for character in body:
        if character == "," and depth == 0:
            found.append("")
            continue
        depth += {"{": 1, "}": -1, "[": 1, "]": -1}.get(character, 0)
        found[-1] += character
    return found


def _matcher(selector: Selector, components: Sequence[str]) -> Callable[[str], bool]:
    """Match full paths. The root is nothing at all, every component brings its own dot."""
    pattern = ""
    for position, component in enumerate(components):
        if component == "**":
            if position and components[position - 1] == "**":
                continue
            pattern += r"(?:\.[^.]+)*"
        else:
            pattern += r"\." + _component_regex(component, selector.text)
    compiled = re.compile(pattern, re.DOTALL)
    return lambda path: compiled.fullmatch(f".{path}" if path else "") is not None


def _is_type(module: ModuleInfo, wanted: str) -> bool:
    return any(fnmatch.fnmatchcase(name, wanted) for name in (module.type, *module.bases) if name)


def _without_negatives(selector: Selector, blueprint: Blueprint) -> list[tuple[str, ...]]:
    """Replace each `-1` by the name of the child it means, once for every sequence that the part before it picks."""
    for position, component in enumerate(selector.components):
        if not re.fullmatch(r"-\d{1,9}", component, re.ASCII):
            continue
        before = _matcher(selector, selector.components[:position])
        found = []
        for module in blueprint.modules:
            if before(module.path) and (module.is_sequence or module.type is None):
                children = [child.path.rpartition(".")[2] for child in blueprint.children.get(module.path, ())]
                if module.is_sequence or children == [str(number) for number in range(len(children))]:
                    index = int(component)
                    if -len(children) <= index < 0:
                        above = [_escaped(part) for part in module.path.split(".")] if module.path else []
                        rest = selector.components[position + 1 :]
                        resolved = Selector(selector.text, (*above, _escaped(children[index]), *rest))
                        found += _without_negatives(resolved, blueprint)
        return found
    return [selector.components]


def _escaped(name: str) -> str:
    escaped = re.sub(r"([\\*?\[\]{}:])", r"\\\1", name)
    return "\\" + escaped if re.fullmatch(r"-\d+", escaped) else escaped


def literal(path: str) -> str:
    """A selector that picks exactly this path."""
    return ".".join(_escaped(part) for part in path.split(".")) if path else "."


def matched_modules(selector: Selector, blueprint: Blueprint) -> set[str]:
    found: set[str] = set()
    for components in _without_negatives(selector, blueprint):
        matches = _matcher(selector, components)
        found |= {module.path for module in blueprint.modules if matches(module.path)}
    if selector.type is not None:
        found = {path for path in found if _is_type(blueprint.by_path[path], selector.type)}
    return found


def matched_tensors(selector: Selector, blueprint: Blueprint) -> set[str]:
    """The tensors that a selector names, and all those at and below the modules that it names."""
    modules = matched_modules(selector, blueprint)
    found = set()
    if selector.type is None:
        for components in _without_negatives(selector, blueprint):
            matches = _matcher(selector, components)
            found |= {tensor.name for tensor in blueprint.tensors if matches(tensor.name)}
    if modules:
        for tensor in blueprint.tensors:
            if any(path in modules for path in ancestors(parent_of(tensor.name))):
                found.add(tensor.name)
    return found


def select_modules(
    blueprint: Blueprint, selectors: Iterable[str], *, without: Iterable[str] = (), expect: int | None = None
) -> list[str]:
    """The paths of the modules that the selectors pick, less those of `without`, in the model's own order.

    Raises RequestError where a selector matches nothing, or where `expect` is another number than that of the
    matches.
    """
    candidates = [module.path for module in blueprint.modules]
    return _select(blueprint, selectors, without, expect, matched_modules, candidates, "modules")


def select_tensors(
    blueprint: Blueprint, selectors: Iterable[str], *, without: Iterable[str] = (), expect: int | None = None
) -> list[str]:
    """The names of the tensors that the selectors pick, by their own name or by a module above them."""
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
    if expect is not None and len(found) != expect:
        names = ", ".join(shown(path) for path in found[:5]) + (", ..." if len(found) > 5 else "")
        raise RequestError(f"{len(found)} {noun} match, not the {expect} expected: {names}")
    return found


def _checked(text: str, blueprint: Blueprint, match: Callable[[Selector, Blueprint], set[str]], noun: str) -> set[str]:
    selector = parse(text)
    found = match(selector, blueprint)
    if not found:
        raise no_match(selector, blueprint, noun)
    return found


def no_match(selector: Selector, blueprint: Blueprint, noun: str = "modules") -> RequestError:
    """The error for a selector that picks nothing: the nearest existing paths, or what the shell did to it."""
    message = f"no {noun[:-1]} matches {selector.text!r}"
    if os.path.lexists(selector.text) and selector.text != ".":
        return RequestError(
            message, f"{selector.text!r} is a file here: the shell may have expanded a pattern; quote it"
        )
    if selector.type is not None:
        types = {name for module in blueprint.modules for name in (module.type, *module.bases) if name}
        if not types:
            return RequestError(message, "a bare checkpoint does not say its types: --arch names the architecture")
        if not any(_is_type(module, selector.type) for module in blueprint.modules):
            near = closest(selector.type, types)
            return RequestError(message, f"no module is of type {selector.type}{_near(near)}")
    paths = [module.path for module in blueprint.modules[1:]]
    names = [tensor.name for tensor in blueprint.tensors]
    bare = selector.text.partition(":")[0]
    near = closest(bare, (paths + names if noun == "tensors" else paths)[:20_000])
    if near:
        return RequestError(message, f"nearest: {', '.join(near)}")
    children = [child.path for child in blueprint.children.get(_longest_existing(bare, blueprint), ())]
    if children:
        return RequestError(message, f"there are: {', '.join(children[:8])}{', ...' if len(children) > 8 else ''}")
    return RequestError(message, "modelcli modules lists the paths")


def _near(names: list[str]) -> str:
    return f"; nearest: {', '.join(names)}" if names else ""


def _longest_existing(path: str, blueprint: Blueprint) -> str:
    return next((above for above in ancestors(path) if above in blueprint.by_path), "")


def refuse_nested(paths: Sequence[str], verb: str) -> None:
    """Refuse matches inside one another, where the edit would destroy the inner one with the outer one."""
    taken = set(paths)
    for path in paths:
        for above in list(ancestors(path))[1:]:
            if above in taken:
                raise RequestError(
                    f"{path} lies inside {shown(above)}, and both match: to {verb} the outer one destroys the inner",
                    "narrow the selector, or take one away with --except",
                )
