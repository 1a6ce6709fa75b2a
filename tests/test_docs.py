"""The pages of docs/: what they show works, and the reference leaves nothing out."""

import contextlib
import inspect
import io
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

import hsrjax
from docs._ext import commands, docstrings
from models.command import parse
from tests.test_api import ACTIVATIONS, FUNCTIONS, PROTOCOLS, RESULTS, public_functions
from tests.test_help import EVERY
from tests.test_readme import blocks
from train import __main__ as train

REPO = Path(__file__).resolve().parents[1]
PAGES = [
    path
    for path in sorted((REPO / "docs").rglob("*.md"))
    if path.parent.name not in ("commands", "notebooks")
]
OF_MODULES = public_functions(hsrjax.theory) | public_functions(hsrjax.reference)
PUBLIC = {
    f"hsrjax.{name}": getattr(hsrjax, name)
    for name in FUNCTIONS | ACTIVATIONS | PROTOCOLS | RESULTS
} | OF_MODULES


def with_code(*languages):
    """The pages that show some, for a test of each."""
    found = [path for path in PAGES if blocks(path.read_text(), *languages)]
    names = [str(path.relative_to(REPO / "docs")) for path in found]
    return pytest.mark.parametrize("page", found, ids=names)


@with_code("python")
def test_code_runs(page, lenient_promotion):
    """From top to bottom, pasted into a fresh Python."""
    code = "\n".join(blocks(page.read_text(), "python"))
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(code, page.name, "exec"), {"__name__": "__main__"})


@with_code("bash", "sh")
def test_commands_can_be_parsed(page):
    """Every `python -m` has the options it is given, and every make target is there."""
    makefile = (REPO / "Makefile").read_text()
    for code in blocks(page.read_text(), "bash", "sh"):
        subprocess.run(["bash", "-n"], input=code, text=True, check=True)
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:2] == ["python", "-m"]:
                check_command(words[2:])
            if words[:1] == ["make"]:
                assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), line


def check_command(words):
    """Parses it, or raises what the command itself would print."""
    program, *rest = words
    if program == "train" and rest[0] not in train._COMMANDS:
        train._parse([word for word in rest if word != "--resume"])  # asks for a run
        return
    kinds = {
        name: x for _, kinds in commands.PAGES.values() for name, x in kinds.items()
    }
    if " ".join(words[:2]) in kinds:
        program, rest = " ".join(words[:2]), words[2:]
    parse(kinds[program], rest, prog=program)


def test_addresses_are_the_projects():
    urls = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["urls"]
    for page in PAGES:
        for link in re.findall(
            r"https://[^\s)\"'`>]*hsrjax[^\s)\"'`>]*", page.read_text()
        ):
            assert link.startswith((urls["Source"], urls["Documentation"])), page
            place = re.fullmatch(
                rf"{urls['Source']}/(?:blob|tree)/main/([^#]+).*", link
            )
            assert place is None or (REPO / place[1]).exists(), (page, link)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_docstring_has_every_section(name):
    """In this order; `Raises` where something is raised, no cost for plain formulas."""
    thing = PUBLIC[name]
    needed = ["Args", "Returns", "Raises", "Cost", "Example", "Source"]
    if inspect.isclass(thing):
        needed.remove("Returns")
    if thing is hsrjax.Activation:
        needed.remove("Args")
    if name in OF_MODULES and "raise " not in inspect.getsource(thing):
        needed.remove("Raises")
    if name.startswith("hsrjax.theory."):
        needed.remove("Cost")
    if name.removeprefix("hsrjax.") in RESULTS:
        needed = ["Attributes"]
    lines = inspect.getdoc(thing).splitlines()
    found = [section for section, _ in docstrings._sections(lines) if section]
    assert found == needed
    assert lines[0].endswith((".", ":")) and not lines[1], "begins with no one sentence"


def test_reference_has_every_public_name():
    found = []
    for page in (REPO / "docs" / "api").glob("*.rst"):
        text = page.read_text()
        (module,) = re.findall(r"currentmodule:: (\S+)", text)
        names = re.findall(r"auto(?:function|class):: (\S+)", text)
        found += [f"{module}.{name}" for name in names]
    assert sorted(found) == sorted(PUBLIC)


def test_docstrings_are_plain_text_but_for_code():
    doc = """Keys with `<a, k> >= b` of |q|, by *B and x_i.

    Also `build`s.

    Args:
      keys: f[*B, S, H], of
        any dtype.

    Returns:
      Two: f32[..., Q] and one more,
      on lines of their own.

    Source: nobody: see
    `there`.
    """
    link = {"build": "hsrjax.build"}.get
    text = "\n".join(docstrings.render(inspect.cleandoc(doc).splitlines(), link))
    shown = text.replace(r"\ ", "")
    assert r"``<a, k> >= b``" in shown
    assert r"\|q\|" in shown and r"\*B" in shown and r"x\_i" in shown
    assert r":py:obj:`build <hsrjax.build>`\ s" in text
    assert ":Arguments:\n\n   - **keys**: ``f[*B, S, H]``, of any dtype." in shown
    assert (
        ":Returns: Two: ``f32[..., Q]`` and one more, on lines of their own." in shown
    )
    assert ":Source: Nobody: see ``there``." in shown


def test_pages_of_commands_have_every_command_and_option(tmp_path):
    commands.write(tmp_path)
    told = {name for _, kinds in commands.PAGES.values() for name in kinds}
    assert told >= set(EVERY)
    index = (tmp_path / "index.md").read_text()
    for page, (_, kinds) in commands.PAGES.items():
        assert f"\n{page}\n" in index
        _, *sections = re.split(
            r"^## ", (tmp_path / f"{page}.md").read_text(), flags=re.M
        )
        for section in sections:
            name = section.split("\n")[0].split(",")[0]
            flags = re.findall(r"^````{option} --(?:no-)?([\w-]+)", section, re.M)
            assert set(flags) == flags_in_help(kinds[name]), name


def flags_in_help(kind):
    """What the options are called that `--help` lists."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        parse(kind, ["--help"], prog="x")
    lines = re.findall(r"^[│ ]*--([a-z][\w-]*)", printed.getvalue(), re.M)
    return set(lines) - {"help"}
