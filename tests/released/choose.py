"""Makes the arrays of this folder from whole sets: some files whole, of others the small part.

    python tests/released/choose.py DIRECTORY_OF_WHOLE_SETS

The comparisons take whatever a file holds; run them on whole sets with OVSEG_RELEASED_ARRAYS (see
README.md).
"""

import re
import shutil
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent

# File to (largest array in bytes, pattern of the names that are kept in any size or "" for none);
# None copies the file.
FILES = {
    "dev_meta.json": None,
    "dev_weights.npz": None,
    "dev_eval_rest.npz": None,
    "dev_inputs.npz": (2000, "image"),
    "dev_eval_image.npz": (13000, "grouping/(soft|hard)"),
    "dev_train_dual_on.npz": (13000, "img_momentum_.*/k|mask_.*"),
    "dev_seg.npz": (0, "(?!seg0/attn_map_upsampled).*"),
    "dev2_meta.json": None,
    "dev2_weights.npz": None,
    "dev2_weights_momentum.npz": None,
    "dev2_inputs.npz": None,
    "dev2_eval_rest.npz": None,
    "dev2_train_dual_on.npz": None,
    "dev2_train_dual_off.npz": (2000, ""),
    "dev2_eval_image.npz": (16000, "grouping/hard|pos_embed/.*|img/stage0_block0_out"),
    "dev2_grads_dual_on.npz": (17000, ".*(pos_embed|word_embeddings.weight)"),
    "dev2_grads_dual_off.npz": (7000, ".*(pos_embed|word_embeddings.weight)"),
    "dev2_grads_per_loss.npz": (13000, ""),
    "dev2_optim_step1.npz": (7000, ".*(pos_embed|word_embeddings.weight)"),
    "dev2_optim_ema_step1.npz": (2500, ""),
    "dev2_optim_step2.npz": (7000, ""),
    "dev2_seg.npz": None,
    "groupvit2_meta.json": None,
    "groupvit2_weights.npz": None,
    "groupvit2_eval.npz": (0, "(?!.*/get_attn_maps0).*"),
    "contrastive_2rank.npz": None,
    "miou.npz": None,
    "lr_schedule.json": None,
}


def main(source):
    for name, rule in FILES.items():
        if rule is None:
            shutil.copyfile(source / name, HERE / name)
            continue
        limit, always = rule
        with np.load(source / name) as archive:
            kept = {
                key: value
                for key, value in archive.items()
                if value.nbytes <= limit or re.fullmatch(always, key)
            }
        np.savez_compressed(HERE / name, **kept)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
