"""The two formats of PyTorch's files: what was saved, and how to get at a storage's bytes."""

import pickle
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from ovseg_jax.weights.pickles import DamagedPickle, RefusedPickle, read_pickle
from ovseg_jax.weights.torch_names import Storage, find

# torch.serialization: the two numbers that a stream begins with.
STREAM_MAGIC = 0x1950A86A20F9469CFC6C
STREAM_VERSION = 1001
# A pickle holds names and numbers, no weights; state dicts of large models need some 100 kB.
LARGEST_PICKLE = 1 << 28

MappedBytes = np.ndarray  # uint8, read-only, backed by the file


class Damage(Exception):
    """A reason why a file cannot be read, without its name."""


@dataclass(frozen=True)
class Contents:
    """What a file holds.

    Attributes:
      value: what was saved, with `StoredTensor`s for tensors.
      storage: the bytes of a storage by its key; raises Damage.
      swapped: whether numbers have the byte order that this machine has not.
    """

    value: Any
    storage: Callable[[str], MappedBytes]
    swapped: bool


def open_contents(path: Path, data: MappedBytes) -> Contents:
    """The contents of a mapped file.

    Raises:
      Damage, RefusedPickle, DamagedPickle: see the classes.
    """
    return _open_zip(path, data) if data[:4].tobytes() == b"PK\x03\x04" else _open_stream(data)


# ---- the zip archive

# What Python's reader raises on nonsensical directories.
_BAD_DIRECTORY = (
    zipfile.BadZipFile,
    ValueError,
    NotImplementedError,
    EOFError,
    OSError,
    OverflowError,
    IndexError,
    struct.error,
)


def _open_zip(path: Path, data: MappedBytes) -> Contents:
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except _BAD_DIRECTORY as error:
        raise Damage(
            f"its directory, at the end, is missing or wrong ({error}); was it copied whole?"
        ) from None
    entries: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        name = info.filename.partition("/")[2]
        if name in entries:
            raise Damage(f"it has two entries called {info.filename}")
        entries[name] = info
    if "constants.pkl" in entries or any(name.startswith("code/") for name in entries):
        raise Damage(
            "it is a TorchScript program, not a checkpoint: save the state_dict of the module"
        )
    if "data.pkl" not in entries:
        raise Damage("it is a zip archive, but none that torch.save wrote: data.pkl is missing")

    def entry(name: str) -> MappedBytes:
        if name not in entries:
            raise Damage(f"the entry {name} is missing")
        return _stored_bytes(entries[name], data)

    order = bytes(entry("byteorder")).strip() if "byteorder" in entries else b"little"
    if order not in (b"little", b"big"):
        raise Damage(f"its byte order is {order!r}, neither little nor big")
    if entries["data.pkl"].file_size > LARGEST_PICKLE:
        raise Damage(f"its data.pkl has {entries['data.pkl'].file_size} bytes, too many for names")
    checked: dict[str, MappedBytes] = {}

    def storage(key: str) -> MappedBytes:
        if key not in checked:
            checked[key] = entry(f"data/{key}")
        return checked[key]

    value = read_pickle(BytesIO(entry("data.pkl").tobytes()), find, _persistent)
    return Contents(value, storage, order.decode() != sys.byteorder)


def _stored_bytes(info: zipfile.ZipInfo, data: MappedBytes) -> MappedBytes:
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise Damage(
            f"the entry {info.filename} is compressed or encrypted, which torch.save never does; "
            "it is not unpacked"
        )
    at = info.header_offset
    header = data[at : at + 30].tobytes()
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise Damage(f"the entry {info.filename} is not where the directory says")
    start = at + 30 + int.from_bytes(header[26:28], "little")
    start += int.from_bytes(header[28:30], "little")
    if info.compress_size != info.file_size or start + info.file_size > data.nbytes:
        raise Damage(f"the entry {info.filename} does not fit into the file")
    content = data[start : start + info.file_size]
    if zlib.crc32(content) != info.CRC:
        raise Damage(f"the bytes of the entry {info.filename} do not agree with its checksum")
    return content


def _persistent(identity: Any) -> Storage:
    match identity:
        case ("storage", np.dtype() as dtype, key, _, int(count)) if count >= 0:
            return Storage(str(key), dtype, count)
        case ("storage", np.dtype() as dtype, key, _, int(count), None) if count >= 0:
            return Storage(str(key), dtype, count)
        case ("storage", np.dtype() as dtype, key, _, int(), (_, int(start), int(count))) if (
            start >= 0 and count >= 0
        ):
            return Storage(str(key), dtype, count, start)
    raise RefusedPickle("it refers to something that is no storage")


# ---- the stream of PyTorch before 1.6


def _open_stream(data: MappedBytes) -> Contents:
    stream = _Stream(data)
    try:
        if read_pickle(stream, _nothing) != STREAM_MAGIC:
            raise DamagedPickle("magic number")
        version = read_pickle(stream, _nothing)
    except (DamagedPickle, RefusedPickle):
        raise Damage(
            f"it is no file that torch.save wrote ({_guess(data)}); a truncated download?"
        ) from None
    if version != STREAM_VERSION:
        raise Damage(f"its format is version {version}, known is {STREAM_VERSION}")
    system = read_pickle(stream, _nothing)
    if not isinstance(system, dict):
        raise Damage("its description of the system is missing")
    dtypes: dict[str, np.dtype] = {}

    def persistent(identity: Any) -> Storage:
        storage = _persistent(identity)
        dtypes.setdefault(storage.key, storage.dtype)
        return storage

    value = read_pickle(stream, find, persistent)
    keys = read_pickle(stream, _nothing)
    little = bool(system.get("little_endian", True))
    swapped = little != (sys.byteorder == "little")
    found: dict[str, MappedBytes] = {}
    for key in keys if isinstance(keys, list) else ():
        if str(key) not in dtypes:
            raise Damage(f"its storage {key!r} belongs to no tensor")
        count = int.from_bytes(stream.read(8), "little" if little else "big")
        size = count * dtypes[str(key)].itemsize
        if stream.at + size > data.nbytes:
            raise Damage(f"it ends within storage {key!r}: it was truncated")
        found[str(key)] = data[stream.at : stream.at + size]
        stream.at += size

    def storage(key: str) -> MappedBytes:
        if key not in found:
            raise Damage(f"the storage {key!r} is missing: the file was truncated")
        return found[key]

    return Contents(value, storage, swapped)


class _Stream:
    """The mapped bytes as a file, as far as reading a pickle needs one."""

    def __init__(self, data: MappedBytes):
        self._data, self.at = data, 0

    def read(self, count: int) -> bytes:
        piece = self._data[self.at : self.at + max(count, 0)].tobytes()
        self.at += len(piece)
        return piece

    def readline(self) -> bytes:
        # Names are short; nothing longer is looked at.
        piece = self._data[self.at : self.at + (1 << 16)].tobytes()
        end = piece.find(b"\n") + 1 or len(piece)
        self.at += end
        return piece[:end]


def _nothing(module: str, name: str) -> Any:
    raise RefusedPickle(f"it names {module}.{name} where only numbers and texts belong")


def _guess(data: MappedBytes) -> str:
    head = data[:512].tobytes()
    if head[257:262] == b"ustar":
        return "it is a tar archive; PyTorch before 0.2 wrote such: load and save it with PyTorch"
    if head.lstrip()[:1] in (b"<", b"{"):
        return "it begins like a web page or JSON"
    if head[:1] == b"\x80" and head[1:2] <= bytes([pickle.HIGHEST_PROTOCOL]):
        return "it is a plain pickle"
    if head[8:10] == b'{"':
        return "it looks like safetensors: give it that ending"
    return f"it begins with {head[:8]!r}"
