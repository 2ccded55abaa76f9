"""OVSegmentor: visual encoder, text encoder, entity decoder and the joint 256-d space."""

import math
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from ovseg_jax.models.bert import BertEncoder, pool_tokens
from ovseg_jax.models.entity_decoder import EntityDecoder
from ovseg_jax.models.layers import Dense, gelu
from ovseg_jax.models.vit import VisualEncoder, VisualTokens, normalize_image
from ovseg_jax.shapes import Array, Bool, Float, Int


@struct.dataclass
class TextTokens:
    """Text features: `tokens` [B, M, Dt], `mask` [B, M] (True at real tokens), `pooled` [B, Dt]."""

    tokens: Float[Array, "B M Dt"]
    mask: Bool[Array, "B M"]
    pooled: Float[Array, "B Dt"]


def unit(x: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """Divides by the Euclidean norm over the last axis, in float32; 0 stays 0, with gradient 0."""
    x = x.astype(jnp.float32)
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    safe = jnp.where(square > 1e-24, square, 1.0)
    return x / jnp.sqrt(safe)


class Projector(nn.Module):
    """Projection to the joint space: one linear map, or two with a GELU between them.

    Attributes:
      features: E.
      layers: 1 or 2.
      hidden: width between two layers.
    """

    features: int
    layers: int
    hidden: int
    dtype: Any
    matmul_dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... E"]:
        options = {"dtype": self.dtype, "matmul_dtype": self.matmul_dtype}
        if self.layers == 2:
            x = gelu(Dense(self.hidden, ("embed", "mlp"), name="fc", **options)(x))
        return Dense(self.features, ("mlp", "joint"), name="out", use_bias=False, **options)(x)


class OVSegmentor(nn.Module):
    """The whole model. Its methods are the pieces that training and inference are made of.

    Attributes:
      image_encoder, text_encoder, entity_decoder: the towers.
      joint_width: E.
      projector_layers, projector_width: of the image, text and completion projectors.
      text_pool: how a sentence vector is taken from its tokens, see `pool_tokens`.
      pad_id: token id of padding.
      temperature_init: initial temperature of the contrastive losses.
    """

    image_encoder: VisualEncoder
    text_encoder: BertEncoder
    entity_decoder: EntityDecoder
    joint_width: int = 256
    projector_layers: int = 1
    projector_width: int = 512
    text_pool: str = "eot"
    pad_id: int = 0
    temperature_init: float = 0.07
    dtype: Any = jnp.float32
    matmul_dtype: Any = jnp.float32

    def setup(self) -> None:
        def projector() -> Projector:
            return Projector(
                self.joint_width,
                self.projector_layers,
                self.projector_width,
                self.dtype,
                self.matmul_dtype,
            )

        self.image_projector = projector()
        self.text_projector = projector()
        self.completion_projector = projector()
        start = -math.log(self.temperature_init)
        self.log_scale = self.param("log_scale", nn.initializers.constant(start), (), jnp.float32)

    def trunk(self, image: Array, train: bool = False) -> Float[Array, "B L D0"]:
        """Image features before the groups join. `image` is uint8 [B, H, W, 3]."""
        return self.image_encoder.trunk(normalize_image(image), train)

    def visual_tokens(self, image: Array, train: bool = False) -> VisualTokens:
        """Groups, patches and affinity (Eq. 2, 4).

        Args:
          image: uint8 [B, H, W, 3] images, or [B, L, D0] features of `trunk`, cached.
          train: stochastic depth and Gumbel noise on.
        """
        features = image if image.ndim == 3 else self.trunk(image, train)
        return self.image_encoder.group(features, train)

    def text_tokens(self, ids: Int[Array, "B M"], train: bool = False) -> TextTokens:
        """Text features of token ids, padded with `pad_id`."""
        mask = ids != self.pad_id
        tokens = self.text_encoder(ids, mask, train)
        return TextTokens(tokens, mask, pool_tokens(tokens, mask, self.text_pool))

    def project_image(self, tokens: Float[Array, "... D"]) -> Float[Array, "... E"]:
        """Image-side features in the joint space, unit norm, float32 (Sec. 3.2)."""
        return unit(self.image_projector(tokens))

    def project_text(self, pooled: Float[Array, "B Dt"]) -> Float[Array, "B E"]:
        """Sentence vectors in the joint space, unit norm, float32 (Sec. 3.2)."""
        return unit(self.text_projector(pooled.astype(self.dtype)))

    def complete(
        self,
        tokens: Float[Array, "B M Dt"],
        mask: Bool[Array, "B M"],
        groups: Float[Array, "B K D"],
    ) -> Float[Array, "B E"]:
        """z^M of Eq. 9: the masked caption, completed by the groups, in the joint space."""
        completed = self.entity_decoder(tokens.astype(self.dtype), mask, groups)
        pooled = pool_tokens(completed, mask, self.text_pool)
        return unit(self.completion_projector(pooled))

    def logit_scale(self) -> Float[Array, ""]:
        """Inverse temperature of both contrastive losses, at most 100."""
        return jnp.minimum(jnp.exp(self.log_scale), 100.0)

    def __call__(self, image: Array, ids: Int[Array, "B M"], train: bool = False) -> Array:
        """Touches every parameter once; used to initialize them."""
        visual = self.visual_tokens(image, train)
        text = self.text_tokens(ids, train)
        completed = self.complete(text.tokens, text.mask, visual.groups)
        z_image = self.project_image(jnp.mean(visual.groups, axis=1))
        scores = self.logit_scale() * z_image @ (self.project_text(text.pooled) + completed).T
        return scores
