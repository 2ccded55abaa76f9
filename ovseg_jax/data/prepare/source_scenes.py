"""Scenes, the embedded data set, as a source to prepare: for trying everything without data."""

from collections.abc import Iterator

from ovseg_jax.data.prepare.raw import InputShard, RawPair
from ovseg_jax.data.scenes import ScenesSource
from ovseg_jax.errors import UserError

_PER_SHARD = 1000
_DEFAULTS = {"size": 224, "seed": 0}


class ScenePairs:
    """The first N scenes of the train split: 'N', or 'N,size=96,seed=1'.

    Raises:
      UserError: the text is not of that form.
    """

    name = "scenes"

    def __init__(self, text: str):
        count, *rest = text.split(",")
        fields = dict(_DEFAULTS)
        try:
            for part in rest:
                name, _, value = part.partition("=")
                if name not in fields:
                    raise ValueError(name)
                fields[name] = int(value)
            number = int(count)
        except ValueError as error:
            raise UserError(
                f"--source=scenes:{text} is not of the form scenes:1000 or "
                "scenes:1000,size=224,seed=0"
            ) from error
        self._source = ScenesSource("train", number, fields["seed"], fields["size"])

    def shards(self) -> list[InputShard]:
        total = len(self._source)
        return [
            InputShard(f"scenes {start}", start, min(start + _PER_SHARD, total))
            for start in range(0, total, _PER_SHARD)
        ]

    def read(self, shard: InputShard, *, images: bool = True) -> Iterator[RawPair]:
        for index in range(shard.start, shard.stop):
            record = self._source[index]
            yield RawPair(record.key, tuple(record.captions), record.image)
