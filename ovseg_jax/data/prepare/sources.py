"""Sources to prepare by name: the place to add one."""

from collections.abc import Callable

from ovseg_jax.data.prepare.raw import PairSource
from ovseg_jax.data.prepare.source_files import FileSource
from ovseg_jax.data.prepare.source_img2dataset import Img2DatasetSource
from ovseg_jax.data.prepare.source_scenes import ScenePairs
from ovseg_jax.data.prepare.source_tfds import TfdsSource
from ovseg_jax.errors import UserError

# Kind -> how to open what stands behind the colon; the second argument is --images.
SOURCES: dict[str, Callable[[str, str | None], PairSource]] = {
    "img2dataset": lambda text, images: Img2DatasetSource(text),
    "files": FileSource,
    "tfds": lambda text, images: TfdsSource(text),
    "scenes": lambda text, images: ScenePairs(text),
}


def open_source(spec: str, images: str | None = None) -> PairSource:
    """The source that 'KIND:WHERE' names.

    Args:
      images: the folder of image files, for 'files'.

    Raises:
      UserError: an unknown kind, or what the source itself refuses.
    """
    kind, colon, where = spec.partition(":")
    if kind not in SOURCES or not colon or not where:
        forms = "img2dataset:DIR, files:FILE.tsv, tfds:NAME, scenes:N"
        raise UserError(f"--source={spec} is none of: {forms}")
    if images and kind != "files":
        raise UserError(f"--images goes with --source=files:FILE, not with {kind}")
    return SOURCES[kind](where, images)
