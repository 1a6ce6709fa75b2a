"""Longer rows than in training: the same text, the loss where it is new."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from models.files.runs import load_run
from train import data, length, step
from train.__main__ import main
from train.config import PRESETS
from train.loop import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    config = dataclasses.replace(
        PRESETS["micro"], steps=4, eval_every=4, telemetry_rows=0
    )
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        train(config, out, progress=False)
    return out


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


def test_at_the_training_length_it_is_the_loss_of_training(run, lenient_promotion):
    model = load_run(run)
    stretches = length.held_out(data.load_corpus(), row_length=32)
    rows = length.rows_of(stretches, 32, limit=320)
    found = length.measure(model, rows, token_bytes=np.ones(256, np.int32))
    losses, fired = jax.jit(step.row_losses)(model, rows)
    assert found["loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
    assert found["nonzero_fraction"] == pytest.approx(float(fired.mean()), rel=1e-4)
    logits = np.asarray(jax.jit(lambda m, x: m(x))(model, rows[:, :-1].astype(int)))
    chances = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1))[..., None]
    n, t = np.indices((len(rows), 32))
    each = -chances[n, t, rows[:, 1:]]
    assert found["loss_last_half"] == pytest.approx(each[:, 16:].mean(), rel=1e-5)
    assert found["loss_last_half"] != pytest.approx(found["loss"], rel=1e-5)
    twice = length.measure(model, rows, token_bytes=np.full(256, 2, np.int32))
    assert twice["loss_last_half"] == pytest.approx(found["loss_last_half"] / 2)


def test_command_writes_table_and_picture(run, tmp_path, capsys, lenient_promotion):
    out = tmp_path / "out"
    words = ["length", str(run), "--factors", "1", "4", "--tokens", "256"]
    assert main([*words, "--out", str(out), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["row_length"] for row in rows] == [32, 128]
    assert [row["rows"] for row in rows] == [8, 2]
    assert json.loads((out / "length.json").read_text()) == rows
    assert (out / "length.png").read_bytes()[:4] == b"\x89PNG"
    assert len((out / "length.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no run was named"),
        (["/no/such/run"], "does not exist"),
        (["/no", "--factors", "0"], "factors must be 1 or more"),
    ],
)
def test_refusals(words, message, capsys):
    assert main(["length", *words]) == 2
    assert message in capsys.readouterr().err
