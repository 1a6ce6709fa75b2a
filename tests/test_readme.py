"""The README is short, and what it shows works as it stands there."""

import contextlib
import io
import re
import subprocess
import tomllib

import matplotlib
import pytest

import hsrjax
from docs import figures

plt = figures.plt

LONGEST = 900
"""Words, as `wc -w` counts them: code, tables and pictures' descriptions included."""


@pytest.fixture(scope="module")
def text(repo_root):
    return (repo_root / "README.md").read_text()


def blocks(text, *languages):
    """The code between fences, of several languages in turn."""
    return re.findall(rf"```(?:{'|'.join(languages)})\n(.*?)```", text, flags=re.DOTALL)


def test_is_short(text):
    assert len(text.split()) <= LONGEST


def test_examples_print_what_is_shown(text):
    """Pasted into a fresh Python; what follows a block is all that it prints."""
    shown = re.findall(r"```python\n(.*?)```\s+```text\n(.*?)```", text, re.DOTALL)
    assert len(shown) == len(blocks(text, "python")) >= 1
    for code, expected in shown:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, {"__name__": "__main__"})
        assert printed.getvalue() == expected


def test_example_is_sparse(text):
    """At most 1 % of the keys fire, and hardly more of them are looked at."""
    (shown,) = blocks(text, "text")
    fire, looked, equal = shown.splitlines()
    keys = int(fire.split()[-1])
    numbers = [[int(x) for x in re.findall(r"\d+", row)] for row in (fire, looked)]
    assert 0 < min(numbers[0]) and max(numbers[0][:-1]) < 0.01 * keys
    assert max(numbers[1]) < 0.02 * keys
    assert equal.endswith("True")


def test_links_and_pictures_are_there(text, repo_root):
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    links += re.findall(r'(?:src|srcset)="([^"]+)"', text)
    here = [link for link in links if "://" not in link]
    assert len(here) > 10 and sum(link.endswith(".png") for link in here) >= 2
    for link in here:
        assert (repo_root / link.partition("#")[0]).exists(), link


def test_pictures_have_descriptions(text):
    for tag in re.findall(r"<img [^>]*>", text):
        assert re.search(r'alt="[^"]{20,}"', tag), tag


def test_address_is_the_projects(text, repo_root):
    with open(repo_root / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    addresses = re.findall(r"https://[^\s\")]*hsrjax[^\s\")]*", text)
    assert len(addresses) >= 2 and set(addresses) <= set(project["urls"].values())
    commands = "\n".join(blocks(text, "bash"))
    extras = re.findall(r"\[(\w+)\]", commands)
    assert {"cuda", "tpu"} <= set(extras) <= set(project["optional-dependencies"])


def test_commands_can_be_parsed(text, repo_root):
    makefile = (repo_root / "Makefile").read_text()
    commands = blocks(text, "bash", "sh")
    for code in commands:
        subprocess.run(["bash", "-n"], input=code, text=True, check=True)
    targets = re.findall(r"^make ([\w-]+)", "\n".join(commands), flags=re.MULTILINE)
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_names_are_public(text):
    names = set(re.findall(r"(?<!/)\bhsrjax\.(\w+)\b", text))
    assert len(names) >= 5 and names <= set(hsrjax.__all__)


def test_idea_shows_the_numbers_of_its_description(text):
    """Those of keys; scores and thresholds have none there."""
    figure, axes = plt.subplots(1, 2)
    figures.draw_plane(axes[0], figures.THEMES["light"])
    figures.draw_intervals(axes[1], figures.THEMES["light"])
    drawn = [x.get_text() for x in figure.findobj(matplotlib.text.Text)]
    plt.close(figure)
    (described,) = re.findall(r'alt="([^"]*)" src="[^"]*idea-light', text)
    numbers = lambda words: set(re.findall(r"\d[\d,]*\d", words))
    assert len(numbers(described)) == 6
    assert numbers(described) <= numbers(" ".join(drawn))


def test_speed_is_drawn_from_the_results_that_are_kept(monkeypatch, tmp_path):
    """Shades of 255 on average: 3 where all times of hsr are a fifth longer."""
    kept = figures.FIGURES
    monkeypatch.setattr(figures, "FIGURES", tmp_path)
    figures.speed()
    for path in sorted(tmp_path.iterdir()):
        drawn, picture = (255 * plt.imread(x) for x in (path, kept / path.name))
        assert drawn.shape == picture.shape
        assert abs(drawn - picture).mean() < 1, path.name
