"""The Python API: what `import modelcli` gives."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from modelcli.references import Source

if TYPE_CHECKING:
    from torch import nn


def load(
    path: str | os.PathLike[str],
    *,
    arch: str | nn.Module | None = None,
    weights: str | None = None,
    key: str | None = None,
    trust: bool = False,
    strict: bool = True,
) -> nn.Module:
    """Load a model: its architecture, its weights, its `requires_grad` flags.

    Takes the path of a checkpoint (or any other model reference). A checkpoint that modelcli wrote says which model
    it is; for others `arch` names the architecture, as a reference or as an `nn.Module`, which is filled in place.
    `weights` is a name of torchvision's or a file, for a reference that is no checkpoint; `key` the state dict inside
    a training checkpoint. `trust` follows a record that names Python code of its own.

    Tied parameters are one `Parameter` again; non-persistent buffers and plain tensor attributes are what the
    constructor makes them. The caller's random generator is left as it was.

    Raises AnswerNoError where the checkpoint does not fit (with `strict=False` only where shapes differ),
    RequestError, UnsafeError, FileFormatError.
    """
    from modelcli.live import opening

    text = os.fspath(path)
    if isinstance(path, Path) and not Path(text).is_absolute() and path.parent == Path():
        text = f"./{text}"
    source = Source(model=text, weights=weights, key=key, trust=trust, strict=strict)
    if arch is not None and not isinstance(arch, str):
        return opening.with_arch_instance(source, arch)[0]
    if isinstance(arch, str):
        source = Source(model=text, arch=arch, weights=weights, key=key, trust=trust, strict=strict)
    return opening.open_real(source)[0]
