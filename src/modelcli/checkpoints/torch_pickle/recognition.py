"""Recognise by its first bytes what torch.save wrote before torch 1.6."""

#: What the first pickle of a file from before torch 1.6 holds: torch's magic number.
_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def is_legacy(head: bytes) -> bool:
    """Whether bytes begin as torch.save wrote files before torch 1.6.

    From protocol 4 on the magic number stands behind the size of a frame.
    """
    return head.startswith(b"\x80") and any(head.startswith(_MAGIC, place) for place in (2, 11))
