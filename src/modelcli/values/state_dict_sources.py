"""Where the bytes of a state-dict model's tensors come from, casts and all. NumPy is imported when bytes are read."""

from __future__ import annotations

from itertools import pairwise
from math import prod

from modelcli.checkpoints import Storage, TensorEntry, shapes
from modelcli.errors import RequestError
from modelcli.model.dtypes import ITEM_BYTES
from modelcli.model.state_dict import StateDictTensor


class Sources:
    """The storages of a model's tensors, one object for each: what was cast is converted when its bytes are read."""

    def __init__(self) -> None:
        self._found: dict[object, Storage] = {}
        self._views: dict[object, Storage] = {}

    def of(self, name: str, tensor: StateDictTensor) -> Storage:
        """The storage that a tensor is a view of. Raises RequestError where nothing gives it values."""
        if tensor.shape is None:
            raise RequestError(
                f"{name} has no shape yet: its module is lazy",
                "put a module with all its sizes in its place first",
            )
        if tensor.source is None:
            raise RequestError(f"it is not known where the values of {name} come from")
        if not tensor.cast_from:
            return tensor.source  # type: ignore[return-value]  # every source is a storage
        key = tensor.storage
        if key not in self._found:
            from modelcli.values.conversion import converted

            storage: Storage = tensor.source  # type: ignore[assignment]
            dtypes = (*tensor.cast_from, tensor.dtype)
            for before, after in pairwise(dtypes):
                storage = converted(storage, before, after)
            self._found[key] = storage
        return self._found[key]

    def entry(self, name: str, tensor: StateDictTensor) -> TensorEntry:
        """A tensor as a file would hold it."""
        storage = self.of(name, tensor)
        assert tensor.shape is not None
        return TensorEntry(tensor.shape, tensor.dtype, tensor.stride, tensor.offset, storage)

    def row_major(self, name: str, tensor: StateDictTensor) -> Storage:
        """Its elements one after another; one object for tensors that are the same view."""
        storage = self.of(name, tensor)
        assert tensor.shape is not None
        nbytes = prod(tensor.shape) * ITEM_BYTES[tensor.dtype]
        if not tensor.offset and nbytes == storage.nbytes and tensor.stride == shapes.row_major(tensor.shape):
            return storage
        view = (tensor.storage, tensor.offset, tensor.shape, tensor.stride, tensor.dtype)
        if view not in self._views:
            from modelcli.values.row_major import row_major

            self._views[view] = row_major(self.entry(name, tensor))
        return self._views[view]
