"""A new index for a .bin file whose own does not fit it, where the tokens show what the index must say.

Two faults leave the tokens whole:

1. The pointers overflowed 32 bits while files were merged (Megatron-LM with numpy 2). The sizes are right, and the
   pointers follow from them.
2. --append-eod did not count the token that it appended (`uncounted_end`).
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron.data.index_file import Index, uncounted_end, write_index
from megatron.data.indexed import data_files
from megatron.errors import ConfigurationError


@dataclass(frozen=True)
class Rebuilt:
    """What an index was rebuilt to."""

    documents: int
    tokens: int
    end_id: int | None  # that each document ends in and that its index did not count; None where only pointers changed
    backup: Path  # the index as it was


def rebuild_index(prefix: str) -> Rebuilt | None:
    """Write PREFIX.idx again and keep the old one as PREFIX.idx.bak; return None where it already fits PREFIX.bin.

    Raises: ConfigurationError where the tokens contradict both faults, with nothing changed.
    """
    path, data = data_files(prefix)
    index, backup = Index.open(path), path.with_name(path.name + ".bak")
    index.check_boundaries()
    sizes, end_id = _fitting_sizes(index, data)
    if sizes is None:
        return None
    if backup.exists():
        raise ConfigurationError(f"{backup}: exists, and the old index would be kept there; move it away")
    partial = path.with_name(path.name + ".partial")
    try:
        write_index(partial, index.dtype, sizes, index.boundaries)
        shutil.copyfile(path, backup)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return Rebuilt(len(index.document_ends()), int(sizes.sum()), end_id, backup)


def _fitting_sizes(index: Index, data: Path) -> tuple[np.ndarray | None, int | None]:
    """Return the sizes that fit the tokens, int64 [N], None where the index does, and the id that was not counted."""
    sizes = index.sizes.astype(np.int64)
    ends = np.cumsum(sizes) * index.dtype.itemsize
    negative, size = sizes.min(initial=0) < 0, data.stat().st_size
    if not negative and len(ends) and ends[-1] == size:
        sound = np.array_equal(ends - sizes * index.dtype.itemsize, index.offsets)
        return (None if sound else sizes), None
    end_id = None if negative else uncounted_end(index, data)
    if end_id is None:
        raise ConfigurationError(
            f"{index.path}: counts {int(sizes.sum())} tokens, and {data} has {size} bytes of {index.dtype}; neither "
            "the sizes fit, nor one token more for each document with the same id at its end; write both again"
        )
    sizes[index.document_ends() - 1] += 1
    return sizes, end_id
