"""The model directory: weights, config, tokenizer and provenance, with no pickle anywhere.

``model.safetensors``  all parameters under their paths
``config.json``        the model's config, the protocol it was calibrated for, provenance
``tokenizer.json``     and its companions
``README.md``          the same for people
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from ovseg_jax.data.tokens import Tokenizer, find_tokenizer
from ovseg_jax.errors import UserError
from ovseg_jax.models.build import build_model
from ovseg_jax.models.ovsegmentor import OVSegmentor
from ovseg_jax.optim.groups import flatten, nest
from ovseg_jax.weights.initialize import model_shapes
from ovseg_jax.weights.tensors import read_tensors

FORMAT = "ovseg_jax model"
VERSION = 1
WEIGHTS = "model.safetensors"
CONFIG = "config.json"


@dataclass(frozen=True)
class SavedModel:
    """A model read back.

    Attributes:
      model, params: the module and its parameters (NumPy, nested).
      tokenizer: of its text encoder.
      info: what config.json holds: "model", "protocol", "text_length",
        "benchmarks", "provenance".
    """

    model: OVSegmentor
    params: dict[str, Any]
    tokenizer: Tokenizer
    info: dict[str, Any]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_model(
    directory: str | Path,
    params: Mapping[str, Any],
    tokenizer: Tokenizer,
    *,
    model: Mapping[str, Any],
    protocol: Mapping[str, Any],
    text_length: int,
    benchmarks: Mapping[str, Mapping[str, Any]],
    provenance: Mapping[str, Any],
) -> None:
    """Writes a model directory; an older one of the same name is replaced whole.

    Args:
      params: nested parameters. model: the ``config.model`` they belong to.
      protocol: how to segment with it (`segmentation.protocol.Protocol.as_dict`).
      text_length: tokens that class prompts are padded to in evaluation.
      benchmarks: fields of the benchmarks it was evaluated on, so that the same can be done again.
      provenance: plain values: where data and initial weights came from, steps, scores.
    """
    target = Path(directory)
    building = target.with_name(f".{target.name}.partial")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    # Not `ascontiguousarray`, which makes a scalar a vector.
    arrays = {k: np.asarray(v, np.float32, order="C") for k, v in flatten(params).items()}
    save_file(arrays, building / WEIGHTS)
    info = {
        "format": FORMAT,
        "version": VERSION,
        "weights_sha256": _digest(building / WEIGHTS),
        "model": dict(model),
        "protocol": dict(protocol),
        "text_length": text_length,
        "benchmarks": {name: dict(fields) for name, fields in benchmarks.items()},
        "provenance": dict(provenance),
    }
    (building / CONFIG).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(building)
    (building / "README.md").write_text(_readme(info, arrays), encoding="utf-8")
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(building, target)
    shutil.rmtree(old, ignore_errors=True)


def load_model(directory: str | Path) -> SavedModel:
    """Reads a model directory.

    Raises:
      UserError: it is absent, incomplete, damaged, of another format, or its weights do not fit
        its config; says which file and why.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"--model={directory}: there is no such directory")
    missing = [name for name in (WEIGHTS, CONFIG) if not (directory / name).is_file()]
    if missing:
        raise UserError(f"{directory} is no model directory: {', '.join(missing)} is missing")
    try:
        info = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        kind, version, digest = info["format"], info["version"], info["weights_sha256"]
        config = ConfigDict(info["model"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{directory / CONFIG} is damaged or no model config: {error!r}") from None
    if kind != FORMAT or version != VERSION:
        raise UserError(
            f"{directory / CONFIG} says {kind!r} version {version}; this program reads "
            f"{FORMAT!r} version {VERSION}"
        )
    if _digest(directory / WEIGHTS) != digest:
        raise UserError(
            f"{directory / WEIGHTS} is not the file that {CONFIG} was written with: it was "
            "truncated or changed; copy the directory again"
        )
    model = build_model(config)
    tensors, shapes = read_tensors(directory / WEIGHTS), model_shapes(model)
    faults = [f"{name} is missing" for name in sorted(set(shapes) - set(tensors))]
    faults += [f"{name} is not in the model" for name in sorted(set(tensors) - set(shapes))]
    faults += [
        f"{name} is {tensors[name].shape}, should be {shape}"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if faults:
        raise UserError(f"{directory / WEIGHTS} does not fit {CONFIG}:\n  " + "\n  ".join(faults))
    return SavedModel(model, nest(tensors), find_tokenizer(str(directory)), info)


def _readme(info: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    count = sum(array.size for array in arrays.values())
    lines = [
        "# OVSegmentor model",
        "",
        f"{count / 1e6:.1f} M parameters, written by ovseg_jax. Segment your own images with",
        "",
        '    python -m ovseg_jax.predict --model=THIS_DIRECTORY --images=a.jpg --classes="cat,dog"',
        "",
        "## Provenance",
        "",
    ]
    lines += [f"- {key}: {value}" for key, value in info["provenance"].items()]
    lines += ["", "## Protocol", ""]
    lines += [f"- {key}: {value}" for key, value in info["protocol"].items()]
    return "\n".join(lines) + "\n"
