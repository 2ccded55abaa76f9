"""BERT, pooling and both orders of Eq. 8's decoder against plain NumPy, with random parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import transformer as reference
from test_transformer import KEEP, B, K, M, close, normal, random_parameters

from ovseg_jax.models.text import BertEncoder, EntityDecoder, pool_tokens

HEADS, EPS = 2, 1e-5


def test_bert_encoder():
    encoder = BertEncoder(20, 8, depth=2, heads=2, mlp_width=12, max_positions=9, dropout=0.1)
    ids = jnp.where(KEEP, np.random.default_rng(2).integers(1, 20, (B, M), np.int32), 0)
    params = random_parameters(encoder, ids, KEEP)
    run = jax.jit(lambda p, ids: encoder.apply({"params": p}, ids, KEEP))
    got = run(params, ids)
    for b in range(B):
        keep = np.asarray(KEEP[b])
        close(got[b], reference.bert(params, ids[b], keep, depth=2, heads=2, eps=1e-12))
    # What stands in the padding is never seen by a real token.
    np.testing.assert_array_equal(run(params, jnp.where(KEEP, ids, 7))[KEEP], got[KEEP])


@pytest.mark.parametrize("how", ["eot", "cls", "mean"])
def test_pool_tokens(how):
    tokens = normal(5, B, M, 6)
    got = pool_tokens(tokens, KEEP, how)
    for b in range(B):
        want = reference.pool(tokens[b], np.asarray(KEEP[b]), how)
        np.testing.assert_allclose(got[b], want, rtol=1e-6)
    nothing = pool_tokens(tokens, jnp.zeros((B, M), bool), how)
    np.testing.assert_array_equal(nothing, 0 * tokens[:, 0] if how == "mean" else tokens[:, 0])


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


def decode(decoder, text, image):
    """Parameters, the caption's tokens and groups (of these widths), and the decoder's output."""
    case = normal(3, B, M, text), KEEP, normal(4, B, K, image)
    params = random_parameters(decoder, *case)
    got = jax.jit(lambda p: decoder.apply({"params": p}, *case))(params)
    return params, np.asarray(case[0]), np.asarray(case[2]), got


def test_self_first():
    params, tokens, groups, got = decode(EntityDecoder(8, HEADS, 2.0, EPS), 6, 8)
    for b in range(B):
        case = tokens[b], np.asarray(KEEP[b]), groups[b]
        close(got[b], reference.decoder(params, *case, heads=HEADS, eps=EPS))


# Width of the caption's tokens and of the groups; the decoder is 8 wide.
@pytest.mark.parametrize(("text", "image"), [(8, 8), (12, 8), (8, 10)])
@pytest.mark.parametrize("mask_padding", [False, True])
def test_cross_first(text, image, mask_padding):
    options = {"order": "cross_first", "depth": 2, "mask_padding": mask_padding}
    decoder = EntityDecoder(8, HEADS, 2.0, EPS, **options)
    params, tokens, groups, got = decode(decoder, text, image)
    assert ("align_text" in params, "align_image" in params) == (text != 8, image != 8)
    for b in range(B):
        keep = np.asarray(KEEP[b]) if mask_padding else None
        close(got[b], cross_first(params, tokens[b], keep, groups[b], depth=2))
