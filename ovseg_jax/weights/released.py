"""Checkpoints of the released PyTorch model, both ways.

Sizes come from the tensors; what these cannot tell (heads, epsilons) has the released values as
defaults. What the released code stores without using it is kept apart (`extra_tensors`), so that
`to_released` gives back every tensor that `from_released` was given, to the bit.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ovseg_jax.errors import UserError
from ovseg_jax.models.build import build_model
from ovseg_jax.models.projector import STATISTICS
from ovseg_jax.optim.groups import flatten, nest
from ovseg_jax.weights.initialize import variable_shapes
from ovseg_jax.weights.released_names import (
    DECODER,
    IMAGE,
    TEACHER,
    TEXT,
    UNUSED,
    image_links,
    model_links,
)
from ovseg_jax.weights.sizes import Sizes, complete_told, grid_of
from ovseg_jax.weights.tensors import Tensors
from ovseg_jax.weights.two_way import read_links, write_links

# Position embeddings are [L, D] where they came from an image checkpoint and [1, L, D] else. This
# key among the extra tensors, with the axis's length, remembers the second form.
POSITION_AXIS = "pos_embed.leading_axis"

# What tensors cannot tell.
TOLD = {
    "heads": 8,
    "second_heads": 8,
    "decoder_heads": 8,
    "text_heads": 12,
    "grid": None,
    "assignment": "hard",
    "drop_path": 0.1,
    "dropout": 0.1,
    "image_eps": 1e-5,
    "text_eps": 1e-12,
    "pad_id": 0,
    "dtype": "float32",
    "matmul_dtype": "float32",
    "remat": "none",
}


def released_config(tensors: Mapping[str, Any], **told: Any) -> dict[str, Any]:
    """The ``config.model`` of a released checkpoint.

    Args:
      tensors: by released name; anything with a shape.
      told: what the tensors cannot tell: `heads`, `second_heads` (before and after the binding),
        `decoder_heads`, `text_heads`, `grid` (rows and columns of the position embeddings; None
        for a square), `assignment`, `drop_path`, `dropout`, `image_eps`, `text_eps`, `pad_id`,
        `dtype`, `matmul_dtype`, `remat`. Defaults are the released ones (`TOLD`).

    Raises:
      UserError: a tensor that sizes are read from is missing or of an unexpected form, or sizes
        contradict each other.
    """
    told = complete_told(told, TOLD)
    sizes = Sizes(tensors, "released checkpoint")
    shape, depth = sizes.shape, sizes.depth
    width, _, patch, _ = shape(f"{IMAGE}.patch_embed.proj.weight", 4)
    positions = np.shape(tensors.get(f"{IMAGE}.pos_embed", np.zeros((0, width))))[-2]
    grid = grid_of(positions, told["grid"], f"{IMAGE}.pos_embed")
    vocab, text_width = shape(f"{TEXT}.embeddings.word_embeddings.weight", 2)
    hidden, _, _ = shape("img_projector.linear_hidden.0.weight", 3)
    joint, _, _ = shape("img_projector.linear_out.weight", 3)
    options = {"remat": told["remat"], "unroll": 1}
    fed = shape(f"{IMAGE}.layers.0.downsample.mlp_channels.fc1.weight", 2)[0]
    decoder_fed, decoder_width = shape(f"{DECODER}.0.pre_assign_attn.mlp.fc1.weight", 2)
    return {
        "image": {
            "patch": patch,
            "grid": grid,
            "width": width,
            "heads": told["heads"],
            "mlp_ratio": _ratio(fed, width),
            "eps": told["image_eps"],
            "first_layers": depth(f"{IMAGE}.layers.0.blocks"),
            "second_layers": depth(f"{IMAGE}.layers.1.blocks"),
            "group_layer": 0,
            "num_groups": shape(f"{IMAGE}.layers.0.downsample.mlp_inter.fc2.weight", 2)[0],
            "group_tokens": shape(f"{IMAGE}.layers.0.group_token", 3)[1],
            "binding": "grouping_block",
            "second_stage": "groups",
            "second_heads": told["second_heads"],
            "patch_norm": f"{IMAGE}.patch_embed.norm.weight" in tensors,
            "group_std": 0.02,
            "trunk_width": 0,
            "trunk_heads": 0,
            "class_token": False,
            "trunk_norm": False,
            "register_tokens": 0,
            "position": "learned",
            "position_resize": "bicubic",
            "rope_theta": 100.0,
            "layer_scale": None,
            "assignment": told["assignment"],
            "binding_scale": None,
            "gumbel_temperature": 1.0,
            "drop_path": told["drop_path"],
            **options,
        },
        "text": {
            "vocab_size": vocab,
            "width": text_width,
            "depth": depth(f"{TEXT}.encoder.layer"),
            "heads": told["text_heads"],
            "mlp_width": shape(f"{TEXT}.encoder.layer.0.intermediate.dense.weight", 2)[0],
            "max_positions": shape(f"{TEXT}.embeddings.position_embeddings.weight", 2)[0],
            "dropout": told["dropout"],
            "eps": told["text_eps"],
            **options,
        },
        "decoder": {
            "width": decoder_width,
            "heads": told["decoder_heads"],
            "mlp_ratio": _ratio(decoder_fed, decoder_width),
            "eps": told["image_eps"],
            "order": "cross_first",
            "depth": depth(DECODER),
            "mask_padding": False,
        },
        "joint_width": joint,
        "projector_layers": 2,
        "projector_width": hidden,
        "projector_norm": "batch",
        "projector_activation": "relu",
        "projector_bias": True,
        "text_pool": "cls",
        "pad_id": told["pad_id"],
        "temperature_init": 0.07,
        "dtype": told["dtype"],
        "matmul_dtype": told["matmul_dtype"],
    }


def extra_tensors(tensors: Tensors) -> Tensors:
    """Tensors that the released code stores without using them, by released name.

    They are kept beside the parameters for `to_released` alone.
    """
    unused = re.compile("|".join(f"(?:{pattern})" for pattern in UNUSED))
    extra = {name: value for name, value in tensors.items() if unused.fullmatch(name)}
    if np.ndim(tensors.get(f"{IMAGE}.pos_embed")) == 3:
        extra[POSITION_AXIS] = np.asarray(1, np.int64)
    return extra


def from_released(
    tensors: Tensors, config: Mapping[str, Any] | ConfigDict, origin: str = "the checkpoint"
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]:
    """Our parameters from a released checkpoint's tensors.

    Args:
      tensors: by released name ("img_encoder...."; no "module." in front).
      config: the ``config.model``, as `released_config` gives it.
      origin: where the tensors come from, for messages.

    Returns:
      (parameters, running statistics, teacher), nested NumPy: the teacher is the visual encoder's
      moving average, None where the checkpoint has none.

    Raises:
      UserError: one message that lists every tensor that is missing, unused or of another shape.
    """
    config = ConfigDict(dict(config))
    flat = _flat_positions(tensors)
    shapes = variable_shapes(build_model(config))
    momentum = {name: x for name, x in flat.items() if name.startswith(f"{TEACHER}.")}
    rest = {name: x for name, x in flat.items() if name not in momentum}
    arrays = read_links(rest, model_links(config), shapes, extra_tensors(tensors), origin)
    teacher = None
    if momentum:
        mine = {path: x for path, x in shapes.items() if path.startswith("image_encoder/")}
        links = image_links(config["image"], TEACHER)
        teacher = nest(read_links(momentum, links, mine, (), origin))["image_encoder"]
    tree = nest(arrays)
    return tree, tree.pop(STATISTICS), teacher


def to_released(
    params: Mapping[str, Any],
    batch_stats: Mapping[str, Any],
    config: Mapping[str, Any] | ConfigDict,
    teacher: Mapping[str, Any] | None = None,
    extra: Tensors | None = None,
) -> Tensors:
    """A released checkpoint's tensors from our parameters; the inverse of `from_released`.

    Args:
      params, batch_stats, teacher: as `from_released` gives them.
      extra: as `extra_tensors` gives them, where there are any.

    Raises:
      UserError: the model is of another form than the released one.
    """
    config = ConfigDict(dict(config))
    wanted = {
        "image.binding": (config.image.binding, "grouping_block"),
        "image.second_stage": (config.image.second_stage, "groups"),
        "decoder.order": (config.decoder and config.decoder.order, "cross_first"),
        "projector_norm": (config.projector_norm, "batch"),
    }
    for field, (found, needed) in wanted.items():
        if found != needed:
            raise UserError(
                f"only a model of the released form has released names: config.model.{field} is "
                f"{found!r}, not {needed!r}"
            )
    tensors = write_links(_arrays({**params, STATISTICS: batch_stats}), model_links(config))
    if teacher is not None:
        links = image_links(config.image, TEACHER)
        tensors |= write_links(_arrays({"image_encoder": teacher}), links)
    extra = dict(extra or {})
    if extra.pop(POSITION_AXIS, None) is not None:
        for name in (f"{IMAGE}.pos_embed", f"{TEACHER}.pos_embed"):
            if name in tensors:
                tensors[name] = tensors[name][None]
    return tensors | extra


def _ratio(hidden: int, width: int) -> float:
    """The quotient whose product with the width, cut to an integer, is `hidden` again."""
    ratio = hidden / width
    return ratio if int(ratio * width) == hidden else math.nextafter(ratio, math.inf)


def _arrays(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in flatten(tree).items()}


def _flat_positions(tensors: Tensors) -> Tensors:
    """Position embeddings of both forms as [L, D]."""
    names = (f"{IMAGE}.pos_embed", f"{TEACHER}.pos_embed")
    flat = {n: tensors[n][0] for n in names if n in tensors and np.ndim(tensors[n]) == 3}
    return {**tensors, **flat}
