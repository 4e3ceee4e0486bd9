"""Experiment trackers. metrics.jsonl is the source of truth; trackers mirror its records."""
