"""Data, tensor and pipeline parallelism, applied to a plain model from outside."""
