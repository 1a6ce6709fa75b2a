"""Measurements: one runner, `python -m benchmarks`, results committed as data."""
