"""Language-model pretraining when data, not compute, is scarce."""

import logging
import os
from importlib import metadata
from pathlib import Path

__version__ = "0.1.0"


def _warn_if_megatron_core_is_shadowed() -> None:
    """Warn that NVIDIA's megatron-core cannot be imported: a regular package wins over its namespace package."""
    here = Path(__file__).parent
    if (here / "core").is_dir() or os.environ.get("RANK", "0") != "0":
        return
    try:
        version = metadata.version("megatron-core")
    except metadata.PackageNotFoundError:
        return
    logging.getLogger(__name__).warning(
        "megatron-core %s is installed in the same environment: `import megatron` imports this package in %s, and "
        "megatron.core cannot be imported; keep the two in separate environments",
        version,
        here,
    )


_warn_if_megatron_core_is_shadowed()
