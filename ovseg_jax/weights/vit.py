"""Plain ViTs (DINO, DeiT) under the names of their own release or of Hugging Face.

Unlike a DINOv2 trunk, which stays in front of the groups, such a ViT fills the whole visual
encoder: its first layers go before the binding, the others after it (paper, Sec. 4.1).
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from ovseg_jax.weights.convert_tree import Rule, transpose
from ovseg_jax.weights.tensors import Tensors

# The class token has no place beside the groups; classifier and pooler heads are not used.
DROPPED = (r"(embeddings\.)?cls_token", r"pooler\..*", r"head\..*", r"classifier\..*")

_RELEASE = {
    "patch": "patch_embed.proj",
    "position": "pos_embed",
    "norm": "norm",
    "layer": "blocks.{}.",
    "attention_norm": "norm1",
    "attention/out": "attn.proj",
    "mlp_norm": "norm2",
    "mlp/fc1": "mlp.fc1",
    "mlp/fc2": "mlp.fc2",
}
_HUGGING_FACE = {
    "patch": "embeddings.patch_embeddings.projection",
    "position": "embeddings.position_embeddings",
    "norm": "layernorm",
    "layer": "encoder.layer.{}.",
    "attention_norm": "layernorm_before",
    "attention/query": "attention.attention.query",
    "attention/key": "attention.attention.key",
    "attention/value": "attention.attention.value",
    "attention/out": "attention.output.dense",
    "mlp_norm": "layernorm_after",
    "mlp/fc1": "intermediate.dense",
    "mlp/fc2": "output.dense",
}
ANCHORS = ("patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight")


def is_vit(tensors: Tensors) -> bool:
    """Whether the names are those of a plain ViT (any prefix removed)."""
    return "blocks.0.attn.qkv.weight" in tensors or (
        "encoder.layer.0.layernorm_before.weight" in tensors
    )


def split_qkv(tensors: Tensors) -> Tensors:
    """Fused query-key-value maps as three, under "attn.query" and so on; the rest as it is."""
    result: Tensors = {}
    for name, value in tensors.items():
        if ".attn.qkv." not in name:
            result[name] = value
            continue
        for part, piece in zip(("query", "key", "value"), np.split(value, 3), strict=True):
            result[name.replace(".qkv.", f".{part}.")] = piece
    return result


def _patch_kernel(weight: np.ndarray) -> np.ndarray:
    """[D, 3, P, P] to the flattened (row, column, channel) order of our patches."""
    return weight.transpose(2, 3, 1, 0).reshape(-1, weight.shape[0])


def _without_class(position: np.ndarray, patches: int) -> np.ndarray:
    return position[0, position.shape[1] - patches :]


def vit_rules(tensors: Tensors, stacks: dict[str, int], patches: int) -> list[Rule]:
    """Rules for the visual encoder.

    Args:
      tensors: with fused maps split.
      stacks: name of each stack ("trunk_layers", "first", "second") and its depth, in order.
      patches: patches of the stored position grid.
    """
    ours = "blocks.0.norm1.weight" in tensors
    names = dict(_RELEASE) if ours else dict(_HUGGING_FACE)
    if ours:
        names |= {f"attention/{part}": f"attn.{part}" for part in ("query", "key", "value")}
    root = "image_encoder"
    rules = [
        Rule(f"{root}/patch_embed/kernel", (f"{names['patch']}.weight",), _patch_kernel),
        Rule(f"{root}/patch_embed/bias", (f"{names['patch']}.bias",)),
        Rule(f"{root}/position", (names["position"],), partial(_without_class, patches=patches)),
        Rule(f"{root}/norm/scale", (f"{names['norm']}.weight",)),
        Rule(f"{root}/norm/bias", (f"{names['norm']}.bias",)),
    ]
    start = 0
    for stack, depth in stacks.items():
        layers = [names["layer"].format(index) for index in range(start, start + depth)]
        start += depth
        if not depth:
            continue

        def add(
            target: str,
            suffix: str,
            change: Callable[[np.ndarray], np.ndarray] | None,
            stack: str = stack,
            layers: list[str] = layers,
        ) -> None:
            sources = tuple(f"{layer}{suffix}" for layer in layers)
            path = f"{root}/{stack}/layers/{target}"
            rules.append(
                Rule(path, sources, stack=True)
                if change is None
                else Rule(path, sources, change, True)
            )

        for key in ("attention_norm", "mlp_norm"):
            add(f"{key}/scale", f"{names[key]}.weight", None)
            add(f"{key}/bias", f"{names[key]}.bias", None)
        for key in (
            "attention/query",
            "attention/key",
            "attention/value",
            "attention/out",
            "mlp/fc1",
            "mlp/fc2",
        ):
            add(f"{key}/kernel", f"{names[key]}.weight", transpose)
            add(f"{key}/bias", f"{names[key]}.bias", None)
    return rules
