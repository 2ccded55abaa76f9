"""Writes an evaluation set for TFDS: ``python -m ovseg_jax.data.benchmarks --benchmark=voc``."""

from ovseg_jax import flags
from ovseg_jax.data.benchmarks import OPENERS
from ovseg_jax.data.benchmarks.builders import build

ABOUT = """Write the validation images and labels of an official folder as a TFDS data set.

python -m ovseg_jax.data.benchmarks --benchmark=voc --dir=VOCdevkit --out=tensorflow_datasets

Evaluation reads official folders as they are, so this is for keeping one copy of few large files,
or for other programs.
"""
FLAGS = (
    flags.Flag("benchmark", choices=tuple(OPENERS), required=True, help="which evaluation set"),
    flags.Flag("dir", required=True, help="its official folder"),
    flags.Flag("out", required=True, help="where TFDS keeps its data sets"),
)


def main(argv: list[str]) -> int:
    """Entry point; returns the exit code."""
    args = flags.parse(argv, FLAGS, ABOUT)
    print(build(args.benchmark, args.dir, args.out))
    return 0


if __name__ == "__main__":
    flags.run(main)
