"""The page: one HTML file that holds all that it shows and loads nothing."""

from __future__ import annotations

import importlib.resources
import json
import string
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from models.exploration.packing import deflate, pack_all
from models.exploration.reading import Reading

_SCRIPTS = ("data.js", "text.js", "panels.js", "main.js")
_FOLDER = "models.exploration"


class Shown(NamedTuple):
    """A model on the page.

    Attributes:
      reading: of the text.
      label: what its weights are called, such as "ReLU^3".
      name: what the model is called.
    """

    reading: Reading
    label: str
    name: str


class Page(NamedTuple):
    """A page, and what was left off it.

    Attributes:
      html: the whole file.
      cap: keys listed of a query at most.
    """

    html: str
    cap: int


def make_page(
    shown: Sequence[Shown],
    tokens: Sequence[str],
    *,
    title: str,
    drawn: int | None = None,
    notes: Sequence[str] = (),
    megabytes: float = 5.0,
) -> Page:
    """Makes a page of one model, or of two that read the same tokens.

    Args:
      shown: the models; the second one is shown beside the first.
      tokens: their texts.
      title: of the page.
      drawn: the first token that the model drew itself, if any.
      notes: sentences to be shown at the top.
      megabytes: size of the file at most, if one key for each query fits.

    Example:
      >>> page = make_page([Shown(reading, "ReLU^3", "mine")], texts, title="a text")
      >>> Path("page.html").write_text(page.html, encoding="utf-8")
    """
    script = "\n".join(_source(name) for name in _SCRIPTS)
    parts = {"style": _source("page.css"), "script": script}
    images = [deflate(_levels(x.reading.pictures).tobytes()) for x in shown]
    # Columns and the rest of what is written about a head take about 600 bytes.
    rest = sum(map(len, (*parts.values(), *images, *tokens))) + 6 * len(tokens)
    heads = sum(len(x.reading.heads) for x in shown)
    budget = int(megabytes * 1e6) - rest - 20_000 - 600 * heads
    every = [head for x in shown for head in x.reading.heads.values()]
    packed, cap = pack_all(every, budget=budget)
    models, blobs, rows = [], [], iter(packed)
    for number, (one, image) in enumerate(zip(shown, images, strict=True)):
        columns = {}
        for layer, head in one.reading.heads:
            found = next(rows)
            columns[f"{layer}-{head}"] = found.columns
            blobs.append(_blob(f"head-{number}-{layer}-{head}", found.text))
        blobs.append(_blob(f"pictures-{number}", image))
        label = one.label if len(shown) == 1 else f"{one.label} {one.name}"
        models.append(_about(one) | {"label": label, "columns": columns})
    about = {"title": title, "facts": _facts(shown, tokens), "tokens": list(tokens)}
    about |= {"drawn": drawn, "notes": list(notes), "models": models}
    text = json.dumps(about, ensure_ascii=False).replace("<", "\\u003c")
    data = f'<script type="application/json" id="about">{text}</script>'
    template = string.Template(_source("page.html"))
    html = template.substitute(
        parts, title=_escaped(title), data="\n".join([data, *blobs])
    )
    return Page(html, cap)


def _about(shown: Shown) -> dict[str, Any]:
    """What the page is told of a model beside its rows."""
    reading = shown.reading
    layers, heads = reading.fired.shape
    looked = [
        [_looked(reading, layer, head) for head in range(heads)]
        for layer in range(layers)
    ]
    return {
        "layers": layers,
        "heads": heads,
        "power": reading.power,
        "group": reading.group,
        "windows": reading.windows,
        "detailed": sorted({layer for layer, _ in reading.heads}),
        "start": _start(reading),
        "side": reading.pictures.shape[-1],
        "fired": np.round(reading.fired, 7).tolist(),
        "empty": np.round(reading.empty, 7).tolist(),
        "looked": looked,
    }


def _looked(reading: Reading, layer: int, head: int) -> float | None:
    """Share of the visible keys that decoding looks at, where rows are known."""
    found = reading.heads.get((layer, head))
    if found is None:
        return None
    length = len(found.looked)
    window = reading.windows[layer] or length
    visible = np.minimum(np.arange(1, length + 1), window).sum()
    return round(float(found.looked.sum() / visible), 7)


def _start(reading: Reading) -> tuple[int, int]:
    """The head to begin with: of those with a key in most rows the sparsest."""
    return min(
        reading.heads,
        key=lambda at: (reading.empty[at] > 0.5, reading.fired[at]),
    )


def _levels(pictures: np.ndarray) -> np.ndarray:
    """Shares as u8, logarithmic: 0 is a thousandth of what even weights would be."""
    side = pictures.shape[-1]
    with np.errstate(divide="ignore"):
        level = 1 + np.log10(np.minimum(pictures * side, side) / side) / 3
    return np.round(255 * np.clip(level, 0, 1)).astype(np.uint8)


def _facts(shown: Sequence[Shown], tokens: Sequence[str]) -> str:
    names = ", ".join(
        f"{x.name} ({x.label}, {x.reading.fired.shape[0]} layers of "
        f"{x.reading.fired.shape[1]} heads)"
        for x in shown
    )
    return f"{names} · {len(tokens):,} tokens"


def _blob(name: str, text: str) -> str:
    return f'<script type="text/plain" id="{name}">{text}</script>'


def _source(name: str) -> str:
    file = importlib.resources.files(_FOLDER).joinpath("page", name)
    return file.read_text(encoding="utf-8")


def _escaped(text: str) -> str:
    for mark, name in (("&", "amp"), ("<", "lt"), (">", "gt")):
        text = text.replace(mark, f"&{name};")
    return text
