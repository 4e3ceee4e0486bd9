"""ParallelContext for tests: a group of one inside pytest, or several of their own, one thread each, over gloo.

Importing torch dominates, so a test module spawns once and runs all its cases inside.
"""

import os
import pickle
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from megatron.parallel.mesh import ParallelContext, build_parallel_context
from tests.forked import surroundings


@contextmanager
def joined(rank: int = 0, size: int = 1, store: dist.Store | None = None) -> Iterator[ParallelContext]:
    """Join a group on the CPU, by default one of a single process, all data-parallel, and leave it again."""
    dist.init_process_group("gloo", store=store or dist.HashStore(), rank=rank, world_size=size)
    try:
        yield build_parallel_context(rank, size, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def spawn(function: Callable, size: int, *arguments) -> list:
    """Return what `function(processes, *arguments)` returns in each of `size` processes, by rank.

    The function stands at the top of a module, and what it returns can be pickled. The first process that
    raises ends the others, and its rank and traceback are raised here.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            with surroundings(dict(os.environ)):
                given = (size, folder, function, arguments)
                torch.multiprocessing.initialize_parallel(_child, given, nprocs=size, start_method="forkserver")
        except torch.multiprocessing.ProcessRaisedException:
            # the others may fail too, because the first one has left them
            first = min(folder.glob("error of process *"), key=lambda path: path.stat().st_mtime_ns)
            raise RuntimeError(f"{first.name}\n{first.read_text()}") from None
        return [pickle.loads((folder / str(rank)).read_bytes()) for rank in range(size)]


def _child(rank: int, size: int, folder: Path, function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    with joined(rank, size, dist.FileStore(str(folder / "store"), size)) as ranks:
        try:
            answer = function(ranks, *arguments)
        except BaseException:
            (folder / f"error of process {rank}").write_text(traceback.format_exc())
            raise
    (folder / str(rank)).write_bytes(pickle.dumps(answer))
    os._exit(0)  # a thread of gloo that outlives its group aborts about one process in fifty at a regular exit
