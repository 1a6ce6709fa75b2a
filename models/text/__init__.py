"""Tokenizers and chat templates; they know no file format."""
