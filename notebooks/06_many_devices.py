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
# # Many devices
#
# `hsrjax` is pure functions of arrays, so jax cuts it over devices like any other code:
# by `shard_map`, by `pmap`, by `jit` and a sharding. Rows of a batch and key heads do
# not depend on each other, so a cut along them needs no communication, and each device
# keeps the index of its own keys.
#
# You will see both cuts, for attention, its gradients and a growing cache; that they
# equal one device; and what each way really sends, counted in the compiled program: by
# `shard_map` nothing, by `jit` alone more than one would like. It takes about a minute
# on two CPU cores. Several GPUs or TPU cores are used if they are there. If not, the
# CPU plays four devices: that shows everything but speed, because the four share the
# same cores. What is stored here ran that way.

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
import os
import re

# One chip, or none, is not many devices. Then the CPU plays four of them, which jax
# has to know before it is imported.
ask = [sys.executable, "-c", "import jax; print(jax.device_count())"]
answer = subprocess.run(ask, capture_output=True, text=True).stdout if chip else ""
if int((answer.split() or [1])[-1]) < 2:
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import hsrjax

plt.rcParams.update({"figure.dpi": 150, "font.size": 10})
count = 4 if jax.device_count() >= 4 else 2
devices = jax.devices()[:count]
print(f"{count} devices, of the kind {devices[0].platform}")

# %% [markdown]
# ## One device first
#
# Eight rows, 8 query heads on 4 key heads, thresholded ReLU². This is the result to
# which everything below is compared.

# %%
B, S, N, K, H = 8, 256, 8, 4, 32
ways = jax.random.split(jax.random.key(0), 3)
q = jax.random.normal(ways[0], (B, S, N, H))
k, v = (jax.random.normal(way, (B, S, K, H)) for way in ways[1:])
bias = jnp.linspace(1.0, 2.0, N)  # a threshold for each query head


def attend(q, k, v, bias):
    relu = hsrjax.ReLU(power=2, bias=bias)
    return hsrjax.attention(
        q, k, v, activation=relu, method="hsr", is_causal=True, return_info=True
    )


expected, info = jax.jit(attend)(q, k, v, bias)
print(f"{100 * float(info.count.mean()) / (S / 2):.1f} % of the visible keys fire")

# %% [markdown]
# ## Cut along the rows, and along the heads
#
# A mesh gives the devices names. `shard_map` cuts by hand: each device calls the
# function on its own rows, or on its own heads and their thresholds, as if there were
# no other.

# %%
auto = (jax.sharding.AxisType.Auto,)
mesh = jax.make_mesh((count,), ("x",), axis_types=auto, devices=devices)
rows, heads = PartitionSpec("x"), PartitionSpec(None, None, "x")
everywhere = PartitionSpec()


def cut(function, along, thresholds):
    specs = (along, along, along, thresholds)
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=along)


by_rows = cut(attend, rows, everywhere)
by_heads = cut(attend, heads, PartitionSpec("x"))
rows_out, rows_info = jax.jit(by_rows)(q, k, v, bias)
heads_out, heads_info = jax.jit(by_heads)(q, k, v, bias)


def same(got, info_got):
    """Outputs to rounding, counts of keys to the last one."""
    counts = (np.asarray(info_got.count) == np.asarray(info.count)).all()
    return bool(np.allclose(got, expected, rtol=1e-5, atol=1e-5) and counts)


print("cut along rows:  the same as one device:", same(rows_out, rows_info))
print("cut along heads: the same as one device:", same(heads_out, heads_info))
assert same(rows_out, rows_info) and same(heads_out, heads_info)


# %%
def owners(array):
    """The number of the device that holds each row and head."""
    owner = np.zeros((B, N), int)
    for shard in array.addressable_shards:
        owner[shard.index[0], shard.index[2]] = devices.index(shard.device)
    return owner


figure, axes = plt.subplots(1, 2, figsize=(8, 3.6), sharey=True)
cuts = {"cut along rows": rows_out, "cut along heads": heads_out}
for ax, (name, array) in zip(axes, cuts.items(), strict=True):
    owner = owners(array)
    ax.pcolormesh(owner, cmap="Pastel1", edgecolors="white", vmin=0, vmax=8)
    for (row, head), device in np.ndenumerate(owner):
        ax.text(head + 0.5, row + 0.5, device, ha="center", va="center", fontsize=8)
    ax.set_xticks(np.arange(N) + 0.5, range(N))
    ax.set_yticks(np.arange(B) + 0.5, range(B))
    ax.set(xlabel="query head", title=f"{name}: number of the device")
axes[0].set_ylabel("row of the batch")
axes[0].invert_yaxis()
plt.tight_layout()

# %% [markdown]
# ## By jit and a sharding
#
# Put the rows on different devices, and `jit` follows: the same function runs on all of
# them. The result is right, and it is cut likewise. But XLA decides what the devices
# tell each other.

# %%
placed = jax.device_put((q, k, v), NamedSharding(mesh, rows))
shared = jax.device_put(bias, NamedSharding(mesh, everywhere))
jit_out, jit_info = jax.jit(attend)(*placed, shared)
print("jit and a sharding: the same as one device:", same(jit_out, jit_info))
print("cut along:", jit_out.sharding.spec)

# %% [markdown]
# ## What goes over the wire
#
# The compiled program says what devices send each other. By `shard_map` attention sends
# nothing, and nor do the gradients of queries, keys and values. A parameter that all
# devices share, here the thresholds, gets the sum of their gradients: one all-reduce of
# its own size. By `jit` alone XLA does not see that the gathers and scatters of rows
# stay within a device, and exchanges what it could have kept: use `shard_map`.
#
# A cut along the **sequence** is possible by `jit`, and right, but it does not pay: the
# library has no exchange of its own for it, and XLA gathers what each device lacks.


# %%
SENDS = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"


def sent(function, *arrays):
    """Bytes that a device gets by each kind of operation; what repeats counts once."""
    program = jax.jit(function).lower(*arrays).compile().as_text()
    found = {}
    for shapes, kind in re.findall(rf"= (.*?) ({SENDS})(?:-start)?\(", program):
        for dtype, size in re.findall(r"(pred|[a-z]+\d+)\[([\d,]*)\]", shapes):
            numbers = int(np.prod([int(x) for x in size.split(",") if x]))
            width = 1 if dtype == "pred" else int(re.sub(r"\D", "", dtype)) / 8
            found[kind] = found.get(kind, 0) + int(numbers * width)
    return found


def loss(q, k, v, bias):
    return jnp.sum(by_rows(q, k, v, bias)[0] ** 2)


gradients = jax.grad(loss, argnums=(0, 1, 2, 3))
print("rows:", sent(by_rows, q, k, v, bias) or "nothing")
print("heads:", sent(by_heads, q, k, v, bias) or "nothing")
print("rows, all gradients:", sent(gradients, q, k, v, bias))
print("the thresholds have", bias.nbytes, "bytes")

# %% tags=["varies"]
sequence = NamedSharding(mesh, PartitionSpec(None, "x"))
print("rows, jit alone:", sent(attend, *placed, shared))
placed_along = jax.device_put((q, k, v), sequence)
print("sequence, jit alone:", sent(attend, *placed_along, shared))
print("keys and values have", f"{k.nbytes + v.nbytes:,}", "bytes")

# %% [markdown]
# ## The gradients are the same
#
# Of what is cut, and of what is shared.

# %%
alone = jax.grad(lambda *x: jnp.sum(attend(*x)[0] ** 2), argnums=(0, 1, 2, 3))
one, many = (jax.jit(function)(q, k, v, bias) for function in (alone, gradients))
close = [
    bool(np.allclose(a, b, rtol=1e-4, atol=1e-4 * abs(a).max()))
    for a, b in zip(one, many, strict=True)
]
print("gradients of q, k, v, thresholds equal those of one device:", close)
assert all(close)

# %% [markdown]
# ## A cache that grows on every device
#
# Decoding keeps keys, values and their index where the row is: a token is appended and
# attended to without a word between devices, and each holds its part of the memory.


# %%
def decode(q, k, v, bias):
    cache = hsrjax.extend(hsrjax.init_cache(q.shape[0], S + 64, K, H), k, v)
    cache = hsrjax.extend(cache, k[:, -1:], v[:, -1:])
    relu = hsrjax.ReLU(power=2, bias=bias)
    out, _ = hsrjax.decode_attention(q[:, -1:], cache, activation=relu, method="hsr")
    return out, cache


out, cache = jax.jit(decode)(q, k, v, bias)
by_rows = cut(decode, rows, everywhere)
cut_out, cut_cache = jax.jit(by_rows)(q, k, v, bias)
equal = np.allclose(cut_out, out, rtol=1e-5, atol=1e-5)
print("decoding on a cut cache: the same as one device:", bool(equal))
assert equal


def bytes_on(device):
    shards = [x for leaf in jax.tree.leaves(cut_cache) for x in leaf.addressable_shards]
    return sum(shard.data.nbytes for shard in shards if shard.device == device)


whole = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
print(f"the cache and its index: {whole:,} bytes on one device;")
print("cut:", ", ".join(f"{bytes_on(device):,}" for device in devices))
print("sent for it:", sent(by_rows, q, k, v, bias) or "nothing")

# %% [markdown]
# ## pmap, for older programs
#
# The rows of each device stand in an axis of their own.

# %%
split = lambda x: x.reshape(count, B // count, *x.shape[1:])
mapped = jax.pmap(attend, in_axes=(0, 0, 0, None), devices=devices)
out, mapped_info = mapped(split(q), split(k), split(v), bias)
joined = jax.tree.map(lambda x: np.asarray(x).reshape(B, *x.shape[2:]), mapped_info)
print("pmap: the same as one device:", same(np.asarray(out).reshape(q.shape), joined))

# %% [markdown]
# ## What to try next
#
# - A mesh of two axes: rows over one, heads over the other.
# - `method="auto"`: under `jit` one choice is made for all rows, under `shard_map`
#   each device chooses by its own keys.
# - `python -m train --preset tiny --data-parallel --out RUN` splits each batch over
#   all devices, `--distributed` over several machines; a run goes on with any number.
# - On a TPU: `pip install "jax[tpu]"`, then run this notebook again. The library
#   compiles for TPUs; nobody has measured it there yet. Tell us what you find.
