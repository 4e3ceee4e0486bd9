"""Inspection of token files: statistics, documents, training samples, duplicates and their removal."""
