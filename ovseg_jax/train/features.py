"""Features of frozen towers: caches that the loader reads, and the start of the neck from them.

The caches are exact for what is frozen: trunk features of V stored views of each image, sentence
vectors of captions, prompts and shared entities, token features of masked captions.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ovseg_jax import processes
from ovseg_jax.data import captions as texts_of
from ovseg_jax.data.augment import complete_transform, train_image
from ovseg_jax.data.decoding import UnreadableImage
from ovseg_jax.data.entities import EntitySet
from ovseg_jax.data.feature_store import FeatureStore
from ovseg_jax.data.order import example_rng
from ovseg_jax.data.records import RecordSource
from ovseg_jax.data.tokenizer import Tokenizer, unmasked
from ovseg_jax.errors import UserError
from ovseg_jax.models.ovsegmentor import OVSegmentor
from ovseg_jax.optim.groups import flatten
from ovseg_jax.shapes import Float
from ovseg_jax.weights.initialize import TRUNK

# Fields of the visual encoder that do not change the trunk's output. All others are in the key:
# heads, epsilons and positions change features without changing a weight.
AFTER_TRUNK = tuple(
    "second_layers second_heads second_stage later_stages num_groups group_tokens group_std "
    "binding_form assignment drop_path remat".split()
)

IMAGE_BATCH = 32
TEXT_BATCH = 128
# Texts are padded to multiples of so many tokens, which limits the number of compiled programs.
_MULTIPLE = 8
# Enough patches for means and deviations of a few hundred channels.
NECK_IMAGES = 64

_log = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]


def cache_key(params: Mapping[str, Any], prefixes: tuple[str, ...], **settings: Any) -> str:
    """Hash of the parameters under `prefixes` and of every setting that shapes the features."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for path, leaf in sorted(flatten(params).items()):
        if path.startswith(prefixes):
            digest.update(path.encode())
            digest.update(np.ascontiguousarray(jax.device_get(leaf)))
    return digest.hexdigest()[:16]


def settings_of(module: nn.Module, without: tuple[str, ...] = ()) -> dict[str, str]:
    """The fields of an unbound module, for a key."""
    left_out = {*without, "parent", "name"}
    names = [field.name for field in fields(module) if field.name not in left_out]
    return {name: repr(getattr(module, name)) for name in names}


def image_store(
    directory: Path,
    model: OVSegmentor,
    params: Mapping[str, Any],
    source: RecordSource,
    transform: Mapping[str, Any],
    *,
    views: int,
    seed: int,
    progress: Progress,
) -> FeatureStore:
    """Trunk features of `views` views of every image, float16, from the cache or computed now.

    Args:
      directory: holds one folder per key.
      transform: see `data.augment.complete_transform`; view v is drawn from (seed, v, record).
    """
    transform = complete_transform(transform)
    # Where nothing is drawn, runs of any seed and any other fields share a cache.
    still = {"kind": "none", "size": transform["size"]} if transform["kind"] == "none" else None
    key = cache_key(
        params,
        TRUNK,
        source=source.fingerprint(),
        transform=still or transform,
        views=views,
        seed=None if still else seed,
        trunk=settings_of(model.image_encoder, AFTER_TRUNK),
    )
    folder = directory / f"images-{key}"
    if (store := FeatureStore.open(folder, key)) is not None:
        return store
    trunk = jax.jit(
        lambda params, images: model.apply({"params": params}, images, method="trunk").astype(
            jnp.float16
        )
    )
    size, count = int(transform["size"]), len(source)
    tokens, width = model.image_encoder.feature_tokens(size), model.image_encoder.feature_width
    arrays = {"image": ((count, views, tokens, width), np.float16), "valid": ((count,), np.uint8)}
    store = FeatureStore.create(folder, key, arrays)

    def read(row: tuple[int, int]) -> np.ndarray | None:
        return _view(source, *row, transform, seed)

    rows = [(record, view) for record in range(count) for view in range(views)]
    with ThreadPoolExecutor(max_workers=2) as pool:
        # The next batch is read while the device works on the last one.
        read_ahead = [pool.submit(read, row) for row in rows[:IMAGE_BATCH]]
        for start in range(0, len(rows), IMAGE_BATCH):
            part, images = rows[start : start + IMAGE_BATCH], [f.result() for f in read_ahead]
            following = rows[start + IMAGE_BATCH : start + 2 * IMAGE_BATCH]
            read_ahead = [pool.submit(read, row) for row in following]
            read_images = {slot: image for slot, image in enumerate(images) if image is not None}
            batch = np.zeros((IMAGE_BATCH, size, size, 3), np.uint8)
            for slot, image in read_images.items():
                batch[slot] = image
            features = np.asarray(trunk(params, batch))
            for slot in read_images:
                store["image"][part[slot]] = features[slot]
                store["valid"][part[slot][0]] = 1
            progress("image features", part[-1][0] + 1, count)
    return store.commit()


def _view(
    source: RecordSource, index: int, view: int, transform: Mapping[str, Any], seed: int
) -> np.ndarray | None:
    """A view of a record's image; None where it cannot be read."""
    record = source[index]
    try:
        return train_image(record.image, example_rng(seed, view, record.key), transform)
    except UnreadableImage as error:
        _log.warning("record %s cannot be used and weighs 0: %s", record.key, error.cause)
        return None


def text_store(
    directory: Path,
    model: OVSegmentor,
    params: Mapping[str, Any],
    source: RecordSource,
    entity_set: EntitySet,
    tokenizer: Tokenizer,
    templates: Sequence[str],
    *,
    length: int,
    progress: Progress,
) -> FeatureStore:
    """Features of every text a step can ask for, float16, from the cache or computed now.

    Each different text is encoded once, among others of about its length, and without the padding
    to `length` that only the stored arrays have. Prompts are stored for each template: keep few.
    """
    captions, starts, rows = texts_of.distinct_captions(source.captions())
    captions = [unmasked(caption) for caption in captions]
    masked = [texts_of.mask_entities(caption, entity_set) for caption in captions]
    prompts, prompt_rows = texts_of.distinct_prompts(captions, entity_set, templates)
    key = cache_key(
        params,
        ("text_encoder/",),
        captions=_texts_digest(captions, starts, rows),
        # How entities are looked for may change between versions.
        prompts=_texts_digest([*masked, *prompts], prompt_rows),
        entities=entity_set.table,
        templates=list(templates),
        length=length,
        pool=model.text_pool,
        pad_id=model.pad_id,
        encoder=settings_of(model.text_encoder, ("dropout", "remat")),
    )
    folder = directory / f"texts-{key}"
    if (store := FeatureStore.open(folder, key)) is not None:
        return store
    hidden = list(dict.fromkeys(masked))
    shared = [texts_of.shared_prompt(name) for name in entity_set.names]
    width = model.text_encoder.width
    arrays = {
        "caption_starts": (starts.shape, np.int64),
        "caption_rows": (rows.shape, np.int32),
        "caption_pooled": ((len(captions), width), np.float16),
        "masked_rows": ((len(captions),), np.int32),
        "masked_tokens": ((len(hidden), length, width), np.float16),
        "masked_mask": ((len(hidden), length), np.bool_),
        "prompt_rows": (prompt_rows.shape, np.int32),
        "prompt_pooled": ((len(prompts), width), np.float16),
        "shared_pooled": ((len(shared), width), np.float16),
    }
    store = FeatureStore.create(folder, key, arrays)
    row_of = {text: row for row, text in enumerate(hidden)}
    store["caption_starts"][:], store["caption_rows"][:] = starts, rows
    store["masked_rows"][:] = [row_of[text] for text in masked]
    store["prompt_rows"][:] = prompt_rows
    texts = list(dict.fromkeys([*captions, *hidden, *prompts, *shared]))
    pooled = np.zeros((len(texts), width), np.float16)

    @jax.jit
    def encode(params: Any, ids: Any) -> Any:
        text = model.apply({"params": params}, ids, method="text_tokens")
        return text.tokens.astype(jnp.float16), text.mask, text.pooled.astype(jnp.float16)

    tokens = tokenizer.lengths(texts)
    order = np.argsort(tokens, kind="stable")
    for start in range(0, len(texts), TEXT_BATCH):
        part = order[start : start + TEXT_BATCH]
        padded = min(length, -(-int(tokens[part[-1]]) // _MULTIPLE) * _MULTIPLE)
        ids = np.zeros((TEXT_BATCH, padded), np.int32)
        ids[: len(part)] = tokenizer.encode([texts[i] for i in part], padded)
        outputs = [np.asarray(x)[: len(part)] for x in encode(params, ids)]
        pooled[part] = outputs[2]
        for i, features, mask in zip(part, *outputs[:2], strict=True):
            if (row := row_of.get(texts[i])) is not None:
                store["masked_tokens"][row, :padded] = features
                store["masked_mask"][row, :padded] = mask
        progress("text features", start + len(part), len(texts))
    at = {text: i for i, text in enumerate(texts)}
    for name, listed in (("caption", captions), ("prompt", prompts), ("shared", shared)):
        store[f"{name}_pooled"][:] = pooled[np.asarray([at[text] for text in listed], np.intp)]
    if cut := int((tokens > length).sum()):
        message = "%d of %d cached sentences were cut to %d tokens (config.data.text_length)"
        _log.warning(message, cut, len(texts), length)
    return store.commit()


def _texts_digest(texts: Sequence[str], *arrays: np.ndarray) -> str:
    digest = hashlib.sha256(json.dumps(texts).encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


# ---- the start of the neck


def standardized_neck(
    model: OVSegmentor,
    params: Mapping[str, Any],
    source: RecordSource,
    transform: Mapping[str, Any],
    seed: int,
) -> dict[str, Any]:
    """The parameters with the neck's input standardized on images of the training set.

    ``W x + b`` becomes ``W (x - mean) / std + b``, folded into kernel and bias (Salimans & Kingma,
    2016); so does the first map of the image head, where there is one, on the class token. The
    channels of a pretrained trunk differ in mean and scale: otherwise the common mean decides which
    group wins every patch, and one or two groups take them all.
    """
    if "neck" not in params["image_encoder"]:
        raise UserError(
            "config.model.neck_init = 'standardize' needs a neck: give the trunk another width "
            "than the encoder (config.model.image.trunk_width)"
        )
    transform = complete_transform(transform)
    # Evenly over the records: those of a mixture lie one data set after the other.
    indices = range(0, len(source), max(1, len(source) // NECK_IMAGES))[:NECK_IMAGES]
    views = [_view(source, index, 0, transform, seed) for index in indices]
    images = [view for view in views if view is not None]
    if not images:
        raise UserError(f"none of {NECK_IMAGES} images of {source.name} can be read")
    trunk = jax.jit(lambda params, x: model.apply({"params": params}, x, method="trunk"))
    features = np.asarray(trunk(processes.local(params), np.stack(images)), np.float32)
    patches, encoder = features, params["image_encoder"]
    params = dict(params)
    if model.image_head:
        patches, head = features[:, 1:], params["whole_head"]
        params["whole_head"] = {**head, "fc": _standardizing(head["fc"], features[:, 0])}
    neck = _standardizing(encoder["neck"], patches.reshape(-1, patches.shape[-1]))
    params["image_encoder"] = {**encoder, "neck": neck}
    return params


def _standardizing(
    dense: Mapping[str, Any], inputs: Float[np.ndarray, "rows channels"]
) -> dict[str, jax.Array]:
    """A dense map that standardizes its inputs first, by the statistics of `inputs`."""
    mean, deviation = inputs.mean(0), np.maximum(inputs.std(0), 1e-3)

    @jax.jit
    def fold(dense: Mapping[str, Any]) -> dict[str, Any]:
        kernel = dense["kernel"] / jnp.asarray(deviation)[:, None]
        return {"kernel": kernel, "bias": dense["bias"] - (jnp.asarray(mean)[None] @ kernel)[0]}

    dense = dict(dense)
    return jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), fold(dense), dense)
