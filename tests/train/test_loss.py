"""How losses and model are wired together, against NumPy; the objectives of Table 4."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from ml_collections import ConfigDict
from reference import losses as reference
from reference.batches import VOCABULARY, B, M, make_batch
from reference.steps import make_terms

from ovseg_jax.data.captions import Masking
from ovseg_jax.losses.objective import masked_token_loss
from ovseg_jax.models.build import build_model, init_params
from ovseg_jax.train.apply import merge, unmerge
from ovseg_jax.train.step import step_rngs

TEXTS = ("caption", "masked", "prompt", "shared")
MASK_WEIGHT = 0.1
CLASSES, NOUNS, STEPS = 5, 3, 6


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


# ---- nouns, and the objectives of entities


@pytest.fixture(scope="module")
def noun_batch():
    rng = np.random.default_rng(3)
    whole = make_batch(0, second=False)
    lengths = rng.integers(2, M + 1, (B, NOUNS, 1))
    ids = rng.integers(1, VOCABULARY, (B, NOUNS, M))
    present = np.arange(NOUNS)[None] < rng.integers(0, NOUNS + 1, (B, 1))
    present[0] = False
    hidden = (rng.random((B, M)) < 0.4) & (whole["masked_ids"] > 0)
    hidden[4] = False
    return {
        **whole,
        "noun_ids": np.where(np.arange(M) < lengths, ids, 0).astype(np.int32),
        "noun_present": present,
        "masked_targets": np.where(hidden, rng.integers(0, CLASSES, (B, M)), -1).astype(np.int32),
    }


def test_the_noun_term_and_its_weight(shared_tiny_config, noun_batch, tiny_model, tiny_params):
    config = shared_tiny_config.copy_and_resolve_references().loss
    config.update(noun_weight=0.5, entity_weight=0.25)

    @jax.jit
    def run(params, batch):
        call = bound(tiny_model, params)
        image = call("visual_tokens", batch["image"], True, rngs=step_rngs(0, 0)).groups.mean(1)
        ids = jnp.concatenate([batch["caption_ids"], batch["noun_ids"].reshape(-1, M)])
        texts = call("project_text", call("text_tokens", ids).pooled)
        terms = make_terms(tiny_model, config)(params, None, batch)
        return call("project_image", image), texts[:B], texts[B:].reshape(B, NOUNS, -1), terms

    image, captions, nouns, (loss, metrics) = run(tiny_params, noun_batch)
    present, weight = noun_batch["noun_present"], noun_batch["weight"]
    want = contrast(image, captions, weight)
    np.testing.assert_allclose(metrics["contrastive"], want, rtol=2e-3)
    shown = (weight > 0)[:, None] & (weight > 0)[None]
    image, nouns = (np.asarray(x, np.float64) for x in (image, nouns))
    each = reference.multi_label_info_nce(image, nouns, 10.0, shown, present)
    weight = weight * present.any(1)
    np.testing.assert_allclose(metrics["nouns"], np.average(each, weights=weight), rtol=1e-4)
    summed = metrics["contrastive"] + 0.25 * metrics["entity"] + 0.5 * metrics["nouns"]
    np.testing.assert_allclose(loss, summed, rtol=1e-5)


@pytest.fixture(scope="module")
def make(shared_tiny_config):
    """masking -> (model, fresh parameters, (params, batch) -> loss, metrics)."""

    def build(masking):
        config = shared_tiny_config.copy_and_resolve_references().unlock()
        config.loss.masking = masking.value
        if masking.classifies:
            source = "decoder" if masking is Masking.MLM_GROUPS else "text"
            config.model.update(token_classes=CLASSES, token_classes_from=source)
        model = build_model(config.model)
        params = jax.jit(lambda key: nn.unbox(init_params(model, key)))(jax.random.key(0))
        terms = make_terms(model, config.loss)
        return model, params, lambda params, batch: terms(params, None, batch)

    return build


COMPLETED = [masking for masking in Masking if masking.completes]


def test_objectives_that_complete_are_one_program(make, noun_batch):
    """They differ in the texts that the loader gives."""
    built = [make(masking) for masking in COMPLETED]
    programs = [str(jax.make_jaxpr(terms)(params, noun_batch)) for _, params, terms in built]
    assert len({re.sub("0x[0-9a-f]+", "", program) for program in programs}) == 1


@pytest.mark.parametrize("masking", [x for x in Masking if x not in COMPLETED[1:]])
def test_each_objective_trains(masking, make, noun_batch):
    """A few steps on one batch bring the entity term down, and move what it is computed with."""
    _, params, terms = make(masking)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))

    @jax.jit
    def step(params, opt_state, batch):
        (_, metrics), grads = jax.value_and_grad(terms, has_aux=True)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        norms = {name: optax.tree.norm(part) for name, part in grads.items()}
        return optax.apply_updates(params, updates), opt_state, metrics, norms

    needed = {"weight", "entity_weight", "entity_set", "image", "caption_ids"}
    needed |= {"masked_ids"} if masking is not Masking.MULTI_LABEL else {"noun_ids", "noun_present"}
    needed |= {"prompt_ids"} if masking.completes else set()
    needed |= {"masked_targets"} if masking.classifies else set()
    # With what it needs alone: that nothing else is read shows in that it is not there.
    given = {name: noun_batch[name] for name in needed}
    opt_state, history = tx.init(params), []
    for _ in range(STEPS):
        params, opt_state, metrics, norms = step(params, opt_state, given)
        history.append(float(metrics["entity"]))
    assert np.isfinite(history).all() and history[-1] < 0.97 * history[0], history
    assert ("token_accuracy" in metrics) == masking.classifies
    assert ("entity_false_negatives" in metrics) == masking.completes
    assert (norms["entity_decoder"] > 0) == masking.needs_decoder
    assert (norms["completion_projector"] > 0) == masking.completes
    if masking.classifies:
        assert norms["token_head"] > 0


@pytest.mark.parametrize("masking", [Masking.MLM, Masking.MLM_GROUPS])
def test_masked_tokens_are_classified_with_or_without_groups(masking, make, noun_batch):
    batch = noun_batch
    model, params, terms = make(masking)

    @jax.jit
    def logits(params, batch):
        def call(method, *args, **kwargs):
            return model.apply({"params": params}, *args, method=method, **kwargs)

        text = call("text_tokens", batch["masked_ids"])
        groups = call("visual_tokens", batch["image"], True, rngs=step_rngs(0, 0)).groups
        return call("classify_tokens", text.tokens, text.mask, groups)

    found = logits(params, batch)
    values = np.asarray(masked_token_loss(found, jnp.asarray(batch["masked_targets"])), np.float64)
    hidden = batch["masked_targets"] >= 0
    weight = batch["weight"] * hidden.any(1)
    _, metrics = jax.jit(terms)(params, batch)
    np.testing.assert_allclose(metrics["entity"], np.average(values, weights=weight), rtol=1e-4)
    counted = hidden & (weight > 0)[:, None]
    right = (np.asarray(found).argmax(-1) == batch["masked_targets"])[counted]
    np.testing.assert_allclose(metrics["token_accuracy"], right.mean(), rtol=1e-5)
    other = {**batch, "image": 255 - batch["image"]}
    same = np.allclose(np.asarray(logits(params, other)), np.asarray(found), atol=1e-6)
    assert same == (masking is Masking.MLM)


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
