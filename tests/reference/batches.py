"""Batches for the tiny model, and a look into a train state."""

import jax
import numpy as np

from ovseg_jax.optim.ema_teacher import EmaTeacherState, is_teacher

B, M, VOCABULARY = 16, 8, 48


def make_batch(seed, second=True):
    """A batch with sentences of different lengths, and rows without image, entity or partner."""
    rng = np.random.default_rng(seed)
    batch = {
        "image": rng.integers(0, 256, (B, 32, 32, 3), np.uint8),
        "weight": np.where(np.arange(B) == 3, 0, 1).astype(np.float32),
        "entity_weight": np.where(np.arange(B) == 5, 0, 1).astype(np.float32),
        "entity_set": rng.integers(0, 6, B, np.int32),
    }
    if second:
        batch["image2"] = rng.integers(0, 256, (B, 32, 32, 3), np.uint8)
        batch["pair_weight"] = np.where(np.arange(B) == 7, 0, 1).astype(np.float32)
    for kind in ("caption", "masked", "prompt") + (("shared",) if second else ()):
        ids = rng.integers(1, VOCABULARY, (B, M), np.int32)
        lengths = rng.integers(2, M + 1, (B, 1))
        batch[f"{kind}_ids"] = np.where(np.arange(M)[None] < lengths, ids, 0).astype(np.int32)
    return batch


def adam_of(state):
    """The Adam part of a train state's optimizer state."""
    (adam,) = [part for part in state.opt_state if hasattr(part, "mu")]
    return adam


def replace_teacher(opt_state, params):
    """The optimizer state with the teacher's parameters replaced."""
    return jax.tree.map(
        lambda x: EmaTeacherState(params) if is_teacher(x) else x, opt_state, is_leaf=is_teacher
    )
