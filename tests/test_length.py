"""Longer rows than in training: the same held-out text, cut anew."""

import numpy as np
import pytest

from train import data
from train.commands import length


def test_stretches_are_the_held_out_rows_in_order():
    corpus = data.load_corpus()
    _, rows = data.split(corpus, row_length=32)
    stretches = length.held_out(corpus, row_length=32)
    assert len(stretches) == data.SEGMENTS
    together = np.concatenate(stretches)
    np.testing.assert_array_equal(together, rows[np.arange(len(rows))].reshape(-1))
    first = corpus.data[rows.numbers[0] * 33 :][: stretches[0].size]
    np.testing.assert_array_equal(stretches[0], first)


def test_rows_are_whole_spread_and_limited():
    stretches = [np.arange(100), np.arange(1000, 1050)]
    rows = length.rows_of(stretches, 19, limit=10**6)
    assert rows.shape == (7, 20)
    np.testing.assert_array_equal(rows[-1], np.arange(1020, 1040))
    assert length.rows_of(stretches, 19, limit=57).shape == (3, 20)
    with pytest.raises(ValueError, match=r"has 100 tokens, fewer than rows of 100"):
        length.rows_of(stretches, 100, limit=10**6)
