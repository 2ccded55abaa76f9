"""Two grouping stages against the authors' code: what each stage gives, on two image shapes.

Within 1e-5 of the norm, assignments equal.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ovseg_jax.models.vit import VisualEncoder
from ovseg_jax.optim.groups import flatten, nest
from ovseg_jax.segmentation import readout, windows
from ovseg_jax.weights.groupvit_names import image_links
from ovseg_jax.weights.two_way import read_links, write_links

RELEASED = Path(__file__).parents[1] / "released"
IMAGE = {
    "patch": 8,
    "grid": (8, 8),
    "width": 48,
    "heads": 4,
    "eps": 1e-5,
    "first_layers": 2,
    "group_tokens": 12,
    "num_groups": 12,
    "later_stages": ((4, 4, 1),),
    "second_layers": 1,
    "second_stage": "groups",
    "patch_norm": True,
}


def relative(ours, theirs):
    theirs = np.asarray(theirs, np.float64)
    assert np.shape(ours) == theirs.shape
    return np.linalg.norm(np.asarray(ours, np.float64) - theirs) / np.linalg.norm(theirs)


@pytest.fixture(scope="module")
def encoder():
    return VisualEncoder(**IMAGE, binding_form="grouping_block")


@pytest.fixture(scope="module")
def params(encoder):
    file = np.load(RELEASED / "groupvit2_weights.npz")
    tensors = {f"img_encoder.{name}": file[name] for name in file.files}
    image = jnp.zeros((1, 64, 64, 3))
    abstract = jax.eval_shape(encoder.init, jax.random.key(0), image)["params"]
    shapes = {
        f"image_encoder/{path}": leaf.unbox().shape for path, leaf in flatten(abstract).items()
    }
    links = image_links(IMAGE, "original")
    arrays = read_links(tensors, links, shapes, (), "the checkpoint")
    for name, tensor in write_links(arrays, links).items():
        np.testing.assert_array_equal(tensor, tensors[name])
    return jax.tree.map(jnp.asarray, nest(arrays)["image_encoder"])


@pytest.fixture(scope="module", params=["square", "nonsquare"])
def case(request, encoder, params):
    """(recorded values, ours, what every submodule gave)."""
    file = np.load(RELEASED / "groupvit2_eval.npz")
    prefix = f"{request.param}/"
    recorded = {k.removeprefix(prefix): file[k] for k in file.files if k.startswith(prefix)}
    image = jnp.asarray(file[f"input/{request.param}"].transpose(0, 2, 3, 1))
    run = jax.jit(
        lambda params, image: encoder.apply(
            {"params": params}, image, capture_intermediates=True, mutable=["intermediates"]
        )
    )
    tokens, seen = run(params, image)
    return recorded, tokens, seen["intermediates"]


def only(node, *path):
    for name in path:
        node = node[name]
    return node["__call__"][0]


def test_each_stage(case):
    recorded, tokens, seen = case
    first = only(seen, "binding")
    later, carried = only(seen, "stages_0")
    count = first.affinity.shape[1]
    assert relative(first.groups, recorded["stage0/x_out"]) < 1e-5
    assert relative(only(seen, "first")[:, count:], recorded["stage0/group_token_out"]) < 1e-5
    projected = only(seen, "stages_0", "projector")
    assert relative(projected, recorded["stage1/group_projector_out"]) < 1e-5
    assert relative(later.groups, recorded["stage1/x_out"]) < 1e-5
    assert relative(carried, recorded["stage1/group_token_out"]) < 1e-5
    assert relative(only(seen, "second"), recorded["stage2/x_out"]) < 1e-5
    assert relative(tokens.groups, recorded["feat"]) < 1e-5
    assert relative(jnp.mean(tokens.groups, axis=1), recorded["x"]) < 1e-5


def test_maps_and_their_product(case):
    recorded, tokens, seen = case
    bindings = [only(seen, "binding"), only(seen, "stages_0")[0]]
    for index, binding in enumerate(bindings):
        soft, hard = (
            recorded[f"attn{index}/{kind}"][:, 0].transpose(0, 2, 1) for kind in ("soft", "hard")
        )
        assert relative(binding.affinity, soft) < 1e-5
        np.testing.assert_array_equal(np.argmax(binding.assigned, -1), hard.argmax(-1))
    assert relative(bindings[0].affinity, recorded["attn0/composed_tokens_BxHxLxG"][:, 0]) < 1e-5
    assert relative(tokens.affinity, recorded["attn1/composed_tokens_BxHxLxG"][:, 0]) < 1e-5


@pytest.mark.parametrize("case", ["nonsquare"], indirect=True)
def test_the_map_at_the_size_of_the_image(case):
    recorded, tokens, _ = case
    name = "get_attn_maps1_1xHxWxG"
    size = recorded[name].shape[1:3]
    grid = windows.grid_shape(*size, tokens.affinity.shape[1], "rounded_patch")
    cells = tokens.affinity.reshape(1, *grid, -1)
    matrices = (windows.bilinear_weights(n, m) for n, m in zip(size, grid, strict=True))
    assert relative(readout.spread(cells, *matrices), recorded[name]) < 1e-5


def test_the_gradient_reaches_every_parameter_through_both_stages(encoder, params):
    image = jax.random.normal(jax.random.key(1), (2, 64, 64, 3))

    def loss(params):
        rngs = {"gumbel": jax.random.key(2), "dropout": jax.random.key(3)}
        tokens = encoder.apply({"params": params}, image, True, rngs=rngs)
        return jnp.sum(jnp.sin(3 * tokens.groups))

    grads = flatten(jax.jit(jax.grad(loss))(params))
    silent = {path for path, grad in grads.items() if np.abs(grad).max() < 1e-3}
    # Nothing changes with a constant added to all keys (softmax over keys), to all queries of an
    # assignment (softmax over groups), or to all channels of tokens that pass a norm.
    nothing = ("attention/key/bias", "/query/bias", "mixing/fc2/bias", "projector/fc2/bias")
    assert all(path.endswith(nothing) for path in silent)
    assert all(np.isfinite(grad).all() for grad in grads.values())
