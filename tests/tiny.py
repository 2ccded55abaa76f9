"""A whole run at toy size: a config for the end-to-end tests (`ovseg_jax.flags.read_config`)."""

from pathlib import Path

from ml_collections import ConfigDict

from ovseg_jax.flags import read_config

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.py"


def get_config(variant: str = "") -> ConfigDict:
    """The quickstart from scratch, shrunk: 28-pixel scenes, 4 groups, two phases of 3 steps.

    The variant "cached" freezes trunk and text encoder and caches their features. "restarts" is for
    runs that are started again and again: as little as possible to trace, nothing that JAX cannot
    keep compiled (a callback to the host is such), no evaluation, phases of 20 steps.
    """
    config = read_config(f"{QUICKSTART}:scratch")
    config.model.image.update(
        patch=7, grid=(4, 4), width=24, heads=2, num_groups=4, first_layers=2, second_layers=1
    )
    config.model.text.update(width=16, depth=1, heads=2, mlp_width=32)
    config.model.decoder.update(width=24, heads=2)
    config.model.joint_width = 16
    config.model.matmul_dtype = "float32"
    config.data.scenes.update(count=48, size=28)
    config.data.transform = {"kind": "none", "size": 28}
    for phase in config.phases:
        phase.update(steps=3, batch_size=8)
    config.eval.scenes.update(count=8, size=28)
    config.eval.protocol.update(short_side=28, window=28, stride=14)
    config.eval.update(tune_count=8, batch_size=8, pictures=2)
    config.log_every = 1
    config.checkpoint_every = 2
    if variant == "cached":
        config.model.image.group_layer = 1
        config.data.update(cache_images=True, cached_views=2, cache_texts=True, cached_templates=2)
        config.data.transform = {
            "kind": "crop",
            "size": 28,
            "scale": (0.5, 1.0),
            "ratio": (0.8, 1.25),
            "flip": 0.5,
        }
        for phase in config.phases:
            phase["frozen"] = (
                r"^image_encoder/(patch_embed|position|trunk_layers)",
                r"^text_encoder/",
            )
    if variant == "restarts":
        config.model.image.update(first_layers=1)
        config.loss.matching = "enumerate"
        config.eval.update(benchmarks=(), pictures=0, untrained=False)
        for phase in config.phases:
            phase.update(steps=20)
        config.checkpoint_every = 5
    return config
