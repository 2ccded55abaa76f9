"""The paper's recipe with ViT-S/16 (Table 1): 384 wide, 6 heads.

    python -m ovseg_jax.main --config=configs/vits.py --workdir=runs/vits

Everything but the visual tower is as in ``vitb.py``, which also says what is needed. Published
with it: VOC 44.5, Context 18.3, COCO Object 19.0, ADE20K 4.3 mIoU. Not yet trained with this code.
``:smoke`` as there.
"""

from pathlib import Path

from ml_collections import ConfigDict

from ovseg_jax.flags import read_config


def get_config(variant: str = "") -> ConfigDict:
    """The config of ``vitb.py`` (or a variant) with the small tower."""
    base = Path(__file__).with_name("vitb.py")
    config = read_config(f"{base}:{variant}" if variant else base)
    config.model.image.update(width=384, heads=6)
    config.model.decoder.update(width=384, heads=6)
    if config.model.image_init:
        config.model.image_init = "weights/dino_vits16/model.safetensors"
    return config
