"""The builders that a model reference may name."""

from __future__ import annotations

from typing import Any

from modelcli.errors import RequestError


def builders(pattern: str | None) -> list[dict[str, Any]]:
    """torchvision's builders that contain the pattern, or match it where it has a wildcard."""
    import fnmatch

    from modelcli.live import zoo

    names = zoo.builder_names()
    if pattern:
        glob = pattern if any(character in pattern for character in "*?[") else f"*{pattern}*"
        chosen = [name for name in names if fnmatch.fnmatchcase(name, glob)]
        if not chosen:
            near = zoo.nearest_names(pattern)
            raise RequestError(f"no builder matches {pattern!r}", f"nearest: {', '.join(near)}" if near else None)
        names = chosen
    return [
        {
            "name": info.name,
            "params": info.params,
            "macs": info.macs,
            "weights": list(info.weights),
            "group": info.group,
        }
        for info in map(zoo.describe, names)
    ]
