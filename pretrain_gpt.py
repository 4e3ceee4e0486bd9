#!/usr/bin/env python3
"""Train a transformer with the autoregressive objective; see --help."""

from megatron.training.main import main

if __name__ == "__main__":
    main("ar")
