"""One set of arrays of the released code: tensors, inputs, options, and our model made of it."""

import functools
import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from ovseg_jax.models.build import build_model
from ovseg_jax.train.config import DEFAULTS, complete
from ovseg_jax.weights.released import from_released, released_config

HERE = Path(__file__).parent

# A folder with whole sets, to be compared too.
ENVIRONMENT = "OVSEG_RELEASED_ARRAYS"
COSTS = {"L2": "euclidean", "cosine": "cosine"}
# How many times the recorded distance of the released code's own float32 from its float64 ours may
# have, where that is more than the usual limit: both are rounded, and the recorded one is the
# largest of single entries.
COARSER = 4.0


def sets_with(*files, chosen=lambda folder, name: True):
    """`pytest` parameters (folder, name) of every set with these files, e.g. "inputs.npz".

    Sets in this folder, of which there must be one, and in the folder of ENVIRONMENT.
    """
    found = []
    for folder in (HERE, *map(Path, filter(None, [os.environ.get(ENVIRONMENT)]))):
        names = [path.name.removesuffix(f"_{files[0]}") for path in folder.glob(f"*_{files[0]}")]
        for name in sorted(names):
            whole = all((folder / f"{name}_{file}").is_file() for file in files)
            if whole and chosen(folder, name):
                found.append(pytest.param((folder, name), id=f"{folder.name}-{name}"))
        assert found, f"{folder} holds no set with {files}"
    return found


def relative(ours, theirs):
    """|ours - theirs| / |theirs|, Euclidean norms, in float64."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float(np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), 1e-30))


class ReleasedSet:
    """The set `name` in `directory`.

    Attributes:
      meta: the set's options and how far float32 is from float64 in the released code.
      config, model: our ``config.model`` (sizes inferred from the tensors) and model.
      params, statistics, teacher: our arrays, converted.
    """

    def __init__(self, directory, name):
        self.directory, self.name = Path(directory), name
        self.meta = json.loads((self.directory / f"{name}_meta.json").read_text())
        self.tensors = self.file("weights")
        if (self.directory / f"{name}_weights_momentum.npz").is_file():
            self.tensors |= self.file("weights_momentum")
        sizes = self.meta["config"]
        heads = dict(zip(("heads", "second_heads"), sizes["img"]["num_heads"], strict=True))
        heads["text_heads"] = sizes["bert"]["num_attention_heads"]
        self.config = released_config(self.tensors, **heads)
        self.config["image"]["drop_path"] = self.config["text"]["dropout"] = 0.0
        self.model = build_model(ConfigDict(self.config))
        self.params, self.statistics, self.teacher = from_released(self.tensors, self.config)

    def file(self, kind):
        """The arrays of one file; a missing file is an error."""
        with np.load(self.directory / f"{self.name}_{kind}.npz") as archive:
            return dict(archive)

    def check(self, group, errors, usual):
        """Fails where a relative error exceeds its limit.

        The limit is `usual`, or `COARSER` times the released code's own rounding where the set
        records more than that.
        """
        assert errors, "nothing was compared"
        noise = self.meta["float32_noise"].get(group, {})
        failed = {}
        for name, error in errors.items():
            distance, size = (float(x) for x in noise.get(name, (0.0, 1.0)))
            limit = max(usual, COARSER * distance / max(size, 1e-30))
            if not error <= limit:
                failed[name] = f"{error:.1e} > {limit:.1e}"
        worst = max(errors, key=errors.get)
        print(f"{self.name} {group}: {len(errors)} compared, worst {worst} {errors[worst]:.1e}")
        assert not failed, failed

    @functools.cached_property
    def inputs(self):
        """Images, token ids and noise."""
        return self.file("inputs")

    def image(self, key):
        """An image input as [B, H, W, 3] (normalized already, float32)."""
        return jnp.asarray(self.inputs[key].transpose(0, 2, 3, 1))

    def ids(self, key):
        """Token ids; their padding is what the recorded mask leaves out."""
        ids, mask = self.inputs[f"{key}/input_ids"], self.inputs[f"{key}/attention_mask"]
        assert np.array_equal(ids != self.config["pad_id"], mask == 1)
        return jnp.asarray(ids, jnp.int32)

    def noise(self, dual):
        """Recorded Gumbel noise by model and image of the pair, [B, L, K]."""
        keys = {"online": {0: "0_online_image"}, "teacher": {1: "1_momentum_cross"}}
        if dual:
            keys["teacher"][0] = "2_momentum_image"
            keys["online"][1] = "3_online_cross"
        return {
            who: {
                i: jnp.asarray(self.inputs[f"gumbel/{key}"][:, 0].transpose(0, 2, 1))
                for i, key in images.items()
            }
            for who, images in keys.items()
        }

    def batch(self):
        """The training batch."""
        batch = {"image": self.image("image"), "image2": self.image("cross_image")}
        names = {"caption": "text", "masked": "question", "prompt": "answer"}
        for kind, key in {**names, "shared": "cross_entity"}.items():
            batch[f"{kind}_ids"] = self.ids(key)
        count = batch["image"].shape[0]
        for name in ("weight", "entity_weight", "pair_weight"):
            batch[name] = jnp.ones((count,), jnp.float32)
        # All answers of the batch are negatives of one another, equal ones too.
        return {**batch, "entity_set": jnp.arange(count, dtype=jnp.int32)}

    def weights_of_losses(self):
        """(entity_weight, mask_weight) of the total loss."""
        options = self.meta["config"]["model"]
        return options.get("entity_weight", 1.0), options.get("maskloss_weight", 0.1)

    def loss_config(self, dual):
        """Our ``config.loss``."""
        options = self.meta["config"]["model"]
        return ConfigDict(
            {
                **DEFAULTS["loss"],
                "entity_weight": self.weights_of_losses()[0],
                "mask_threshold": options.get("cross_threshold", 0.6),
                "mask_maps": "binding",
                "mask_directions": "both" if dual else "one",
                # The recorded run is one device's: the sum over its batch, divided by K.
                "mask_divisor": float(self.config["image"]["num_groups"]),
                "mask_cost": COSTS[options.get("cost_type", "L2")],
                "detached_ratio": options.get("group_ratio", 0.5),
                "teacher_noise": True,
                "frozen_text_dropout": True,
            }
        )

    def run_config(self):
        """The parts of a whole config that a train step reads."""
        options = self.meta["optimizer"]
        optimizer = {
            "b1": options["betas"][0],
            "b2": options["betas"][1],
            "eps": options["eps"],
            "clip_norm": self.meta["clip"],
            "weight_decay": options["weight_decay"],
            "decay_rules": ((r"/(bias|scale)$", 0.0), (".*", 1.0)),
            "ema_decay": options["ema"],
        }
        loss = self.loss_config(False)
        return complete({"loss": loss, "optimizer": optimizer, "model": self.config})
