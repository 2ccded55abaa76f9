"""Consistency of groups in place of masks (Table 6), in the objective: its value, and training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference.batches import B, make_batch

from ovseg_jax.models.build import build_model
from ovseg_jax.train.step import step_rngs
from ovseg_jax.train.terms import loss_terms

KEPT = 2  # of 4 groups


@pytest.fixture(scope="module")
def setting(shared_tiny_config, tiny_params):
    """Model, teacher, (params, teacher, batch) -> loss and metrics; nothing drawn at random."""
    config = shared_tiny_config.copy_and_resolve_references().unlock()
    config.model.image.assignment = "soft"
    config.loss.update(cross_image="groups", entity_weight=0.0)
    model = build_model(config.model)
    rng = np.random.default_rng(5)
    teacher = jax.tree.map(
        lambda x: (x + 0.1 * rng.normal(size=x.shape)).astype(np.float32),
        tiny_params["image_encoder"],
    )

    def terms(params, teacher, batch):
        loss, (metrics, _) = loss_terms(
            model,
            params,
            teacher,
            batch,
            config.loss,
            mask_weight=1.0,
            text_dropout=False,
            rngs=step_rngs(0, 0),
            mesh=None,
        )
        return loss, metrics

    return model, teacher, terms


def test_the_value_from_the_parts(setting, tiny_params):
    model, teacher, terms = setting
    batch = make_batch(0)

    @jax.jit
    def parts(params, teacher, batch):
        def call(method, *args, encoder=params["image_encoder"]):
            return model.apply(
                {"params": {**params, "image_encoder": encoder}}, *args, method=method
            )

        def joint(name, **options):
            return call("project_image", call("visual_tokens", batch[name], **options).groups)

        text = call("text_tokens", batch["shared_ids"]).pooled
        names = ("image", "image2")
        online = [joint(name) for name in names]
        return online, [joint(n, encoder=teacher) for n in names], call("project_text", text)

    online, target, entity = jax.device_get(parts(tiny_params, teacher, batch))
    weight = batch["weight"] * batch["pair_weight"]
    scale = float(np.exp(tiny_params["log_scale"]))

    def chosen(groups):
        order = np.argsort(-np.einsum("bke,be->bk", groups, entity), axis=1)[:, :KEPT]
        return np.take_along_axis(groups, order[..., None], axis=1).astype(np.float64)

    values = np.zeros(B)
    for own, other in ((online[0], target[1]), (online[1], target[0])):
        own, other = chosen(own), chosen(other)
        mass = np.exp(scale * np.einsum("ise,jte->isjt", own, other)).sum(-1)
        for i in range(B):
            among = mass[i][:, [j for j in range(B) if j == i or weight[j] * weight[i] > 0]].sum(-1)
            values[i] += 0.5 * np.mean(np.log(among) - np.log(mass[i][:, i]))
    _, metrics = jax.jit(terms)(tiny_params, teacher, batch)
    np.testing.assert_allclose(metrics["mask"], np.average(values, weights=weight), rtol=1e-4)
    assert "mask_target_fraction" not in metrics


def test_it_trains(setting, tiny_params):
    _, teacher, terms = setting
    batch = {name: jnp.asarray(value) for name, value in make_batch(0).items()}
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.05))

    @jax.jit
    def step(params, opt_state):
        grads, metrics = jax.grad(terms, has_aux=True)(params, teacher, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, metrics["mask"]

    params, opt_state, history = tiny_params, tx.init(tiny_params), []
    for _ in range(6):
        params, opt_state, value = step(params, opt_state)
        history.append(float(value))
    assert np.isfinite(history).all() and history[-1] < 0.97 * history[0], history
