"""train: loss and schedules, the loop, resume bit for bit, refusals."""

import csv
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.files.runs import load_run
from models.network.transformer import ThresholdScale, abstract_model
from train import data, step
from train.__main__ import main
from train.config import PRESETS, TrainConfig, differences
from train.files import checkpoints
from train.loop import DivergedError, TrainingInterrupted, train

STEPS = 60

pytestmark = pytest.mark.usefixtures("compile_cache")


@pytest.fixture(scope="module")
def config(text) -> TrainConfig:
    """A run of two seconds."""
    return dataclasses.replace(
        PRESETS["micro"],
        data=str(text),
        steps=STEPS,
        eval_every=30,
        eval_rows=12,  # not a multiple of the batch
        checkpoint_every=10,
        keep=10,
        telemetry_rows=0,
    )


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """Folder and results of a run that was never interrupted."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    return out, train(config, out, progress=False)


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished run, to be damaged."""
    return shutil.copytree(finished[0], tmp_path / "copy")


def saved_arrays(run, *, at: int, config: TrainConfig) -> dict[str, np.ndarray]:
    """Parameters, optimizer state and keys of a checkpoint, by path."""
    _, template = step.init_state(config)
    with checkpoints.Checkpoints(run, keep=10) as store:
        state, progress = store.restore(at, config=config, template=template)
    assert progress["data"] == {"next_index": at}
    state = dataclasses.replace(state, key=jax.random.key_data(state.key))
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_run(run, other, *, config: TrainConfig) -> None:
    """Bitwise the same last checkpoint, and the same lines of metrics."""
    first = saved_arrays(run, at=STEPS, config=config)
    second = saved_arrays(other, at=STEPS, config=config)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.tobytes() == second[name].tobytes(), name
    assert metric_lines(run) == metric_lines(other)
    assert (run / "sparsity.csv").read_text() == (other / "sparsity.csv").read_text()


def metric_lines(run) -> list[dict[str, str]]:
    """metrics.csv without what depends on the clock."""
    with (run / "metrics.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    return [{k: v for k, v in x.items() if k != "tokens_per_second"} for x in lines]


def test_loss_falls_and_the_run_folder_is_complete(finished):
    out, results = finished
    lines = metric_lines(out)
    assert [int(line["step"]) for line in lines] == list(range(1, STEPS + 1))
    assert float(lines[0]["loss"]) > 5
    assert results["validation_loss"] < 3.6
    assert results["train_loss"] == pytest.approx(float(lines[-1]["loss"]), rel=1e-6)
    assert [line["step"] for line in lines if line["validation_loss"]] == ["30", "60"]
    assert float(lines[0]["threshold_scale"]) == 0
    reached = float(lines[-1]["threshold_scale"])
    assert 0.5 < reached <= 1
    assert (np.diff([float(line["threshold_scale"]) for line in lines]) >= 0).all()
    assert 0 < results["nonzero_fraction"] < 1
    assert np.shape(results["sparsity"]) == (1, 2)
    assert np.mean(results["sparsity"]) == pytest.approx(results["nonzero_fraction"])
    assert len((out / "sparsity.csv").read_text().splitlines()) == 1 + 2 * 2
    assert list((out / "tensorboard").iterdir())
    model = load_run(out)
    assert float(model.threshold_scale[...]) == pytest.approx(reached)
    assert results["tokens_per_second"] > 0
    json.dumps(results)


def test_loss_and_sparsity_of_a_row_by_definition(config):
    _, held_out = data.split(data.load_corpus(config.data), row_length=32)
    batch = jnp.asarray(data.spread(held_out, limit=3))
    graphdef, state = step.init_state(config)
    rest = step.set_threshold_scale(state.rest, 1.0)
    model = nnx.merge(graphdef, state.params, rest)
    losses, fired = jax.jit(step.row_losses)(model, batch)
    assert losses.shape == (3,)
    assert fired.shape == (3, 1, 2)
    inputs = batch[:, :-1].astype(jnp.int32)
    logits, infos = jax.jit(lambda m, x: m(x, return_info=True))(model, inputs)
    logits = np.asarray(logits, np.float64)
    log_sum = np.log(np.exp(logits).sum(-1))
    rows, columns = np.indices(log_sum.shape)
    expected = log_sum - logits[rows, columns, np.asarray(batch[:, 1:], int)]
    np.testing.assert_allclose(losses, expected.mean(1), rtol=1e-5)
    count = np.asarray(infos[0].count).sum(1)
    np.testing.assert_allclose(fired[:, 0], count / (32 * 33 / 2), rtol=1e-6)


def test_softmax_reports_that_every_score_is_non_zero(config):
    shape = dataclasses.replace(config.model, attention_kind="softmax")
    graphdef, state = nnx.split(abstract_model(shape))
    filled = jax.tree.map(lambda x: np.full(x.shape, 0.1, x.dtype), state)
    model, batch = nnx.merge(graphdef, filled), jnp.zeros((1, 33), jnp.uint8)
    _, fired = jax.jit(step.row_losses)(model, batch)
    np.testing.assert_array_equal(fired, 1)


def test_schedules_follow_the_number_of_steps(config):
    longer = dataclasses.replace(config, steps=600, threshold_schedule="linear")
    assert (longer.threshold_steps, longer.warmup_steps) == (400, 30)
    schedule = step.threshold_schedule(longer)
    values = [float(schedule(i)) for i in (0, 200, 400, 599)]
    np.testing.assert_allclose(values, [0, 0.5, 1, 1], rtol=1e-6)
    rate = step.learning_rate_schedule(longer)
    assert float(rate(0)) < float(rate(29)) < float(rate(30)) == pytest.approx(1e-2)
    assert float(rate(600)) == pytest.approx(1e-3)


def test_threshold_scale_is_set_and_nothing_else(config):
    _, state = step.init_state(config)
    changed = step.set_threshold_scale(state.rest, 0.25)
    values = [
        float(variable[...])
        for _, variable in nnx.to_flat_state(changed)
        if isinstance(variable, ThresholdScale)
    ]
    assert values == [0.25]
    assert jax.tree.structure(changed) == jax.tree.structure(state.rest)


def test_train_and_eval_step_compile_once(config, tmp_path, count_compiles):
    short = dataclasses.replace(config, eval_every=7, checkpoint_every=9)
    with count_compiles() as compiles:
        train(short, tmp_path / "run", progress=False)
    assert compiles["train_step"] == 1
    assert compiles["eval_step"] == 1


def test_ctrl_c_saves_and_resume_goes_on_bit_for_bit(
    config, finished, tmp_path, ctrl_c_before_batch
):
    out = tmp_path / "run"
    ctrl_c_before_batch(17)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(TrainingInterrupted, match=f"--resume --out {out}"):
        train(config, out, progress=False)
    assert signal.getsignal(signal.SIGINT) is handler
    assert sorted(os.listdir(out / "checkpoints")) == ["10", "18"]
    # As a kill would leave it: lines after the checkpoint, and half a line.
    with (out / "metrics.csv").open("a") as file:
        file.write("19,9.9,1,1,1,1,1,,\n2")
    results = train(config, out, resume=True, progress=False)
    assert_same_run(out, finished[0], config=config)
    assert results["validation_loss"] == finished[1]["validation_loss"]


@pytest.mark.parametrize("devices", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_sigkill_then_resume_is_bitwise_the_uninterrupted_run(
    devices, config, finished, tmp_path, repo_root, compile_cache, capsys
):
    out, (whole, expected) = tmp_path / "run", finished
    if devices == 8:
        config, whole = dataclasses.replace(config, data_parallel=True), tmp_path / "8"
        expected = train(config, whole, progress=False)
    words = ["--preset", "micro", "--out", str(out), "--data", config.data]
    words += ["--steps", str(STEPS), "--eval-every", "30", "--eval-rows", "12"]
    words += ["--checkpoint-every", "10", "--keep", "10", "--telemetry-rows", "0"]
    words += ["--json"]
    words += ["--data-parallel"] if devices == 8 else []
    target = random.randrange(2, STEPS - 5)
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "train", *words],
        cwd=repo_root,
        env=os.environ | compile_cache,
        stderr=subprocess.DEVNULL,
    ) as process:
        deadline = time.monotonic() + 1800
        while process.poll() is None and time.monotonic() < deadline:
            metrics = out / "metrics.csv"
            if metrics.exists() and metrics.read_bytes().count(b"\n") > target:
                break
            time.sleep(0.002)
        process.kill()
    assert process.returncode == -signal.SIGKILL, f"target was step {target}"
    assert main([*words, "--resume"]) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert results["steps"] == STEPS
    assert results["validation_loss"] == expected["validation_loss"]
    assert_same_run(out, whole, config=config)


def test_resume_of_a_finished_run_reports_the_same(config, copy, finished):
    results = train(config, copy, resume=True, progress=False)
    for name in ("steps", "train_loss", "validation_loss", "sparsity"):
        assert results[name] == finished[1][name]


def test_training_runs_outside_the_main_thread(config, copy):
    thread = threading.Thread(
        target=train, args=(config, copy), kwargs={"resume": True, "progress": False}
    )
    thread.start()
    thread.join()  # pytest turns an exception in the thread into a failure


def test_divergence_stops_and_leaves_the_last_good_checkpoint(
    config, tmp_path, monkeypatch
):
    original, out = step.make_train_step, tmp_path / "run"

    def poisoned(*arguments, **options):
        real = original(*arguments, **options)

        def train_step(state, batch):
            done = int(state.step) + 1
            state, measured = real(state, batch)
            if done == 25:
                params = jax.tree.map(lambda leaf: leaf * jnp.nan, state.params)
                state = dataclasses.replace(state, params=params)
            return state, measured

        return train_step

    monkeypatch.setattr(step, "make_train_step", poisoned)
    with pytest.raises(DivergedError, match="diverged at step 26: loss nan") as error:
        train(config, out, progress=False)
    good = f"the last good checkpoint is {out / 'checkpoints' / '20'};"
    assert good in str(error.value)
    assert sorted(os.listdir(out / "checkpoints")) == ["10", "20"]
    load_run(out)  # refuses values that are not finite


def test_a_state_that_is_not_finite_is_never_saved(config, tmp_path):
    _, state = step.init_state(config)
    bad = jax.tree.map(lambda leaf: leaf * jnp.nan, state.params)
    with checkpoints.Checkpoints(tmp_path, keep=1) as store:
        with pytest.raises(checkpoints.CheckpointError, match="not finite: not saved"):
            store.save(dataclasses.replace(state, params=bad), data={})
        assert store.latest() is None


def test_data_parallel_needs_a_batch_that_divides(config, tmp_path):
    odd = dataclasses.replace(config, data_parallel=True, batch=12)
    with pytest.raises(ValueError, match="8 devices, got 12: use --batch 16"):
        train(odd, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_keep_bounds_the_checkpoints(config, copy):
    with checkpoints.Checkpoints(copy, keep=2) as store:
        _, state = step.init_state(config)
        store.save(dataclasses.replace(state, step=jnp.int32(70)), data={})
        assert sorted(os.listdir(store.folder)) == ["60", "70"]


def test_a_folder_with_a_run_is_not_overwritten(config, finished):
    with pytest.raises(checkpoints.CheckpointError, match="continue it with --resume"):
        train(config, finished[0], progress=False)


def test_folders_that_hold_no_run_are_refused(config, tmp_path):
    with pytest.raises(checkpoints.CheckpointError, match="nothing to resume"):
        train(config, tmp_path / "missing", resume=True, progress=False)
    (tmp_path / "thesis.tex").write_text("text")
    for resume in (False, True):
        with pytest.raises(checkpoints.CheckpointError, match="but no run of hsrjax"):
            train(config, tmp_path, resume=resume, progress=False)
    with pytest.raises(checkpoints.CheckpointError, match="is a file, not a folder"):
        train(config, tmp_path / "thesis.tex", progress=False)
    with pytest.raises(checkpoints.CheckpointError, match="cannot write in the folder"):
        train(config, tmp_path / "thesis.tex" / "run", progress=False)
    assert os.listdir(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "is not of a run"),
        ('{"model_type": "llama"}', "is not of a run"),
        ('{"format": "hsrjax-run", "version": 9}', "has version 9"),
        ('{"format": "hsrjax-run", "version": 1}', "does not describe a model"),
    ],
)
def test_damaged_and_foreign_configs_are_refused(config, copy, content, message):
    (copy / "config.json").write_text(content)
    with pytest.raises(checkpoints.CheckpointError, match=message):
        train(config, copy, resume=True, progress=False)


def test_a_config_without_training_options_is_refused(config, copy):
    content = json.loads((copy / "config.json").read_text())
    content["train"] = {}
    (copy / "config.json").write_text(json.dumps(content))
    with pytest.raises(checkpoints.CheckpointError, match="not describe a training"):
        train(config, copy, resume=True, progress=False)


@pytest.mark.parametrize("item", ["model", "optimizer", "progress"])
def test_a_damaged_checkpoint_names_the_one_before(config, copy, item):
    for folder, _, names in os.walk(copy / "checkpoints" / "60" / item):
        for name in names:
            os.truncate(os.path.join(folder, name), 5)
    with pytest.raises(checkpoints.CheckpointError, match="resume from step 50") as e:
        train(config, copy, resume=True, progress=False)
    assert str(copy / "checkpoints" / "60") in str(e.value)
    assert "\n" not in str(e.value)


def test_resume_refuses_other_options_and_another_corpus(config, copy, tmp_path):
    other = dataclasses.replace(config, learning_rate=1.0, steps=70)
    with pytest.raises(checkpoints.CheckpointError, match=r"\(steps, learning_rate\)"):
        train(other, copy, resume=True, progress=False)
    file = tmp_path / "other.txt"
    file.write_text("other text " * 1000)
    other = dataclasses.replace(config, data=str(file))
    with pytest.raises(checkpoints.CheckpointError, match="another corpus"):
        train(other, copy, resume=True, progress=False)


def test_options_that_do_not_matter_may_change_on_resume(config):
    model = dataclasses.replace(config.model, attention="hsr")
    assert not differences(config, dataclasses.replace(config, keep=1, model=model))
    model = dataclasses.replace(config.model, relu_power=1)
    assert differences(config, dataclasses.replace(config, model=model, seed=1)) == [
        "seed",
        "relu_power",
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("batch", -1),
        ("learning_rate", float("nan")),
        ("threshold_fraction", 1.5),
        ("beta2", 1.0),
        ("seed", -1),
    ],
)
def test_impossible_options_are_refused(config, name, value):
    with pytest.raises(ValueError, match=name):
        dataclasses.replace(config, **{name: value})


def test_presets_name_themselves():
    assert {name: config.preset for name, config in PRESETS.items()} == {
        name: name for name in PRESETS
    }
