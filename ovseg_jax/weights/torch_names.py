"""The global names that occur in PyTorch's files, and what each becomes: data of ours.

A name that is not listed here is refused. It stands for code that the file would like to have run
on load, or for a kind of object that weights do not need.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from ovseg_jax.weights.pickles import Constructor, Inert, RefusedPickle, as_key

DTYPES = {
    "float64": np.dtype(np.float64),
    "double": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "half": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "int64": np.dtype(np.int64),
    "long": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "int": np.dtype(np.int32),
    "int16": np.dtype(np.int16),
    "short": np.dtype(np.int16),
    "int8": np.dtype(np.int8),
    "char": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),
    "byte": np.dtype(np.uint8),
    "uint16": np.dtype(np.uint16),
    "uint32": np.dtype(np.uint32),
    "uint64": np.dtype(np.uint64),
    "bool": np.dtype(np.bool_),
    "complex64": np.dtype(np.complex64),
    "complex128": np.dtype(np.complex128),
}
# torch.FloatStorage and its like; the class name without "Storage".
STORAGES = {
    "Double": "float64",
    "Float": "float32",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
    "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
    "Untyped": "uint8",
}

# Settings that training programs leave in their checkpoints beside the weights. Such an object
# becomes an inert stand-in, whatever it holds.
_SETTINGS = re.compile(
    r"argparse\.Namespace|types\.SimpleNamespace|typing\.Any|pathlib\..*Path|datetime\.\w+"
    r"|(yacs|fvcore\.common|detectron2\.config)\.config\.CfgNode"
    r"|omegaconf\.[\w.]+|(mmcv\.utils|mmengine\.config)\.config\.(Config|ConfigDict)"
    r"|addict(\.addict)?\.Dict|easydict\.EasyDict"
    r"|ml_collections\.(config_dict\.)*ConfigDict|torch\.device"
)


@dataclass(frozen=True)
class Storage:
    """A run of bytes in the file, shared by the tensors that lie in it.

    Attributes:
      key: its name in the file.
      dtype: of its elements. count: how many there are.
      start: offset inside the storage `key` (legacy files have views of storages), elements.
    """

    key: str
    dtype: np.dtype
    count: int
    start: int = 0


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies; `torch_file` makes an array of it.

    Attributes:
      dtype: of its elements; that of the storage, except where the storage is untyped.
      offset, shape, strides: in elements.
    """

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class StoredArray:
    """A NumPy array or scalar inside the pickle itself; `array` is None if it holds objects."""

    def __init__(self) -> None:
        self.array: np.ndarray | None = None

    def set_state(self, state: Any) -> None:
        """Content in the form of ndarray.__reduce__: version, shape, dtype, order, bytes."""
        _, shape, dtype, fortran, data = state
        if dtype.dtype is not None:
            order = "F" if fortran else "C"
            self.array = np.frombuffer(_bytes(data), dtype.dtype).reshape(shape, order=order)


class _ArrayType:
    """A pickled numpy.dtype; `dtype` is None for objects and records."""

    def __init__(self, code: Any, *_: Any):
        known = isinstance(code, str) and re.fullmatch(r"[<>=|]?([biufc]\d+|[SU]\d{1,4})", code)
        self.dtype = np.dtype(code) if known else None

    def set_state(self, state: Any) -> None:
        """Content in the form of dtype.__reduce__; only the byte order can differ."""
        if self.dtype is not None and state[1] in "<>":
            self.dtype = self.dtype.newbyteorder(state[1])


def _bytes(data: Any) -> bytes:
    if not isinstance(data, str | bytes | bytearray):
        raise TypeError("bytes that are none")
    return data.encode("latin-1") if isinstance(data, str) else bytes(data)


def _few(items: Any = ()) -> Any:
    # Each of these constructors copies what it is given; many copies of a long list would need
    # memory without end. Real files fill containers item by item.
    if len(items) > 4096:
        raise ValueError(f"a container is made of {len(items)} items at once")
    return items


def _dict(items: Any = ()) -> dict:
    return {as_key(key): value for key, value in _few(items)}


def _set(items: Any = ()) -> set:
    return {as_key(item) for item in _few(items)}


def _numpy_scalar(dtype: _ArrayType, data: Any = b"") -> StoredArray:
    result = StoredArray()
    if dtype.dtype is not None:
        result.array = np.frombuffer(_bytes(data), dtype.dtype, 1)[0].reshape(())
    return result


def _numpy_from_buffer(data: Any, dtype: _ArrayType, shape: Any, order: str) -> StoredArray:
    result = StoredArray()
    result.set_state((1, shape, dtype, order == "F", data))
    return result


def _encode(text: str, encoding: str = "latin1") -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise RefusedPickle(f"it encodes a text as {encoding}")
    return text.encode("latin-1")


def _tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any, dtype: Any = None
) -> StoredTensor:
    if not isinstance(storage, Storage):
        raise TypeError("a tensor without a storage")
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError(f"a tensor of shape {shape}, strides {strides}, offset {offset}")
    metadata = rest[2] if len(rest) > 2 else None
    if metadata:
        raise RefusedPickle(f"a tensor has the marks {metadata}, which are not supported")
    kind = storage.dtype if dtype is None else dtype
    return StoredTensor(storage, kind, offset, tuple(shape), tuple(strides))


def _tensor_of_type(*arguments: Any) -> StoredTensor:
    storage, offset, shape, strides, _, _, dtype, *metadata = arguments
    if not isinstance(dtype, np.dtype):
        raise TypeError("a tensor without a type")
    return _tensor(storage, offset, shape, strides, None, None, *metadata, dtype=dtype)


def _parameter(tensor: StoredTensor, *_: Any) -> StoredTensor:
    return tensor


def _of_class(rebuild: Constructor, kind: Any, arguments: Any, state: Any) -> Any:
    return rebuild.make(*arguments)


_MAKERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_type,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _of_class,
    "torch.Size": lambda sizes=(): tuple(_few(sizes)),
    "collections.OrderedDict": _dict,
    "collections.defaultdict": lambda *_: {},  # its factory is never needed
    "builtins.dict": _dict,
    "builtins.set": _set,
    "builtins.frozenset": lambda items=(): frozenset(_set(items)),
    "builtins.list": lambda items=(): list(_few(items)),
    "builtins.tuple": lambda items=(): tuple(_few(items)),
    "builtins.bytearray": lambda data=b"", *_: _bytes(data),
    "builtins.complex": lambda real=0.0, imaginary=0.0: complex(real, imaginary),
    "builtins.slice": lambda *_: Inert("slice"),
    "builtins.range": lambda *_: Inert("range"),
    "builtins.object": lambda *_: Inert("object"),
    "_codecs.encode": _encode,
    "numpy.dtype": _ArrayType,
    "numpy.ndarray": lambda *_: StoredArray(),
    "numpy.core.multiarray._reconstruct": lambda *_: StoredArray(),
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy.core.numeric._frombuffer": _numpy_from_buffer,
}
# Types that stand in a file as values and are never called.
_INERT_TYPES = re.compile(
    r"builtins\.(int|long|float|str|unicode|bool|bytes|type)|numpy\.(bool_?|u?int\d*|float\d*|str_|bytes_)"
    r"|torch\.(nn\.parameter\.)?(Tensor|Parameter|Buffer)|torch\.(strided|\w+_format)"
    r"|torch\.(cuda\.)?(\w*Tensor)"
)


def find(module: str, name: str) -> Any:
    """What "module name" stands for.

    Raises:
      RefusedPickle: it is not known.
    """
    if not (isinstance(module, str) and isinstance(name, str)):
        raise TypeError("a global whose name is no text")
    full = f"{module}.{name}"
    # Python 2, and NumPy before and after its move.
    full = re.sub(r"^__builtin__\.", "builtins.", re.sub(r"^numpy\._core\.", "numpy.core.", full))
    if full in _MAKERS:
        return Constructor(full, _MAKERS[full])
    if module == "torch" and name in DTYPES:
        return DTYPES[name]
    storage = re.fullmatch(r"torch\.(?:cuda\.|storage\.)?(\w+)Storage", full)
    if storage and storage[1] in STORAGES:
        return DTYPES[STORAGES[storage[1]]]
    if _SETTINGS.fullmatch(full):
        return Constructor(full, lambda *_: Inert(full))
    if _INERT_TYPES.fullmatch(full):
        return Inert(full)
    raise RefusedPickle(f"it names {full}, which would run code on load")
