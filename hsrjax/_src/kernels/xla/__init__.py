"""The implementation that runs everywhere: plain JAX, compiled by XLA."""
