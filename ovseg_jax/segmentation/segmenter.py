"""A model with parameters as a segmenter: images in, group maps and embeddings out."""

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool

from ovseg_jax import sharding
from ovseg_jax.data.tokenizer import Tokenizer, unmasked
from ovseg_jax.errors import UserError
from ovseg_jax.files import listed
from ovseg_jax.models.ovsegmentor import OVSegmentor
from ovseg_jax.segmentation.protocol import Protocol
from ovseg_jax.segmentation.readout import EXACT, unit
from ovseg_jax.segmentation.scores import default_batch
from ovseg_jax.shapes import Array, Float, UInt8

TEXT_BATCH = 64  # prompts encoded at once
REMEMBERED = 16  # lists of words whose embeddings are kept


def encode_images(
    model: OVSegmentor, variables: Mapping[str, Any], images: Array, protocol: Protocol
) -> tuple[Array, ...]:
    """(affinity [B, L, K], groups [B, K, E], image embedding [B, E]), to be jitted, and with the
    protocol's `border_scale` the binding's keys of the patches [B, L, D], unit norm, float16.

    Images are uint8 [B, H, W, 3], or [B, L, D0] trunk features. The protocol's `affinity` says
    which patch-to-group map it is.
    """
    tokens = model.apply(variables, images, method="visual_tokens")
    soft = tokens.affinity
    if protocol.affinity == "features":
        if tokens.patches is None:
            raise UserError(
                "protocol: affinity must be 'binding' for a model without final patches"
            )
        patches, centers = (x.astype(jnp.float32) for x in (tokens.patches, tokens.groups))
        logits = jnp.einsum("bld,bkd->blk", patches, centers, precision=EXACT)
        soft = jax.nn.softmax(logits * patches.shape[-1] ** -0.5, axis=-1)
    groups = model.apply(variables, tokens.groups, method="project_image")
    encoded = soft, groups, model.apply(variables, tokens, method="embed_whole")
    if not protocol.border_scale:
        return encoded
    if tokens.key is None:
        raise UserError("protocol: border_scale must be 0 for a model with several bindings")
    return *encoded, unit(tokens.key).astype(jnp.float16)


def embed_prompts(
    model: OVSegmentor, variables: Mapping[str, Any], ids: Array, average: str
) -> tuple[Array, ...]:
    """Embeddings [B, E] of prompts (int32 [B, M]) to compare groups with, and with an image head
    also those for whole images; to be averaged over templates, to be jitted."""
    text = model.apply(variables, ids, method="text_tokens")
    method = "project_text" if average == "unit" else "embed_text"
    embedded = model.apply(variables, text.pooled, method=method)
    if not model.image_head:
        return (embedded,)
    return embedded, model.apply(variables, text.pooled, method="embed_whole_text")


class ModelSegmenter:
    """Implements `segmentation.scores.Segmenter` for a model and its parameters, placed anywhere.

    The protocol's `average` and `border_scale` decide what is computed. Where a mesh is given,
    batches are split over it.
    """

    def __init__(
        self,
        model: OVSegmentor,
        params: Mapping[str, Any],
        tokenizer: Tokenizer,
        *,
        text_length: int,
        protocol: Protocol | None = None,
        batch_stats: Mapping[str, Any] | None = None,
        mesh: Mesh | None = None,
    ):
        protocol = protocol or Protocol()
        self._window = protocol.window
        self.variables = {"params": params, "batch_stats": batch_stats or {}}
        self._tokenizer, self._length, self._mesh = tokenizer, text_length, mesh
        self._texts = functools.lru_cache(REMEMBERED)(self._averaged)
        everywhere = sharding.replicated(mesh) if mesh is not None else None
        leaves = jax.tree.leaves(self.variables)
        if mesh is not None and not any(isinstance(leaf, jax.Array) for leaf in leaves):
            # Once: arrays of the host would travel to the devices in every call.
            self.variables = jax.device_put(self.variables, everywhere)

        encode = functools.partial(encode_images, model, protocol=protocol)
        embed = functools.partial(embed_prompts, model, average=protocol.average)
        self._model = model
        self._encode = jax.jit(encode, out_shardings=everywhere)
        self._embed = jax.jit(embed, out_shardings=everywhere)

    @classmethod
    def of_saved(cls, saved: Any, protocol: Protocol) -> "ModelSegmenter":
        """Of a `weights.model_dir.SavedModel`, on the devices of this process."""
        return cls(
            saved.model,
            saved.params,
            saved.tokenizer,
            text_length=saved.info["text_length"],
            protocol=protocol,
            batch_stats=saved.batch_stats,
            mesh=sharding.make_mesh(devices=jax.local_devices()),
        )

    def whole_batch(self, batch_size: int) -> int:
        """`batch_size` windows, or with 0 a number that suits the devices, rounded up to a number
        that the devices share evenly."""
        shards = sharding.batch_shards(self._mesh) if self._mesh is not None else 1
        return -(-(batch_size or default_batch(self._window)) // shards) * shards

    def encode(
        self, images: UInt8[np.ndarray, "B H W 3"] | Float[np.ndarray, "B L D"]
    ) -> tuple[Array, ...]:
        """`encode_images` of a batch; with the protocol's `border_scale` also keys."""
        if self._mesh is not None and len(images) % sharding.batch_shards(self._mesh) == 0:
            # Every process holds the whole batch here and gives its own devices their rows.
            images = jax.device_put(images, sharding.batch_sharding(self._mesh))
        return self._encode(self.variables, images)

    def text(
        self, names: Sequence[str], templates: Sequence[str]
    ) -> tuple[Float[np.ndarray, "C E"], Float[np.ndarray, "C E"]]:
        """Class embeddings to compare groups with, and whole images: unit norm, averaged over the
        templates. Without an image head both are the same."""
        return self._texts(tuple(names), tuple(templates))

    def _averaged(self, names: tuple[str, ...], templates: tuple[str, ...]) -> tuple:
        names = [unmasked(name) for name in names]
        prompts = [template.replace("{}", name) for name in names for template in templates]
        ids, cut = self._tokenizer.encode_with_cuts(prompts, self._length)
        self._log_indistinct(names, cut.reshape(len(names), -1).any(1))
        # The columns that the longest prompt needs, a multiple of 4 so that few shapes compile. At
        # least one column of padding stays, because CLIP's tokenizer pads with the end token.
        longest = int((ids != self._model.pad_id).any(axis=0).nonzero()[0].max(initial=0)) + 1
        ids = ids[:, : 4 * (longest // 4 + 1)]
        rows = []
        for start in range(0, len(ids), TEXT_BATCH):
            part = ids[start : start + TEXT_BATCH]
            padded = np.zeros((TEXT_BATCH, ids.shape[1]), np.int32)
            padded[: len(part)] = part
            embedded = self._embed(self.variables, padded)
            rows.append([np.asarray(x)[: len(part)] for x in embedded])
        means = [
            np.concatenate(x).reshape(len(names), len(templates), -1).mean(1)
            for x in zip(*rows, strict=True)
        ]
        # In NumPy: JAX would compile each operation by itself.
        norms = [np.linalg.norm(x.astype(np.float32), axis=1, keepdims=True) for x in means]
        units = [x / np.maximum(n, np.float32(1e-12)) for x, n in zip(means, norms, strict=True)]
        return units[0], units[-1]

    def _log_indistinct(self, names: Sequence[str], cut: Bool[np.ndarray, " C"]) -> None:
        """Logs the names that the text encoder does not know, reads alike, or reads in part."""
        tokenizer = self._tokenizer
        ids = tokenizer.encode(names, self._length)
        unknown = np.zeros(len(names), bool)
        if tokenizer.family.unknown != tokenizer.family.end:
            unknown = (ids == tokenizer.unknown_id).any(1)
        alike: dict[bytes, list[str]] = {}
        for name, row in zip(names, ids, strict=True):
            alike.setdefault(row.tobytes(), []).append(name)
        equal = [" = ".join(same) for same in alike.values() if len(same) > 1]
        for what, which in (
            ("are unknown to the text encoder, so it guesses", np.array(names)[unknown].tolist()),
            ("are the same to the text encoder, so only the first is ever found", equal),
            (f"are cut after {self._length} tokens", np.array(names)[cut].tolist()),
        ):
            if which:
                logging.getLogger(__name__).warning("names that %s: %s", what, listed(which))

    def scale(self) -> float:
        """The inverse temperature that the model learned, for a protocol whose scale is None."""
        return float(self._model.apply(self.variables, method="logit_scale"))
