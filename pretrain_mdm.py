#!/usr/bin/env python3
"""Train a transformer with the masked-diffusion objective; see --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # this megatron, not an installed package of that name

from megatron import stop_signals

if __name__ == "__main__":
    stop_signals.install()  # before the imports, which take seconds
    from megatron.training.main import main

    main("mdm")
