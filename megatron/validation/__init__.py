"""Validation: losses of a model on held-out data."""
