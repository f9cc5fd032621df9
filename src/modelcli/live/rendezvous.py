"""How ranks that torchrun has started find each other: through the store of `torch.distributed`.

The store carries one message only: where rank 0 listens. torch and gloo are not used for anything else.
"""

from __future__ import annotations

import datetime

from torch.distributed.rendezvous import rendezvous

from modelcli.errors import SystemFailureError
from modelcli.ranks.starting import RANKS_VARIABLE, TO_START, Place

_KEY = "modelcli/rank0"


class Rendezvous:
    """The store of a launch. Where rank 0 has started it, it lasts as long as this object.

    Args:
        own: the place of this process.
        timeout: seconds to wait for the other ranks.
    """

    def __init__(self, own: Place, timeout: float) -> None:
        self._own = own
        self._patience = datetime.timedelta(seconds=max(timeout, TO_START))
        self._store: object = None

    def share(self, data: bytes) -> bytes:
        """Give all ranks what rank 0 has, and return it. The other ranks pass nothing, and wait for it.

        Raises SystemFailureError if the store cannot be reached, or rank 0 does not come.
        """
        try:
            store, _, _ = next(rendezvous("env://", timeout=self._patience))
            self._store = store
            if self._own.rank == 0:
                store.set(_KEY, data)
                return data
            return bytes(store.get(_KEY))
        except (RuntimeError, ValueError, OSError) as error:
            first = str(error).partition("\n")[0]
            raise SystemFailureError(
                f"rank {self._own.rank} cannot reach the store of torchrun: {first}",
                f"{RANKS_VARIABLE}=alone works in one process",
            ) from None
