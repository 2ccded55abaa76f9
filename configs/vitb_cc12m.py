"""The paper's recipe on all of CC12M, without the filter that keeps captions with entities.

    python -m ovseg_jax.main --config=configs/vitb_cc12m.py --workdir=runs/vitb_cc12m

As ``vitb.py`` but for its records, which hold pairs without an entity too: these count in the
contrastive loss alone, as they have nothing to complete and no partner. The paper's own set has
more entities than its filtered one; the records bring the list. Not yet trained with this code:
time and score are unknown. ``:smoke`` takes four real steps of the full-size model on scenes with
random weights.
"""

from pathlib import Path

from ml_collections import ConfigDict

from ovseg_jax.flags import read_config


def get_config(variant: str = "") -> ConfigDict:
    """The config; see the module's docstring for the variant."""
    base = Path(__file__).with_name("vitb.py")
    config = read_config(f"{base}:{variant}" if variant else base)
    config.data.records.dir = "data/cc12m"
    return config
