"""Logging, set up once: the time and, with several processes, the rank; warnings from all, the rest from the first."""

import logging
import os
import sys


def configure_logging() -> None:
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    prefix = f"[{rank}] " if size != "1" else ""
    logging.basicConfig(format=f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("megatron").setLevel(logging.INFO if rank == "0" else logging.WARNING)
