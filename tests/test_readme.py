"""What the README shows works as it stands there."""

import re

import jax.numpy as jnp


def test_examples_run(repo_root, lenient_promotion):
    text = (repo_root / "README.md").read_text()
    first, second, third = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names = {}
    exec(first, names)
    assert int(names["report"].count.min()) > 0
    assert names["out"].shape == (1, 1, 8, 64)
    names = {}
    exec(second, names)
    assert names["layer"](jnp.ones((1, 8, 32)), is_causal=True).shape == (1, 8, 32)
    # Classes look up their module by name.
    names = {"__name__": __name__}
    exec(third, names)
    assert 0 < float((names["out"] == 0).mean()) < 0.5


def test_pictures_and_files_exist(repo_root):
    text = (repo_root / "README.md").read_text()
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert len(pictures) >= 2
    for link in pictures:
        assert (repo_root / link).is_file(), link
    named = set(re.findall(r"\b(\w+\.py)\b", text))
    folders = ("hsrjax", "models", "train", "benchmarks", "tests")
    here = {path.name for x in folders for path in (repo_root / x).rglob("*.py")}
    assert named <= here, named - here
