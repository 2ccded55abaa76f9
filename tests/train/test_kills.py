"""SIGKILL at random moments costs nothing but time."""

import re

import kills
import pytest
import runs


@pytest.mark.slow
def test_three_kills_end_like_the_run_left_alone(alone, tmp_path):
    said = []
    kills.run_with_kills(alone.workdir, tmp_path / "killed", count=3, seed=1, say=said.append)
    assert len(said) == 4 and "equal to the bit" in said[-1]
    # Both phases were hit.
    steps = [int(re.search(r"killed after step (\d+)", line)[1]) for line in said[:3]]
    assert min(steps) < runs.STEPS / 2 <= max(steps)


def test_twenty_kills_are_spread_over_the_run():
    plan = kills.plan(20, seed=0)
    assert {kind for kind, _ in plan} == {"save", "step", "start"}
    saves = [step for kind, step in plan if kind == "save"]
    assert all(step % runs.SAVED_EVERY == 0 for step in saves)
    for kind in ("save", "step"):
        steps = [step for name, step in plan if name == kind]
        assert len(steps) == 8
        assert min(steps) <= 10 and max(steps) > 30 and steps == sorted(steps)
