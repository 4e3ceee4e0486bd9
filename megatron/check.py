"""Check that this machine can train: package versions, devices, network, and collectives between ranks.

    python -m megatron.check

Prints one line per finding. A finding that prevents training is marked FAILED and has a remedy; then the exit code is
1, else 0.
"""

import argparse
import fcntl
import os
import platform
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path

CORE = ("torch", "numpy", "safetensors", "tokenizers", "sentencepiece", "tqdm", "matplotlib")
CORE += ("bokeh", "jinja2", "orjson", "pyarrow", "pyyaml", "scipy", "tiktoken")
MODULES = {"pyyaml": "yaml"}  # whose names are not those of their packages
TORCH = (2, 11)  # the oldest version that works
TORCH_BELOW = (2, 16)  # newer versions are untested
# package -> the extra of setup.py that installs it
OPTIONAL = {
    "datasets": "datasets",
    "deepspeed": "deepspeed",
    "lm-eval": "eval",
    "transformers": "eval",
    "mlflow-skinny": "mlflow",
    "rensa": "dedup",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
    "zstandard": "zstd",
}
RANK_PROGRAM = ("-m", "megatron.check")  # what every rank of a collective runs
SIOCGIFADDR = 0x8915  # Linux ioctl: address of an interface


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    text: str
    failed: bool = False

    def __str__(self) -> str:
        return f"{'FAILED  ' if self.failed else ''}{self.name:15} {self.text}"


def main() -> None:
    """Print all findings and exit with code 1 if one failed; with --member, run one rank of a collective."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m megatron.check", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--time-limit", type=float, default=60, metavar="SECONDS", help="limit of each collective check (default: 60)"
    )
    parser.add_argument("--member", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.member:
        run_rank(Path(options.member), options.time_limit)
    failed = False
    for finding in findings(options.time_limit):
        print(finding, flush=True)
        failed |= finding.failed
    sys.exit(failed)


def findings(limit: float) -> Iterator[Finding]:
    """Yield every finding in order; without the core packages, skip the checks that need torch."""
    core = list(core_packages())
    yield from core
    yield from optional_packages()
    if any(finding.failed for finding in core):
        return
    yield from devices()
    network = list(network_findings())
    yield from network
    if not any(finding.failed for finding in network):
        yield from collectives(limit)


# ------------------------------------------------------------------ packages


def core_packages() -> Iterator[Finding]:
    """Yield the versions of Python and the required packages."""
    yield Finding("python", platform.python_version())
    for name in CORE:
        try:
            import_module(MODULES.get(name, name))
            version = metadata.version(name)
        except Exception as error:  # a broken installation can raise anything
            yield Finding(name, f"does not import ({_line(error)}); run: bash install.sh", failed=True)
            continue
        problem = _torch_problem(version) if name == "torch" else None
        yield Finding(name, f"{version} {problem}" if problem else version, failed=bool(problem))


def _torch_problem(version: str) -> str | None:
    release = tuple(map(int, re.findall(r"\d+", version)[:2]))
    oldest, below = (".".join(map(str, limit)) for limit in (TORCH, TORCH_BELOW))
    if release < TORCH:
        return f"is too old; install {oldest} or newer, below {below}"
    return f"is too new; install {oldest} or newer, below {below}" if release >= TORCH_BELOW else None


def optional_packages() -> Iterator[Finding]:
    """Yield the versions of the optional packages."""
    for name, extra in OPTIONAL.items():
        yield Finding(name, _version(name) or f"not installed; bash install.sh --with-{extra} adds it")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


# ------------------------------------------------------------------ devices


def devices() -> Iterator[Finding]:
    """Yield the CPU, compiler, apex, NVIDIA driver and CUDA devices."""
    import torch

    from megatron.training.environment import cpp_compiler, device_name, native_bf16
    from megatron.training.optimizer import apex_adam

    def precision(device: torch.device) -> str:
        return "native bf16" if native_bf16(device) else "no native bf16: trains in fp32"

    cpu = torch.device("cpu")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # bytes
    num_cores = len(os.sched_getaffinity(0))
    yield Finding("CPU", f"{device_name(cpu)}, {num_cores} usable, {memory / 2**30:.0f} GiB, {precision(cpu)}")
    compiler = cpp_compiler()
    yield Finding("C++ compiler", compiler or "none: --compile falls back to uncompiled blocks; install g++ to compile")
    apex = _version("apex") or "not installed"
    without_apex = "PyTorch's fused AdamW is used (PyPI's apex is a web toolkit, not NVIDIA's)"
    yield Finding("apex", f"{apex}: FusedAdam is used on CUDA" if apex_adam() else f"{apex}; {without_apex}")
    driver = nvidia_driver()
    visible_devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    if driver:
        yield Finding("NVIDIA driver", driver)
    count = torch.cuda.device_count()
    if count:
        yield Finding("CUDA", str(torch.version.cuda))
    for index in range(count):
        device = torch.device("cuda", index)
        about = torch.cuda.get_device_properties(index)
        text = f"{about.name}, {about.total_memory / 2**30:.0f} GiB, compute capability {about.major}.{about.minor}"
        yield Finding(f"CUDA device {index}", f"{text}, {precision(device)}")
    if driver and not count and visible_devices not in ("", "-1"):
        variable = f"CUDA_VISIBLE_DEVICES={visible_devices} or " if visible_devices else ""
        kind = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
        build = f"torch {torch.__version__} was built for {kind}"
        yield Finding(
            "CUDA",
            f"there is an NVIDIA driver, but torch finds no device; {build}: check {variable}the driver's version, or "
            "install the build for it (https://pytorch.org/get-started/locally)",
            failed=True,
        )


def nvidia_driver() -> str | None:
    """Return the version of the NVIDIA driver, or None if there is no driver."""
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=20)
            if result.returncode == 0 and result.stdout.strip():
                return result.stdout.split()[0]
        except (OSError, subprocess.TimeoutExpired):
            pass  # a broken nvidia-smi does not mean that there is no driver
    version = Path("/proc/driver/nvidia/version")
    return version.read_text().splitlines()[0] if version.exists() else None


# ------------------------------------------------------------------ network


def network_findings() -> Iterator[Finding]:
    """Yield what the rendezvous of the ranks on one machine needs: host name, interfaces, no left-over variables."""
    host = socket.getfqdn()  # torchrun's default for MASTER_ADDR
    try:
        addresses = sorted({str(info[4][0]) for info in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)})
    except OSError:
        addresses = []
    remedy = f"torchrun would hang; add the line `127.0.1.1 {host}` to /etc/hosts, or give torchrun "
    remedy += "--local-addr localhost"
    if not addresses:
        yield Finding("host name", f"{host} has no address: {remedy}", failed=True)
    elif not any(map(_is_local, addresses)):
        text = f"{host} resolves to {', '.join(addresses)}, which is not this machine: {remedy}"
        yield Finding("host name", text, failed=True)
    else:
        yield Finding("host name", f"{host} at {', '.join(addresses)}")
    yield Finding("interfaces", ", ".join(f"{name} ({address})" for name, address in interfaces().items()) or "none")
    variables = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR") if name in os.environ]
    if variables:
        text = f"{' and '.join(variables)} set outside torchrun: a training run would wait for other ranks; "
        yield Finding("environment", f"{text}unset {' '.join(variables)}", failed=True)


def _is_local(address: str) -> bool:
    """Return whether this machine has the address: whether a socket can be bound to it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.bind((address, 0))
        return True
    except OSError:
        return False


def interfaces() -> dict[str, str]:
    """Return name -> IPv4 address of every interface that has one."""
    addresses = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue
            addresses[name] = socket.inet_ntoa(answer[20:24])
    return addresses


# ------------------------------------------------------------------ collectives


def collectives(limit: float) -> Iterator[Finding]:
    """Yield the result of collectives on two CPU ranks, and on one rank per CUDA device."""
    import torch

    yield collective("gloo", 2, limit, {"CUDA_VISIBLE_DEVICES": ""})
    if count := torch.cuda.device_count():
        yield collective("gloo and nccl", count, limit, {})


def collective(name: str, world_size: int, limit: float, variables: dict[str, str]) -> Finding:
    """Start `world_size` ranks like a training run and return the result of an all-reduce and a broadcast.

    No rank outlives `limit` by more than 15 seconds: torchrun is terminated, and every rank sets an alarm.
    """
    start = time.monotonic()
    search = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
        command += [*RANK_PROGRAM, "--member", folder, "--time-limit", str(limit)]
        with open(Path(folder) / "output", "w+") as output:
            agent = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | variables | {"PYTHONPATH": search}
            )
            try:
                agent.wait(limit)
                timed_out = False
            except subprocess.TimeoutExpired:
                timed_out = True
            finally:
                _terminate(agent)
        fault = _fault(Path(folder), world_size, limit if timed_out else None)
    ranks = f"{world_size} rank{'s' if world_size > 1 else ''}"
    success = f"{ranks}, all-reduce and broadcast ok in {time.monotonic() - start:.1f} s"
    return Finding(name, f"{ranks}: {fault}" if fault else success, failed=fault is not None)


def _terminate(agent: subprocess.Popen) -> None:
    if agent.poll() is None:
        agent.terminate()
        try:
            agent.wait(10)
        except subprocess.TimeoutExpired:
            agent.kill()
            agent.wait()


def _fault(folder: Path, world_size: int, time_limit: float | None) -> str | None:
    """Return in one line what went wrong among the ranks that wrote into `folder`, or None.

    `time_limit` in seconds if it was exceeded, else None.
    """
    files = [folder / str(rank) for rank in range(world_size)]
    stages = {file.name: file.read_text() if file.exists() else "has not started" for file in files}
    if all(stage == "done" for stage in stages.values()):
        return None
    # later errors may be consequences of the first
    errors = sorted(folder.glob("error of rank *"), key=lambda path: path.stat().st_mtime_ns)
    if errors:
        message = errors[0].read_text()
        return f"{errors[0].name}: {message}; {remedy(message)}"
    if time_limit is not None:
        progress = ", ".join(f"rank {rank} {stage}" for rank, stage in stages.items())
        return f"not finished within {time_limit:g} s ({progress}); {remedy('')}"
    lines = (folder / "output").read_text().strip().splitlines()
    return f"ended early: {lines[-1] if lines else 'no output'}; {remedy('')}"


def remedy(error: str) -> str:
    """Return what to do about an error of gloo, NCCL or CUDA."""
    names = ", ".join(interfaces()) or "none found"
    if "Unable to find address for" in error:
        interface = os.environ.get("GLOO_SOCKET_IFNAME")
        return f"GLOO_SOCKET_IFNAME={interface} is not an interface with an address: unset it, or use one of {names}"
    if "no kernel image" in error:
        return "this build of torch does not support the device: https://pytorch.org/get-started/locally has others"
    if "out of memory" in error:
        return "the device is out of memory: nvidia-smi lists the processes that use it"
    if "NCCL" in error:
        return f"NCCL_DEBUG=INFO logs details; set NCCL_SOCKET_IFNAME to one of {names}; /dev/shm must have free space"
    return f"a firewall or the wrong interface may block it: set GLOO_SOCKET_IFNAME to one of {names}"


def run_rank(folder: Path, limit: float) -> None:
    """Run one rank: join, compute on the device, all-reduce, broadcast; write each stage to the file `folder`/RANK."""
    # without a handler, the alarm kills the process even inside a collective
    signal.alarm(int(limit) + 15)
    rank = os.environ["RANK"]

    def reach(stage: str) -> None:
        (folder / rank).write_text(stage)

    try:
        reach("is loading torch")
        import torch
        import torch.distributed as dist

        from megatron.parallel.mesh import initialize_parallel

        reach("is waiting for other ranks to join")
        ranks = initialize_parallel()
        for device in {torch.device("cpu"), ranks.device}:
            reach(f"is computing on {device}")
            # the matrix product needs a kernel for this device
            ones = torch.ones(64, 64, device=device)
            values = (ones @ ones)[0] * (ranks.rank + 1)  # [64], all 64 (rank + 1)
            reach(f"is in an all-reduce on {device}")
            dist.all_reduce(values)
            _expect(values, 64 * ranks.size * (ranks.size + 1) / 2, "all-reduce")
            reach(f"is in a broadcast on {device}")
            values.fill_(ranks.rank + 5)
            dist.broadcast(values, src=0)
            _expect(values, 5, "broadcast")
        reach("done")
    except Exception as error:  # any error is reported by the process that started the ranks
        (folder / f"error of rank {rank}").write_text(_line(error))
        os._exit(1)
    os._exit(0)  # a gloo thread may outlive its group and abort the interpreter at a normal exit


def _expect(values, expected: float, name: str) -> None:
    if not bool((values == expected).all()):
        raise ArithmeticError(f"{name} on {values.device} gave {float(values[0])} instead of {expected}")


def _line(error: BaseException) -> str:
    """Return the first line of an error, without gloo's source location."""
    lines = str(error).strip().splitlines()
    message = re.sub(r"^\[enforce fail at [^\]]*\] ", "", lines[0] if lines else "")
    return message or type(error).__name__


if __name__ == "__main__":
    main()
