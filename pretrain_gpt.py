#!/usr/bin/env python3
"""Train a transformer with the autoregressive objective; see --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # this megatron, not an installed package of that name
from megatron import parent_process, stop_signals

if __name__ == "__main__":
    parent_process.record()  # before the imports, which take seconds
    stop_signals.install()
    from megatron.likelihoods.pretrain import main

    main("ar")
