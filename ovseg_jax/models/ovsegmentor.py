"""OVSegmentor: visual encoder, text encoder, entity decoder and the joint 256-d space."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from ovseg_jax.models.layers import Dense, Floats, gelu, parameter
from ovseg_jax.models.text import (
    BertEncoder,
    CausalTextEncoder,
    EntityDecoder,
    pool_tokens,
    up_to_end,
)
from ovseg_jax.models.vit import VisualEncoder, VisualTokens, normalize_image
from ovseg_jax.shapes import Array, Bool, Float, Int

ACTIVATIONS = {"gelu": gelu, "relu": jax.nn.relu}

# The collection of running statistics.
STATISTICS = "batch_stats"


# ---- projection to the joint image-text space (Sec. 3.2)


class BatchNorm(nn.Module):
    """Batch normalization over every axis but the last (Ioffe & Szegedy, 2015), in float32.

    Each call in training normalizes with the statistics of the global batch (padding and examples
    of weight 0 count too) and moves the running ones, in "batch_stats", by `momentum` towards them;
    `variance` is unbiased, `count` counts calls. Outside training the running ones normalize.
    """

    dtype: Any
    eps: float = 1e-5
    momentum: float = 0.1

    @nn.compact
    def __call__(self, x: Float[Array, "... D"], train: bool) -> Float[Array, "... D"]:
        width = x.shape[-1]
        scale = parameter(self, "scale", nn.initializers.ones, (width,), "mlp")
        bias = parameter(self, "bias", nn.initializers.zeros, (width,), "mlp")
        running_mean = self.variable(STATISTICS, "mean", jnp.zeros, (width,), jnp.float32)
        running_variance = self.variable(STATISTICS, "variance", jnp.ones, (width,), jnp.float32)
        count = self.variable(STATISTICS, "count", jnp.zeros, (), jnp.int32)
        full = x.astype(jnp.float32).reshape(-1, width)
        if train:
            mean = jnp.mean(full, axis=0)
            centered = full - mean[None]
            variance = jnp.mean(centered * centered, axis=0)
            rows = full.shape[0]
            unbiased = variance * (rows / max(rows - 1, 1))
            for running, new in ((running_mean, mean), (running_variance, unbiased)):
                moved = (1.0 - self.momentum) * running.value + self.momentum * new
                running.value = jax.lax.stop_gradient(moved)
            count.value = count.value + 1
        else:
            mean, variance = running_mean.value, running_variance.value
            centered = full - mean[None]
        y = centered * (jax.lax.rsqrt(variance + self.eps) * scale)[None] + bias[None]
        return y.reshape(x.shape).astype(self.dtype)


class Projector(Floats):
    """One linear map, or two (`layers`), `hidden` wide between them, with an activation there.

    `norm` is "none", or "batch" for a `BatchNorm` before the activation; `bias` is the last map's.
    """

    features: int
    layers: int
    hidden: int
    norm: str
    activation: str
    bias: bool

    @nn.compact
    def __call__(self, x: Float[Array, "... D"], train: bool) -> Float[Array, "... E"]:
        if self.layers == 2:
            x = Dense(self.hidden, ("embed", "mlp"), name="fc", **self.floats)(x)
            if self.norm == "batch":
                x = BatchNorm(self.dtype, name="norm")(x, train)
            x = ACTIVATIONS[self.activation](x)
        last = Dense(self.features, ("mlp", "joint"), self.bias, name="out", **self.floats)
        return last(x)


class FeatureHead(Floats):
    """The embedding of an image's or a sentence's features: two linear maps, a GELU between.

    It reads frozen features, which a small data set soon overfits, hence the dropout: `rate` on the
    hidden layer, half of it on the input.
    """

    features: int
    hidden: int
    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "... Dx"], train: bool) -> Float[Array, "... E"]:
        x = nn.Dropout(self.rate / 2, deterministic=not train)(x.astype(self.dtype))
        hidden = gelu(Dense(self.hidden, ("embed", "mlp"), name="fc", **self.floats)(x))
        hidden = nn.Dropout(self.rate, deterministic=not train)(hidden)
        return Dense(self.features, ("mlp", "joint"), name="out", **self.floats)(hidden)


# ---- the model


@struct.dataclass
class TextTokens:
    """Text features; `mask` is True at real tokens. None is what a cache does not hold."""

    tokens: Float[Array, "B M Dt"] | None
    mask: Bool[Array, "B M"] | None
    pooled: Float[Array, "B Dt"] | None


def unit(x: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """Divides by the Euclidean norm over the last axis, in float32; 0 stays 0, with gradient 0."""
    x = x.astype(jnp.float32)
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x / jnp.sqrt(jnp.where(square > 1e-24, square, 1.0))


class OVSegmentor(Floats):
    """The whole model. Its methods are the pieces that training and inference are made of.

    Attributes:
      image_encoder, text_encoder, entity_decoder: the towers; without a decoder there is no
        `complete` and no completion projector (GroupViT).
      joint_width: E.
      projector_*: see `Projector`. With a batch norm, projecting in training changes "batch_stats",
        and the order of the calls counts.
      text_pool: see `pool_tokens`. pad_id: token id of padding.
      temperature_init: initial temperature of all contrastive losses.
      image_head, image_head_dropout: hidden width (0: no head) and dropout of a `FeatureHead` that
        embeds the whole image from the trunk's class token (`keep_class_token`). Sentences to
        compare it with have a head of their own, and the contrast its own temperature.
      token_classes: entities that a masked token can stand for (Table 4, "MLM"); 0 for none.
      token_classes_from: what that head reads, the output of the "decoder" or "text" encoder.
    """

    image_encoder: VisualEncoder
    text_encoder: BertEncoder | CausalTextEncoder
    entity_decoder: EntityDecoder | None
    joint_width: int = 256
    projector_layers: int = 1
    projector_width: int = 512
    projector_norm: str = "none"
    projector_activation: str = "gelu"
    projector_bias: bool = False
    text_pool: str = "eot"
    pad_id: int = 0
    temperature_init: float = 0.07
    image_head: int = 0
    image_head_dropout: float = 0.5
    token_classes: int = 0
    token_classes_from: str = "decoder"

    def setup(self) -> None:
        def projector() -> Projector:
            maps = (self.projector_layers, self.projector_width, self.projector_norm)
            last = (self.projector_activation, self.projector_bias)
            return Projector(self.joint_width, *maps, *last, **self.floats)

        self.image_projector = projector()
        self.text_projector = projector()
        if self.entity_decoder is not None:
            self.completion_projector = projector()
        if self.token_classes:
            self.token_head = Dense(self.token_classes, ("embed", None), **self.floats)
        constant = nn.initializers.constant(-math.log(self.temperature_init))
        self.log_scale = self.param("log_scale", constant, (), jnp.float32)
        if self.image_head:
            sizes, rate = (self.joint_width, self.image_head), self.image_head_dropout
            self.whole_head = FeatureHead(*sizes, rate, **self.floats)
            self.whole_text_head = FeatureHead(*sizes, 0.0, **self.floats)
            self.whole_log_scale = self.param("whole_log_scale", constant, (), jnp.float32)

    def trunk(self, image: Array, train: bool = False) -> Float[Array, "B L D0"]:
        """Features before the groups join, of uint8 or normalized float32 images [B, H, W, 3]."""
        pixels = normalize_image(image) if image.dtype == jnp.uint8 else image
        return self.image_encoder.trunk(pixels, train)

    def visual_tokens(
        self, image: Array, train: bool = False, noise: Float[Array, "B L K"] | None = None
    ) -> VisualTokens:
        """Groups, patches and affinity (Eq. 2, 4) of an image or of its trunk's features."""
        features = image if image.ndim == 3 else self.trunk(image, train)
        return self.image_encoder.group(features, train, noise)

    def text_tokens(self, ids: Int[Array, "B M"], train: bool = False) -> TextTokens:
        """Text features of ids, padded with `pad_id` (`CausalTextEncoder`: after the end token)."""
        if isinstance(self.text_encoder, CausalTextEncoder):
            mask = up_to_end(ids, self.text_encoder.end_id)
        else:
            mask = ids != self.pad_id
        tokens = self.text_encoder(ids, mask, train)
        return TextTokens(tokens, mask, pool_tokens(tokens, mask, self.text_pool))

    def embed_image(self, tokens: Float[Array, "... D"], train: bool = False) -> Array:
        """Image-side features in the joint space [..., E], not normalized, float32."""
        return self.image_projector(tokens, train).astype(jnp.float32)

    def embed_text(self, tokens: Float[Array, "... Dt"], train: bool = False) -> Array:
        """Text-side features in the joint space [..., E], not normalized, float32."""
        return self.text_projector(tokens.astype(self.dtype), train).astype(jnp.float32)

    def project_image(self, tokens: Float[Array, "... D"], train: bool = False) -> Array:
        """Image-side features in the joint space [..., E], unit norm, float32 (Sec. 3.2)."""
        return unit(self.embed_image(tokens, train))

    def project_text(self, pooled: Float[Array, "... Dt"], train: bool = False) -> Array:
        """Sentence vectors in the joint space [..., E], unit norm, float32 (Sec. 3.2)."""
        return unit(self.embed_text(pooled, train))

    def embed_whole(self, visual: VisualTokens, train: bool = False) -> Float[Array, "B E"]:
        """Embedding of the whole image, unit norm: by the image head, or else of the mean group."""
        if self.image_head:
            return unit(self.whole_head(visual.whole, train))
        return self.project_image(jnp.mean(visual.groups, axis=1), train)

    def embed_whole_text(self, pooled: Float[Array, "... Dt"], train: bool = False) -> Array:
        """Sentence vectors to be compared with `embed_whole`, [..., E], unit norm, float32."""
        # A joint space that serves groups and whole images alike serves either worse.
        if self.image_head:
            return unit(self.whole_text_head(pooled, train))
        return self.project_text(pooled, train)

    def complete(
        self, tokens: Array, mask: Array, groups: Array, train: bool = False
    ) -> Float[Array, "B E"]:
        """z^M of Eq. 9: the masked caption (tokens [B, M, Dt]), completed by the groups."""
        completed = self.entity_decoder(tokens.astype(self.dtype), mask, groups)
        pooled = pool_tokens(completed, mask, self.text_pool)
        return unit(self.completion_projector(pooled, train))

    def classify_tokens(self, tokens: Array, mask: Array, groups: Array) -> Float[Array, "B M C"]:
        """Which entity each token of a masked caption stands for, as logits, float32."""
        if self.token_classes_from == "decoder":
            tokens = self.entity_decoder(tokens.astype(self.dtype), mask, groups)
        return self.token_head(tokens.astype(self.dtype)).astype(jnp.float32)

    def logit_scale(self) -> Float[Array, ""]:
        """Inverse temperature of the contrastive losses on groups (Eq. 7 and 9), at most 100."""
        return jnp.minimum(jnp.exp(self.log_scale), 100.0)

    def whole_logit_scale(self) -> Float[Array, ""]:
        """Inverse temperature of the image head's contrast, at most 100."""
        return jnp.minimum(jnp.exp(self.whole_log_scale), 100.0)

    def __call__(self, image: Array, ids: Int[Array, "B M"], train: bool = False) -> Array:
        """Touches every parameter once; used to initialize them."""
        visual = self.visual_tokens(image, train)
        text = self.text_tokens(ids, train)
        z_image = self.project_image(jnp.mean(visual.groups, axis=1))
        z_text = self.project_text(text.pooled)
        if self.image_head:
            z_image = z_image + self.embed_whole(visual)
            z_text = self.whole_logit_scale() * z_text + self.embed_whole_text(text.pooled)
        if self.entity_decoder is not None:
            z_text = z_text + self.complete(text.tokens, text.mask, visual.groups)
        if self.token_classes:
            z_text = z_text + jnp.mean(self.classify_tokens(text.tokens, text.mask, visual.groups))
        return self.logit_scale() * z_image @ z_text.T
