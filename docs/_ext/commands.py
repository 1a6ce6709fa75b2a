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

_CONFIG = (tyro.conf.OmitArgPrefixes, tyro.conf.AvoidSubcommands)
_TRAIN = train.Command(out=tyro.MISSING, train=PRESETS["tiny"])
PAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "train": (
        "Train a model, look at runs, hand a model on.",
        {"train": train.Command}
        | {f"train {name}": each.Command for name, each in train._COMMANDS.items()}
        | {"train.demo": demo.Command},
    ),
    "models": (
        "Generate text, evaluate models and look inside them.",
        {"models.generate": generate.Options}
        | {f"models.evaluate {task}": kind for task, (kind, _) in evaluate._TASKS.items()}
        | {"models.explore": explore.Options},
    ),
    "benchmarks": (
        "Measure hsrjax on your machine, and the paper's claims.",
        {f"benchmarks {name}": module_of(name).Command for name in COMMANDS}
        | {"benchmarks.capture": capture.Command},
    ),
}
"""By page: what it is about, and the options of each command."""


def write(folder: Path) -> None:
    """Writes the pages and an index of them."""
    folder.mkdir(exist_ok=True)
    for name, (about, kinds) in PAGES.items():
        parts = [f"# python -m {name}", about, *map(section, kinds, kinds.values())]
        (folder / f"{name}.md").write_text("\n\n".join(parts) + "\n")
    (folder / "index.md").write_text(_INDEX.format(pages="\n".join(PAGES)))


_INDEX = """# Commands

They run from the root of a checkout. Each has `--help`, which says what stands here, and
those with `--json` end with one line on stdout that holds the results. The exit status
is 0 only when the work was done.

```{{toctree}}
:maxdepth: 2

{pages}
```
"""


def section(name: str, kind: Any) -> str:
    """A command: what it does, an example, and its options by group."""
    about, example = _described(kind)
    parts = [f"## {name}", about]
    if example:
        parts.append(f"```sh\n{example}\n```")
    parts.append(f"```{{program}} {name}\n```")
    for title, actions in _groups(name, kind):
        parts += [f"**{title}**", *map(_option, actions)]
    return "\n\n".join(parts)


def _described(kind: Any) -> tuple[str, str]:
    """The docstring of a dataclass, and the example that it ends with."""
    about, _, example = inspect.getdoc(kind).partition("For example:")
    return _plain(about.strip()), inspect.cleandoc(example)


def _groups(name: str, kind: Any) -> Iterator[tuple[str, list[argparse.Action]]]:
    """Titles and arguments of the groups of a parser that are not empty."""
    default = _TRAIN if name == "train" else tyro.MISSING_NONPROP
    with warnings.catch_warnings():
        # Deprecated, but the one way to the parser that `tyro.cli` uses.
        warnings.simplefilter("ignore", DeprecationWarning)
        parser = tyro.extras.get_parser(kind, config=_CONFIG, default=default)
    for group in parser._action_groups:
        actions = [x for x in group._group_actions if "--help" not in x.option_strings]
        if actions:
            title = (group.title or "").split(".")[-1].removesuffix(" options")
            yield title.replace("positional arguments", "arguments"), actions


def _option(action: argparse.Action) -> str:
    flags, about = action.option_strings, " ".join((action.help or "").split())
    shown = f"{flags[0]} {action.metavar}" if flags else str(action.metavar)
    if action.nargs == 0 and len(flags) == 2:  # --flag and --no-flag
        on = about.endswith("(default: True)")
        shown, about = flags[on], about.removesuffix(f"(default: {on})")
    about, default = re.fullmatch(r"(.*?) ?(?:\(default: (.*)\))?", about).groups()
    words = [_plain(about), f"(default: `{default}`)" if default else ""]
    return f"````{{option}} {shown}\n{' '.join(words)}\n````"


def _plain(text: str) -> str:
    """Words that Markdown would take for markup, outside of code."""
    pieces = text.split("`")
    pieces[::2] = [re.sub(r"([\\*_<>|$])|--", _escaped, piece) for piece in pieces[::2]]
    return "`".join(pieces)


def _escaped(found: re.Match) -> str:
    return rf"\{found[0]}" if found[1] else r"\-\-"
