"""The six objectives of the paper's Table 4: each trains, each reads what it should."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from reference.batches import VOCABULARY, B, M, make_batch
from reference.steps import make_terms

from ovseg_jax.data.captions import Masking
from ovseg_jax.losses.objective import masked_token_loss
from ovseg_jax.models.build import build_model, init_params
from ovseg_jax.train.step import step_rngs

CLASSES, NOUNS, STEPS = 5, 2, 6


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(1)
    whole = make_batch(0, second=False)
    targets = rng.integers(0, CLASSES, (B, M))
    hidden = (rng.random((B, M)) < 0.4) & (whole["masked_ids"] > 0)
    hidden[4] = False
    return {
        **whole,
        "masked_targets": np.where(hidden, targets, -1).astype(np.int32),
        "noun_ids": rng.integers(1, VOCABULARY, (B, NOUNS, M), np.int32),
        "noun_present": rng.random((B, NOUNS)) < 0.7,
    }


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


@pytest.mark.parametrize("masking", list(Masking))
def test_each_objective_trains(masking, make, batch):
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
    given = {name: batch[name] for name in needed}
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
def test_masked_tokens_are_classified_with_or_without_groups(masking, make, batch):
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
