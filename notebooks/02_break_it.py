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
# # Exactness and certificates: break it if you can
#
# `hsrjax` promises four things. A key that belongs to a half-space is **never missed**.
# ReLU attention by half-space reporting **equals** dense attention, values and
# gradients. Softmax attention that leaves keys out comes with a **bound** on its error.
# And where something goes wrong, NaN say, it goes wrong **exactly where dense attention
# does**.
#
# You will see attacks on each of them: ties, huge keys, keys that are almost zero, tiny
# capacities, offsets chosen by an adversary, and a search that tries to push a score
# out of its certified interval. The judge is `hsrjax.reference`: slow, obviously right,
# sharing no code with the rest. In the end it is your turn. It takes a minute or so on
# two CPU cores.

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
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import hsrjax

GREY, BLUE, ORANGE, RED = "#b8b8b8", "#2563a8", "#e08214", "#b2182b"
plt.rcParams.update({"figure.dpi": 150, "axes.spines.top": False})
plt.rcParams.update({"axes.spines.right": False, "font.size": 10})
static = ("method", "capacity", "is_causal", "return_info")
attention = jax.jit(hsrjax.attention, static_argnames=static)
reference = jax.jit(hsrjax.reference.attention)

# %% [markdown]
# ## Attack 1: hide a key
#
# An attack is a set of keys and some half-spaces (a normal and an offset each). The
# judge computes every score in float64. Where float32 rounding alone decides, either
# answer is right: the judge knows how far that goes, `hsrjax.reference.rounding`. Any
# other key that is missed, or reported without being a member, is a **break**.


# %%
@jax.jit
def report(keys, normals, offsets):
    index = hsrjax.build(keys)
    return hsrjax.query(index, normals, offsets, capacity=len(keys))


def judge(keys, normals, offsets):
    """Counts members, those missed, and those wrongly reported."""
    found = report(*map(jnp.asarray, (keys, normals, offsets)))
    members = missed = wrong = 0
    for row, normal, offset in zip(found.indices, normals, offsets, strict=True):
        exact = keys.astype(np.float64) @ normal.astype(np.float64)
        doubt = hsrjax.reference.rounding(keys, normal)
        reported = np.isin(np.arange(len(keys)), row)
        members += int((exact >= offset).sum())
        missed += int((~reported & (exact - offset > doubt)).sum())
        wrong += int((reported & (offset - exact > doubt)).sum())
    return members, missed, wrong


# %% tags=["varies"]
S, H, T = 512, 32, 24  # keys, head size, half-spaces
draw = np.random.default_rng(0)
gauss = draw.standard_normal((S, H)).astype(np.float32)
normals = draw.standard_normal((T, H)).astype(np.float32)
whole = draw.integers(-3, 4, (S, H)).astype(np.float32)
whole_normals = draw.integers(-3, 4, (T, H)).astype(np.float32)
outlier = gauss.copy()
outlier[7] *= 2.0**60
sizes = np.float32(10.0) ** draw.uniform(-30, 15, (S, 1)).astype(np.float32)


def through_a_key(keys, normals):
    """Each offset is the exact score of some key: it lies on the plane."""
    return (normals * keys[:T]).sum(axis=1)


attacks = {
    "ties: whole numbers on the plane": (whole, whole_normals, None),
    "all keys the same": (np.tile(gauss[:1], (S, 1)), normals, None),
    "all keys zero": (0 * gauss, normals, np.zeros(T)),
    "one key 2^60 times as long": (outlier, normals, np.full(T, 3.0)),
    "lengths from 1e-30 to 1e15": (gauss * sizes, normals, None),
    "offset +inf": (gauss, normals, np.full(T, np.inf)),
    "offset -inf": (gauss, normals, np.full(T, -np.inf)),
    "offset the largest number": (gauss, normals, np.full(T, 3.4e38)),
}
print(f"{'attack':34s} members  missed  wrong")
for name, (keys, a, offsets) in attacks.items():
    offsets = through_a_key(keys, a) if offsets is None else offsets
    members, missed, wrong = judge(keys, a, np.asarray(offsets, np.float32))
    print(f"{name:34s} {members:7,d} {missed:7d} {wrong:6d}")
    assert missed == wrong == 0

# %% [markdown]
# ## Attack 2: a search that wants to break the bound
#
# Each key has an 8-bit sketch, and from it `hsrjax` computes an interval that must hold
# the key's true score. If one score ever left its interval, a key could be lost. So let
# a search attack it: 64 attackers, each with a query and 8 keys of its own, change both
# at random, and keep what brings a score closest to the edge of its interval. Drawn is
# how close they get, as a share of the interval's width: below zero is a break.

# %%
ATTACKERS, STEPS = 64, 500


@jax.jit
def slack(query, keys):
    """Room between the scores and their bounds, as a share of the width."""
    lower, upper = hsrjax.build(keys, reorder=False).sketch.intervals(query[:, None])
    exact = jnp.einsum("ah,ash->as", query, keys, precision="highest")
    lower, upper = lower[:, 0, :8], upper[:, 0, :8]
    room = jnp.minimum(exact - lower, upper - exact) / (upper - lower)
    return room.min(axis=1)


def attack(carry, key):
    query, keys, room = carry
    ways = jax.random.split(key, 3)
    size = 10.0 ** jax.random.uniform(ways[2], (ATTACKERS, 1), minval=-4, maxval=0)
    other = query + size * jax.random.normal(ways[0], query.shape)
    others = keys + size[..., None] * jax.random.normal(ways[1], keys.shape)
    better = (new := slack(other, others)) < room
    query = jnp.where(better[:, None], other, query)
    keys = jnp.where(better[:, None, None], others, keys)
    room = jnp.minimum(room, new)
    return (query, keys, room), room


ways = jax.random.split(jax.random.key(1), 3)
query = jax.random.normal(ways[0], (ATTACKERS, 4))
keys = jax.random.normal(ways[1], (ATTACKERS, 8, 4))
start = (query, keys, slack(query, keys))
search = jax.jit(lambda start, keys: jax.lax.scan(attack, start, keys))
_, history = search(start, jax.random.split(ways[2], STEPS))
print("intervals attacked:", f"{history.size * 8:,}")
print("scores outside their interval:", int((history < 0).sum()))
assert (history >= 0).all()

# %%
figure, ax = plt.subplots(figsize=(8, 3.6))
ax.plot(100 * history[:, ::2], color=GREY, lw=0.5)
ax.plot(100 * history.min(axis=1), color=BLUE, lw=2, label="the best attacker")
ax.axhline(0, color=RED, lw=1.5)
ax.text(STEPS, -0.5, "a break would be below", color=RED, ha="right", va="top")
ax.set(xlabel="steps of the search", ylabel="room to the bound, % of the interval")
ax.set(ylim=(-4, None), title="64 attackers (grey: every second), keys in 4 dimensions")
ax.legend(frameon=False)
plt.tight_layout()

# %% [markdown]
# The attackers get closer, and stop in front of the bound: it counts every rounding,
# its own too. The proof stands in the docstring of `hsrjax/_src/index/sketch.py`.
#
# ## Attack 3: too little room
#
# `capacity` is the number of slots of one gather. With one slot and a hundred keys that
# fire, a library that drops what does not fit would be far off. Here the rest takes
# further exact passes; `overflow` says so, and the result stays.

# %%
B, T, S, N, K, H = 1, 64, 256, 4, 2, 16
ways = jax.random.split(jax.random.key(2), 4)
q = jax.random.normal(ways[0], (B, T, N, H))
k, v = (jax.random.normal(way, (B, S, K, H)) for way in ways[1:3])
relu = hsrjax.ReLU(power=2, bias=0.5)
exact = reference(q, k, v, activation=relu)

out, info = attention(
    q, k, v, activation=relu, method="hsr", capacity=1, return_info=True
)
same = bool(jnp.allclose(out, exact, rtol=1e-5, atol=1e-5))
print("slots: 1, most keys of a row:", info.count.max())
print("overflow:", bool(info.overflow.any()), " same as the reference:", same)
assert same

# %% [markdown]
# ## Attack 4: values and gradients, kind by kind
#
# The same inputs through `method="hsr"` and `method="dense"`: outputs, and gradients
# with respect to queries, keys and values. float32 sums in another order differ in the
# last of their 24 bits, so the difference is drawn in units of that bit, relative to
# the largest number of each array.

# %%
kinds = {
    "ReLU², bias per head": hsrjax.ReLU(power=2, bias=jnp.array([0.1, 0.5, 1.0, 1.5])),
    "1.5-entmax": hsrjax.Entmax(alpha=1.5),
    "softmax, top 16": hsrjax.Softmax(top_r=16),
}
pull = jax.random.normal(ways[3], (B, T, N, H))


def everything(method, activation):
    """Output and the gradients of a random sum of it."""

    def attend(*arrays):
        return hsrjax.attention(*arrays, activation=activation, method=method)

    out, back = jax.vjp(attend, q, k, v)
    return out, *back(pull)


everything = jax.jit(everything, static_argnums=0)
bits = {}
for name, activation in kinds.items():
    pairs = zip(*(everything(x, activation) for x in ("hsr", "dense")), strict=True)
    bits[name] = [float(abs(a - b).max() / abs(b).max() * 2**24) for a, b in pairs]
assert max(map(max, bits.values())) < 64
print("largest difference below 64 units of the last bit:", True)

# %%
figure, ax = plt.subplots(figsize=(8, 3.6))
arrays = ("output", "gradient of q", "gradient of k", "gradient of v")
for place, (label, color) in enumerate(
    zip(arrays, (BLUE, ORANGE, RED, GREY), strict=True)
):
    heights = [found[place] for found in bits.values()]
    ax.bar(np.arange(len(kinds)) + 0.2 * place - 0.3, heights, 0.2, color=color)
    ax.plot([], [], "s", color=color, label=label)
ax.set_xticks(range(len(kinds)), [x.replace(", ", ",\n") for x in kinds], fontsize=8)
ax.set(ylabel="hsr - dense, in units of 2⁻²⁴\nof the largest number", xlabel="weights")
ax.set_title("hsr against dense: the order of float32 sums, and nothing else")
ax.legend(frameon=False, fontsize=8, ncols=2)
plt.tight_layout()

# %% [markdown]
# ## Attack 5: NaN, infinity and empty rows
#
# One NaN in one key, one infinity in another, causal attention. A NaN that is "not in
# the half-space" would silently vanish. Here the rows that it spoils are exactly those
# that it spoils in dense attention: all that can see it, and no other.

# %%
poisoned = k.at[0, 20, 0, 3].set(jnp.nan).at[0, 40, 1, 3].set(jnp.inf)
spoiled = {}
for method in ("dense", "hsr"):
    out = attention(q, poisoned, v, activation=relu, method=method, is_causal=True)
    spoiled[method] = np.asarray(jnp.isnan(out).any(axis=-1)[0])  # [T, N]
    print(f"{method:5s} rows with NaN, by head:", spoiled[method].sum(axis=0))
assert (spoiled["dense"] == spoiled["hsr"]).all()

far = hsrjax.ReLU(power=2, bias=1e6)  # nothing ever fires
empty = everything("hsr", far)
print(
    "nothing fires: largest output and gradients", [float(abs(x).max()) for x in empty]
)

# %%
figure, axes = plt.subplots(1, 2, figsize=(8, 2.6), sharey=True)
for ax, (method, rows) in zip(axes, spoiled.items(), strict=True):
    ax.imshow(rows.T, aspect="auto", cmap="Reds", vmin=0, vmax=1.4)
    ax.set(xlabel="query position, tokens", title=f"{method}: red rows are NaN")
    ax.set_yticks(range(N))
axes[0].set_ylabel("query head")
plt.tight_layout()

# %% [markdown]
# ## Attack 6: is the error bound true?
#
# Softmax gives every key some weight, so leaving keys out is an approximation.
# `Softmax(top_r=r)` and `Softmax(epsilon=e)` return a bound for each row, computed from
# the data: the true distance to full softmax, in its worst coordinate, stays below it.
# Sharp and flat rows, with and without a tail (what is left out acts through its
# sketches). Every dot is a row: on the line the bound would be the error itself, above
# the line would be a break.

# %%
sharpness = jnp.linspace(0.2, 4.0, T)[:, None, None]
sharp = q * sharpness
full = reference(sharp, k, v, activation=hsrjax.Softmax())


def certified(activation):
    """The true error and the bound of every row."""
    out, info = attention(
        sharp, k, v, activation=activation, method="hsr", return_info=True
    )
    error = np.asarray(abs(out - full).max(axis=-1), np.float64)
    return error.ravel(), np.asarray(info.error_bound).ravel()


families = {
    "top r": [hsrjax.Softmax(top_r=r) for r in (4, 64)],
    "epsilon": [hsrjax.Softmax(epsilon=e) for e in (0.3, 0.03)],
    "top r with tail": [hsrjax.Softmax(top_r=r, tail=1) for r in (4,)],
}
rows = {name: [] for name in families}
print("weights            rows  above the bound  bound / error, median")
for name, family in families.items():
    for activation in family:
        error, bound = certified(activation)
        above = int((error > bound).sum())
        limit = activation.top_r or activation.epsilon
        ratio = np.median(bound / np.maximum(error, 1e-9))
        print(
            f"{name} {limit:g}".ljust(18), f"{error.size:4d} {above:16d} {ratio:22.1f}"
        )
        assert above == 0
        rows[name].append((error, bound))

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 3.8), sharex=True, sharey=True)
for ax, (name, found) in zip(axes, rows.items(), strict=True):
    for (error, bound), activation in zip(found, families[name], strict=True):
        of = "r" if activation.top_r else "epsilon"
        label = f"{of} = {activation.top_r or activation.epsilon:g}"
        ax.loglog(bound, np.maximum(error, 1e-7), ".", ms=4, alpha=0.6, label=label)
    ax.axline((1e-3, 1e-3), (1, 1), color=RED, lw=1)
    ax.set(title=name, xlabel="certified bound on the error", xlim=(1e-5, 1e2))
    ax.set_ylim(1e-7, 1e2)
    ax.legend(frameon=False, markerscale=2, loc="lower right")
axes[0].set_ylabel("true error (unit: that of the values)")
axes[0].text(2e-5, 5, "a break would be\nabove the line", color=RED, fontsize=9)
plt.tight_layout()

# %% [markdown]
# No dot is above the line. How far they are below says how cautious the bound is: it
# knows the largest value and nothing about the directions of the others, so it may be
# tens of times too large. It is never too small.
#
# ## Your turn
#
# Change this cell. Any keys, queries and offsets, of any size: the judge is fair.

# %%
my_keys = draw.standard_cauchy((512, 32)).astype(np.float32)
my_normals = draw.standard_cauchy((24, 32)).astype(np.float32)
my_offsets = np.quantile(my_normals @ my_keys.T, 0.95, axis=1).astype(np.float32)

members, missed, wrong = judge(my_keys, my_normals, my_offsets)
print(f"{members} members, {missed} missed, {wrong} wrongly reported")
print("You broke it! Please report it." if missed + wrong else "Not broken.")

# %% [markdown]
# ## What to try next
#
# - Attack gradients: `jax.test_util.check_grads` on `hsrjax.attention`.
# - Attack growing caches: `extend` token by token, then `decode_attention`.
# - If you break it, open an issue with the cell above: nothing is more welcome.
# - `03_speed_on_your_machine` asks what exactness costs, and when it pays.
