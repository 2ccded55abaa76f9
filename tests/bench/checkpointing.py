"""What saving every 100 steps costs the quickstart, in percent of its time.

    python tests/bench/checkpointing.py [ROUNDS]

Blocks of steps without and with a save at their beginning take turns; a block with a save ends when
the checkpoint is on disk, so that all of what saving takes is counted. The steps are the
quickstart's own, on features of fewer scenes.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax

from ovseg_jax import sharding
from ovseg_jax.platforms import enable_compilation_cache
from ovseg_jax.progress import Progress
from ovseg_jax.train.checkpoint import Checkpoints
from ovseg_jax.train.config import load_config
from ovseg_jax.train.resume import position_of, start
from ovseg_jax.train.run import make_run

BLOCK = 20  # steps; enough for a save to be written in the background
EVERY = 100
SCENES = 960


def main():
    """Measures and prints."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 8
    enable_compilation_cache()
    config = load_config("configs/quickstart.py")
    config.data.scenes.count = SCENES
    run = make_run(config, Progress())
    params = run.initial_params(announce=False)
    run.fill_caches(params)
    with tempfile.TemporaryDirectory() as directory:
        measure(run, params, Checkpoints(Path(directory)), rounds)


def measure(run, params, checkpoints, rounds):
    """Takes `rounds` pairs of blocks after one that is not counted."""
    state, _ = start(run, checkpoints, params, print)
    phase = run.phases[0]
    compiled = run.compiled_step(phase)
    batches = iter(run.loader(phase, 0))

    def block(state, save):
        began = time.monotonic()
        if save:
            step = int(state.step)
            checkpoints.save(state, position_of(run, phase, step))
        for _ in range(BLOCK):
            state, metrics = compiled(state, sharding.put_batch(next(batches), run.mesh))
            jax.block_until_ready(metrics)
        if save:
            checkpoints.wait()
        return state, time.monotonic() - began

    state, _ = block(state, save=True)
    plain, saving = [], []
    for _ in range(rounds):
        state, seconds = block(state, save=False)
        plain.append(seconds)
        state, seconds = block(state, save=True)
        saving.append(seconds)
    checkpoints.close()
    step = statistics.median(plain) / BLOCK
    save = statistics.median(b - a for a, b in zip(plain, saving, strict=True))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e6
    print(
        f"step {step * 1e3:.0f} ms, save of {size:.0f} MB {save * 1e3:.0f} ms more, "
        f"median of {rounds} pairs of {BLOCK} steps\n"
        f"a save every {EVERY} steps: {100 * save / (EVERY * step):+.2f} %"
    )


if __name__ == "__main__":
    main()
