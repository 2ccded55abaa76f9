"""OVSegmentor in JAX: open-vocabulary segmentation learned from captions alone."""

__version__ = "0.1.0"
