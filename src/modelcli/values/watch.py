"""Notes what a conversion met on its way, for a message after the bytes have been written."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(eq=False, slots=True)
class Watch:
    """Records whether a conversion met a value that its dtype cannot hold, or a product a scale that is not finite."""

    seen: bool = False
