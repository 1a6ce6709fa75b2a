"""The run folder, written and read back: its options, its checkpoints, its metrics."""
