"""The tensor names of GroupViT checkpoints in both of their styles, and our parameters.

"original" is the authors' code, "transformers" the Hugging Face library. Both hold the same model;
they differ in names, in how attention's three maps are stored (fused or apart) and in whether a
projector's maps are convolutions over one position.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ovseg_jax.models.projector import STATISTICS
from ovseg_jax.weights.released_names import grouping_block, linear, norm, pre_norm_layers
from ovseg_jax.weights.two_way import Link

ORIGINAL, TRANSFORMERS = "original", "transformers"
STYLES = (ORIGINAL, TRANSFORMERS)

# Stored, but no part of the model: positions that are counted anew, and a second temperature that
# only training reads where it is not shared.
UNUSED = (r"text_model\.embeddings\.position_ids", r"multi_label_logit_scale")

IMAGE_PREFIX = {ORIGINAL: "img_encoder", TRANSFORMERS: "vision_model"}


def stage_name(style: str, index: int) -> str:
    """Prefix of a grouping stage."""
    where = {ORIGINAL: "img_encoder.layers", TRANSFORMERS: "vision_model.encoder.stages"}
    return f"{where[style]}.{index}"


def block_name(style: str, stage: int) -> str:
    """Prefix of a stage's Transformer layers, up to their number."""
    part = "blocks" if style == ORIGINAL else "layers"
    return f"{stage_name(style, stage)}.{part}"


def separate_layers(ours: str, *blocks: str) -> list[Link]:
    """A stack of pre-norm layers whose queries, keys and values are maps of their own."""

    def at(suffix: str) -> tuple[str, ...]:
        return tuple(f"{block}.{suffix}" for block in blocks)

    links = []
    for part, name in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "out")):
        links += linear(f"{ours}/attention/{part}", *at(f"self_attn.{name}_proj"), stacked=True)
    links += norm(f"{ours}/attention_norm", *at("layer_norm1"), stacked=True)
    links += norm(f"{ours}/mlp_norm", *at("layer_norm2"), stacked=True)
    for part in ("fc1", "fc2"):
        links += linear(f"{ours}/mlp/{part}", *at(f"mlp.{part}"), stacked=True)
    return links


def residual_layers(ours: str, *blocks: str) -> list[Link]:
    """A stack of pre-norm layers with the names of CLIP's text encoder."""

    def at(suffix: str) -> tuple[str, ...]:
        return tuple(f"{block}.{suffix}" for block in blocks)

    fused = tuple(f"{ours}/attention/{part}" for part in ("query", "key", "value"))
    kernels, biases = (tuple(f"{path}/{x}" for path in fused) for x in ("kernel", "bias"))
    return [
        Link(kernels, at("attn.in_proj_weight"), "fused_linear", True),
        Link(biases, at("attn.in_proj_bias"), "fused_vector", True),
        *linear(f"{ours}/attention/out", *at("attn.out_proj"), stacked=True),
        *norm(f"{ours}/attention_norm", *at("ln_1"), stacked=True),
        *norm(f"{ours}/mlp_norm", *at("ln_2"), stacked=True),
        *linear(f"{ours}/mlp/fc1", *at("mlp.c_fc"), stacked=True),
        *linear(f"{ours}/mlp/fc2", *at("mlp.c_proj"), stacked=True),
    ]


def image_links(image: Mapping[str, Any], style: str) -> list[Link]:
    """The visual encoder.

    Args:
      image: a ``config.model.image``. style: one of `STYLES`.
    """
    ours, prefix = "image_encoder", IMAGE_PREFIX[style]
    if style == ORIGINAL:
        names = ("patch_embed.proj", "patch_embed.norm", "pos_embed", "norm")
    else:
        names = (
            "embeddings.patch_embeddings.projection",
            "embeddings.layernorm",
            "embeddings.position_embeddings",
            "layernorm",
        )
    patch, embed_norm, position, last = (f"{prefix}.{name}" for name in names)
    links = [
        *linear(f"{ours}/patch_embed", patch, form="patch"),
        *(norm(f"{ours}/embed_norm", embed_norm) if image["patch_norm"] else ()),
        Link((f"{ours}/position",), (position,), "token"),
        *norm(f"{ours}/norm", last),
    ]
    later = image["later_stages"]
    # (where the layers lie here, how many, the token and the block beside them)
    stages = [("first", image["first_layers"], "group_token", "binding")]
    stages += [
        (f"stages_{i}/layers", layers, f"stages_{i}/group_token", f"stages_{i}/block")
        for i, (_, _, layers) in enumerate(later)
    ]
    for index, (stack, depth, token, block) in enumerate(stages):
        links += _layers(f"{ours}/{stack}/layers", style, index, depth)
        theirs = stage_name(style, index)
        links.append(Link((f"{ours}/{token}",), (f"{theirs}.group_token",), "token"))
        links += _block(f"{ours}/{block}", f"{theirs}.downsample", style)
        if index:
            carried = f"{ours}/stages_{index - 1}"
            links += norm(f"{carried}/projector_norm", f"{theirs}.group_projector.0")
            for part in ("fc1", "fc2"):
                links += linear(f"{carried}/projector/{part}", f"{theirs}.group_projector.1.{part}")
    return links + _layers(f"{ours}/second/layers", style, len(stages), image["second_layers"])


def _layers(ours: str, style: str, stage: int, depth: int) -> list[Link]:
    blocks = [f"{block_name(style, stage)}.{index}" for index in range(depth)]
    if not blocks:
        return []
    if style == ORIGINAL:
        return pre_norm_layers(ours, *blocks, stacked=True)
    return separate_layers(ours, *blocks)


def _block(ours: str, theirs: str, style: str) -> list[Link]:
    links = grouping_block(ours, theirs)
    if style == ORIGINAL:
        return links
    old, new = "pre_assign_attn.attn.proj.", "pre_assign_attn.attn.out_proj."
    return [
        dataclasses.replace(link, sources=tuple(name.replace(old, new) for name in link.sources))
        for link in links
    ]


def text_links(depth: int, style: str) -> list[Link]:
    """The causal text encoder."""
    ours = "text_encoder"
    if style == ORIGINAL:
        prefix = "text_encoder"
        word, position, last = "token_embedding.weight", "positional_embedding", "ln_final"
        blocks = [f"{prefix}.transformer.resblocks.{index}" for index in range(depth)]
        layers = residual_layers(f"{ours}/stack/layers", *blocks)
    else:
        prefix = "text_model"
        word, position = (f"embeddings.{name}_embedding.weight" for name in ("token", "position"))
        last = "final_layer_norm"
        blocks = [f"{prefix}.encoder.layers.{index}" for index in range(depth)]
        layers = separate_layers(f"{ours}/stack/layers", *blocks)
    return [
        Link((f"{ours}/word",), (f"{prefix}.{word}",), "table"),
        Link((f"{ours}/position",), (f"{prefix}.{position}",), "table"),
        *norm(f"{ours}/norm", f"{prefix}.{last}"),
        *layers,
    ]


def projector_links(style: str) -> list[Link]:
    """Both projectors with their running statistics, which lie under "batch_stats/"."""
    if style == ORIGINAL:
        prefixes = {"image_projector": "img_projector", "text_projector": "text_projector"}
        first, normed, last = "linear_hidden.0", "linear_hidden.1", "linear_out"
        form = "pointwise"
    else:
        prefixes = {"image_projector": "visual_projection", "text_projector": "text_projection"}
        first, normed, last, form = "0", "1", "3", "linear"
    links = []
    for ours, theirs in prefixes.items():
        links += linear(f"{ours}/fc", f"{theirs}.{first}", form=form)
        links += norm(f"{ours}/norm", f"{theirs}.{normed}")
        links += linear(f"{ours}/out", f"{theirs}.{last}", form=form)
        running = f"{STATISTICS}/{ours}/norm"
        links += [
            Link((f"{running}/mean",), (f"{theirs}.{normed}.running_mean",), "vector"),
            Link((f"{running}/variance",), (f"{theirs}.{normed}.running_var",), "vector"),
            Link((f"{running}/count",), (f"{theirs}.{normed}.num_batches_tracked",), "count"),
        ]
    return links


def model_links(model: Mapping[str, Any], style: str) -> list[Link]:
    """The whole model.

    Args:
      model: a ``config.model`` of GroupViT's form. style: one of `STYLES`.
    """
    return [
        Link(("log_scale",), ("logit_scale",), "scalar"),
        *image_links(model["image"], style),
        *text_links(model["text"]["depth"], style),
        *projector_links(style),
    ]
