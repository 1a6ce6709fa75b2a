"""What is written and read: folders of results, captured inputs, what it ran on."""
