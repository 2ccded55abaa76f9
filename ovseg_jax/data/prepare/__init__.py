"""From captioned images as people have them to a folder of records that training reads.

A source is a list of input shards. A pure function makes of each the records that pass every rule,
and counts of all that was dropped, by cause. Then duplicate keys go, and the rest is put together.
"""
