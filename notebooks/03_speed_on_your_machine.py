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
# # Speed on your machine, and where dense wins
#
# Looking at few keys is not free: they have to be found. Below some length of the
# cache, or above some share of keys that fire, scoring all of them is faster. This
# notebook measures where that is on **your** machine, for a decode step of a language
# model: append one token to the cache, then let its query attend to everything.
#
# You will see three curves over the length of the cache (the best dense form,
# half-space reporting, and `method="auto"`, which chooses), the crossover, the share of
# keys at which dense wins again, and what `hsrjax.explain` says about the choice. It
# takes one to two minutes on two CPU cores.
#
# The times stored here are those of two cores of a Xeon at 2.5 GHz. Run the notebook to
# see yours; `benchmarks/results/decode/` has those of another machine, with more care.

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

# %%
import functools
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator

import hsrjax

COLORS = {"dense": "#e08214", "hsr": "#2563a8", "auto": "#333333"}
COLORS["hsr, triton"] = "#7b3294"
plt.rcParams.update({"figure.dpi": 150, "axes.spines.top": False})
plt.rcParams.update({"axes.spines.right": False, "font.size": 10})
HEADS, KV_HEADS, H, ROOM = 8, 4, 64, 128
LENGTHS = [1024, 4096, 16_384, 65_536, 131_072]

# %% [markdown]
# ## The problem
#
# 8 query heads share 4 key heads of size 64. Keys, values and the query are Gaussian;
# the weights are $\mathrm{relu}(s - b)^2$ with a threshold $b$ for each head that 1 %
# of the keys pass, but at most 256 of them.


# %%
def problem(length):
    """Keys and values of a cache, the newest query, and all scores, best first."""
    ways = jax.random.split(jax.random.key(length), 3)
    shape = (1, length, KV_HEADS, H)
    keys, values = (jax.random.normal(way, shape) for way in ways[:2])
    query = jax.random.normal(ways[2], (1, 1, HEADS, H))
    grouped = query.reshape(KV_HEADS, -1, H)
    scores = jnp.einsum("kgh,skh->kgs", grouped, keys[0], precision="highest")
    return keys, values, query, -jnp.sort(-scores.reshape(HEADS, -1) / H**0.5)


def threshold(scores, firing):
    """Half-way between the last key that fires and the next, of each head."""
    return (scores[:, firing - 1] + scores[:, firing]) / 2


# %% [markdown]
# ## The contestants
#
# `hsrjax` appends to its cache and to its index inside the timer: an index that is
# costly to keep would lose here. Dense attention is written out in two forms, which
# differ in how the cache lies in memory and in how values are summed; the faster one
# counts. Its write is a call of its own, which XLA does in place: as one program with
# the products, it takes much longer on a CPU.


# %%
@functools.partial(
    jax.jit, static_argnames=("method", "implementation"), donate_argnums=0
)
def sparse_step(cache, query, key, value, bias, method, implementation):
    cache = hsrjax.extend(cache, key, value, implementation=implementation)
    out, _ = hsrjax.decode_attention(
        query,
        cache,
        activation=hsrjax.ReLU(power=2, bias=bias),
        method=method,
        implementation=implementation,
    )
    return cache, out


@functools.partial(jax.jit, static_argnames="axis", donate_argnums=0)
def write(array, new, axis):
    last = array.shape[axis] - 1
    return jax.lax.dynamic_update_slice_in_dim(array, new, last, axis)


@functools.partial(jax.jit, static_argnames=("layout", "chunk"))
def dense(query, keys, values, bias, layout, chunk):
    grouped = query.reshape(KV_HEADS, -1, H)
    scores = jnp.einsum(f"kgh,{layout}->kgs", grouped, keys) / H**0.5
    weights = jax.nn.relu(scores - bias.reshape(KV_HEADS, -1, 1)) ** 2
    parts = weights.reshape(*weights.shape[:2], -1, chunk)
    blocks = values.reshape(KV_HEADS, -1, chunk, H)
    out = jnp.einsum("kgnc,knch->kngh", parts, blocks).sum(axis=1)
    return (out / weights.sum(axis=-1, keepdims=True)).reshape(1, 1, HEADS, H)


# %% [markdown]
# On an NVIDIA GPU the Triton kernels take part as well, if this jax has them.

# %% tags=["varies"]
index = jax.eval_shape(hsrjax.build, jax.ShapeDtypeStruct((1024, H), jnp.float32))
normals = jax.ShapeDtypeStruct((1, H), jnp.float32)
kernels = functools.partial(hsrjax.query, capacity=8, implementation="triton")
try:
    jax.eval_shape(kernels, index, normals, 0.0)
    has_triton = True
except ValueError as error:
    has_triton = False
    print(error)


# %%
def contestants(keys, values, query, bias):
    """One function per way; each takes a step and returns its output."""
    length, (new_key, new_value) = keys.shape[1], (keys[:, -1:], values[:, -1:])
    cache = hsrjax.init_cache(1, length + ROOM, KV_HEADS, H)
    held = [hsrjax.extend(cache, keys[:, :-1], values[:, :-1])]
    ways = {"hsr": ("hsr", None), "auto": ("auto", None)}
    if has_triton:
        ways["hsr, triton"] = ("hsr", "triton")

    def sparse(*how):
        held[0], out = sparse_step(held[0], query, new_key, new_value, bias, *how)
        return out

    def dense_form(layout, chunk):
        axes = ["skh".index(x) for x in layout]
        place = layout.index("s")
        arrays = [keys[0].transpose(axes), values[0].transpose(1, 0, 2)]
        news = [new_key[0].transpose(axes), new_value[0].transpose(1, 0, 2)]

        def step():
            arrays[0] = write(arrays[0], news[0], place)
            arrays[1] = write(arrays[1], news[1], 1)
            return dense(query, *arrays, bias, layout, chunk)

        return step

    steps = {name: functools.partial(sparse, *how) for name, how in ways.items()}
    steps["dense, plain"] = dense_form("ksh", length)
    steps["dense, in chunks"] = dense_form("khs", 1024)
    return steps


def race(steps, rounds=7, calls=3):
    """Median milliseconds of a call; all take turns, each after one untimed call."""
    seconds = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            jax.block_until_ready(step())
            for _ in range(calls):
                start = time.perf_counter()
                jax.block_until_ready(step())
                seconds[name].append(time.perf_counter() - start)
    found = {name: 1e3 * float(np.median(times)) for name, times in seconds.items()}
    dense = [found.pop(name) for name in list(found) if name.startswith("dense")]
    return {"dense": min(dense), **found}


# %% [markdown]
# ## Do they compute the same?
#
# Speed is worth nothing if the results differ. All of them, at the shortest length:

# %%
keys, values, query, scores = problem(LENGTHS[0])
steps = contestants(keys, values, query, threshold(scores, 10))
outputs = {name: np.asarray(step()) for name, step in steps.items()}
expected = outputs["dense, plain"]
same = [np.allclose(out, expected, rtol=1e-3, atol=1e-4) for out in outputs.values()]
print("all outputs are the same:", all(same))
assert all(same)

# %% [markdown]
# ## The race

# %% tags=["varies"]
table = {}
for length in LENGTHS:
    keys, values, query, scores = problem(length)
    bias = threshold(scores, min(256, length // 100))
    table[length] = race(contestants(keys, values, query, bias))
names = list(table[LENGTHS[0]])
print("keys in the cache", *(f"{name:>12s}" for name in names), "  (ms a step)")
for length, row in table.items():
    print(f"{length:17,d}", *(f"{row[name]:12.2f}" for name in names))


# %% tags=["varies"]
def crossover(xs, first, second):
    """Where the first stops being above the second, between points; None if nowhere."""
    gap, at = np.log(first / second), np.log(xs)
    for i in range(len(xs) - 1):
        if gap[i] * gap[i + 1] < 0:
            share = gap[i] / (gap[i] - gap[i + 1])
            return float(np.exp(at[i] + share * (at[i + 1] - at[i])))
    return None


def plain_numbers(ax):
    """1, 2, 5, 10 ... on the axis of times."""
    ax.minorticks_off()
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")


curves = {name: np.array([row[name] for row in table.values()]) for name in names}
where = crossover(LENGTHS, curves["hsr"], curves["dense"])
figure, ax = plt.subplots(figsize=(8, 4.4))
for name, curve in curves.items():
    ax.loglog(LENGTHS, curve, "o-", color=COLORS[name], label=name)
if where:
    ax.axvline(where, color="#888888", ls=":")
    ax.text(where, ax.get_ylim()[1], f" crossover: {where:,.0f} keys", va="top")
ax.set_xticks(LENGTHS, [f"{x:,}" for x in LENGTHS])
plain_numbers(ax)
ax.set(xlabel="tokens in the cache", ylabel="time of a decode step, ms")
ax.set_title("One token: append to the cache, attend to all of it")
ax.legend(frameon=False)
plt.tight_layout()
ratios = dict(zip(LENGTHS, curves["dense"] / curves["hsr"], strict=True))
print("dense / hsr:", ", ".join(f"{r:.2f} at {n:,}" for n, r in ratios.items()))

# %% [markdown]
# Left of the dotted line dense wins: there the fixed cost of many small operations
# counts. Right of it the index pays, because a step reads a byte per coordinate of a
# key, not four, and hardly any value.
#
# ## What `auto` chose, and why
#
# The choice is made from shapes and a table of what work costs, before anything runs;
# where that does not settle it, the call looks at a sample of the keys first.

# %% tags=["varies"]
for length in LENGTHS:
    cache = jax.eval_shape(lambda n=length: hsrjax.init_cache(1, n + ROOM, KV_HEADS, H))
    query = jax.ShapeDtypeStruct((1, 1, HEADS, H), jnp.float32)
    relu = hsrjax.ReLU(power=2, bias=jnp.zeros(HEADS))
    plan = hsrjax.explain(query, cache=cache, activation=relu)
    print(f"{length:7,d} keys: {plan.method}, since {plan.reason}")
print(f"\nIn full, at {LENGTHS[-1]:,} keys:\n")
print(plan)

# %% [markdown]
# ## Where dense wins again: too many keys fire
#
# The same cache of 16,384 keys, with lower and lower thresholds. Thresholds are data,
# so that nothing is compiled again.

# %% tags=["varies"]
LENGTH, SHARES = 16_384, [0.001, 0.01, 0.05, 0.2, 0.5]
keys, values, query, scores = problem(LENGTH)
by_share = {}
for share in SHARES:
    bias = threshold(scores, round(share * LENGTH))
    by_share[share] = race(contestants(keys, values, query, bias), rounds=5)
print("keys that fire", *(f"{name:>12s}" for name in names), "  (ms a step)")
for share, row in by_share.items():
    print(f"{100 * share:12.1f} %", *(f"{row[name]:12.2f}" for name in names))

# %% tags=["varies"]
percent = [100 * share for share in SHARES]
curves = {name: np.array([row[name] for row in by_share.values()]) for name in names}
where = crossover(percent, curves["hsr"], curves["dense"])
figure, ax = plt.subplots(figsize=(8, 4))
for name, curve in curves.items():
    ax.loglog(percent, curve, "o-", color=COLORS[name], label=name)
if where:
    ax.axvline(where, color="#888888", ls=":")
    ax.text(where, ax.get_ylim()[1], f"crossover: {where:.0f} % ", va="top", ha="right")
ax.set_xticks(percent, [f"{x:g}" for x in percent])
plain_numbers(ax)
ax.set(xlabel="keys that fire, %", ylabel="time of a decode step, ms")
ax.set_title(f"{LENGTH:,} tokens in the cache")
ax.legend(frameon=False)
plt.tight_layout()

# %% [markdown]
# Right of the dotted line dense wins: gathering many keys one by one costs more than
# reading all of them in a row. Full softmax is the extreme, where every key has a
# weight: it always runs dense. `auto` follows the lower of the two curves up to what
# looking first costs, and never has to be right for the result to be: both ways are
# exact.
#
# On GPUs the dense form is much harder to beat; the project's own measurements are in
# `benchmarks/results/`, with what was not measured said there. The Triton kernels
# (`implementation="triton"`) take part above if this machine has a card for them.
#
# ## What to try next
#
# - Other sizes: `HEADS`, `H`, `LENGTHS` up to what memory holds. Heads of 8 with
#   `hsrjax.reindex` are where the index wins most.
# - `python -m benchmarks decode` in the repository measures more shapes, and PyTorch
#   and others beside; `python -m benchmarks calibrate` teaches `auto` your machine.
# - Where do keys come from that fire so rarely? Training: `04_train_relu_lm`.
