"""`python -m benchmarks generate`: the same tokens by every implementation, timed."""

import csv
import dataclasses
import json

import pytest

from benchmarks import generation
from benchmarks.__main__ import main
from models.decoding.session import Session
from train.config import PRESETS
from train.loop import train


@pytest.fixture(scope="module")
def model(text, tmp_path_factory):
    return trained(text, tmp_path_factory.mktemp("runs") / "run")


def trained(text, out, **changes):
    import jax

    config = dataclasses.replace(
        PRESETS["micro"], data=str(text), steps=20, eval_every=20, telemetry_rows=0
    )
    shape = dataclasses.replace(config.model, **changes)
    config = dataclasses.replace(config, model=shape)
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


def test_approximations_of_softmax_race_too(text, tmp_path, capsys):
    run = trained(text, tmp_path / "run", attention_kind="softmax")
    words = ["generate", "--model", str(run), "--quick", "--json", "--r", "4", "1000"]
    assert main([*words, "--tail", "1", "--out", str(tmp_path)]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    found = {row["implementation"]: row for row in rows}
    plain = ["dense", "top_r 4", "top_r 1000"]
    assert list(found) == [*plain, "top_r 4 tail 1", "top_r 1000 tail 1"]
    for name in ("dense", "top_r 1000", "top_r 1000 tail 1"):
        assert found[name]["equal_tokens"] == 50
    for name in ("top_r 4", "top_r 4 tail 1"):
        assert found[name]["keys_looked_at_percent"] < 50


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
        (["--tail", "8"], "needs --r or --epsilon"),
        (["--model", "/no/such"], "does not exist"),
        (["--contexts", "9000000"], "fewer than a context of"),
    ],
)
def test_refusals(model, words, message, capsys, tmp_path):
    words = ["--model", str(model), *words, "--out", str(tmp_path)]
    assert main(["generate", *words]) == 2
    assert message in capsys.readouterr().err
    assert generation.SHORT < 256
