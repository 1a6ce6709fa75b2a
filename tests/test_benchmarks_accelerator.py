"""benchmarks accelerator, rehearsed on the CPU: rows, faults, the end of time."""

import dataclasses
import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hsrjax
from benchmarks.__main__ import main
from benchmarks.accelerator import (
    choosing,
    findings,
    language,
    sequences,
    steps,
    suite,
)
from benchmarks.accelerator.findings import Finding
from benchmarks.commands import accelerator
from benchmarks.files import results
from benchmarks.harness import devices, inputs, internals, timing
from benchmarks.harness.loops import Loop
from benchmarks.harness.timing import NO_TIME

pytestmark = pytest.mark.usefixtures("compile_cache", "forgotten_kernels")
FEW = ("hsr (kernels)", "hsr (xla)", "auto", "hsrjax dense (kernels)")
FEW += ("hsrjax dense (xla)", "dense einsum (keys transposed)")


@pytest.fixture
def forgotten_kernels():
    """Kernels that are played are known to this test alone."""
    known = dict(internals.registry._implementations)
    yield
    internals.registry._implementations.clear()
    internals.registry._implementations.update(known)


@pytest.fixture
def two_layers(monkeypatch):
    """Of the released model, whose programs compile faster than those of all six."""
    opened = sequences.released()
    model = nnx.clone(opened.model)
    model.config = dataclasses.replace(model.config, num_layers=2)
    model.blocks = nnx.List(list(model.blocks)[:2])
    cut = opened._replace(model=model)
    monkeypatch.setattr(language, "released", lambda: cut)


def rehearse(tmp_path, *words):
    return main(["accelerator", "--quick", "--out", str(tmp_path), *map(str, words)])


def read(tmp_path):
    summary, tables = results.read(tmp_path / "accelerator")
    return summary["rows"], tables["results"]


def without(*names):
    return ["--without", *(x for x in FEW if x not in names)]


def found_in(seconds=1.0, number=3):
    return Finding(number, measured=seconds, ours_us=1.0, dense_us=2.0, dense="other")


@pytest.fixture
def made_up(monkeypatch):
    """Blocks that take no time; the second fails."""

    def fails(setting):
        raise RuntimeError("out of everything\nand more")

    blocks = [
        ((3,), lambda setting: [found_in()]),
        ((4,), fails),
        ((6, 7), lambda setting: [found_in(2.0, 6), found_in(3.0, 7)]),
    ]
    monkeypatch.setattr(accelerator, "BLOCKS", blocks)
    return blocks


def test_rows_are_written_as_they_come_and_failures_are_rows(made_up, tmp_path, capsys):
    assert rehearse(tmp_path, "--skip", 0) == 0
    rows, _ = read(tmp_path)
    assert {n: row["measured"] for n, row in rows.items()} == {
        "3": 1.0,
        "4": None,
        "6": 2.0,
        "7": 3.0,
    }
    assert rows["4"]["status"] == "RuntimeError: out of everything"
    printed = capsys.readouterr().out
    assert "row 4: RuntimeError" in printed and "fastest dense" in printed
    files = {file.name for file in (tmp_path / "accelerator").iterdir()}
    assert files == {
        "results.csv",
        "summary.json",
        "environment.json",
        "rows.png",
        "table.txt",
    }


def test_what_was_found_stays_when_time_or_patience_end(
    made_up, monkeypatch, tmp_path, capsys
):
    assert rehearse(tmp_path, "--only", 3, 4) == 0
    made_up[0] = ((3,), lambda setting: [found_in(5.0)])

    def interrupted(setting):
        raise KeyboardInterrupt

    made_up[2] = ((6, 7), interrupted)
    assert rehearse(tmp_path, "--skip", 0) == 130
    assert "holds the rows until then" in capsys.readouterr().err
    rows, _ = read(tmp_path)
    assert rows.keys() == {"3", "4"} and rows["3"]["measured"] == 5.0
    # A run for which no time is left says so, and replaces no number by that.
    assert rehearse(tmp_path, "--skip", 0, "--minutes", "0.001") == 0
    rows, _ = read(tmp_path)
    assert rows["3"]["measured"] == 5.0
    assert rows["6"]["status"] == rows["7"]["status"] == NO_TIME


def test_a_device_that_is_lost_is_left_to_another_process(
    made_up, monkeypatch, tmp_path
):
    lost = {"row": 3, "name": "hsr (kernels)", "us": None, "max_relative_error": None}
    lost |= {"status": "XlaRuntimeError: CUDA_ERROR_ILLEGAL_ADDRESS"}
    made_up[0] = ((3,), lambda setting: [Finding(3, rows=[lost], status="broken")])
    monkeypatch.setattr(accelerator, "_answers", lambda: False)
    started = []
    monkeypatch.setattr(
        accelerator.subprocess, "run", lambda words, **_: started.append(words)
    )
    rehearse(tmp_path, "--skip", 0)
    (words,) = started
    assert words[:4] == [sys.executable, "-m", "benchmarks", "accelerator"]
    assert words[words.index("--only") + 1 :][:4] == ["3", "4", "6", "7"]
    assert words[words.index("--without") + 1] == "hsr (kernels)"


def test_a_row_on_the_cpu(tmp_path, capsys):
    """Kernels played by JAX, a baseline, a peer that needs a GPU."""
    names = ["hsr (kernels)", "dense einsum (keys transposed)"]
    assert rehearse(tmp_path, "--only", 3, *without(*names), "--json") == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    by_name = {row["name"]: row for row in found["rows"]}
    assert set(names) < by_name.keys()
    assert by_name["jax-cudnn"]["status"] == "needs a GPU"
    ours, dense = (by_name[name] for name in names)
    row = found["summary"]["rows"]["3"]
    assert row["measured"] == pytest.approx(row["dense_us"] / row["ours_us"])
    assert row["ours"] == "hsr (kernels)" and ours["max_relative_error"] <= 2**-7
    assert ours["firing_keys"] == 9 and ours["dtype"] == "bfloat16"
    assert dense["device"].startswith("cpu")


@pytest.mark.slow
def test_rows_by_kernels_on_the_cpu(tmp_path, two_layers):
    """But those of other tests here; by kernels, and however slow that is."""
    chosen, names = [1, 2, 7, 9, 10, 11], ["hsr (kernels)", "hsrjax dense (kernels)"]
    words = ["--only", *chosen, "--minutes", 60, *without(*names)]
    assert rehearse(tmp_path, *words) == 0
    rows, lines = read(tmp_path)
    assert rows.keys() == {str(n) for n in (1, 2, 5, 6, 7, 8, 9, 10, 11)}
    assert all(row["measured"] > 0 for row in rows.values())
    refused = {"needs a GPU", "not installed"}
    for line in lines:
        assert line["status"] in {"measured", "passed"} | refused, line


@pytest.mark.parametrize(
    "row", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (9, 10, 11, 12))]
)
def test_a_wrong_result_is_noticed(row, monkeypatch, tmp_path, capsys):
    def wrong(name):
        real = getattr(hsrjax, name)

        def off(*arrays, method, **options):
            found = real(*arrays, method=method, **options)
            if method != "hsr":
                return found
            if isinstance(found, tuple):
                return found[0] * 1.5, found[1]
            return found * 1.5

        monkeypatch.setattr(hsrjax, name, off)

    wrong("decode_attention")
    wrong("attention")
    names = ["hsr (xla)", "hsrjax dense (xla)"]
    if row == 12:
        names = ["hsr (kernels)", "hsrjax dense (kernels)", "auto"]
    assert rehearse(tmp_path, "--only", row, *without(*names)) == 1
    assert f"wrong result: row {row}, {names[0]}" in capsys.readouterr().err
    rows, _ = read(tmp_path)
    assert rows[str(row)]["measured"] is None
    assert "differs" in rows[str(row)]["status"]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["too few", "other"])
def test_softmax_that_leaves_out_too_much_is_noticed(fault, monkeypatch, tmp_path):
    real = hsrjax.decode_attention

    def off(query, cache, *, activation, method, **options):
        if method == "hsr" and activation.top_r is not None:
            activation = dataclasses.replace(activation, top_r=8)
        elif method == "hsr" and fault == "other":
            activation = hsrjax.Softmax(epsilon=jnp.float32(0.5))
        return real(query, cache, activation=activation, method=method, **options)

    monkeypatch.setattr(hsrjax, "decode_attention", off)
    names = ["hsr (xla, row 6)", "hsr (xla, row 7)", "hsrjax dense (xla)"]
    left_out = ["hsr (kernels, row 6)", "hsr (kernels, row 7)"]
    assert names[2] in FEW and not set(left_out) & set(FEW)
    words = ["--only", 6, "--without", *left_out, "hsrjax dense (kernels)"]
    assert rehearse(tmp_path, *words, "--peers", "none") == 1
    rows, _ = read(tmp_path)
    assert "differs" in rows["7"]["status"]
    assert ("differs" in rows["6"]["status"]) == (fault == "other")


def timings_of(**us):
    found = {}
    for name, (definition, each, error) in us.items():
        name = name.replace("_", " ")
        name = {"hsr k": "hsr (kernels)", "hsr x": "hsr (xla)"}.get(name, name)
        one = timing.Contestant(name, definition, lambda: lambda: lambda: None)
        rounds = [each * 1e-6] if each else []
        failure = "" if each else "it failed"
        found[name] = timing.Timing(one, rounds=rounds, error=error, failure=failure)
    return found


def test_ratios_are_to_the_fastest_dense_that_is_right():
    timings = timings_of(
        hsr_k=("relu", 20.0, 1e-3),
        hsr_x=("relu", 90.0, 1e-3),
        auto=("relu", 10.0, 1e-3),
        dense_einsum=("relu", 60.0, 1e-3),
        wrong=("softmax", 30.0, 0.5),
        jax_cudnn=("softmax", 50.0, 1e-3),
        copy=("part", 1.0, None),
        absent=("softmax", None, None),
    )
    rows = findings.lines(2, timings, {"dtype": "bfloat16", "keys": 9})
    one = findings.compare(2, rows)
    assert one.measured == pytest.approx(2.5) and one.dense == "jax cudnn"
    assert one.ours == "hsr (kernels)" and one.status == "measured"
    status = {row["name"]: row["status"] for row in rows}
    assert status["wrong"].startswith("differs") and status["absent"] == "it failed"
    timings["hsr (kernels)"].error = 1.0
    late = findings.compare(2, findings.lines(2, timings, {"dtype": "bfloat16"}))
    assert late.measured == pytest.approx(50 / 90) and "hsr (kernels)" in late.status
    text = findings.table({2: one, 3: Finding(3, status=NO_TIME)}, "a card")
    assert "a card" in text and "2.5 x" in text and f"row 3: {NO_TIME}" in text


def test_the_scan_is_compared_with_a_copy_that_reads_and_writes():
    rows = [
        {"name": steps.SCAN, "us": 10.0, "status": "measured"},
        {"name": steps.COPY, "us": 5.0, "status": "measured"},
    ]
    given = inputs.Inputs(query=None, key=np.zeros((4, 250)), value=None, bias=None)
    one = steps._bandwidth(rows, given, 500)
    assert one.measured == pytest.approx(100 * (1000 / 10) / (2 * 500 / 5))
    assert steps._bandwidth(rows[:1], given, 500).status == f"{steps.SCAN}: measured"


LOG = """
tests/test_a.py::TestX::test_values[shape0-True-relu] PASSED             [  3%]
[gw1] [  7%] PASSED tests/test_a.py::test_b[None]
[gw0] [  9%] FAILED tests/test_a.py::test_c
tests/test_a.py::test_d SKIPPED (a cache holds one document a row)       [ 12%]
FAILED tests/test_a.py::test_c - AssertionError: assert False
"""


def test_what_pytest_says_is_a_finding():
    found = suite.judge(LOG, stopped=True)
    assert found.measured == pytest.approx(100 * 2 / 3)
    assert {row["name"]: row["status"] for row in found.rows} == {
        "tests/test_a.py::TestX::test_values[shape0-True-relu]": "passed",
        "tests/test_a.py::test_b[None]": "passed",
        "tests/test_a.py::test_c": "failed",
        "tests/test_a.py::test_d": "skipped",
    }
    assert "failed: tests/test_a.py::test_c; stopped" in found.status
    assert suite.judge("no such file\n").status == "no such file"


def test_tests_are_stopped_when_their_time_is_over():
    begun = time.monotonic()
    found = suite.contract(1.0, platforms="cpu", chosen=("tests/test_triton.py",))
    assert time.monotonic() - begun < 60
    assert found.status != "measured"


def test_models_attend_by_what_their_thread_has_chosen(monkeypatch):
    seen = []
    monkeypatch.setattr(hsrjax, "attention", lambda *_, **options: seen.append(options))
    with choosing.listening():
        hsrjax.attention(1, activation=2)
        with choosing.by("xla"):
            hsrjax.attention(1)
            hsrjax.attention(1, implementation="other")
    hsrjax.attention(1)
    assert [x.get("implementation", "-") for x in seen] == [None, "xla", "other", "-"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("accelerator --only 13", "there are rows 0 to 12, not [13]"),
        ("accelerator --minutes 0", "minutes must be above 0"),
        ("accelerator --peers nobody", "unknown peers nobody"),
        ("decode --device gpu", "--device gpu: there is none that jax can use"),
        ("train --device tpu --quick", "it finds cpu"),
        ("decode --device abacus", "device"),
    ],
)
def test_refusals_say_what_there_is(words, said, tmp_path, capsys):
    before = jax.config.jax_platforms
    assert main([*words.split(), "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1
    assert jax.config.jax_platforms == before


def test_a_device_has_results_of_its_own(monkeypatch, tmp_path, capsys):
    """As if this CPU were a GPU: loops, and a folder that says so."""
    monkeypatch.setattr(devices, "choose", lambda device: None)
    monkeypatch.setattr(devices, "decode_loop", lambda scanned: Loop(2))
    words = ["decode", "--device", "gpu", "--quick", "--json", "--keys", "96"]
    words += ["--peers", "jax-softmax", "--repeats", "1", "--out", str(tmp_path)]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["folder"] == str(tmp_path / "decode-gpu")
    rows = {row["name"]: row for row in found["rows"]}
    measured = {"hsr", "auto", "dense", "hsrjax dense", "dense einsum", "jax-softmax"}
    assert measured <= {name for name, row in rows.items() if row["ms"]}
    assert rows["hsr"]["append_ms"] and rows["hsr"]["keys_looked_at"] >= 5
