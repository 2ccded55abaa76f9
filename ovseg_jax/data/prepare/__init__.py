"""From captioned images as people have them to a folder of records that training reads.

A source (img2dataset shards, a table of captions, a TFDS set, scenes) is a list of input shards.
A pure function processes an input shard: records that passed every rule, and counts of all that was
dropped, by cause. The outputs are then freed of duplicate keys and put together.
"""
