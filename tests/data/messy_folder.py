"""A folder in which nearly everything is wrong once, and its preparation."""

from pair_folders import encoded, jpeg, write_img2dataset
from PIL import Image

from ovseg_jax.data.entities import EntitySet
from ovseg_jax.data.prepare.pipeline import EntityChoice, prepare
from ovseg_jax.data.prepare.rules import Rules
from ovseg_jax.data.prepare.source_img2dataset import Img2DatasetSource
from ovseg_jax.prepare import local_jobs

NOUNS = ["dog", "cat", "bus", "tree"]
ENTITIES = EntitySet({"dog": ["puppy"], "cat": [], "bus": [], "unicorn": []})
CHOICE = EntityChoice(ENTITIES.table, "a test")


def good_pair(number):
    """(key, caption, image) with nothing wrong."""
    named = f"a {NOUNS[number % 4]} and a {NOUNS[number // 4 % 4]}"
    return f"{number:09d}", f"{named} &amp; more" if number % 7 == 0 else named, jpeg(number)


def write_folder(path):
    """Five shards of eight pairs, with one of nearly everything that goes wrong."""
    for shard in range(5):
        pairs = [good_pair(8 * shard + n) for n in range(8)]
        if shard == 1:
            # The first holder of the key is broken: the second is no duplicate.
            pairs[0] = ("twice", "a dog", b"broken")
            pairs[1] = ("000000002", "a cat too many", jpeg(99))
            pairs[2] = ("a", "a tiny dog", encoded(Image.new("RGB", (3, 3))))
        if shard == 2:
            pairs[0] = ("twice", "a dog", jpeg(98))
            pairs[1] = ("twice", "a dog again", jpeg(97))
            pairs[2] = ("b", b"a dog \xff", jpeg(96))
        if shard == 3:  # nothing is kept
            pairs = [(key, "a tree", image) for key, _, image in pairs]
        write_img2dataset(path, shard, pairs, failed=[f"f{shard}"] if shard != 4 else [])
    cut = path / "00004.tar"
    data = cut.read_bytes().rstrip(b"\0")
    cut.write_bytes(data[: len(data) // 2])
    return path


def run(folder, out, **changes):
    """Prepares a folder with `CHOICE` and the usual rules, silently; returns the report."""
    options = {"choice": CHOICE, "rules": Rules(), "run_jobs": local_jobs(0), "say": lambda line: 0}
    return prepare(Img2DatasetSource(folder), out, **options | changes)


def files(directory):
    """Name -> content of all files of a folder."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}
