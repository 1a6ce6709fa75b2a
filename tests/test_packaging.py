"""What is published is `hsrjax` and nothing else, and importing it is cheap."""

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import pytest

HEAVY = ("flax", "optax", "orbax", "grain", "matplotlib", "tensorboardX", "tyro")


def run(arguments, cwd, **environment):
    """Runs a command without this process's XLA flags and Python path."""
    keep = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PYTHONPATH")}
    result = subprocess.run(
        arguments, cwd=cwd, env=keep | environment, capture_output=True, text=True
    )
    assert result.returncode == 0, f"{arguments}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def dist(repo_root, tmp_path_factory):
    """A folder with the sdist, and the wheel built from that sdist."""
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out)]
    run([*build, str(repo_root)], cwd=out)
    return out


def test_wheel_holds_hsrjax_and_nothing_else(dist, repo_root):
    (wheel,) = dist.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    (info,) = {n.split("/")[0] for n in names} - {"hsrjax"}
    assert info.endswith(".dist-info"), names
    source = {
        str(path.relative_to(repo_root))
        for path in (repo_root / "hsrjax").rglob("*")
        if path.suffix == ".py" or path.name in ("py.typed", "costs.json")
    }
    assert {"hsrjax/py.typed", "hsrjax/_src/planning/costs.json"} <= source
    assert {n for n in names if n.startswith("hsrjax/")} == source
    assert f"{info}/licenses/LICENSE" in names


def test_sdist_holds_package_tests_and_papers(dist):
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        tops = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    papers = {"README.md", "LICENSE", "pyproject.toml", "PKG-INFO", ".gitignore"}
    assert tops == {"hsrjax", "tests"} | papers


def test_installed_wheel_works_away_from_the_checkout(dist, tmp_path):
    (wheel,) = dist.glob("*.whl")
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    run([*pip, "--target", str(site), str(wheel)], cwd=tmp_path)
    code = """
import importlib.util, pathlib, hsrjax
print(pathlib.Path(hsrjax.__file__).parent.parent)
assert hsrjax.costs.current().costs.dense
for name in ("models", "train", "tests", "notebooks", "benchmarks"):
    assert importlib.util.find_spec(name) is None, name
"""
    out = run([sys.executable, "-c", code], cwd=tmp_path, PYTHONPATH=str(site))
    assert out.strip() == str(site)


def test_version_is_the_same_everywhere(repo_root):
    import hsrjax

    project = tomllib.loads((repo_root / "pyproject.toml").read_text())["project"]
    assert hsrjax.__version__ == project["version"]
    assert f"[{project['version']}]" in (repo_root / "CHANGELOG.md").read_text()


def test_import_is_light_and_starts_no_backend(repo_root):
    # jax refuses to change the number of CPU devices once a backend is up.
    code = f"""
import sys, hsrjax, jax
loaded = sorted(set({HEAVY!r}) & set(sys.modules))
assert not loaded, loaded
jax.config.update("jax_num_cpu_devices", 3)
assert jax.device_count("cpu") == 3
"""
    run([sys.executable, "-W", "error", "-c", code], cwd=repo_root, JAX_PLATFORMS="cpu")
