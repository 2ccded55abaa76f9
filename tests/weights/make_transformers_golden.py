"""Writes golden/*.npz: tiny random models of transformers, run by PyTorch.

    python tests/weights/make_transformers_golden.py

Made with torch 2.13.0 and transformers 5.23.0 on CPU; the tests need neither. Every parameter is
drawn anew, also those that start at 0 or 1, so that none can be left out unseen, and the epsilons
are large (or the activations small, where an epsilon is fixed), so that a wrong one shows.

Each file holds
  file|NAME     weights as `save_pretrained` writes them
  file_names    their names
  input.I       pixels [B, 3, H, W], or token ids [B, M] with mask.I
  output.I      the last hidden state for input I
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers as t
from safetensors.numpy import load_file

GOLDEN = Path(__file__).with_name("golden")

TEXT = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
TEXT |= {"intermediate_size": 40, "max_position_embeddings": 16, "layer_norm_eps": 1e-3}
IMAGE = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32}
IMAGE |= {"patch_size": 8, "layer_norm_eps": 1e-3}
WIDE = {"intermediate_size": 48}

# The stored grid; a larger, a smaller one, not square; one with as many cells, not square.
SIZES = ((32, 32), (56, 40), (16, 24), (64, 16))


def randomize(model: torch.nn.Module, seed: int, embeddings: float) -> None:
    """Draws all parameters: kernels so that attention is far from uniform, norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim == 1:
            centered = "norm" in name.lower() and name.endswith("weight") or "lambda" in name
            noise = 0.2 * noise + (1.0 if centered else 0.0)
        elif "token" in name or "position" in name or "word" in name:
            noise = embeddings * noise
        else:
            noise = 1.5 * noise / value[0].numel() ** 0.5
        value.data = noise


def named(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The weights as they are saved."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        saved = load_file(Path(folder) / "model.safetensors")
    arrays = {f"file|{name}": array for name, array in saved.items()}
    return arrays | {"file_names": np.array(list(saved))}


def write(name: str, arrays: dict[str, np.ndarray]) -> None:
    path = GOLDEN / f"{name}.npz"
    np.savez_compressed(path, **arrays)
    print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")


@torch.no_grad()
def text_model(name: str, model: torch.nn.Module, seed: int, pad: int, std: float = 0.5) -> None:
    """Four texts of several lengths, padded to 9."""
    randomize(model.eval(), seed, std)
    rng = np.random.default_rng(seed)
    lengths = np.array([9, 4, 2, 7])
    mask = np.arange(9)[None] < lengths[:, None]
    ids = np.where(mask, rng.integers(pad + 1, 40, mask.shape), pad)
    feed = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask).long()}
    output = model(**feed).last_hidden_state.numpy()
    arrays = named(model) | {"input.0": ids.astype(np.int32), "mask.0": mask, "output.0": output}
    write(name, arrays)


@torch.no_grad()
def image_model(name: str, model: torch.nn.Module, seed: int, **options: bool) -> None:
    """One image of each size."""
    randomize(model.eval(), seed, 0.5)
    arrays = named(model)
    rng = np.random.default_rng(seed)
    for index, size in enumerate(SIZES):
        pixels = rng.normal(size=(1, 3, *size)).astype(np.float32)
        output = model(torch.from_numpy(pixels), **options).last_hidden_state.numpy()
        arrays |= {f"input.{index}": pixels, f"output.{index}": output}
    write(name, arrays)


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    text_model("bert", t.BertModel(t.BertConfig(**TEXT)), 1, pad=0)
    vit = t.ViTModel(t.ViTConfig(**IMAGE, **WIDE))
    image_model("vit", vit, 4, interpolate_pos_encoding=True)
    image_model("dinov2", t.Dinov2Model(t.Dinov2Config(**IMAGE, mlp_ratio=2)), 5)
    registers = t.Dinov2WithRegistersConfig(**IMAGE, mlp_ratio=2, num_register_tokens=3)
    image_model("dinov2_registers", t.Dinov2WithRegistersModel(registers), 6)
    dinov3 = t.DINOv3ViTConfig(**IMAGE, **WIDE, num_register_tokens=2)
    image_model("dinov3", t.DINOv3ViTModel(dinov3), 7)


if __name__ == "__main__":
    main()
