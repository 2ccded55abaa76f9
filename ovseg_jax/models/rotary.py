"""Rotary positions of patches (Su et al., 2021) in the form of DINOv3 (Simeoni et al., 2025).

No parameter: queries and keys are turned by angles that depend on where their patch lies, relative
to the sides of the image, so that any grid will do. Tokens that are no patch are not turned.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from ovseg_jax.shapes import Array, Float


@dataclass(frozen=True)
class Rotary:
    """Where the tokens of a sequence lie.

    Attributes:
      rows, columns: of the patch grid; its patches come last in the sequence, row-major.
      prefix: tokens before the patches (class token, registers).
      theta: bounds the wavelengths: from 1 (half a side of the image) to nearly theta.
    """

    rows: int
    columns: int
    prefix: int
    theta: float

    def angles(self, width: int) -> Float[np.ndarray, "T half"]:
        """Angles of every token, radians, for heads of `width` channels; 0 for the prefix.

        Patch centers run from -1 to 1 along each side. The first quarter of the channels goes by
        the row, the second by the column, each with wavelengths growing
        geometrically.
        """
        wave = self.theta ** (np.arange(width // 4) * 4 / width)
        sides = [(np.arange(n) + 0.5) / n * 2 - 1 for n in (self.rows, self.columns)]
        places = np.stack(np.meshgrid(*sides, indexing="ij"), axis=-1).reshape(-1, 2)
        turned = (2 * np.pi * places[..., None] / wave).reshape(len(places), -1)
        still = np.zeros((self.prefix, turned.shape[1]))
        return np.concatenate([still, turned])

    def __call__(self, x: Float[Array, "B N T d"]) -> Float[Array, "B N T d"]:
        """Turns channel pairs (i, i + d/2) of queries or keys; d must be a multiple of 4."""
        angles = self.angles(x.shape[-1])
        cosine, sine = (jnp.asarray(f(angles), jnp.float32)[None, None] for f in (np.cos, np.sin))
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        turned = [first * cosine - second * sine, second * cosine + first * sine]
        return jnp.concatenate(turned, axis=-1).astype(x.dtype)
