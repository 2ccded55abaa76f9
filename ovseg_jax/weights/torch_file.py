"""PyTorch's .pth, .pt and .bin files without PyTorch, and without running what stands in them.

Two formats: the zip archive of PyTorch 1.6 and later (a pickle ``data.pkl``, and one uncompressed
entry ``data/KEY`` for each storage), and the older stream (five pickles, then the storages one
after another). The file is mapped, not read: a tensor is a view of it until somebody copies it.
"""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ovseg_jax.errors import UserError
from ovseg_jax.weights.pickles import DamagedPickle, RefusedPickle
from ovseg_jax.weights.torch_formats import Contents, Damage, open_contents
from ovseg_jax.weights.torch_names import StoredArray, StoredTensor

# A tensor may be a view of a few elements repeated ("expanded"), so that a small file describes
# arrays of any size. More than this many times the file is no model.
LARGEST_GROWTH = 8


@dataclass(frozen=True)
class TorchFile:
    """An open file.

    Attributes:
      path: of the file.
      value: what was saved; tensors are `StoredTensor`s, NumPy values `StoredArray`s.
      nbytes: size of the file.
    """

    path: Path
    value: Any
    nbytes: int
    _contents: Contents

    def array(self, tensor: StoredTensor | StoredArray, name: str) -> np.ndarray:
        """A tensor as an array: a read-only view of the file wherever that is possible.

        Args:
          name: of the tensor, for messages.

        Raises:
          UserError: it lies outside its storage, or its storage outside the file.
        """
        if isinstance(tensor, StoredArray):
            if tensor.array is None:
                raise UserError(f"{self.path}: {name} is an array of objects, not of numbers")
            return tensor.array
        storage, size = tensor.storage, tensor.dtype.itemsize
        try:
            raw = self._contents.storage(storage.key)
        except Damage as damage:
            raise UserError(f"{self.path}: {name}: {damage}") from None
        room = storage.count * storage.dtype.itemsize
        start = storage.start * storage.dtype.itemsize
        steps = zip(tensor.shape, tensor.strides, strict=True)
        empty = 0 in tensor.shape
        last = 0 if empty else 1 + tensor.offset + sum((n - 1) * step for n, step in steps)
        if last * size > room or start + room > raw.nbytes or len(tensor.shape) > 32:
            raise UserError(
                f"{self.path}: {name} needs {last * size} bytes of storage {storage.key!r}, which "
                f"holds {min(room, raw.nbytes - start)}; the file is damaged"
            )
        if prod(tensor.shape) * size > LARGEST_GROWTH * self.nbytes:
            raise UserError(
                f"{self.path}: {name} would have {prod(tensor.shape)} elements, far more than the "
                "file holds; such a file is not read"
            )
        if empty:
            return np.zeros(tensor.shape, tensor.dtype)
        flat = raw[start : start + last * size].view(tensor.dtype)
        view = np.lib.stride_tricks.as_strided(
            flat[tensor.offset :],
            tensor.shape,
            [step * size for step in tensor.strides],
            writeable=False,
        )
        return _in_our_order(view) if self._contents.swapped else view


def open_torch(path: str | Path) -> TorchFile:
    """Opens a file that torch.save wrote, in either format.

    Raises:
      UserError: the file is absent, truncated, of another kind, or would run code on load.
    """
    path = Path(path)
    try:
        if not path.stat().st_size:
            raise UserError(f"{path} is empty")
        data = np.memmap(path, np.uint8, "r").view(np.ndarray)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    try:
        contents = open_contents(path, data)
    except RefusedPickle as refusal:
        raise UserError(
            f"{path} is refused: {refusal}. Weights need nothing of the kind. If you trust the "
            "file, load it where it was written and save its state dict alone"
        ) from None
    except DamagedPickle as damage:
        raise UserError(f"{path} is damaged or no PyTorch file ({damage})") from None
    except Damage as damage:
        raise UserError(f"{path} cannot be read: {damage}") from None
    return TorchFile(path, contents.value, data.nbytes, contents)


def _in_our_order(array: np.ndarray) -> np.ndarray:
    """An array whose bytes were written on a machine of the other byte order."""
    size = array.dtype.itemsize // (2 if array.dtype.kind == "c" else 1)
    if size == 1:
        return array
    whole = np.ascontiguousarray(array)
    return whole.view(f"u{size}").byteswap().view(whole.dtype).reshape(array.shape)
