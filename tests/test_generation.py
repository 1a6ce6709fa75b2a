"""`python -m benchmarks generate`: the same tokens by every implementation, timed."""

import csv
import dataclasses
import json

import pytest

from benchmarks import generation
from benchmarks.__main__ import main
from models.decoding import Session
from train.config import PRESETS
from train.loop import train


@pytest.fixture(scope="module")
def model(text, tmp_path_factory):
    import jax

    out = tmp_path_factory.mktemp("runs") / "run"
    config = dataclasses.replace(
        PRESETS["micro"], data=str(text), steps=20, eval_every=20, telemetry_rows=0
    )
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        train(config, out, progress=False)
    return out


def test_small_run(model, tmp_path, capsys):
    words = ["generate", "--model", str(model), "--quick", "--json"]
    assert main([*words, "--out", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    with (tmp_path / "generate" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["implementation"] for row in rows] == ["dense", "hsr", "auto"]
    for row in rows:
        assert (row["context"], row["tokens"], row["equal_tokens"]) == (
            "256",
            "50",
            "50",
        )
        assert float(row["ms"]) > 0
        assert float(row["keys_fired_percent"]) <= float(row["keys_looked_at_percent"])
    assert found["summary"]["dense_256"] == 1
    assert (tmp_path / "generate" / "generation.png").exists()


def test_other_tokens_are_an_error(model, tmp_path, capsys, monkeypatch):
    fork, forks = Session.fork, []

    def spoiling(self, model):
        session = fork(self, model)
        forks.append(session)
        if len(forks) == 5:  # hsr, over the long context
            decode = session.decode

            def other():
                token, counts = decode()
                return token + 1, counts

            session.decode = other
        return session

    monkeypatch.setattr(Session, "fork", spoiling)
    words = ["generate", "--model", str(model), "--quick", "--out", str(tmp_path)]
    assert main(words) == 1
    assert "wrong result: hsr, 256 keys:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--contexts", "0"], "contexts must be 1 or more"),
        (["--tokens", "3"], "tokens must be 50 or more"),
        (["--model", "/no/such"], "does not exist"),
        (["--contexts", "9000000"], "fewer than a context of"),
    ],
)
def test_refusals(model, words, message, capsys, tmp_path):
    words = ["--model", str(model), *words, "--out", str(tmp_path)]
    assert main(["generate", *words]) == 2
    assert message in capsys.readouterr().err
    assert generation.SHORT < 256
