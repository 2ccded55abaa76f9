"""Train variants of a config over several seeds and print one table of what they reach.

``python -m ovseg_jax.compare --config=configs/quickstart.py
--variants=contrastive,entity,mask,both --seeds=0,1,2 --out=runs/ablation``
"""

import json
import statistics
from pathlib import Path

from ovseg_jax import flags
from ovseg_jax import main as main_program
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
    """Entry point; returns the exit code."""
    args = flags.parse(argv, FLAGS, ABOUT)
    if not all(seed.isdigit() for seed in args.seeds):
        raise UserError(f"--seeds={','.join(args.seeds)}: seeds are whole numbers, e.g. 0,1,2")
    out = Path(args.out)
    overrides = [f"--config.{key}={text}" for key, text in args.overrides]
    scores: dict[str, list[float]] = {}
    for variant in args.variants:
        for seed in args.seeds:
            workdir = out / f"{variant or 'default'}-seed{seed}"
            result = workdir / "results" / f"{args.benchmark}.json"
            if not result.exists():
                code = main_program.main(
                    [
                        f"--config={args.config}:{variant}"
                        if variant
                        else f"--config={args.config}",
                        f"--workdir={workdir}",
                        f"--benchmark={args.benchmark}",
                        f"--config.seed={seed}",
                        *overrides,
                    ]
                )
                if code:
                    return code
            found = json.loads(result.read_text(encoding="utf-8"))["miou"]
            scores.setdefault(variant or "default", []).append(found)
    text = _table(scores, args.benchmark, args.seeds)
    (out / "table.txt").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}")
    return 0


def _table(scores: dict[str, list[float]], benchmark: str, seeds: list[str]) -> str:
    rows = [("variant", "mean", "lowest", "highest", *(f"seed {seed}" for seed in seeds))]
    for name, values in scores.items():
        summary = (statistics.fmean(values), min(values), max(values))
        rows.append((name, *(f"{value:.1f}" for value in (*summary, *values))))
    return f"mIoU on {benchmark}, %\n\n{table(rows)}"


if __name__ == "__main__":
    flags.run(main)
