"""Every --help: an example that can be parsed, choices, defaults; and typos."""

import inspect
import re
import shlex
from pathlib import Path

import pytest

from benchmarks import capture
from benchmarks.__main__ import COMMANDS, module_of
from benchmarks.__main__ import main as benchmark
from benchmarks.contestants import peers, search
from benchmarks.header import Basics
from models import evaluate, explore, generate
from models.command import parse
from models.evaluation import tasks
from train import __main__ as train
from train import demo
from train.commands import recipes
from train.config import PRESETS

OTHERS = {
    "models.generate": generate.Options,
    "models.explore": explore.Options,
    "models.evaluate perplexity": evaluate.Read,
    **{f"models.evaluate {kind}": evaluate.Ask for kind in tasks.KINDS},
    "models.evaluate harness": evaluate.Harness,
    "benchmarks.capture": capture.Command,
    "train.demo": demo.Command,
}
OTHERS |= {f"train {name}": module.Command for name, module in train._COMMANDS.items()}
EVERY = [*OTHERS, "train", *(f"benchmarks {name}" for name in COMMANDS)]


def kind_of(name):
    if name == "train":
        return train.Command
    if name.startswith("benchmarks "):
        return module_of(name.split()[1]).Command
    return OTHERS[name]


@pytest.mark.parametrize("name", EVERY)
def test_an_example_can_be_parsed_as_it_stands(name):
    """The examples are in the docstrings, which --help shows (see below)."""
    doc = inspect.getdoc(kind_of(name)) or ""
    lines = re.findall(r"^ +python -m (.*)$", doc, re.M)
    assert lines, f"{name} has no example"
    for line in lines:
        program, *words = shlex.split(line)
        if program == "train" and words[0] not in train._COMMANDS:
            assert name == "train"
            assert train._parse(words).train.preset in PRESETS
            continue
        named = " ".join([program, words[0]]) if program != name else program
        rest = words if program == name else words[1:]
        assert named == name or kind_of(named) is kind_of(name)
        parse(kind_of(named), rest, prog=line)


@pytest.mark.parametrize(
    ("program", "words", "shown"),
    [
        (generate.main, [], ["{dense,hsr,auto,top_r,epsilon}", "(default: 128)"]),
        (train.main, [], [*PRESETS, "{none,trackio,wandb}", *train._COMMANDS]),
        (train.main, ["study"], [*recipes.STAGES, "(default: runs/study/results)"]),
        (benchmark, ["decode"], [*peers.PEERS, *search.PEERS, "runs/benchmarks;"]),
        (evaluate.main, ["needle"], ["(default: 512 1024 2048)"]),
    ],
)
def test_help_shows_examples_choices_and_defaults(program, words, shown, capsys):
    with pytest.raises(SystemExit) as stopped:
        program([*words, "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert re.search(r"^ +python -m ", printed, re.M)
    found = " ".join(re.sub(r"[│╭╮╰╯─]", " ", printed).split())
    assert [word for word in shown if word not in found] == []


@pytest.mark.parametrize(
    ("program", "words", "nearest"),
    [
        (train.main, ["reprot", "x"], "no command 'reprot': did you mean report?"),
        (train.main, ["--preset", "tinny", "--out", "x"], "did you mean tiny?"),
        (train.main, ["study", "kind"], "did you mean kinds?"),
        (train.main, ["xyz"], "no command 'xyz': choose one of report, compare"),
        (demo.main, ["--preset", "micra"], "did you mean micro?"),
        (evaluate.main, ["needel"], "called needel: did you mean needle? choose from"),
        (benchmark, ["decod"], "unknown command decod: did you mean decode? choose"),
        (benchmark, ["decode", "--cases", "gpa"], "did you mean gqa? choose from"),
        (benchmark, ["decode", "--peers", "jax-softmx"], "did you mean jax-softmax?"),
        (
            generate.main,
            ["--model", "x", "--promt", "y"],
            "Perhaps you meant: --prompt",
        ),
    ],
)
def test_typos_are_answered_with_the_nearest(program, words, nearest, capsys):
    assert program(words) == 2
    error = capsys.readouterr().err
    assert nearest in error
    assert error.count("\n") == 1


def test_benchmarks_write_below_runs_unless_told_otherwise():
    assert Basics().folder == Path("runs/benchmarks")
    assert Basics(quick=True).folder == Path("runs/benchmarks/quick")
    assert Basics(out=Path("x")).folder == Path("x")


def test_the_lists_of_commands_have_examples(capsys):
    for program in (evaluate.main, benchmark):
        assert program(["--help"]) == 0
        assert re.search(r"^ +python -m ", capsys.readouterr().out, re.M)
