"""Flax NNX transformer on hsrjax attention, published models as this transformer.

Each layer imports only those below it:

generate, evaluate, explore   commands: `python -m models.NAME`
opening, command              any model by its path;   what commands share
evaluation/, exploration/     what a model can do;   what its heads do, as a page
files/                        formats of files, reading and writing
decoding/                     texts continued: sampling, growing caches
network/, text/               the transformer;   tokenizers.   Neither knows a format

Run from the repository's root; this package is not part of the hsrjax wheel.
"""
