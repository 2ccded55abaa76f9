"""Data-dependent start of the neck: it standardizes the trunk's features (Salimans & Kingma, 2016).

The channels of a pretrained trunk differ in mean and scale. Without this start, the common mean
decides which group wins every patch, and one or two groups take them all; with it, the groups
separate at once.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ovseg_jax import processes
from ovseg_jax.data.augment import complete_transform, train_image
from ovseg_jax.data.decoding import UnreadableImage
from ovseg_jax.data.order import example_rng
from ovseg_jax.data.records import RecordSource
from ovseg_jax.errors import UserError
from ovseg_jax.models.ovsegmentor import OVSegmentor
from ovseg_jax.shapes import Float

# Enough patches for means and deviations of a few hundred channels.
IMAGES = 64


def standardized_neck(
    model: OVSegmentor,
    params: Mapping[str, Any],
    source: RecordSource,
    transform: Mapping[str, Any],
    seed: int,
) -> dict[str, Any]:
    """The parameters with the neck's input standardized on images of the training set.

    ``W x + b`` becomes ``W (x - mean) / std + b``, folded into kernel and bias; so does the
    first map of the image heads, where there are any, on the class token.

    Args:
      transform: of the images, as in training; seed: of its random draws.

    Raises:
      UserError: the model has no neck, or not one image could be read.
    """
    if "neck" not in params["image_encoder"]:
        raise UserError(
            "config.model.neck_init = 'standardize' needs a neck: give the trunk another width "
            "than the encoder (config.model.image.trunk_width)"
        )
    images, transform = [], complete_transform(transform)
    # Evenly over the records: those of a mixture lie one data set after the other.
    for index in range(0, len(source), max(1, len(source) // IMAGES))[:IMAGES]:
        record = source[index]
        try:
            images.append(train_image(record.image, example_rng(seed, 0, record.key), transform))
        except UnreadableImage:
            continue  # the loader counts and reports it
    if not images:
        raise UserError(f"none of {IMAGES} images of {source.name} can be read")
    trunk = jax.jit(lambda params, x: model.apply({"params": params}, x, method="trunk"))
    features = np.asarray(trunk(processes.local(params), np.stack(images)), np.float32)
    patches = features
    params = {**params, "image_encoder": dict(params["image_encoder"])}
    if model.image_head:
        patches = features[:, 1:]
        head = params["whole_head"]
        params["whole_head"] = {**head, "fc": _folded(head["fc"], features[:, 0])}
    neck = params["image_encoder"]["neck"]
    params["image_encoder"]["neck"] = _folded(neck, patches.reshape(-1, patches.shape[-1]))
    return params


def _folded(
    dense: Mapping[str, Any], inputs: Float[np.ndarray, "rows channels"]
) -> dict[str, jax.Array]:
    """A dense map that standardizes its inputs first, by the statistics of `inputs`."""
    mean, deviation = inputs.mean(0), np.maximum(inputs.std(0), 1e-3)

    @jax.jit
    def fold(dense: Mapping[str, Any]) -> dict[str, Any]:
        kernel = dense["kernel"] / jnp.asarray(deviation)[:, None]
        return {"kernel": kernel, "bias": dense["bias"] - (jnp.asarray(mean)[None] @ kernel)[0]}

    return jax.tree.map(
        lambda new, old: jax.device_put(new, old.sharding), fold(dense), dict(dense)
    )
