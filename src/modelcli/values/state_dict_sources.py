"""Find the storages of a state-dict model's tensors, including casts. NumPy is imported when bytes are read."""

from __future__ import annotations

from itertools import pairwise
from math import prod

from modelcli.checkpoints import Storage, TensorEntry, shapes
from modelcli.checkpoints.copied import Copied
from modelcli.errors import RequestError
from modelcli.model.dtypes import ITEM_BYTES
from modelcli.model.state_dict import StateDictTensor
from modelcli.model.tensors import Shape


class Sources:
    """The storages of a model's tensors, one object each. Cast tensors are converted when their bytes are read."""

    def __init__(self) -> None:
        self._found: dict[object, Storage] = {}
        self._views: dict[object, Storage] = {}
        #: The stride and the bytes of tensors that use all of their storage, by shape and dtype: 100,000 have few.
        self._whole: dict[tuple[Shape, str], tuple[Shape, int]] = {}

    def of(self, name: str, tensor: StateDictTensor) -> Storage:
        """Return the storage that a tensor is a view of. Raises RequestError if the tensor has no values."""
        if tensor.shape is None:
            raise RequestError(
                f"{name} has no shape yet, because its module is lazy",
                "replace it by a module with all sizes, such as Linear(4096,10)",
            )
        if tensor.source is None:
            raise RequestError(f"{name} has no values to write: no file and no edit provides them")
        if not tensor.cast_from and not tensor.copied:
            return tensor.source  # type: ignore[return-value]  # every source is a storage
        key = tensor.storage
        if key not in self._found:
            storage: Storage = tensor.source  # type: ignore[assignment]
            if tensor.cast_from:
                from modelcli.values.conversion import converted

                for before, after in pairwise((*tensor.cast_from, tensor.dtype)):
                    storage = converted(storage, before, after)
            self._found[key] = Copied(storage) if tensor.copied else storage
        return self._found[key]

    def entry(self, name: str, tensor: StateDictTensor) -> TensorEntry:
        """Return a tensor as an entry of a file."""
        storage = self.of(name, tensor)
        assert tensor.shape is not None
        return TensorEntry(tensor.shape, tensor.dtype, tensor.stride, tensor.offset, storage)

    def row_major(self, name: str, tensor: StateDictTensor) -> Storage:
        """Return the elements of a tensor in row-major order; the same object for tensors that are the same view."""
        storage = self.of(name, tensor)
        assert tensor.shape is not None
        alike = tensor.shape, tensor.dtype
        if (whole := self._whole.get(alike)) is None:
            nbytes = prod(tensor.shape) * ITEM_BYTES[tensor.dtype]
            whole = self._whole[alike] = (shapes.row_major(tensor.shape), nbytes)
        if not tensor.offset and (tensor.stride, storage.nbytes) == whole:
            return storage
        view = (tensor.storage, tensor.offset, tensor.shape, tensor.stride, tensor.dtype)
        if view not in self._views:
            from modelcli.values.row_major import row_major

            self._views[view] = row_major(self.entry(name, tensor))
        return self._views[view]
