"""The tiny models of golden/*.npz: their files' names and arrays, and our config for each."""

from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from safetensors.numpy import save_file

from ovseg_jax.models.build import build_model, variable_shapes

GOLDEN = Path(__file__).with_name("golden")

TEXT = {"vocab_size": 40, "width": 24, "depth": 2, "heads": 3, "mlp_width": 40, "eps": 1e-3}
TEXT |= {"max_positions": 16}
IMAGE = {"patch": 8, "grid": (4, 4), "trunk_width": 24, "trunk_heads": 3, "mlp_ratio": 2.0}
IMAGE |= {"eps": 1e-3, "group_layer": 2, "class_token": True, "trunk_norm": True}
IMAGE_FIELDS = {
    "vit": {},
    "dinov2": {"layer_scale": 1.0},
    "dinov2_registers": {
        "layer_scale": 1.0,
        "register_tokens": 3,
        "position_resize": "bicubic_antialias",
    },
    "dinov3": {"layer_scale": 1.0, "register_tokens": 2, "position": "rope"},
}


def read(name: str) -> dict[str, np.ndarray]:
    """The arrays of a file, see `make_transformers_golden`."""
    return dict(np.load(GOLDEN / f"{name}.npz"))


def published(name: str) -> dict[str, np.ndarray]:
    """The weights of a golden model under the names that Hugging Face's files have."""
    arrays = read(name)
    return {tensor: arrays[f"file|{tensor}"] for tensor in arrays["file_names"].tolist()}


def save(folder: Path, tensors: dict[str, np.ndarray], prefix: str = "") -> str:
    """Writes model.safetensors into a folder and returns its path."""
    path = folder / "model.safetensors"
    save_file({prefix + name: np.ascontiguousarray(x) for name, x in tensors.items()}, path)
    return str(path)


def build(config, name: str, **changes):
    """Our model for a golden one, and its parameters' shapes; `changes` go over its fields."""
    if name == "bert":
        config.model.text.update({**TEXT, **changes})
    else:
        config.model.image.update({**IMAGE, **IMAGE_FIELDS[name], **changes})
    model = build_model(config.model)
    return model, variable_shapes(model)


def same(ours: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> bool:
    """Whether two sets of arrays are equal to the bit, and not empty."""
    return (
        bool(ours)
        and ours.keys() == wanted.keys()
        and all(np.array_equal(ours[name], value) for name, value in wanted.items())
    )


def variables(shapes, values: dict[str, np.ndarray]) -> dict:
    """Parameters with `values` where there are any, and zeros elsewhere."""
    zeros = {path: np.zeros(shape, np.float32) for path, shape in shapes.items()}
    return {"params": unflatten_dict(zeros | values, sep="/")}


def hidden_states(model, params, arrays: dict[str, np.ndarray]) -> list[tuple]:
    """(ours, theirs) for each input: all text tokens, or all patches."""
    if "mask.0" in arrays:
        run = jax.jit(
            lambda p, ids, mask: model.apply(p, ids, mask, method=lambda m, *x: m.text_encoder(*x))
        )
        return [(np.asarray(run(params, arrays["input.0"], arrays["mask.0"])), arrays["output.0"])]
    run = jax.jit(
        lambda p, x: model.apply(p, x, method=lambda m, x: m.image_encoder.trunk(x, False))
    )
    pairs = []
    for index in range(sum(name.startswith("input.") for name in arrays)):
        pixels, theirs = arrays[f"input.{index}"], arrays[f"output.{index}"]
        ours = np.asarray(run(params, pixels.transpose(0, 2, 3, 1)))
        pairs.append((ours, theirs[:, -ours.shape[1] :]))
    return pairs


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """|ours - theirs| / |theirs|."""
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
