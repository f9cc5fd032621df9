"""Find the storages of a state-dict model's tensors, including casts. NumPy is imported when bytes are read."""

from __future__ import annotations

from itertools import pairwise
from math import prod

from modelcli.checkpoints import Storage, TensorEntry, shapes
from modelcli.checkpoints.copied import Copied, Rearranged
from modelcli.checkpoints.storage import JoinedSpan, Span
from modelcli.errors import RequestError
from modelcli.model.dequantized import PRODUCTS, Dequantized
from modelcli.model.dtypes import ITEM_BYTES
from modelcli.model.joined_tensors import Joined
from modelcli.model.state_dict import Source, StateDictTensor
from modelcli.model.tensors import Shape
from modelcli.values.watch import Watch


class Sources:
    """The storages of a model's tensors, one object each. Cast tensors are converted when their bytes are read."""

    def __init__(self) -> None:
        self._found: dict[object, Storage] = {}
        self._views: dict[object, Storage] = {}
        self._made: dict[Joined | Dequantized, Storage] = {}
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
        if not tensor.cast_from and not tensor.copied and not isinstance(tensor.source, Joined | Dequantized):
            return tensor.source  # type: ignore[return-value]  # every source is a storage
        key = tensor.storage
        if key not in self._found:
            storage = self._storage_of(name, tensor.source)
            if tensor.cast_from:
                from modelcli.values.conversion import converted

                for before, after in pairwise((*tensor.cast_from, tensor.dtype)):
                    storage = converted(storage, before, after)
            self._found[key] = Copied(storage) if tensor.copied else storage
        return self._found[key]

    def _storage_of(self, name: str, source: Source) -> Storage:
        """Return a source as a storage; one that is made of tensors is made."""
        if isinstance(source, Joined):
            return self._joined(name, source)
        if isinstance(source, Dequantized):
            return self._dequantized(name, source)
        return source  # type: ignore[return-value]  # every other source is a storage

    def _dequantized(self, name: str, made: Dequantized) -> Storage:
        """Return the elements of a weight times their scales as a storage that equals itself alone."""
        if made not in self._made:
            from modelcli.values.dequantized import products

            weight, scale = made.weight, made.scale
            assert weight.shape is not None
            assert scale.shape is not None
            factors = scale if scale.dtype == PRODUCTS else scale.cast(PRODUCTS)
            self._made[made] = products(
                self.row_major(name, weight),
                weight.dtype,
                weight.shape,
                self.row_major(name, factors),
                scale.shape,
                made.block,
            )
        return self._made[made]

    def watch_of_scales(self, tensor: StateDictTensor) -> Watch | None:
        """Return what records whether a scale that a tensor was multiplied by was NaN or infinite, once it was read."""
        made = self._made.get(tensor.source) if isinstance(tensor.source, Dequantized) else None
        if made is None:
            return None
        from modelcli.values.dequantized import Products

        return made.watch if isinstance(made, Products) else None

    def _joined(self, name: str, joined: Joined) -> Storage:
        """Return the elements of tensors that are joined along an axis as a storage that equals itself alone."""
        if joined in self._made:
            return self._made[joined]
        parts = [part for part in joined.parts if part.elements] or [*joined.parts[:1]]
        storages = tuple(self.row_major(name, part) for part in parts)
        rows = prod((parts[0].shape or ())[: joined.dim])
        made: Storage = storages[0]
        if len(parts) > 1 and rows == 1:
            made = JoinedSpan(storages)
        elif len(parts) > 1:
            from modelcli.values.interleaved import Interleaved

            made = Interleaved(storages, tuple(storage.nbytes // rows for storage in storages), rows)
        self._made[joined] = Rearranged(made, self._beginning(name, parts[0]))
        return self._made[joined]

    def _beginning(self, name: str, tensor: StateDictTensor) -> Span | None:
        """Return an empty span where the first element of a tensor is in a file; None if it is in none."""
        storage = self.of(name, tensor)
        first = storage.begins_at if isinstance(storage, Rearranged) else storage
        return first.part(tensor.offset * ITEM_BYTES[tensor.dtype], 0) if isinstance(first, Span) else None

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
