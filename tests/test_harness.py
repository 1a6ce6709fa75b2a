"""lm-evaluation-harness: likelihoods by definition, texts that end, one command."""

import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import evaluate as command
from models.evaluation import harness
from models.opening import open_model
from tests.made_up import run_of


class Request:
    def __init__(self, *args):
        self.args = args


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness") / "run"
    run_of(folder, str(text), attention="dense", tie_embeddings=False)
    return folder


@pytest.fixture(scope="module")
def opened(run):
    return open_model(run)


@pytest.fixture(scope="module")
def chances(opened):
    """ln of the probability of each next byte, f64[T, V], of a text of up to 64."""
    graphdef, state = nnx.split(opened.model)
    read = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))

    def of(text):
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(text)] = list(text)
        logits = np.asarray(read(state, jnp.asarray(padded))[0], np.float64)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    return of


def expected(chances, seen, said):
    """By definition: nats of bytes behind others, and whether all are the likeliest."""
    found = chances(seen + said)
    places = range(len(seen) - 1, len(seen) + len(said) - 1)
    nats = sum(found[place, byte] for place, byte in zip(places, said, strict=True))
    return nats, all(
        found[place].argmax() == byte for place, byte in zip(places, said, strict=True)
    )


def test_likelihoods_by_definition(opened, chances):
    lm = harness.HarnessModel(*opened, max_length=40)
    starts = [b"def " + bytes([letter]) for letter in b"abcdefghijklmnopqrstuvwxyz"]
    likeliest = [(start, int(chances(start)[4].argmax())) for start in starts]
    start, best = next(pair for pair in likeliest if 32 < pair[1] < 127)
    cases = [
        (("def f(", "self"), b"def f(", b"self"),
        (("def f( ", "self"), b"def f(", b" self"),  # a space goes with its word
        ((start.decode(), chr(best)), start, bytes([best])),
        (("", "self"), b"\n", b"self"),
        (("x" * 100, "self"), b"x" * 36, b"self"),  # the beginning is lost
    ]
    found = lm.loglikelihood([Request(*args) for args, _, _ in cases])
    for (nats, greedy), (args, seen, said) in zip(found, cases, strict=True):
        want, is_greedy = expected(chances, seen, said)
        assert nats == pytest.approx(want, rel=1e-4), args
        assert greedy == is_greedy, args
    assert found[2][1]
    assert not found[0][1]


def test_whole_texts_are_read_in_rows_that_do_not_overlap(opened, chances):
    text = "def f(self): return self.value\n" * 2
    lm = harness.HarnessModel(*opened, max_length=40)
    (found,) = lm.loglikelihood_rolling([Request(text)])
    said = text.encode()
    first, _ = expected(chances, b"\n", said[:39])
    second, _ = expected(chances, said[38:39], said[39:])
    assert found == pytest.approx(first + second, rel=1e-4)


def test_continuations_end_where_they_are_told_to(opened, monkeypatch):
    asked = []

    def generate(model, prompts, **options):
        asked.append((prompts, options))
        return types.SimpleNamespace(tokens=[list(b"one\ntwo. three")])

    monkeypatch.setattr(harness, "generate", generate)
    lm = harness.HarnessModel(*opened, max_length=20)
    requests = [
        Request("ab", {"until": ["\n", "."]}),
        Request("ab", {"until": ".", "do_sample": True, "top_p": 0.9, "min_p": 0.0}),
        Request("ab" * 50, {"max_gen_toks": 8, "temperature": 0.7}),
    ]
    texts = lm.generate_until(requests)
    assert texts == ["one", "one\ntwo", "one\ntwo. three"]
    prompts, options = zip(*asked, strict=True)
    assert [len(prompt[0]) for prompt in prompts] == [1, 1, 12]
    assert [x["max_tokens"] for x in options] == [256, 256, 8]
    assert [x["temperature"] for x in options] == [0.0, 1.0, 0.0]
    assert [x.get("top_p") for x in options] == [None, 0.9, None]
    assert all("min_p" not in x for x in options)


@pytest.fixture
def package(monkeypatch):
    """What of lm-eval is used."""

    class LM:
        def __init__(self):
            self.is_lm = True

    asked = []

    def simple_evaluate(lm, *, tasks, **options):
        assert isinstance(lm, LM)
        assert lm.is_lm
        if tasks == ["none"]:
            raise KeyError("none")
        asked.append((tasks, options))
        lm.loglikelihood([Request("def", " f")])
        numbers = {"alias": "a", "acc,none": 0.5, "acc_stderr,none": "N/A"}
        return {"results": dict.fromkeys(tasks, numbers)}

    names = ("lm_eval", "lm_eval.api", "lm_eval.api.model")
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["lm_eval"].simple_evaluate = simple_evaluate
    sys.modules["lm_eval.api.model"].LM = LM
    return asked


def test_the_command_runs_tasks(package, run, tmp_path, capsys):
    words = ["harness", "--model", str(run), "--attention", "dense", "--json"]
    words += ["--tasks", "arc", "boolq", "--limit", "3", "--out", str(tmp_path)]
    assert command.main(words) == 0
    assert package == [(["arc", "boolq"], {"num_fewshot": None, "limit": 3})]
    printed = capsys.readouterr().out
    assert "dense: arc: acc 0.5\n" in printed
    rows = json.loads(printed.splitlines()[-1])["results"]
    about = {"attention": "dense", "metric": "acc", "value": 0.5}
    assert rows == [about | {"task": task} for task in ("arc", "boolq")]
    assert len((tmp_path / "harness.csv").read_text().splitlines()) == 3
    words = ["harness", "--model", str(run), "--tasks", "none"]
    assert command.main(words) == 2
    assert "lm-eval has no task 'none'" in capsys.readouterr().err


def test_a_package_that_is_missing_is_one_sentence(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert command.main(["harness", "--model", str(run), "--tasks", "arc"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: lm-evaluation-harness cannot be imported")
    assert error.endswith("pip install lm-eval")
