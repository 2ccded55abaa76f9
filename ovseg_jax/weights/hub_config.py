"""What weights cannot tell: a Hugging Face config.json compared with the model that takes them.

The number of heads, an epsilon or an activation leave no trace in a tensor's shape. A difference
may be meant (the released model runs DINO with 8 heads), so it is said and not refused.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict


def image_remarks(path: Path, model: ConfigDict) -> list[str]:
    """Differences between the config.json beside a ViT and `config.model`, one line each.

    Args:
      path: the weights' file or folder. Without a Hugging Face config.json there are none.
    """
    told, image = _read(path), model.image
    as_trunk = image.trunk_norm
    heads = "image.trunk_heads" if as_trunk and image.trunk_heads else "image.heads"
    mine: dict[str, tuple[str, Any]] = {
        "num_attention_heads": (heads, image[heads.removeprefix("image.")]),
        "layer_norm_eps": ("image.eps", image.eps),
        "hidden_act": ("", "gelu"),
    }
    if image.position == "rope":
        mine["rope_theta"] = ("image.rope_theta", image.rope_theta)
        told |= {k: v for k, v in dict(told.get("rope_parameters") or {}).items() if k in mine}
    return _differences(told, mine)


def text_remarks(path: Path, model: ConfigDict) -> list[str]:
    """Differences between the config.json beside a text encoder and `config.model`; see above."""
    told, text = _read(path), model.text
    mine: dict[str, tuple[str, Any]] = {
        "num_attention_heads": ("text.heads", text.heads),
        "layer_norm_eps": ("text.eps", text.eps),
        "hidden_act": ("", "gelu"),
        "pad_token_id": ("pad_id", model.pad_id),
    }
    return _differences(told, mine)


def _read(path: Path) -> dict[str, Any]:
    file = (path if path.is_dir() else path.parent) / "config.json"
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return dict(told) if isinstance(told, Mapping) and "model_type" in told else {}


def _differences(told: Mapping[str, Any], mine: Mapping[str, tuple[str, Any]]) -> list[str]:
    lines = []
    for key, (field, value) in mine.items():
        if key in told and told[key] != value:
            have = f"config.model.{field} is {value!r}" if field else f"the model has {value!r}"
            lines.append(f"the weights were made with {key} = {told[key]!r}, {have}")
    return lines
