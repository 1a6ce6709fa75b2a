"""What is asked of an accelerator, row by row, in order of worth."""
