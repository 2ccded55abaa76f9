"""OVSegmentor in JAX: open-vocabulary segmentation learned from captions alone.

import ovseg_jax

model = ovseg_jax.load("photos")  # or a model of your own: "runs/quickstart/model"
found = model.segment("street.jpg", ["car", "traffic light"])
found.labels  # [height, width]: 0 background, 1 car, 2 traffic light
found.scores  # how sure the model is of each class, 0 to 1
found.groups  # [height, width]: the group of each pixel
model.embed_image("street.jpg") @ model.embed_text(["a street", "a beach"], ["{}"]).T
"""

import os
import sys
from typing import Any

if sys.argv[:1] == ["-m"]:
    # `python -m ovseg_jax.main` begins here. Its imports take seconds, and Ctrl-C then is no fault.
    def _say_interrupted(kind: Any, error: BaseException, trace: Any) -> None:
        # A library may say that its import failed, because of the interrupt.
        causes = [error]
        while cause := causes[-1].__cause__ or causes[-1].__context__:
            causes.append(cause)
        if any(isinstance(cause, KeyboardInterrupt) for cause in causes):
            print("interrupted", file=sys.stderr, flush=True)
            if not isinstance(error, KeyboardInterrupt):
                os._exit(130)
        else:
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = _say_interrupted

__version__ = "0.1.0"


def load(model_dir: Any, **settings: Any) -> Any:
    """The model in a model directory, a `segmentation.api.LoadedModel`.

    Args:
      model_dir: path of a directory that training, `ovseg_jax.convert` or `ovseg_jax.export` wrote;
        or the name of a model that comes with this package, such as "photos".
      settings: fields of the model's protocol that are to differ, such as ``pamr_steps=10``; see
        `segmentation.protocol.Protocol`.

    Raises:
      ovseg_jax.errors.UserError: the directory is absent, incomplete or damaged, or
        published weights that it refers to are not installed.
    """
    # Here, so that importing the package alone stays light.
    from ovseg_jax.segmentation.api import LoadedModel

    return LoadedModel(model_dir, **settings)
