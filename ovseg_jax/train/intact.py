"""Whether a checkpoint's files are all there and as long as they were written.

Orbax commits a checkpoint by renaming its directory, so that a killed process leaves none half
written. Disks still lose the ends of files (a crash of the machine, a copy that was cut off), and
reading those ends in an error from deep inside, on one process of many.
"""

import json
import shutil
from pathlib import Path

LIST = "files.json"


def write_list(directory: Path) -> None:
    """Notes the sizes of the files of a checkpoint that is complete but not yet committed.

    Args:
      directory: of one step, with a folder for each item. Files beside the folders are Orbax's
        notes about the commit itself, which go on changing.
    """
    sizes = {
        path.relative_to(directory).as_posix(): path.stat().st_size
        for folder in directory.iterdir()
        if folder.is_dir()
        for path in folder.rglob("*")
        if path.is_file()
    }
    (directory / LIST).write_text(json.dumps(sizes, indent=1, sort_keys=True), encoding="utf-8")


def fault(directory: Path) -> str:
    """What is wrong with a committed checkpoint, in words; "" where nothing is."""
    try:
        sizes = json.loads((directory / LIST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"its list of files, {LIST}, is missing or damaged"
    for name, size in sizes.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes of {size}"
    return ""


def refused_space(directory: Path, needed: int) -> str:
    """Why a checkpoint of `needed` bytes does not fit, "" where it does."""
    free = shutil.disk_usage(directory).free
    if free >= needed:
        return ""
    return f"{directory} has {free / 1e6:.1f} MB left, the checkpoint takes {needed / 1e6:.1f} MB"
