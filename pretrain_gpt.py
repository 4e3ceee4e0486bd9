#!/usr/bin/env python3
"""Train a transformer with the autoregressive objective; see --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # this megatron, whatever else bears the name

from megatron.training.main import main

if __name__ == "__main__":
    main("ar")
