"""A run that is killed again and again ends where the run left alone ends, to the bit.

    python tests/kills.py --count=20 [--seed=0] [--directory=DIR]

Every kill is a SIGKILL: some at a random moment of starting, some at random moments after random
steps of both phases, some while a checkpoint is being written.
"""

import argparse
import random
import re
import sys
import tempfile
import time
from pathlib import Path

# The package of this checkout, as in the processes that are killed, whatever is installed.
sys.path.insert(0, str(Path(__file__).parents[1]))

import runs  # noqa: E402

# Saves and steps take turns with a start in between now and then.
KINDS = ("save", "step", "save", "step", "start")
# A save of this model takes about this many seconds.
SAVE_SECONDS = 0.3


def plan(count, seed):
    """`count` kills (kind, step), spread over the steps of the run; the step of a start is 0."""
    draw = random.Random(seed)
    kills = []
    for index in range(count):
        kind = KINDS[index % len(KINDS)]
        low, high = (round(runs.STEPS * part / count) for part in (index, index + 1))
        step = draw.randint(low + 1, max(low + 1, high))
        if kind == "save":
            step = min(runs.STEPS, -(-step // runs.SAVED_EVERY) * runs.SAVED_EVERY)
        kills.append((kind, 0 if kind == "start" else step))
    return kills


def kill_once(workdir, kind, step, draw):
    """Starts or resumes the run and kills it; returns a line on what was hit."""
    had = max(runs.checkpoints_of(workdir), default=0)
    process = runs.begin(workdir)
    latest = Path(workdir) / "checkpoints" / "latest"
    try:
        if kind == "start":
            time.sleep(draw.uniform(0.5, 6.0))
        elif kind == "step":
            # Lines of earlier lives are there until the run has resumed.
            runs.wait_until(lambda: "lambda" in runs.log_of(workdir), process, workdir)
            wanted = max(step, had + 1)
            runs.wait_until(lambda: runs.last_step(workdir) >= wanted, process, workdir)
            time.sleep(draw.uniform(0.0, 0.1))
        else:
            wanted = max(step, runs.SAVED_EVERY * (had // runs.SAVED_EVERY + 1))

            def saving():
                return any(latest.glob(f"{wanted}.*")) or (latest / str(wanted)).exists()

            runs.wait_until(saving, process, workdir)
            time.sleep(draw.uniform(0.0, SAVE_SECONDS))
    finally:
        process.kill()
        process.wait()
    unfinished = sorted(path.name for path in latest.glob("*") if not path.name.isdigit())
    saved, logged = max(runs.checkpoints_of(workdir), default=0), runs.last_step(workdir)
    assert saved >= had, f"the checkpoint of step {had} is gone"
    assert saved >= logged - 2 * runs.SAVED_EVERY, f"step {logged}, but saved {saved}"
    resumed = re.search(r"resuming at step (\d+)", runs.log_of(workdir))
    if resumed:
        assert int(resumed[1]) == had, f"resumed at {resumed[1]}, saved was {had}"
    hit = f"while writing {unfinished[0]}" if unfinished else "between saves"
    return f"{kind:5} killed after step {logged} {hit}; saved: step {saved}"


def run_with_kills(alone, killed, count, seed, say=print):
    """A run in the folder `killed`; its end must be that of the finished one in `alone`."""
    draw = random.Random(seed)
    for number, (kind, step) in enumerate(plan(count, seed), 1):
        say(f"{number:2}. {kill_once(killed, kind, step, draw)}")
    runs.train(killed)
    runs.assert_same_end(alone, killed)
    say(f"{count} kills: the last state, the model and all losses are equal to the bit")


def main():
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, help="kept afterwards; default: a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = args.directory or Path(temporary)
        directory.mkdir(parents=True, exist_ok=args.directory is None)
        runs.train(directory / "alone")
        run_with_kills(directory / "alone", directory / "killed", args.count, args.seed)


if __name__ == "__main__":
    sys.exit(main())
