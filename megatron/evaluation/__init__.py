"""Scoring under lm-eval, text generation, and ensembles of training runs."""
