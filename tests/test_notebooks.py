"""Each notebook runs from top to bottom, and its .ipynb says what its .py says.

The .py (jupytext's percent format) is what people read, lint and change; the .ipynb
is what Colab opens. `make notebooks-sync` writes the second from the first.
"""

import pathlib
import resource
import time

import jupytext
import nbformat
import pytest

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SECONDS = 180  # each notebook, whole, on two cores


def ids(paths):
    return [path.stem for path in paths]


def processor_seconds():
    """Spent by processes that were started here and have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_every_notebook_has_its_pair():
    assert NOTEBOOKS
    assert ids(NOTEBOOKS) == ids(sorted(FOLDER.glob("*.py")))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids(NOTEBOOKS))
def test_pair_is_in_sync(path):
    notebook = nbformat.read(path, as_version=4)
    script = jupytext.read(path.with_suffix(".py"))
    cells = [[(c.cell_type, c.source) for c in nb.cells] for nb in (notebook, script)]
    assert cells[0] == cells[1], "the two differ: run make notebooks-sync"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids(NOTEBOOKS))
def test_first_code_cell_installs_on_colab_only(path):
    notebook = nbformat.read(path, as_version=4)
    first = next(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert "pip" in first and "google.colab" in first


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
    client = nbclient.NotebookClient(
        notebook,
        timeout=4 * SECONDS,  # a cell that hangs
        kernel_name="python3",
        resources={"metadata": {"path": str(repo_root)}},
    )
    start, spent = time.monotonic(), processor_seconds()
    client.execute()
    # Where other work shares the cores, waiting for them does not count.
    seconds = min(time.monotonic() - start, processor_seconds() - spent)

    done = repo_root / "runs" / "notebooks" / path.name
    done.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, done)
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    assert not [out for out in outputs if out.output_type == "error"]
    assert any("image/png" in out.get("data", {}) for out in outputs), "no picture"
    assert seconds < SECONDS, f"{path.name} took {seconds:.0f} s"
