"""Scaling laws of repeated data: forms, fits with intervals, and what a fitted law answers."""
