"""Flax NNX transformer on hsrjax attention, published models as this transformer.

Each layer imports only those below it:

generate, evaluate   commands: `python -m models.NAME`
opening, command     any model by its path;   what commands share
evaluation/, files/  what a model can do;   formats of files, reading and writing
decoding/            texts continued: sampling, growing caches
network/, text/      the transformer;   tokenizers.   Neither knows a file format

Run from the repository's root; this package is not part of the hsrjax wheel.
"""
