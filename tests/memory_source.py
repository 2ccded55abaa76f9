"""A list of records as a record source."""

import hashlib


class MemorySource:
    """Records that are held in memory."""

    def __init__(self, records, name="memory"):
        self._records = list(records)
        self.name = name

    def __len__(self):
        return len(self._records)

    def __getitem__(self, index):
        return self._records[index]

    def keys(self):
        return [record.key for record in self._records]

    def captions(self):
        return [record.captions for record in self._records]

    def fingerprint(self):
        return hashlib.sha256(repr(self._records).encode("utf-8", "surrogatepass")).hexdigest()[:16]
