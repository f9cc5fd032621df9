"""The classes and functions that a pickle may name without being dangerous, and those that modelcli interprets."""

from __future__ import annotations

import collections

from modelcli.model.dtypes import ITEM_BYTES

STORAGE_DTYPES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "QInt8Storage": "qint8",
    "QUInt8Storage": "quint8",
    "QInt32Storage": "qint32",
    "QUInt4x2Storage": "quint4x2",
    "QUInt2x4Storage": "quint2x4",
}
#: The classes of torch's typed storages, by dtype.
STORAGE_CLASSES = {dtype: name for name, dtype in STORAGE_DTYPES.items()}
#: The old names of `torch.Tensor`, one for each dtype and device.
_TENSOR_CLASSES = tuple(
    f"torch.{device}{kind}Tensor"
    for device in ("", "cuda.", "sparse.", "cuda.sparse.")
    for kind in ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
    if (device, kind) not in (("sparse.", "Bool"), ("cuda.sparse.", "Bool"))
)

#: The names that torch.load(weights_only=True) accepts: they make tensors and plain values, and run nothing else.
HARMLESS = frozenset(
    {
        "collections.OrderedDict",
        "collections.Counter",
        "torch.Size",
        "torch.device",
        "torch.Tensor",
        "torch.serialization._get_layout",
        "_codecs.encode",
        "builtins.bytearray",
        "builtins.set",
        "builtins.complex",
        "__builtin__.set",
        "__builtin__.bytearray",
        "__builtin__.complex",
        "torch.nn.parameter.Parameter",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state",
        "torch._utils._rebuild_qtensor",
        "torch._utils._rebuild_sparse_tensor",
        "torch._utils._rebuild_meta_tensor_no_storage",
        "torch._utils._rebuild_nested_tensor",
        "torch._utils._rebuild_wrapper_subclass",
        "torch._utils._rebuild_device_tensor_from_cpu_tensor",
        "torch._utils._rebuild_device_tensor_from_numpy",
        "torch._tensor._rebuild_from_type_v2",
        "torch.per_tensor_affine",
        "torch.per_tensor_symmetric",
        "torch.per_channel_affine",
        "torch.per_channel_symmetric",
        "torch.per_channel_affine_float_qparams",
        "torch.storage.UntypedStorage",
        "torch.storage.TypedStorage",
        *(f"torch.{dtype}" for dtype in ITEM_BYTES),
        *(f"torch.{storage}" for storage in STORAGE_DTYPES),
        *(f"torch.cuda.{storage}" for storage, dtype in STORAGE_DTYPES.items() if not dtype.startswith("q")),
        *_TENSOR_CLASSES,
    }
)

#: Some versions of Python 3.11 pickle a member of an enum as `getattr(class, name)`. These are the classes and names
#: that are allowed. Other attributes lead out of the enum: `__globals__` of a method holds everything in its module.
GETATTR = frozenset({"builtins.getattr", "__builtin__.getattr"})
GETATTR_ENUMS = frozenset(
    {
        "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",
        "torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING",
    }
)
GETATTR_MEMBERS = frozenset({"TORCH_CONTIGUOUS_FORMAT", "TORCH_CHANNELS_LAST", "TORCH_PRESERVE_FORMAT"})

PARAMETER = "torch.nn.parameter.Parameter"
COUNTER = "collections.Counter"
#: The calls that `ValueBuilder` interprets, with arguments as torch writes them; it keeps all others as calls.
INTERPRETED = frozenset(
    {
        PARAMETER,
        "collections.OrderedDict",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        "torch._utils._rebuild_device_tensor_from_cpu_tensor",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state",
        "torch._tensor._rebuild_from_type_v2",
    }
)
#: The attributes that change a tensor when they are set: its values, its class or its flags.
TENSOR_PROPERTIES = frozenset(
    {
        *("data", "real", "imag", "requires_grad", "grad", "grad_dtype", "_grad", "_grad_fn", "volatile", "names"),
        *("_backward_hooks", "_post_accumulate_grad_hooks", "_is_param"),
    }
)
#: The attributes that every dict has. Setting one would hide the dict's own: an `items` that returns other items.
DICT_ATTRIBUTES = frozenset(dir(collections.OrderedDict))
#: The classes of tensors of which each process has only a part.
SHARDED_CLASSES = frozenset(
    {
        "torch.distributed.tensor.DTensor",
        "torch.distributed.tensor._api.DTensor",
        "torch.distributed._tensor.DTensor",
        "torch.distributed._tensor.api.DTensor",
        "torch.distributed._shard.sharded_tensor.api.ShardedTensor",
        "torch.distributed._shard.sharded_tensor.ShardedTensor",
    }
)
#: The class inside ShardedTensor that describes its process group.
SHARDED_MEMBER = "ProcessGroupState"
