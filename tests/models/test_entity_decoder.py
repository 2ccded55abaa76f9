"""The decoder's two orders against plain NumPy, with random parameters and padded captions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from reference import transformer as reference

from ovseg_jax.models.text import EntityDecoder

B, M, K, HEADS, EPS = 3, 7, 4, 2, 1e-5
KEEP = np.arange(M)[None] < np.array([M, 4, 1])[:, None]


def cross_block(p, queries, context):
    x = queries + reference.attention(p["attention"], queries, context, HEADS)
    x = x + reference.feed_forward(p["mlp"], reference.layer_norm(p["mlp_norm"], x, EPS))
    return reference.layer_norm(p["norm"], x, EPS)


def self_layer(p, x, keep):
    normed = reference.layer_norm(p["attention_norm"], x, EPS)
    x = x + reference.attention(p["attention"], normed, normed, HEADS, keep)
    return x + reference.feed_forward(p["mlp"], reference.layer_norm(p["mlp_norm"], x, EPS))


def cross_first(p, tokens, keep, groups, depth):
    """Each layer looks up from the same tokens; what the layer before gave is added."""
    if "align_text" in p:
        tokens = reference.dense(p["align_text"], tokens)
    if "align_image" in p:
        groups = reference.dense(p["align_image"], groups)
    before = 0
    for index in range(depth):
        layer = p[f"layer_{index}"]
        query = reference.layer_norm(layer["token_norm"], tokens, EPS)
        context = reference.layer_norm(layer["group_norm"], groups, EPS)
        found = cross_block(layer["cross"], query, context)
        x = self_layer(layer["self"], before + found, keep)
        before = reference.layer_norm(layer["norm"], x + found, EPS)
    return before


# Width of the caption's tokens and of the groups; the decoder is 8 wide.
@pytest.mark.parametrize(("text", "image"), [(8, 8), (12, 8), (8, 10)])
@pytest.mark.parametrize("mask_padding", [False, True])
def test_cross_first(text, image, mask_padding):
    decoder = EntityDecoder(
        8, HEADS, 2.0, EPS, order="cross_first", depth=2, mask_padding=mask_padding
    )
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    case = normal(B, M, text), jnp.asarray(KEEP), normal(B, K, image)
    boxed = jax.eval_shape(lambda key: decoder.init(key, *case)["params"], jax.random.key(0))
    params = jax.tree.map(
        lambda x: 0.5 * rng.normal(size=x.shape).astype(np.float32), nn.unbox(boxed)
    )
    assert ("align_text" in params, "align_image" in params) == (text != 8, image != 8)
    got = jax.jit(lambda p: decoder.apply({"params": p}, *case))(params)
    for b in range(B):
        keep = KEEP[b] if mask_padding else None
        tokens, groups = (np.asarray(case[i][b]) for i in (0, 2))
        want = cross_first(params, tokens, keep, groups, depth=2)
        np.testing.assert_allclose(got[b], want, rtol=2e-4, atol=2e-4)
