"""Notebooks run from top to bottom, and what is committed is what they say today.

The .py (jupytext's percent format) is what people read, lint and change; the .ipynb is
what Colab opens, with its outputs. `make notebooks-sync` writes the second from the
first. A fresh run must print what is committed, but for cells tagged "varies": those
print times, or what a training run, another machine or another Python makes different.
"""

import ast
import importlib.metadata
import importlib.util
import math
import pathlib
import re
import resource
import shutil
import subprocess
import sys
import time
import tomllib
import types

import jupytext
import nbformat
import pytest

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
WITH_MODELS = [path for path in NOTEBOOKS if path.stem[:2] in ("04", "05")]
SECONDS = 180  # each notebook, whole, on two cores
MOST_BYTES = 1_500_000
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def ids(paths):
    return [path.stem for path in paths]


def code_cells(path):
    notebook = nbformat.read(path, as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def processor_seconds():
    """Spent by processes that were started here and have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def printed(cell):
    return "".join(x.text for x in cell.outputs if x.output_type == "stream")


def has_picture(cell):
    return any("image/png" in x.get("data", {}) for x in cell.outputs)


def calls_of(source):
    """What a cell calls for sure: not in functions, nor where something is tested."""
    later = (ast.FunctionDef, ast.ClassDef, ast.If, ast.Try)
    lines = [x for x in ast.parse(source).body if not isinstance(x, later)]
    nodes = [node for line in lines for node in ast.walk(line)]
    return {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}


def same_text(got, committed):
    """Equal words and whole numbers; others within a unit of the last digit, or 1 %."""
    words = [" ".join(NUMBER.sub("#", text).split()) for text in (got, committed)]
    numbers = [NUMBER.findall(text) for text in (got, committed)]
    return words[0] == words[1] and all(map(same_number, *numbers))


def same_number(got, committed):
    if "." not in committed:
        return got == committed
    unit = 10.0 ** -len(committed.partition(".")[2])
    values = [float(text.replace(",", "")) for text in (got, committed)]
    return math.isclose(*values, rel_tol=0.01, abs_tol=1.01 * unit)


def test_every_notebook_has_its_pair():
    assert len(NOTEBOOKS) == 6
    assert ids(NOTEBOOKS) == ids(sorted(FOLDER.glob("*.py")))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids(NOTEBOOKS))
def test_pair_is_in_sync(path):
    pair = nbformat.read(path, as_version=4), jupytext.read(path.with_suffix(".py"))
    cells = [
        [(x.cell_type, x.source, x.metadata.get("tags", [])) for x in notebook.cells]
        for notebook in pair
    ]
    assert cells[0] == cells[1], "the two differ: run make notebooks-sync"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids(NOTEBOOKS))
def test_outputs_are_committed(path):
    """All of one run from top to bottom, without errors, warnings and progress bars."""
    cells = code_cells(path)
    numbers = [cell.execution_count for cell in cells]
    assert numbers == list(range(1, len(cells) + 1)), "run make notebooks-sync"
    for cell in cells:
        calls = calls_of(cell.source)
        assert "print" not in calls or printed(cell), cell.source
        draws = calls & {"plt.subplots", "display"}
        assert not draws or has_picture(cell), cell.source
        kinds = {x.get("name", x.output_type) for x in cell.outputs}
        assert kinds <= {"stdout", "display_data", "execute_result"}, printed(cell)
    assert path.stat().st_size < MOST_BYTES


@pytest.mark.parametrize(
    ("got", "same"),
    [
        ("12 keys,  1.23 ms\n", True),
        ("12 keys, 1.24 ms", True),
        ("12 keys, 1.26 ms", False),
        ("13 keys, 1.23 ms", False),
        ("12 values, 1.23 ms", False),
        ("12 keys, 1.23 ms, 4", False),
    ],
)
def test_outputs_are_compared_as_rounded(got, same):
    assert same_text(got, "12 keys, 1.23 ms") == same


@pytest.mark.notebook
@pytest.mark.timeout(5 * SECONDS)
# ipykernel's own event loop code warns when a kernel is stopped.
@pytest.mark.filterwarnings("default::DeprecationWarning:jupyter_client")
@pytest.mark.filterwarnings("default::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids(NOTEBOOKS))
def test_notebook_runs(path, repo_root, monkeypatch):
    import nbclient

    # The kernel is a user's Python: without the virtual devices of conftest.py, and
    # drawing into the notebook.
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.delenv("MPLBACKEND")
    notebook = nbformat.read(path, as_version=4)
    committed = [printed(cell) for cell in notebook.cells if cell.cell_type == "code"]
    client = nbclient.NotebookClient(
        notebook,
        timeout=4 * SECONDS,  # a cell that hangs
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(FOLDER)}},
    )
    start, spent = time.monotonic(), processor_seconds()
    client.execute()
    # Where other work shares the cores, waiting for them does not count.
    seconds = min(time.monotonic() - start, processor_seconds() - spent)

    done = repo_root / "runs" / "notebooks" / path.name
    done.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, done)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell, expected in zip(cells, committed, strict=True):
        if "varies" not in cell.metadata.get("tags", []):
            got = printed(cell)
            assert same_text(got, expected), (
                f"printed: {got}\ncommitted: {expected}\nmake notebooks-sync keeps it"
            )
    assert seconds < SECONDS, f"{path.name} took {seconds:.0f} s"


# --- the first cell: where hsrjax comes from ---


def first_cells():
    return {path.stem: code_cells(path)[0].source for path in NOTEBOOKS}


def test_the_first_cell_is_the_same_in_all():
    assert len(set(first_cells().values())) == 1
    seconds = {code_cells(path)[1].source for path in WITH_MODELS}
    assert len(seconds) == 1
    for path in NOTEBOOKS:
        uses = re.search(r"^(from|import) (models|train)\b", path.read_text())
        assert not uses or path in WITH_MODELS


def test_the_address_is_that_of_the_project(repo_root):
    project = tomllib.loads((repo_root / "pyproject.toml").read_text())["project"]
    source = next(iter(first_cells().values()))
    (address,) = re.findall(r'^ADDRESS = "(.*)"$', source, flags=re.MULTILINE)
    assert address == project["urls"]["Source"]


class Machine:
    """One on which nothing is installed but what a test says; commands are recorded.

    Attributes:
        versions: of the packages that are installed.
        missing: modules that cannot be imported.
        commands: that were run.
        fails: says of a command whether it fails.
        devices: files of /dev and programs that are there.
    """

    def __init__(self, monkeypatch, folder):
        self.versions, self.commands = {"jax": "0.10.2"}, []
        self.fails = lambda line: False
        self.devices, self.missing = (), ()
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setattr(importlib.metadata, "version", self._version)
        monkeypatch.setattr(subprocess, "run", self._run)
        monkeypatch.setattr(shutil, "which", lambda name: name in self.devices or None)
        monkeypatch.setattr(
            "glob.glob", lambda name: [x for x in self.devices if x in name]
        )
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: name not in self.missing or None
        )
        self._colab = lambda: monkeypatch.setitem(
            sys.modules, "google.colab", types.ModuleType("google.colab")
        )

    def _version(self, name):
        if name not in self.versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return self.versions[name]

    def _run(self, command, **options):
        del options
        line = " ".join(command[1:])
        self.commands.append(line.removeprefix("-m pip install -q "))
        failed = self.fails(line)
        if not failed and "pip" in line:
            self.versions["hsrjax"] = "0.1.0"
        return types.SimpleNamespace(returncode=int(failed), stdout="", stderr="why\n")

    def on_colab(self):
        self._colab()
        return self

    def start(self, path=WITH_MODELS[0], cells=1):
        """Runs the first cells; what they define."""
        names = {}
        for cell in code_cells(path)[:cells]:
            exec(cell.source, names)
        return names


@pytest.fixture
def machine(monkeypatch, tmp_path):
    return Machine(monkeypatch, tmp_path)


def make_checkout(folder):
    (folder / "hsrjax").mkdir(parents=True)
    (folder / "hsrjax" / "__init__.py").touch()
    return folder


@pytest.mark.parametrize(
    ("inside", "place"), [("", "this folder"), ("notebooks", "the folder above")]
)
@pytest.mark.parametrize("colab", [False, True])
def test_a_checkout_comes_first(
    machine, tmp_path, monkeypatch, capsys, inside, place, colab
):
    checkout = make_checkout(tmp_path / "mine")
    (checkout / "notebooks").mkdir()
    monkeypatch.chdir(checkout / inside)
    if colab:
        machine.on_colab().start(cells=2)
    else:
        machine.start(cells=2)
    assert sys.path[0] == str(checkout)
    # What it needs is installed on Colab alone.
    assert machine.commands == ([f"{checkout}[train]"] if colab else [])
    said = capsys.readouterr().out
    assert f"hsrjax: from the checkout in {place}\n" in said
    assert f"models/ and train/: from the checkout in {place}\n" in said


def test_what_is_installed_is_taken(machine, capsys):
    machine.versions["hsrjax"] = "0.1.0"
    machine.on_colab().start()
    assert not machine.commands
    assert "hsrjax: as it is installed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("devices", "extras"),
    [
        ((), "[train]"),
        (("nvidia-smi",), "[train,cuda]"),
        (("/dev/vfio/",), "[train,tpu]"),
    ],
)
def test_colab_takes_pypi_and_then_the_address(machine, capsys, devices, extras):
    machine.devices = devices
    machine.on_colab().start()
    assert machine.commands == [f"hsrjax{extras}"]
    assert f"hsrjax: installed as hsrjax{extras}" in capsys.readouterr().out

    machine.versions.pop("hsrjax")
    machine.commands.clear()
    machine.fails = lambda line: line.endswith(f"hsrjax{extras}")
    address = machine.start()["ADDRESS"]
    assert machine.commands == [f"hsrjax{extras}", f"hsrjax{extras} @ git+{address}"]
    assert f"hsrjax: installed as {machine.commands[1]}" in capsys.readouterr().out


def test_nothing_can_be_installed(machine, capsys):
    machine.fails = lambda line: "pip" in line
    address = machine.on_colab().start()["ADDRESS"]
    said = capsys.readouterr().out
    assert "Not there: hsrjax[train]: why" in said
    assert f"hsrjax: missing. pip install 'git+{address}', then restart" in said


def test_elsewhere_nothing_is_installed(machine, capsys):
    machine.start()
    assert not machine.commands
    assert "hsrjax: missing. pip install" in capsys.readouterr().out


def test_after_a_restart_the_clone_is_found_again(machine, tmp_path, capsys):
    """Packages and the folder are still there, sys.path is as it was."""
    machine.on_colab().start(cells=2)
    first, clone = machine.commands
    assert first == "hsrjax[train]" and clone.startswith("clone -q --depth=1 https://")
    assert clone.endswith(str(tmp_path / "hsrjax")) and sys.path[0] == str(
        tmp_path / "hsrjax"
    )
    make_checkout(tmp_path / "hsrjax")
    sys.path.pop(0)
    machine.commands.clear()
    machine.start(cells=2)
    assert not machine.commands and sys.path[0] == str(tmp_path / "hsrjax")
    assert "hsrjax: from the checkout in hsrjax/\n" in capsys.readouterr().out


def test_without_a_clone_it_says_so(machine, capsys):
    machine.fails = lambda line: "clone" in line
    machine.missing = ("flax", "tyro")
    machine.versions["hsrjax"] = "0.1.0"
    address = machine.start(cells=2)["ADDRESS"]
    said = capsys.readouterr().out
    assert f"models/ and train/: missing. What git says: git clone {address}" in said
    assert "missing: flax, tyro. pip install '" in said


@pytest.mark.parametrize(
    ("versions", "devices", "expected"),
    [
        ({"jax": "0.9.1"}, (), "jax is missing or old: pip install -U 'jax>=0.10'"),
        ({}, (), "jax is missing or old"),
        ({"jax": "0.10.2"}, ("nvidia-smi",), "pip install -U 'jax[cuda12]', then"),
        ({"jax": "0.10.2"}, ("/dev/accel",), "pip install -U 'jax[tpu]', then"),
        ({"jax": "0.10.2"}, (), None),
        ({"jax": "1.0", "jax-cuda13-plugin": "1.0"}, ("nvidia-smi",), None),
        ({"jax": "1.0", "libtpu": "0.0.30"}, ("/dev/accel",), None),
    ],
)
def test_jax_may_be_old_or_not_see_the_chip(
    machine, capsys, versions, devices, expected
):
    machine.versions, machine.devices = versions | {"hsrjax": "0.1.0"}, devices
    machine.start()
    said = capsys.readouterr().out
    assert expected in said if expected else "pip" not in said
