"""Conversion of released checkpoints: total, exact to the bit both ways, at full size too."""

import json

import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict

from ovseg_jax.errors import UserError
from ovseg_jax.models.build import build_model, variable_shapes
from ovseg_jax.weights import released
from ovseg_jax.weights.links import FORMS
from ovseg_jax.weights.released import (
    TEACHER,
    image_links,
    image_names,
    model_links,
    released_config,
)
from released.arrays import HERE, ReleasedSet, sets_with


@pytest.fixture(scope="module", params=sets_with("weights_momentum.npz"))
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
    sizes, config = case.meta["config"], ConfigDict(case.config)
    image, text = sizes["img"], sizes["bert"]
    found = config.image, config.text, config.decoder
    assert (found[0].patch, found[0].width) == (image["patch_size"], image["embed_dim"])
    assert [found[0].first_layers, found[0].second_layers] == image["depths"]
    assert [found[0].group_tokens] == image["num_group_tokens"][:1]
    assert [found[0].num_groups] == image["num_output_groups"][:1]
    assert found[0].patch_norm == image["patch_norm"]
    names = ("num_hidden_layers", "intermediate_size", "max_position_embeddings")
    ours = (found[1].depth, found[1].mlp_width, found[1].max_positions)
    assert ours == tuple(text[name] for name in names)
    assert found[2].depth == sizes["model"].get("cross_layers", 1)
    assert found[2].width == min(image["embed_dim"], text["hidden_size"])
    joint = (config.projector_width, config.joint_width)
    assert joint == (sizes["proj_inner"], sizes["model"]["output_dim"])


def test_the_model_of_full_size_maps_whole():
    shapes = json.loads((HERE / "full_model_shapes.json").read_text())["shapes"]
    tensors = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    config = ConfigDict(released_config(tensors))
    wanted = variable_shapes(build_model(config))
    links, teacher = model_links(config), image_links(config.image, image_names(TEACHER), "table")
    names = [name for link in (*links, *teacher) for name in link.sources]
    unused = released.extra_tensors(tensors)
    assert len(names) == len(set(names)) and not set(names) & set(unused)
    assert set(names) | set(unused) == set(shapes)
    assert len(unused) == 11
    found = {}
    for link in links:
        for name in link.sources:  # views alone: nothing of full size is made
            parts = FORMS[link.form].read(tensors[name])
            for target, part in zip(link.targets, parts, strict=True):
                stack = (len(link.sources),) if link.stacked else ()
                assert found.setdefault(target, (*stack, *part.shape)) == (*stack, *part.shape)
    assert found == wanted
    assert (config.image.group_tokens, config.image.num_groups) == (64, 8)


def test_every_fault_is_in_one_message(case):
    tensors = dict(case.tensors)
    del tensors["logit_scale"], tensors[f"{TEACHER}.norm.bias"]
    tensors["head.weight"] = np.zeros((2, 2), np.float32)
    with pytest.raises(UserError) as error:
        released.from_released(tensors, case.config, "best.pth")
    for part in ("best.pth does not fit", "logit_scale is missing", "head.weight has no place"):
        assert part in str(error.value)
    tensors = {k: x for k, x in case.tensors.items() if k != f"{TEACHER}.norm.bias"}
    with pytest.raises(UserError, match="img_encoder_momentum.norm.bias is missing"):
        released.from_released(tensors, case.config)


def test_what_cannot_be_a_released_checkpoint(case, shared_tiny_config):
    with pytest.raises(UserError, match="no released checkpoint: it has no tensor img_encoder"):
        released_config({"a.weight": np.zeros((2, 2))})
    with pytest.raises(UserError, match="no grid of 3 x 5"):
        released_config(case.tensors, grid=(3, 5))
    positions = np.zeros((7, case.config["image"]["width"]))
    tensors = {**case.tensors, "img_encoder.pos_embed": positions}
    with pytest.raises(UserError, match="7 positions, which is no grid"):
        released_config(tensors)
    with pytest.raises(UserError, match="config.model.image.binding is 'slot'"):
        released.to_released({}, {}, shared_tiny_config.model)


def test_other_sizes_and_a_text_encoder_wider_than_the_image(case):
    """A model of our own, of other sizes, under released names and back; sizes found again."""
    config = ConfigDict(case.config)
    config.image.update(width=24, heads=3, second_heads=2, patch=5, grid=(3, 3), group_tokens=7)
    config.image.update(num_groups=3, first_layers=3, second_layers=2, patch_norm=False)
    config.text.update(width=32, heads=2, depth=3, mlp_width=50)
    config.decoder.update(width=24, depth=1)
    rng = np.random.default_rng(0)
    drawn = {
        path: np.asarray(rng.integers(-99, 99, shape), np.int32 if "count" in path else np.float32)
        for path, shape in variable_shapes(build_model(config)).items()
    }
    params = unflatten_dict(drawn, sep="/")
    statistics = params.pop("batch_stats")
    tensors = released.to_released(params, statistics, config)
    assert tensors["align_proj_text.weight"].shape == (24, 32)
    assert "align_proj_img.weight" not in tensors
    again = ConfigDict(released_config(tensors, heads=3, second_heads=2, text_heads=2))
    again.image.drop_path = again.text.dropout = 0.0
    assert again == config
    read = released.from_released(tensors, config)
    jax.tree.map(np.testing.assert_array_equal, (params, statistics, None), read)
