"""Files of tensors in any form: other programs' checkpoints in, ours out."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from ovseg_jax.errors import UserError
from ovseg_jax.weights.state_dict import StateDict, read_state_dict, without_wrappers
from ovseg_jax.weights.tensors import PYTORCH, Tensors, read_tensors, write_safetensors
from ovseg_jax.weights.torch_writer import write_torch

WRITERS: dict[str, Callable[[Path, Tensors], None]] = {
    "pth": write_torch,
    "safetensors": write_safetensors,
    "npz": lambda path, tensors: np.savez(path, **tensors),
}


def read_checkpoint(path: Path, entry: str = "") -> StateDict:
    """The tensors of a .pth (.pt, .bin, .ckpt), .safetensors, .npz or .onnx file.

    Raises:
      UserError: the file cannot be read, or would run code on load.
    """
    if not path.is_file():
        raise UserError(f"--checkpoint={path}: there is no such file")
    if path.suffix in PYTORCH:
        return read_state_dict(path, entry)
    if entry:
        raise UserError(f"--entry is for {', '.join(PYTORCH)} files; {path} has no entries")
    return StateDict(without_wrappers(read_tensors(path)), "", ())


def write(path: Path, tensors: Mapping[str, np.ndarray], form: str) -> None:
    """Writes tensors to one file, whole or not at all.

    Args:
      form: key of `WRITERS`.
    """
    # numpy adds .npz to a name that has not got it.
    partial = path.with_name(f".{path.name}.partial.{form}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        WRITERS[form](partial, {k: np.asarray(v, order="C") for k, v in tensors.items()})
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
