"""What a run's parameters start from, for the run and for people: values, a table, remarks."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ovseg_jax.weights.hub_config import image_remarks, text_remarks
from ovseg_jax.weights.initialize import Shapes, initial_image, initial_text
from ovseg_jax.weights.sources import find_weights

# Fields of ``config.model`` that say what its parameters start from. They describe a run, not the
# model: a model directory leaves them out.
INIT_FIELDS = ("image_init", "text_init", "resample_init", "neck_init")


def architecture(model: ConfigDict) -> dict[str, Any]:
    """``config.model`` without `INIT_FIELDS`, as plain values."""
    plain = json.loads(model.to_json_best_effort())
    return {name: value for name, value in plain.items() if name not in INIT_FIELDS}


@dataclass(frozen=True)
class Start:
    """Published values of parameters, and what to say about them.

    Attributes:
      values: path to array, for the parameters that published weights fill.
      rows: see `start_table`.
      remarks: what the weights were made with and the model does otherwise, see `hub_config`.
    """

    values: dict[str, np.ndarray]
    rows: list[tuple[str, ...]]
    remarks: list[str]


def published_start(model: ConfigDict, shapes: Shapes) -> Start:
    """Reads the weights that a run begins with; what they do not fill stays random.

    Args:
      model: ``config.model``, with `INIT_FIELDS`. shapes: all the model's parameters.

    Raises:
      UserError: weights cannot be found or read, or do not fit.
    """
    values: dict[str, np.ndarray] = {}
    sources: dict[str, str] = {}
    remarks: list[str] = []
    for name, described in (("image", image_remarks), ("text", text_remarks)):
        spec = model[f"{name}_init"]
        if not spec:
            continue
        if name == "image":
            grid = tuple(model.image.grid) if model.resample_init else None
            found = initial_image(spec, shapes, grid)
        else:
            found = initial_text(spec, shapes)
        values |= found
        sources |= dict.fromkeys(found, spec)
        path = find_weights(spec, f"config.model.{name}_init")
        remarks += [f"{spec}: {line}" for line in described(path, model)]
    return Start(values, start_table(shapes, sources), remarks)


def start_table(shapes: Shapes, sources: Mapping[str, str]) -> list[tuple[str, ...]]:
    """What starts from published weights and what does not, one row per group of parameters.

    Args:
      shapes: all the model's parameters.
      sources: spec of the weights that filled a parameter, by path.

    Returns:
      rows (parameters, tensors, numbers, source), the first one the head. A module with one source
      is one row; of another its parts are listed, a part of several sources once for each.
    """
    origin = {path: sources.get(path, "random") for path in shapes}
    mixed: dict[str, set[str]] = {}
    for path in shapes:
        mixed.setdefault(path.split("/")[0], set()).add(origin[path])
    counts: dict[tuple[str, str], list[int]] = {}
    for path, shape in shapes.items():
        names = path.split("/")
        group = "/".join(names[:2]) if len(mixed[names[0]]) > 1 else names[0]
        entry = counts.setdefault((group, origin[path]), [0, 0])
        entry[0] += 1
        entry[1] += int(np.prod(shape))
    rows = [
        (group, str(tensors), f"{numbers:,}", source)
        for (group, source), (tensors, numbers) in sorted(counts.items())
    ]
    return [("parameters", "tensors", "numbers", "start from"), *rows]
