"""Rank, world size and rendezvous, from the environment variables of torchrun, srun or a user."""

import errno
import os
import socket
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from megatron.errors import ConfigurationError
from megatron.parallel.failure_detector import RETRY, FailureDetector, Hub, RankError, launcher, listen, missing_ranks

# torchrun's variables, and those that plain srun sets for each task instead
SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS", "LOCAL_RANK": "SLURM_LOCALID"}
REMEDY = "start ranks with torchrun or srun, or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each"
HUB_KEY = "failure_detector"  # key of the hub's address in the store


def adopt_launcher() -> None:
    """Set RANK, WORLD_SIZE and LOCAL_RANK from SLURM's variables if plain `srun` started this rank, and check them.

    Raises: ConfigurationError, if the variables of a launcher are incomplete or contradict each other.
    """
    sources = SLURM if "RANK" not in os.environ and _in_slurm_step() else {name: name for name in SLURM}
    for name, source in sources.items():
        if source in os.environ:
            _read_int(source, 0)
            os.environ.setdefault(name, os.environ[source])
    if world_size() < 1:
        raise ConfigurationError(f"{sources['WORLD_SIZE']}={world_size()}: must be at least 1; {REMEDY}")
    defaults = {"WORLD_SIZE": "1, as WORLD_SIZE is not set", "RANK": "0, as RANK is not set"}
    limits = {
        name: f"{sources[name]}={os.environ[name]}" if name in os.environ else default
        for name, default in defaults.items()
    }
    if rank() >= world_size():
        raise ConfigurationError(
            f"{sources['RANK']}={rank()}: is not below {limits['WORLD_SIZE']}; unset it, or {REMEDY}"
        )
    local = _read_int("LOCAL_RANK", 0)
    if local > rank():
        raise ConfigurationError(f"{sources['LOCAL_RANK']}={local}: is above {limits['RANK']}; unset it, or {REMEDY}")


def _in_slurm_step() -> bool:
    """Return whether plain `srun` started this process; a batch script is task 0 and belongs to no step."""
    variables = {name: os.environ[name] for name in SLURM.values() if name in os.environ}
    if SLURM["WORLD_SIZE"] not in variables and set(variables.values()) <= {"0"}:
        return False
    if missing_names := [name for name in SLURM.values() if name not in variables]:
        name, value = next(iter(variables.items()))
        raise ConfigurationError(
            f"{name}={value}: is set without {' and '.join(missing_names)}; srun sets all three: pass all of them to "
            "this process, or unset them"
        )
    return True


def check_alone() -> None:
    """Check that the world size is 1, for commands that do not share their work.

    Raises: ConfigurationError.
    """
    adopt_launcher()
    if world_size() > 1:
        raise ConfigurationError(
            f"WORLD_SIZE={world_size()}: this command runs in one process; start it with python, not with torchrun or "
            "srun"
        )


def world_size() -> int:
    """Return the number of ranks that the launcher started."""
    return _read_int("WORLD_SIZE", 1)


def rank() -> int:
    """Return this process's global rank."""
    return _read_int("RANK", 0)


def local_rank() -> int:
    """Return this process's rank on its node."""
    return _read_int("LOCAL_RANK", rank() % (torch.cuda.device_count() or world_size()))


def device() -> torch.device:
    """Return the device of this rank, and make it CUDA's current one.

    Raises: ConfigurationError, if there are fewer GPUs than ranks on this node.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    index = local_rank() if visible > 1 else 0  # srun --gpus-per-task shows each rank its own GPU only
    if index >= visible:
        raise ConfigurationError(
            f"LOCAL_RANK={index}: has no GPU, {visible} are visible; start at most {visible} ranks on this node"
        )
    gpu = torch.device("cuda", index)
    torch.cuda.set_device(gpu)
    torch.cuda.init()  # a device mesh chooses by LOCAL_RANK if CUDA is not initialised
    return gpu


def _read_int(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    if not (value.isascii() and value.isdigit()):
        raise ConfigurationError(f"{name}={value}: is not a whole number; torchrun and srun set it, unset it or fix it")
    return int(value)


def join(minutes: float = 10.0, detect_failures: bool = True) -> FailureDetector | None:
    """Initialise torch.distributed for the ranks of this job; return their failure detector.

    It is None for a single rank without a launcher, and unless `detect_failures`; a rank exits with its launcher in any
    case. `minutes` is the timeout of this function and of every collective.
    Raises: ConfigurationError, if the launcher's variables are invalid or its port is in use; RankError, if rank 0
    does not connect.
    """
    adopt_launcher()
    size, timeout = world_size(), timedelta(minutes=minutes)
    backend = "cpu:gloo,cuda:nccl" if device().type == "cuda" else "gloo"
    detector = FailureDetector(rank(), max(0, rank() - local_rank()))
    started_by = launcher()
    if started_by:
        detector.exit_with_launcher(started_by)
    if size == 1:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
        return detector if started_by else None
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise ConfigurationError(f"WORLD_SIZE={size}: needs {name}, which is not set; {REMEDY}")
    store = _build_store(minutes)
    if detect_failures:
        # torchrun's store outlives the ranks that it restarts: the token keeps what earlier ones wrote from being read
        store = PrefixStore(_connect(detector, store, size, minutes), store)
    dist.init_process_group(backend, store=store, rank=rank(), world_size=size, timeout=timeout)
    return detector if detect_failures else None


def _connect(detector: FailureDetector, store: Store, size: int, minutes: float) -> str:
    """Wait until all ranks have connected to the failure detector's hub; return the token of this start."""
    if rank() == 0:
        detector.hub = hub = Hub(size, minutes)
        hub.start()
        store.set(HUB_KEY, f"{_node_address()} {hub.port} {hub.token}")

    def find_hub() -> tuple[str, int, str] | None:
        if not store.check([HUB_KEY]):  # a wait in the store's C++ code would not let a signal handler run
            return None
        address, port, token = store.get(HUB_KEY).decode().split()
        return address, int(port), token

    try:
        return detector.connect(find_hub, minutes)
    except dist.DistError:  # the store timed out or is gone
        raise RankError(missing_ranks([0], minutes)) from None


def _build_store(minutes: float) -> Store:
    """Return the store at MASTER_ADDR:MASTER_PORT: torchrun's, or one that rank 0 serves."""
    address, port, options = os.environ["MASTER_ADDR"], _read_int("MASTER_PORT", 0), {}
    if rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        # the socket is opened here, and the other ranks try to connect here: torch would report a failure with pages
        # of C++ stack traces
        try:
            options = {"is_master": True, "master_listen_fd": listen(port).detach()}
        except (OSError, OverflowError) as error:
            reason = "it is in use" if getattr(error, "errno", None) == errno.EADDRINUSE else error
            raise ConfigurationError(
                f"MASTER_PORT={port}: cannot listen on this port ({reason}); choose another port"
            ) from None
    else:
        _await_listener(address, port, minutes)
    return TCPStore(address, port, timeout=timedelta(minutes=minutes), wait_for_workers=False, **options)


def _await_listener(address: str, port: int, minutes: float) -> None:
    """Wait until a process listens on a port.

    Raises: RankError, if none does within `minutes`.
    """
    deadline = time.monotonic() + 60 * minutes
    while True:
        try:
            socket.create_connection((address, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RankError(
                    f"{missing_ranks([0], minutes)} (MASTER_ADDR={address} MASTER_PORT={port}: {error})"
                ) from None
            time.sleep(RETRY)


def _node_address() -> str:
    """Return the address under which other nodes reach this one."""
    master = os.environ["MASTER_ADDR"], _read_int("MASTER_PORT", 0)
    with socket.create_connection(master, timeout=60) as connection:
        local, remote = connection.getsockname()[0], connection.getpeername()[0]
    return master[0] if local == remote else local  # the store is on this node: other nodes reach it by that name
