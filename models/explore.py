"""A page that shows what the heads of a model look at, token by token.

python -m models.explore --model PATH --text FILE --out page.html [--help]
"""

from __future__ import annotations

import codecs
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from models.command import carry_out
from models.compilation import keep_programs
from models.decoding.generation import generate
from models.exploration.page import Shown, make_page
from models.exploration.reading import Reading, layers_that_fit, read
from models.files.atomic import write_atomic
from models.network.config import Method
from models.network.transformer import Transformer
from models.opening import ModelOptions, Opened, attending, open_model
from models.text.tokenizer import Tokenizer

MOST_TOKENS = 16_384
_ROOM = 0.9
"""Share of the page that rows may take."""
_NAMED = 6
"""Layers that are named one by one, at most."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(ModelOptions):
    """Writes one HTML file that shows which keys fire for every token of a text.

    The file works offline in any browser: keys and their weights in the text, all heads
    by sparsity, for a query how many keys are visible, possible, looked at and fire,
    and decoding step by step.

    For example:

        python -m models.explore --model runs/mine --text book.txt --out page.html
    """

    text: Path
    """Text file (UTF-8)."""
    out: Path
    """The page, an .html file."""
    tokens: int = 4096
    """Show at most so many tokens, the first ones."""
    draw: int = 0
    """Let the model go on for so many tokens, and show them too."""
    layers: tuple[int, ...] = ()
    """Layers whose heads are listed key by key; none named is as many as fit."""
    beside: Path | None = None
    """A second model of the same vocabulary, in place of softmax of the same scores."""
    r: int = 64
    """With --attention top_r: keys kept per query."""
    epsilon: float = 1e-3
    """With --attention epsilon: largest share of the softmax mass left out."""
    megabytes: float = 5.0
    """Size of the page at most; fewer keys of a query are listed in a smaller one."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: instead of those of the process.

    Returns:
        Exit status: 0 done, 1 failed while running, 2 refused, 130 Ctrl-C.
    """
    keep_programs()
    return carry_out(
        Options,
        arguments,
        _run,
        prog="python -m models.explore",
        doing="exploring",
    )


def _run(options: Options) -> None:
    _check(options)
    opened = open_model(options.model, dtype=options.dtype)
    model = attending(
        opened.model, options.attention, r=options.r, epsilon=options.epsilon
    )
    notes: list[str] = []
    config = model.config
    if config.attention_kind == "softmax" and not (config.top_r or config.epsilon):
        notes.append(
            "Under softmax every key fires. --attention top_r or epsilon looks at few, "
            "with a bound on what is left out."
        )
    tokens = _tokens(options, opened.tokenizer, notes)
    drawn = len(tokens) if options.draw else None
    if options.draw:
        tokens += _drawn(options, model, opened.tokenizer, tokens)
    second = _second(options, opened.tokenizer, tokens, notes)
    models = [model] if second is None else [model, second]
    budget = int(_ROOM * 1e6 * options.megabytes) // len(models)
    names = [_name(x) for x in (options.model, options.beside)]
    shown = [
        Shown(_read(options, x, tokens, budget, notes), _label(x), name)
        for x, name in zip(models, names, strict=False)
    ]
    page = make_page(
        shown,
        _texts(opened.tokenizer, tokens),
        title=options.text.name,
        drawn=drawn,
        notes=notes,
        megabytes=options.megabytes,
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(options.out, page.html)
    _report(options, shown, len(tokens), page.cap, notes)


def _check(options: Options) -> None:
    """Refuses before the model is loaded what cannot be done."""
    if options.out.is_dir():
        raise ValueError(
            f"{options.out} is a folder: name a file with --out {options.out}/page.html"
        )
    if not 1 <= options.tokens <= MOST_TOKENS:
        raise ValueError(
            f"--tokens must lie between 1 and {MOST_TOKENS:,}, got {options.tokens:,}; "
            "leave it out for 4,096"
        )
    if not 0 <= options.draw <= MOST_TOKENS - options.tokens:
        raise ValueError(
            f"--draw must lie between 0 and {MOST_TOKENS - options.tokens:,}, got "
            f"{options.draw:,}; with --tokens it makes at most {MOST_TOKENS:,}"
        )
    if options.megabytes < 1:
        raise ValueError(
            f"--megabytes must be 1 or more, got {options.megabytes:g}: use --tokens "
            "or --layers to show less"
        )
    if options.tail is not None:
        raise ValueError(
            "--tail has no keys to show, since it acts through means of many: leave it "
            "out"
        )


def _tokens(options: Options, tokenizer: Tokenizer, notes: list[str]) -> list[int]:
    """The tokens of the text that are shown."""
    try:
        text = options.text.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{options.text} cannot be read ({error.strerror}): give a text file with "
            "--text"
        ) from error
    tokens = tokenizer.encode(text).tolist()
    if not tokens:
        raise ValueError(f"{options.text} is empty: give a file with some text in it")
    if len(tokens) > options.tokens:
        notes.append(
            f"The text has {len(tokens):,} tokens; these are the first "
            f"{options.tokens:,}. --tokens N shows more, up to {MOST_TOKENS:,}."
        )
    return tokens[: options.tokens]


def _drawn(
    options: Options, model: Transformer, tokenizer: Tokenizer, tokens: list[int]
) -> list[int]:
    """How the model goes on with the text."""
    found = generate(model, [tokens], max_tokens=options.draw, stops=tokenizer.stops)
    return found.tokens[0]


def _second(
    options: Options, tokenizer: Tokenizer, tokens: list[int], notes: list[str]
) -> Transformer | None:
    """The model to be shown beside the first, if it reads the same tokens."""
    if options.beside is None:
        return None
    try:
        opened: Opened = open_model(options.beside, dtype=options.dtype)
    except (ValueError, OSError) as error:
        notes.append(f"No second model: {error}")
        return None
    text = tokenizer.decode(tokens)
    other = opened.tokenizer.encode(text).tolist()
    if other != tokenizer.encode(text).tolist():
        notes.append(
            f"No second model: {_name(options.beside)} has another vocabulary. Give "
            "--beside a model that was trained on the same tokens; softmax of the same "
            "scores is shown."
        )
        return None
    return opened.model


def _read(
    options: Options,
    model: Transformer,
    tokens: list[int],
    budget: int,
    notes: list[str],
) -> Reading:
    config = model.config
    heads = config.views * config.num_heads
    layers = [x for x in options.layers if 0 <= x < config.num_layers]
    wrong = sorted(set(options.layers) - set(layers))
    if wrong:
        named = ", ".join(map(str, wrong))
        notes.append(
            f"The model has no layer {named}: --layers takes 0 to "
            f"{config.num_layers - 1}."
        )
    layers = layers or layers_that_fit(
        config.num_layers,
        heads=heads,
        tokens=len(tokens),
        sparse=config.attention_kind != "softmax",
        budget=budget,
    )
    if len(layers) < config.num_layers and not options.layers:
        named = f"{len(layers)} layers"
        if len(layers) <= _NAMED:
            named = f"layers {', '.join(map(str, layers))}"
        notes.append(
            f"Keys are listed for {named} of {config.num_layers}, so that the "
            f"page stays below {options.megabytes:g} MB. --layers chooses others."
        )
    method: Method = "dense" if options.attention == "dense" else "hsr"
    with tqdm(total=config.num_layers, unit="layer", file=sys.stderr) as bar:
        return read(model, tokens, layers=layers, method=method, on_layer=bar.update)


def _label(model: Transformer) -> str:
    """What the weights of a model are called."""
    config = model.config
    if config.attention_kind == "entmax":
        return "entmax"
    if config.attention_kind != "softmax":
        return "ReLU" + ("" if config.relu_power == 1 else _raised(config.relu_power))
    if config.top_r is not None:
        return f"softmax, top {config.top_r}"
    return "softmax" if config.epsilon is None else f"softmax, ε {config.epsilon:g}"


def _raised(power: int) -> str:
    return str(power).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _name(path: str | Path | None) -> str:
    return Path(path or "").resolve().name


def _texts(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    """What each token stands for; a character of several tokens is that of the last."""
    decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
    texts = []
    for token in tokens:
        data = tokenizer.decode([token])
        text = decoder.decode(data).translate(_SEEN)
        texts.append(text or ("·" if data else "∅"))
    return texts


_SEEN = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
"""Control codes by their pictures."""


def _report(
    options: Options, shown: list[Shown], tokens: int, cap: int, notes: list[str]
) -> None:
    for line in notes:
        print(f"note: {line}", file=sys.stderr)
    size = options.out.stat().st_size
    reading = shown[0].reading
    dead = int(np.sum(reading.empty == 1))
    print(
        f"{options.out}: {size / 1e6:.1f} MB, {tokens:,} tokens, {reading.fired.size} "
        f"heads ({dead} dead), keys fired {reading.fired.mean():.2%}; at most {cap} "
        "keys of a query are listed"
    )
    options.print_json(
        {
            "out": str(options.out),
            "bytes": size,
            "tokens": tokens,
            "keys_fired": float(reading.fired.mean()),
            "dead_heads": dead,
            "layers": sorted({layer for layer, _ in reading.heads}),
            "keys_listed": cap,
            "notes": notes,
        }
    )


if __name__ == "__main__":
    sys.exit(main())
