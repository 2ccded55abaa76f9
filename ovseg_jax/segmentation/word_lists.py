"""Lists of classes that can be called by name, or read from a file."""

from pathlib import Path

from ovseg_jax.data.benchmarks import OPENERS, class_table
from ovseg_jax.errors import UserError
from ovseg_jax.flags import nearest


def word_list(name: str) -> tuple[str, ...]:
    """The classes of an evaluation set ('voc', 'coco_object', 'ade20k', ...; 'coco' is the 80
    objects), or of a text file with one class a line, synonyms between bars.

    Raises:
      UserError: there is no such list, or the file is empty or no text.
    """
    if name in OPENERS or name == "coco":
        return class_table("coco_object" if name == "coco" else name).words
    path = Path(name)
    if not path.is_file():
        known = ("coco", *OPENERS)
        raise UserError(
            f"--vocabulary={name}: no such file, and no such list{nearest(name, known)}; lists: "
            f"{', '.join(known)}"
        )
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"--vocabulary={name} is no text file") from None
    words = tuple(line.strip() for line in lines if line.strip())
    if not words:
        raise UserError(f"--vocabulary={name} lists no classes")
    return words
