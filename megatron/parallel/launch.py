"""How processes find one another: what torchrun, srun or a person says in the environment."""

import errno
import os
import socket
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron.errors import ConfigurationError
from megatron.parallel.failure_detector import RETRY, FailureDetector, Hub, RankError, launcher, listen, missing

# what plain srun sets for each task, by the variable of torchrun that it stands for
SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS", "LOCAL_RANK": "SLURM_LOCALID"}
LAUNCH = "start ranks with torchrun or srun, or give each RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"


def adopt_launcher() -> None:
    """Take rank and world size from SLURM where plain `srun` started this process; `torchrun` sets RANK itself.

    Raises ConfigurationError where the variables of a launcher are half set or contradict each other.
    """
    names = SLURM if "RANK" not in os.environ and _in_slurm_step() else {name: name for name in SLURM}
    for name, source in names.items():
        if source in os.environ:
            _whole(source, 0)
            os.environ.setdefault(name, os.environ[source])
    if world_size() < 1:
        raise ConfigurationError(f"{names['WORLD_SIZE']}={world_size()}: must be at least 1; {LAUNCH}")
    unset = {"WORLD_SIZE": "1, as WORLD_SIZE is not set", "RANK": "0, as RANK is not set"}
    limits = {name: f"{names[name]}={os.environ[name]}" if name in os.environ else unset[name] for name in unset}
    if rank() >= world_size():
        raise ConfigurationError(
            f"{names['RANK']}={rank()}: is not below {limits['WORLD_SIZE']}; unset it, or {LAUNCH}"
        )
    own = _whole("LOCAL_RANK", 0)
    if own > rank():
        raise ConfigurationError(f"{names['LOCAL_RANK']}={own}: is above {limits['RANK']}; unset it, or {LAUNCH}")


def _in_slurm_step() -> bool:
    """Return whether plain `srun` started this process; a batch script is task 0 and belongs to no step."""
    given = {name: os.environ[name] for name in SLURM.values() if name in os.environ}
    if SLURM["WORLD_SIZE"] not in given and set(given.values()) <= {"0"}:
        return False
    if missing_names := [name for name in SLURM.values() if name not in given]:
        name, value = next(iter(given.items()))
        raise ConfigurationError(
            f"{name}={value}: is set, and {' and '.join(missing_names)} not; srun sets all three: pass all of them on "
            "to this process, or unset them"
        )
    return True


def check_alone() -> None:
    """Refuse several processes, each of which would do all of the work of a command that is not shared."""
    adopt_launcher()
    if world_size() > 1:
        raise ConfigurationError(
            f"WORLD_SIZE={world_size()}: this command runs in one process; start it with python, not with torchrun or "
            "srun"
        )


def world_size() -> int:
    """Return the number of processes that the launcher started."""
    return _whole("WORLD_SIZE", 1)


def rank() -> int:
    """Return this process's place among all of them."""
    return _whole("RANK", 0)


def local_rank() -> int:
    """Return this process's place among those of its node."""
    return _whole("LOCAL_RANK", rank() % (torch.cuda.device_count() or world_size()))


def device() -> torch.device:
    """Return the device of this process, which becomes CUDA's current one; raise ConfigurationError for want of one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    index = local_rank() if visible > 1 else 0  # srun --gpus-per-task shows each process the one that is its own
    if index >= visible:
        raise ConfigurationError(
            f"LOCAL_RANK={index}: has no GPU, {visible} are visible here; start no more processes on this node"
        )
    own = torch.device("cuda", index)
    torch.cuda.set_device(own)
    torch.cuda.init()  # a mesh would choose by LOCAL_RANK where CUDA is not initialised
    return own


def _whole(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    if not (value.isascii() and value.isdigit()):
        raise ConfigurationError(f"{name}={value}: is not a whole number; torchrun and srun set it, unset it or fix it")
    return int(value)


def join(minutes: float = 10.0, watched: bool = True) -> FailureDetector | None:
    """Join the group that the launcher describes, or make a group of one; return the watch over its ranks.

    It is None over a single rank that no launcher started. A rank ends with its launcher, `watched` or not. Neither
    this nor any collective of the group takes longer than `minutes`. Raises ConfigurationError where the launcher's
    variables make no sense or its port is taken, and RankError where the first process does not come.
    """
    adopt_launcher()
    size, timeout = world_size(), timedelta(minutes=minutes)
    backend = "cpu:gloo,cuda:nccl" if device().type == "cuda" else "gloo"
    watch, started_by = FailureDetector(rank(), max(0, rank() - local_rank())), launcher()
    if started_by:
        watch.end_with(started_by)
    if size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return watch if started_by else None
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise ConfigurationError(f"WORLD_SIZE={size}: needs {name}, which is not set; {LAUNCH}")
    store = _store(minutes)
    if watched:
        # torchrun's store outlives the processes that it starts anew: what earlier ones wrote must not be read
        store = dist.PrefixStore(_meet(watch, store, size, minutes), store)
    dist.init_process_group(backend, store=store, rank=rank(), world_size=size, timeout=timeout)
    return watch if watched else None


def _meet(watch: FailureDetector, store: dist.Store, size: int, minutes: float) -> str:
    """Return when all ranks have come to the watch, with the token of this start."""
    if rank() == 0:
        watch.hub = hub = Hub(size, minutes)
        hub.start()
        store.set("watch", f"{_own_address()} {hub.port} {hub.token}")

    def find() -> tuple[str, int, str] | None:
        if not store.check(["watch"]):  # a wait in the store's own code would not let a signal's handler run
            return None
        address, port, token = store.get("watch").decode().split()
        return address, int(port), token

    try:
        return watch.meet(find, minutes)
    except dist.DistError:  # the store's own clock, or its end
        raise RankError(missing([0], minutes)) from None


def _store(minutes: float) -> dist.Store:
    """Return the store at MASTER_ADDR:MASTER_PORT: torchrun's, or one that the first process makes."""
    address, port, options = os.environ["MASTER_ADDR"], _whole("MASTER_PORT", 0), {}
    if rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        # listened on and, by the others, tried from here: torch says what fails there with a page of C++
        try:
            options = {"is_master": True, "master_listen_fd": listen(port).detach()}
        except (OSError, OverflowError) as error:
            reason = "it is in use" if getattr(error, "errno", None) == errno.EADDRINUSE else error
            raise ConfigurationError(
                f"MASTER_PORT={port}: cannot be listened on ({reason}); choose another port"
            ) from None
    else:
        _await(address, port, minutes)
    return dist.TCPStore(address, port, timeout=timedelta(minutes=minutes), wait_for_workers=False, **options)


def _await(address: str, port: int, minutes: float) -> None:
    """Return when somebody listens at a port; raise RankError where nobody does in time."""
    until = time.monotonic() + 60 * minutes
    while True:
        try:
            socket.create_connection((address, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise RankError(
                    f"{missing([0], minutes)} (MASTER_ADDR={address} MASTER_PORT={port}: {error})"
                ) from None
            time.sleep(RETRY)


def _own_address() -> str:
    """Return the address under which other nodes reach this one."""
    master = os.environ["MASTER_ADDR"], _whole("MASTER_PORT", 0)
    with socket.create_connection(master, timeout=60) as connection:
        own, other = connection.getsockname()[0], connection.getpeername()[0]
    return master[0] if own == other else own  # the store is on this node: others reach it by that name
