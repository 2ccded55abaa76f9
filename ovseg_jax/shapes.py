"""The letters that shapes are written in, and the array types used in signatures.

One letter means one thing everywhere in the package:

====  =========================================================
B     images (or captions) in a batch
H, W  image height and width, pixels
P     patch size, pixels
L     image patches, L = (H / P) * (W / P), row-major
K     group tokens
S     groups kept by the mask-consistency loss, S = ratio * K (the paper's K')
M     text tokens
C     classes
D     width of a tower
E     width of the joint image-text space (256 in the paper)
T     tokens of any kind; in ``losses.contrastive``, texts of one image
N     attention heads; in ``losses.matching``, independent assignment problems
====  =========================================================

The tests check every annotation at run time (jaxtyping with beartype); outside the tests they
cost nothing.
"""

from jaxtyping import Array, Bool, Float, Int, UInt8

__all__ = ["Array", "Bool", "Float", "Int", "UInt8"]
