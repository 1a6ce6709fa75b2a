"""Fused kernels for NVIDIA GPUs from Ampere on, written in Pallas for Triton.

One kernel goes over the sketch, lists the keys that may weigh something and sums over
them: what XLA does in dozens of small programs. Only `implementation.py` is imported
from outside, and it imports Pallas at the first call.

Pallas for Triton is deprecated since jax 0.11, without a date of removal. Where a jax
is without it, `Triton.unavailable` says so, and XLA does what the kernels do. They
stay in this folder and small, so that they can leave it. Ways out:

- Frozen PTX, tried: what the decode kernel is compiled to, given to `jax.ffi.ffi_call`
  for "__gpu$xla.gpu.ptx" (with name, kernel_type="ptx", kernel_data, grid_x to block_z
  as int32, shared_mem_bytes, output_indices), is compiled for an H100 as one launch by
  jax 0.10.2 and 0.12.0.1, without a warning. PTX for an A100 assembles for an L4 and an
  H100 too, to 111 to 116 registers. But sizes are constants in it: 70 kB for each shape
  and dtype. It has not run on a card.
- jax-triton (0.4 and later, with triton 3.7), not tried: one more dependency, and the
  kernels in another language.
- Mosaic GPU, the official one, read: it has no gather by a vector of rows and no
  running sum before Blackwell.
"""
