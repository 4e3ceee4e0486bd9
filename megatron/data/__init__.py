"""Data: text, tokenizers, token files, and the order of samples."""
