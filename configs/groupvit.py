"""GroupViT (Xu et al., 2022), the paper's baseline: two grouping stages, 64 and then 8 groups.

    python -m ovseg_jax.main --config=configs/groupvit.py --workdir=runs/groupvit

An image is contrasted with its caption and with sentences of three nouns drawn from it. The data
are those of ``vitb.py``; its authors used 26 million pairs and published VOC 52.3 and Context 22.4
mIoU. Not yet trained with this code: time and score are unknown.

Where this is not the authors' training: one temperature serves both losses; the running statistics
of the image projector's batch norm also see every group; nouns are found as `ovseg_jax.data.words`
does; captions are shuffled anew each epoch; word vectors have no weight decay (see ``vitb.py``).

Variants: ``:own_text`` has GroupViT's own text encoder, a causal transformer over byte pairs, in
place of BERT (config.data.tokenizer then is a folder with the tokenizer of CLIP); ``:smoke`` takes
four real steps of the full-size model with BERT on scenes with random weights.
"""

from pathlib import Path

from ml_collections import ConfigDict

from ovseg_jax.flags import read_config

VARIANTS = ("", "own_text", "smoke")


def get_config(variant: str = "") -> ConfigDict:
    """The config; see the module's docstring for the variants."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is none of {', '.join(VARIANTS[1:])}")
    base = Path(__file__).with_name("vitb.py")
    config = read_config(f"{base}:smoke" if variant == "smoke" else base)
    config.model.image.update(
        width=384,
        heads=6,
        eps=1e-5,
        first_layers=6,
        second_layers=3,
        group_tokens=64,
        num_groups=64,
        later_stages=((8, 8, 3),),
        binding="grouping_block",
        second_stage="groups",
        patch_norm=True,
        drop_path=0.1,
    )
    config.model.update(
        projector_layers=2,
        projector_norm="batch",
        projector_activation="relu",
        projector_bias=True,
    )
    del config.model.decoder
    config.model.image_init = ""
    if variant == "own_text":
        config.model.text_form = "causal"
        sizes = {"vocab_size": 49408, "width": 256, "depth": 12, "heads": 4, "mlp_width": 1024}
        config.model.text = sizes
        config.model.text_init = ""
        config.data.tokenizer = "weights/clip"
    config.data.text_length = 77
    config.data.nouns = 3
    config.data.transform.update(rand_augment={"operations": 2}, erase={"probability": 0.25})
    config.loss.update(entity_weight=0.0, noun_weight=1.0)
    config.optimizer.update(
        weight_decay=0.05,
        decay_rules=((r"/(bias|scale)$|^text_encoder/word$", 0.0), (".*", 1.0)),
    )
    # 4096 pairs a step, 30 epochs, 2 of them warm-up.
    config.optimizer.learning_rate = {
        "peak": 1.6e-3,
        "warmup": 2 / 30,
        "end": 4e-5,
        "start": 4e-6,
        "cosine_from": "first_step",
        "delay": 1,
    }
    config.phases = ({"name": "align", "epochs": 30, "batch_size": 4096, "mask_weight": 0.0},)
    if variant == "smoke":
        config.phases = ({"name": "align", "steps": 4, "batch_size": 8, "mask_weight": 0.0},)
    config.eval.protocol = {"name": "groupvit"}
    return config
