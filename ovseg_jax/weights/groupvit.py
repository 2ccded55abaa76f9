"""Checkpoints of GroupViT, the authors' and Hugging Face's, both ways (Xu et al., 2022).

Sizes come from the tensors; what these cannot tell has the published values as defaults.
"""

import re
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from ovseg_jax.errors import UserError
from ovseg_jax.models.build import build_model
from ovseg_jax.models.projector import STATISTICS
from ovseg_jax.optim.groups import flatten, nest
from ovseg_jax.weights.groupvit_names import (
    IMAGE_PREFIX,
    ORIGINAL,
    STYLES,
    TRANSFORMERS,
    UNUSED,
    block_name,
    model_links,
    stage_name,
)
from ovseg_jax.weights.initialize import variable_shapes
from ovseg_jax.weights.sizes import Sizes, complete_told, grid_of
from ovseg_jax.weights.tensors import Tensors
from ovseg_jax.weights.two_way import read_links, write_links

# What tensors cannot tell. Text heads of 0 are as many as there are 64 channels; an end token of
# -1 is the last of the vocabulary, as in CLIP's.
TOLD = {
    "heads": 6,
    "text_heads": 0,
    "grid": None,
    "end_id": -1,
    "activation": "quick_gelu",
    "assignment": "hard",
    "drop_path": 0.1,
    "eps": 1e-5,
    "dtype": "float32",
    "matmul_dtype": "float32",
    "remat": "none",
}


def style_of(tensors: Mapping[str, Any]) -> str:
    """Whose names these are: "original" or "transformers".

    Raises:
      UserError: neither's.
    """
    for style in STYLES:
        if f"{stage_name(style, 0)}.group_token" in tensors:
            return style
    wanted = " or ".join(f"{stage_name(style, 0)}.group_token" for style in STYLES)
    raise UserError(
        f"no GroupViT checkpoint: it has no tensor {wanted}. Its first tensors are "
        f"{', '.join(list(tensors)[:3])}"
    )


def groupvit_config(tensors: Mapping[str, Any], **told: Any) -> dict[str, Any]:
    """The ``config.model`` of a GroupViT checkpoint.

    Args:
      tensors: by name, in either style; anything with a shape.
      told: what the tensors cannot tell: `heads`, `text_heads`, `grid` (rows and columns of the
        position embeddings; None for a square), `end_id`, `activation` (of the text encoder),
        `assignment`, `drop_path`, `eps`, `dtype`, `matmul_dtype`, `remat`. Defaults: `TOLD`.

    Raises:
      UserError: a tensor that sizes are read from is missing or of an unexpected form.
    """
    told, style = complete_told(told, TOLD), style_of(tensors)
    sizes = Sizes(tensors, "GroupViT checkpoint")
    shape, depth = sizes.shape, sizes.depth
    vision = IMAGE_PREFIX[style]
    if style == ORIGINAL:
        patch, position, embed_norm = "patch_embed.proj.weight", "pos_embed", "patch_embed.norm"
        word = shape("text_encoder.token_embedding.weight", 2)
        max_positions = shape("text_encoder.positional_embedding", 2)[0]
        text_blocks = "text_encoder.transformer.resblocks"
        text_fed = shape(f"{text_blocks}.0.mlp.c_fc.weight", 2)[0]
        hidden = shape("img_projector.linear_hidden.0.weight", 3)[0]
        joint = shape("img_projector.linear_out.weight", 3)[0]
    else:
        patch = "embeddings.patch_embeddings.projection.weight"
        position, embed_norm = "embeddings.position_embeddings", "embeddings.layernorm"
        word = shape("text_model.embeddings.token_embedding.weight", 2)
        max_positions = shape("text_model.embeddings.position_embedding.weight", 2)[0]
        text_blocks = "text_model.encoder.layers"
        text_fed = shape(f"{text_blocks}.0.mlp.fc1.weight", 2)[0]
        hidden = shape("visual_projection.0.weight", 2)[0]
        joint = shape("visual_projection.3.weight", 2)[0]
    width, _, patch_side, _ = shape(f"{vision}.{patch}", 4)
    positions = shape(f"{vision}.{position}", 3)[1]
    grid = grid_of(positions, told["grid"], f"{vision}.{position}")
    stages = []  # (group tokens, groups, layers) of every stage that groups
    while f"{stage_name(style, len(stages))}.group_token" in tensors:
        name = stage_name(style, len(stages))
        tokens = shape(f"{name}.group_token", 3)[1]
        groups = shape(f"{name}.downsample.mlp_inter.fc2.weight", 2)[0]
        stages.append((tokens, groups, depth(block_name(style, len(stages)))))
    fed = shape(f"{stage_name(style, 0)}.downsample.mlp_channels.fc1.weight", 2)[0]
    options = {"remat": told["remat"], "unroll": 1}
    return {
        "image": {
            "patch": patch_side,
            "grid": grid,
            "width": width,
            "heads": told["heads"],
            "mlp_ratio": fed / width,
            "eps": told["eps"],
            "first_layers": stages[0][2],
            "second_layers": depth(block_name(style, len(stages))),
            "group_layer": 0,
            "group_tokens": stages[0][0],
            "num_groups": stages[0][1],
            "later_stages": tuple(stages[1:]),
            "binding": "grouping_block",
            "second_stage": "groups",
            "second_heads": 0,
            "patch_norm": f"{vision}.{embed_norm}.weight" in tensors,
            "group_std": 0.02,
            "trunk_width": 0,
            "trunk_heads": 0,
            "class_token": False,
            "register_tokens": 0,
            "position": "learned",
            "position_resize": "bicubic",
            "rope_theta": 100.0,
            "trunk_norm": False,
            "layer_scale": None,
            "assignment": told["assignment"],
            "binding_scale": None,
            "gumbel_temperature": 1.0,
            "drop_path": told["drop_path"],
            **options,
        },
        "text_form": "causal",
        "text": {
            "vocab_size": word[0],
            "width": word[1],
            "depth": depth(text_blocks),
            "heads": told["text_heads"] or max(1, word[1] // 64),
            "mlp_width": text_fed,
            "max_positions": max_positions,
            "end_id": told["end_id"] % word[0],
            "activation": told["activation"],
            "eps": told["eps"],
            **options,
        },
        "decoder": None,
        "joint_width": joint,
        "projector_layers": 2,
        "projector_width": hidden,
        "projector_norm": "batch",
        "projector_activation": "relu",
        "projector_bias": True,
        "text_pool": "eot",
        "pad_id": 0,
        "temperature_init": 0.07,
        "dtype": told["dtype"],
        "matmul_dtype": told["matmul_dtype"],
    }


def from_groupvit(
    tensors: Tensors, config: Mapping[str, Any], origin: str = "the checkpoint"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our parameters from a GroupViT checkpoint of either style.

    Args:
      tensors: by name. config: the ``config.model``, as `groupvit_config` gives it.
      origin: where the tensors come from, for messages.

    Returns:
      (parameters, running statistics), nested NumPy.

    Raises:
      UserError: one message that lists every tensor that is missing, unused or of another shape.
    """
    style, shapes = style_of(tensors), variable_shapes(build_model(ConfigDict(dict(config))))
    links = model_links(config, style)
    unused = re.compile("|".join(f"(?:{pattern})" for pattern in UNUSED))
    left_out = [name for name in tensors if unused.fullmatch(name)]
    tree = nest(read_links(tensors, links, shapes, left_out, origin))
    return tree, tree.pop(STATISTICS)


def to_groupvit(
    params: Mapping[str, Any],
    batch_stats: Mapping[str, Any],
    config: Mapping[str, Any],
    style: str = TRANSFORMERS,
) -> Tensors:
    """A GroupViT checkpoint's tensors from our parameters; the inverse of `from_groupvit`.

    Args:
      style: whose names, "original" or "transformers".

    Raises:
      UserError: the model has another form than GroupViT.
    """
    forms = {
        "image.binding": (config["image"]["binding"], "grouping_block"),
        "text_form": (config.get("text_form"), "causal"),
        "decoder": (config["decoder"], None),
        "projector_norm": (config["projector_norm"], "batch"),
    }
    for field, (found, needed) in forms.items():
        if found != needed:
            raise UserError(
                f"only a model of GroupViT's form has its names: config.model.{field} is "
                f"{found!r}, not {needed!r}"
            )
    return write_links(flatten({**params, STATISTICS: batch_stats}), model_links(config, style))
