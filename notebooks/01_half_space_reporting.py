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
# # Half-space reporting in pictures
#
# Attention asks, for a query $a$: *which keys $k$ have a score $\langle a, k\rangle$
# that matters?* With ReLU attention the answer is exact: the keys with $\langle a,
# k\rangle \ge b$, and no other key has any weight at all. Those keys lie on one side of
# a plane, in a **half-space**, and finding them without looking at the rest is
# *half-space reporting*.
#
# You will see what that is, why the textbook structures (trees of boxes or balls) stop
# working at the head sizes of real models, what `hsrjax` does in their place, and that
# the result misses nothing. It takes less than a minute on two CPU cores.

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

# %% [markdown]
# ## The question, in the plane
#
# 600 keys, one normal $a$ (the query), one offset $b$. `build` prepares the keys once;
# `query` reports the members. All shapes are fixed, so both compile under `jit`:
# `capacity` slots for indices, and the true number of members beside them.

# %%
build = jax.jit(hsrjax.build, static_argnames=("max_keys", "reorder"))
query = jax.jit(hsrjax.query, static_argnames="capacity")

keys = jax.random.normal(jax.random.key(0), (600, 2))
normal, offset = jnp.array([[0.8, 0.6]]), 1.6

index = build(keys)
report = query(index, normal, offset, capacity=64)
members = report.indices[0, : report.count[0]]
print("members:", int(report.count[0]), " overflow:", bool(report.overflow[0]))
print("first five ids:", members[:5], " padding:", report.indices[0, -1])


def draw_half_space(ax):
    a = np.asarray(normal[0])
    foot, along = a * offset / (a @ a), np.array([-a[1], a[0]]) / np.hypot(*a)
    ax.axline(foot, foot + along, color=RED, lw=1.5)
    ax.annotate("", foot + 0.9 * a, foot, arrowprops={"arrowstyle": "->", "color": RED})
    ax.text(*(foot + 1.0 * a), "a", color=RED)
    ax.set(xlim=(-3.6, 3.6), ylim=(-3.6, 3.6), aspect="equal")
    ax.set(xlabel="first coordinate of a key", ylabel="second coordinate")


figure, (left, right) = plt.subplots(1, 2, figsize=(10, 5))
left.scatter(*keys.T, s=8, color=GREY)
left.scatter(*keys[members].T, s=14, color=BLUE)
left.set_title("members: keys with <a, k> >= b")
draw_half_space(left)

balls, cells = index.cells, len(keys) // index.cells.size + 1
best = np.asarray(balls.upper(normal))[0, :cells]
for middle, radius, top in zip(balls.middles.T, balls.radius, best, strict=False):
    color, width = (ORANGE, 2) if top >= offset else (GREY, 0.8)
    right.add_patch(plt.Circle(middle, radius, fill=False, ec=color, lw=width))
right.scatter(*keys.T, s=4, color=GREY)
right.scatter(*keys[members].T, s=10, color=BLUE)
visited = int((best >= offset).sum())
right.set_title(f"balls around 32 keys: {visited} of {cells} must be opened")
draw_half_space(right)
plt.tight_layout()

# %% [markdown]
# In the plane the classical idea works well. Put near keys together, draw a ball around
# each group, and bound every score in it by that of its middle $m$ and its radius $r$:
# $\langle a, k\rangle \le \langle a, m\rangle + |a|\,r$, or do the same with a box and
# its best corner. A ball whose bound is below $b$ holds no member and is never opened.
# `hsrjax` does this too, for head sizes up to 8.
#
# ## Why trees die with dimension
#
# Now the same with more coordinates: 16,384 Gaussian keys in blocks of 32 that a
# balanced k-d tree puts together, 32 random queries, each with the offset that makes 64
# keys members (0.4 %). What share of the blocks does a box, or a ball, fail to exclude?

# %%
NUM_KEYS, QUERIES, MEMBERS, BLOCK = 16_384, 32, 64, 32


def gaussian_problem(dim):
    """Keys, queries, and for each query the offset that MEMBERS keys reach."""
    key_of_keys, key_of_queries = jax.random.split(jax.random.key(dim))
    keys = jax.random.normal(key_of_keys, (NUM_KEYS, dim))
    queries = jax.random.normal(key_of_queries, (QUERIES, dim))
    scores = jnp.matmul(queries, keys.T, precision="highest")
    return keys, queries, scores, jax.lax.top_k(scores, MEMBERS)[0][:, -1]


def tree_order(points):
    """Cuts the widest coordinate at its median until BLOCK points are left."""
    nodes = [np.arange(len(points))]
    while len(nodes[0]) > BLOCK:
        halves = []
        for node in nodes:
            widest = np.ptp(points[node], axis=0).argmax()
            halves += np.split(node[points[node, widest].argsort()], 2)
        nodes = halves
    return np.concatenate(nodes)


@jax.jit
def past_the_sketch(keys, queries, offsets):
    index = hsrjax.build(keys, reorder=False)
    return index.sketch.passing(queries, offsets).mean()


def measure(dim):
    """Shares of blocks or keys that each bound must look at, in percent."""
    keys, queries, scores, offsets = gaussian_problem(dim)
    order = tree_order(np.asarray(keys))
    blocks = keys[order].reshape(-1, BLOCK, dim)

    low, high = blocks.min(axis=1), blocks.max(axis=1)
    corner = jnp.maximum(queries[:, None] * low, queries[:, None] * high).sum(axis=-1)
    centre = (low + high) / 2
    radius = jnp.linalg.norm(blocks - centre[:, None], axis=-1).max(axis=1)
    length = jnp.linalg.norm(queries, axis=-1, keepdims=True)
    ball = queries @ centre.T + length * radius

    member = (scores >= offsets[:, None])[:, order]
    shares = {
        "box": (corner >= offsets[:, None]).mean(),
        "ball": (ball >= offsets[:, None]).mean(),
        "oracle": member.reshape(QUERIES, -1, BLOCK).any(axis=-1).mean(),
        "sketch": past_the_sketch(keys, queries, offsets),
        "members": member.mean(),
    }
    return {name: 100 * float(share) for name, share in shares.items()}


DIMS = [2, 4, 8, 16, 32, 64, 128]
measured = {dim: measure(dim) for dim in DIMS}
print("  H   box %  ball %  blocks with a member %   keys past the sketch %  members %")
for dim, share in measured.items():
    print(
        f"{dim:3d}  {share['box']:6.1f} {share['ball']:7.1f} {share['oracle']:14.1f}"
        f" {share['sketch']:24.2f} {share['members']:18.2f}"
    )

# %%
figure, ax = plt.subplots(figsize=(8, 4.2))
for name, label, color, style in [
    ("box", "blocks a box cannot exclude", ORANGE, "o-"),
    ("ball", "blocks a ball cannot exclude", RED, "s-"),
    ("oracle", "blocks that hold a member", GREY, "^--"),
    ("sketch", "keys that the int8 sketch cannot exclude", BLUE, "D-"),
    ("members", "members", "black", ":"),
]:
    ax.plot(DIMS, [measured[d][name] for d in DIMS], style, color=color, label=label)
ax.set(xscale="log", yscale="log", xlabel="head size H", ylabel="share looked at, %")
ax.set_xticks(DIMS, DIMS)
ax.set_yticks([0.3, 1, 3, 10, 30, 100], [0.3, 1, 3, 10, 30, 100])
ax.minorticks_off()
ax.legend(fontsize=8, loc="center right", bbox_to_anchor=(1.0, 0.42))
ax.set_title(f"{NUM_KEYS:,} Gaussian keys, {MEMBERS} members per query")
plt.tight_layout()

# %% [markdown]
# From H = 16 on, nearly every box and every ball must be opened, and by H = 32 all of
# them. This is no weakness of boxes: in high dimension 32 keys have no common
# direction, so any shape around them reaches as far towards $a$ as the best keys do.
# Even an *oracle* that knew which blocks hold a member would open 11 % of them to find
# 0.4 % of the keys. Blocks are the wrong unit: bound each **key**.
#
# ## Why the sketch does not
#
# `hsrjax` keeps a second copy of the keys in 8 bits, $k = c + s\,k_8 + e$, and writes
# the query as $a = t\,a_8 + f$. Then
#
# $$\bigl|\langle a,k\rangle - \langle a,c\rangle - s\,t\,\langle a_8,k_8\rangle\bigr|
# \;\le\; |f|\,|s\,k_8| + |a|\,|e| .$$
#
# The middle term is an int8 dot product: a quarter of the bytes of float32 keys, and
# fast on every backend. The right side is known, and small whatever the dimension,
# because the rounding error $e$ points in no particular direction while its length is
# about 1 % of the key's. Keys whose upper bound is below $b$ are excluded with
# certainty; the rest, hardly more than the members, are scored in float32.

# %%
keys, queries, scores, offsets = gaussian_problem(64)
lower, upper = build(keys).sketch.intervals(queries)
print(
    "every score inside its interval:",
    bool(((lower <= scores) & (scores <= upper)).all()),
)

near = jnp.argsort(-scores[0])[:160]
exact, bottom, top = (np.asarray(x[0, near]) for x in (scores, lower, upper))
rank, b = np.arange(near.size), float(offsets[0])
state = np.where(exact >= b, 0, np.where(top >= b, 1, 2))

figure, ax = plt.subplots(figsize=(8, 4.2))
for code, label, color in [
    (0, "member", BLUE),
    (1, "passes the sketch, then fails the exact test", ORANGE),
    (2, "excluded by its upper bound, never scored", GREY),
]:
    at = state == code
    ax.vlines(rank[at], bottom[at], top[at], color=color, lw=1.6, alpha=0.8)
    ax.plot(rank[at], exact[at], ".", color=color, ms=5, label=label)
ax.axhline(b, color=RED, lw=1)
ax.text(rank[-1], b, "offset b", color=RED, ha="right", va="bottom")
ax.set(
    xlabel="keys, best first (160 of 16,384)", ylabel="score and its certified interval"
)
ax.legend(fontsize=8)
ax.set_title("H = 64: the intervals of one query")
plt.tight_layout()

# %% [markdown]
# ## Exactness
#
# The bounds count every float32 rounding, so no member is ever lost. First with small
# whole numbers, where float64 and float32 agree to the last bit and hundreds of keys
# lie *exactly* on the plane; ties are members. The keys also hold duplicates, zeros,
# and a huge outlier. The report must equal brute force in float64, id by id.

# %%
generator = np.random.default_rng(0)
nasty = generator.integers(-3, 4, (2000, 48)).astype(np.float32)
nasty[1000:1900] = nasty[:900]  # duplicates
nasty[1900:1999] = 0.0
nasty[1999] = 2.0**60  # one huge key
normals = generator.integers(-3, 4, (40, 48)).astype(np.float32)
offsets = generator.integers(20, 60, 40).astype(np.float32)

truth = normals.astype(np.float64) @ nasty.astype(np.float64).T
member = truth >= offsets[:, None]
on_the_plane = int((truth == offsets[:, None]).sum())

index = build(jnp.asarray(nasty))
report = query(index, jnp.asarray(normals), jnp.asarray(offsets), capacity=512)
assert not report.overflow.any()
indices, counts = np.asarray(report.indices), np.asarray(report.count)
wrong = 0
for row, count, expected in zip(indices, counts, member, strict=True):
    wrong += not np.array_equal(row[:count], np.flatnonzero(expected))
print(f"{member.sum():,} members, {on_the_plane} of them exactly on the plane")
print("queries whose report differs from float64 brute force:", wrong)
assert wrong == 0

# %% [markdown]
# With arbitrary floats, float32 and float64 may disagree about a key that is on the
# plane up to rounding, and about no other. So put each plane through a key, at that
# key's float32 score, count the disagreements, and see how far from the plane the worst
# of them lies, in units of the rounding error.

# %% tags=["varies"]
keys, queries, scores, _ = gaussian_problem(64)
ranks = jnp.arange(0, 240, 20)
planes = -jnp.sort(-scores, axis=-1)[:, ranks].reshape(-1)
normals = jnp.repeat(queries, ranks.size, axis=0)
report = query(build(keys), normals, planes, capacity=256)
assert not report.overflow.any()

exact = np.asarray(normals, np.float64) @ np.asarray(keys, np.float64).T
margin = exact - np.asarray(planes, np.float64)[:, None]
reported = np.zeros((planes.size, NUM_KEYS + 1), bool)
np.put_along_axis(reported, np.asarray(report.indices), True, axis=1)
differ = reported[:, :NUM_KEYS] != (margin >= 0)
length = np.linalg.norm(normals, axis=1)[:, None] * np.linalg.norm(keys, axis=1)
worst = (np.abs(margin) / (length * 2.0**-24))[differ].max(initial=0.0)
print(
    f"{differ.size:,} pairs of half-space and key, {differ.sum()} decided differently"
)
print(f"farthest of those from the plane: {worst:.2f} rounding errors of |a||k|")
assert worst < 64

# %% [markdown]
# ## Too many members, keys that come and go
#
# `capacity` is a number of slots, not a promise about the data. Where it is too small
# the report says so, `count` is still exact, and the slots hold the first members. Keys
# can be inserted into the room that `max_keys` reserves, and deleted; all of it under
# `jit`.

# %%
index = build(keys, max_keys=NUM_KEYS + 100)
some = queries[:1]

report = query(index, some, 0.0, capacity=8)
print("half of all keys:", int(report.count[0]), " overflow:", bool(report.overflow[0]))

index = jax.jit(hsrjax.insert)(index, 10 * some)  # a key along the query itself
report = query(index, some, 200.0, capacity=8)
print("inserted key", NUM_KEYS, "is found:", report.indices[0, : int(report.count[0])])

index = jax.jit(hsrjax.delete)(index, jnp.array([NUM_KEYS]))
print("deleted, then members:", int(query(index, some, 200.0, capacity=8).count[0]))

# %% [markdown]
# ## What to try next
#
# - Make `offset` smaller, or `DIMS` larger, and run the cells again.
# - Put keys of your own into `build`: of a model, of a search engine, of a simulation.
# - From here to attention is one step: the keys with $\langle q, k\rangle \ge b /
#   \text{scale}$ are the only ones with weight $\mathrm{relu}(\text{scale}\,\langle
#   q,k\rangle - b)^p$. The next notebook, `02_break_it`, puts that to the test and
#   asks you to break it.
