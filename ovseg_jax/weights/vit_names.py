"""The names under which ViTs are published: one table, one row per style.

``release``     DINO, DeiT, DINOv2, DINOv3 and timm: fused query, key and value
``vit``         Hugging Face ViT files; ``vit flat``: the module names of transformers 5
``dinov2``      Hugging Face DINOv2 files, with registers or not; ``dinov2 flat`` likewise
``dinov3``      Hugging Face DINOv3 files; ``dinov3 nested``: the module names of transformers 5

transformers 5 renames while it loads and saves, so files mostly keep the older style whatever the
modules are called; state dicts that were saved by hand have the newer one.
"""

from dataclasses import dataclass

from ovseg_jax.errors import UserError
from ovseg_jax.weights.tensors import Tensors


@dataclass(frozen=True)
class Style:
    """Names of one style; stems of weight and bias, but for bare parameters.

    Attributes:
      layer: what precedes the names of a layer, with the place of its index.
      norms: before attention and feed-forward.
      attention: query, key, value and output.
      mlp: first and second map.
      scales: layer scale of the two branches (bare).
      patch, norm: patch embedding and final norm.
      bare: class token, register tokens and position embeddings.
    """

    layer: str
    norms: tuple[str, str]
    attention: tuple[str, str, str, str]
    mlp: tuple[str, str]
    scales: tuple[str, str]
    patch: str
    norm: str
    bare: tuple[str, str, str]

    def layer_parts(self) -> dict[str, str]:
        """Path of each norm and linear map in our layers, and its stem here."""
        ours = ("attention_norm", "mlp_norm")
        maps = ("attention/query", "attention/key", "attention/value", "attention/out")
        parts = dict(zip(ours, self.norms, strict=True))
        parts |= dict(zip(maps, self.attention, strict=True))
        return parts | dict(zip(("mlp/fc1", "mlp/fc2"), self.mlp, strict=True))


_HUB_ATTENTION = tuple(f"attention.attention.{name}" for name in ("query", "key", "value"))
_FLAT_ATTENTION = tuple(f"attention.{name}_proj" for name in "qkvo")
_HUB_BARE = tuple(
    f"embeddings.{n}" for n in ("cls_token", "register_tokens", "position_embeddings")
)
_LAMBDAS = ("layer_scale1.lambda1", "layer_scale2.lambda1")
_VIT_NORMS = ("layernorm_before", "layernorm_after")
_NORMS, _MLP = ("norm1", "norm2"), ("mlp.fc1", "mlp.fc2")
_CONVOLUTION = "embeddings.patch_embeddings.projection"

# fmt: off
STYLES: dict[str, Style] = {
    "release": Style(
        "blocks.{}.", _NORMS, ("attn.query", "attn.key", "attn.value", "attn.proj"), _MLP,
        ("ls1.gamma", "ls2.gamma"), "patch_embed.proj", "norm",
        ("cls_token", "register_tokens", "pos_embed"),
    ),
    "vit": Style(
        "encoder.layer.{}.", _VIT_NORMS, (*_HUB_ATTENTION, "attention.output.dense"),
        ("intermediate.dense", "output.dense"), _LAMBDAS, _CONVOLUTION, "layernorm", _HUB_BARE,
    ),
    "vit flat": Style(
        "layers.{}.", _VIT_NORMS, _FLAT_ATTENTION, _MLP, _LAMBDAS, _CONVOLUTION, "layernorm",
        _HUB_BARE,
    ),
    "dinov2": Style(
        "encoder.layer.{}.", _NORMS, (*_HUB_ATTENTION, "attention.output.dense"), _MLP, _LAMBDAS,
        _CONVOLUTION, "layernorm", _HUB_BARE,
    ),
    "dinov2 flat": Style(
        "encoder.layer.{}.", _NORMS, _FLAT_ATTENTION, _MLP, _LAMBDAS, _CONVOLUTION, "layernorm",
        _HUB_BARE,
    ),
    "dinov3": Style(
        "layer.{}.", _NORMS, _FLAT_ATTENTION, ("mlp.up_proj", "mlp.down_proj"), _LAMBDAS,
        "embeddings.patch_embeddings", "norm", _HUB_BARE,
    ),
    "dinov3 nested": Style(
        "model.layer.{}.", _NORMS, _FLAT_ATTENTION, ("mlp.up_proj", "mlp.down_proj"), _LAMBDAS,
        "embeddings.patch_embeddings", "norm", _HUB_BARE,
    ),
}
# fmt: on

# The name that ends a patch embedding says what precedes every name ("backbone.", "vit.", ...).
ANCHORS = tuple(dict.fromkeys(f"{style.patch}.weight" for style in STYLES.values()))

# What serves another purpose than features: the mask token and heads of their own training,
# decoders and classifiers put on top, constants that follow from the config.
DROPPED = (
    r"(embeddings\.)?mask_token",
    r"(head|fc_norm|pooler|classifier|decoder|local_cls_norm)\..*",
    r"rope_embed(dings)?\.(periods|inv_freq)",
)

# First maps of a gated feed-forward layer (DINOv2 giant, DINOv3 ViT-S+, ViT-H+ and 7B).
_GATED = ("mlp.w12.weight", "mlp.w1.weight", "mlp.weights_in.weight", "mlp.gate_proj.weight")


def find_style(tensors: Tensors, origin: str) -> str | None:
    """The style of a ViT's names (prefix removed, fused maps split), or None for no ViT.

    Args:
      origin: where the tensors come from, for messages.

    Raises:
      UserError: it is a ViT of a kind that cannot be built here.
    """
    for name, style in STYLES.items():
        layer = style.layer.format(0)
        if not all(
            f"{layer}{part}.weight" in tensors for part in (style.norms[0], style.attention[1])
        ):
            continue
        if any(f"{layer}{gate}" in tensors for gate in _GATED):
            raise UserError(
                f"{origin} is a ViT with gated feed-forward layers (SwiGLU), which the visual "
                "encoder does not have; take a small, base or large DINOv2 or DINOv3 (no 'plus')"
            )
        return name
    return None
