"""Conversion of released checkpoints: total, exact to the bit both ways, at full size too."""

import json

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from ovseg_jax.errors import UserError
from ovseg_jax.models.build import build_model
from ovseg_jax.weights import released
from ovseg_jax.weights.initialize import init_variables
from ovseg_jax.weights.links import FORMS
from ovseg_jax.weights.released import TEACHER, image_links, model_links, released_config
from released.arrays import HERE, ReleasedSet, all_sets


@pytest.fixture(scope="module", params=all_sets("dev2"))
def case(request):
    return ReleasedSet(*request.param)


def back(case, tensors):
    parts = released.from_released(tensors, case.config)
    return released.to_released(*parts[:2], case.config, parts[2], released.extra_tensors(tensors))


def assert_same(ours, tensors):
    assert set(ours) == set(tensors)
    for name, value in tensors.items():
        assert ours[name].dtype == value.dtype and ours[name].shape == value.shape, name
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


def test_round_trip_to_the_bit(case):
    assert_same(back(case, case.tensors), case.tensors)


def test_round_trip_without_teacher_and_with_positions_of_another_form(case):
    tensors = {k: x for k, x in case.tensors.items() if not k.startswith(TEACHER)}
    assert released.from_released(tensors, case.config)[2] is None
    tensors["img_encoder.pos_embed"] = tensors["img_encoder.pos_embed"][None]
    assert_same(back(case, tensors), tensors)


def test_sizes_come_from_the_tensors(case):
    sizes, config = case.meta["config"], case.config
    image, text = sizes["img"], sizes["bert"]
    assert config["image"]["patch"] == image["patch_size"]
    assert config["image"]["width"] == image["embed_dim"]
    assert [config["image"][f"{x}_layers"] for x in ("first", "second")] == image["depths"]
    assert config["image"]["group_tokens"] == image["num_group_tokens"][0]
    assert config["image"]["num_groups"] == image["num_output_groups"][0]
    assert config["image"]["patch_norm"] == image["patch_norm"]
    assert config["text"]["depth"] == text["num_hidden_layers"]
    assert config["text"]["mlp_width"] == text["intermediate_size"]
    assert config["text"]["max_positions"] == text["max_position_embeddings"]
    assert config["decoder"]["depth"] == sizes["model"].get("cross_layers", 1)
    assert config["decoder"]["width"] == min(image["embed_dim"], text["hidden_size"])
    assert config["projector_width"] == sizes["proj_inner"]
    assert config["joint_width"] == sizes["model"]["output_dim"]


def test_the_model_of_full_size_maps_whole():
    shapes = json.loads((HERE / "full_model_shapes.json").read_text())["shapes"]
    tensors = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    config = ConfigDict(released_config(tensors))
    variables = jax.eval_shape(
        lambda key: init_variables(build_model(config), key), jax.random.key(0)
    )
    tree = {**nn.unbox(variables["params"]), "batch_stats": variables["batch_stats"]}
    wanted = {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}
    links, teacher = model_links(config), image_links(config.image, TEACHER)
    names = [name for link in (*links, *teacher) for name in link.sources]
    unused = released.extra_tensors(tensors)
    assert len(names) == len(set(names)) and not set(names) & set(unused)
    assert set(names) | set(unused) == set(shapes)
    assert len(unused) == 11
    found = {}
    for link in links:
        for name in link.sources:  # views alone: nothing of full size is made
            for target, part in zip(
                link.targets, FORMS[link.form].read(tensors[name]), strict=True
            ):
                stack = (len(link.sources),) if link.stacked else ()
                assert found.setdefault(target, (*stack, *part.shape)) == (*stack, *part.shape)
    assert found == wanted
    assert (config.image.group_tokens, config.image.num_groups) == (64, 8)


def test_every_fault_is_in_one_message(case):
    tensors = dict(case.tensors)
    del tensors["logit_scale"], tensors["img_encoder.norm.bias"]
    tensors["head.weight"] = np.zeros((2, 2), np.float32)
    tensors["img_encoder.norm.weight"] = np.zeros((3,), np.float32)
    tensors["bridge_projector.linear_out.bias"] = np.zeros((2, 2), np.float32)
    with pytest.raises(UserError) as error:
        released.from_released(tensors, case.config, "best.pth")
    message = str(error.value)
    assert message.startswith("best.pth does not fit")
    for part in ("logit_scale is missing", "norm.bias is missing", "head.weight has no place"):
        assert part in message
    assert "image_encoder/norm/scale has shape" in message and "(3,)" in message
    assert "linear_out.bias has shape (2, 2)" in message
    tensors = {k: x for k, x in case.tensors.items() if k != f"{TEACHER}.norm.bias"}
    with pytest.raises(UserError, match="img_encoder_momentum.norm.bias is missing"):
        released.from_released(tensors, case.config)


def test_what_cannot_be_a_released_checkpoint(case, shared_tiny_config):
    with pytest.raises(UserError, match="no released checkpoint: it has no tensor img_encoder"):
        released_config({"a.weight": np.zeros((2, 2))})
    with pytest.raises(UserError, match="no grid of 3 x 5"):
        released_config(case.tensors, grid=(3, 5))
    tensors = {
        **case.tensors,
        "img_encoder.pos_embed": np.zeros((7, case.config["image"]["width"])),
    }
    with pytest.raises(UserError, match="7 positions, which is no grid"):
        released_config(tensors)
    with pytest.raises(UserError, match="config.model.image.binding is 'slot'"):
        released.to_released({}, {}, shared_tiny_config.model)


def test_other_sizes_and_a_text_encoder_wider_than_the_image(case):
    """A model of our own, of other sizes, under released names and back; sizes found again."""
    config = ConfigDict(case.config)
    config.image.update(
        width=24, heads=3, second_heads=2, patch=5, grid=(3, 3), group_tokens=7, num_groups=3
    )
    config.image.update(first_layers=3, second_layers=2, patch_norm=False)
    config.text.update(width=32, heads=2, depth=3, mlp_width=50)
    config.decoder.update(width=24, depth=1)
    variables = jax.eval_shape(
        lambda key: init_variables(build_model(config), key), jax.random.key(0)
    )
    rng = np.random.default_rng(0)

    def draw(leaf):
        return np.asarray(rng.integers(-99, 99, leaf.shape), leaf.dtype)

    params, statistics = (
        jax.tree.map(draw, nn.unbox(variables[name])) for name in ("params", "batch_stats")
    )
    tensors = released.to_released(params, statistics, config)
    assert tensors["align_proj_text.weight"].shape == (24, 32)
    assert "align_proj_img.weight" not in tensors
    again = ConfigDict(released_config(tensors, heads=3, second_heads=2, text_heads=2))
    again.image.drop_path = again.text.dropout = 0.0
    assert again == config
    for ours, again in zip(
        (params, statistics), released.from_released(tensors, config), strict=False
    ):
        jax.tree.map(np.testing.assert_array_equal, ours, again)
