"""How losses and model are wired together, against NumPy; cached features in place of raw data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from ml_collections import ConfigDict
from reference import losses as reference
from reference.batches import B, make_batch

from ovseg_jax.models.build import build_model
from ovseg_jax.train.batches import merge, unmerge
from ovseg_jax.train.step import step_rngs
from ovseg_jax.train.terms import loss_terms

TEXTS = ("caption", "masked", "prompt", "shared")
MASK_WEIGHT = 0.1


@pytest.fixture(scope="module")
def quiet(shared_tiny_config, tiny_params):
    """Model, teacher, loss config and batch of a step in which nothing is drawn at random."""
    config = shared_tiny_config.copy_and_resolve_references()
    config.model.image.assignment = "soft"
    config.loss.update(matching="enumerate", entity_weight=0.5)
    rng = np.random.default_rng(5)
    teacher = jax.tree.map(
        lambda x: (x + 0.1 * rng.normal(size=x.shape)).astype(np.float32),
        tiny_params["image_encoder"],
    )
    for name in ("patch_embed", "position"):  # the trunk; where it is cached, both share it
        teacher[name] = tiny_params["image_encoder"][name]
    return build_model(config.model), teacher, config.loss, make_batch(0)


@pytest.fixture(scope="module")
def run_terms(quiet, tiny_params):
    """Loss and metrics of a batch, as a step computes them."""
    model, teacher, config, _ = quiet

    def run(params, teacher, batch):
        loss, (metrics, _) = loss_terms(
            model,
            params,
            teacher,
            batch,
            config,
            mask_weight=MASK_WEIGHT,
            text_dropout=False,
            rngs=step_rngs(0, 0),
            mesh=None,
        )
        return loss, metrics

    compiled = jax.jit(run)
    return lambda batch: jax.device_get(compiled(tiny_params, teacher, batch))


@pytest.fixture(scope="module")
def raw_terms(quiet, run_terms):
    return run_terms(quiet[3])


@pytest.fixture(scope="module")
def pieces(quiet, tiny_params):
    """What the towers and projectors give on the batch, each called on its own."""
    model, teacher, _, batch = quiet

    def run(params, teacher, batch):
        def call(method, *args, encoder=params["image_encoder"]):
            return model.apply(
                {"params": {**params, "image_encoder": encoder}}, *args, method=method
            )

        texts = {kind: call("text_tokens", batch[f"{kind}_ids"]) for kind in TEXTS}
        online = [call("visual_tokens", batch[name]) for name in ("image", "image2")]
        target = [
            call("visual_tokens", batch[name], encoder=teacher) for name in ("image", "image2")
        ]
        joint = [call("project_image", tokens.groups) for tokens in (*online, *target)]
        return {
            "texts": texts,
            "visual": [*online, *target],
            "joint": joint,
            "sentences": {kind: call("project_text", texts[kind].pooled) for kind in TEXTS},
            "image": call("project_image", jnp.mean(online[0].groups, axis=1)),
            "masked": call(
                "complete", texts["masked"].tokens, texts["masked"].mask, online[0].groups
            ),
            "features": [call("trunk", batch[name]) for name in ("image", "image2")],
        }

    return jax.jit(run)(tiny_params, teacher, batch)


def mean_over(values, weight):
    return np.average(values, weights=weight)


def test_every_term_reads_what_the_equations_say(quiet, raw_terms, pieces):
    _, _, config, batch = quiet
    loss, metrics = raw_terms
    weight = batch["weight"]
    scale = 10.0  # of `tiny_params`

    def between(a, b, weight):
        pairs = (weight[:, None] > 0) & (weight[None] > 0)
        values = reference.info_nce(np.float64(a), np.float64(b), scale, pairs)
        return mean_over(values, weight)

    sentences = pieces["sentences"]
    contrastive = between(pieces["image"], sentences["caption"], weight)
    entity = between(pieces["masked"], sentences["prompt"], weight * batch["entity_weight"])
    views = [
        (np.float64(tokens.patches), np.float64(tokens.groups), np.float64(joint))
        for tokens, joint in zip(pieces["visual"], pieces["joint"], strict=True)
    ]
    pairs = [
        reference.consistency(
            *([tuple(part[b] for part in view) for view in views[i : i + 2]] for i in (0, 2)),
            np.float64(sentences["shared"][b]),
            config.group_ratio,
            config.mask_threshold,
        )
        for b in range(B)
    ]
    mask = mean_over(pairs, weight * batch["pair_weight"])
    for name, want in (("contrastive", contrastive), ("entity", entity), ("mask", mask)):
        np.testing.assert_allclose(metrics[name], want, rtol=2e-3, err_msg=name)
    np.testing.assert_allclose(loss, contrastive + 0.5 * entity + 0.1 * mask, rtol=2e-3)
    np.testing.assert_allclose(metrics["temperature"], 1 / scale, rtol=1e-5)
    image, caption = np.asarray(pieces["image"]), np.asarray(sentences["caption"])
    hits = (image @ caption.T).argmax(1) == np.arange(B)
    np.testing.assert_allclose(metrics["image_to_text"], mean_over(hits, weight), rtol=1e-5)
    affinity = np.asarray(pieces["visual"][0].affinity)
    shares = (affinity.mean(1) * weight[:, None]).sum(0) / weight.sum()
    usage = -(shares * np.log(shares)).sum() / np.log(4)
    np.testing.assert_allclose(metrics["group_usage"], usage, rtol=1e-3)


def test_equal_captions_are_no_negatives(quiet, tiny_params, pieces):
    """Of the caption contrast and of the completion; the share of such pairs is told."""
    model, _, config, batch = quiet
    config = ConfigDict({**config.to_dict(), "mask_equal_captions": True})
    names = np.random.default_rng(9).integers(0, 8, (B, 4), np.int32)
    right = (names[:, None, :1] == names[None]).any(-1)
    alike = right | right.T
    _, (metrics, _) = jax.jit(
        lambda params, batch: loss_terms(
            model,
            params,
            None,
            batch,
            config,
            mask_weight=0.0,
            text_dropout=False,
            rngs=step_rngs(0, 0),
            mesh=None,
        )
    )(tiny_params, {**batch, "caption_set": names})

    def between(a, b, weight):
        pairs = (weight[:, None] > 0) & (weight[None] > 0)
        values = reference.info_nce(np.float64(a), np.float64(b), 10.0, pairs & ~alike)
        return mean_over(values, weight)

    weight, sentences = batch["weight"], pieces["sentences"]
    want = between(pieces["image"], sentences["caption"], weight)
    np.testing.assert_allclose(metrics["contrastive"], want, rtol=2e-3)
    want = between(pieces["masked"], sentences["prompt"], weight * batch["entity_weight"])
    np.testing.assert_allclose(metrics["entity"], want, rtol=2e-3)
    counted = (weight[:, None] > 0) & (weight[None] > 0) & ~np.eye(B, dtype=bool)
    rate = (alike & counted).sum() / counted.sum()
    assert 0.2 < rate < 0.8
    np.testing.assert_allclose(metrics["equal_captions"], rate, rtol=1e-5)


def test_the_image_head_is_contrasted_beside_the_groups(shared_tiny_config):
    config = shared_tiny_config.copy_and_resolve_references()
    config.unlock()
    config.model.image.update(group_layer=1, trunk_norm=True, class_token=True, assignment="soft")
    config.model.image.update(keep_class_token=True)
    config.model.update(image_head=6, image_head_dropout=0.0)
    config.loss.update(entity_weight=0.5)
    model, batch = build_model(config.model), make_batch(0)

    def run(key, batch):
        params = nn.unbox(model.init(key, batch["image"], batch["caption_ids"])["params"])
        visual = model.apply({"params": params}, batch["image"], method="visual_tokens")
        text = model.apply({"params": params}, batch["caption_ids"], method="text_tokens")
        whole = model.apply({"params": params}, visual, method="embed_whole")
        sentences = model.apply({"params": params}, text.pooled, method="project_text")
        scale = model.apply({"params": params}, method="logit_scale")
        options = {"mask_weight": 0.0, "text_dropout": False, "rngs": step_rngs(0, 0)}
        loss, (metrics, _) = loss_terms(
            model, params, None, batch, config.loss, mesh=None, **options
        )
        return whole, sentences, scale, loss, metrics

    whole, sentences, scale, loss, metrics = jax.jit(run)(jax.random.key(0), batch)
    weight = batch["weight"]
    pairs = (weight[:, None] > 0) & (weight[None] > 0)
    values = reference.info_nce(np.float64(whole), np.float64(sentences), float(scale), pairs)
    want = mean_over(values, weight)
    np.testing.assert_allclose(metrics["whole_contrastive"], want, rtol=2e-3)
    summed = metrics["contrastive"] + 0.5 * metrics["entity"] + metrics["whole_contrastive"]
    np.testing.assert_allclose(loss, summed, rtol=1e-5)


def test_cached_features_give_the_loss_of_the_raw_data(quiet, run_terms, raw_terms, pieces):
    batch = quiet[3]
    cached = {k: x for k, x in batch.items() if not k.endswith("_ids") and "image" not in k}
    cached["image_features"], cached["image2_features"] = pieces["features"]
    for kind in ("caption", "prompt", "shared"):
        cached[f"{kind}_pooled"] = pieces["texts"][kind].pooled
    masked = pieces["texts"]["masked"]
    cached["masked_tokens"], cached["masked_mask"] = masked.tokens, masked.mask
    _, metrics = run_terms(cached)
    assert metrics.keys() == raw_terms[1].keys()
    for name, want in raw_terms[1].items():
        np.testing.assert_allclose(metrics[name], want, rtol=1e-4, err_msg=name)


def test_merged_rows_of_one_example_stay_neighbors():
    a, b = jnp.arange(6.0).reshape(3, 2), 10 + jnp.arange(6.0).reshape(3, 2)
    merged = merge(a, b)
    np.testing.assert_array_equal(merged[:2], [a[0], b[0]])
    for back, part in zip(unmerge({"x": merged}, 2), (a, b), strict=True):
        np.testing.assert_array_equal(back["x"], part)
