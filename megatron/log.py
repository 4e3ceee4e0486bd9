"""Logging setup: time, and with several ranks the rank; info messages from rank 0 only, warnings from all ranks."""

import logging
import os
import sys

# torchao logs optional features at import, and transformers imports it where it is installed
NOISY_LOGGERS = ("torchao", "torch.utils._pytree")


def configure_logging() -> None:
    """Set up logging to stderr from RANK and WORLD_SIZE in the environment."""
    rank = os.environ.get("RANK", "0")
    world_size = os.environ.get("WORLD_SIZE", "1")
    prefix = f"[{rank}] " if world_size != "1" else ""
    logging.basicConfig(format=f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("megatron").setLevel(logging.INFO if rank == "0" else logging.WARNING)
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
