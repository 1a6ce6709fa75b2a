"""Compiled programs: few for many layers, and kept for the next start."""

import os
import subprocess
import sys

import jax
import pytest
from flax import nnx

from models import compilation
from models.decoding import programs
from models.decoding.session import Sampling, Session
from models.network.config import ModelConfig
from models.network.transformer import Transformer

CONFIG = {
    "embed_dim": 32,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 16,
    "mlp_dim": 64,
}


@pytest.fixture
def restored():
    """Puts back what a test sets of jax's cache."""
    names = (
        "jax_compilation_cache_dir",
        "jax_compilation_cache_max_size",
        "jax_persistent_cache_min_compile_time_secs",
    )
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_layers_that_are_alike_are_compiled_once(lenient_promotion, count_compiles):
    """Two kinds of layers, with a window and without, are two programs a shape."""
    programs._program.cache_clear()
    config = ModelConfig(num_layers=4, window=8, window_from=2, **CONFIG)
    model = Transformer(config, rngs=nnx.Rngs(0))
    with count_compiles() as counted:
        session = Session(model, [[1, 2]], max_tokens=4, sampling=Sampling(), seed=0)
        session.prefill()
        session.decode()
    assert counted["_read"] == 4  # of two shapes each


def test_where_programs_are_kept(monkeypatch, tmp_path, restored):
    monkeypatch.delenv("HSRJAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = compilation.keep_programs()
    assert folder is not None and folder.parent == tmp_path / "hsrjax"
    assert folder.is_dir() and jax.config.jax_compilation_cache_dir == str(folder)
    monkeypatch.setenv("HSRJAX_CACHE", str(tmp_path / "other"))
    assert compilation.keep_programs() == tmp_path / "other" / folder.name
    monkeypatch.setenv("HSRJAX_CACHE", "off")
    assert compilation.keep_programs() is None
    monkeypatch.setenv("HSRJAX_CACHE", str(tmp_path / "more"))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
    assert compilation.keep_programs() is None
    assert not (tmp_path / "more").exists()


def test_a_folder_that_cannot_be_made_stops_nothing(monkeypatch, tmp_path, restored):
    (tmp_path / "file").write_text("")
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("HSRJAX_CACHE", str(tmp_path / "file"))
    assert compilation.keep_programs() is None
    assert jax.config.jax_compilation_cache_dir == before


@pytest.mark.slow
def test_a_second_start_compiles_nothing(repo_root, tmp_path):
    command = [sys.executable, "-m", "models.generate", "--prompt", "def f"]
    command += ["--model", "models/released/python-2.8m", "--max-tokens", "2"]
    env = os.environ | {"HSRJAX_CACHE": str(tmp_path), "XLA_FLAGS": ""}
    said, kept = [], []
    for _ in range(2):
        done = subprocess.run(
            command, cwd=repo_root, env=env, capture_output=True, text=True, check=True
        )
        said.append(done.stdout.splitlines()[0])
        # Small programs are kept only where a busy machine compiled them slowly.
        kept.append({x.name for x in tmp_path.rglob("*_read-*-cache")})
    assert said[0] == said[1] and kept[0] == kept[1] != set()
