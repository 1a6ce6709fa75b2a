"""What all else is written in: arrays, sets of keys, tiles of queries, checks."""
