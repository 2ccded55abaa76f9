"""Train variants of a config over several seeds and print one table of what they reach.

``python -m ovseg_jax.compare --config=configs/quickstart.py
--variants=contrastive,entity,mask,both --seeds=0,1,2 --out=runs/ablation``
"""

import json
import signal
import statistics
import subprocess
import sys
from pathlib import Path

from ovseg_jax import flags
from ovseg_jax.errors import UserError
from ovseg_jax.progress import table

ABOUT = """Train every variant with every seed and print mean and spread of the benchmark's mIoU.

The runs share the feature caches. A run whose result is there already is not repeated. The seed
draws parameters and the order of the data; the data themselves stay the same.
"""

FLAGS = (
    flags.Flag("config", required=True, help="config file, without a variant"),
    flags.Flag("variants", flags.comma_list, default=[""], help="variants of the config"),
    flags.Flag("seeds", flags.comma_list, default=["0"], help="seeds"),
    flags.Flag("benchmark", default="scenes", help="benchmark to compare on"),
    flags.Flag("out", default="runs/compare", help="folder for the runs and the table"),
)


def main(argv: list[str]) -> int:
    """Entry point; returns the exit code, that of a run where a run does not end with 0."""
    args = flags.parse(argv, FLAGS, ABOUT)
    if not all(seed.isdigit() for seed in args.seeds):
        raise UserError(f"--seeds={','.join(args.seeds)}: seeds are whole numbers, e.g. 0,1,2")
    out = Path(args.out)
    common = [f"--benchmark={args.benchmark}"]
    common += [f"--config.{key}={text}" for key, text in args.overrides]
    rows = [("variant", "mean", "lowest", "highest", *(f"seed {seed}" for seed in args.seeds))]
    for variant in args.variants:
        config, name = f"{args.config}:{variant}" if variant else args.config, variant or "default"
        values = []
        for seed in args.seeds:
            workdir = out / f"{name}-seed{seed}"
            result = workdir / "results" / f"{args.benchmark}.json"
            given = [f"--config={config}", f"--workdir={workdir}", f"--config.seed={seed}"]
            if not result.exists() and (code := _train([*given, *common])):
                return code
            values.append(json.loads(result.read_text(encoding="utf-8"))["miou"])
        summary = (statistics.fmean(values), min(values), max(values))
        rows.append((name, *(f"{value:.1f}" for value in (*summary, *values))))
    text = f"mIoU on {args.benchmark}, %\n\n{table(rows)}"
    (out / "table.txt").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}")
    return 0


def _train(arguments: list[str]) -> int:
    """A whole run, in a process of its own, which gives its memory back; returns its exit code."""
    run = subprocess.Popen([sys.executable, "-m", "ovseg_jax.main", *arguments])
    signal.signal(signal.SIGTERM, lambda *_: run.terminate())
    while True:
        try:
            code = run.wait()
            return code if code >= 0 else 128 - code
        except KeyboardInterrupt:
            pass  # the run gets Ctrl-C too, and saves first


if __name__ == "__main__":
    flags.run(main)
