"""The pages of the commands, written from the parsers that the commands use."""

from __future__ import annotations

import argparse
import inspect
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tyro

from benchmarks import capture
from benchmarks.__main__ import COMMANDS, module_of
from models import evaluate, explore, generate
from train import __main__ as train
from train import demo
from train.config import PRESETS

PAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "train": (
        "Train a model, look at runs, hand a model on.",
        {"train": train.Command}
        | {f"train {name}": each.Command for name, each in train._COMMANDS.items()}
        | {"train.demo": demo.Command},
    ),
    "models": (
        "Generate text, look inside a model, measure what it can do.",
        {"models.generate": generate.Options, "models.explore": explore.Options}
        | {f"models.evaluate {name}": x for name, (x, _) in evaluate._TASKS.items()},
    ),
    "benchmarks": (
        "Measure hsrjax on your machine, and the paper's claims.",
        {f"benchmarks {name}": module_of(name).Command for name in COMMANDS}
        | {"benchmarks.capture": capture.Command},
    ),
}
"""By page: what it is about, and the options of each command."""

_INDEX = """# Commands

They run from the root of a checkout. Each has `--help`, which says what stands here.
With `--json` the last line on stdout holds the results. The exit status is 0 only when
the work was done.
"""


def write(folder: Path) -> None:
    """Writes the pages, and an index of them."""
    folder.mkdir(exist_ok=True)
    index = [_INDEX]
    for page, (about, kinds) in PAGES.items():
        parts, lines = [f"# python -m {page}", about], []
        for names, kind in _by_kind(kinds):
            title = ", ".join([names[0], *(name.split()[-1] for name in names[1:])])
            said, example = _described(kind)
            parts += [f"## {title}", said, f"```sh\n{example}\n```" if example else ""]
            parts += [f"```{{program}} {names[0]}\n```", *_options(names[0], kind)]
            anchor = re.sub(r"[^\w -]", "", title).replace(" ", "-")
            sentence = re.split(r"(?<=[.])\s", said)[0]
            lines.append(f"- [`python -m {title}`]({page}.md#{anchor}): {sentence}")
        (folder / f"{page}.md").write_text("\n\n".join(parts) + "\n")
        index += [f"## {page}", about, "\n".join(lines)]
    index.append("\n".join(["```{toctree}", ":hidden:", "", *PAGES, "```"]))
    (folder / "index.md").write_text("\n\n".join(index) + "\n")


def _by_kind(kinds: dict[str, Any]) -> list[tuple[list[str], Any]]:
    """Commands that have the same options are told together."""
    found: dict[Any, list[str]] = {}
    for name, kind in kinds.items():
        found.setdefault(kind, []).append(name)
    return [(names, kind) for kind, names in found.items()]


def _described(kind: Any) -> tuple[str, str]:
    """The docstring of a dataclass, and the example that it ends with."""
    about, _, example = (inspect.getdoc(kind) or "").partition("For example:")
    return _plain(about.strip()), inspect.cleandoc(example)


def _options(name: str, kind: Any) -> Iterator[str]:
    """The groups of a parser that are not empty."""
    default: Any = tyro.MISSING_NONPROP
    if name == "train":
        default = train.Command(out=tyro.MISSING, train=PRESETS["tiny"])
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.AvoidSubcommands)
    with warnings.catch_warnings():
        # It is to go one day, but nothing else has the parser that `tyro.cli` uses.
        warnings.simplefilter("ignore", DeprecationWarning)
        parser = tyro.extras.get_parser(kind, config=config, default=default)
    for group in parser._action_groups:
        actions = [x for x in group._group_actions if "--help" not in x.option_strings]
        own = vars(kind).get("__annotations__", {})
        actions.sort(key=lambda action: _rank(action, own))
        if actions:
            title = (group.title or "").split(".")[-1].removeprefix("positional ")
            yield f"**{title.capitalize()}**"
            yield from map(_option, actions)


def _rank(action: argparse.Action, own: dict[str, Any]) -> int:
    """What is needed first, then a command's own, and what every command has last."""
    flag = (action.option_strings or [""])[0]
    if flag == "--json":
        return 3
    if "(required)" in (action.help or ""):
        return 0
    return 1 if flag[2:].replace("-", "_") in own else 2


def _option(action: argparse.Action) -> str:
    flags, about = action.option_strings, " ".join((action.help or "").split())
    value = str(action.metavar).replace("{None}|", "")
    value = re.sub(r"\{?\[(\w+) \[\1 \.\.\.\]\]\}?", r"[\1 ...]", value)
    shown = f"{flags[0]} {value}" if flags else value
    if action.nargs == 0 and len(flags) == 2:  # --flag and --no-flag
        on = about.endswith("(default: True)")
        shown, about = flags[on], about.removesuffix(f"(default: {on})")
    said, default = re.fullmatch(r"(.*?) ?(?:\(default: (.*)\))?", about).groups()
    words = [_plain(said)]
    if default not in (None, "", "''", "None"):
        words.append(f"(default: `{default}`)")
    return f"````{{option}} {shown}\n{' '.join(words)}\n````"


def _plain(text: str) -> str:
    """Without what Markdown would take for markup, outside of code."""
    pieces = text.split("`")
    pieces[::2] = [re.sub(r"([\\*_<>|$])", r"\\\1", piece) for piece in pieces[::2]]
    return "`".join(pieces)
