"""What every head does with every token of a text, as a page to look at."""
