"""Counts of what was read, kept and dropped, that add up over shards."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

# Keys shown for each cause, so that a person can look one up.
_EXAMPLES = 5


@dataclass
class Tally:
    """Counts of some pairs: `read` = `kept` + all that was dropped.

    Attributes:
      captions: of the pairs that are kept, those that are.
      captions_dropped: cause -> captions of kept pairs that are not.
      dropped: cause -> pairs.
      examples: cause -> the first keys.
      remarks: what was unusual about pairs that passed the rules (duplicates too) -> pairs.
      damage: what was wrong with whole shards, in words.
    """

    read: int = 0
    kept: int = 0
    captions: int = 0
    captions_dropped: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    remarks: Counter[str] = field(default_factory=Counter)
    damage: list[str] = field(default_factory=list)

    def keep(self, captions: int, dropped: tuple[str, ...], remarks: tuple[str, ...]) -> None:
        """Counts a pair that is kept, with the causes of its captions that are not."""
        self.read += 1
        self.kept += 1
        self.captions += captions
        self.captions_dropped.update(dropped)
        self.remarks.update(remarks)

    def drop(self, key: str, cause: str) -> None:
        """Counts a pair that is dropped."""
        self.read += 1
        self.dropped[cause] += 1
        self._example(key, cause)

    def drop_kept(self, key: str, captions: int, cause: str) -> None:
        """Counts a pair as dropped that was counted as kept with so many captions."""
        self.kept -= 1
        self.captions -= captions
        self.dropped[cause] += 1
        self._example(key, cause)

    def damaged(self, shard: str, what: str) -> None:
        """Notes what is wrong with a shard."""
        self.damage.append(_printable(f"{shard}: {what}"))

    def _example(self, key: str, cause: str) -> None:
        keys = self.examples.setdefault(cause, [])
        if len(keys) < _EXAMPLES:
            keys.append(_printable(key))

    def add(self, other: "Tally") -> None:
        """Adds the counts of a later shard."""
        self.read += other.read
        self.kept += other.kept
        self.captions += other.captions
        self.captions_dropped.update(other.captions_dropped)
        self.dropped.update(other.dropped)
        self.remarks.update(other.remarks)
        self.damage.extend(other.damage)
        for cause, keys in other.examples.items():
            mine = self.examples.setdefault(cause, [])
            mine.extend(keys[: _EXAMPLES - len(mine)])

    def to_json(self) -> dict[str, Any]:
        """As plain values, for a file."""
        return {
            "read": self.read,
            "kept": self.kept,
            "captions": self.captions,
            "captions_dropped": dict(self.captions_dropped),
            "dropped": dict(self.dropped),
            "examples": self.examples,
            "remarks": dict(self.remarks),
            "damage": self.damage,
        }

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> "Tally":
        """Inverse of `to_json`."""
        names = ("captions_dropped", "dropped", "remarks")
        counters = {name: Counter(document[name]) for name in names}
        return cls(**{**document, **counters})


def _printable(name: str) -> str:
    """A name of a file or pair whose bytes may be no UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()
