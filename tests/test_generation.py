"""`python -m benchmarks generate`: the same tokens by every implementation, timed."""

import csv
import json

import pytest

from benchmarks.__main__ import main
from benchmarks.commands import generate
from models.decoding.session import Session
from models.opening import open_model
from tests.made_up import run_of

pytestmark = pytest.mark.usefixtures("compile_cache")
KEYS = 120
"""A context in whose shapes the short prompt fits as well: one program for both."""


@pytest.fixture(scope="module")
def made(text, tmp_path_factory):
    """Makes a run folder of a kind of attention, each once."""
    folder = tmp_path_factory.mktemp("runs")

    def make(kind):
        if not (folder / kind).exists():
            run_of(folder / kind, text, attention_kind=kind)
        return folder / kind

    return make


@pytest.fixture
def run(made, tmp_path):
    """Runs the command on a model of a kind; its exit status."""

    def run(kind, *words):
        words = ["--model", str(made(kind)), "--quick", "--out", str(tmp_path), *words]
        return main(["generate", *words])

    return run


@pytest.mark.parametrize(
    "methods, keys",
    [
        (("dense", "hsr"), KEYS),
        pytest.param(generate.IMPLEMENTATIONS, 256, marks=pytest.mark.slow),
    ],
)
def test_small_run(methods, keys, run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(generate, "IMPLEMENTATIONS", methods)
    assert run("threshold_relu", "--json", "--contexts", str(keys)) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    with (tmp_path / "generate" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["implementation"] for row in rows] == list(methods)
    for row in rows:
        shown = (row["context"], row["tokens"], row["equal_tokens"])
        assert shown == (str(keys), "50", "50")
        assert float(row["ms"]) > 0
        assert float(row["keys_fired_percent"]) <= float(row["keys_looked_at_percent"])
    assert found["summary"][f"dense_{keys}"] == 1
    assert (tmp_path / "generate" / "generation.png").exists()


def test_models_that_race(made):
    relu, softmax = (open_model(made(x)).model for x in ("threshold_relu", "softmax"))
    assert list(generate.entrants(generate.Command(), relu)) == ["dense", "hsr", "auto"]
    command = generate.Command(r=(4,), epsilon=(0.1,), tail=1)
    found = {
        name: (one.config.top_r, one.config.epsilon, one.config.tail)
        for name, one in generate.entrants(command, softmax).items()
    }
    assert found == {
        "dense": (None, None, None),
        "top_r 4": (4, None, None),
        "epsilon 0.1": (None, 0.1, None),
        "top_r 4 tail 1": (4, None, 1),
        "epsilon 0.1 tail 1": (None, 0.1, 1),
    }


@pytest.mark.slow
def test_approximations_of_softmax_race_too(run, capsys):
    words = ["--json", "--contexts", str(KEYS), "--r", "4", "1000", "--tail", "1"]
    assert run("softmax", *words) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    found = {row["implementation"]: row for row in rows}
    plain = ["dense", "top_r 4", "top_r 1000"]
    assert list(found) == [*plain, "top_r 4 tail 1", "top_r 1000 tail 1"]
    for name in ("dense", "top_r 1000", "top_r 1000 tail 1"):
        assert found[name]["equal_tokens"] == 50
    for name in ("top_r 4", "top_r 4 tail 1"):
        assert found[name]["keys_looked_at_percent"] < 50


def test_other_tokens_are_an_error(run, capsys, monkeypatch):
    monkeypatch.setattr(generate, "IMPLEMENTATIONS", ("dense", "hsr"))
    fork, forks = Session.fork, []

    def spoiling(self, model):
        session = fork(self, model)
        forks.append(session)
        if len(forks) == 4:  # hsr, over the long context
            decode = session.decode

            def other():
                token, counts = decode()
                return token + 1, counts

            session.decode = other
        return session

    monkeypatch.setattr(Session, "fork", spoiling)
    assert run("threshold_relu", "--contexts", str(KEYS)) == 1
    assert f"wrong result: hsr, {KEYS} keys:" in capsys.readouterr().err


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
def test_refusals(run, words, message, capsys):
    assert run("threshold_relu", *words) == 2
    assert message in capsys.readouterr().err


def test_the_short_prompt_is_shorter():
    assert generate.SHORT < min(generate.CONTEXTS)
