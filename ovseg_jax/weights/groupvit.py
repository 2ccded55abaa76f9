"""Checkpoints of GroupViT (Xu et al., 2022) in both of their styles, both ways.

"original" are the names of the authors' code, "transformers" those of the Hugging Face library.
Both hold the same model. They differ in names, in how attention's three maps are stored (fused or
apart) and in whether a projector's maps are convolutions over one position.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from ovseg_jax.errors import UserError
from ovseg_jax.models.build import build_model
from ovseg_jax.models.ovsegmentor import STATISTICS
from ovseg_jax.optim.groups import flatten, nest
from ovseg_jax.weights.initialize import architecture, variable_shapes
from ovseg_jax.weights.links import (
    Link,
    fused_attention,
    linear,
    matching,
    module,
    norm,
    read_links,
    write_links,
)
from ovseg_jax.weights.released import (
    GROUPING_BLOCK,
    IMAGE_FIELDS,
    MODEL_FIELDS,
    pre_norm_layers,
    projector_links,
    require_form,
)
from ovseg_jax.weights.tensors import Sizes, Tensors, grid_of

ORIGINAL, TRANSFORMERS = "original", "transformers"
STYLES = (ORIGINAL, TRANSFORMERS)

# Attention heads of the visual encoder, which tensors cannot tell.
HEADS = 6

# Stored, but not used by the model: positions that are counted anew, and a second temperature that
# only training reads where it is not shared.
UNUSED = (r"text_model\.embeddings\.position_ids", r"multi_label_logit_scale")

# Names before the numbered stages and layers.
IMAGE_PREFIX = {ORIGINAL: "img_encoder", TRANSFORMERS: "vision_model"}
STAGES = {ORIGINAL: "img_encoder.layers", TRANSFORMERS: "vision_model.encoder.stages"}
TEXT_LAYERS = {
    ORIGINAL: "text_encoder.transformer.resblocks",
    TRANSFORMERS: "text_model.encoder.layers",
}
# Patch embedding, its norm, positions and the last norm, after `IMAGE_PREFIX`.
IMAGE_NAMES = {
    ORIGINAL: ("patch_embed.proj", "patch_embed.norm", "pos_embed", "norm"),
    TRANSFORMERS: (
        "embeddings.patch_embeddings.projection",
        "embeddings.layernorm",
        "embeddings.position_embeddings",
        "layernorm",
    ),
}
# Word embeddings, positions and the stem of the last norm.
TEXT_NAMES = {
    ORIGINAL: (
        "text_encoder.token_embedding.weight",
        "text_encoder.positional_embedding",
        "text_encoder.ln_final",
    ),
    TRANSFORMERS: (
        "text_model.embeddings.token_embedding.weight",
        "text_model.embeddings.position_embedding.weight",
        "text_model.final_layer_norm",
    ),
}
# Layers of transformers, of the image and of the text; and of CLIP's text encoder.
_SEPARATE = {
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
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
_BLOCK = {
    ORIGINAL: GROUPING_BLOCK,
    TRANSFORMERS: {**GROUPING_BLOCK, "cross/attention/out": "pre_assign_attn.attn.out_proj"},
}


def style_of(tensors: Mapping[str, Any]) -> str:
    """Whose names these are, one of `STYLES`.

    Raises:
      UserError: neither's.
    """
    anchors = {f"{STAGES[style]}.0.group_token": style for style in STYLES}
    for anchor, style in anchors.items():
        if anchor in tensors:
            return style
    raise UserError(
        f"no GroupViT checkpoint: it has no tensor {' or '.join(anchors)}. Its first "
        f"tensors are {', '.join(list(tensors)[:3])}"
    )


def groupvit_config(
    tensors: Mapping[str, Any],
    *,
    heads: int = HEADS,
    text_heads: int = 0,
    grid: tuple[int, int] | None = None,
    activation: str = "quick_gelu",
) -> dict[str, Any]:
    """The ``config.model`` of a GroupViT checkpoint, whose sizes are those of the tensors.

    Args:
      tensors: by name, in either style; anything with a shape.
      heads: attention heads of the visual encoder.
      text_heads: attention heads of the text encoder; 0 for one per 64 channels.
      grid: rows and columns of the position embeddings; None for a square.
      activation: of the text encoder.

    Raises:
      UserError: a tensor that sizes are read from is missing or of an unexpected form.
    """
    style = style_of(tensors)
    sizes = Sizes(tensors, "GroupViT checkpoint")
    shape, depth = sizes.shape, sizes.depth
    patch, embed_norm, position, _ = (f"{IMAGE_PREFIX[style]}.{n}" for n in IMAGE_NAMES[style])
    word, text_position, _ = TEXT_NAMES[style]
    text_layers, stage = TEXT_LAYERS[style], STAGES[style]
    if style == ORIGINAL:
        text_fed = shape(f"{text_layers}.0.mlp.c_fc.weight", 2)[0]
        hidden = shape("img_projector.linear_hidden.0.weight", 3)[0]
        joint = shape("img_projector.linear_out.weight", 3)[0]
    else:
        text_fed = shape(f"{text_layers}.0.mlp.fc1.weight", 2)[0]
        hidden = shape("visual_projection.0.weight", 2)[0]
        joint = shape("visual_projection.3.weight", 2)[0]
    vocab, text_width = shape(word, 2)
    width, _, side, _ = shape(f"{patch}.weight", 4)
    stages = []  # (group tokens, groups, layers) of every stage that groups
    while f"{stage}.{len(stages)}.group_token" in tensors:
        name = f"{stage}.{len(stages)}"
        tokens = shape(f"{name}.group_token", 3)[1]
        groups = shape(f"{name}.downsample.mlp_inter.fc2.weight", 2)[0]
        stages.append((tokens, groups, depth(block_name(style, len(stages)))))
    return architecture(
        {
            "image": {
                **IMAGE_FIELDS,
                "patch": side,
                "grid": grid_of(shape(position, 3)[1], grid, position),
                "width": width,
                "heads": heads,
                "mlp_ratio": sizes.ratio(f"{stage}.0.downsample.mlp_channels.fc1.weight", width),
                "first_layers": stages[0][2],
                "second_layers": depth(block_name(style, len(stages))),
                "group_tokens": stages[0][0],
                "num_groups": stages[0][1],
                "later_stages": tuple(stages[1:]),
                "patch_norm": f"{embed_norm}.weight" in tensors,
            },
            "text_form": "causal",
            "text": {
                "vocab_size": vocab,
                "width": text_width,
                "depth": depth(text_layers),
                "heads": text_heads or max(1, text_width // 64),
                "mlp_width": text_fed,
                "max_positions": shape(text_position, 2)[0],
                "end_id": vocab - 1,  # as in CLIP's vocabulary
                "activation": activation,
            },
            **MODEL_FIELDS,
            "joint_width": joint,
            "projector_width": hidden,
        }
    )


def from_groupvit(
    tensors: Tensors, config: Mapping[str, Any], origin: str = "the checkpoint"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our (parameters, running statistics), nested NumPy, from a checkpoint of either style.

    Args:
      tensors: by name.
      config: see `groupvit_config`.
      origin: where the tensors come from, for messages.

    Raises:
      UserError: one message that lists every tensor that is missing, unused or of another shape.
    """
    shapes = variable_shapes(build_model(ConfigDict(dict(config))))
    links = model_links(config, style_of(tensors))
    tree = nest(read_links(tensors, links, shapes, matching(tensors, UNUSED), origin))
    return tree, tree.pop(STATISTICS)


def to_groupvit(
    params: Mapping[str, Any],
    batch_stats: Mapping[str, Any],
    config: Mapping[str, Any],
    style: str = TRANSFORMERS,
) -> Tensors:
    """A checkpoint's tensors in one of `STYLES`, the inverse of `from_groupvit`.

    Raises:
      UserError: the model has another form than GroupViT.
    """
    require_form(
        "GroupViT's",
        {
            "image.binding": (config["image"]["binding"], "grouping_block"),
            "text_form": (config["text_form"], "causal"),
            "decoder": (config["decoder"], None),
            "projector_norm": (config["projector_norm"], "batch"),
        },
    )
    return write_links(flatten({**params, STATISTICS: batch_stats}), model_links(config, style))


# ---- names


def block_name(style: str, stage: int) -> str:
    """Name of a stage's Transformer layers, before their number."""
    return f"{STAGES[style]}.{stage}.{'blocks' if style == ORIGINAL else 'layers'}"


def image_links(image: Mapping[str, Any], style: str) -> list[Link]:
    """The visual encoder of a ``config.model.image``."""
    ours = "image_encoder"
    names = (f"{IMAGE_PREFIX[style]}.{name}" for name in IMAGE_NAMES[style])
    patch, embed_norm, position, last = names
    links = [
        *linear(f"{ours}/patch_embed", patch, form="patch"),
        *(norm(f"{ours}/embed_norm", embed_norm) if image["patch_norm"] else ()),
        Link((f"{ours}/position",), (position,), "token"),
        *norm(f"{ours}/norm", last),
    ]
    # Of each stage: path of its layers, their number, paths of its group tokens and block.
    stages = [("first", image["first_layers"], "group_token", "binding")]
    stages += [
        (f"stages_{i}/layers", layers, f"stages_{i}/group_token", f"stages_{i}/block")
        for i, (_, _, layers) in enumerate(image["later_stages"])
    ]
    for index, (stack, depth, token, block) in enumerate(stages):
        links += _layers(f"{ours}/{stack}/layers", style, index, depth)
        theirs = f"{STAGES[style]}.{index}"
        links.append(Link((f"{ours}/{token}",), (f"{theirs}.group_token",), "token"))
        links += module(f"{ours}/{block}", (f"{theirs}.downsample.",), _BLOCK[style])
        if index:
            carried = f"{ours}/stages_{index - 1}"
            names = {"projector_norm": "0", "projector/fc1": "1.fc1", "projector/fc2": "1.fc2"}
            links += module(carried, (f"{theirs}.group_projector.",), names)
    return links + _layers(f"{ours}/second/layers", style, len(stages), image["second_layers"])


def _layers(ours: str, style: str, stage: int, depth: int) -> list[Link]:
    blocks = [f"{block_name(style, stage)}.{index}." for index in range(depth)]
    if not blocks:
        return []
    if style == ORIGINAL:
        return pre_norm_layers(ours, *blocks)
    return module(ours, blocks, _SEPARATE, stacked=True)


def model_links(model: Mapping[str, Any], style: str) -> list[Link]:
    """The whole model of a ``config.model``."""
    word, position, last = TEXT_NAMES[style]
    text_layers = "text_encoder/stack/layers"
    blocks = [f"{TEXT_LAYERS[style]}.{index}." for index in range(model["text"]["depth"])]
    links = [
        Link(("log_scale",), ("logit_scale",), "scalar"),
        *image_links(model["image"], style),
        Link(("text_encoder/word",), (word,), "table"),
        Link(("text_encoder/position",), (position,), "table"),
        *norm("text_encoder/norm", last),
        *module(text_layers, blocks, _CLIP if style == ORIGINAL else _SEPARATE, stacked=True),
    ]
    if style == ORIGINAL:
        attention = f"{text_layers}/attention"
        links += fused_attention(attention, blocks, "attn.in_proj_", stacked=True)
        prefixes = {"image_projector": "img_projector", "text_projector": "text_projector"}
        names, form = ("linear_hidden.0", "linear_hidden.1", "linear_out"), "pointwise"
    else:
        prefixes = {"image_projector": "visual_projection", "text_projector": "text_projection"}
        names, form = ("0", "1", "3"), "linear"
    for ours, theirs in prefixes.items():
        links += projector_links(ours, *(f"{theirs}.{name}" for name in names), form=form)
    return links
