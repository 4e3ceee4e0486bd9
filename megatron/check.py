"""Has this machine what training needs? Versions, devices, and processes that really talk to one another.

    python -m megatron.check

Prints one line a finding. What training needs and does not have is told as FAILED, with what to do about it; then
the exit code is 1, else 0.
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
TORCH = (2, 11)  # the oldest that works
# package -> the extra of setup.py that installs it
OPTIONAL = {
    "deepspeed": "deepspeed",
    "lm-eval": "eval",
    "transformers": "eval",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "zstandard": "zstd",
}
MEMBER = ("-m", "megatron.check")  # what every process of a collective runs
SIOCGIFADDR = 0x8915  # asks Linux for the address of an interface


@dataclass(frozen=True)
class Finding:
    name: str
    said: str
    failed: bool = False

    def __str__(self) -> str:
        return f"{'FAILED  ' if self.failed else ''}{self.name:15} {self.said}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m megatron.check", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--time-limit", type=float, default=60, metavar="SECONDS", help="for each collective (default: 60)"
    )
    parser.add_argument("--member", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.member:
        member(Path(options.member), options.time_limit)
    failed = False
    for finding in findings(options.time_limit):
        print(finding, flush=True)
        failed |= finding.failed
    sys.exit(failed)


def findings(limit: float) -> Iterator[Finding]:
    """Yield every finding in order; what needs torch is not tried without it."""
    core = list(core_packages())
    yield from core
    yield from optional_packages()
    if any(found.failed for found in core):
        return
    yield from devices()
    network = list(network_findings())
    yield from network
    if not any(found.failed for found in network):
        yield from collectives(limit)


# ------------------------------------------------------------------ packages


def core_packages() -> Iterator[Finding]:
    yield Finding("python", platform.python_version())
    for name in CORE:
        try:
            import_module(name)
            version = metadata.version(name)
        except Exception as error:  # a package that is half there may raise anything
            yield Finding(name, f"does not import ({_line(error)}); run: bash install.sh", failed=True)
            continue
        old = name == "torch" and tuple(map(int, re.findall(r"\d+", version)[:2])) < TORCH
        said = f"{version} is too old; install {'.'.join(map(str, TORCH))} or newer" if old else version
        yield Finding(name, said, failed=old)


def optional_packages() -> Iterator[Finding]:
    for name, extra in OPTIONAL.items():
        yield Finding(name, _version(name) or f"not installed; bash install.sh --with-{extra} adds it")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


# ------------------------------------------------------------------ devices


def devices() -> Iterator[Finding]:
    import torch

    from megatron.training.environment import cpp_compiler, device_name, native_bf16
    from megatron.training.optimizer import apex_adam

    def precision(device: torch.device) -> str:
        return "native bf16" if native_bf16(device) else "no native bf16: trains in fp32"

    cpu, memory = torch.device("cpu"), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    usable = len(os.sched_getaffinity(0))
    yield Finding("CPU", f"{device_name(cpu)}, {usable} usable, {memory / 2**30:.0f} GiB, {precision(cpu)}")
    compiler = cpp_compiler()
    yield Finding("C++ compiler", compiler or "none: --compile falls back to eager; install g++ to compile")
    apex = _version("apex") or "not installed"
    unused = "PyTorch's fused AdamW is used (PyPI's apex is a web toolkit, not NVIDIA's)"
    yield Finding("apex", f"{apex}: FusedAdam is used on CUDA" if apex_adam() else f"{apex}; {unused}")
    driver, hidden = nvidia_driver(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if driver:
        yield Finding("NVIDIA driver", driver)
    count = torch.cuda.device_count()
    if count:
        yield Finding("CUDA", torch.version.cuda)
    for index in range(count):
        device, about = torch.device("cuda", index), torch.cuda.get_device_properties(index)
        said = f"{about.name}, {about.total_memory / 2**30:.0f} GiB, compute capability {about.major}.{about.minor}"
        yield Finding(f"CUDA device {index}", f"{said}, {precision(device)}")
    if driver and not count and hidden not in ("", "-1"):
        shown = f"CUDA_VISIBLE_DEVICES={hidden} or " if hidden else ""
        kind = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
        build = f"torch {torch.__version__} was built for {kind}"
        yield Finding(
            "CUDA",
            f"there is an NVIDIA driver, and torch finds no device; {build}: look at {shown}the driver's version, or "
            "install the build for it (https://pytorch.org/get-started/locally)",
            failed=True,
        )


def nvidia_driver() -> str | None:
    """Return the version of the NVIDIA driver, or None where there is none."""
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20)
            if done.returncode == 0 and done.stdout.strip():
                return done.stdout.split()[0]
        except (OSError, subprocess.TimeoutExpired):
            pass  # a broken tool says nothing of the driver
    version = Path("/proc/driver/nvidia/version")
    return version.read_text().splitlines()[0] if version.exists() else None


# ------------------------------------------------------------------ network


def network_findings() -> Iterator[Finding]:
    """Yield what processes of one machine meet by: the host's name and its interfaces."""
    host = socket.getfqdn()  # the address by which torchrun's processes find one another
    try:
        addresses = sorted({info[4][0] for info in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)})
    except OSError:
        addresses = []
    remedy = f"torchrun would wait for ever; add the line `127.0.1.1 {host}` to /etc/hosts, or give torchrun "
    remedy += "--local-addr localhost"
    if not addresses:
        yield Finding("host name", f"{host} has no address: {remedy}", failed=True)
    elif not any(map(_is_ours, addresses)):
        said = f"{host} is said to be at {', '.join(addresses)}, which is not this machine: {remedy}"
        yield Finding("host name", said, failed=True)
    else:
        yield Finding("host name", f"{host} at {', '.join(addresses)}")
    yield Finding("interfaces", ", ".join(f"{name} ({address})" for name, address in interfaces().items()) or "none")
    left = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR") if name in os.environ]
    if left:
        said = f"{' and '.join(left)} set outside torchrun: a training started here would wait for other processes; "
        yield Finding("environment", f"{said}unset {' '.join(left)}", failed=True)


def _is_ours(address: str) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.bind((address, 0))
        return True
    except OSError:
        return False


def interfaces() -> dict[str, str]:
    """Return name -> IPv4 address of every interface that has one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


# ------------------------------------------------------------------ collectives


def collectives(limit: float) -> Iterator[Finding]:
    import torch

    # without CUDA there are two processes whatever the machine has
    yield collective("gloo", 2, limit, {"CUDA_VISIBLE_DEVICES": ""})
    if count := torch.cuda.device_count():
        yield collective("gloo and nccl", count, limit, {})


def collective(name: str, size: int, limit: float, variables: dict[str, str]) -> Finding:
    """Start `size` processes as a training is started, and return what came of an all-reduce and a broadcast.

    No process outlives the limit: torchrun ends its own when asked to, and each has an alarm besides.
    """
    start = time.monotonic()
    search = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}"]
        command += [*MEMBER, "--member", folder, "--time-limit", str(limit)]
        with open(Path(folder) / "output", "w+") as output:
            agent = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | variables | {"PYTHONPATH": search}
            )
            try:
                agent.wait(limit)
                late = False
            except subprocess.TimeoutExpired:
                late = True
            finally:
                _end(agent)
        fault = _fault(Path(folder), size, limit if late else None)
    plural = "es" if size > 1 else ""
    passed = f"{size} process{plural}, all-reduce and broadcast ok in {time.monotonic() - start:.1f} s"
    return Finding(name, f"{size} process{plural}: {fault}" if fault else passed, failed=fault is not None)


def _end(agent: subprocess.Popen) -> None:
    if agent.poll() is None:
        agent.terminate()
        try:
            agent.wait(10)
        except subprocess.TimeoutExpired:
            agent.kill()
            agent.wait()


def _fault(folder: Path, size: int, late_after: float | None) -> str | None:
    """Return in one line what went wrong among the processes that wrote into `folder`, or None."""
    files = [folder / str(rank) for rank in range(size)]
    reached = {file.name: file.read_text() if file.exists() else "has not started" for file in files}
    if all(stage == "done" for stage in reached.values()):
        return None
    # the others may fail too, because the first one has left them
    errors = sorted(folder.glob("error of process *"), key=lambda path: path.stat().st_mtime_ns)
    if errors:
        said = errors[0].read_text()
        return f"{errors[0].name}: {said}; {remedy(said)}"
    if late_after is not None:
        where = ", ".join(f"process {rank} {stage}" for rank, stage in reached.items())
        return f"no answer within {late_after:g} s ({where}); {remedy('')}"
    lines = (folder / "output").read_text().strip().splitlines()
    return f"ended early: {lines[-1] if lines else 'without a word'}; {remedy('')}"


def remedy(error: str) -> str:
    """Return what to do about an error of gloo, NCCL or CUDA."""
    named = ", ".join(interfaces()) or "none, it seems"
    if "Unable to find address for" in error:
        asked = os.environ.get("GLOO_SOCKET_IFNAME")
        return f"GLOO_SOCKET_IFNAME={asked} is no interface with an address: unset it, or name one of {named}"
    if "no kernel image" in error:
        return "this build of torch is not made for the device: https://pytorch.org/get-started/locally has others"
    if "out of memory" in error:
        return "the device is full: nvidia-smi shows who uses it"
    if "NCCL" in error:
        return f"NCCL_DEBUG=INFO says more; NCCL_SOCKET_IFNAME can name one of {named}; /dev/shm must have room"
    return f"a firewall or the wrong interface may be in the way: set GLOO_SOCKET_IFNAME to one of {named}"


def member(folder: Path, limit: float) -> None:
    """Be one process of a collective: join, compute on the device, all-reduce, broadcast; say where that stands."""
    # without a handler the alarm ends the process wherever it waits
    signal.alarm(int(limit) + 15)
    rank = os.environ["RANK"]

    def reach(stage: str) -> None:
        (folder / rank).write_text(stage)

    try:
        reach("is loading torch")
        import torch
        import torch.distributed as dist

        from megatron.parallel.mesh import initialize_parallel

        reach("is waiting for the others to join")
        ranks = initialize_parallel()
        for device in {torch.device("cpu"), ranks.device}:
            reach(f"is computing on {device}")
            # the product needs a kernel for this device
            ones = torch.ones(64, 64, device=device)
            given = (ones @ ones)[0] * (ranks.rank + 1)  # 64 (rank + 1)
            reach(f"is in an all-reduce on {device}")
            dist.all_reduce(given)
            _expect(given, 64 * ranks.size * (ranks.size + 1) / 2, "all-reduce")
            reach(f"is in a broadcast on {device}")
            given.fill_(ranks.rank + 5)
            dist.broadcast(given, src=0)
            _expect(given, 5, "broadcast")
        reach("done")
    except Exception as error:  # whatever it is, the one who waits must hear of it
        (folder / f"error of process {rank}").write_text(_line(error))
        os._exit(1)
    os._exit(0)  # a thread of gloo may outlive its group and abort the interpreter on its way out


def _expect(given, value: float, name: str) -> None:
    if not bool((given == value).all()):
        raise ArithmeticError(f"{name} on {given.device} gave {float(given[0])} instead of {value}")


def _line(error: BaseException) -> str:
    """Return an error in one line, without the place in somebody's source where it was found."""
    lines = str(error).strip().splitlines()
    said = re.sub(r"^\[enforce fail at [^\]]*\] ", "", lines[0] if lines else "")
    return said or type(error).__name__


if __name__ == "__main__":
    main()
