"""Miniatures of the official folder layouts, with labels that are known pixel by pixel."""

import json

import numpy as np
import scipy.io
from PIL import Image
from pycocotools import mask as codec

SIZE = (6, 9)  # rows, columns


def write_image(path, seed=0, size=SIZE):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, quality=95)


def write_mask(path, values, palette=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(values, np.uint8))
    if palette:
        image.putpalette([channel for i in range(256) for channel in (i, 255 - i, i // 2)])
    image.save(path)


def write_text(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def values_of(numbers, seed=0):
    """A map of `SIZE` with each of the numbers in it."""
    rng = np.random.default_rng(seed)
    flat = rng.permutation(np.resize(np.asarray(numbers), SIZE[0] * SIZE[1]))
    return flat.reshape(SIZE)


def write_pairs(base, keys, numbers, image, *masks, palette=False):
    """An image and masks for each key, at paths with '{key}'; returns the values in the masks."""
    maps = {}
    for seed, key in enumerate(keys):
        maps[key], city = values_of(numbers, seed), key.partition("_")[0]
        write_image(base / image.format(key=key, city=city), seed)
        for mask in masks:
            write_mask(base / mask.format(key=key, city=city), maps[key], palette)
    return maps


def voc(root):
    base, keys = root / "VOCdevkit" / "VOC2012", ("2007_000033", "2007_000042")
    write_image(base / "JPEGImages" / "2008_000001.jpg")  # of another split
    write_text(base / "ImageSets" / "Segmentation" / "val.txt", *keys)
    paths = ("JPEGImages/{key}.jpg", "SegmentationClass/{key}.png")
    return write_pairs(base, keys, [0, 1, 11, 20, 255], *paths, palette=True)


def ade20k(root):
    keys = ("ADE_val_00000001", "ADE_val_00000002")
    paths = ("images/validation/{key}.jpg", "annotations/validation/{key}.png")
    return write_pairs(root / "ADEChallengeData2016", keys, [0, 1, 8, 150], *paths)


def cityscapes(root):
    keys = ("frankfurt_000000_000000", "munster_000000_000001")
    paths = ["leftImg8bit/val/{city}/{key}_leftImg8bit.png"]
    paths += [f"gtFine/val/{{city}}/{{key}}_gtFine_{kind}Ids.png" for kind in ("label", "instance")]
    return write_pairs(root, keys, [0, 4, 7, 19, 33, 29], *paths)


def coco_stuff(root):
    paths = ("val2017/{key}.jpg", "stuffthingmaps/val2017/{key}.png")
    keys = ("000000000139", "000000000140")
    return write_pairs(root, keys, [0, 10, 12, 89, 91, 181, 255], *paths)


def box(top, left, bottom, right):
    """A region's pixels."""
    mask = np.zeros(SIZE, bool)
    mask[top:bottom, left:right] = True
    return mask


def run_lengths(mask):
    """Compressed, as JSON holds them."""
    encoded = codec.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(SIZE), "counts": encoded["counts"].decode()}


def plain_run_lengths(mask):
    """Uncompressed: column by column, zeros first."""
    flat = mask.T.reshape(-1).astype(int)
    ends = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *ends, flat.size]).tolist()
    return {"size": list(SIZE), "counts": [0, *counts] if flat[0] else counts}


def coco_object(root, names):
    """Three images: overlaps and a crowd; polygons; nothing at all. Returns their labels.

    Args:
      names: category id -> name.
    """
    big, small, crowd, triangle = box(0, 0, 5, 6), box(1, 1, 3, 3), box(0, 0, 6, 9), box(2, 2, 5, 7)

    def region(image, category, segmentation, area, crowded=0):
        where = {"image_id": image, "category_id": category, "segmentation": segmentation}
        return {**where, "area": area, "iscrowd": crowded}

    annotations = [
        # In the order of the file the small one comes first, and the crowd last.
        region(1, 90, run_lengths(small), int(small.sum())),
        region(1, 18, run_lengths(big), int(big.sum())),
        region(1, 1, plain_run_lengths(crowd), int(crowd.sum()), crowded=1),
        region(2, 3, [[2, 2, 7, 2, 7, 5, 2, 5]], 15),
    ]
    size = {"height": SIZE[0], "width": SIZE[1]}
    images = [{"id": i, "file_name": f"{i:012d}.jpg", **size} for i in (2, 1, 3)]
    categories = [{"id": i, "name": name} for i, name in names.items()]
    document = {"images": images, "annotations": annotations, "categories": categories}
    path = root / "annotations" / "instances_val2017.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
    for entry in images:
        write_image(root / "val2017" / entry["file_name"], entry["id"])
    order = list(names)
    first = np.full(SIZE, order.index(1) + 1)
    first[big] = order.index(18) + 1
    first[small] = order.index(90) + 1
    second = np.zeros(SIZE, int)
    second[triangle] = order.index(3) + 1
    return {"000000000001": first, "000000000002": second, "000000000003": np.zeros(SIZE, int)}


CONTEXT_KEYS = ("2008_000002", "2008_000003")
CONTEXT_NUMBERS = [0, 1, 2, 284, 427, 431, 458, 459]


def context_images(base):
    for seed, key in enumerate(CONTEXT_KEYS):
        write_image(base / "JPEGImages" / f"{key}.jpg", seed)


def context_mat(root, classes):
    """Two .mat files; returns the numbers in them.

    Args:
      classes: number among the 459 -> name, of the 59.
    """
    base, maps = root / "VOCdevkit" / "VOC2010", {}
    context_images(base)
    (base / "trainval").mkdir(parents=True)
    for seed, key in enumerate(CONTEXT_KEYS):
        maps[key] = values_of(CONTEXT_NUMBERS, seed)
        content = {"LabelMap": maps[key].astype(np.uint16)}
        scipy.io.savemat(base / "trainval" / f"{key}.mat", content)
    write_text(base / "ImageSets" / "Main" / "val.txt", *CONTEXT_KEYS)
    spelled = {"table": "diningtable", "bedclothes": "bedcloth", "cloth": "clothes"}
    all_names = [f"{i}: {classes.get(i, f'other{i}')}" for i in range(1, 460)]
    write_text(base / "labels.txt", *all_names)
    few = [f"{i + 1}: {spelled.get(name, name)}" for i, name in enumerate(classes.values())]
    write_text(base / "59_labels.txt", *reversed(few))
    return maps


def context_json(root):
    """Two images, regions over one another; returns the numbers that result."""
    base, maps = root / "VOC2010", {}
    context_images(base)
    images, regions = [], []
    for index, key in enumerate(CONTEXT_KEYS):
        entry = {"image_id": index + 7, "file_name": f"{key}.jpg", "phase": "val"}
        images.append({**entry, "height": SIZE[0], "width": SIZE[1]})
        maps[key] = np.zeros(SIZE, int)
        for number, mask in ((284, box(0, 0, 4, 9)), (431, box(0, 0, 2, 2)), (2, box(3, 1, 6, 5))):
            part = {"image_id": index + 7, "segmentation": run_lengths(mask)}
            regions.append({**part, "category_id": number})
            maps[key][mask] = number
    images.append({**images[0], "image_id": 1, "file_name": "none.jpg", "phase": "train"})
    document = {"images": images, "annos_segmentation": regions}
    (base / "trainval_merged.json").write_text(json.dumps(document))
    return maps


def context_png(root):
    """Two masks as other programs convert them; returns their values, which are the labels."""
    write_text(root / "ImageSets" / "SegmentationContext" / "val.txt", *CONTEXT_KEYS)
    paths = ("JPEGImages/{key}.jpg", "SegmentationClassContext/{key}.png")
    return write_pairs(root, CONTEXT_KEYS, [0, 1, 37, 59], *paths)
