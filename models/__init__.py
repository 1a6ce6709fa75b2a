"""Flax NNX transformer on hsrjax attention: model, run folders, sampling, generation.

Run from the repository's root; this package is not part of the hsrjax wheel.
"""
