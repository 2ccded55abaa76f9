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


@pytest.mark.parametrize("image_head", [0, 10])
def test_folding_equals_standardizing_the_features(tiny_config, image_head):
    """The neck's of the patches, and those of the image head's first map of the class token."""
    if image_head:
        tiny_config.model.image.update(class_token=True, keep_class_token=True, trunk_norm=True)
        tiny_config.model.image_head = image_head
    model, params = model_and_params(tiny_config, 24)
    source = ScenesSource("train", 6, 0, 32)
    folded = standardized_neck(model, params, source, TRANSFORM, seed=0)
    images = jax.numpy.asarray(np.stack([source.scene(index).image for index in range(6)]))
    features = np.asarray(model.apply({"params": params}, images, method="trunk"), np.float64)

    def assert_folded(old, new, inputs):
        old, new = (jax.tree.map(np.asarray, tree) for tree in (old, new))
        standardized = (inputs - inputs.mean(0)) / np.maximum(inputs.std(0), 1e-3)
        expected = standardized @ old["kernel"] + old["bias"]
        atol = 1e-3 if image_head else 1e-4
        np.testing.assert_allclose(inputs @ new["kernel"] + new["bias"], expected, atol=atol)

    first = 1 if image_head else 0  # of the patches
    encoders = [tree["image_encoder"] for tree in (params, folded)]
    patches = features[:, first:].reshape(-1, 24)
    assert_folded(*(encoder["neck"] for encoder in encoders), patches)
    if image_head:
        heads = (tree["whole_head"]["fc"] for tree in (params, folded))
        assert_folded(*heads, features[:, 0])
    before, after = ({k: v for k, v in x.items() if k != "neck"} for x in encoders)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), before, after))


def test_a_model_without_neck_is_refused(tiny_config):
    model, params = model_and_params(tiny_config, 0)
    with pytest.raises(UserError, match="trunk_width"):
        standardized_neck(model, params, ScenesSource("train", 2, 0, 32), TRANSFORM, seed=0)
