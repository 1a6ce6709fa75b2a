"""What GitHub, PyPI, Docker and pre-commit read agrees with pyproject.toml."""

import re
import shlex
import tomllib

import pytest
import yaml


@pytest.fixture(scope="module")
def project(repo_root):
    return tomllib.loads((repo_root / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def workflows(repo_root):
    files = sorted((repo_root / ".github" / "workflows").glob("*.yml"))
    return {file.stem: yaml.safe_load(file.read_text()) for file in files}


@pytest.fixture(scope="module")
def forms(repo_root):
    files = sorted((repo_root / ".github" / "ISSUE_TEMPLATE").glob("[0-9]*.yml"))
    assert files
    return {file.stem: yaml.safe_load(file.read_text())["body"] for file in files}


def commands(job):
    return [step["run"] for step in job.get("steps", []) if "run" in step]


def test_ci_is_the_one_command_on_every_python_that_is_promised(workflows, project):
    job = workflows["ci"]["jobs"]["ci"]
    assert commands(job) == [".ci/run"]
    prefix = "Programming Language :: Python :: 3."
    promised = [c for c in project["classifiers"] if c.startswith(prefix)]
    pythons = job["strategy"]["matrix"]["python"]
    assert pythons == [c.rpartition(" ")[2] for c in promised]


def test_workflows_may_do_no_more_than_they_need(workflows):
    for name, workflow in workflows.items():
        assert set(workflow["permissions"]) <= {"contents"}, name
        assert "write" not in str(workflow["permissions"]), name
    writing = {
        (name, scope)
        for name, job in workflows["release"]["jobs"].items()
        for scope, access in job.get("permissions", {}).items()
        if access == "write"
    }
    assert writing == {
        ("pypi", "id-token"),
        ("github", "contents"),
        ("pages", "pages"),
        ("pages", "id-token"),
    }


def test_actions_are_pinned(workflows):
    steps = [
        step["uses"]
        for workflow in workflows.values()
        for job in workflow["jobs"].values()
        for step in job.get("steps", [])
        if "uses" in step
    ]
    assert steps
    for step in steps:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step), step
    assert len(set(steps)) == len({step.partition("@")[0] for step in steps})


def test_nothing_is_released_that_ci_did_not_pass(workflows):
    jobs = workflows["release"]["jobs"]
    assert jobs["ci"]["uses"] == "./.github/workflows/ci.yml"
    assert "ci" in jobs["pypi"]["needs"]
    assert jobs["pypi"]["environment"]["name"] == "pypi"
    assert jobs["github"]["needs"] == "pypi"


def test_citation_is_of_this_version(repo_root, project):
    citation = yaml.safe_load((repo_root / "CITATION.cff").read_text())
    assert citation["title"] == project["name"]
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"]
    assert citation["repository-code"] == project["urls"]["Source"]
    assert citation["url"] == project["urls"]["Documentation"]


def test_addresses_are_those_of_pyproject(repo_root, project):
    urls = project["urls"]
    name = project["name"]
    known = re.compile(rf"https?://(?:github\.com/[\w-]+/{name}\b|{name}[\w.-]*\.\w+)")
    files = [file for file in repo_root.glob("*") if file.suffix in (".md", ".cff")]
    for folder in (".github", "notebooks", "docs"):
        files += (repo_root / folder).rglob("*.*")
    read = {".md", ".cff", ".yml", ".py", ".ipynb"}
    named = {
        (str(file.relative_to(repo_root)), address.rstrip("."))
        for file in files
        if file.suffix in read and "_build" not in file.parts
        for address in known.findall(file.read_text())
    }
    assert ("CITATION.cff", urls["Source"]) in named
    assert {address for _, address in named} <= {urls["Source"], urls["Documentation"]}
    assert {urls["Issues"], urls["Changelog"]} == {
        f"{urls['Source']}/issues",
        f"{urls['Source']}/blob/main/CHANGELOG.md",
    }


def test_environment_that_issues_ask_for_can_be_printed(forms, project, capsys):
    asked = {
        field["attributes"]["description"]
        for body in forms.values()
        for field in body
        if field.get("id") == "environment"
    }
    (text,) = asked
    python, option, program = shlex.split(text.split("```")[1])
    assert (python, option) == ("python", "-c")
    exec(program, {})
    printed = capsys.readouterr().out
    assert f"hsrjax {project['version']}" in printed
    assert "jaxlib" in printed and "devices" in printed


def test_program_that_shows_a_wrong_result_shows_none(forms, capsys):
    fields = {field.get("id"): field for field in forms["2-wrong-result"]}
    exec(fields["program"]["attributes"]["value"], {})
    assert 0 < float(capsys.readouterr().out) < 1e-5


def test_image_has_what_it_copies(repo_root):
    ignored, *kept = [
        line
        for line in (repo_root / ".dockerignore").read_text().splitlines()
        if not line.startswith(("#", "**"))
    ]
    assert ignored == "*"
    lines = (repo_root / "Dockerfile").read_text().splitlines()
    copies = [line.split()[1:-1] for line in lines if line.startswith("COPY ")]
    copied = [name for copy in copies for name in copy]
    assert sorted(copied) == sorted(name.removeprefix("!") for name in kept)
    assert all((repo_root / name).exists() for name in copied)


def test_what_is_called_by_make_is_a_target(repo_root, workflows):
    targets = re.findall(r"^([a-z-]+):", (repo_root / "Makefile").read_text(), re.M)
    config = yaml.safe_load((repo_root / ".pre-commit-config.yaml").read_text())
    (repo,) = config["repos"]
    assert repo["repo"] == "local"  # what the hooks run is what CI runs
    lines = [hook["entry"] for hook in repo["hooks"]]
    jobs = workflows["release"]["jobs"]
    lines += [line for job in jobs.values() for line in commands(job)]
    made = [line.split()[1:] for line in lines if line.startswith("make ")]
    made = [
        word for words in made for word in words if word[0] != "-" and "=" not in word
    ]
    assert set(made) == {"notebooks-sync", "docs"} <= set(targets)
