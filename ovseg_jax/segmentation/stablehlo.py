"""A model as StableHLO: two programs that run where this package is not installed.

``image.stablehlo`` and ``text.stablehlo``, their weights, signature and README. They are compiled
where they are called, for cpu, cuda or tpu, with any batch size.
"""

import contextlib
import io
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ovseg_jax.errors import UserError
from ovseg_jax.files import replace_files
from ovseg_jax.models.layers import every_platform
from ovseg_jax.models.ovsegmentor import STATISTICS
from ovseg_jax.segmentation.protocol import Protocol
from ovseg_jax.segmentation.scores import embed_prompts, encode_images
from ovseg_jax.shapes import Array
from ovseg_jax.weights.model_dir import SavedModel

PLATFORMS = ("cpu", "cuda", "tpu")

# The parts of the model that each program needs; every method of the model reads the temperatures.
_TEMPERATURES = ("log_scale", "whole_log_scale")
PARTS = {
    "image": ("image_encoder/", "image_projector/", "whole_head/", *_TEMPERATURES),
    "text": ("text_encoder/", "text_projector/", "whole_text_head/", *_TEMPERATURES),
}


def check_can_be_written() -> None:
    """Raises UserError where the package is missing that jax.export writes files with."""
    try:
        import flatbuffers  # noqa: F401
    except ImportError:
        text = "writing StableHLO needs the package flatbuffers: pip install 'ovseg_jax[export]'"
        raise UserError(text) from None


def write_programs(
    saved: SavedModel, protocol: Protocol, directory: Path, image_size: int
) -> dict[str, Any]:
    """Writes the programs for square images of `image_size` pixels, with the class embedding (and
    keys) of the protocol, or nothing (UserError); returns the signature."""
    check_can_be_written()
    arrays = flatten_dict({**saved.params, STATISTICS: saved.batch_stats}, sep="/")
    patch = saved.model.image_encoder.patch
    if image_size < patch:
        raise UserError(f"--image_size={image_size} is less than one patch of {patch} pixels")
    length, pad = saved.info["text_length"], saved.model.pad_id
    keys, image_head = protocol.border_scale > 0, saved.model.image_head > 0

    def image(weights: Mapping[str, Array], images: Array) -> tuple[Array, ...]:
        return encode_images(saved.model, _variables(weights), images, protocol)

    def text(weights: Mapping[str, Array], ids: Array) -> Array | tuple[Array, ...]:
        embedded = embed_prompts(saved.model, _variables(weights), ids, protocol.average)
        return embedded if len(embedded) > 1 else embedded[0]

    of_image = ("assignment", "groups", "embedding", *["keys"] * keys)
    of_text = ("embedding", *["image_embedding"] * image_head)
    # name -> function, what it is called with, its shape and type, names of its results
    programs = {
        "image": (image, "images", (image_size, image_size, 3), jnp.uint8, of_image),
        "text": (text, "ids", (length,), jnp.int32, of_text),
    }
    signature: dict[str, Any] = {"platforms": PLATFORMS, "protocol": protocol.as_dict()}
    files: dict[str, bytes | str] = {}
    needed: dict[str, np.ndarray] = {}
    for name, (function, argument, shape, dtype, results) in programs.items():
        own = [x for x in arrays if x.removeprefix(f"{STATISTICS}/").startswith(PARTS[name])]
        used = {key: arrays[key] for key in own}
        sizes = jax.export.symbolic_shape(", ".join(["batch", *map(str, shape)]))
        given = {key: jax.ShapeDtypeStruct(x.shape, x.dtype) for key, x in used.items()}
        with every_platform():
            exporter = jax.export.export(jax.jit(function), platforms=PLATFORMS)
            exported = exporter(given, jax.ShapeDtypeStruct(sizes, dtype))
        files[f"{name}.stablehlo"] = bytes(exported.serialize())
        needed |= used
        signature[name] = {
            "program": f"{name}.stablehlo",
            "arguments": ["weights", argument],
            "input": {"shape": ["batch", *shape], "dtype": np.dtype(dtype).name},
            "weights": sorted(used),
            "results": [
                {"name": label, "shape": [str(size) for size in out.shape], "dtype": out.dtype.name}
                for label, out in zip(results, exported.out_avals, strict=True)
            ],
        }
    signature["text"] |= {"pad_id": pad, "average": protocol.average}
    stream = io.BytesIO()
    np.savez(stream, **dict(sorted(needed.items())))
    files["weights.npz"] = stream.getvalue()
    files["signature.json"] = json.dumps(signature, indent=2) + "\n"
    more = {"keys": ", keys" * keys, "image_classes": ", image_classes" * image_head}
    template = resources.files("ovseg_jax.segmentation") / "stablehlo_readme.txt"
    text = template.read_text(encoding="utf-8")
    files["README.md"] = text.format(size=image_size, length=length, pad=pad, **more)
    try:
        replace_files({directory / file: content for file, content in files.items()})
    except UserError:
        with contextlib.suppress(OSError):
            directory.rmdir()  # where nothing else is in it
        raise
    return signature


def _variables(weights: Mapping[str, Array]) -> dict[str, Any]:
    tree = unflatten_dict(dict(weights), sep="/")
    return {STATISTICS: tree.pop(STATISTICS, {}), "params": tree}
