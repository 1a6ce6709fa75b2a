"""The commands of train on one trained run: train itself, demo, report, length, ..."""

import dataclasses
import json
import os
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.decoding.generation import Generation, Phase
from models.files.runs import load_run
from train import data, demo, plots, step, telemetry
from train.__main__ import main
from train.commands import compare, length, report
from train.config import PRESETS
from train.files import metrics
from train.files.folder import read_text
from train.loop import train

STEPS = 30

pytestmark = pytest.mark.usefixtures("compile_cache")


@pytest.fixture(scope="module")
def config(text):
    return dataclasses.replace(
        PRESETS["micro"],
        data=str(text),
        steps=STEPS,
        eval_every=15,
        checkpoint_every=STEPS,
    )


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """Folder and results."""
    out = tmp_path_factory.mktemp("runs") / "<b>run"
    return out, train(config, out, progress=False)


@pytest.fixture
def copy(run, tmp_path):
    """A copy of the run, to be changed."""
    return shutil.copytree(run[0], tmp_path / "copy")


def last_json(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


# --- the header ---


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--preset", "huge"],
            "no preset 'huge': choose one of micro, tiny, study, base, small",
        ),
        (["--preset=huge"], "no preset 'huge'"),
        (["--data", "/no/such/text"], "no file or folder at /no/such/text"),
        (["--steps", "0"], "steps must be 1 or more, got 0"),
        (["--num-kv-heads", "3"], "num_heads must be a multiple of num_kv_heads"),
        (["--resume"], "nothing to resume"),
        (["report"], "no run was named"),
        (["report", "/no/such/run"], "is not a run folder"),
        (["compare"], "no run was named"),
        (["length"], "no run was named"),
        (["length", "/no/such/run"], "does not exist"),
        (["length", "/no", "--factors", "0"], "factors must be 1 or more"),
        (["speed"], "no run was named"),
        (["speed", "/no/such/run"], "does not exist"),
        (["speed", "/no", "--rounds", "0"], "rounds must be 1 or more"),
        (["speed", "/no", "--attention", "sparse"], "invalid choice"),
        (["export"], "missing: PATH Run folder"),
        (["study", "nonsense"], "there is no stage nonsense"),
    ],
)
def test_every_command_refuses_in_one_sentence(tmp_path, capsys, words, message):
    out = tmp_path / "out"
    assert main([*words, "--out", str(out)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "works", "says"),
    [
        ([], "train.__main__.train", "before the first step: nothing was saved"),
        (["study", "kinds"], "train.commands.study.study", "the same command goes on"),
        (["report", "run"], "train.commands.report.report", "nothing was written"),
    ],
)
def test_ctrl_c_says_what_is_left(tmp_path, capsys, monkeypatch, words, works, says):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(works, interrupted)
    assert main([*words, "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err.strip().endswith(says)


def test_help(capsys):
    for words, flag in (([], "--attention-kind"), (["speed"], "--row-length")):
        with pytest.raises(SystemExit) as stopped:
            main([*words, "--help"])
        assert stopped.value.code == 0
        assert flag in capsys.readouterr().out


# --- training, and the demo ---


def test_resume_takes_the_options_of_the_run(copy, capsys, run):
    assert main(["--out", str(copy), "--resume", "--json"]) == 0
    assert last_json(capsys)["validation_loss"] == run[1]["validation_loss"]
    assert main(["--out", str(copy), "--resume", "--preset", "tiny"]) == 2
    assert "(preset)" in capsys.readouterr().err


def test_options_of_the_model_are_reached(monkeypatch, tmp_path):
    seen = []

    def record(config, out, *, resume):
        seen.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr("train.__main__.train", record)
    arguments = ["--out", str(tmp_path / "run"), "--steps", "7", "--data-parallel"]
    arguments += ["--attention-kind", "softmax", "--attention", "hsr"]
    assert main(arguments) == 130
    assert seen[0].steps == 7
    assert seen[0].data_parallel
    assert seen[0].model.attention_kind == "softmax"
    assert seen[0].model.attention == "hsr"
    assert seen[0].model.num_layers == PRESETS["tiny"].model.num_layers


@pytest.mark.parametrize("equal", [True, False])
def test_demo_fails_when_tokens_differ(config, copy, capsys, monkeypatch, equal):
    phase = Phase(tokens=3, seconds=1.0, keys_looked_at=0.1, keys_fired=0.05)

    def generate(model, prompts, *, max_tokens, temperature, attention):
        tokens = [104, 105, 10 if equal or attention == "hsr" else 32]
        return Generation([tokens], phase, phase, 0.0)

    monkeypatch.setitem(PRESETS, "micro", config)
    monkeypatch.setattr(demo, "generate", generate)
    arguments = ["--preset", "micro", "--steps", str(STEPS), "--json"]
    assert demo.main([*arguments, "--out", str(copy)]) == (0 if equal else 1)
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert json.loads(lines[-1])["tokens_equal"] is equal
    assert "to start afresh" in " ".join(captured.out.split())
    assert ("different tokens" in captured.err) is not equal
    assert {"loss.png", "sparsity.png", "fires.png"} <= set(os.listdir(copy))


# --- pictures, and runs side by side ---


def test_pictures(run, tmp_path):
    out, _ = run
    plots.plot_loss(out, tmp_path / "loss.png")
    plots.plot_sparsity(out, tmp_path / "sparsity.png")
    model = load_run(out)
    tokens = jnp.asarray(np.frombuffer(b"def picture(self):\n    return", np.uint8))
    fired = plots.fired_keys(model, tokens.astype(jnp.int32))
    forward = jax.jit(lambda model, x: model(x, return_info=True)[1])
    infos = forward(model, tokens.astype(jnp.int32)[None])
    counts = np.stack([np.asarray(info.count[0]).T for info in infos])  # [L, N, T]
    np.testing.assert_array_equal(fired.sum(-1), counts)
    plots.plot_fires(fired, tmp_path / "fires.png")
    for name in ("loss.png", "sparsity.png", "fires.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def softmax_run(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "<b>softmax"
    model = dataclasses.replace(config.model, attention_kind="softmax")
    short = dataclasses.replace(config, model=model, steps=2, eval_every=1)
    return out, train(short, out, progress=False)


@pytest.mark.parametrize(
    "kind", ["threshold_relu", pytest.param("softmax", marks=pytest.mark.slow)]
)
def test_a_run_writes_its_heads_and_the_report_shows_them(
    kind, request, tmp_path, capsys
):
    fixture = "softmax_run" if kind == "softmax" else "run"
    folder, results = request.getfixturevalue(fixture)
    assert results["dead_heads"] == 0
    assert 0 <= results["empty_rows"] < 1 <= results["effective_keys"]
    header, *lines = (folder / "sparsity.csv").read_text().splitlines()
    assert header.split(",")[3:] == list(telemetry.COLUMNS)
    assert len(lines) == 2 * 2
    assert (",," in lines[0]) is (kind == "softmax")
    # Another seed is another run: as far as a report goes, its config says so.
    other = shutil.copytree(folder, tmp_path / "<b>other")
    content = json.loads((other / "config.json").read_text())
    content["train"]["seed"] = 1
    (other / "config.json").write_text(json.dumps(content))
    out = tmp_path / "report.html"
    words = ["report", str(folder), str(other), "--out", str(out), "--json"]
    assert main(words) == 0
    assert set(last_json(capsys)) == {folder.name, other.name}
    page = out.read_text()
    assert "http" not in page.replace("http-equiv", "")
    assert "<b>" not in page  # names are text, not markup
    assert len(re.findall(r"data:image/png;base64,\w", page)) == 3
    assert "train.seed" in page
    assert "train.learning_rate" not in page


def test_the_report_leaves_out_what_was_not_measured(copy, tmp_path):
    """Softmax has no thresholds and looks at every key: NaN, and no number at all."""
    report.report((copy,), tmp_path / "all.html")
    ones = np.ones((1, 2))
    with metrics.MetricsWriter(tmp_path, step=0) as writer:
        writer.write_heads(7, {"nonzero_fraction": ones, "survivors": np.nan * ones})
    lines = (tmp_path / "sparsity.csv").read_text().splitlines()
    assert lines[1:] == ["7,0,0,1,,,,,", "7,0,1,1,,,,,"]
    shutil.copyfile(tmp_path / "sparsity.csv", copy / "sparsity.csv")
    report.report((copy,), tmp_path / "some.html")
    every, some = ((tmp_path / f"{x}.html").read_text() for x in ("all", "some"))
    assert "Dead heads" in every
    assert "Step 7, " in some
    assert "Dead heads" not in some


def test_compare_keeps_curves_and_numbers(run, copy, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["compare", str(run[0]), str(copy), "--out", str(out), "--json"]) == 0
    results = last_json(capsys)
    assert list(results) == [run[0].name, copy.name]
    found = results[copy.name]
    assert found["validation_loss"] == pytest.approx(run[1]["validation_loss"])
    assert found["steps"] == found["config"]["train"]["steps"] == STEPS
    assert json.loads((out / "results.json").read_text())["runs"] == results
    kept = (out / f"{copy.name}.csv").read_text()
    assert kept == (copy / "metrics.csv").read_text()
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_runs_that_cannot_be_compared(copy, tmp_path):
    twin = shutil.copytree(copy, tmp_path / "elsewhere" / copy.name)
    with pytest.raises(ValueError, match="two runs are named"):
        compare.collect((copy, twin))
    header, first, *_ = (twin / "metrics.csv").read_text().splitlines()
    (twin / "metrics.csv").write_text(f"{header}\n{first}\n")
    with pytest.raises(ValueError, match="was never evaluated"):
        compare.collect((twin,))


# --- longer rows, and the time of a step ---


def test_rows_are_whole_spread_and_limited():
    stretches = [np.arange(100), np.arange(1000, 1050)]
    rows = length.rows_of(stretches, 19, limit=10**6)
    assert rows.shape == (7, 20)
    np.testing.assert_array_equal(rows[-1], np.arange(1020, 1040))
    assert length.rows_of(stretches, 19, limit=57).shape == (3, 20)
    with pytest.raises(ValueError, match=r"has 100 tokens, fewer than rows of 100"):
        length.rows_of(stretches, 100, limit=10**6)


def test_at_the_training_length_it_is_the_loss_of_training(run):
    model = load_run(run[0])
    _, corpus, _ = read_text(run[0])
    stretches = data.held_out(corpus, row_length=32)
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


def test_length_writes_table_and_picture(run, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["length", str(run[0]), "--factors", "1", "4", "--tokens", "256"]
    assert main([*words, "--out", str(out), "--json"]) == 0
    rows = last_json(capsys)
    assert [row["row_length"] for row in rows] == [32, 128]
    assert [row["rows"] for row in rows] == [8, 2]
    assert json.loads((out / "length.json").read_text()) == rows
    assert (out / "length.png").read_bytes()[:4] == b"\x89PNG"
    assert len((out / "length.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize("other", ["auto", pytest.param("hsr", marks=pytest.mark.slow)])
def test_speed_starts_from_the_trained_model(
    run, tmp_path, capsys, count_compiles, other
):
    folder, results = run
    out = tmp_path / "speed.json"
    words = ["speed", str(folder), "--attention", "dense", other, "--rounds", "2"]
    with count_compiles() as compiles:
        assert main([*words, "--batch", "4", "--out", str(out), "--json"]) == 0
    assert compiles["train_step"] == 2  # or the time of a step is that of compiling it
    rows = last_json(capsys)
    assert json.loads(out.read_text()) == rows
    dense, same = rows
    assert (dense["attention"], dense["batch"], dense["row_length"]) == ("dense", 4, 32)
    assert dense["over_dense"] == 1
    assert dense["tokens_per_second"] > 0
    # Not those of a model that knows nothing, whose loss is log(256) = 5.5.
    assert abs(dense["loss"] - results["train_loss"]) < 0.7
    assert same["attention"] == other
    assert same["loss"] == pytest.approx(dense["loss"], rel=1e-3)
