"""Language-model pretraining when data, not compute, is scarce."""

import logging
import os
from importlib import metadata
from pathlib import Path

__version__ = "0.1.0"


def _warn_of_namesake() -> None:
    """Say that NVIDIA's megatron-core is hidden: it has no megatron/__init__.py, so this regular package wins."""
    here = Path(__file__).parent
    if (here / "core").is_dir() or os.environ.get("RANK", "0") != "0":
        return
    try:
        version = metadata.version("megatron-core")
    except metadata.PackageNotFoundError:
        return
    logging.getLogger(__name__).warning(
        "megatron-core %s is installed beside this package: `import megatron` finds this one in %s, and megatron.core "
        "cannot be imported; keep the two in separate environments",
        version,
        here,
    )


_warn_of_namesake()
