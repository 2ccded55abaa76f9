"""BERT and MiniLM under Hugging Face's tensor names."""

import numpy as np

from ovseg_jax.weights.links import Link, Shapes, matching, module, norm, read_links
from ovseg_jax.weights.tensors import Tensors

ROOT = "text_encoder"
# The tensor by which a BERT is known.
ANCHOR = "embeddings.word_embeddings.weight"

# The pooler feeds next-sentence prediction, ids are constants, heads predict words.
DROPPED = (
    r"pooler\..*",
    r"embeddings\.(position_ids|token_type_ids)",
    r"(cls|classifier|qa_outputs)\..*",
)

_LAYER = {
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp/fc1": "intermediate.dense",
    "mlp/fc2": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
# Files converted from TensorFlow call the two vectors of a norm gamma and beta.
_OLD_NAMES = {".LayerNorm.gamma": ".LayerNorm.weight", ".LayerNorm.beta": ".LayerNorm.bias"}


def bert_links(depth: int, prefix: str = "") -> list[Link]:
    """A BERT of `depth` layers whose names begin with `prefix`."""
    blocks = [f"{prefix}encoder.layer.{index}." for index in range(depth)]
    return [
        *(
            Link((f"{ROOT}/{name}",), (f"{prefix}embeddings.{name}_embeddings.weight",), "table")
            for name in ("word", "position", "token_type")
        ),
        *norm(f"{ROOT}/embed_norm", f"{prefix}embeddings.LayerNorm"),
        *module(f"{ROOT}/layers", blocks, _LAYER, stacked=True),
    ]


def from_bert(tensors: Tensors, shapes: Shapes, origin: str) -> dict[str, np.ndarray]:
    """Parameters of the text encoder by path.

    Args:
      tensors: without a prefix such as "bert.".
      shapes: of all the model's parameters.
      origin: where the tensors come from, for messages.

    Raises:
      UserError: lists every tensor that is missing, left over or misshapen.
    """
    for old, new in _OLD_NAMES.items():
        tensors = {
            name.removesuffix(old) + new if name.endswith(old) else name: value
            for name, value in tensors.items()
        }
    wanted = {path: shape for path, shape in shapes.items() if path.startswith(f"{ROOT}/")}
    links = bert_links(shapes[f"{ROOT}/layers/mlp/fc1/bias"][0])
    return read_links(tensors, links, wanted, matching(tensors, DROPPED), origin)
