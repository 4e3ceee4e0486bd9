"""Language-model pretraining when data, not compute, is scarce."""

__version__ = "0.1.0"
