"""Files of tensors as NumPy dicts: safetensors, npz, ONNX initializers, checkpoints of any form.

No file can run code: NumPy reads without pickles, and see `pth`.
"""

import hashlib
import math
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ovseg_jax.errors import UserError
from ovseg_jax.weights.pth import (
    StateDict,
    Tensors,
    read_state_dict,
    without_wrappers,
    write_torch,
)

# What the readers raise on damaged files; a TypeError for a single array that is called .npz.
UNREADABLE = (
    SafetensorError,
    zipfile.BadZipFile,
    zlib.error,
    ValueError,
    TypeError,
    OSError,
    EOFError,
)
# What the writers raise on a full disk.
UNWRITABLE = (OSError, SafetensorError)

# Files without pickles, by their endings. Every other file is taken for a PyTorch file, whatever
# its name: .pth, .pt, .bin, .ckpt, .pth.tar, or none of them.
PLAIN = (".safetensors", ".npz", ".onnx")


def read_tensors(path: Path) -> Tensors:
    """All tensors of a .safetensors, .npz or .onnx file by name.

    Raises:
      UserError: the file cannot be read or is of another kind.
    """
    kind = path.suffix.lower()
    try:
        if kind == ".safetensors":
            return load_file(path)
        if kind == ".npz":
            # numpy does not close a file that it opens itself and that is no archive.
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                return dict(archive)
        if kind == ".onnx":
            return _read_onnx(path)
    except UNREADABLE as error:
        raise UserError(f"{path} cannot be read ({error}); is the file complete?") from None
    raise UserError(f"{path}: weights are read from {', '.join(PLAIN)} files, not {kind!r}")


def _read_onnx(path: Path) -> Tensors:
    # Exporters fold what they can compute ahead (a linear map's transposed weight, a position
    # embedding's slice) into constants called "onnx::...". Such a constant gets its name back from
    # the node that reads it: the weight of "/a/b/MatMul" is "a.b.weight", transposed to the
    # [out, in] order of every other weight; that of "/a/Concat_6" is "a.Concat_6".
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError:
        raise UserError(f"reading {path} needs the onnx package: pip install onnx") from None
    from google.protobuf.message import DecodeError

    try:
        graph = onnx.load(str(path)).graph
    except DecodeError as error:
        raise ValueError(f"no ONNX model: {error}") from None
    constants = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    tensors = {name: value for name, value in constants.items() if not name.startswith("onnx::")}
    for node in graph.node:
        owner = node.name.strip("/").replace("/", ".")
        for name in node.input:
            if not name.startswith("onnx::") or name not in constants:
                continue
            if node.op_type == "MatMul":
                tensors[f"{owner.removesuffix('.MatMul')}.weight"] = constants[name].T
            else:
                tensors[owner] = constants[name]
    return tensors


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes contiguous arrays, with the permissions that any new file of this user has."""
    save_file(dict(tensors), path)
    # The library makes files that only their owner may read.
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- checkpoints in any form

WRITERS: dict[str, Callable[[Path, Tensors], None]] = {
    "pth": write_torch,
    "safetensors": write_safetensors,
    "npz": lambda path, tensors: np.savez(path, **tensors),
}


def read_checkpoint(path: Path, entry: str = "") -> StateDict:
    """The tensors of a .safetensors, .npz, .onnx or (any other name) PyTorch file.

    Args:
      path: the file.
      entry: of a PyTorch file, see `pth.read_state_dict`.

    Raises:
      UserError: the file cannot be read, or would run code on load.
    """
    if not path.is_file():
        raise UserError(f"--checkpoint={path}: there is no such file")
    if path.suffix.lower() not in PLAIN:
        return read_state_dict(path, entry)
    if entry:
        raise UserError(f"--entry is for PyTorch files; {path} has no entries")
    return StateDict(without_wrappers(read_tensors(path)), "", ())


def write_checkpoint(path: Path, tensors: Mapping[str, np.ndarray], form: str) -> None:
    """Writes tensors to one file, whole or not at all; `form` is a key of `WRITERS`.

    Raises:
      UserError: the file cannot be written, or cannot hold an array of this type.
    """
    # numpy adds .npz to a name that has not got it.
    partial = path.with_name(f".{path.name}.partial.{form}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not `ascontiguousarray`, which makes a scalar a vector.
        WRITERS[form](partial, {k: np.asarray(v, order="C") for k, v in tensors.items()})
        partial.replace(path)
    except UNWRITABLE as error:
        raise cannot_write(path, error) from None
    finally:
        if partial.parent.is_dir():
            partial.unlink(missing_ok=True)


def cannot_write(path: Path, error: Exception) -> UserError:
    """The error for people that stands for one of `UNWRITABLE`."""
    reason = getattr(error, "strerror", None) or str(error).strip().split("\n")[0]
    return UserError(f"{path} cannot be written: {reason or type(error).__name__}")


# ---- sizes of a model, from its checkpoint


class Sizes:
    """Shapes of a checkpoint's tensors by name; `kind` says what it should be, for messages."""

    def __init__(self, tensors: Mapping[str, Any], kind: str):
        self._tensors, self._kind = tensors, kind

    def shape(self, name: str, axes: int) -> tuple[int, ...]:
        """The shape of a tensor; UserError if it is missing or has another number of axes."""
        if name not in self._tensors:
            raise UserError(
                f"no {self._kind}: it has no tensor {name}. Its first tensors are "
                f"{', '.join(list(self._tensors)[:3])}"
            )
        shape = tuple(np.shape(self._tensors[name]))
        if len(shape) != axes:
            raise UserError(f"{name} has shape {shape}, but needs {axes} axes")
        return shape

    def depth(self, prefix: str) -> int:
        """How many numbered layers, "PREFIX.0." and on, there are."""
        pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
        numbers = {int(match[1]) for match in map(pattern.match, self._tensors) if match}
        return max(numbers, default=-1) + 1

    def ratio(self, name: str, width: int) -> float:
        """What the width is multiplied by, and cut to an integer, for a feed-forward's weight."""
        hidden = self.shape(name, 2)[0]
        ratio = hidden / width
        return ratio if int(ratio * width) == hidden else math.nextafter(ratio, math.inf)


def grid_of(positions: int, grid: tuple[int, int] | None, name: str) -> tuple[int, int]:
    """Rows and columns of the position embeddings `name`; UserError if the grid does not fit."""
    side = math.isqrt(positions)
    rows, columns = grid or (side, side)
    if rows * columns != positions or not positions:
        raise UserError(
            f"{name} has {positions} positions, which is no grid of {rows} x {columns}; give the "
            "grid's rows and columns"
        )
    return rows, columns
