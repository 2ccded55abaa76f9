"""Matching on the host against its twins on the device, within one compiled program each.

    PYTHONPATH=. python tests/bench/matching.py [PROBLEMS]

PROBLEMS (default 256: a batch of 128 pairs, both directions) of 4 x 4 groups, as a stage-2 step of
ViT-B has on one device. The three take turns; printed are the median time of each and its ratio to
the host's, and whether all found matchings of the same cost. Not run by pytest.
"""

import sys
import time
from statistics import median

import jax
import numpy as np

from ovseg_jax.losses.matching import BACKENDS, match

GROUPS, TURNS = 4, 30


def main(problems: int) -> None:
    """Prints the comparison."""
    cost = -np.random.default_rng(0).random((problems, GROUPS, GROUPS)).astype(np.float32)
    placed = jax.device_put(cost)
    compiled = {name: jax.jit(lambda c, name=name: match(c, name)) for name in BACKENDS}
    found = {name: np.asarray(run(placed)) for name, run in compiled.items()}
    totals = {
        name: np.take_along_axis(cost, columns[..., None], axis=2).sum()
        for name, columns in found.items()
    }
    spent: dict[str, list[float]] = {name: [] for name in BACKENDS}
    for _ in range(TURNS):
        for name, run in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(run(placed))
            spent[name].append(time.perf_counter() - start)
    host = median(spent["host"])
    print(f"{problems} problems of {GROUPS} x {GROUPS} on {jax.devices()[0].device_kind}")
    for name in BACKENDS:
        middle = median(spent[name])
        print(f"{name:10} {1e3 * middle:8.2f} ms  {middle / host:6.2f} x the host's time")
    same = max(totals.values()) - min(totals.values()) < 1e-3
    print(f"all of the same total cost: {'yes' if same else 'NO'} ({totals['host']:.3f})")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 256)
