"""How much time and memory `convert released` takes for a checkpoint of ViT-B size.

    PYTHONPATH=. python tests/bench/convert_memory.py [FOLDER]

Writes a random state dict of the full released model (with the moving average of the visual
encoder) to FOLDER, converts it to a model directory and back in processes of their own, and prints
for each the seconds, the peak of resident memory above that of an idle process which has imported
the same modules, and its ratio to the size of the checkpoint. Not run by pytest.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from flax import linen as nn

from ovseg_jax.models.build import build_model, init_variables
from ovseg_jax.models.ovsegmentor import STATISTICS
from ovseg_jax.train.config import load_config
from ovseg_jax.weights import pth
from ovseg_jax.weights.released import to_released

ROOT = Path(__file__).parents[2]


def write_checkpoint(path: Path) -> None:
    """A random checkpoint of the size of the released one."""
    config = load_config(ROOT / "configs" / "vitb_released.py").model
    model = build_model(config)
    shapes = jax.eval_shape(lambda key: init_variables(model, key), jax.random.key(0))
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if leaf.dtype == np.int32:
            return np.asarray(1000, np.int32)
        return rng.random(leaf.shape, np.float32)

    params = jax.tree.map(draw, nn.unbox(shapes["params"]))
    stats = jax.tree.map(draw, shapes[STATISTICS])
    teacher = jax.tree.map(lambda x: x + 1, params["image_encoder"])
    pth.write_checkpoint(path, to_released(params, stats, config, teacher), "pth")


def measured(code: str) -> tuple[float, float, int]:
    """Seconds, seconds of computing, and peak resident bytes of a process that runs `code`."""
    start = time.monotonic()
    program = (
        f"{code}\nimport resource; use = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(use.ru_utime + use.ru_stime, use.ru_maxrss)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    unit = 1 if sys.platform == "darwin" else 1024
    computing, peak = done.stdout.split()[-2:]
    return time.monotonic() - start, float(computing), int(peak) * unit


def main(folder: Path) -> None:
    """Prints the table."""
    checkpoint, directory, back = (folder / name for name in ("a.pth", "model", "b.pth"))
    subprocess.run(
        [sys.executable, __file__, "--write", str(checkpoint)], cwd=ROOT, check=True
    )  # a process of its own: its memory is not ours
    size = checkpoint.stat().st_size
    print(f"checkpoint: {size / 1e6:.0f} MB")
    *_, idle = measured("import ovseg_jax.convert")
    print(f"idle: {idle / 1e6:.0f} MB")
    for name, arguments in {
        "to a model directory": ["released", f"--checkpoint={checkpoint}", f"--out={directory}"],
        "and back": ["released", f"--model={directory}", f"--out={back}"],
    }.items():
        code = f"import ovseg_jax.convert; ovseg_jax.convert.main({arguments!r})"
        seconds, computing, peak = measured(code)
        ratio = (peak - idle) / size
        print(
            f"{name}: {seconds:.1f} s ({computing:.1f} s of computing), peak {peak / 1e6:.0f} MB, "
            f"{ratio:.2f} times the checkpoint above idle"
        )
    same = checkpoint.read_bytes() == back.read_bytes()
    print(f"equal to the bit: {same}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        write_checkpoint(Path(sys.argv[2]))
    elif sys.argv[1:]:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
