"""Rebuilds the index of a .bin file that does not match it, where the tokens determine the correct index.

Two errors leave the tokens intact:

1. The pointers overflowed 32 bits while files were merged (Megatron-LM with numpy 2). The sizes are right, and the
   pointers are computed from them.
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
    """Summary of a rebuilt index."""

    documents: int
    tokens: int
    end_id: int | None  # uncounted last id of every document; None if only pointers changed
    backup: Path  # the old index


def rebuild_index(prefix: str) -> Rebuilt | None:
    """Rewrite PREFIX.idx and keep the old one as PREFIX.idx.bak; return None if it already matches PREFIX.bin.

    Raises: ConfigurationError if neither error explains the tokens; nothing is changed then.
    """
    path, data = data_files(prefix)
    index, backup = Index.open(path), path.with_name(path.name + ".bak")
    index.check_boundaries(whole=True)
    sizes, end_id = _fitting_sizes(index, data)
    if sizes is None:
        return None
    if backup.exists():
        raise ConfigurationError(f"{backup}: exists, and the old index would be saved there; move it away")
    partial = path.with_name(path.name + ".partial")
    try:
        write_index(partial, index.dtype, sizes, index.boundaries)
        shutil.copyfile(path, backup)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return Rebuilt(len(index.document_ends()), int(sizes.sum()), end_id, backup)


def _fitting_sizes(index: Index, data: Path) -> tuple[np.ndarray | None, int | None]:
    """Return the sizes that match the tokens, int64 [N], or None if the index does, and the uncounted id or None."""
    sizes = index.sizes.astype(np.int64)
    ends = np.cumsum(sizes) * index.dtype.itemsize
    negative, size = sizes.min(initial=0) < 0, data.stat().st_size
    if not negative and len(ends) and ends[-1] == size:
        valid = np.array_equal(ends - sizes * index.dtype.itemsize, index.offsets)
        return (None if valid else sizes), None
    end_id = None if negative else uncounted_end(index, data)
    if end_id is None:
        raise ConfigurationError(
            f"{index.path}: counts {int(sizes.sum())} tokens, and {data} has {size} bytes of {index.dtype}; neither "
            "the sizes match, nor one token more for each of two or more documents, with the same id at the end; "
            "write both again"
        )
    sizes[index.document_ends() - 1] += 1
    return sizes, end_id
