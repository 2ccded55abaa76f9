"""OVSegmentor: visual encoder, text encoder, entity decoder and the joint 256-d space."""

import math
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from ovseg_jax.models.bert import BertEncoder, pool_tokens
from ovseg_jax.models.entity_decoder import EntityDecoder
from ovseg_jax.models.layers import Dense
from ovseg_jax.models.projector import FeatureHead, Projector
from ovseg_jax.models.text_transformer import CausalTextEncoder, up_to_end
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


class OVSegmentor(nn.Module):
    """The whole model. Its methods are the pieces that training and inference are made of.

    Attributes:
      image_encoder, text_encoder, entity_decoder: the towers; without a decoder there is no
        `complete` and no completion projector (GroupViT).
      joint_width: E.
      projector_layers, projector_width, projector_norm, projector_activation, projector_bias: of
        the image, text and completion projectors, see `Projector`. With a batch norm, projecting in
        training changes the collection "batch_stats", and the order of the calls counts.
      text_pool: how a sentence vector is taken from its tokens, see `pool_tokens`.
      pad_id: token id of padding.
      temperature_init: initial temperature of all contrastive losses.
      image_head, image_head_dropout: hidden width and dropout of a head that embeds the whole image
        from the trunk's class token (`FeatureHead`); 0 for none. It needs `keep_class_token`. It is
        compared with sentences through a head of theirs, at a temperature of its own.
      token_classes: classes that a masked token can have (masked language modeling over the
        entities, the paper's Table 4); 0 for no such head.
      token_classes_from: what the head reads, the "decoder"'s output or that of the "text" encoder.
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
    dtype: Any = jnp.float32
    matmul_dtype: Any = jnp.float32

    def setup(self) -> None:
        def projector() -> Projector:
            return Projector(
                self.joint_width,
                self.projector_layers,
                self.projector_width,
                self.projector_norm,
                self.projector_activation,
                self.projector_bias,
                self.dtype,
                self.matmul_dtype,
            )

        self.image_projector = projector()
        self.text_projector = projector()
        if self.entity_decoder is not None:
            self.completion_projector = projector()
        if self.image_head:
            options = {"dtype": self.dtype, "matmul_dtype": self.matmul_dtype}
            self.whole_head = FeatureHead(
                self.joint_width, self.image_head, self.image_head_dropout, **options
            )
            self.whole_text_head = FeatureHead(self.joint_width, self.image_head, 0.0, **options)
        if self.token_classes:
            self.token_head = Dense(
                self.token_classes,
                ("embed", None),
                dtype=self.dtype,
                matmul_dtype=self.matmul_dtype,
            )
        start = -math.log(self.temperature_init)
        constant = nn.initializers.constant(start)
        self.log_scale = self.param("log_scale", constant, (), jnp.float32)
        if self.image_head:
            self.whole_log_scale = self.param("whole_log_scale", constant, (), jnp.float32)

    def trunk(self, image: Array, train: bool = False) -> Float[Array, "B L D0"]:
        """Image features before the groups join.

        Args:
          image: [B, H, W, 3]; uint8, or float32 where the pixels are normalized already.
        """
        pixels = normalize_image(image) if image.dtype == jnp.uint8 else image
        return self.image_encoder.trunk(pixels, train)

    def visual_tokens(
        self, image: Array, train: bool = False, noise: Float[Array, "B L K"] | None = None
    ) -> VisualTokens:
        """Groups, patches and affinity (Eq. 2, 4).

        Args:
          image: [B, H, W, 3] images as `trunk` takes them, or its features [B, L, D0], cached.
          train: stochastic depth and Gumbel noise on.
          noise: that noise instead of a draw of the "gumbel" stream.
        """
        features = image if image.ndim == 3 else self.trunk(image, train)
        return self.image_encoder.group(features, train, noise)

    def text_tokens(self, ids: Int[Array, "B M"], train: bool = False) -> TextTokens:
        """Text features of token ids, padded with `pad_id`; for a `CausalTextEncoder`, with
        anything after the end token."""
        if isinstance(self.text_encoder, CausalTextEncoder):
            mask = up_to_end(ids, self.text_encoder.end_id)
        else:
            mask = ids != self.pad_id
        tokens = self.text_encoder(ids, mask, train)
        return TextTokens(tokens, mask, pool_tokens(tokens, mask, self.text_pool))

    def embed_image(
        self, tokens: Float[Array, "... D"], train: bool = False
    ) -> Float[Array, "... E"]:
        """Image-side features in the joint space as they come, float32."""
        return self.image_projector(tokens, train).astype(jnp.float32)

    def embed_text(
        self, tokens: Float[Array, "... Dt"], train: bool = False
    ) -> Float[Array, "... E"]:
        """Text-side features in the joint space as they come, float32."""
        return self.text_projector(tokens.astype(self.dtype), train).astype(jnp.float32)

    def project_image(
        self, tokens: Float[Array, "... D"], train: bool = False
    ) -> Float[Array, "... E"]:
        """Image-side features in the joint space, unit norm, float32 (Sec. 3.2)."""
        return unit(self.embed_image(tokens, train))

    def embed_whole(self, visual: VisualTokens, train: bool = False) -> Float[Array, "B E"]:
        """Embedding of the whole image, unit norm: by the image head, or else of the mean group."""
        if self.image_head:
            return unit(self.whole_head(visual.whole, train))
        return self.project_image(jnp.mean(visual.groups, axis=1), train)

    def embed_whole_text(
        self, pooled: Float[Array, "... Dt"], train: bool = False
    ) -> Float[Array, "... E"]:
        """Sentence vectors to be compared with `embed_whole`, unit norm, float32.

        With an image head they are not those of `project_text`: a joint space that serves groups
        and whole images alike serves either worse.
        """
        if self.image_head:
            return unit(self.whole_text_head(pooled, train))
        return self.project_text(pooled, train)

    def project_text(
        self, pooled: Float[Array, "... Dt"], train: bool = False
    ) -> Float[Array, "... E"]:
        """Sentence vectors in the joint space, unit norm, float32 (Sec. 3.2)."""
        return unit(self.embed_text(pooled, train))

    def complete(
        self,
        tokens: Float[Array, "B M Dt"],
        mask: Bool[Array, "B M"],
        groups: Float[Array, "B K D"],
        train: bool = False,
    ) -> Float[Array, "B E"]:
        """z^M of Eq. 9: the masked caption, completed by the groups, in the joint space."""
        completed = self.entity_decoder(tokens.astype(self.dtype), mask, groups)
        pooled = pool_tokens(completed, mask, self.text_pool)
        return unit(self.completion_projector(pooled, train))

    def classify_tokens(
        self,
        tokens: Float[Array, "B M Dt"],
        mask: Bool[Array, "B M"],
        groups: Float[Array, "B K D"],
    ) -> Float[Array, "B M C"]:
        """Which entity each token of a masked caption stands for, as logits, float32.

        With `token_classes_from` "text" the groups are not looked at.
        """
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
        if self.image_head:
            z_image = z_image + self.embed_whole(visual)
        z_text = self.project_text(text.pooled)
        if self.image_head:
            z_text = self.whole_logit_scale() * z_text + self.embed_whole_text(text.pooled)
        if self.entity_decoder is not None:
            z_text = z_text + self.complete(text.tokens, text.mask, visual.groups)
        if self.token_classes:
            z_text = z_text + jnp.mean(self.classify_tokens(text.tokens, text.mask, visual.groups))
        return self.logit_scale() * z_image @ z_text.T
