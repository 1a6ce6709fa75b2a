"""Numbers of a run sent to a tracker: what it is told, and that none is the default."""

import dataclasses
import importlib
import sys
import types

import numpy as np
import pytest

from train.__main__ import main
from train.config import PRESETS, differences
from train.files import metrics, tracking


class Run:
    """What `init` of a tracker returns."""

    def __init__(self):
        self.logged, self.ended = [], False

    def log(self, numbers, *, step):
        self.logged.append((step, numbers))

    def finish(self):
        self.ended = True


@pytest.fixture(params=["trackio", "wandb"])
def tracker(request, monkeypatch):
    """A package with the interface of wandb, under both names."""
    module = types.ModuleType(request.param)
    module.__spec__ = importlib.machinery.ModuleSpec(request.param, None)
    module.begun = []

    def init(**told):
        module.begun.append((told, Run()))
        return module.begun[-1][1]

    module.init = init
    monkeypatch.setitem(sys.modules, request.param, module)
    return module


def log(out, track):
    with metrics.open_writer(
        out, step=0, writes=True, track=track, options={"seed": 3}
    ) as writer:
        writer.write({"step": 1, "loss": 2.5})
        nan = np.array([[0.5, np.nan]])
        writer.write_heads(2, {"nonzero_fraction": nan})
        writer.write({"step": 2, "loss": 2.0, "validation_loss": 2.25})


def test_a_tracker_gets_what_the_files_get(tracker, tmp_path):
    log(tmp_path, tracker.__name__)
    log(tmp_path, tracker.__name__)  # resumed
    (told, run), (again, _) = tracker.begun
    assert told == again
    assert told["project"] == "hsrjax"
    assert told["name"] == tmp_path.name
    assert told["config"] == {"seed": 3}
    assert told["resume"] == "allow"
    assert ("id" in told) is (tracker.__name__ == "wandb")
    assert run.ended
    assert run.logged == [
        (1, {"loss": 2.5}),
        (2, {"nonzero_fraction/layer_0/head_0": 0.5}),
        (2, {"loss": 2.0, "validation_loss": 2.25}),
    ]
    lines = metrics.read_csv(tmp_path / "metrics.csv")
    assert [line["loss"] for line in lines] == [2.5, 2.0]


def test_nothing_is_tracked_unless_asked_for(tracker, tmp_path):
    log(tmp_path, "none")
    assert tracker.begun == []
    assert PRESETS["tiny"].track == "none"
    micro = PRESETS["micro"]
    assert differences(dataclasses.replace(micro, track="wandb"), micro) == []


def test_one_process_of_many_tracks(tracker, tmp_path):
    with metrics.open_writer(tmp_path, step=0, writes=False, track="wandb") as writer:
        writer.write({"step": 1})
        writer.write_heads(1, {})
    assert tracker.begun == []
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_is_missing_is_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    out = tmp_path / "run"
    assert main(["--preset", "micro", "--out", str(out), "--track", "wandb"]) == 2
    captured = capsys.readouterr()
    assert "pip install wandb, or leave --track out" in captured.err
    assert captured.err.count("\n") == 1
    assert not out.exists()


def test_trackers_are_three():
    with pytest.raises(ValueError, match="track must be none, trackio or wandb"):
        dataclasses.replace(PRESETS["micro"], track="tensorboard")
