"""Records whose key an earlier record has, over all parts, in memory that does not grow with them.

Keys are hashed; a hash falls into one of many buckets; a bucket is searched on its own.
"""

import numpy as np
from jaxtyping import Int64

from ovseg_jax.data.prepare.parts import PartPaths, read_digests
from ovseg_jax.data.prepare.places import Place

# Keys in a bucket, about: 10 MB while it is searched.
_PER_BUCKET = 2**17


def bucket_count(records: int) -> int:
    """How many buckets for so many records."""
    return max(1, -(-records // _PER_BUCKET))


def duplicates_in_bucket(
    work: Place, parts: int, bucket: int, buckets: int
) -> Int64[np.ndarray, "duplicates 2"]:
    """(part, position in it) of each record of a bucket whose key an earlier record has.

    Args:
      work: the folder with all parts, 0 to `parts` - 1, finished.
    """
    found, where = [], []
    for part in range(parts):
        digests = read_digests(PartPaths(work, part))
        members = np.flatnonzero(digests[:, 0] % np.uint64(buckets) == bucket)
        found.append(digests[members])
        where.append(np.stack([np.full_like(members, part), members], axis=1))
    keys = np.concatenate(found)
    places = np.concatenate(where).astype(np.int64)
    # Stable: equal keys stay in the order of the records.
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    keys, places = keys[order], places[order]
    again = np.zeros(len(keys), bool)
    again[1:] = (keys[1:] == keys[:-1]).all(axis=1)
    return places[again]
