"""What a model can do, measured; it loads none."""
