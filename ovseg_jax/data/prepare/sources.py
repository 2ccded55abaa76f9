"""Sources to prepare by name: the place to add one."""

from collections.abc import Callable
from typing import Any

from ovseg_jax.data.prepare.raw import PairSource
from ovseg_jax.data.prepare.source_files import FileSource
from ovseg_jax.data.prepare.source_folders import FolderSource
from ovseg_jax.data.prepare.source_img2dataset import Img2DatasetSource
from ovseg_jax.data.prepare.source_scenes import ScenePairs
from ovseg_jax.data.prepare.source_tfds import TfdsSource
from ovseg_jax.errors import UserError

# Kind -> how to open what stands behind the colon.
SOURCES: dict[str, Callable[..., PairSource]] = {
    "img2dataset": Img2DatasetSource,
    "files": FileSource,
    "folders": FolderSource,
    "tfds": TfdsSource,
    "scenes": ScenePairs,
}
# Flag -> the kind that it goes with, which takes it by this name.
_FLAGS = {"images": "files", "hypernyms": "folders"}


def open_source(spec: str, images: str | None = None, hypernyms: bool = False) -> PairSource:
    """The source that 'KIND:WHERE' names.

    Args:
      images: the folder of image files, for 'files'.
      hypernyms: add wider words to class names, for 'folders'.

    Raises:
      UserError: an unknown kind, or what the source itself refuses.
    """
    kind, colon, where = spec.partition(":")
    if kind not in SOURCES or not colon or not where:
        forms = "img2dataset:DIR, files:FILE.tsv, folders:DIR, tfds:NAME, scenes:N"
        raise UserError(f"--source={spec} is none of: {forms}")
    options: dict[str, Any] = {"images": images, "hypernyms": hypernyms}
    for flag, value in options.items():
        if value and _FLAGS[flag] != kind:
            raise UserError(f"--{flag} goes with --source={_FLAGS[flag]}:, not with {kind}")
    own = {flag: value for flag, value in options.items() if _FLAGS[flag] == kind}
    return SOURCES[kind](where, **own)
