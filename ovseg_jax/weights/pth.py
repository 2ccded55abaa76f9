"""Checkpoints of other programs in one file: PyTorch's, safetensors, npz, ONNX.

Nothing else needs PyTorch or imports it. No file can run code: PyTorch reads with
``weights_only=True``.
"""

import collections
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from ovseg_jax.errors import UserError
from ovseg_jax.weights.weight_files import (
    PLAIN,
    UNWRITABLE,
    Tensors,
    cannot_write,
    read_tensors,
    write_safetensors,
)

# In every file that `write_checkpoint` makes: only such a file may be replaced.
MARK = "written by ovseg_jax.convert"

# Where training programs put the weights. Of a pair (DINO's), the one that is meant to be used.
ENTRIES = ("model", "state_dict", "module", "teacher", "model_state_dict", "net")
# Data parallelism and torch.compile put these before every name.
WRAPPERS = ("module.", "_orig_mod.")
# A tensor may repeat a few elements ("expanded"), so that a small file describes a large array.
# More than this many times the file is no model.
LARGEST_GROWTH = 8

# Settings and scores beside the weights, for which `weights_only` would refuse a file; here each
# name stands for an object that takes any content and does nothing.
_DICTS = """
    yacs.config.CfgNode fvcore.common.config.CfgNode detectron2.config.config.CfgNode
    easydict.EasyDict addict.addict.Dict mmcv.utils.config.ConfigDict
    mmengine.config.config.ConfigDict
""".split()
_OBJECTS = """
    argparse.Namespace types.SimpleNamespace typing.Any datetime.timedelta
    builtins.dict builtins.list builtins.int builtins.float builtins.str
    pathlib.PosixPath pathlib.WindowsPath pathlib._local.PosixPath pathlib._local.WindowsPath
    omegaconf.dictconfig.DictConfig omegaconf.listconfig.ListConfig
    omegaconf.base.Metadata omegaconf.base.ContainerMetadata
    omegaconf.nodes.AnyNode omegaconf.nodes.StringNode omegaconf.nodes.IntegerNode
    omegaconf.nodes.FloatNode omegaconf.nodes.BooleanNode omegaconf.nodes.PathNode
    mmcv.utils.config.Config mmengine.config.config.Config
    ml_collections.config_dict.config_dict.ConfigDict
    numpy.dtype numpy.ndarray
    numpy.core.multiarray.scalar numpy.core.multiarray._reconstruct
    numpy._core.multiarray.scalar numpy._core.multiarray._reconstruct
    numpy.core.numeric._frombuffer numpy._core.numeric._frombuffer
""".split()


class _Ignored:
    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _empty_dict(*_: Any) -> dict:
    return collections.OrderedDict()


@dataclass(frozen=True)
class StateDict:
    """The tensors of a checkpoint.

    Attributes:
      tensors: by name, without the prefixes that wrappers of the model added.
      entry: where in the file they were, "" for a bare state dict.
      left_out: names of entries beside them that are no tensors.
    """

    tensors: Tensors
    entry: str = ""
    left_out: tuple[str, ...] = ()


def read_checkpoint(path: Path, entry: str = "") -> StateDict:
    """The tensors of a .safetensors, .npz, .onnx or (any other name) PyTorch file, see
    `read_state_dict`; UserError: it cannot be read, or would run code on load."""
    if not path.is_file():
        raise UserError(f"--checkpoint={path}: there is no such file")
    if path.suffix.lower() not in PLAIN:
        return read_state_dict(path, entry)
    if entry:
        raise UserError(f"--entry is for PyTorch files; {path} has no entries")
    return StateDict(_without_wrappers(read_tensors(path)))


def write_checkpoint(path: Path, tensors: Mapping[str, np.ndarray], form: str) -> None:
    """Writes tensors to one file, whole or not at all (UserError); `form`: a key of `WRITERS`."""
    # numpy adds .npz to a name that has not got it.
    partial = path.with_name(f".{path.name}.partial.{form}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not `ascontiguousarray`, which makes a scalar a vector.
        WRITERS[form](partial, {k: np.asarray(v, order="C") for k, v in tensors.items()})
        if form != "safetensors":
            # The others are zip archives, which end with the length of their comment, 0 so far.
            with partial.open("r+b") as file:
                file.seek(-2, os.SEEK_END)
                file.write(len(MARK).to_bytes(2, "little") + MARK.encode())
        partial.replace(path)
    except UNWRITABLE as error:
        raise cannot_write(path, error) from None
    finally:
        if partial.parent.is_dir():
            partial.unlink(missing_ok=True)


def is_written_here(path: Path) -> bool:
    """Whether `write_checkpoint` made a file."""
    if not path.is_file():
        return False
    with path.open("rb") as file:  # safetensors begin with their metadata, archives end with it
        head = file.read(200)
        file.seek(max(0, path.stat().st_size - len(MARK)))
        return MARK.encode() in head + file.read()


# ---- PyTorch's files


def _import_torch() -> ModuleType:
    try:
        import torch
    except ImportError:
        cpu = "without a GPU, add --index-url https://download.pytorch.org/whl/cpu"
        raise UserError(f"it needs PyTorch: run  pip install torch==2.13.0  ({cpu})") from None
    return torch


def read_state_dict(path: Path, entry: str = "") -> StateDict:
    """The state dict in a PyTorch file: an entry, by default the first of `ENTRIES`, or all of it.

    Raises:
      UserError: the file is damaged, of another kind, would run code on load, or holds no state
        dict; or PyTorch is not installed.
    """
    torch = _import_torch()

    def has_tensors(value: Any) -> bool:
        return isinstance(value, Mapping) and any(map(torch.is_tensor, value.values()))

    value, names = _load(torch, path), entry.split(".") if entry else []
    for name in names:
        if not isinstance(value, Mapping) or name not in value:
            have = ", ".join(map(str, value)) if isinstance(value, Mapping) else "no entries"
            raise UserError(f"{path} has no entry {entry!r}; it has: {have}")
        value = value[name]
    while isinstance(value, Mapping) and not has_tensors(value):
        name = next((n for n in ENTRIES if isinstance(value.get(n), Mapping)), None)
        if name is None:
            break
        value = value[name]
        names.append(name)
    if not has_tensors(value):
        held = ", ".join(map(str, list(value)[:20])) if isinstance(value, Mapping) else type(value)
        raise UserError(f"{path} holds no state dict; {'.'.join(names) or 'it'} has: {held}")
    tensors = {str(n): x.detach() for n, x in value.items() if torch.is_tensor(x)}
    left_out = tuple(str(name) for name in value if str(name) not in tensors)
    arrays = {name: _as_array(torch, x, f"{path}: {name}") for name, x in tensors.items()}
    total, size = sum(array.nbytes for array in arrays.values()), path.stat().st_size
    if total > LARGEST_GROWTH * size:
        raise UserError(f"{path} of {size} bytes describes far more than it holds: {total}")
    return StateDict(_without_wrappers(arrays), ".".join(names), left_out)


def _load(torch: ModuleType, path: Path) -> Any:
    """What was saved, with `_Ignored` for everything that is not data."""
    known = [(collections.OrderedDict, name) for name in _DICTS]
    known += [(_Ignored, name) for name in _OBJECTS]
    # Schedulers save counters; their content is a dict's.
    known.append((collections.Counter, "collections.Counter"))
    known.append((_empty_dict, "collections.defaultdict"))
    try:
        # Files from before PyTorch 1.6 are no archives and cannot be mapped.
        archive = zipfile.is_zipfile(path)
        if archive:
            _check_archive(path)
        with torch.serialization.safe_globals(known), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols of hand-made files
            return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except UserError:
        raise
    except Exception as error:  # PyTorch raises nearly anything on damaged files
        name = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and name:
            raise UserError(
                f"{path} is refused: it names {name[1]}, which would run code. If you trust "
                "it, save its state dict alone, where it was written"
            ) from None
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].strip().split("\n")[0]
        why = reason or type(error).__name__
        raise UserError(f"{path} is refused, damaged or no PyTorch file ({why})") from None


def _check_archive(path: Path) -> None:
    # A mapped file is read without its checksums; and PyTorch itself never compresses.
    with zipfile.ZipFile(path) as archive:
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise UserError(f"{path} is a compressed archive, which torch.save never writes")
        damaged = archive.testzip()
    if damaged:
        raise UserError(f"{path} is damaged: its entry {damaged} does not have its checksum")


def _as_array(torch: ModuleType, tensor: Any, what: str) -> np.ndarray:
    """A view of the tensor's memory."""
    try:
        if tensor.dtype == torch.bfloat16:  # NumPy has no such type itself
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()
    except (TypeError, RuntimeError) as error:
        raise UserError(f"{what} is no plain array of numbers ({error})") from None


def _without_wrappers(tensors: Tensors) -> Tensors:
    """Removes the prefixes of `WRAPPERS`, as long as every name has one."""
    for prefix in WRAPPERS * 2:  # at most one around the other, in either order
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def write_torch(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a state dict that ``torch.load`` reads, also with ``weights_only=True``."""
    torch = _import_torch()

    def as_tensor(name: str, array: np.ndarray) -> Any:
        array = array.astype(array.dtype.newbyteorder("="), copy=False)
        try:
            if array.dtype == ml_dtypes.bfloat16:
                return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
            return torch.from_numpy(array)
        except TypeError:
            raise UserError(f"{name} has the type {array.dtype}, unknown to PyTorch") from None

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about arrays that are read-only: nobody writes to them
        state = {name: as_tensor(name, np.asarray(array)) for name, array in tensors.items()}
    # Given a path, PyTorch writes its name into the file; equal weights shall give equal files.
    with path.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # its own kind of error for a full disk
            raise OSError(str(error)) from None


WRITERS: dict[str, Callable[[Path, Tensors], None]] = {
    "pth": write_torch,
    "safetensors": lambda path, tensors: write_safetensors(path, tensors, MARK),
    "npz": lambda path, tensors: np.savez(path, **tensors),
}
