"""benchmarks: every command in small, wrong results noticed, nothing half-written."""

import csv
import dataclasses
import json
import os
import re
import sys
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

import hsrjax
from benchmarks import capture, memory
from benchmarks.__main__ import COMMANDS, main, module_of
from benchmarks.commands import calibrate, decode
from benchmarks.contestants import (
    causal,
    chunked,
    dense,
    growing,
    peers,
    peers_jax,
    search,
)
from benchmarks.files import results
from benchmarks.files.environment import version
from benchmarks.harness import inputs, internals, members, oracle, tables, timing
from benchmarks.harness.internals import costs
from benchmarks.harness.timing import Unavailable
from hsrjax._src.kernels import base as registry
from hsrjax._src.kernels.triton.implementation import Triton
from tests.made_up import run_of
from train.data import load_corpus

SHARED_COLUMNS = {"keys", "name", "ms", "timed_calls", "status", "detail"}
COLUMNS = {
    "decode": SHARED_COLUMNS
    | {"case", "firing_keys", "append_ms", "append_share", "max_relative_error"}
    | {"reindex_ms", "keys_looked_at"}
    | {"dense_over_this", "this_over_hsr"},
    "prefill": SHARED_COLUMNS
    | {"firing_keys", "max_relative_error", "dense_over_this", "this_over_hsr"},
    "train": SHARED_COLUMNS | {"max_relative_error", "dense_over_this"},
    "query": SHARED_COLUMNS | {"batch", "build_s", "ms_per_query", "recall", "kind"},
    "grid": {"batch", "keys", "percent", "auto_over_best", "max_relative_error"},
}
SMALL = {
    "decode": ["--keys", "96", "--peers", "jax-softmax", "flash-attention-jax"],
    "prefill": ["--keys", "160", "--peers", "jax-softmax", "flash-attention-jax"],
    "train": ["--keys", "160", "--peers", "jax-softmax", "nsa-pytorch"],
    "query": ["--keys", "500", "--batches", "2", "--peers", "hnswlib"],
    "grid": ["--keys", "96", "--percents", "1"],
}
SLOW = ("train", "grid")
"""Commands whose small run takes seconds too; the others share their code."""
ABSENT = {"flash_attention_jax": "decode", "hnswlib": "query"}
RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"


@pytest.fixture(scope="module", autouse=True)
def compile_cache(tmp_path_factory):
    """Keeps what XLA compiled: tests here compile the same steps again."""
    names = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("xla")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in names.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    jax.experimental.compilation_cache.compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def small_runs(tmp_path_factory):
    """Runs commands in small, each once: (exit status, JSON, folder) by name."""
    done = {}

    def run(name, capsys):
        if name not in done:
            out = tmp_path_factory.mktemp("results")
            with pytest.MonkeyPatch.context() as patch:
                for module in ABSENT:
                    patch.setitem(sys.modules, module, None)
                words = [name, "--quick", "--json", "--out", str(out), *SMALL[name]]
                status = main(words)
            line = capsys.readouterr().out.splitlines()[-1]
            done[name] = status, json.loads(line), out / name
        return done[name]

    return run


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=[pytest.mark.slow] * (x in SLOW)) for x in COLUMNS],
)
def test_small_run(name, small_runs, capsys):
    status, found, folder = small_runs(name, capsys)
    assert status == 0 and found["wrong"] == []
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert COLUMNS[name] <= set(rows[0])
    assert len(rows) == len(found["rows"]) > 0
    for row in found["rows"]:
        error = row.get("max_relative_error")
        assert not isinstance(error, float) or error <= 1e-5
        if row.get("kind") == "exact" and row["ms"] is not None:
            assert row["recall"] == 1
    pictures = [file for file in folder.iterdir() if file.suffix == ".png"]
    assert pictures or name == "decode"  # which draws lines: not of one length
    assert json.loads((folder / "summary.json").read_text()) == found["summary"]
    assert not [file for file in folder.iterdir() if file.name.startswith(".")]


def test_environment_names_no_machine(small_runs, capsys):
    _, _, folder = small_runs("decode", capsys)
    text = (folder / "environment.json").read_text()
    about = json.loads(text)
    assert about["jax"] == jax.__version__ and about["cores"] and about["quick"]
    assert str(folder.parent) not in text and os.uname().nodename not in text
    assert about["command"].startswith("python -m benchmarks decode --quick")


@pytest.mark.parametrize("module", list(ABSENT))
def test_missing_peer_is_reported(module, small_runs, capsys):
    _, found, _ = small_runs(ABSENT[module], capsys)
    name = module.replace("_", "-")
    assert found["summary"]["not_measured"][name] == "not installed"
    assert {r["status"] for r in found["rows"] if r["name"] == name} == {
        "not installed"
    }


def test_every_implementation_is_measured(small_runs, capsys):
    _, found, _ = small_runs("decode", capsys)
    measured = {row["name"] for row in found["rows"] if row["ms"]}
    assert {"hsr", "auto", "dense", "hsrjax dense", "jax-softmax"} <= measured
    dense = [r for r in found["rows"] if r["name"] == "dense" and r["keys"] == 96]
    others = [
        r["ms"]
        for r in found["rows"]
        if r["keys"] == 96 and r["name"].startswith(("dense ", "hsrjax dense"))
    ]
    assert len(others) == 4 and dense[0]["ms"] == min(others)
    assert found["summary"]["gqa"]["dense_over_hsr"].keys() == {"96"}


@pytest.mark.slow
def test_small_heads_are_measured_in_both_orders(tmp_path, capsys):
    words = ["decode", "--quick", "--json", "--cases", "heads-8", "--keys", "96", "192"]
    words += ["--peers", "none", "--repeats", "1", "--out", str(tmp_path)]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    by_name = {r["name"]: r for r in found["rows"] if r["keys"] == 192}
    spatial, arrived = by_name["hsr"], by_name["hsr (arrival order)"]
    assert spatial["reindex_ms"] > 0 and arrived["reindex_ms"] is None
    assert spatial["ms"] and arrived["ms"] and arrived["max_relative_error"] <= 1e-5
    slopes = found["summary"]["heads-8"]["log_log_slope"]
    assert slopes.keys() == {"hsr", "hsr (arrival order)", "dense"}


@pytest.mark.slow
def test_bfloat16_is_what_everyone_gets(tmp_path, capsys, lenient_promotion):
    words = ["decode", "--quick", "--json", "--keys", "192", "--dtype", "bfloat16"]
    words += ["--peers", "jax-softmax", "jax-cudnn", "torch-sdpa", "--repeats", "1"]
    assert main([*words, "--out", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {row["name"]: row for row in found["rows"]}
    assert {row["dtype"] for row in rows.values()} == {"bfloat16"}
    for name in ("hsr", "hsrjax dense", "dense einsum", "jax-softmax"):
        # Beyond what float32 would do, within what bfloat16 must.
        error = rows[name]["max_relative_error"]
        assert 1e-5 < error <= tables.TOLERANCE_BFLOAT16
    refusals = {"needs a GPU", "not installed", "is measured in float32 alone"}
    assert {rows[x]["status"] for x in ("jax-cudnn", "torch-sdpa")} <= refusals


def test_dense_and_peers_get_bfloat16(lenient_promotion):
    source = inputs.Source(dtype="bfloat16")
    given = inputs.decode(source, inputs.Shape(keys=192), 9)
    others = peers.contestants(["jax-softmax", "torch-sdpa"], "decode", given)
    timings = timing.race(
        [*dense.decode_contestants(given), *others],
        rounds=1,
        score=oracle.scoring(given)[0],
        tick=lambda name: None,
    )
    rows = {row["name"]: row for row in tables.rows(timings, tables.describe(given))}
    assert rows.pop("torch-sdpa")["status"] in (
        "not installed",
        "is measured in float32 alone",
    )
    for row in rows.values():
        assert row["status"] == "measured" and row["dtype"] == "bfloat16"
        assert 1e-5 < row["max_relative_error"] <= tables.TOLERANCE_BFLOAT16


def test_wrong_attention_is_noticed(monkeypatch, tmp_path, capsys):
    real = growing.Growing.step

    def off(self, method):
        out, info = real(self, method)
        return (out * 1.001 if method == "hsr" else out), info

    monkeypatch.setattr(growing.Growing, "step", off)
    words = ["decode", "--quick", "--keys", "96", "--peers", "none"]
    assert main([*words, "--out", str(tmp_path)]) == 1
    errors = [x for x in capsys.readouterr().err.splitlines() if "error" in x]
    assert len(errors) == 1 and "hsr at 96 keys" in errors[0]


@pytest.mark.parametrize("fault", ["missed", "extra"])
def test_wrong_report_is_noticed(fault, monkeypatch, tmp_path, capsys):
    real = search._hsr_ids

    def off(answer):
        first, *rest = real(answer)
        last = np.setdiff1d(np.arange(500), first)[:1]
        return [first[1:] if fault == "missed" else np.append(first, last), *rest]

    ours = search.OURS["hsrjax.query"]
    off = dataclasses.replace(ours, ids=off)
    monkeypatch.setitem(search.OURS, "hsrjax.query", off)
    words = ["query", "--quick", "--keys", "500", "--batches", "2", "--peers", "none"]
    assert main([*words, "--out", str(tmp_path)]) == 1
    assert "hsrjax.query: " in capsys.readouterr().err


def test_interrupted_measurement_writes_nothing(monkeypatch, tmp_path, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(decode.oracle, "attend", interrupted)
    words = ["decode", "--quick", "--keys", "96", "--peers", "none"]
    assert main([*words, "--out", str(tmp_path)]) == 130
    assert list(tmp_path.iterdir()) == []
    assert "stopped: nothing was written" in capsys.readouterr().err


def test_interrupted_writing_leaves_what_was_there(monkeypatch, tmp_path):
    found = results.Results([{"a": 1.0}], {"b": 2}, {"c.png": Figure()})
    results.write(tmp_path, found, {"quick": True})
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert set(before) == {"results.csv", "summary.json", "environment.json", "c.png"}

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", interrupted)
    found.rows[0]["a"] = 3.0
    with pytest.raises(KeyboardInterrupt):
        results.write(tmp_path, found, {"quick": True})
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "words",
    [
        "nothing",
        "decode --bogus",
        "decode --repeats 0",
        "decode --keys 1",
        "decode --cases other",
        "decode --peers nobody",
        "decode --peers all torch-sdpa",
        "decode --inputs captured",
        "decode --captured nowhere.npz",
        "decode --inputs captured --captured nowhere.npz",
        "decode --dtype bfloat16 --inputs captured --captured nowhere.npz",
        "decode --dtype float8",
        "prefill --keys 0",
        "prefill --peers entmax15",
        "train --seed -1",
        "query --share 2",
        "query --batches 0",
        "grid --percents 0",
        "grid --inputs captured",
        "calibrate --repeats 0",
    ],
)
def test_refusals_are_one_sentence(words, capsys, tmp_path):
    assert main([*words.split(), "--out", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and list(tmp_path.iterdir()) == []
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert "Error parsing" not in printed.err


def made_up_times(calls, **_):
    """Instead of timing: some calls take longer where more keys are looked at."""
    known = {"hsr": 1e5, "none": 1e5, "build": 3e4, "all": 9e5}
    return {name: known.get(name, 1e6) for name in calls}


@pytest.mark.parametrize(
    "timed", [pytest.param(True, marks=pytest.mark.slow), False], ids=["timed", "not"]
)
def test_calibrated_costs_are_those_of_this_machine(
    timed, tmp_path, monkeypatch, capsys
):
    if not timed:
        monkeypatch.setattr(calibrate, "_timed", made_up_times)
        monkeypatch.setattr(calibrate, "_slot", lambda *_: 50.0)
    file = tmp_path / "new" / "mine.json"
    words = ["calibrate", "--quick", "--repeats", "1", "--json", "--out", str(file)]
    assert main(words) == 0
    printed = capsys.readouterr().out
    found = json.loads(printed.splitlines()[-1])
    assert found["file"] == str(file) and list(file.parent.iterdir()) == [file]
    assert "decode step" in printed and f"HSRJAX_COSTS={file}" in printed
    monkeypatch.setenv("HSRJAX_COSTS", str(file))
    table = costs.current()  # any warning is an error here
    assert table.source == str(file) and table.differs == ""
    named = {row["cost"]: row["ns"] for row in found["rows"] if "amount" not in row}
    assert {name: getattr(table.costs, name) for name in named} == named
    assert [list(x) for x in table.costs.dense] == [
        [row["amount"], row["ns"]] for row in found["rows"] if row["cost"] == "dense"
    ]
    # Longer rows cost more, whatever else this machine is busy with.
    assert table.costs.gather_row + table.costs.gather_number > 0
    assert found["summary"]["machine"]["device"] == table.costs.machine.device


def test_kernels_are_calibrated_where_they_run(tmp_path, monkeypatch, capsys):
    """On a machine that has kernels, and packaged costs of them."""
    kernels = Triton(interpret=True)
    monkeypatch.setitem(registry._implementations, "triton", kernels)
    packaged = json.loads(costs.PACKAGED.read_text())
    packaged["cpu/triton"] = packaged["gpu/triton"]
    monkeypatch.setattr(costs, "_packaged", lambda: packaged)
    monkeypatch.setattr(calibrate, "_timed", made_up_times)
    monkeypatch.setattr(calibrate, "_slot", lambda *_: 50.0)
    file = tmp_path / "mine.json"
    assert main(["calibrate", "--quick", "--json", "--out", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "triton, bfloat16: one decode step" in printed
    rows = json.loads(printed.splitlines()[-1])["rows"]
    assert {row["implementation"] for row in rows} == {"xla", "triton"}
    assert set(json.loads(file.read_text())) == {"cpu", "cpu/triton"}
    monkeypatch.setenv("HSRJAX_COSTS", str(file))
    by_xla, by_kernels = (costs.current(name) for name in ("xla", "triton"))
    assert by_kernels.differs == "" and by_kernels.costs.by_bytes
    bytes_of_one = by_kernels.costs.dense[0][0] / by_xla.costs.dense[0][0]
    assert bytes_of_one == 2 and by_kernels.costs.gather_product == 0
    assert by_kernels.costs.top_r_hsr == by_xla.costs.top_r_hsr


def test_steps_of_a_call_follow_one_another(monkeypatch):
    """On accelerators; the result is that of one."""
    given = inputs.decode(inputs.Source(), inputs.Shape(keys=64), 5)
    cache = growing.Growing(given)
    cache.refresh()
    step = internals.Step(cache.query, cache.cache)
    results = []
    for steps in (1, 3):
        monkeypatch.setattr(internals, "steps_of_a_call", lambda steps=steps: steps)
        results.append(step.call(cache.relu, "hsr", scale=1.0)())
    (out, info), (again, later) = results
    np.testing.assert_allclose(again, out, rtol=1e-6)
    np.testing.assert_array_equal(later.count, info.count)


def test_solved_costs_give_the_times_back():
    """Times worked out from known costs lead to these costs, and to the same times."""
    known = dict.fromkeys(
        ("top_r_dense", "top_r_hsr", "epsilon_dense", "epsilon_hsr"), 3.0
    )
    known |= {"dense_product": 0.02, "scan_product": 0.004, "build": 1.5, "probe": 9e3}
    known |= {"gather_row": 30.0, "gather_number": 0.3, "gather_product": 0.01}
    curves = ((1e3, 4e4), (1e9, 9e8)), ((1e3, 1e5), (1e9, 2e8))
    table = costs.Costs(
        machine=costs.this_machine(),
        origin="measured",
        dense=curves[0],
        scan=curves[1],
        **known,
    )
    shape = internals.planner.Shape(1, 2048, 2048, 8, 4, 64, 64)
    plan = internals.planner.lay_out(hsrjax.ReLU(), shape)
    expected = internals.planner.expect(hsrjax.ReLU(), shape, plan, table=table)
    runs = -(-2048 // plan.capacity) * internals.planner.sets(shape, plan)
    times = {
        "dense": expected.dense,
        "none": expected.hsr,
        "all": expected.hsr + runs * expected.one_run,
        "build": 1.5 * 4 * 2048 * 64,
    }
    solved = calibrate.solve(
        *curves,
        wide=30.0 + 2 * 64 * (0.3 + 2 * 0.01),
        narrow=30.0 + 2 * 16 * (0.3 + 2 * 0.01),
        probe=9e3,
        select={name: known[name] for name in known if name[:3] in ("top", "eps")},
        prefill=times,
        work=internals.work(keys=2048, heads=8, kv_heads=4, head_dim=64),
    )
    assert solved == pytest.approx(known, rel=1e-6)


def test_help(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in COMMANDS)
    for name in COMMANDS:
        with pytest.raises(SystemExit) as stopped:
            main([name, "--help"])
        assert stopped.value.code == 0
        assert "--quick" in capsys.readouterr().out


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model of two layers, and the run folder it is saved in with its text."""
    folder = tmp_path_factory.mktemp("trained")
    text = folder / "text.py"
    text.write_bytes(load_corpus().data[:40_000].tobytes())
    shape = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
    model = run_of(folder / "run", text, **shape, attention="dense")
    return model, folder / "run", text


def test_captured_attention_is_the_models(trained, tmp_path, capsys, lenient_promotion):
    model, run, text = trained
    file = tmp_path / "captured.npz"
    words = ["--run", str(run), "--tokens", "70", "--out", str(file)]
    assert capture.main(words) == 0, capsys.readouterr().err
    source = inputs.Source("captured", file)
    given = inputs.causal(source, inputs.Shape(keys=70), 0.1)
    tokens, _ = capture.held_out(capture.Command(run=run, out=file, tokens=70))
    assert tokens.tobytes() in text.read_bytes()
    assert tokens.tobytes() not in text.read_bytes()[: 40_000 // 40]

    @jax.jit
    def by_model(tokens):
        positions = jnp.arange(70, dtype=jnp.int32)[None]
        scale, (first, second) = model.threshold_scale[...], model.blocks
        stream, _ = first(model.embed(tokens), positions, scale)
        normed = second.attention_norm(stream)
        return second.attention(normed, positions, scale, return_info=True)

    @jax.jit
    def by_captured(query, key, value, bias):
        relu = hsrjax.ReLU(power=given.power, bias=bias, normalize=given.normalize)
        out = hsrjax.attention(
            query, key, value, activation=relu, is_causal=True, scale=1.0
        )
        return out, model.blocks[1].attention._finish(out, value)

    expected, info = by_model(jnp.asarray(tokens, jnp.int32)[None])
    firing = float(info.count.mean())
    assert 1 < firing < 30  # of 35.5 visible: some keys fire and some do not
    out, finished = by_captured(given.query, given.key, given.value, given.bias)
    # The norm on the output makes rows of tiny weights as large as the others.
    np.testing.assert_allclose(finished, expected, atol=2e-4)
    exact = oracle.attend(given, "relu")
    assert timing.relative_error(np.asarray(out), exact.out) < 1e-5
    assert exact.firing == pytest.approx(firing, abs=0.1)
    last = inputs.decode(source, inputs.Shape(keys=40), 3)
    assert last.query.shape == (1, 1, 4, 8) and last.key.shape == (1, 40, 2, 8)
    with pytest.raises(ValueError, match="70 tokens, fewer than the 71"):
        inputs.decode(source, inputs.Shape(keys=71), 3)


@pytest.mark.parametrize(
    "words", ["--layer 2", "--tokens 90000", "--tokens 0", f"--data {__file__}"]
)
def test_capture_refuses(words, trained, tmp_path, capsys):
    out = tmp_path / "x.npz"
    arguments = ["--run", str(trained[1]), "--out", str(out), *words.split()]
    assert capture.main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not out.exists()


def _given(keys=150, **changes):
    given = inputs.causal(inputs.Source(), inputs.Shape(keys=keys, head_dim=16), 0.05)
    return dataclasses.replace(given, **changes)


def _reference(given, definition):
    activation = hsrjax.Softmax()
    if definition == "relu":
        activation = hsrjax.ReLU(
            power=given.power, bias=given.bias, normalize=given.normalize
        )

    def attend(q, k, v):
        return hsrjax.reference.attention(
            q, k, v, activation=activation, is_causal=True, scale=1.0
        )

    @jax.jit
    def run(upstream, *operands):
        out, pull = jax.vjp(attend, *operands)
        return out, *pull(upstream)

    return run(peers_jax.cotangent(given), given.query, given.key, given.value)


@pytest.mark.parametrize(
    "definition, normalize",
    [("relu", "row_sum"), ("relu", "none"), ("relu", "length"), ("softmax", "row_sum")],
)
def test_oracle_agrees_with_autodiff(definition, normalize, lenient_promotion):
    given = _given(normalize=normalize)
    found = oracle.gradients(given, definition, peers_jax.cotangent(given))
    for got, expected in zip(found, _reference(given, definition), strict=True):
        assert timing.relative_error(got, np.asarray(expected)) < 1e-5
    rows, out, firing = oracle.attend(given, definition)
    np.testing.assert_allclose(out, found[0][:, rows], rtol=1e-12)
    assert firing == pytest.approx(
        151 / 2
        if definition == "softmax"
        else np.minimum(16, np.arange(150) + 1).mean()
    )


@pytest.mark.parametrize("normalize, by_head", [("row_sum", True), ("length", False)])
def test_tiles_agree_with_oracle(normalize, by_head):
    given = _given(normalize=normalize)
    upstream = peers_jax.cotangent(given)
    expected = oracle.gradients(given, "relu", upstream)
    tiling = chunked.Tiling(32, 64, by_head)
    operands = [given.query, given.key, given.value, given.bias]
    run = jax.jit(chunked.attention_and_gradients(given, tiling))
    for got, want in zip(run(*operands, upstream), expected, strict=True):
        assert timing.relative_error(np.asarray(got), want) < 1e-5
    if normalize == "row_sum":
        out = jax.jit(chunked.attention(given, tiling))(*operands)
        assert timing.relative_error(np.asarray(out), expected[0]) < 1e-5


@pytest.mark.parametrize("kind", ["gaussian", "clustered"])
def test_exactly_so_many_keys_fire(kind):
    source = inputs.Source(kind, seed=3)
    given = inputs.decode(source, inputs.Shape(keys=300, batch=2, heads=4), 7)
    assert oracle.attend(given, "relu").firing == 7
    given = inputs.causal(source, inputs.Shape(keys=300), 0.1)
    scores = np.einsum("tnh,snh->nts", given.query[0], given.key[0].repeat(2, axis=1))
    fired = (scores > given.bias[0].T[..., None]) & np.tril(np.ones((300, 300), bool))
    expected = [min(i + 1, max(16, round(0.1 * (i + 1)))) for i in range(300)]
    np.testing.assert_array_equal(fired.sum(-1), np.tile(expected, (8, 1)))


def _contestant(name, log, *, ours=False, failing=False):
    def prepare():
        if failing:
            raise OSError("no such thing in /a/folder/of/this/machine.so\nat all")
        return lambda: lambda: log.append(name) or (np.zeros(1),)

    return timing.Contestant(name, "relu", prepare, ours=ours)


def test_turns_are_interleaved():
    log = []
    contestants = [_contestant("a", log), _contestant("b", log)]
    found = timing.race(
        contestants, rounds=2, score=lambda *_: 0.0, tick=lambda name: None
    )
    assert "".join(log) == "aaaabbbb" + "bbbbaaaa"  # nobody always comes first
    assert found["a"].calls == 6 and len(found["a"].rounds) == 2


def test_failure_of_a_peer_is_words_and_of_ours_an_error():
    log = []
    peer = _contestant("peer", log, failing=True)
    race = {"rounds": 2, "score": lambda *_: 0.0, "tick": lambda name: None}
    found = timing.race([peer, _contestant("b", log)], **race)
    assert found["peer"].failure == "OSError: no such thing in machine.so"
    assert found["peer"].ms is None and found["b"].calls == 6
    with pytest.raises(OSError, match="no such thing"):
        timing.race([_contestant("ours", log, ours=True, failing=True)], **race)


def test_nothing_larger_than_memory_is_run():
    given = _given(40)
    assert peers.score_gib("prefill", given) == 4 * 3 * 8 * 40 * 40 / 2**30
    with pytest.raises(Unavailable, match="needs about 13 GiB"):
        peers.check_memory(13.0)


def test_judge_allows_rounding_alone():
    truth = [members.Truth(np.array([1, 5]), np.array([7]))]
    assert members.judge([np.array([5, 1])], truth) == (1.0, "")
    assert members.judge([np.array([5, 1, 7])], truth) == (1.0, "")
    assert members.judge([np.array([5])], truth)[0] == 0.5
    for wrong in ([5], [1, 5, 8], [1, 1, 5]):
        assert members.judge([np.array(wrong)], truth)[1]
    assert members.judge(np.array([3]), truth) == (1.0, "")
    assert (
        members.judge(np.array([4]), truth)[1]
        and members.judge(np.array([1]), truth)[1]
    )


def test_break_even_and_slope():
    assert tables.crossing([1, 10, 100], [0.5, 0.5, 2.0]) == pytest.approx(10**1.5)
    assert tables.crossing([1, 10, 100], [2.0, 0.5, 2.0]) == pytest.approx(10**1.5)
    assert tables.crossing([4, 8], [1.5, 2.0]) == 4
    assert tables.crossing([4, 8], [1.5, 0.9]) is None
    assert tables.slope([1, 10, 100], [2, 20, 200]) == pytest.approx(1.0)


def test_decode_draws_lengths():
    names = ("hsr", "dense", "dense einsum", "append alone", "torch-sdpa")
    rows = [
        {"case": "gqa", "keys": keys, "name": name, "ms": keys * 1.0}
        | {"this_over_hsr": 1.0, "status": "measured"}
        for keys in (512, 1024)
        for name in names
    ]
    lines = decode.draw(rows)["times.png"].axes[0].get_lines()
    assert [line.get_label() for line in lines] == ["hsr", "dense", "torch-sdpa"]
    summary = decode.summarize(rows)["gqa"]
    assert summary["log_log_slope"]["hsr"] == pytest.approx(1.0)


def _follows(found, written):
    """Asserts that numbers are those of a summary, up to the digits of its rows."""
    if isinstance(found, dict):
        assert found.keys() == written.keys()
        for name, value in found.items():
            _follows(value, written[name])
    elif isinstance(found, list):
        for one, other in zip(found, written, strict=True):
            _follows(one, other)
    elif isinstance(written, float):
        assert found == pytest.approx(written, rel=2e-3, abs=2e-3)
    else:
        assert found == written


@pytest.mark.parametrize(
    "folder",
    sorted(
        {file.parent for file in RESULTS.rglob("summary.json")}
        # Judged by tests/test_paper.py; and drawn from more than its rows.
        - {RESULTS / "paper" / "claims", RESULTS / "paper" / "theorem43"}
    ),
    ids=lambda folder: str(folder.relative_to(RESULTS)),
)
def test_committed_rows_lead_to_their_summary_and_pictures(folder):
    about = json.loads((folder / "environment.json").read_text())
    module = module_of(about["command"].split()[3])
    summary, found = results.read(folder)
    if hasattr(module, "summarize"):
        again = results.clean(module.summarize(found["results"]))
        _follows(again, {name: summary[name] for name in again})
    pictures = module.draw(found["results"])
    drawn = {file.name for file in folder.glob("*.png")} - {"memory.png"}
    assert drawn <= pictures.keys()
    for figure in pictures.values():
        assert all(axes.has_data() for axes in figure.axes)


def test_memory_of_one_call(monkeypatch, capsys):
    monkeypatch.setattr(chunked, "TILINGS", list(chunked.TILINGS))
    monkeypatch.setattr(memory, "WARM_UP_KEYS", 32)
    assert memory.main(["auto", "64", "0"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["peak_mib"] >= found["before_mib"] > 10
    monkeypatch.setitem(sys.modules, "flash_attention_jax", None)
    memory.main(["flash-attention-jax", "64", "0"])
    assert json.loads(capsys.readouterr().out) == {"status": "not installed"}


def test_extra_holds_the_peers(repo_root):
    project = tomllib.loads((repo_root / "pyproject.toml").read_text())["project"]
    extra = project["optional-dependencies"]["bench"]
    named = {re.split(r"[>=\[]", line)[0] for line in extra} - {"hsrjax"}
    used = {peer.package for peer in peers.PEERS.values()}
    used |= {peer.package for peer in search.PEERS.values()}
    assert named == used - {"jax", "tokamax"}  # tokamax: see benchmarks/README.md


@pytest.mark.parametrize("task", ["decode", "prefill", "train"])
@pytest.mark.parametrize("name", list(peers.PEERS))
@pytest.mark.filterwarnings("ignore")  # whatever other people's packages warn of
def test_installed_peer_follows_its_definition(name, task, lenient_promotion):
    peer = peers.PEERS[name]
    if not callable(peer.tasks.get(task)):
        pytest.skip("does not do this")
    if name != "jax-softmax" and version(peer.package) == "not installed":
        pytest.skip("not installed")
    given = inputs.decode(inputs.Source(), inputs.Shape(keys=192), 9)
    if task != "decode":
        given = causal.make_inputs(inputs.Source(), 192)
    (contestant,) = peers.contestants([name], task, given)
    try:
        open_ = contestant.prepare()
    except Unavailable as reason:
        pytest.skip(str(reason))
    open_()()
    found = contestant.finish(open_()())
    if peer.definition in ("relu", "softmax"):
        expected = (oracle.attend(given, peer.definition).out,)
        if task == "train":
            upstream = peers_jax.cotangent(given)
            expected = oracle.gradients(given, peer.definition, upstream)
        for got, want in zip(found, expected, strict=True):
            assert timing.relative_error(got, want) < 1e-5
    else:
        assert found[0].shape == (*given.query.shape[:3], 64)
        assert np.isfinite(found[0]).all()
