"""The data-dependent start of the neck."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from ovseg_jax.data.scenes import ScenesSource
from ovseg_jax.errors import UserError
from ovseg_jax.models.build import build_model
from ovseg_jax.optim.groups import nest
from ovseg_jax.train.features import standardized_neck
from ovseg_jax.weights.initialize import variable_shapes

TRANSFORM = {"kind": "none", "size": 32}


def model_and_params(config, trunk_width):
    config = ConfigDict(config.model.to_dict())
    config.image.update(trunk_width=trunk_width, group_layer=1)
    model = build_model(config)
    rng = np.random.default_rng(0)
    flat = {
        path: rng.normal(0, 0.2, shape).astype(np.float32)
        for path, shape in variable_shapes(model).items()
    }
    return model, jax.tree.map(jax.numpy.asarray, nest(flat))


def test_folding_equals_standardizing_the_features(tiny_config):
    model, params = model_and_params(tiny_config, 24)
    source = ScenesSource("train", 6, 0, 32)
    folded = standardized_neck(model, params, source, TRANSFORM, seed=0)
    images = jax.numpy.asarray(np.stack([source.scene(index).image for index in range(6)]))
    features = np.asarray(model.apply({"params": params}, images, method="trunk"), np.float64)
    flat = features.reshape(-1, 24)
    standardized = (features - flat.mean(0)) / flat.std(0)
    neck = params["image_encoder"]["neck"]
    expected = standardized @ np.asarray(neck["kernel"]) + np.asarray(neck["bias"])
    new = folded["image_encoder"]["neck"]
    found = features @ np.asarray(new["kernel"]) + np.asarray(new["bias"])
    np.testing.assert_allclose(found, expected, atol=1e-4)
    before = {k: v for k, v in params["image_encoder"].items() if k != "neck"}
    after = {k: v for k, v in folded["image_encoder"].items() if k != "neck"}
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), before, after))


def test_the_image_head_is_standardized_too(tiny_config):
    tiny_config.model.image.update(class_token=True, keep_class_token=True, trunk_norm=True)
    tiny_config.model.image_head = 10
    model, params = model_and_params(tiny_config, 24)
    source = ScenesSource("train", 6, 0, 32)
    folded = standardized_neck(model, params, source, TRANSFORM, seed=0)
    images = jax.numpy.asarray(np.stack([source.scene(index).image for index in range(6)]))
    features = np.asarray(model.apply({"params": params}, images, method="trunk"), np.float64)
    whole = features[:, 0]
    standardized = (whole - whole.mean(0)) / np.maximum(whole.std(0), 1e-3)
    old, new = (jax.tree.map(np.asarray, tree["whole_head"]["fc"]) for tree in (params, folded))
    expected = standardized @ old["kernel"] + old["bias"]
    np.testing.assert_allclose(whole @ new["kernel"] + new["bias"], expected, atol=1e-3)
    # The neck is standardized on the patches, without the class token.
    patches = features[:, 1:].reshape(-1, features.shape[-1])
    standardized = (patches - patches.mean(0)) / np.maximum(patches.std(0), 1e-3)
    old, new = (
        jax.tree.map(np.asarray, tree["image_encoder"]["neck"]) for tree in (params, folded)
    )
    expected = standardized @ old["kernel"] + old["bias"]
    np.testing.assert_allclose(patches @ new["kernel"] + new["bias"], expected, atol=1e-3)


def test_a_model_without_neck_is_refused(tiny_config):
    model, params = model_and_params(tiny_config, 0)
    with pytest.raises(UserError, match="trunk_width"):
        standardized_neck(model, params, ScenesSource("train", 2, 0, 32), TRANSFORM, seed=0)
