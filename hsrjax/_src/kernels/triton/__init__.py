"""Fused kernels for NVIDIA GPUs from Ampere on, written in Pallas for Triton.

One kernel goes over the sketch, lists the keys that may weigh something and sums over
them: what XLA does in dozens of small programs. Only `implementation.py` is imported
from outside, and it imports Pallas at the first call.

Pallas for Triton is deprecated since jax 0.11, without a date of removal. Ways out that
were looked at: Mosaic GPU, the official one, has no gather by a vector of rows and no
running sum before Blackwell; PTX that was compiled before, through `jax.ffi`, runs
without Triton, for each card and shape apart. The kernels are small so that they can
be ported; until then XLA does what they do.
"""
