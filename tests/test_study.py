"""The recipe study: what is chosen, run in a process of its own, and tabulated."""

import csv
import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from models.network.config import ModelConfig
from models.network.transformer import abstract_model
from train.__main__ import _parse, main
from train.commands import recipes, study
from train.commands.recipes import STAGES, Run


@pytest.fixture
def two_runs(monkeypatch, text):
    options = {"preset": "micro", "data": str(text), "steps": 2, "eval_every": 2}
    runs = [
        Run("one", "test", options | {"relu_power": 2}),
        Run("two", "test", options | {"attention_kind": "softmax"}),
    ]
    monkeypatch.setitem(STAGES, "test", runs)
    return runs


def test_every_run_has_options_that_exist_and_a_name_of_its_own(tmp_path):
    names = [run.name for runs in STAGES.values() for run in runs]
    assert len(names) == len(set(names))
    for runs in STAGES.values():
        for run in runs:
            command = _parse([*run.words, "--out", str(tmp_path / "x")])
            assert isinstance(command.train.model, ModelConfig)


def test_kinds_have_equal_parameters(tmp_path):
    """But for a few scalars for each head."""
    sizes = {}
    for name, options in recipes.KINDS.items():
        run = Run(name, "kinds", options)
        config = _parse([*run.words, "--out", str(tmp_path / "x")]).train.model
        params = nnx.state(abstract_model(config), nnx.Param)
        sizes[name] = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert max(sizes.values()) - min(sizes.values()) < 300, sizes


def test_runs_are_chosen_by_stage_and_pattern(two_runs):
    assert study.chosen(["test"]) == two_runs
    assert study.chosen(["test"], only=("t*", "*")) == two_runs[::-1]
    with pytest.raises(ValueError, match="there is no stage nonsense: choose from"):
        study.chosen(["nonsense"])
    with pytest.raises(ValueError, match="no run matches x"):
        study.chosen(["test"], only=("x",))


def test_a_table_keeps_the_runs_of_other_machines(tmp_path):
    """Those whose folders are not here; what is here is written anew."""
    results = tmp_path / "results"
    shutil.copytree("benchmarks/results/study", results)
    before = (results / "results.csv").read_text()
    rows = study.tabulate(tmp_path / "none", results)
    assert (results / "results.csv").read_text() == before
    here = tmp_path / "runs" / "here"
    here.mkdir(parents=True)
    model = {"attention_kind": "entmax", "relu_power": 3, "head_dim": 32}
    options = {"row_length": 8, "learning_rate": 1e-3, "seed": 0, "steps": 5}
    (here / "config.json").write_text(json.dumps({"model": model, "train": options}))
    found = {"validation_loss": 1.5, "nonzero_fraction": 0.25, "parameters": 9}
    about = {"name": rows[0]["name"], "stage": "a", "command": "python -m train"}
    about |= {"cores": 1, "commit": "c", "results": found | {"tokens_per_second": 7}}
    (here / "study.json").write_text(json.dumps(about))
    after = study.tabulate(tmp_path / "runs", results)
    assert [row["name"] for row in after] == [row["name"] for row in rows]
    assert after[0]["kind"] == "entmax"
    assert after[0]["zeros_percent"] == 75.0
    np.testing.assert_equal(after[1:], rows[1:])


def test_another_table_is_not_overwritten(tmp_path, capsys):
    for content in ("a,b\n1,2\n", "name,power\nx,many\n", "name\nx,y\n"):
        (tmp_path / "results.csv").write_text(content)
        words = ["study", "--out", str(tmp_path), "--results", str(tmp_path)]
        assert main(words) == 2
        assert "is not a study's table" in capsys.readouterr().err
        assert (tmp_path / "results.csv").read_text() == content


@pytest.mark.slow
def test_a_study_trains_skips_and_tabulates(two_runs, tmp_path, capsys):
    out, results = tmp_path / "runs", tmp_path / "results"
    words = ["study", "test", "--out", str(out), "--results", str(results)]
    words += ["--workers", "2"]
    assert main(words) == 0
    with (results / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["one", "two"]
    for row in rows:
        assert row["command"].startswith("python -m train --preset micro")
        assert row["commit"]
        assert 2 < float(row["validation_loss"]) < 7
        assert row["steps"] == "2"
    assert (results / "study.png").read_bytes()[:4] == b"\x89PNG"
    before = (out / "one" / "study.json").stat().st_mtime_ns
    assert main(words) == 0
    assert (out / "one" / "study.json").stat().st_mtime_ns == before
    (out / "two" / "study.json").unlink()
    (out / "two" / "config.json").write_text("{")
    assert main(words) == 1
    assert "two: status 2" in capsys.readouterr().err
    json.loads((out / "one" / "study.json").read_text())


def test_refusals(capsys):
    assert main(["study", "nonsense"]) == 2
    assert "there is no stage" in capsys.readouterr().err
    assert main(["study", "--workers", "0"]) == 2
    assert "workers must be 1 or more" in capsys.readouterr().err
