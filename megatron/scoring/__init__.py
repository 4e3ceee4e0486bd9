"""Likelihood scoring, and lm-eval with training runs as its model."""
