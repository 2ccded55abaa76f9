"""Writes a .pth file that PyTorch reads (torch.load, also with weights_only=True)."""

import os
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ovseg_jax.errors import UserError
from ovseg_jax.weights.torch_names import DTYPES, STORAGES

# Tensors begin at multiples of this, as in PyTorch's own files, so that they can be mapped.
ALIGNMENT = 64
_STORAGE_OF = {DTYPES[dtype]: f"{name}Storage" for name, dtype in reversed(STORAGES.items())}


def write_torch(path: str | Path, tensors: Mapping[str, np.ndarray], entry: str = "") -> None:
    """Saves a state dict; the file appears complete or not at all.

    Args:
      entry: where given, what is saved is {entry: state dict}.

    Raises:
      UserError: a dtype that PyTorch does not know, or a path that cannot be written.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    root = "archive"  # whatever the file is called: equal weights give equal files
    try:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
            _write(archive, f"{root}/data.pkl", _pickle(tensors, entry))
            _write(archive, f"{root}/byteorder", b"little")
            for key, array in enumerate(tensors.values()):
                little = np.asarray(array, array.dtype.newbyteorder("<"), order="C")
                _write(archive, f"{root}/data/{key}", little.reshape(-1).view(np.uint8).data)
            _write(archive, f"{root}/version", b"3\n")
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)


def _write(archive: zipfile.ZipFile, name: str, content: bytes | memoryview) -> None:
    info = zipfile.ZipInfo(name)  # a fixed date: equal weights give equal files
    info.file_size = len(content)
    # The local header is 30 bytes, the name and the extra field, to which zipfile adds 20 bytes
    # where the entry needs 64-bit sizes. A field of id "FB" fills up to the alignment.
    large = len(content) * 1.05 > zipfile.ZIP64_LIMIT
    before = archive.start_dir + 30 + len(name.encode()) + 4 + (20 if large else 0)
    fill = -before % ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", fill) + b"Z" * fill
    with archive.open(info, "w", force_zip64=large) as file:
        file.write(content)


def _pickle(tensors: Mapping[str, np.ndarray], entry: str) -> bytes:
    """The pickle (protocol 2) of a state dict; storages have the keys "0", "1", ..."""
    parts = [b"\x80\x02"]
    if entry:
        parts += [b"}", _text(entry)]
    ordered = b"ccollections\nOrderedDict\n)R"
    parts += [ordered, b"("]
    for key, (name, array) in enumerate(tensors.items()):
        kind = _STORAGE_OF.get(np.dtype(array.dtype.newbyteorder("=")))
        if kind is None:
            raise UserError(f"{name} has the type {array.dtype}, which PyTorch files do not have")
        strides = [1]
        for size in reversed(array.shape[1:]):
            strides.insert(0, strides[0] * size)
        identity = [
            _text("storage"),
            f"ctorch\n{kind}\n".encode(),
            _text(str(key)),
            _text("cpu"),
            _number(array.size),
        ]
        parts += [
            _text(name),
            b"ctorch._utils\n_rebuild_tensor_v2\n(",
            *(b"(", *identity, b"tQ"),
            _number(0),
            *(b"(", *map(_number, array.shape), b"t"),
            *(b"(", *map(_number, strides[: array.ndim]), b"t"),
            *(b"\x89", ordered, b"tR"),  # needs no gradient, has no hooks
        ]
    parts += [b"u"]
    if entry:
        parts += [b"s"]
    return b"".join([*parts, b"."])


def _text(text: str) -> bytes:
    encoded = text.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _number(value: int) -> bytes:
    if value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)
