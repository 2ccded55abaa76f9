"""Eight fake devices, strict dtypes and ranks, checked shapes, and one tiny model for all tests."""

import contextlib
import os
import resource
from pathlib import Path

# All of this must stand before JAX is imported. The collectives of eight fake devices on a busy
# machine of two cores can wait longer than XLA's CPU rendezvous does by default (40 s, then it
# aborts the process). Compiling is what these tests spend their time on: nothing is optimized that
# takes long to optimize.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_force_host_platform_device_count=8",
        "--xla_cpu_collective_call_warn_stuck_timeout_seconds=300",
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false",
    ]
)
# XLA's CPU pool has one thread a device, and a device may wait in two collectives at once: on a
# busy machine four devices then hold all threads, and the other four never start.
os.environ["NPROC"] = "32"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
from hypothesis import settings  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

CACHE = Path(__file__).parents[1] / ".cache" / "jax-tests"
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

# Every annotation of the package is checked at run time, also while tracing.
install_import_hook("ovseg_jax", "beartype.beartype")

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from flax import linen as nn  # noqa: E402
from ml_collections import ConfigDict  # noqa: E402

from ovseg_jax.models.build import build_model  # noqa: E402
from ovseg_jax.train.config import complete  # noqa: E402

settings.register_profile("tests", deadline=None, max_examples=25)
settings.load_profile("tests")


def make_tiny_config() -> ConfigDict:
    """Model, losses and optimizer as small as they can be with every part present."""
    config = ConfigDict()
    config.model = {
        "image": {
            "patch": 8,
            "grid": (4, 4),
            "width": 32,
            "heads": 4,
            "first_layers": 2,
            "second_layers": 1,
            "num_groups": 4,
            "group_std": 1.0,
            "mlp_ratio": 2.0,
        },
        "text": {
            "vocab_size": 48,
            "width": 24,
            "depth": 2,
            "heads": 2,
            "mlp_width": 48,
            "max_positions": 12,
        },
        "decoder": {"width": 32, "heads": 4, "mlp_ratio": 2.0},
        "joint_width": 8,
        "projector_width": 16,
    }
    # The threshold is about the median of the masks that `tiny_params` draw: half a target each.
    config.loss = {"mask_threshold": 0.96}
    config.optimizer = {
        "clip_norm": 1.0,
        "weight_decay": 0.5,
        "decay_rules": [("bias|scale|token$|token_type|position", 0.0), (".*", 1.0)],
        "rate_rules": [("^text_encoder/", 0.5), (".*", 1.0)],
        "ema_decay": 0.9,
        "learning_rate": {"peak": 1e-3, "warmup": 2, "end": 0.0},
    }
    return complete(config)


@pytest.fixture(scope="session")
def shared_tiny_config() -> ConfigDict:
    """For fixtures of the session; not to be changed."""
    return make_tiny_config().lock()


@pytest.fixture
def tiny_config() -> ConfigDict:
    """A copy of its own: a test may change it."""
    return make_tiny_config()


@pytest.fixture(scope="session")
def tiny_model(shared_tiny_config):
    """The model of `tiny_config`."""
    return build_model(shared_tiny_config.model)


@pytest.fixture(scope="session")
def tiny_boxed(tiny_model):
    """Abstract parameters of `tiny_model` with their logical axis names."""
    image, ids = jnp.zeros((1, 32, 32, 3), jnp.uint8), jnp.ones((1, 4), jnp.int32)
    return jax.eval_shape(lambda key: tiny_model.init(key, image, ids)["params"], jax.random.key(0))


@pytest.fixture(scope="session")
def tiny_params(tiny_boxed):
    """Random parameters of `tiny_model`, NumPy.

    Biases and scales are random too: at their initial 0 and 1 a test could not see them left out.
    Kernels are larger than at the start of training, so that attention is far from uniform.
    """
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name = path[-1].key
        if name == "log_scale":
            return np.float32(np.log(10.0))
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        if name == "scale":
            return 1 + 0.2 * noise
        if name == "kernel":
            return 1.5 * noise / np.sqrt(np.float32(leaf.shape[-2]))
        return (1.0 if "token" in name else 0.3) * noise

    return jax.tree_util.tree_map_with_path(draw, nn.unbox(tiny_boxed))


@pytest.fixture
def full_disk():
    """A context in which no file of this process can have more bytes than given: writing fails."""

    @contextlib.contextmanager
    def limited(room):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited
