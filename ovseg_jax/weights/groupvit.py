"""Checkpoints of GroupViT (Xu et al., 2022) in both of their styles, both ways.

"original" are the names of the authors' code, "transformers" those of Hugging Face's library. The
styles also differ in whether attention's maps are fused and a projector's maps are convolutions.
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from ovseg_jax.errors import UserError
from ovseg_jax.models.build import build_model, variable_shapes
from ovseg_jax.models.ovsegmentor import STATISTICS
from ovseg_jax.weights.initialize import architecture
from ovseg_jax.weights.links import (
    FORMS,
    Link,
    Sizes,
    fused_attention,
    matching,
    module,
    norm,
    read_links,
    write_links,
)
from ovseg_jax.weights.released import (
    GROUPING_BLOCK,
    MODEL_FIELDS,
    image_config,
    image_links,
    image_names,
    projector_links,
    require_form,
)
from ovseg_jax.weights.weight_files import Tensors

ORIGINAL, TRANSFORMERS = "original", "transformers"

# Attention heads of the visual encoder, which tensors cannot tell.
HEADS = 6

# Stored, but not used by the model: positions, and a second temperature of training.
UNUSED = (r"text_model\.embeddings\.position_ids", r"multi_label_logit_scale")

# Layers of transformers, of the image and of the text; and of CLIP's text encoder.
_SEPARATE = {
    **{f"attention/{name}": f"self_attn.{name[0]}_proj" for name in ("query", "key", "value")},
    "attention/out": "self_attn.out_proj",
    "attention_norm": "layer_norm1",
    "mlp_norm": "layer_norm2",
    "mlp/fc1": "mlp.fc1",
    "mlp/fc2": "mlp.fc2",
}
_CLIP = {
    "attention/out": "attn.out_proj",
    "attention_norm": "ln_1",
    "mlp_norm": "ln_2",
    "mlp/fc1": "mlp.c_fc",
    "mlp/fc2": "mlp.c_proj",
}


# Names in each style; `maps` of a projector are its first map, batch norm and last map.
STYLES = {
    ORIGINAL: SimpleNamespace(
        **vars(image_names("img_encoder")),
        word="text_encoder.token_embedding.weight",
        text_position="text_encoder.positional_embedding",
        text_norm="text_encoder.ln_final",
        text_layers="text_encoder.transformer.resblocks",
        text_layer=_CLIP,
        text_fused="attn.in_proj_",
        projectors=("img_projector", "text_projector"),
        maps=("linear_hidden.0", "linear_hidden.1", "linear_out"),
        form="pointwise",
    ),
    TRANSFORMERS: SimpleNamespace(
        patch="vision_model.embeddings.patch_embeddings.projection",
        embed_norm="vision_model.embeddings.layernorm",
        position="vision_model.embeddings.position_embeddings",
        norm="vision_model.layernorm",
        stages="vision_model.encoder.stages",
        blocks="layers",
        block={**GROUPING_BLOCK, "cross/attention/out": "pre_assign_attn.attn.out_proj"},
        layer=_SEPARATE,
        fused="",
        word="text_model.embeddings.token_embedding.weight",
        text_position="text_model.embeddings.position_embedding.weight",
        text_norm="text_model.final_layer_norm",
        text_layers="text_model.encoder.layers",
        text_layer=_SEPARATE,
        text_fused="",
        projectors=("visual_projection", "text_projection"),
        maps=("0", "1", "3"),
        form="linear",
    ),
}


def style_of(tensors: Mapping[str, Any]) -> str:
    """Whose names these are, a key of `STYLES`; UserError where they are neither's."""
    anchors = {f"{style.stages}.0.group_token": name for name, style in STYLES.items()}
    for anchor, name in anchors.items():
        if anchor in tensors:
            return name
    raise UserError(f"no GroupViT checkpoint: it has no tensor {' or '.join(anchors)}")


def groupvit_config(
    tensors: Mapping[str, Any],
    *,
    heads: int = HEADS,
    text_heads: int = 0,
    grid: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """The ``config.model`` of a GroupViT checkpoint, whose sizes are those of the tensors.

    Args:
      heads, text_heads: of attention; 0 text heads for one per 64 channels.
      grid: rows and columns of the position embeddings; None for a square.

    Raises:
      UserError: a tensor that sizes are read from is missing or of an unexpected form.
    """
    style = STYLES[style_of(tensors)]
    sizes = Sizes(tensors, "GroupViT checkpoint")
    first, _, last = (f"{style.projectors[0]}.{name}.weight" for name in style.maps)
    axes = FORMS[style.form].axes
    vocab, text_width = sizes.shape(style.word, 2)
    fed = f"{style.text_layers}.0.{style.text_layer['mlp/fc1']}.weight"
    text = {
        "vocab_size": vocab,
        "width": text_width,
        "depth": sizes.depth(style.text_layers),
        "heads": text_heads or max(1, text_width // 64),
        "mlp_width": sizes.shape(fed, 2)[0],
        "max_positions": sizes.shape(style.text_position, 2)[0],
        "end_id": vocab - 1,  # as in CLIP's vocabulary
    }
    towers = {"image": image_config(sizes, style, heads, grid), "text_form": "causal", "text": text}
    joint = {"joint_width": sizes.shape(last, axes)[0]}
    joint |= {"projector_width": sizes.shape(first, axes)[0]}
    return architecture({**towers, **MODEL_FIELDS, **joint})


def from_groupvit(
    tensors: Tensors, config: Mapping[str, Any], origin: str = "the checkpoint"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our (parameters, running statistics), nested NumPy, from a checkpoint of either style.

    Raises:
      UserError: lists every tensor of `origin` that is missing, unused or of another shape.
    """
    shapes = variable_shapes(build_model(ConfigDict(dict(config))))
    links = model_links(config, style_of(tensors))
    arrays = read_links(tensors, links, shapes, matching(tensors, UNUSED), origin)
    tree = unflatten_dict(arrays, sep="/")
    return tree, tree.pop(STATISTICS)


def to_groupvit(
    params: Mapping[str, Any],
    batch_stats: Mapping[str, Any],
    config: Mapping[str, Any],
    style: str = TRANSFORMERS,
) -> Tensors:
    """The inverse of `from_groupvit`, in a style; UserError where the form is another."""
    needed = {"image.binding": "grouping_block", "text_form": "causal", "decoder": None}
    require_form("GroupViT's", config, {**needed, "projector_norm": "batch"})
    tree = {**params, STATISTICS: batch_stats}
    return write_links(flatten_dict(tree, sep="/"), model_links(config, style))


def model_links(model: Mapping[str, Any], style: str) -> list[Link]:
    """The whole model of a ``config.model``."""
    names, layers = STYLES[style], "text_encoder/stack/layers"
    blocks = [f"{names.text_layers}.{index}." for index in range(model["text"]["depth"])]
    links = [
        Link(("log_scale",), ("logit_scale",), "scalar"),
        *image_links(model["image"], names),
        Link(("text_encoder/word",), (names.word,), "table"),
        Link(("text_encoder/position",), (names.text_position,), "table"),
        *norm("text_encoder/norm", names.text_norm),
        *module(layers, blocks, names.text_layer, stacked=True),
    ]
    if names.text_fused:
        links += fused_attention(f"{layers}/attention", blocks, names.text_fused, stacked=True)
    for ours, theirs in zip(("image", "text"), names.projectors, strict=True):
        maps = (f"{theirs}.{name}" for name in names.maps)
        links += projector_links(f"{ours}_projector", *maps, form=names.form)
    return links
