"""Every config builds its model, its optimizer and one train step a phase, at full size, traced."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ovseg_jax import sharding
from ovseg_jax.data.sources import SOURCES
from ovseg_jax.flags import load_config
from ovseg_jax.models.build import build_model
from ovseg_jax.optim import groups
from ovseg_jax.optim.optimizer import make_optimizer
from ovseg_jax.segmentation.benchmarks import FOLDER_FIELDS
from ovseg_jax.segmentation.protocol import Protocol
from ovseg_jax.train.compile_ahead import batch_shapes
from ovseg_jax.train.phases import make_phases, rate_at
from ovseg_jax.train.state import new_state
from ovseg_jax.train.step import train_step
from ovseg_jax.weights.initialize import init_params, init_statistics

CONFIGS = Path(__file__).parents[1] / "configs"
VARIANTS = {
    "groupvit.py": ("", "own_text", "smoke"),
    "photos.py": ("",),
    "quickstart.py": ("", "scratch", "contrastive", "entity", "mask", "both"),
    "vitb.py": ("", "smoke"),
    "vitb_cc12m.py": ("", "smoke"),
    "vitb_released.py": ("", "smoke"),
    "vits.py": ("", "smoke"),
}

# Parameters of the whole model, in units: a golden table that a change of architecture must edit.
PARAMETERS = {
    "groupvit.py": 144_569_617,
    "groupvit.py:own_text": 55_726_609,
    "photos.py": 48_144_706,
    "quickstart.py": 45_721_153,
    "quickstart.py:scratch": 10_493_761,
    "vitb.py": 207_694_081,
    "vitb_cc12m.py": 207_694_081,
    "vitb_released.py": 235_745_673,
    "vits.py": 134_208_385,
}


def test_every_config_is_listed():
    assert {path.name for path in CONFIGS.glob("*.py")} == set(VARIANTS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    config = load_config(f"{CONFIGS}/{name}")
    model = build_model(config.model)
    shapes = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    assert sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes)) == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_decay_leaves_word_vectors_that_no_caption_uses(name):
    config = load_config(f"{CONFIGS}/{name}")
    model = build_model(config.model)
    shapes = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    flat = groups.flatten(nn.unbox(shapes))
    # Under the real names two rows each, of which the second gets no gradient.
    params = groups.nest({path: jnp.ones((2, 1), jnp.float32) for path in flat})
    gradient = jax.tree.map(lambda x: x.at[1].set(0.0), params)
    phases = [
        phase
        for phase in make_phases(config, records=4_300_000)
        if "text_encoder" in groups.split(params, phase.frozen)[0]
    ]
    assert bool(phases) == (name not in ("quickstart.py", "photos.py"))  # whose text is frozen
    for phase in phases:
        trained, held = groups.split(params, phase.frozen)
        tx = make_optimizer(config.optimizer, trained, held)
        state = tx.init(trained)
        for _ in range(2):
            gradients, _ = groups.split(gradient, phase.frozen)
            updates, state = tx.update(gradients, state, trained, rate=jnp.float32(0.1))
            trained = jax.tree.map(jnp.add, trained, updates)
        words = trained["text_encoder"]["word"]
        assert words[0, 0] < 1.0 and words[1, 0] == 1.0
        assert trained["text_projector"]["out"]["kernel"][1, 0] < 1.0


@pytest.mark.parametrize(
    "name", [f"{name}:{variant}" for name, variants in VARIANTS.items() for variant in variants]
)
def test_every_phase_traces(name):
    config = load_config(f"{CONFIGS}/{name}".removesuffix(":"))
    model = build_model(config.model)
    assert config.data.source in SOURCES
    for benchmark, fields in FOLDER_FIELDS.items():
        assert config.eval[benchmark].to_dict() == fields
    Protocol.from_config(config.eval.protocol)
    mesh = sharding.make_mesh()
    params = nn.unbox(jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0)))
    seen = set()
    for phase in make_phases(config, records=4_300_000):
        kind = (phase.mask_weight > 0, phase.frozen, phase.erase is None)
        if kind in seen:
            continue
        seen.add(kind)
        tx = make_optimizer(config.optimizer, *groups.split(params, phase.frozen))
        state = jax.eval_shape(
            lambda p, tx=tx, phase=phase: new_state(p, tx, phase.frozen, init_statistics(model)),
            params,
        )
        new, metrics = jax.eval_shape(
            lambda s, b, tx=tx, phase=phase: train_step(
                s,
                b,
                model=model,
                tx=tx,
                rate=lambda step: rate_at(step, config, phase, phase.last),
                config=config,
                mask_weight=phase.mask_weight,
                frozen=phase.frozen,
                mesh=mesh,
                erase=phase.erase,
            ),
            state,
            batch_shapes(config, phase, 16, 24),
        )
        assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(
            lambda x: (x.shape, x.dtype), state
        )
        assert metrics["loss"].shape == ()
        assert ("mask" in metrics) == (phase.mask_weight > 0)
        assert ("nouns" in metrics) == (config.loss.noun_weight > 0)
        assert ("entity" in metrics) == (config.loss.entity_weight > 0)
