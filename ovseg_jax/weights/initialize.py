"""What a run's parameters start from: random values, published towers, and a table that says so."""

import json
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ovseg_jax.errors import UserError
from ovseg_jax.models.build import START, complete_model
from ovseg_jax.weights.links import Link, Shapes, read_links
from ovseg_jax.weights.tower_links import BERT_ANCHOR, VIT_ANCHORS, from_bert, from_vit
from ovseg_jax.weights.weight_files import (
    FILES,
    PLAIN,
    TOWERS,
    WHOLE,
    Reference,
    find_weights,
    read_tensors,
    refer,
    resolve,
)

# The layers that see the image alone, with what comes before and directly after them.
TRUNK = ("patch_embed/", "embed_norm/", "position", "class_token", "register_tokens")
TRUNK = tuple(f"image_encoder/{name}" for name in (*TRUNK, "trunk_layers/", "trunk_end/"))

# What `ovseg_jax.convert` calls a tower's weights.
KINDS = {"image": "dino", "text": "bert"}


def architecture(model: Mapping[str, Any] | ConfigDict) -> dict[str, Any]:
    """A complete ``config.model`` without what its parameters start from, as plain values."""
    full = complete_model(model).to_dict()
    return {name: value for name, value in full.items() if name not in START}


# ---- published towers


def initial_tower(
    role: str, spec: str, shapes: Shapes, resample_to: tuple[int, int] | None = None
) -> dict[str, np.ndarray]:
    """Parameters by path, from `config.model.image_init` or `config.model.text_init`.

    A published ViT fills what `tower_links` says, a model of ours the whole tower.

    Args:
      role: "image" or "text".
      spec: see `weight_files.find_weights`.
      shapes: of all the model's parameters.
      resample_to: see `from_vit`; None refuses weights of another grid.

    Raises:
      UserError: the weights cannot be found or read, or do not fit; names every tensor at fault.
    """
    field, tower = f"config.model.{role}_init", f"{role}_encoder/"
    path = find_weights(spec, field)
    if path.is_dir():
        others = sorted(file for file in path.iterdir() if file.suffix in FILES)
        whole = [path / WHOLE] if (path / WHOLE).is_file() else others
        if not whole:
            raise UserError(f"{field}: the folder {path} has no {WHOLE}")
        path = whole[0]
    if path.suffix.lower() not in PLAIN:
        command = f"ovseg_jax.convert {KINDS[role]} --checkpoint={path} --out=WEIGHTS"
        raise UserError(f"{field}: {path} must be converted once: python -m {command}")
    tensors = read_tensors(path)
    stored = {name: value for name, value in tensors.items() if name.startswith(tower)}
    if stored:
        wanted = {path: shape for path, shape in shapes.items() if path.startswith(tower)}
        links = [Link((path,), (path,), "same") for path in wanted]
        return read_links(stored, links, wanted, (), str(path))
    # Remove what precedes the known name ("backbone.", "bert.", ...).
    for anchor in VIT_ANCHORS if role == "image" else (BERT_ANCHOR,):
        prefix = next((n for n in tensors if n.endswith(anchor)), anchor).removesuffix(anchor)
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    if role == "image":
        kind = "ViT under names that are known (DINO, DeiT, DINOv2 or DINOv3, theirs or the hub's)"
        params = from_vit(tensors, shapes, str(path), resample_to)
    else:
        kind = f"BERT ({BERT_ANCHOR} is missing)"
        params = from_bert(tensors, shapes, str(path))
    if params is None:
        first = ", ".join(list(tensors)[:3])
        raise UserError(f"{field}: {path} holds no {kind} and no model of ours, but {first}, ...")
    return params


@dataclass(frozen=True)
class PublishedStart:
    """Published values by path, `start_table`'s rows, and what the model does otherwise."""

    values: dict[str, np.ndarray]
    rows: list[tuple[str, ...]]
    remarks: list[str]


def published_start(model: ConfigDict, shapes: Shapes) -> PublishedStart:
    """Reads the weights that a run's complete ``config.model`` begins with; the rest stays random.

    Raises:
      UserError: weights cannot be found or read, or do not fit.
    """
    values: dict[str, np.ndarray] = {}
    sources: dict[str, str] = {}
    remarks: list[str] = []
    for role in TOWERS:
        spec = model[f"{role}_init"]
        if spec:
            filled = initial_tower(role, spec, shapes, _grid(model, model.resample_init))
            values |= filled
            sources |= dict.fromkeys(filled, spec)
            path = find_weights(spec, f"config.model.{role}_init")
            remarks += [f"{spec}: {line}" for line in _remarks(path, model, role)]
    return PublishedStart(values, start_table(shapes, sources), remarks)


def _grid(model: ConfigDict, resample: bool) -> tuple[int, int] | None:
    return tuple(model.image.grid) if resample else None


def _remarks(path: Path, model: ConfigDict, role: str) -> list[str]:
    """Differences between the Hugging Face config.json beside weights and ``config.model``."""
    # Heads, an epsilon or an activation leave no trace in a tensor's shape. A difference may be
    # meant (the released model runs DINO with 8 heads), so it is not refused.
    file = (path if path.is_dir() else path.parent) / "config.json"
    try:
        theirs = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    if not isinstance(theirs, Mapping) or "model_type" not in theirs:
        return []
    image = model.image
    theirs = {**dict(theirs.get("rope_parameters") or {}), **theirs}
    fields = {"num_attention_heads": f"{role}.heads", "layer_norm_eps": f"{role}.eps"}
    if role == "text":
        fields["pad_token_id"] = "pad_id"
    else:
        if image.trunk_norm and image.trunk_heads:
            fields["num_attention_heads"] = "image.trunk_heads"
        if image.position == "rope":
            fields["rope_theta"] = "image.rope_theta"
    ours = {
        key: (f"config.model.{field} is", operator.attrgetter(field)(model))
        for key, field in fields.items()
    }
    ours["hidden_act"] = ("the model has", "gelu")
    return [
        f"the weights were made with {key} = {theirs[key]!r}, {have} {value!r}"
        for key, (have, value) in ours.items()
        if key in theirs and theirs[key] != value
    ]


def start_table(shapes: Shapes, sources: Mapping[str, str]) -> list[tuple[str, ...]]:
    """Rows of a table, with its head, of what starts from which weights.

    A module with one source is one row; of another module each child is a row, or several.
    `sources` has the spec of the weights that filled a parameter, by path.
    """
    origins: dict[str, set[str]] = {}
    for path in shapes:
        origins.setdefault(path.split("/")[0], set()).add(sources.get(path, "random"))
    counts: dict[tuple[str, str], list[int]] = {}
    for path, shape in shapes.items():
        names = path.split("/")
        group = "/".join(names[:2]) if len(origins[names[0]]) > 1 else names[0]
        counts.setdefault((group, sources.get(path, "random")), []).append(int(np.prod(shape)))
    rows = [
        (group, str(len(sizes)), f"{sum(sizes):,}", source)
        for (group, source), sizes in sorted(counts.items())
    ]
    return [("parameters", "tensors", "numbers", "start from"), *rows]


# ---- towers that a model directory refers to


def split_towers(
    model: ConfigDict, params: Mapping[str, np.ndarray], shapes: Shapes
) -> tuple[dict[str, np.ndarray], dict[str, Reference]]:
    """Parameters that differ from the published towers, and references to the towers.

    Raises:
      UserError: no parameter is equal to a published one, or the weights cannot be had.
    """
    kept, references = dict(params), {}
    for role in TOWERS:
        spec = model[f"{role}_init"]
        if not spec:
            continue
        reference = refer(spec, role, resample=role == "image" and bool(model.resample_init))
        published = tower_values({role: reference}, model, shapes)
        equal = [path for path, x in published.items() if np.array_equal(x, params[path])]
        if equal:
            references[role] = reference
            kept = {path: value for path, value in kept.items() if path not in equal}
    if not references:
        raise UserError(
            "--towers=reference: no published weights are as they were; use --towers=copied"
        )
    return kept, references


def tower_values(
    references: Mapping[str, Reference], model: ConfigDict, shapes: Shapes
) -> dict[str, np.ndarray]:
    """Published parameters by path, of all towers that a model directory refers to."""
    values: dict[str, np.ndarray] = {}
    for role, reference in references.items():
        path = str(resolve(reference, role))
        values |= initial_tower(role, path, shapes, _grid(model, reference.resample))
    return values
