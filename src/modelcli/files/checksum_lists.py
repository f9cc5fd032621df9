"""How files are called that state the SHA-256 of the files beside them: `SHA256SUMS`, `model.safetensors.sha256`."""

from __future__ import annotations

#: The names of lists of checksums, in lower case.
_NAMES = frozenset({"sha256sums", "sha256sums.txt", "sha256sum", "sha256sum.txt", "checksums.txt", "checksum.txt"})
#: The ends of the names of lists, and of files with the checksum of one file, in lower case.
ENDS = (".sha256", ".sha256sum", ".sha256sums")


def is_list(name: str) -> bool:
    """Whether a file of this name states checksums."""
    return name.lower() in _NAMES or name.lower().endswith(ENDS)
