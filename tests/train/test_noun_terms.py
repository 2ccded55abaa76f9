"""The noun term in the objective, against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import losses as reference
from reference.batches import VOCABULARY, B, M, make_batch

from ovseg_jax.errors import UserError
from ovseg_jax.train.noun_terms import check_noun_config
from ovseg_jax.train.step import step_rngs
from ovseg_jax.train.terms import loss_terms

NOUNS = 3


@pytest.fixture(scope="module")
def batch():
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
def run(shared_tiny_config, tiny_model, tiny_params):
    def call(noun_weight, batch):
        config = shared_tiny_config.copy_and_resolve_references().loss
        config.noun_weight = noun_weight

        def terms(params, batch):
            return loss_terms(
                tiny_model,
                params,
                None,
                batch,
                config,
                mask_weight=0.0,
                text_dropout=False,
                rngs=step_rngs(0, 0),
                mesh=None,
            )

        loss, (metrics, _) = jax.device_get(jax.jit(terms)(tiny_params, batch))
        return loss, metrics

    return call


def embeddings(model, params, batch):
    variables = {"params": jax.tree.map(jnp.asarray, params)}
    images = jnp.asarray(batch["image"])
    rngs = step_rngs(0, 0)
    ids = jnp.asarray(batch["noun_ids"].reshape(-1, M))
    text = model.apply(variables, ids, method="text_tokens")
    nouns = model.apply(variables, text.pooled, method="project_text").reshape(B, NOUNS, -1)
    tokens = model.apply(variables, images, True, method="visual_tokens", rngs=rngs)
    image = model.apply(variables, tokens.groups.mean(1), method="project_image")
    return (np.asarray(x, np.float64) for x in (image, nouns))


def test_the_term_and_its_weight(run, batch, tiny_model, tiny_params):
    plain, before = run(0.0, batch)
    loss, metrics = run(0.5, batch)
    assert "nouns" not in before
    np.testing.assert_allclose(metrics["contrastive"], before["contrastive"], rtol=1e-5)
    np.testing.assert_allclose(loss, plain + 0.5 * metrics["nouns"], rtol=1e-5)
    image, nouns = embeddings(tiny_model, tiny_params, batch)
    present, weight = batch["noun_present"], batch["weight"]
    shown = (weight > 0)[:, None] & (weight > 0)[None]
    scale = float(np.exp(tiny_params["log_scale"]))
    each = reference.multi_label_info_nce(image, nouns, scale, shown, present)
    weight = weight * present.any(1)
    np.testing.assert_allclose(metrics["nouns"], np.average(each, weights=weight), rtol=1e-4)


def test_absent_nouns_change_nothing(run, batch):
    other = np.where(batch["noun_present"][..., None], batch["noun_ids"], 7).astype(np.int32)
    first, second = run(0.5, batch)[1], run(0.5, {**batch, "noun_ids": other})[1]
    np.testing.assert_allclose(first["nouns"], second["nouns"], rtol=1e-6)


def test_configs_that_do_not_fit(tiny_config):
    with tiny_config.unlocked():
        tiny_config.data = {"nouns": 0, "cache_texts": False}
        tiny_config.loss.noun_weight = 1.0
    with pytest.raises(UserError, match="config.data.nouns"):
        check_noun_config(tiny_config)
    tiny_config.data.update(nouns=3, cache_texts=True)
    with pytest.raises(UserError, match="cache_texts"):
        check_noun_config(tiny_config)
    tiny_config.data.cache_texts = False
    check_noun_config(tiny_config)
