"""Writes opencv_resize.npz: images and what OpenCV's linear interpolation makes of them.

pip install opencv-python-headless==5.0.0.93 && python tests/segmentation/make_opencv_resize.py
"""

from pathlib import Path

import cv2
import numpy as np

SIZES = {
    "larger": ((9, 13), (25, 31)),
    "smaller": ((40, 33), (17, 14)),
    "mixed": ((7, 30), (18, 11)),
}

if __name__ == "__main__":
    rng, arrays = np.random.default_rng(0), {}
    for name, (source, target) in SIZES.items():
        image = rng.integers(0, 256, (*source, 3), dtype=np.uint8)
        arrays[f"{name}/image"] = image
        resized = cv2.resize(image, target[::-1], interpolation=cv2.INTER_LINEAR)
        arrays[f"{name}/resized"] = resized
    np.savez_compressed(Path(__file__).with_name("opencv_resize.npz"), **arrays)
