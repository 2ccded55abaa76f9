"""The shapes of a batch, from the config alone."""

import jax
import numpy as np
from ml_collections import ConfigDict

from ovseg_jax.data.captions import Masking
from ovseg_jax.data.examples import MOST_NAMES
from ovseg_jax.models.build import build_model
from ovseg_jax.train.phases import Phase

Shapes = dict[str, jax.ShapeDtypeStruct]


def batch_shapes(config: ConfigDict, phase: Phase, batch_size: int, text_length: int) -> Shapes:
    """What `data.loader.make_loader` gives in a phase, without data.

    Args:
      batch_size: B. text_length: M.
    """

    def array(shape: tuple[int, ...], dtype: type) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch_size, *shape), dtype)

    pairs = phase.mask_weight > 0
    weights = ("weight", "entity_weight") + (("pair_weight",) if pairs else ())
    batch = {name: array((), np.float32) for name in weights}
    batch |= {name: array((), np.int32) for name in ("entity_set", "record", "data_set")}
    batch["caption_set"] = array((MOST_NAMES,), np.int32)
    size, data = phase.transform["size"], config.data
    for name in ("image", "image2")[: 1 + pairs]:
        if data.cache_images:
            encoder = build_model(config.model).image_encoder
            batch[f"{name}_features"] = array(
                (encoder.feature_tokens(size), encoder.feature_width), np.float16
            )
        else:
            batch[name] = array((size, size, 3), np.uint8)
    if data.nouns:
        batch["noun_ids"] = array((data.nouns, text_length), np.int32)
        batch["noun_present"] = array((data.nouns,), np.bool_)
    if Masking(config.loss.masking).classifies:
        batch["masked_targets"] = array((text_length,), np.int32)
    kinds = ("caption", "masked", "prompt") + (("shared",) if pairs else ())
    if not data.cache_texts:
        return batch | {f"{kind}_ids": array((text_length,), np.int32) for kind in kinds}
    width = config.model.text.width
    for kind in kinds:
        if kind != "masked":
            batch[f"{kind}_pooled"] = array((width,), np.float16)
    batch["masked_tokens"] = array((text_length, width), np.float16)
    batch["masked_mask"] = array((text_length,), np.bool_)
    return batch
