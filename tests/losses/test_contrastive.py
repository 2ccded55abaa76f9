"""Eq. 7 and 9 against plain NumPy, and what weights and excluded pairs do."""

import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import losses as reference

from ovseg_jax import sharding
from ovseg_jax.losses.contrastive import (
    alike,
    false_negative_rate,
    group_set_nce,
    info_nce,
    multi_label_info_nce,
    negatives_mask,
)
from ovseg_jax.losses.objective import weighted_mean

RELEASED = Path(__file__).parents[1] / "released"

B, E = 6, 4


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def unit_rows(seed, *shape):
    x = np.random.default_rng(seed).normal(size=(B, *shape, E))
    return jnp.asarray(unit(x), jnp.float32)


def everyone(count):
    return negatives_mask(jnp.ones(count))


def some(seed, count=B):
    """Negatives with absent examples and equal labels; and which pairs count, themselves too."""
    rng = np.random.default_rng(seed)
    present, label = rng.random(count) < 0.8, rng.integers(0, 3, count, np.int32)
    present[2] = False
    matrix = present[:, None] & present[None] & (label[:, None] != label[None])
    negatives = negatives_mask(jnp.asarray(present, jnp.float32), jnp.asarray(label))
    np.testing.assert_array_equal(negatives, matrix & ~np.eye(count, dtype=bool))
    return negatives, matrix


def named(seed, count=B):
    """Two names of each example, the first of them in its sentence; and who is alike."""
    names = np.random.default_rng(seed).integers(0, 7, (count, 2), np.int32)
    right = (names[:, None, :1] == names[None]).any(-1)
    return jnp.asarray(names), right | right.T


def numpy64(*arrays):
    return [np.asarray(array, np.float64) for array in arrays]


def test_info_nce_over_all_pairs():
    a, b = unit_rows(0), unit_rows(1)
    got, hits = jax.jit(info_nce)(a, b, jnp.float32(14.0), everyone(B))
    want = reference.info_nce(*numpy64(a, b), 14.0, np.ones((B, B), bool))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    # Both directions enter alike.
    turned, _ = info_nce(b, a, jnp.float32(14.0), everyone(B))
    np.testing.assert_allclose(turned, got, rtol=1e-5)
    nearest = np.argmax(np.asarray(a) @ np.asarray(b).T, axis=1)
    np.testing.assert_array_equal(hits, nearest == np.arange(B))
    assert 0 < hits.sum() < B


def test_info_nce_with_excluded_pairs():
    a, b = unit_rows(2), unit_rows(3)
    negatives, keep = some(4)
    assert 0 < keep.sum() < 0.8 * B * B
    got, hits = info_nce(a, b, jnp.float32(5.0), negatives)
    want = reference.info_nce(*numpy64(a, b), 5.0, keep)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got[2], 0, atol=1e-6)  # alone with itself
    assert hits[2]


def test_what_is_alike_in_any_label_is_no_negative():
    a, b = unit_rows(2), unit_rows(3)
    label = jnp.asarray([0, 1, 0, 2, 2, 1], jnp.int32)
    (names, same_name), off = named(5), ~np.eye(B, dtype=bool)
    same_label = np.asarray(alike(label))
    np.testing.assert_array_equal(same_label, label[:, None] == label[None])
    assert (same_name & off).sum() > 0 and (same_name & off & ~same_label).sum() > 0
    for labels, wrong in (((label, None), ~same_label), ((label, names), ~same_label & ~same_name)):
        negatives = negatives_mask(jnp.ones(B), *labels)
        np.testing.assert_array_equal(negatives, wrong & off)
        got, _ = info_nce(a, b, jnp.float32(5.0), negatives)
        want = reference.info_nce(*numpy64(a, b), 5.0, wrong)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    weight = jnp.asarray([1.0, 2, 0, 1, 1, 1])
    counted = np.asarray(weight > 0)[:, None] & np.asarray(weight > 0)[None] & off
    rate = (same_name & counted).sum() / counted.sum()
    np.testing.assert_allclose(false_negative_rate(weight, names), rate, rtol=1e-6)
    assert false_negative_rate(0 * weight, names) == 0


def test_negatives_within_a_data_set():
    sets = np.array([0, 1, 0, 1, 1, 2], np.int32)
    found = negatives_mask(jnp.ones(B), within=jnp.asarray(sets))
    np.testing.assert_array_equal(found, (sets[:, None] == sets) & ~np.eye(B, dtype=bool))
    values, _ = info_nce(unit_rows(0), unit_rows(1), jnp.float32(9.0), found)
    np.testing.assert_allclose(values[5], 0, atol=1e-6)  # nobody else is of its set
    label = jnp.asarray([7, 7, 7, 8, 7, 7], jnp.int32)
    # Of set 0 one pair, of set 1 one of three.
    rate = false_negative_rate(jnp.ones(B), label, jnp.asarray(sets))
    np.testing.assert_allclose(rate, 2 / 4)


def test_matched_pairs_at_a_high_temperature_cost_nothing_and_stay_finite():
    z = jnp.eye(B)
    loss, grad = jax.value_and_grad(
        lambda z: jnp.sum(info_nce(z, z, jnp.float32(100.0), everyone(B))[0])
    )(z)
    assert loss < 1e-6 and np.isfinite(grad).all()


def test_two_devices_of_the_released_training_are_one_global_batch():
    arrays = np.load(RELEASED / "contrastive_2rank.npz")
    a, b = (unit(jnp.asarray(arrays[f"{name}_x"].reshape(6, -1))) for name in ("image", "text"))
    for scale, name in ((jnp.exp(2.5), "ls2p5"), (100.0, "ls6_clamped")):
        each, _ = info_nce(a, b, jnp.float32(scale), everyone(6))
        by_rank = each.reshape(2, 3).mean(1)
        np.testing.assert_allclose(by_rank, arrays[f"loss_per_rank_{name}"], rtol=1e-5)
    mean = jnp.mean(info_nce(a, b, jnp.exp(jnp.float32(2.5)), everyone(6))[0])
    np.testing.assert_allclose(mean, arrays["loss_global_batch_ls2p5"], rtol=1e-5)


def test_several_texts_per_image():
    texts, present = unit_rows(8, 3), np.random.default_rng(8).random((B, 3)) < 0.7
    a, (negatives, keep) = unit_rows(9), some(10)
    present[1] = False
    masks = negatives, jnp.asarray(present)
    got, pull = jax.vjp(lambda b: multi_label_info_nce(a, b, jnp.float32(6.0), *masks), texts)
    want = reference.multi_label_info_nce(*numpy64(a, texts), 6.0, keep, present)
    assert want[1] == 0 and (want > 0).sum() >= B - 2
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    (grad,) = pull(jnp.ones(B))
    np.testing.assert_array_equal(grad[~present], 0)
    assert np.isfinite(grad).all()
    one = multi_label_info_nce(a, texts[:, :1], jnp.float32(6.0), masks[0], jnp.ones((B, 1), bool))
    pairs, _ = info_nce(a, texts[:, 0], jnp.float32(6.0), negatives)
    np.testing.assert_allclose(one, pairs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["dev", "dev2"])
def test_the_released_multi_label_loss(name):
    # Caption and completed answer are the two texts of each image.
    arrays = np.load(RELEASED / f"{name}_eval_rest.npz")
    keys = ("out/image_x", "out/text_x", "entity/answer_text_x")
    image, *texts = (unit(jnp.asarray(arrays[key])) for key in keys)
    scale, every = jnp.asarray(arrays["out/logit_scale_exp_clamped"]), everyone(len(image))
    texts = jnp.stack(texts, 1)
    present = jnp.ones(texts.shape[:2], bool)
    values = multi_label_info_nce(image, texts, scale, every, present)
    np.testing.assert_allclose(jnp.mean(values), arrays["out/multi_label_loss"], rtol=1e-5)
    pairs, _ = info_nce(image, texts[:, 0], scale, every)
    np.testing.assert_allclose(jnp.mean(pairs), arrays["out/matching_loss"], rtol=1e-5)


# Two sets of S groups of each pair, for the alternative to mask consistency (Table 6).
S = 3


def test_group_consistency_equals_the_sum_written_out():
    own, other, (negatives, keep) = unit_rows(14, S), unit_rows(15, S), some(4)
    found = group_set_nce(own, other, jnp.float32(7.0), negatives)
    own, other = numpy64(own, other)
    for i in range(B):
        total = 0.0
        for s in range(S):
            mass = [np.exp(7.0 * (other[j] @ own[i, s])).sum() for j in range(B)]
            among = sum(mass[j] for j in range(B) if keep[i, j] or j == i)
            total -= np.log(mass[i] / among) / S
        np.testing.assert_allclose(found[i], total, rtol=1e-5, atol=1e-6)


def test_gradients_of_group_consistency_go_to_the_online_groups_alone():
    def total(own, other):
        return group_set_nce(own, other, jnp.float32(7.0), everyone(B)).sum()

    own, other = jax.grad(total, argnums=(0, 1))(unit_rows(14, S), unit_rows(15, S))
    assert np.abs(own).min() > 0 and not np.abs(other).any()


def test_eight_devices_give_the_plain_loss():
    count = 64
    rng = np.random.default_rng(11)
    a, b = (rng.normal(size=(2, count, 16)) / 4).astype(np.float32)
    negatives, names = some(12, count)[0], named(13, count)[0]
    negatives &= ~alike(names)

    def loss(a, b, scale):
        values, hits = info_nce(a, b, scale, negatives)
        texts = jnp.stack([b, jnp.roll(b, 1, axis=0)], axis=1)
        several = multi_label_info_nce(a, texts, scale, negatives, jnp.ones((count, 2), bool))
        total = jnp.mean(values * jnp.arange(count).astype(jnp.float32)) + jnp.mean(several)
        return total, hits

    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    (want, hits), gradient = run(a, b, jnp.float32(9.0))
    split = sharding.batch_sharding(sharding.make_mesh())
    (found, other_hits), others = run(*jax.device_put((a, b), split), jnp.float32(9.0))
    np.testing.assert_array_equal(other_hits, hits)
    np.testing.assert_allclose(found, want, rtol=1e-5)
    for x, y in zip(gradient, others, strict=True):
        np.testing.assert_allclose(y, x, rtol=1e-4, atol=1e-5 * np.abs(x).max())


def test_no_device_holds_the_square():
    """Read from the compiled program, forward and backward; nor does one exchange squares."""
    count, mesh = 256, sharding.make_mesh()
    split = sharding.batch_sharding(mesh)

    def loss(a, b, weight, names, sets):
        negatives = negatives_mask(weight, names, within=sets)
        return jnp.mean(info_nce(a, b, jnp.float32(9.0), negatives)[0])

    def given(*shape, dtype=np.float32):
        return jax.ShapeDtypeStruct((count, *shape), dtype, sharding=split)

    labels = given(4, dtype=np.int32), given(dtype=np.int32)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(jax.grad(loss, (0, 1))).lower(given(8), given(8), given(), *labels)
    text = lowered.compile().as_text()
    sizes = {math.prod(map(int, dims.split(","))) for dims in re.findall(r"\[([\d,]+)\]", text)}
    # A device's rows, against each of four names.
    assert max(sizes) <= 4 * count * count // 8
    assert "all-to-all" not in text


def test_a_weightless_example_changes_nothing_whatever_it_holds():
    a, b, c = unit_rows(5), unit_rows(6), unit_rows(7)
    weight = jnp.asarray([1.0, 1.0, 0.0, 1.0, 0.5, 1.0])

    def loss(a, b):
        return weighted_mean(info_nce(a, b, jnp.float32(9.0), negatives_mask(weight))[0], weight)

    value, grad = jax.value_and_grad(loss)(a, b)
    swapped = loss(a.at[2].set(c[2]), b.at[2].set(c[3]))
    np.testing.assert_allclose(value, swapped, rtol=1e-6)
    np.testing.assert_array_equal(grad[2], 0)
    kept = np.flatnonzero(np.asarray(weight))
    each = reference.info_nce(*numpy64(a[kept], b[kept]), 9.0, np.ones((5, 5), bool))
    np.testing.assert_allclose(value, np.average(each, weights=weight[kept]), rtol=1e-5)
