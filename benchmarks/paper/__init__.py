"""The paper, reproduced and extended: `python -m benchmarks paper-NAME` runs NAME."""
