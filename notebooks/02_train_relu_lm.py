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
# # Training a small ReLU-attention language model
#
# Softmax gives every key some weight, so sparse softmax attention is always an
# approximation. ReLU attention gives *exactly zero* weight to a key whose score is not
# above a threshold, so leaving those keys out changes nothing: not the output, not the
# gradients. What remains is to train models in which few keys are above the threshold.
#
# This notebook trains one in about a minute on two CPU cores, watches the zeros appear,
# and then generates the same text twice from the same parameters: looking at every key,
# and looking only at the keys that half-space reporting finds. The model lives in
# `models/`, the training in `train/`; here they are only called.

# %%
# On Colab (CPU, GPU or TPU) this cell installs hsrjax. Anywhere else it does nothing.
import os
import shutil
import subprocess
import sys

REPOSITORY = ""  # @param {type:"string"}

if "google.colab" in sys.modules and not os.path.exists("hsrjax"):
    if not REPOSITORY:
        raise SystemExit("Set REPOSITORY to the git address of hsrjax, then run again.")
    extras = "train"
    if shutil.which("nvidia-smi"):
        extras += ",cuda"
    elif os.path.exists("/dev/accel0") or os.path.exists("/dev/vfio/0"):
        extras += ",tpu"
    subprocess.run(
        ["git", "clone", "-q", "--depth=1", REPOSITORY, "hsrjax"], check=True
    )
    os.chdir("hsrjax")
    pip = [sys.executable, "-m", "pip", "install", "-q", "-e", f".[{extras}]"]
    subprocess.run(pip, check=True)
    sys.path.insert(0, os.getcwd())

# %%
import argparse
import dataclasses
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image

from models.decoding.generation import generate
from models.files.runs import load_run
from models.opening import open_model
from train import data, plots
from train.config import PRESETS
from train.loop import train

plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False})
plt.rcParams.update({"axes.spines.right": False, "font.size": 10})
print(jax.devices()[0].platform, jax.__version__)

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
# raises the thresholds over the first two thirds of the training.

# %%
cosine = np.linspace(-0.4, 1.0, 200)
visible = np.arange(1, 513)
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3))
for beta, color in [(0.0, "#b8b8b8"), (0.35, "#74a9cf"), (0.7, "#2563a8")]:
    threshold = beta * np.sqrt(2 * np.log(visible) / 32)
    label = f"threshold x {beta}"
    weight = np.maximum(cosine - threshold[255], 0) ** 3
    left.plot(cosine, weight, color=color, label=label)
    right.plot(visible, threshold, color=color, label=label)
left.set(xlabel="cosine of query and key", ylabel="weight", title="256 visible keys")
right.set(xlabel="visible keys", ylabel="threshold", title="threshold, H = 32")
left.legend()
plt.tight_layout()

# %% [markdown]
# ## Train
#
# The text is the source of Python's own standard library, read byte by byte: it is on
# every machine. `PRESETS["tiny"]` is what `python -m train --preset tiny` trains; this
# one has a third of its parameters and shorter rows, for the sake of time.

# %%
preset = PRESETS["tiny"]
config = dataclasses.replace(
    preset,
    model=dataclasses.replace(preset.model, num_layers=2, embed_dim=96, mlp_dim=256),
    steps=240,
    row_length=256,
    batch=4,
    eval_every=80,
    eval_rows=32,
    checkpoint_every=240,
)
run = pathlib.Path(tempfile.mkdtemp(prefix="hsrjax-")) / "run"
results = train(config, run)
print(f"{results['parameters']:,} parameters, {results['seconds']:.0f} s")
print(f"held-out loss: {results['validation_loss']:.3f} nats/byte")
print(f"scores that are not zero: {100 * results['nonzero_fraction']:.1f} %")

# %% [markdown]
# ## Sparsity appears
#
# While the thresholds rise (dashed), the share of non-zero scores falls; the loss goes
# on falling regardless.

# %%
plots.plot_loss(run, run / "loss.png")
Image(run / "loss.png")

# %% [markdown]
# Heads differ: some become very selective, some stay broad. That is why the certificate
# is computed for each query of each head, and never assumed.

# %%
plots.plot_sparsity(run, run / "sparsity.png")
Image(run / "sparsity.png")

# %% [markdown]
# Which keys fire for which query, on held-out text: black fires, white is seen and has
# weight zero, grey lies in the future.

# %%
model = load_run(run)
corpus = data.load_corpus(config.data)
_, held_out = data.split(corpus, row_length=config.row_length)
text = held_out[0]
fired = plots.fired_keys(model, jnp.asarray(text[:128], jnp.int32))
plots.plot_fires(fired, run / "fires.png")
Image(run / "fires.png")

# %% [markdown]
# ## Generate: the same tokens from fewer keys
#
# `dense` computes every score. `hsr` finds the keys above the threshold with the
# certified int8 sketch of the growing cache, and computes the exact scores of those
# alone. No key that fires can be missed, so with the same seed the text is the same,
# token by token.

# %%
prompt = text[:64].tolist()
draw = {"max_tokens": 192, "temperature": 0.7, "seed": 1}
made = {
    name: generate(model, [prompt], attention=name, **draw) for name in ("dense", "hsr")
}
for name, result in made.items():
    share = 100 * result.decode.keys_looked_at
    print(f"{name:6s} looked at {share:5.1f} % of the visible keys")
print("fired:", f"{100 * made['hsr'].decode.keys_fired:.1f} %")
assert made["dense"].tokens == made["hsr"].tokens
print("the tokens are equal\n")
print(bytes(prompt + made["hsr"].tokens[0]).decode("utf-8", errors="replace"))

# %% [markdown]
# A model of this size has seen its text for a minute, and it shows. And at 256 keys
# there is nothing to gain in time: reading everything is as fast. What this shows is
# that sparsity can be trained, and that using it costs nothing in exactness.

# %% [markdown]
# ## A model that has read for an hour
#
# `models/released/` holds a larger one, made by `python -m train --preset base` on the
# same text, cut into byte pairs. Its model card says how it was trained and what it
# cannot do. It was trained on rows of 1,024 tokens; here it continues the source of a
# module of the standard library, a prompt that is eight times as long.

# %%
folder = pathlib.Path("models/released/python-2.8m")
if not folder.exists():
    folder = ".." / folder  # the notebook was started from its own folder
released, tokenizer = open_model(folder)
source = pathlib.Path(argparse.__file__).read_bytes()
prompt = tokenizer.encode(source)[:8000].tolist()
made = {
    name: generate(released, [prompt], max_tokens=120, attention=name)
    for name in ("dense", "hsr")
}
for name, result in made.items():
    share = 100 * result.decode.keys_looked_at
    print(
        f"{name:6s} {result.decode.tokens_per_second:5.0f} tokens/s, "
        f"{share:5.1f} % of the visible keys looked at"
    )
assert made["dense"].tokens == made["hsr"].tokens
print("the tokens are equal\n")
print(tokenizer.decode(prompt[-60:] + made["hsr"].tokens[0]).decode(errors="replace"))

# %% [markdown]
# From here: `make demo` trains a model in a few minutes, `python -m train --help` lists
# every option (`--data` takes a text of your own), and `python -m models.generate
# --model RUN --prompt TEXT` writes with what you have trained, or with a published
# softmax model: a Hugging Face folder or a GGUF file.
