"""The recipe of the released code: ViT-B/16, 64 tokens mixed to 8 groups, two stages.

    python -m ovseg_jax.main --config=configs/vitb_released.py --workdir=runs/vitb_released

Needs what ``vitb.py`` needs and, to choose stage 2's start on, PASCAL VOC 2012
(``--config.eval.voc.dir``, the folder VOCdevkit): mIoU on 500 images of its train split every 2000
steps. Another benchmark with training images serves as well (config.eval.benchmarks). Without any,
``--config.eval.every=0 --config.eval.benchmarks=() --config.phases[1].start_from=last`` starts
stage 2 from stage 1's last state. The released code differs from the paper in the model (grouping
block, batch norms in the projectors, [CLS], order of the decoder), the mask loss, the optimizer and
the schedule; every difference is a field below. Stage 2 starts from stage 1's best checkpoint with
a fresh optimizer, the teacher at the online model, and a frozen BERT whose dropout stays on. Not
trained with this code: time and score are unknown.

Where this is not the released training:

* The best checkpoint there is the one with the highest mIoU on VOC 2012's validation set, which is
  also reported. Here it is chosen on images of the train split.
* The completion projector's batch norm has the statistics of the whole batch, as the other two;
  there, those of each GPU.
* Word vectors have no weight decay, for the reason that ``vitb.py`` gives.
* New linear maps start Xavier-uniform; there, truncated normal with deviation 0.02.
* Captions are shuffled anew each epoch; prompts are whole sentences; entities are found as
  `ovseg_jax.data.entities` does.
* Rates are those of 8 GPUs: batches of 8 x 256 and 8 x 128, base rates times batch / 4096.

Computes in float32, as released; dtype and matmul_dtype = bfloat16 are faster. ``:smoke`` takes
four real steps of the full-size model on scenes with random weights.
"""

from pathlib import Path

from ml_collections import ConfigDict

from ovseg_jax.flags import read_config

DEVICES, GROUPS = 8, 8
# (base, start of the warm-up, end), for 4096 examples.
STAGE_1, STAGE_2 = (6.4e-4, 1.6e-5, 1.6e-4), (1e-5, 4e-6, 1e-6)


def _schedule(rates: tuple[float, float, float], batch: int, warmup: float) -> dict:
    peak, start, end = (rate * batch / 4096 for rate in rates)
    return {
        "peak": peak,
        "warmup": warmup,
        "end": end,
        "start": start,
        "cosine_from": "first_step",
        "delay": 1,
    }


def get_config(variant: str = "") -> ConfigDict:
    """The config; see the module's docstring for the variant."""
    base = Path(__file__).with_name("vitb.py")
    config = read_config(f"{base}:{variant}" if variant else base)
    config.model.image.update(
        heads=8,
        second_heads=8,
        eps=1e-5,
        group_tokens=64,
        num_groups=GROUPS,
        binding="grouping_block",
        second_stage="groups",
        drop_path=0.1,
    )
    config.model.decoder.update(heads=8, eps=1e-5, order="cross_first", mask_padding=False)
    config.model.update(
        projector_layers=2,
        projector_norm="batch",
        projector_activation="relu",
        projector_bias=True,
        text_pool="cls",
        dtype="float32",
        matmul_dtype="float32",
    )
    config.data.text_length = 77
    config.loss.update(
        mask_threshold=0.6,
        mask_maps="binding",
        mask_directions="one",
        # One GPU's sum over its batch, divided by K, averaged over GPUs.
        mask_divisor=float(DEVICES * GROUPS),
        mask_cost="euclidean",
        teacher_noise=True,
        frozen_text_dropout=True,
    )
    config.optimizer.update(
        weight_decay=0.05,
        decay_rules=((r"/(bias|scale)$|^text_encoder/word$", 0.0), (".*", 1.0)),
    )
    # Stage 1: timm's rand-m9-mstd0.5-inc1 and re_prob 0.25. Stage 2: crop and flip alone.
    crop = config.data.transform.to_dict()
    config.data.transform.update(rand_augment={"operations": 2}, erase={"probability": 0.25})
    config.phases = (
        {
            "name": "align",
            "epochs": 30,
            "batch_size": 2048,
            "mask_weight": 0.0,
            "learning_rate": _schedule(STAGE_1, 2048, 2 / 30),
        },
        {
            "name": "align + mask",
            "epochs": 10,
            "batch_size": 1024,
            "mask_weight": 0.1,
            "frozen": (r"^text_encoder/",),
            "transform": {**crop, "scale": (0.4, 1.0)},
            "learning_rate": _schedule(STAGE_2, 1024, 0.0),
            "optimizer": "fresh",
            "teacher": "reset",
            "start_from": "best",
        },
    )
    config.eval.update(benchmarks=("voc",), every=2000, calibrate=True, tune_count=500)
    config.eval.protocol = {"name": "released"}
    if variant == "smoke":
        config.eval.update(benchmarks=(), every=0, calibrate=False)
        for phase in config.phases:
            phase.update(epochs=0, steps=2, batch_size=8, start_from="last")
    return config
