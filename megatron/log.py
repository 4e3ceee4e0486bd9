"""Logging, set up once: the time and, with several processes, the rank; warnings from all, the rest from the first."""

import logging
import os
import sys

# torchao says at its import what else it could do, and transformers imports it where it is installed
TALKATIVE = ("torchao", "torch.utils._pytree")


def configure_logging() -> None:
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    prefix = f"[{rank}] " if size != "1" else ""
    logging.basicConfig(format=f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("megatron").setLevel(logging.INFO if rank == "0" else logging.WARNING)
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
