"""What every benchmark shares: command line, clocks, interleaved timing, ratios, the environment record, results.

A benchmark is a folder with `run.py`. It reads its flags with `read_options`, times its contestants with `interleave`,
compares them with `ratios`, and hands a report of plain values and its Markdown tables to `publish`.
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib import metadata
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

from megatron.config.flags import DescribedFormatter, Parser, add_section, build, flag, require
from megatron.errors import ConfigurationError
from megatron.parallel import launch
from megatron.torch_private import inductor_config
from megatron.training.environment import device_name

ROOT = Path(__file__).resolve().parents[1]

# ------------------------------------------------------------------ command line


def read_options(section: type, description: str):
    """Return the `section`, which has an `output`, parsed from the command line; exits with code 2 if it is invalid."""
    parser = Parser(description=description, formatter_class=DescribedFormatter, allow_abbrev=False)
    add_section(parser, section, {})
    try:
        options = build(section, parser.parse_known(sys.argv[1:]))
        folder = Path(options.output or ".").parent
        require(folder.is_dir(), "output", options.output, f"{folder} is not a folder; create it first")
        return options
    except ConfigurationError as error:
        refuse(error)


def refuse(error: ConfigurationError) -> None:
    """Print the error in one line and exit with code 2."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def output_flag(help: str = "also write the JSON to a file, and the tables next to it as .md") -> str | None:
    """Return the field of --output."""
    return flag(None, help, metavar="FILE")


def device_flag() -> str | None:
    """Return the field of --device."""
    return flag(None, "where to run; default a GPU if there is one", choices=("cuda", "cpu"))


def chosen_device(options) -> torch.device:
    """Return the device of --device, by default a GPU if there is one; an absent GPU is an error with exit code 2.

    CUDA must not be initialised yet: --device cpu hides it from the process.
    """
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        no_gpu = "there is no GPU that PyTorch can use; leave the flag out to run on the CPU"
        require(options.device != "cuda" or torch.cuda.is_available(), "device", options.device, no_gpu)
    except ConfigurationError as error:
        refuse(error)
    return launch.device()


def require_positive(options, names: Iterable[str]) -> None:
    """Check that fields are at least 1.

    Raises: ConfigurationError
    """
    for name in names:
        require(getattr(options, name) >= 1, name, getattr(options, name), "must be at least 1")


# ------------------------------------------------------------------ time and memory


def clock(device: torch.device) -> float:
    """Return a time in seconds: wall-clock time after a synchronisation on CUDA, CPU time of the process on a CPU.

    CPU time is less sensitive to other load on the machine.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def seconds_of(work: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    """Return the seconds of one call of `work`, by default of CPU time."""
    start = clock()
    work()
    return clock() - start


@dataclass(frozen=True)
class Timings:
    """Measurements by name of the contestant."""

    seconds: dict[str, list[float]]  # by round
    memory: dict[str, dict[str, int]]  # bytes on CUDA in the last round: "peak" and "step"; empty on a CPU


def interleave(
    contestants: Mapping[str, Callable[[int], object]],
    rounds: int,
    device: torch.device,
    *,
    warm_up: int = 0,
    after_round: Callable[[Timings], object] = lambda timings: None,
    is_over: Callable[[], bool] = lambda: False,
    wall_clock: bool = False,
) -> Timings:
    """Return the times of all contestants; every round calls each of them once, in a rotating order.

    A contestant is called with the number of its round, which starts at 0 in the `warm_up` rounds that come before the
    `rounds` timed ones. Load that changes during the run thereby affects all contestants alike. "peak" memory includes
    what all of them keep allocated between their turns, "step" excludes it. `after_round` gets the times so far;
    after it, `is_over` may end the rounds early. Times are those of `clock`, or of the wall clock, for contestants that
    are processes.
    """
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    memory = {}
    cuda = device.type == "cuda"
    now = time.perf_counter if wall_clock else partial(clock, device)
    with tqdm(total=(warm_up + rounds) * len(names), desc="rounds", leave=False, disable=None) as bar:
        for turn in range(warm_up + rounds):
            for name in rotated(names, turn):
                if cuda:
                    torch.cuda.reset_peak_memory_stats(device)
                    allocated = torch.cuda.memory_allocated(device)
                start = now()
                contestants[name](turn)
                if turn >= warm_up:
                    seconds[name].append(now() - start)
                if cuda:
                    peak = torch.cuda.max_memory_allocated(device)
                    memory[name] = {"peak": peak, "step": peak - allocated}
                bar.update()
            if turn >= warm_up:
                after_round(Timings(seconds, memory))
                if is_over():
                    break
    return Timings(seconds, memory)


def rotated(names: list[str], turn: int) -> list[str]:
    """Return the order of a round, which starts one name later in each."""
    shift = turn % len(names)
    return names[shift:] + names[:shift]


@contextmanager
def kernel_choices_restored() -> Iterator[None]:
    """Restore what `prepare_device` changes in this process: attention kernels and deterministic algorithms."""
    inductor = inductor_config()
    cudnn, deterministic = torch.backends.cuda.cudnn_sdp_enabled(), torch.are_deterministic_algorithms_enabled()
    inductor_deterministic = getattr(inductor, "deterministic", None)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        torch.use_deterministic_algorithms(deterministic)
        if inductor_deterministic is not None:
            inductor.deterministic = inductor_deterministic


# ------------------------------------------------------------------ figures


def ratios(numerators: Iterable[float], denominators: Iterable[float]) -> list[float]:
    """Return the ratios by round."""
    return [numerator / denominator for numerator, denominator in zip(numerators, denominators, strict=True)]


def summary(values: list[float]) -> dict[str, float]:
    """Return median, smallest and largest value."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def spread(values: list[float], format_spec: str = ".2f", *, unit: float = 1.0) -> list[str]:
    """Return two cells of a table, the median and the range: "1.24" and "1.02 - 1.33"."""
    low, middle, high = (format(value / unit, format_spec) for value in (min(values), median(values), max(values)))
    return [middle, f"{low} - {high}"]


def markdown_table(columns: Iterable[str], rows: Iterable[Iterable]) -> str:
    """Return a Markdown table."""
    lines = [list(columns), *([str(cell) for cell in row] for row in rows)]
    lines = [f"| {' | '.join(cells)} |" for cells in lines]
    return "\n".join([lines[0], "|" + "---|" * (lines[0].count(" | ") + 1), *lines[1:]]) + "\n"


# ------------------------------------------------------------------ results


def version(package: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment(device: torch.device, *packages: str) -> dict:
    """Return what a measurement depends on apart from its settings: date, machine, threads, ranks, versions."""
    return {
        "date": date.today().isoformat(),
        "device": device.type,
        "machine": device_name(device),
        "threads": torch.get_num_threads(),
        "world_size": int(os.environ.get("WORLD_SIZE", 1)),
        "gpu": gpu_state() if device.type == "cuda" else None,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", *packages)},
    }


def gpu_state() -> dict[str, str] | None:
    """Return driver, clocks, power and temperature of the first GPU as nvidia-smi prints them; None without one."""
    fields = ("driver_version", "clocks.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(fields, done.stdout.strip().split(", ")))


def environment_line(environment: dict) -> str:
    """Return the environment as the line above a table; packages that are not installed are left out."""
    place = environment["machine"]
    if environment["device"] == "cpu":
        place += ", one thread" if environment["threads"] == 1 else f", {environment['threads']} threads"
    if environment["world_size"] > 1:
        place += f", {environment['world_size']} ranks"
    versions = ", ".join(f"{name} {number}" for name, number in environment["versions"].items() if number)
    return f"{environment['date']}, {place}; {versions}"


def publish(report: dict, tables: str, output: str | None) -> None:
    """Print environment and Markdown tables of a report; with `output` also write the report as JSON, them as .md."""
    print(_with_environment(report, tables))
    if output:
        save(report, tables, output)


def save(report: dict, tables: str | None, output: str) -> None:
    """Write a report as JSON, and any tables as .md next to it; a file is complete or that of an earlier call."""
    contents = {Path(output): json.dumps(report, indent=1)}
    if tables is not None:
        contents[Path(output).with_suffix(".md")] = _with_environment(report, tables)
    for path, text in contents.items():
        temporary = path.with_name(path.name + ".partial")
        temporary.write_text(text + "\n")
        temporary.replace(path)


def append_line(record: dict, output: str | None) -> None:
    """Append a record as a line of JSON to a file, if one is given; it is on disk when this returns."""
    if output:
        with open(output, "a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict]:
    """Return the records of `append_line`, [] if there is no file; an incomplete last line is left out."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _with_environment(report: dict, tables: str) -> str:
    return f"{environment_line(report['environment'])}\n\n{tables.strip()}"
