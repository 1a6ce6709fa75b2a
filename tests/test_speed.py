"""Training steps from trained parameters: the same ones, by every implementation."""

import dataclasses
import json

import pytest

from train.__main__ import main
from train.config import PRESETS
from train.loop import train


@pytest.fixture
def run(text, tmp_path, lenient_promotion):
    config = dataclasses.replace(
        PRESETS["micro"], data=str(text), steps=30, eval_every=30, telemetry_rows=0
    )
    return tmp_path / "run", train(config, tmp_path / "run", progress=False)


def test_steps_start_from_the_trained_model(run, tmp_path, capsys, lenient_promotion):
    folder, results = run
    out = tmp_path / "speed.json"
    words = ["speed", str(folder), "--attention", "dense", "hsr", "--rounds", "2"]
    assert main([*words, "--batch", "4", "--out", str(out), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads(out.read_text()) == rows
    dense, hsr = rows
    assert (dense["attention"], dense["batch"], dense["row_length"]) == ("dense", 4, 32)
    assert dense["over_dense"] == 1
    assert dense["tokens_per_second"] > 0
    # Not those of a model that knows nothing, whose loss is log(256) = 5.5.
    assert abs(dense["loss"] - results["train_loss"]) < 0.7
    assert hsr["loss"] == pytest.approx(dense["loss"], rel=1e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no run was named"),
        (["/no/such/run"], "does not exist"),
        (["/no", "--rounds", "0"], "rounds must be 1 or more"),
        (["/no", "--attention", "sparse"], "invalid choice"),
    ],
)
def test_refusals(words, message, capsys):
    assert main(["speed", *words]) == 2
    assert message in capsys.readouterr().err
