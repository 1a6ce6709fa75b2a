"""Formats of files: runs, releases, Hugging Face folders, GGUF, tokenizers."""
