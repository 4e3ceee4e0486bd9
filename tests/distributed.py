"""Process groups for tests: a single rank inside pytest, or several ranks in processes of one thread each, over gloo.

Importing torch takes most of the time, so a test module spawns once and runs all its cases inside.
"""

import faulthandler
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
from tests.forked import forkserver_environment


@contextmanager
def joined(rank: int = 0, size: int = 1, store: dist.Store | None = None) -> Iterator[ParallelContext]:
    """Initialise torch.distributed on the CPU, by default with one rank; all ranks are data-parallel."""
    dist.init_process_group("gloo", store=store or dist.HashStore(), rank=rank, world_size=size)
    try:
        yield build_parallel_context(rank, size, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


HANG_SECONDS = 300  # after which a rank ends with the stacks of its threads


def spawn(function: Callable, size: int, *arguments) -> list:
    """Return what `function(ranks, *arguments)` returns on each of `size` ranks, by rank.

    The function must be at the top level of a module, and its result picklable. The first rank that raises or hangs
    ends the others; its traceback is raised here.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            with forkserver_environment(dict(os.environ)):
                child_arguments = (size, folder, function, arguments)
                torch.multiprocessing.start_processes(_child, child_arguments, nprocs=size, start_method="forkserver")
        except (torch.multiprocessing.ProcessRaisedException, torch.multiprocessing.ProcessExitedException):
            # other ranks may fail too, because this one is gone
            errors = [path for path in folder.glob("error of rank *") if path.stat().st_size]
            if not errors:  # killed by a signal
                raise
            first = min(errors, key=lambda path: path.stat().st_mtime_ns)
            raise RuntimeError(f"{first.name}\n{first.read_text()}") from None
        return [pickle.loads((folder / str(rank)).read_bytes()) for rank in range(size)]


def _child(rank: int, size: int, folder: Path, function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    error = open(folder / f"error of rank {rank}", "w")  # noqa: SIM115 (open while the rank runs)
    faulthandler.dump_traceback_later(HANG_SECONDS, exit=True, file=error)
    with joined(rank, size, dist.FileStore(str(folder / "store"), size)) as ranks:
        try:
            result = function(ranks, *arguments)
        except BaseException:
            print(traceback.format_exc(), file=error, flush=True)
            raise
    (folder / str(rank)).write_bytes(pickle.dumps(result))
    os._exit(0)  # a thread of gloo that outlives its group aborts about one process in fifty at a regular exit
