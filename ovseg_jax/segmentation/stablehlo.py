"""A model as StableHLO: two programs that run where this package is not installed.

``image.stablehlo``  images to groups, assignment and image embedding
``text.stablehlo``   token ids to class embeddings
``weights.npz``      the programs' first argument
``signature.json``   arguments and results
``README.md``        how to call them

They are compiled where they are called, for cpu, cuda or tpu, with any batch size.
"""

import contextlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ovseg_jax.errors import UserError
from ovseg_jax.files import replace_file
from ovseg_jax.models.layers import every_platform
from ovseg_jax.models.ovsegmentor import STATISTICS
from ovseg_jax.optim.groups import flatten, nest
from ovseg_jax.segmentation.protocol import Protocol
from ovseg_jax.segmentation.segmenter import embed_prompts, encode_images
from ovseg_jax.shapes import Array
from ovseg_jax.weights.model_dir import SavedModel

PLATFORMS = ("cpu", "cuda", "tpu")

# The parts of the model that each program needs; every method of the model reads the temperatures.
PARTS = {
    "image": (
        *("image_encoder/", "image_projector/", f"{STATISTICS}/image_projector/", "whole_head/"),
        *("log_scale", "whole_log_scale"),
    ),
    "text": (
        *("text_encoder/", "text_projector/", f"{STATISTICS}/text_projector/"),
        *("whole_text_head/", "log_scale", "whole_log_scale"),
    ),
}

_README = """# A segmentation model as StableHLO

Needs jax, numpy and flatbuffers, nothing else.

    import json
    import jax, jax.export
    import numpy as np

    signature = json.load(open("signature.json"))
    weights = dict(np.load("weights.npz"))

    def program(name):
        exported = jax.export.deserialize(open(signature[name]["program"], "rb").read())
        own = {{key: weights[key] for key in signature[name]["weights"]}}
        return jax.jit(lambda x: exported.call(own, x))

    # Images are uint8 [batch, {size}, {size}, 3], token ids int32 [prompts, {length}].
    assignment, groups, embedding{keys} = program("image")(images)
    classes{image_classes} = program("text")(ids)

A patch's cosine with a class is the sum over groups of assignment times the cosine of group and
class. The embedding of the image is compared with the image_classes where there are any, else with
the classes. Class embeddings of several prompts are averaged, then divided by their norm. The keys
of the patches, where there are any, are what the protocol's border_scale compares. Token ids come
from the tokenizer of the model directory, padded to {length} with {pad}.
"""


def check_can_be_written() -> None:
    """Raises UserError where the package is missing that jax.export writes files with."""
    try:
        import flatbuffers  # noqa: F401
    except ImportError:
        raise UserError(
            "writing StableHLO needs the package flatbuffers: pip install 'ovseg_jax[export]'"
        ) from None


def write_programs(
    saved: SavedModel, protocol: Protocol, directory: Path, image_size: int
) -> dict[str, Any]:
    """Writes the files of the module's docstring.

    Args:
      protocol: says which assignment and which class embedding.
      image_size: height and width of the images, pixels.

    Returns:
      The signature.

    Raises:
      UserError: flatbuffers is missing, or the directory cannot be written.
    """
    check_can_be_written()
    arrays = flatten({**saved.params, STATISTICS: saved.batch_stats})
    patch = saved.model.image_encoder.patch
    if image_size < patch:
        raise UserError(f"--image_size={image_size} is less than one patch of {patch} pixels")
    length, pad = saved.info["text_length"], saved.model.pad_id
    keys, image_head = protocol.border_scale > 0, saved.model.image_head > 0

    def image(weights: Mapping[str, Array], images: Array) -> tuple[Array, ...]:
        return encode_images(saved.model, _variables(weights), images, protocol.affinity, keys)

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
        own = {key: x for key, x in arrays.items() if key.startswith(PARTS[name])}
        exported = _exported(function, own, shape, dtype)
        files[f"{name}.stablehlo"] = bytes(exported.serialize())
        needed |= own
        signature[name] = {
            "program": f"{name}.stablehlo",
            "arguments": ["weights", argument],
            "input": {"shape": ["batch", *shape], "dtype": np.dtype(dtype).name},
            "weights": sorted(own),
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
    files["README.md"] = _README.format(
        size=image_size,
        length=length,
        pad=pad,
        keys=", keys" * keys,
        image_classes=", image_classes" * image_head,
    )
    try:
        for file, content in files.items():
            replace_file(directory / file, content)
    except UserError:  # a full disk: nothing half is left
        with contextlib.suppress(OSError):
            for file in files:
                (directory / file).unlink(missing_ok=True)
            directory.rmdir()  # where nothing else is in it
        raise
    return signature


def _variables(weights: Mapping[str, Array]) -> dict[str, Any]:
    tree = nest(dict(weights))
    return {STATISTICS: tree.pop(STATISTICS, {}), "params": tree}


def _exported(
    function: Any, weights: Mapping[str, np.ndarray], shape: tuple[int, ...], dtype: Any
) -> jax.export.Exported:
    sizes = jax.export.symbolic_shape(", ".join(["batch", *map(str, shape)]))
    with every_platform():
        return jax.export.export(jax.jit(function), platforms=PLATFORMS)(
            {key: jax.ShapeDtypeStruct(x.shape, x.dtype) for key, x in weights.items()},
            jax.ShapeDtypeStruct(sizes, dtype),
        )
