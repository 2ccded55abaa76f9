"""The pixel maps of COCO-Stuff, which also have COCO's objects."""

from pathlib import Path

from ovseg_jax.data.benchmarks.folders import require, require_equal_sizes
from ovseg_jax.errors import UserError


def image_places(split: str) -> tuple[str, ...]:
    """Where the images of a split ("val" or "train") may be."""
    return f"{split}2017", f"images/{split}2017"


def map_places(split: str) -> tuple[str, ...]:
    """Where the pixel maps may be: the official archive unpacked, or as other programs keep it
    beside their own files."""
    folders = ("stuffthingmaps", "stuffthingmaps_trainval2017", "annotations")
    return tuple(f"{folder}/{split}2017" for folder in folders)


def first_folder(root: Path, places: tuple[str, ...]) -> Path | None:
    """The first of the places that is a folder."""
    return next((root / place for place in places if (root / place).is_dir()), None)


def pixel_maps(
    name: str, root: Path, split: str
) -> tuple[tuple[str, ...], tuple[Path, ...], tuple[Path, ...]]:
    """(keys, images, maps) of a folder that `find_root` has found.

    Raises:
      UserError: there are none, or images are missing, or of another size.
    """
    image_folder = first_folder(root, image_places(split))
    map_folder = first_folder(root, map_places(split))
    maps = tuple(p for p in sorted(map_folder.glob("*.png")) if "TrainIds" not in p.name)
    if not maps:
        raise UserError(f"benchmark {name}: {map_folder} holds no pixel maps (*.png)")
    keys = tuple(path.stem for path in maps)
    images = tuple(image_folder / f"{key}.jpg" for key in keys)
    require(name, images)
    require_equal_sizes(name, images, maps)
    return keys, images, maps
