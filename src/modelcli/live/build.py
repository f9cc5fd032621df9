"""Turn a reference into an architecture, which can be constructed with values or on the meta device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from modelcli.errors import FileFormatError, RequestError
from modelcli.language import references
from modelcli.language.references import CheckpointFile
from modelcli.live import downloads, memory, providers
from modelcli.live.bounds import Bounds
from modelcli.live.meta_models import build_on_meta, meta_copy, seeded
from modelcli.live.modules import ConstructorError
from modelcli.live.sources import Lazy, tag_drawn
from modelcli.live.walking import require_methods

if TYPE_CHECKING:
    from modelcli.live.providers.base import LiveProvider


@dataclass(frozen=True)
class Architecture:
    """A model that can be constructed.

    Attributes:
        reference: what names it.
        construct: the plain constructor, with the weights.
        without_weights: gives the same structure, and neither downloads nor loads.
        provider: what its inputs are asked of, and how a script builds it.
        weights: the resolved name of the library's own weights, if any.
        pretrained: whether the library has weights of it by name.
        instance: set where the reference names a module that exists already.
        only_if_needed: whether an error that has nothing to do with the meta device ends building on it at once.
        bounds: what building may take.
        folder: what relative paths in its arguments are seen from.
        notes: what the user should know of what the reference names.
        details: what its provider keeps of it for itself.
        is_partial: whether a checkpoint may leave tensors out and have others, as when arguments make another head.
        loads: the calls by which the constructor was seen to load weights itself.
    """

    reference: references.Reference
    construct: Callable[[], nn.Module]
    without_weights: Callable[[], nn.Module]
    provider: LiveProvider
    weights: str | None = None
    pretrained: bool = False
    instance: nn.Module | None = None
    only_if_needed: bool = False
    bounds: Bounds | None = None
    folder: Path = Path()
    notes: tuple[str, ...] = ()
    details: Any = field(default=None, compare=False, repr=False)
    is_partial: bool = False
    loads: list[str] = field(default_factory=list, compare=False)

    def on_meta(self, seed: int) -> nn.Module:
        """The architecture on the meta device; its numbers are those that `real(seed)` gives, when asked for."""
        if self.instance is not None:
            return meta_copy(require_methods(self.instance), keep_values=True)
        try:
            module = build_on_meta(self.without_weights, only_if_needed=self.only_if_needed, bounds=self.bounds)
        except ConstructorError as error:
            if self.bounds is None or not self.bounds.of_file or not self.provider.provider.prefix:
                raise
            told = error.message.removeprefix(f"{self.reference}: ")
            raise FileFormatError(f"{self.bounds.what} cannot be built: {told}", "mend its config.json") from error
        needed = memory.bytes_of(module)  # what a storage holds is never collected where the storage is in it
        tag_drawn(module, Lazy(lambda: self.real(seed, needed=needed)))
        return module

    def real(self, seed: int, *, needed: int = 0, weights: bool = True) -> nn.Module:
        """The plain constructor's module, as after `torch.manual_seed(seed)`; without `weights`, nothing is downloaded.

        Raises SystemFailureError before anything is allocated where `needed` bytes are not to be had.
        """
        memory.require(needed, str(self.reference))
        if self.instance is not None:
            return copy.deepcopy(self.instance)
        with seeded(seed), downloads.loads_recorded() as loads:
            module = self.construct() if weights else self.without_weights()
        self.loads.extend(loads)
        return module


def architecture(
    reference: references.Reference, *, weights: str | None, folder: Path, trust: bool = True, remote_code: bool = False
) -> Architecture:
    """Return the architecture of a reference: see `LiveProvider.architecture`."""
    if isinstance(reference, CheckpointFile):
        raise RequestError(f"{reference} is a checkpoint, not an architecture", "--arch takes alexnet or nets.py:Net")
    return providers.provider_of(reference).architecture(
        reference, weights=weights, folder=folder, trust=trust, remote_code=remote_code
    )
