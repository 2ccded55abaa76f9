"""How losses and model are wired together, against NumPy; cached features in place of raw data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from ml_collections import ConfigDict
from reference import losses as reference
from reference.batches import VOCABULARY, B, M, make_batch
from reference.steps import make_terms

from ovseg_jax.models.build import build_model
from ovseg_jax.train.apply import merge, unmerge
from ovseg_jax.train.step import step_rngs

TEXTS = ("caption", "masked", "prompt", "shared")
MASK_WEIGHT = 0.1


@pytest.fixture(scope="module")
def teacher(tiny_params):
    """Another visual encoder, with the online one's trunk (where it is cached, both share it)."""
    rng = np.random.default_rng(5)
    encoder = jax.tree.map(
        lambda x: (x + 0.1 * rng.normal(size=x.shape)).astype(np.float32),
        tiny_params["image_encoder"],
    )
    trunk = ("patch_embed", "position")
    return encoder | {name: tiny_params["image_encoder"][name] for name in trunk}


@pytest.fixture(scope="module")
def quiet(shared_tiny_config, teacher):
    """Model, teacher, loss config and batch of a step in which nothing is drawn at random."""
    config = shared_tiny_config.copy_and_resolve_references()
    config.model.image.assignment = "soft"
    config.loss.update(matching="enumerate", entity_weight=0.5)
    return build_model(config.model), teacher, config.loss, make_batch(0)


@pytest.fixture(scope="module")
def run_terms(quiet, tiny_params):
    """Loss and metrics of a batch, as a step computes them."""
    model, teacher, config, _ = quiet

    compiled = jax.jit(make_terms(model, config, MASK_WEIGHT))
    return lambda batch: jax.device_get(compiled(tiny_params, teacher, batch))


@pytest.fixture(scope="module")
def raw_terms(quiet, run_terms):
    return run_terms(quiet[3])


def bound(model, params):
    """(method, arguments) -> what the model gives, with another visual encoder on request."""

    def call(method, *args, encoder=params["image_encoder"], **options):
        variables = {"params": {**params, "image_encoder": encoder}}
        return model.apply(variables, *args, method=method, **options)

    return call


@pytest.fixture(scope="module")
def pieces(quiet, tiny_params):
    """What the towers and projectors give on the batch, each called on its own."""
    model, teacher, _, batch = quiet

    def run(params, teacher, batch):
        call, images = bound(model, params), [batch["image"], batch["image2"]]
        texts = {kind: call("text_tokens", batch[f"{kind}_ids"]) for kind in TEXTS}
        online = [call("visual_tokens", image) for image in images]
        target = [call("visual_tokens", image, encoder=teacher) for image in images]
        masked, groups = texts["masked"], online[0].groups
        return {
            "texts": texts,
            "visual": [*online, *target],
            "joint": [call("project_image", tokens.groups) for tokens in (*online, *target)],
            "sentences": {kind: call("project_text", texts[kind].pooled) for kind in TEXTS},
            "image": call("project_image", jnp.mean(groups, axis=1)),
            "masked": call("complete", masked.tokens, masked.mask, groups),
            "features": [call("trunk", image) for image in images],
        }

    return jax.jit(run)(tiny_params, teacher, batch)


def mean_over(values, weight):
    return np.average(values, weights=weight)


def contrast(a, b, weight, scale=10.0, apart=True):  # the scale of `tiny_params`
    """The mean of Eq. 7; `apart`: pairs that may be negatives of each other."""
    pairs = (weight[:, None] > 0) & (weight[None] > 0) & apart
    return mean_over(reference.info_nce(np.float64(a), np.float64(b), scale, pairs), weight)


def test_every_term_reads_what_the_equations_say(quiet, raw_terms, pieces):
    _, _, config, batch = quiet
    loss, metrics = raw_terms
    weight = batch["weight"]
    sentences = pieces["sentences"]
    contrastive = contrast(pieces["image"], sentences["caption"], weight)
    entity = contrast(pieces["masked"], sentences["prompt"], weight * batch["entity_weight"])
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
    np.testing.assert_allclose(metrics["temperature"], 1 / 10.0, rtol=1e-5)
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
    terms = jax.jit(make_terms(model, config))
    _, metrics = terms(tiny_params, None, {**batch, "caption_set": names})
    weight, sentences = batch["weight"], pieces["sentences"]
    want = contrast(pieces["image"], sentences["caption"], weight, apart=~alike)
    np.testing.assert_allclose(metrics["contrastive"], want, rtol=2e-3)
    named = weight * batch["entity_weight"]
    want = contrast(pieces["masked"], sentences["prompt"], named, apart=~alike)
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
    config.loss.update(entity_weight=0.5, negatives_within_set=True)
    model, batch = build_model(config.model), make_batch(0)
    sets = np.arange(len(batch["weight"]), dtype=np.int32) % 2
    batch = {**batch, "data_set": jnp.asarray(sets)}

    def run(key, batch):
        params = nn.unbox(model.init(key, batch["image"], batch["caption_ids"])["params"])
        params = {**params, "whole_log_scale": params["whole_log_scale"] + 0.3}
        call = bound(model, params)
        whole = call("embed_whole", call("visual_tokens", batch["image"]))
        pooled = call("text_tokens", batch["caption_ids"]).pooled
        sentences, scale = call("embed_whole_text", pooled), call("whole_logit_scale")
        loss, metrics = make_terms(model, config.loss)(params, None, batch)
        return whole, sentences, scale, loss, metrics

    whole, sentences, scale, loss, metrics = jax.jit(run)(jax.random.key(0), batch)
    same_set = sets[:, None] == sets
    want = contrast(whole, sentences, batch["weight"], float(scale), apart=same_set)
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


# ---- nouns

NOUNS = 3


@pytest.fixture(scope="module")
def noun_batch():
    rng = np.random.default_rng(3)
    lengths = rng.integers(2, M + 1, (B, NOUNS, 1))
    ids = rng.integers(1, VOCABULARY, (B, NOUNS, M))
    present = np.arange(NOUNS)[None] < rng.integers(0, NOUNS + 1, (B, 1))
    present[0] = False
    return {
        **make_batch(0, second=False),
        "noun_ids": np.where(np.arange(M) < lengths, ids, 0).astype(np.int32),
        "noun_present": present,
    }


@pytest.fixture(scope="module")
def run_nouns(shared_tiny_config, tiny_model, tiny_params):
    """Loss and metrics of a batch by the weight of the noun term."""

    def call(noun_weight, batch):
        config = shared_tiny_config.copy_and_resolve_references().loss
        config.noun_weight = noun_weight
        terms = jax.jit(make_terms(tiny_model, config))
        return jax.device_get(terms(tiny_params, None, batch))

    return call


def test_the_noun_term_and_its_weight(run_nouns, noun_batch, tiny_model, tiny_params):
    plain, before = run_nouns(0.0, noun_batch)
    loss, metrics = run_nouns(0.5, noun_batch)
    assert "nouns" not in before
    np.testing.assert_allclose(metrics["contrastive"], before["contrastive"], rtol=1e-5)
    np.testing.assert_allclose(loss, plain + 0.5 * metrics["nouns"], rtol=1e-5)
    call = bound(tiny_model, jax.tree.map(jnp.asarray, tiny_params))
    text = call("text_tokens", jnp.asarray(noun_batch["noun_ids"].reshape(-1, M)))
    nouns = call("project_text", text.pooled).reshape(B, NOUNS, -1)
    image = jnp.asarray(noun_batch["image"])
    tokens = call("visual_tokens", image, True, rngs=step_rngs(0, 0))
    image = call("project_image", tokens.groups.mean(1))
    present, weight = noun_batch["noun_present"], noun_batch["weight"]
    shown = (weight > 0)[:, None] & (weight > 0)[None]
    scale = float(np.exp(tiny_params["log_scale"]))
    image, nouns = (np.asarray(x, np.float64) for x in (image, nouns))
    each = reference.multi_label_info_nce(image, nouns, scale, shown, present)
    weight = weight * present.any(1)
    np.testing.assert_allclose(metrics["nouns"], np.average(each, weights=weight), rtol=1e-4)


# ---- groups in place of masks (Table 6)

KEPT = 2  # of 4 groups


def test_consistency_of_groups_from_the_parts(quiet, tiny_params, pieces):
    model, teacher, config, batch = quiet
    config = ConfigDict({**config.to_dict(), "cross_image": "groups", "entity_weight": 0.0})
    joint = [np.asarray(x, np.float64) for x in pieces["joint"]]  # two online, two of the teacher
    entity, weight = pieces["sentences"]["shared"], batch["weight"] * batch["pair_weight"]
    scale = float(np.exp(tiny_params["log_scale"]))

    def chosen(groups):
        order = np.argsort(-np.einsum("bke,be->bk", groups, entity), axis=1)[:, :KEPT]
        return np.take_along_axis(groups, order[..., None], axis=1)

    values = np.zeros(B)
    for own, other in ((joint[0], joint[3]), (joint[1], joint[2])):
        own, other = chosen(own), chosen(other)
        mass = np.exp(scale * np.einsum("ise,jte->isjt", own, other)).sum(-1)
        for i in range(B):
            among = mass[i][:, [j for j in range(B) if j == i or weight[j] * weight[i] > 0]].sum(-1)
            values[i] += 0.5 * np.mean(np.log(among) - np.log(mass[i][:, i]))
    _, metrics = jax.jit(make_terms(model, config, 1.0))(tiny_params, teacher, batch)
    np.testing.assert_allclose(metrics["mask"], np.average(values, weights=weight), rtol=1e-4)
    assert "mask_target_fraction" not in metrics
