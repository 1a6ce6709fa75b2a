"""Training in parts, on many devices, in many processes, and on failing machines."""

import dataclasses
import functools
import json
import os
import re
import shutil
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from tests.contract import slow
from train import data, processes, step
from train.__main__ import Command, main
from train.config import PRESETS
from train.files import checkpoints, metrics
from train.files.folder import check_folder
from train.files.metrics import read_csv
from train.loop import DeviceError, TrainingInterrupted, train

pytestmark = pytest.mark.usefixtures("compile_cache")


@pytest.fixture(scope="module")
def config(text):
    return dataclasses.replace(
        PRESETS["micro"],
        data=str(text),
        steps=20,
        eval_every=20,
        eval_rows=8,
        checkpoint_every=10,
        telemetry_rows=0,
        threshold_schedule="linear",  # what waits for a loss may wait for its rounding
        threshold_end=0.7,
    )


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "finished"
    return out, train(config, out, progress=False)


def batches_of(config):
    rows, _ = data.split(data.load_corpus(config.data), row_length=config.row_length)
    return data.Batches(rows, batch=config.batch, seed=0)


@functools.cache
def one_step(config):
    """Parameters and metrics after a step."""
    graphdef, state = step.init_state(config)
    train_step = step.make_train_step(graphdef, config)
    state, measured = train_step(state, jnp.asarray(next(batches_of(config))))
    return jax.device_get((state.params, measured))


def distance(tree, other):
    """Largest mean difference of two trees' arrays."""
    apart = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b).mean(), tree, other)
    return max(jax.tree.leaves(apart))


def losses(run):
    return np.array([line["loss"] for line in read_csv(run / "metrics.csv")])


# --- less memory ---


@pytest.mark.parametrize(
    "options",
    [
        {"remat": True},
        *slow(({"accumulate": 4},), ({"accumulate": 2, "remat": True},)),
    ],
)
def test_parts_and_remat_change_rounding_alone(config, options):
    params, measured = one_step(config)
    other_params, other = one_step(dataclasses.replace(config, **options))
    for name in ("loss", "grad_norm", "nonzero_fraction", "sparsity"):
        np.testing.assert_allclose(other[name], measured[name], rtol=2e-5, atol=1e-6)
    # Adam's first step goes by a gradient's sign: where that is rounding, by chance.
    assert distance(params, other_params) < 1e-5


@pytest.mark.slow
def test_remat_takes_less_memory(config):
    """With hsr dense layers of long rows: the backward pass keeps inputs alone."""

    def temporaries(**options):
        model = dataclasses.replace(config.model, num_layers=3, attention="dense")
        long = dataclasses.replace(config, model=model, row_length=512, **options)
        graphdef, state = step.init_state(long)
        batch = jax.ShapeDtypeStruct((8, 513), jnp.uint8)
        compiled = step.make_train_step(graphdef, long).lower(state, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(remat=True) < 0.6 * temporaries()
    assert temporaries(accumulate=4) < 0.5 * temporaries()


# --- thresholds ---


def test_threshold_waits_for_the_loss(config):
    by_loss = dataclasses.replace(
        config, threshold_schedule="loss", steps=30, threshold_fraction=1.0
    )
    rise = 2 * 0.7 / 30
    following = lambda scale, loss, average: float(
        step.next_threshold(by_loss, *map(jnp.float32, (scale, loss, average)))
    )
    assert following(0.1, 2.0, 2.1) == pytest.approx(0.1 + rise)
    assert following(0.1, 2.2, 2.1) == pytest.approx(0.1)
    assert following(0.69, 2.0, np.inf) == pytest.approx(0.7)
    lower = dataclasses.replace(by_loss, threshold_start=0.7, threshold_end=0.2)
    scale = step.next_threshold(lower, *map(jnp.float32, (0.21, 1.0, 2.0)))
    assert float(scale) == pytest.approx(0.2)


def test_sparsity_weight_raises_the_learned_scales(config):
    def scales(weight):
        params, measured = one_step(dataclasses.replace(config, sparsity_weight=weight))
        beta = [leaf for path, leaf in nnx.to_flat_state(params) if path[-1] == "beta"]
        return np.asarray(beta[0][...]), float(measured["loss"])

    (plain, loss), (rewarded, same_loss) = scales(0.0), scales(10.0)
    assert (rewarded > plain).all()
    assert loss == pytest.approx(same_loss, rel=1e-6)


# --- many devices ---


@pytest.mark.slow
def test_pmap_and_shardings_take_the_same_step(config):
    """What `--data-parallel` does by shardings, by hand with pmap on 8 devices."""
    split = dataclasses.replace(config, data_parallel=True)
    graphdef, state = step.init_state(config)
    batch, optimizer = next(batches_of(config)), step.make_optimizer(config)
    assert (jax.local_device_count(), batch.shape[0]) == (8, 8)

    def grads(params, rest, rows):
        grad = jax.grad(step.loss_fn, has_aux=True)
        found, (loss, _) = grad(params, rest, rows, graphdef=graphdef)
        return jax.lax.pmean((found, loss), "device")

    mapped = jax.pmap(grads, axis_name="device", in_axes=(None, None, 0))
    found, loss = mapped(state.params, state.rest, batch[:, None])
    found = jax.tree.map(lambda x: x[0], jax.device_get(found))

    @jax.jit
    def updated(state, found):
        updates, _ = optimizer.update(found, state.opt_state, state.params)
        return optax.apply_updates(state.params, updates)

    expected = jax.device_get(updated(state, found))

    batch_sharding, replicated = processes.shardings(split)
    train_step = step.make_train_step(graphdef, split, replicated=replicated)
    placed = processes.place(state, replicated)
    after, measured = train_step(placed, processes.place(batch, batch_sharding))
    assert float(measured["loss"]) == pytest.approx(float(loss[0]), rel=1e-6)
    assert distance(after.params, expected) < 1e-6


@pytest.fixture
def shapes_on(monkeypatch):
    """Where the batches of a run lay: numbers of devices, and their parts' shapes."""
    original, used = step.make_train_step, set()

    def recording(*arguments, **options):
        real = original(*arguments, **options)

        def train_step(state, batch):
            lies = batch.sharding
            used.add((len(lies.device_set), lies.shard_shape(batch.shape)))
            return real(state, batch)

        return train_step

    monkeypatch.setattr(step, "make_train_step", recording)
    return used


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(True, False), (False, True)])
def test_a_checkpoint_goes_on_with_another_number_of_devices(
    config, finished, tmp_path, ctrl_c_before_batch, shapes_on, before, after
):
    lies = {True: (8, (1, 33)), False: (1, (8, 33))}
    first = dataclasses.replace(config, data_parallel=before)
    ctrl_c_before_batch(9)
    with pytest.raises(TrainingInterrupted):
        train(first, tmp_path / "run", progress=False)
    assert shapes_on == {lies[before]}
    then = dataclasses.replace(config, data_parallel=after)
    train(then, tmp_path / "run", resume=True, progress=False)
    assert shapes_on == {lies[before], lies[after]}
    # Rounding differs, and later grows: a threshold turns it into other keys.
    found, expected = losses(tmp_path / "run"), losses(finished[0])
    assert len(found) == len(expected)
    np.testing.assert_allclose(found[:8], expected[:8], rtol=1e-5)
    np.testing.assert_allclose(found, expected, rtol=0.05)


@pytest.mark.slow
def test_two_processes_train_what_one_does(
    config, finished, tmp_path, repo_root, compile_cache
):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    out = tmp_path / "run"
    # 4 devices for each of the two; the second run compiles nothing.
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4")
    environment = os.environ | compile_cache | {"XLA_FLAGS": flags}
    command = [sys.executable, "-m", "train", "--preset", "micro", "--out", str(out)]
    names = ("data", "steps", "eval_every", "eval_rows", "checkpoint_every")
    for name in (*names, "threshold_schedule", "threshold_end"):
        command += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
    command += ["--telemetry-rows", "0", "--data-parallel", "--distributed", "--json"]
    command += ["--coordinator", f"localhost:{port}", "--num-processes", "2"]

    def run(*more):
        started = [
            subprocess.Popen(
                [*command, "--process-index", str(index), *more],
                cwd=repo_root,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in (0, 1)
        ]
        printed = [process.communicate(timeout=1800) for process in started]
        codes = [process.returncode for process in started]
        assert codes == [0, 0], [text[1][-2000:] for text in printed]
        assert "validation_loss" not in printed[1][0]
        return json.loads(printed[0][0].splitlines()[-1])

    results = run()
    expected = losses(finished[0])
    np.testing.assert_allclose(losses(out)[:8], expected[:8], rtol=1e-5)
    assert results["steps"] == 20
    assert results["validation_loss"] == pytest.approx(
        finished[1]["validation_loss"], rel=0.05
    )
    assert run("--resume")["validation_loss"] == results["validation_loss"]


ALONE = ["--preset", "micro", "--distributed"]


def test_processes_that_come_too_late_are_told_what_to_give(tmp_path, capsys):
    """This one computes already."""
    assert jax.device_count() == 8
    assert main([*ALONE, "--out", str(tmp_path / "run")]) == 2
    assert "give --coordinator HOST:PORT" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_processes_that_cannot_meet_are_told_what_to_give(repo_root, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "train", *ALONE, "--out", str(tmp_path / "run")],
        cwd=repo_root,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 2
    assert "give --coordinator HOST:PORT" in done.stderr
    assert not (tmp_path / "run").exists()


# --- machines that fail ---


_FULL_DISK = """
import resource, signal, sys
from train.__main__ import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), -1))
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("room", [1_500, 60_000])
def test_a_full_disk_leaves_the_last_checkpoint_and_says_how_to_go_on(
    config, finished, tmp_path, repo_root, compile_cache, ctrl_c_before_batch, room
):
    """No file may grow beyond `room` bytes: first the metrics, then a checkpoint."""
    out = tmp_path / "run"
    ctrl_c_before_batch(4)
    with pytest.raises(TrainingInterrupted):
        train(config, out, progress=False)
    # What was compiled is read from the cache, but not half written to it.
    cache = compile_cache | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9"}
    done = subprocess.run(
        [sys.executable, "-c", _FULL_DISK, str(room), "--out", str(out), "--resume"],
        cwd=repo_root,
        env=os.environ | cache,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 2, done.stderr[-3000:]
    # What other threads have to say of the same may stand before it in its line.
    said = re.findall(r"error: .*", done.stderr)
    assert len(said) == 1, done.stderr[-3000:]
    assert f"continue with: python -m train --resume --out {out}" in said[0]
    train(config, out, resume=True, progress=False)
    np.testing.assert_array_equal(losses(out), losses(finished[0]))


@pytest.mark.parametrize("what", ["checkpoint", *slow(("metrics",))])
def test_what_cannot_be_written_says_how_to_go_on(
    config, finished, tmp_path, capsys, monkeypatch, what
):
    """The same without a disk that is full."""
    writer, manager = metrics.MetricsWriter, ocp.CheckpointManager
    owner, name = (writer, "write") if what == "metrics" else (manager, "save")
    real, out = getattr(owner, name), tmp_path / "run"

    def failing(self, *arguments, **options):
        if (arguments[0] if what == "checkpoint" else arguments[0]["step"]) == 20:
            raise OSError(28, "No space left on device")
        return real(self, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, failing)
        patched.setattr("train.__main__._parse", lambda _: command)
        command = Command(out=out, train=config)
        assert main([]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ")
    assert "No space left on device" in said
    assert f"The last good checkpoint is {out / 'checkpoints' / '10'}: " in said
    assert f"continue with: python -m train --resume --out {out}" in said
    train(config, out, resume=True, progress=False)
    np.testing.assert_array_equal(losses(out), losses(finished[0]))


def test_a_checkpoint_without_room_is_not_begun(config, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(checkpoints.CheckpointError, match=r"has 1.0 MB left.*needs"):
        train(config, tmp_path / "run", progress=False)
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_lost_device_is_one_error(config, tmp_path, monkeypatch):
    original = step.make_train_step

    def failing(*arguments, **options):
        real = original(*arguments, **options)

        def train_step(state, batch):
            if int(state.step) == 12:
                raise jax.errors.JaxRuntimeError("INTERNAL: device is lost\nstack")
            return real(state, batch)

        return train_step

    monkeypatch.setattr(step, "make_train_step", failing)
    out = tmp_path / "run"
    with pytest.raises(DeviceError, match=r"after step 12 .*is lost") as e:
        train(config, out, progress=False)
    assert f"{out}/checkpoints/10: once that is mended, continue with" in str(e.value)
    assert check_folder(out, resume=True)


def test_bfloat16_computes_and_float32_is_kept(config, finished):
    """Master weights: parameters and optimizer are float32, products are in bf16."""
    model = dataclasses.replace(config.model, dtype="bfloat16")
    narrow = dataclasses.replace(config, model=model)
    graphdef, state = step.init_state(narrow)
    floats = jax.tree.leaves((state.params, state.opt_state))
    assert {x.dtype for x in floats} <= {jnp.dtype("float32"), jnp.dtype("int32")}
    batches, found = batches_of(narrow), []
    batch = jnp.asarray(next(batches))
    lowered = step.make_train_step(graphdef, narrow).lower(state, batch)
    assert "tensor<8x32x32xbf16>" in lowered.as_text()
    train_step = lowered.compile()
    for _ in range(config.steps):
        state, measured = train_step(state, batch)
        found.append(float(measured["loss"]))
        batch = jnp.asarray(next(batches))
    floats = jax.tree.leaves((state.params, state.opt_state))
    assert {x.dtype for x in floats} <= {jnp.dtype("float32"), jnp.dtype("int32")}
    assert found[-1] < found[0] - 1
    np.testing.assert_allclose(found, losses(finished[0]), rtol=0.1)
