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
# # Train a ReLU-attention language model beside softmax
#
# Softmax gives every key some weight, so sparse softmax attention is always an
# approximation. ReLU attention gives *exactly zero* weight to a key whose score is not
# above a threshold, so leaving those keys out changes nothing: not the output, not the
# gradients. What remains is to train models in which few keys are above the threshold.
#
# You will see two small models trained on the same bytes, one with softmax and one with
# thresholded ReLU: both losses, the zeros that appear over the steps, every head by
# itself, and what single heads look at, letter by letter. Then the ReLU model writes
# the same text twice, once looking at every key and once only at those that half-space
# reporting finds. It takes one to two minutes on two CPU cores. The model lives in
# `models/`, the training in `train/`; here they are only called.

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
import argparse
import dataclasses
import tempfile

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display

from models.decoding.generation import generate
from models.files.runs import load_run
from models.opening import open_model
from train import data, plots
from train.config import PRESETS
from train.files.metrics import read_csv, read_heads
from train.loop import train

plt.rcParams.update({"figure.dpi": 150, "axes.spines.top": False})
plt.rcParams.update({"axes.spines.right": False, "font.size": 10})

# %% [markdown]
# ## Thresholded ReLU attention
#
# Queries and keys have length 1, so their product is a cosine. Among $i$ unrelated keys
# in $H$ dimensions the largest cosine is about $\sqrt{2 \log i / H}$, so that is where
# the threshold is put for the query that sees $i$ keys, times a factor $\beta$ that the
# schedule sets and each head learns to change:
#
# $$w_{ij} = \mathrm{relu}\bigl(\langle q_i, k_j\rangle - \tau_i\bigr)^3, \qquad
# \tau_i = \beta \sqrt{2 \log i / H}.$$
#
# A model that starts with high thresholds never learns: nothing fires, so nothing has a
# gradient. The schedule therefore begins at $0$, where half of all keys fire, and
# raises the thresholds while the loss falls.

# %%
cosine = np.linspace(-0.4, 1.0, 200)
visible = np.arange(1, 513)
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3))
for beta, color in [(0.0, "#b8b8b8"), (0.35, "#74a9cf"), (0.7, "#2563a8")]:
    threshold = beta * np.sqrt(2 * np.log(visible) / 32)
    weight = np.maximum(cosine - threshold[255], 0) ** 3
    left.plot(cosine, weight, color=color, label=f"threshold x {beta}")
    right.plot(visible, threshold, color=color, label=f"threshold x {beta}")
left.set(xlabel="cosine of query and key", ylabel="weight", title="256 visible keys")
right.set(xlabel="visible keys, tokens", ylabel="threshold, cosine", title="H = 32")
left.legend(frameon=False)
plt.tight_layout()

# %% [markdown]
# ## Train both
#
# The text is the source of Python's own standard library, read byte by byte: it is on
# every machine. `PRESETS["tiny"]` is what `python -m train --preset tiny` trains; these
# two have a third of its parameters and fewer steps, for the sake of time. They differ
# in their attention alone.

# %%
preset = PRESETS["tiny"]
small = dataclasses.replace(
    preset.model, num_layers=2, embed_dim=96, mlp_dim=256, attention="dense"
)
config = dataclasses.replace(
    preset, model=small, steps=160, batch=4, eval_every=40, eval_rows=32, keep=1
)
config = dataclasses.replace(config, checkpoint_every=config.steps)
softmax = dataclasses.replace(small, attention_kind="softmax")
configs = {"softmax": dataclasses.replace(config, model=softmax), "ReLU³": config}
print(f"{config.steps} steps of {config.batch} rows of {config.row_length} bytes")

# %% tags=["varies"]
folder = pathlib.Path(tempfile.mkdtemp(prefix="hsrjax-"))
runs = {name: folder / str(number) for number, name in enumerate(configs)}
found = {name: train(configs[name], runs[name], progress=False) for name in runs}
for name, results in found.items():
    print(
        f"{name:8s} {results['parameters']:,} parameters, "
        f"{results['seconds']:.0f} s, held-out loss "
        f"{results['validation_loss']:.3f} nats per byte, zeros "
        f"{100 * (1 - results['nonzero_fraction']):.1f} %"
    )

# %% [markdown]
# ## Sparsity appears
#
# On the left both losses, on the right the share of scores whose weight is not zero.
# Under softmax it stays at 100 %; under ReLU it falls while the thresholds rise, and
# the loss goes on falling regardless.

# %%
lines = {name: read_csv(run / "metrics.csv") for name, run in runs.items()}
display(plots.draw_comparison(lines))

# %% [markdown]
# This is a short run: it shows that both learn, not which of them wins in the end.
# `train/RECIPE.md` has longer ones, with several seeds and what failed.
#
# ## Head by head
#
# Heads differ: some become very selective, some stay broad. That is why what is looked
# at is certified for each query of each head, and never assumed.

# %%
_, heads = read_heads(runs["ReLU³"])
percent = 100 * heads["nonzero_fraction"]
display(plots.draw_heads({"Non-zero scores, % (held-out text)": percent}))

# %% [markdown]
# What do they look at? The first bytes of a held-out row, for two heads: each row of
# the picture is a query, each column a key that it may see. Dark: the key fires. White:
# its weight is exactly zero. Grey: it lies in the future.

# %%
model = load_run(runs["ReLU³"])
_, held_out = data.split(data.load_corpus(config.data), row_length=config.row_length)
text = held_out[0]
SHOWN = 48
fired = plots.fired_keys(model, jnp.asarray(text[:SHOWN], jnp.int32))
marks = {" ": "␣", "\n": "⏎"}
letters = [marks.get(x, x) for x in bytes(text[:SHOWN]).decode("latin-1")]
share = fired.sum(axis=(2, 3)) / np.tril(np.ones((SHOWN, SHOWN))).sum()
order = np.argsort(share.ravel())
some = [np.unravel_index(order[place], share.shape) for place in (1, len(order) // 2)]

figure, axes = plt.subplots(1, 2, figsize=(12, 6.2))
seen = np.tril(np.ones((SHOWN, SHOWN), bool))
for ax, head in zip(axes, some, strict=True):
    picture = np.where(fired[head], 0.1, np.where(seen, 1.0, 0.85))
    ax.imshow(picture, cmap="gray", vmin=0, vmax=1)
    ax.set_xticks(range(SHOWN), letters, fontsize=7, family="DejaVu Sans Mono")
    ax.set_yticks(range(SHOWN), letters, fontsize=7, family="DejaVu Sans Mono")
    ax.set(xlabel="key: a byte of the text", ylabel="query: a byte of the text")
    ax.yaxis.labelpad = 8
    ax.set_title(f"layer {head[0]}, head {head[1]}: {100 * share[head]:.1f} % fire")
plt.tight_layout()

# %% [markdown]
# ## Generate: the same tokens from fewer keys
#
# `dense` computes every score. `hsr` finds the keys above the threshold with the
# certified int8 sketch of the growing cache, and computes the exact scores of those
# alone. No key that fires can be missed, so the text is the same, token by token.

# %% tags=["varies"]
prompt = text[:64].tolist()
draw = {"max_tokens": 160, "temperature": 0.7, "seed": 1}
made = {
    name: generate(model, [prompt], attention=name, **draw) for name in ("dense", "hsr")
}
for name, result in made.items():
    share = 100 * result.decode.keys_looked_at
    print(f"{name:6s} looked at {share:5.1f} % of the visible keys")
print(f"{100 * made['hsr'].decode.keys_fired:.1f} % of them fired\n")
print(bytes(prompt + made["hsr"].tokens[0]).decode("utf-8", errors="replace"))

# %%
same = made["dense"].tokens == made["hsr"].tokens
print("dense and hsr drew the same tokens:", same)
assert same

# %% [markdown]
# A model of this size has seen its text for half a minute, and it shows. And at 200
# keys there is nothing to gain in time: reading everything is as fast. What this shows
# is that sparsity can be trained, and that using it costs nothing in exactness.
#
# ## A model that has read for an hour
#
# `models/released/` holds a larger one, made by `python -m train --preset base` on the
# same text, cut into byte pairs. Its model card says how it was trained and what it
# cannot do. It was trained on rows of 1,024 tokens; here it continues the source of a
# module of the standard library, a prompt that is four times as long.
#
# The tokens per second are those of one short run, and say little;
# `benchmarks/results/generate/` has measured ones.

# %% tags=["varies"]
released, tokenizer = open_model(checkout / "models/released/python-2.8m")
source = pathlib.Path(argparse.__file__).read_bytes()
prompt = tokenizer.encode(source)[:4000].tolist()
made = {
    name: generate(released, [prompt], max_tokens=64, attention=name)
    for name in ("dense", "hsr")
}
for name, result in made.items():
    share = 100 * result.decode.keys_looked_at
    print(
        f"{name:6s} {result.decode.tokens_per_second:5.0f} tokens/s, "
        f"{share:5.1f} % of the visible keys looked at"
    )
written = tokenizer.decode(prompt[-40:] + made["hsr"].tokens[0])
print("\n" + written.decode(errors="replace"))

# %%
same = made["dense"].tokens == made["hsr"].tokens
print("dense and hsr drew the same tokens:", same)
assert same

# %% [markdown]
# ## What to try next
#
# - `make demo` trains a model for a few minutes and draws these pictures of it.
# - `python -m train --help` lists every option; `--data` takes a text of your own.
# - `python -m models.generate --model RUN --prompt TEXT` writes with what you trained.
# - `05_published_model` does this with a softmax model that others trained.
