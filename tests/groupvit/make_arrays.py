"""Writes tiny.npz: a tiny random GroupViT of the Hugging Face library, its inputs and outputs.

pip install torch==2.13.0 transformers==5.23.0 && python tests/groupvit/make_arrays.py
"""

from pathlib import Path

import numpy as np
import torch
from transformers import GroupViTConfig, GroupViTModel
from transformers.models.groupvit.modeling_groupvit import get_grouping_from_attentions

START, END, PADDING = 97, 98, 0
TEXT = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "max_position_embeddings": 16}
TEXT |= {"bos_token_id": START, "eos_token_id": END, "pad_token_id": PADDING}
VISION = {"hidden_size": 24, "intermediate_size": 48, "depths": [2, 1, 1], "num_hidden_layers": 4}
VISION |= {"num_group_tokens": [6, 3, 0], "num_output_groups": [6, 3, 0], "num_attention_heads": 4}
VISION |= {"image_size": 32, "patch_size": 8, "assign_mlp_ratio": [0.5, 2]}
# Real tokens of each text; one fills the whole length.
LENGTHS = (12, 5, 2, 7)


def random_model():
    config = GroupViTConfig(
        text_config=TEXT, vision_config=VISION, projection_dim=10, projection_intermediate_dim=20
    )
    model = GroupViTModel(config).eval()
    with torch.no_grad():
        # Biases, norms and the tokens that start at zero are random too: nothing can be left out.
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if not value.dtype.is_floating_point:
                continue
            noise = torch.randn(value.shape)
            if name == "logit_scale":
                value.fill_(1.3)
            elif name.endswith("running_var"):
                value.copy_(0.5 + noise.abs())
            elif value.ndim == 1 and name.endswith("weight"):
                value.copy_(1 + 0.2 * noise)
            elif value.ndim == 2 and "embedding" not in name:
                value.copy_(1.5 * noise / value.shape[1] ** 0.5)
            else:
                value.copy_(0.5 * noise)
        model.text_projection[1].num_batches_tracked.fill_(7)
    return model


def text_inputs():
    generator = np.random.default_rng(0)
    ids = np.full((len(LENGTHS), max(LENGTHS)), PADDING)
    for row, length in enumerate(LENGTHS):
        ids[row, :length] = [START, *generator.integers(0, START, length - 2), END]
    ids[1, LENGTHS[1] :] = END  # padded with the end token, as the library's own tokenizer does
    mask = np.arange(ids.shape[1])[None] < np.array(LENGTHS)[:, None]
    return torch.as_tensor(ids), torch.as_tensor(mask.astype(np.int64))


@torch.no_grad()
def main():
    torch.manual_seed(0)
    model = random_model()
    ids, mask = text_inputs()
    pixels, wide = torch.randn(2, 3, 32, 32), torch.randn(1, 3, 32, 48)
    out = model(input_ids=ids, attention_mask=mask, pixel_values=pixels, output_segmentation=True)
    vision, text = out.vision_model_output, out.text_model_output
    embedded = model.vision_model.embeddings(wide, interpolate_pos_encoding=True)
    encoded = model.vision_model.encoder(embedded, output_attentions=True, return_dict=True)
    arrays = {
        "ids": ids.to(torch.int32),
        "mask": mask.to(torch.bool),
        "pixels": pixels,
        "image_embeds": out.image_embeds,
        "text_embeds": out.text_embeds,
        "segmentation_logits": out.segmentation_logits,
        "logits_per_image": out.logits_per_image,
        "text_tokens": text.last_hidden_state,
        "groups": vision.last_hidden_state,
        "map_0": vision.attentions[0],
        "map_1": vision.attentions[1],
        "wide_pixels": wide,
        "wide_groups": model.vision_model.layernorm(encoded.last_hidden_state),
        "wide_map": get_grouping_from_attentions(encoded.attentions, wide.shape[2:]),
        **{f"weights/{name}": value for name, value in model.state_dict().items()},
    }
    arrays = {name: value.numpy() for name, value in arrays.items()}
    np.savez_compressed(Path(__file__).with_name("tiny.npz"), **arrays)


if __name__ == "__main__":
    main()
