"""Grouping stages against the authors' code: what each stage gives, on images of several shapes.

Within 1e-5 of the norm, assignments equal. Every set SET_{meta.json,weights.npz,eval.npz} beside
the released arrays is compared, and those in the folder that OVSEG_RELEASED_ARRAYS names.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from released.arrays import relative, sets_with

from ovseg_jax.models.vit import VisualEncoder
from ovseg_jax.segmentation import readout
from ovseg_jax.weights.links import Sizes, read_links, write_links
from ovseg_jax.weights.released import image_config, image_links, image_names

PARTS = ("eval.npz", "weights.npz", "meta.json")


class Stages:
    """One set: our encoder with its weights, and the recorded arrays."""

    def __init__(self, folder, name):
        meta, weights, self.recorded = (folder / f"{name}_{x}" for x in reversed(PARTS))
        meta = json.loads(meta.read_text())["config"]
        tensors = {f"img_encoder.{key}": x for key, x in np.load(weights).items()}
        self.recorded = dict(np.load(self.recorded))
        names, heads = image_names("img_encoder"), meta["num_heads"]
        image = image_config(Sizes(tensors, "checkpoint"), names, heads[0], None)
        image |= {"second_heads": heads[-1], "drop_path": 0.0, "binding_form": image.pop("binding")}
        self.encoder, self.size = VisualEncoder(**image), meta["img_size"]
        blank = jnp.zeros((1, self.size, self.size, 3))
        abstract = jax.eval_shape(self.encoder.init, jax.random.key(0), blank)["params"]
        boxed = flatten_dict({"image_encoder": abstract}, sep="/")
        shapes = {path: x.unbox().shape for path, x in boxed.items()}
        links = image_links(image, names)
        arrays = read_links(tensors, links, shapes, (), "the checkpoint")
        for name, tensor in write_links(arrays, links).items():
            np.testing.assert_array_equal(tensor, tensors[name])
        self.params = jax.tree.map(jnp.asarray, unflatten_dict(arrays, sep="/")["image_encoder"])

    def run(self, name):
        """(recorded values of an input, our tokens, what every submodule gave)."""
        prefix = f"{name}/"
        recorded = {k: x for k, x in self.recorded.items() if k.startswith(prefix)}
        values = {key.removeprefix(prefix): x for key, x in recorded.items()}
        record = {"capture_intermediates": True, "mutable": ["intermediates"]}
        apply = jax.jit(lambda params, x: self.encoder.apply({"params": params}, x, **record))
        image = jnp.asarray(self.recorded[f"input/{name}"].transpose(0, 2, 3, 1))
        tokens, seen = apply(self.params, image)
        return values, tokens, seen["intermediates"]


@pytest.fixture(scope="module", params=sets_with(*PARTS))
def stages(request):
    return Stages(*request.param)


@pytest.fixture(scope="module")
def cases(stages):
    names = [k.partition("/")[2] for k in stages.recorded if k.startswith("input/")]
    assert names
    return [stages.run(name) for name in names]


def only(node, *path):
    for name in path:
        node = node[name]
    return node["__call__"][0]


def bindings_of(seen):
    later = [name for name in sorted(seen) if name.startswith("stages_")]
    return [only(seen, "binding"), *(only(seen, name)[0] for name in later)], later


def test_each_stage(cases):
    for recorded, tokens, seen in cases:
        bindings, later = bindings_of(seen)
        count = bindings[0].affinity.shape[1]
        learned = [only(seen, "first")[:, count:], *(only(seen, name)[1] for name in later)]
        for index, (binding, mine) in enumerate(zip(bindings, learned, strict=True)):
            assert relative(binding.groups, recorded[f"stage{index}/x_out"]) < 1e-5
            assert relative(mine, recorded[f"stage{index}/group_token_out"]) < 1e-5
        for index, name in enumerate(later, 1):
            projected = only(seen, name, "projector")
            assert relative(projected, recorded[f"stage{index}/group_projector_out"]) < 1e-5
        assert relative(only(seen, "second"), recorded[f"stage{len(bindings)}/x_out"]) < 1e-5
        assert relative(tokens.groups, recorded["feat"]) < 1e-5
        assert relative(jnp.mean(tokens.groups, axis=1), recorded["x"]) < 1e-5


def test_maps_and_their_product(cases):
    for recorded, tokens, seen in cases:
        bindings, _ = bindings_of(seen)
        product = 1.0
        for index, binding in enumerate(bindings):
            maps = (recorded[f"attn{index}/{kind}"][:, 0] for kind in ("soft", "hard"))
            soft, hard = (x.transpose(0, 2, 1) for x in maps)
            assert relative(binding.affinity, soft) < 1e-5
            np.testing.assert_array_equal(np.argmax(binding.assigned, -1), hard.argmax(-1))
            affinity = np.asarray(binding.affinity)
            product = affinity if index == 0 else product @ affinity
            composed = recorded[f"attn{index}/composed_tokens_BxHxLxG"][:, 0]
            assert relative(product, composed) < 1e-5
        assert relative(tokens.affinity, composed) < 1e-5


def test_the_map_at_the_size_of_the_image(cases):
    found = 0
    for recorded, tokens, seen in cases:
        name = f"get_attn_maps{len(bindings_of(seen)[0]) - 1}_1xHxWxG"
        if name in recorded:
            found += 1
            size = recorded[name].shape[1:3]
            grid = readout.grid_shape(*size, tokens.affinity.shape[1], "rounded_patch")
            cells = tokens.affinity.reshape(1, *grid, -1)
            matrices = (readout.bilinear_weights(n, m) for n, m in zip(size, grid, strict=True))
            assert relative(readout.spread(cells, *matrices), recorded[name]) < 1e-5
    assert found


def test_the_gradient_reaches_every_parameter_through_all_stages(stages):
    image = jax.random.normal(jax.random.key(1), (2, stages.size, stages.size, 3))

    def loss(params):
        rngs = {"gumbel": jax.random.key(2), "dropout": jax.random.key(3)}
        tokens = stages.encoder.apply({"params": params}, image, True, rngs=rngs)
        return jnp.sum(jnp.sin(3 * tokens.groups))

    grads = flatten_dict(jax.jit(jax.grad(loss))(stages.params), sep="/")
    silent = {path for path, grad in grads.items() if np.abs(grad).max() < 1e-3}
    # Nothing changes with a constant added to all keys (softmax over keys), to all queries of an
    # assignment (softmax over groups), or to all channels of tokens that pass a norm.
    nothing = ("attention/key/bias", "/query/bias", "mixing/fc2/bias", "projector/fc2/bias")
    assert all(path.endswith(nothing) for path in silent)
    assert all(np.isfinite(grad).all() for grad in grads.values())
