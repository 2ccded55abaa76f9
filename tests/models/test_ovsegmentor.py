"""The parts put together: Eq. 2 end to end, the joint space, the trunk's cut, batch norms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from reference import transformer as reference

from ovseg_jax import sharding
from ovseg_jax.errors import UserError
from ovseg_jax.models.build import build_model
from ovseg_jax.models.ovsegmentor import Projector, unit
from ovseg_jax.models.vit import normalize_image

IMAGE = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8))


def numpy_visual_tokens(p, image):
    """Eq. 2: layers over [I; G], binding, a layer over [I; G], LayerNorm."""
    embed = p["patch_embed"]
    x = reference.patches(image, 8) @ embed["kernel"] + embed["bias"] + p["position"]
    x = np.concatenate([x, p["group_token"]])
    for index in range(2):
        layer = reference.layer_of(p["first"]["layers"], index)
        x = reference.pre_norm_layer(layer, x, heads=4, eps=1e-6)
    width = x.shape[-1]
    groups, affinity = reference.binding(
        p["binding"], x[16:], x[:16], eps=1e-6, scale=width**-0.5, hard=True
    )
    x = np.concatenate([x[:16], groups])
    x = reference.pre_norm_layer(reference.layer_of(p["second"]["layers"], 0), x, heads=4, eps=1e-6)
    x = reference.layer_norm(p["norm"], x, 1e-6)
    return x[16:], x[:16], affinity


def test_equation_2_end_to_end(tiny_model, tiny_params):
    run = jax.jit(lambda p: tiny_model.apply({"params": p}, IMAGE, method="visual_tokens"))
    got = run(tiny_params)
    pixels = np.asarray(normalize_image(IMAGE), np.float64)
    for b in range(len(IMAGE)):
        want = numpy_visual_tokens(tiny_params["image_encoder"], pixels[b])
        for have, wanted in zip((got.groups, got.patches, got.affinity), want, strict=True):
            np.testing.assert_allclose(have[b], wanted, rtol=2e-3, atol=2e-3)


def test_a_frozen_trunk_can_be_cut_off_and_its_features_fed_in(tiny_config):
    image = tiny_config.model.image
    image.update(group_layer=1, trunk_width=8, trunk_heads=1, class_token=True, trunk_norm=True)
    image.layer_scale = 0.5
    model = build_model(tiny_config.model)
    ids = jnp.ones((2, 4), jnp.int32)

    def both(key):
        params = nn.unbox(model.init(key, IMAGE, ids)["params"])
        features = model.apply({"params": params}, IMAGE, method="trunk")
        whole = model.apply({"params": params}, IMAGE, method="visual_tokens")
        rest = model.apply({"params": params}, features, method="visual_tokens")
        return features, whole, rest

    features, whole, rest = jax.jit(both)(jax.random.key(0))
    assert features.shape == (2, 16, 8)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(rest), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_several_layers_of_the_trunk_and_its_class_token(tiny_config):
    image = tiny_config.model.image
    image.update(first_layers=3, group_layer=2, trunk_width=8, trunk_heads=1, class_token=True)
    image.update(trunk_norm=True, keep_class_token=True, trunk_outputs=(1, 2))
    tiny_config.model.image_head = 6
    model = build_model(tiny_config.model)
    ids = jnp.ones((2, 4), jnp.int32)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), IMAGE, ids)["params"])
    encoder = model.image_encoder
    assert encoder.feature_width == 16 and encoder.feature_tokens(32) == 17

    def features(outputs):
        image.trunk_outputs = outputs
        other = build_model(tiny_config.model)
        weights = dict(params)
        if len(outputs) != 2:  # another width of the trunk's output
            weights["image_encoder"] = {**params["image_encoder"], "neck": None}
        return other.apply({"params": weights}, IMAGE, method="trunk")

    both, last = features((1, 2)), features(())
    assert both.shape == (2, 17, 16) and last.shape == (2, 17, 8)
    # The last layer's output is the plain trunk's, the first layer's another.
    np.testing.assert_allclose(both[..., 8:], last, rtol=1e-5, atol=1e-6)
    assert np.abs(both[..., :8] - last).max() > 1e-2
    np.testing.assert_allclose(both[..., :8].mean(-1), 0, atol=1e-5)  # through the trunk's norm
    visual = model.apply({"params": params}, both, method="visual_tokens")
    assert visual.affinity.shape == (2, 16, 4)
    np.testing.assert_allclose(visual.whole, both[:, 0], rtol=1e-6)
    embedded = model.apply({"params": params}, visual, method="embed_whole")
    np.testing.assert_allclose(np.linalg.norm(embedded, axis=-1), 1, rtol=1e-5)
    pooled = jnp.ones((2, tiny_config.model.text.width)) * jnp.asarray([[1.0], [-2.0]])
    for head in ("whole_text_head", "text_projector"):
        other = {**params, head: jax.tree.map(lambda x: x + 1.0, params[head])}
        both = [
            model.apply({"params": p}, pooled, method="embed_whole_text") for p in (params, other)
        ]
        np.testing.assert_allclose(np.linalg.norm(both[0], axis=-1), 1, rtol=1e-5)
        # Sentences for whole images have a head of their own.
        assert np.allclose(*both) == (head == "text_projector")


def test_joint_space_and_temperature(tiny_model, tiny_params):
    def parts(p):
        def call(method, *args):
            return tiny_model.apply({"params": p}, *args, method=method)

        text = call("text_tokens", jnp.asarray([[5, 6, 7, 0], [8, 0, 0, 0]], jnp.int32))
        groups = jnp.ones((2, 4, 32))
        completed = call("complete", text.tokens, text.mask, groups)
        projected = call("project_image", groups), call("project_text", text.pooled)
        return *projected, completed, call("logit_scale"), text

    image, text, completed, scale, tokens = jax.jit(parts)(tiny_params)
    for z in (image, text, completed):
        assert z.dtype == jnp.float32 and z.shape[-1] == 8
        np.testing.assert_allclose(np.linalg.norm(z, axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(scale, 10, rtol=1e-5)
    np.testing.assert_array_equal(tokens.mask, [[1, 1, 1, 0], [1, 0, 0, 0]])
    np.testing.assert_array_equal(tokens.pooled[0], tokens.tokens[0, 2])  # [EOT], the last token
    huge = {"log_scale": jnp.float32(50.0)}
    assert tiny_model.apply({"params": huge}, method="logit_scale") == 100


def test_unit_of_zero_is_zero_with_a_finite_gradient():
    x = jnp.asarray([[3.0, 4.0], [0.0, 0.0], [1e-20, 0.0]])
    np.testing.assert_allclose(unit(x)[:2], [[0.6, 0.8], [0, 0]], rtol=1e-6)
    grad = jax.grad(lambda x: jnp.sum(unit(x) * jnp.asarray([[1.0, 2.0]] * 3)))(x)
    assert np.isfinite(grad).all()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"image.assignment": "sparse"}, "'hard', 'soft'"),
        ({"image.heads": 3}, "config.model.image.width = 32"),
        ({"text.heads": 5}, "config.model.text.width = 24"),
        ({"image.group_layer": 3}, "first_layers = 2"),
        ({"text_pool": "last"}, "'eot', 'cls', 'mean'"),
        ({"matmul_dtype": "float16"}, "'bfloat16'"),
        ({"image.position": "rope"}, "group_layer > 0"),
        ({"image.position": "rope", "image.group_layer": 1, "image.trunk_heads": 16}, "le of 4"),
        ({"image.position": "sine"}, "image.position is 'sine'"),
        ({"image.position_resize": "nearest"}, "image.position_resize is 'nearest'"),
    ],
)
def test_a_model_that_cannot_be_built_is_a_user_error(tiny_config, fields, said):
    tiny_config.model.update_from_flattened_dict(fields)
    with pytest.raises(UserError, match="config.model") as error:
        build_model(tiny_config.model)
    assert said in str(error.value)


def test_bfloat16_is_the_same_model_to_its_precision(tiny_config, tiny_params):
    """Parameters, statistics and the joint space stay float32; activations are bfloat16."""
    tiny_config.model.image.assignment = "soft"  # a hard one flips where rounding decides
    full = build_model(tiny_config.model)
    tiny_config.model.dtype = tiny_config.model.matmul_dtype = "bfloat16"
    half = build_model(tiny_config.model)
    ids = jnp.asarray([[5, 6, 7, 0], [8, 9, 0, 0]], jnp.int32)

    def parts(model):
        def run(p):
            def call(method, *args):
                return model.apply({"params": p}, *args, method=method)

            visual, text = call("visual_tokens", IMAGE), call("text_tokens", ids)
            projected = call("project_image", visual.groups), call("project_text", text.pooled)
            completed = call("complete", text.tokens, text.mask, visual.groups)
            return visual.patches, text.tokens, visual.affinity, *projected, completed

        return jax.jit(run)(tiny_params)

    got, want = parts(half), parts(full)
    kinds = [jnp.bfloat16] * 2 + [jnp.float32] * 4
    assert [x.dtype for x in got] == kinds
    for a, b in zip(got, want, strict=True):
        a, b = np.float64(a), np.float64(b)
        assert np.linalg.norm(a - b) < 0.05 * np.linalg.norm(b)


# ---- batch norms of the projectors

B, T, D = 16, 3, 5
PROJECTOR = Projector(4, 2, 6, "batch", "relu", True)
RNG = np.random.default_rng(0)
X, POOLED = (RNG.normal(size=s).astype(np.float32) for s in ((B, T, D), (B, D)))


@pytest.fixture(scope="module")
def variables():
    boxed = jax.eval_shape(lambda: PROJECTOR.init(jax.random.key(0), jnp.asarray(X), False))
    rng = np.random.default_rng(1)
    draw = lambda x: rng.normal(size=x.shape).astype(np.float32)  # noqa: E731
    norm = {"mean": draw(np.empty(6)), "variance": np.float32([0.5, 1, 2, 3, 1, 1])}
    return {
        "params": jax.tree.map(draw, nn.unbox(boxed["params"])),
        "batch_stats": {"norm": {**norm, "count": np.int32(3)}},
    }


def hidden(variables, x):
    dense = variables["params"]["fc"]
    return np.float64(x.reshape(-1, D)) @ dense["kernel"] + dense["bias"]


def finish(variables, normed, shape):
    norm, out = (variables["params"][name] for name in ("norm", "out"))
    y = np.maximum(normed * norm["scale"] + norm["bias"], 0)
    return (y @ out["kernel"] + out["bias"]).reshape(*shape[:-1], 4)


def twice(variables, pooled, tokens):
    """Two calls in training, the second from the statistics that the first left."""
    first, moved = PROJECTOR.apply(variables, pooled, True, mutable=["batch_stats"])
    second, moved = PROJECTOR.apply({**variables, **moved}, tokens, True, mutable=["batch_stats"])
    return first, second, moved["batch_stats"]["norm"]


def test_each_call_has_its_own_statistics_and_moves_the_running_ones(variables):
    first, second, moved = jax.jit(twice)(variables, POOLED, X)
    running = variables["batch_stats"]["norm"]
    mean, variance = np.float64(running["mean"]), np.float64(running["variance"])
    for got, x in ((first, POOLED), (second, X)):
        h = hidden(variables, x)
        normed = (h - h.mean(0)) / np.sqrt(h.var(0) + 1e-5)
        np.testing.assert_allclose(got, finish(variables, normed, x.shape), rtol=1e-4, atol=1e-4)
        mean, variance = 0.9 * mean + 0.1 * h.mean(0), 0.9 * variance + 0.1 * h.var(0, ddof=1)
    np.testing.assert_allclose(moved["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(moved["variance"], variance, rtol=1e-5)
    assert moved["count"] == 5


def test_outside_training_the_running_statistics_normalize(variables):
    got = jax.jit(lambda v: PROJECTOR.apply(v, jnp.asarray(X), False))(variables)
    running = variables["batch_stats"]["norm"]
    normed = (hidden(variables, X) - running["mean"]) / np.sqrt(running["variance"] + 1e-5)
    np.testing.assert_allclose(got, finish(variables, normed, X.shape), rtol=1e-4, atol=1e-4)


def test_a_batch_split_over_devices_has_the_statistics_of_the_whole(variables):
    mesh = sharding.make_mesh()
    assert mesh.size == 8
    rows = sharding.batch_sharding(mesh)
    split = jax.jit(twice, in_shardings=(sharding.replicated(mesh), rows, rows))
    got, want = split(variables, POOLED, X), jax.jit(twice)(variables, POOLED, X)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_no_gradient_comes_through_the_running_statistics(variables):
    def moved(params):
        norm = twice({**variables, "params": params}, jnp.asarray(POOLED), jnp.asarray(X))[2]
        return jnp.sum(norm["mean"]) + jnp.sum(norm["variance"])

    for leaf in jax.tree.leaves(jax.jit(jax.grad(moved))(variables["params"])):
        np.testing.assert_array_equal(leaf, 0)
