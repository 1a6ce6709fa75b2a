"""How anything is measured: inputs, turns, float64 results, rows and pictures."""
