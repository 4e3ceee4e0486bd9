"""Runs the points of a plan on this machine: a queue that keeps its slots busy until every run has ended.

Run folders are the only state. Before each start the queue looks at the folder: a finished run is skipped, and one that
another process writes is left to it. A stopped queue continues with the same command.
"""

import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from megatron.config.flags import require
from megatron.errors import ConfigurationError
from megatron.sweeps.branches import needs_trunk
from megatron.sweeps.launch import LOCKED, local_command, local_environment
from megatron.sweeps.points import Point, unique_runs
from megatron.sweeps.states import State, run_state
from megatron.sweeps.status import run_progress
from megatron.training.run_folder import writing

logger = logging.getLogger(__name__)

POLL = 0.2  # seconds between looks at the runs in progress
TRUNK_POLL = 1.0
LOCK_POLL = 5.0  # seconds between looks at a run that another process writes
SAVE_SECONDS = 120.0  # that a run has to save after SIGTERM
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True, kw_only=True)
class QueueOptions:
    """How a local queue works."""

    slots: int  # ranks at a time
    devices: tuple[str, ...] = ()  # CUDA devices that the slots share; none: the CPU
    retries: int = 2  # starts again after a passing failure
    retry_failed: bool = False  # start runs again that failed for a reason of their own
    hang_minutes: float = 30.0  # without any record, after which a run is ended and retried

    def __post_init__(self):
        require(self.slots >= 1, "slots", self.slots, "must be at least 1; a slot runs one rank")
        require(self.retries >= 0, "retries", self.retries, "must not be negative; 0 starts no run again")
        require(self.hang_minutes > 0, "hang_minutes", self.hang_minutes, "must be positive; raise it")


@dataclass
class _Job:
    """A run that is waiting or running."""

    point: Point
    attempts: int = 0
    not_before: float = 0.0
    process: subprocess.Popen | None = None
    slots: list[int] = field(default_factory=list)
    log_offset: int = 0
    started: float = 0.0  # wall-clock time of this start
    iteration: int = 0  # of the run at its last end
    terminated: float = 0.0  # when SIGTERM was sent


@dataclass(frozen=True)
class Outcome:
    """How a queue ended: failed and stopped runs with their reasons, and the signal that stopped the queue, if any."""

    failures: dict[str, str]
    stopped: dict[str, str]  # on a person's request
    stopped_by: int = 0


class LocalQueue:
    """The queue of one sweep folder."""

    def __init__(self, folder: Path, points: Sequence[Point], options: QueueOptions, before: Outcome = Outcome({}, {})):
        """Check the points; nothing is started yet. Runs that failed or were stopped `before` are not started again.

        Raises: ConfigurationError if a run needs more than this machine has.
        """
        self.folder, self.options = folder, options
        runs = unique_runs(points)
        for point in runs:
            if point.nodes > 1:
                raise ConfigurationError(
                    f"{point.label}: needs {point.nodes} nodes, and `run` uses this machine alone; submit the sweep"
                )
            if point.world_size > options.slots:
                raise ConfigurationError(
                    f"{point.label}: needs {point.world_size} ranks, and --slots is {options.slots}; raise it, or "
                    "lower `world_size` under `resources`"
                )
            if options.devices and point.world_size > len(options.devices):
                raise ConfigurationError(
                    f"{point.label}: needs {point.world_size} ranks on different devices, and this machine has "
                    f"{len(options.devices)}; lower `world_size` under `resources`, or submit the sweep"
                )
        self.total_flops = sum(point.own_flops for point in runs)
        self.failures, self.stopped = dict(before.failures), dict(before.stopped)
        rest = [point for point in runs if point.id not in self.failures | self.stopped]
        self.waiting = [_Job(point) for point in sorted(rest, key=lambda point: -point.own_flops / point.world_size)]
        self.running: list[_Job] = []
        self.finished: set[str] = set()
        self.free = list(range(options.slots))
        self.signal = 0

    def run(self) -> Outcome:
        """Start and watch runs until all have ended, or until SIGTERM or Ctrl-C stops the queue."""
        with writing(self.folder / "logs"):
            (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        with _handled(self._stop), logging_redirect_tqdm(), self._bar() as bar:
            try:
                while (self.waiting and not self.signal) or self.running:
                    if not self.signal:
                        self._start_waiting()
                    for job in list(self.running):
                        self._look_after(job)
                    self._update(bar)
                    time.sleep(POLL)
            finally:
                for job in self.running:  # after an error of the queue itself
                    self._terminate(job)
        return Outcome(self.failures, self.stopped, self.signal)

    def _stop(self, number: int, _frame) -> None:
        if not self.signal:
            self.signal = number
            for job in self.running:
                self._terminate(job)
            logger.info(
                "%s: %d runs save and stop; the same command resumes", signal.Signals(number).name, len(self.running)
            )

    # ------------------------------------------------------------------------------------------------- starting

    def _start_waiting(self) -> None:
        for job in list(self.waiting):
            if self.signal:
                return
            if job.not_before > time.monotonic() or self._slots(job.point.world_size) is None:
                continue
            state = run_state(job.point.folder(self.folder))
            if state.name == "finished":
                self.waiting.remove(job)
                self.finished.add(job.point.id)
            elif self._waits_for_trunk(job.point):
                job.not_before = time.monotonic() + TRUNK_POLL
            elif state.name == "running":
                job.not_before = time.monotonic() + LOCK_POLL
            elif state.has_own_fault and not self.options.retry_failed and not job.attempts:
                self._fail(job, state.reason)
            else:
                self._start(job)

    def _slots(self, count: int) -> list[int] | None:
        """Return `count` free slots, on different devices; None if there are too few."""
        devices = len(self.options.devices)
        slots: dict[int, int] = {}  # by device, or by slot on the CPU
        for slot in self.free:
            slots.setdefault(slot % devices if devices else slot, slot)
        return list(slots.values())[:count] if len(slots) >= count else None

    def _waits_for_trunk(self, point: Point) -> bool:
        """Return whether the checkpoint to continue from is still to come."""
        if point.trunk in self.failures or not needs_trunk(point, self.folder):
            return False
        state = run_state(self.folder / "runs" / str(point.trunk)).name
        is_ahead = any(job.point.id == point.trunk for job in (*self.waiting, *self.running))
        return state == "running" or (state != "finished" and is_ahead)

    def _start(self, job: _Job) -> None:
        self.waiting.remove(job)
        job.slots = self._slots(job.point.world_size) or []
        self.free = [slot for slot in self.free if slot not in job.slots]
        devices = self.options.devices
        used = [devices[slot % len(devices)] for slot in job.slots] if devices else []
        log = self.folder / "logs" / f"{job.point.id}.log"
        command = local_command(job.point, self.folder)
        with writing(log):
            output = open(log, "ab")  # noqa: SIM115  an error of the process below is not one of the log
        with output:
            job.log_offset = output.tell()
            job.process = subprocess.Popen(
                command,
                env=local_environment(used, self.options.slots),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches the queue only, which tells the runs once
                preexec_fn=_end_with_parent,
            )
        job.terminated, job.started = 0.0, time.time()
        self.running.append(job)
        logger.info("%s: started (%s)", job.point.label, log.relative_to(self.folder))

    # ------------------------------------------------------------------------------------------------- watching

    def _look_after(self, job: _Job) -> None:
        assert job.process is not None
        code = job.process.poll()
        if code is not None:
            self._ended(job, code)
        elif self.signal and not job.terminated:
            self._terminate(job)
        elif job.terminated:
            if time.monotonic() > job.terminated + SAVE_SECONDS:
                _signal_session(job.process, signal.SIGKILL)
        elif self._is_hanging(job):
            logger.warning("%s: no record for %g minutes; it is ended", job.point.label, self.options.hang_minutes)
            self._terminate(job)

    def _is_hanging(self, job: _Job) -> bool:
        state = run_state(job.point.folder(self.folder))
        log = self.folder / "logs" / f"{job.point.id}.log"
        last_output = log.stat().st_mtime if log.exists() else 0.0  # a person may remove logs
        silent = time.time() - max(job.started, last_output)
        return min(silent, state.silent_seconds if state.holder else silent) > 60 * self.options.hang_minutes

    def _ended(self, job: _Job, code: int) -> None:
        self.running.remove(job)
        self.free = sorted(self.free + job.slots)
        state = run_state(job.point.folder(self.folder))
        if state.name == "finished":
            self.finished.add(job.point.id)
            logger.info("%s: finished", job.point.label)
        elif self.signal:
            logger.info("%s: %s at step %d", job.point.label, state.name, state.iteration)
        elif state.is_stopped_by_kill_switch:
            self.stopped[job.point.id] = state.reason
            logger.info("%s: stopped by %s; not started again", job.point.label, state.reason)
        elif code == LOCKED or state.name == "running":  # another process was faster
            job.not_before = time.monotonic() + LOCK_POLL
            self.waiting.append(job)
        elif state.name == "stopped" and state.iteration > job.iteration:  # by its own flags, such as --exit-interval
            job.iteration = state.iteration
            self.waiting.append(job)
        elif code == 2 or state.has_own_fault or job.attempts >= self.options.retries:
            self._fail(job, self._reason(job, state, code))
        else:
            job.attempts += 1
            job.not_before = time.monotonic() + 2.0**job.attempts
            self.waiting.append(job)
            logger.warning("%s: failed (%s); it is started again", job.point.label, self._reason(job, state, code))

    def _reason(self, job: _Job, state: State, code: int) -> str:
        """Return why a run failed: the last error in its log of this start, else its status, else the exit code."""
        lines: list[str] = []
        with suppress(OSError), open(self.folder / "logs" / f"{job.point.id}.log", "rb") as log:
            log.seek(job.log_offset)
            lines = log.read().decode(errors="replace").splitlines()
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        if errors:
            return errors[-1]
        if state.name == "failed" and state.reason:
            return state.reason
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def _fail(self, job: _Job, reason: str) -> None:
        if job in self.waiting:
            self.waiting.remove(job)
        self.failures[job.point.id] = reason
        logger.error("%s: failed: %s", job.point.label, reason)

    def _terminate(self, job: _Job) -> None:
        if job.process is not None and job.process.poll() is None and not job.terminated:
            job.terminated = time.monotonic()
            job.process.terminate()  # torchrun forwards it to its ranks

    # ------------------------------------------------------------------------------------------------- progress

    def _bar(self) -> tqdm:
        return tqdm(
            total=1.0,
            desc=self.folder.name,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )

    def _update(self, bar: tqdm) -> None:
        if bar.disable:
            return
        jobs = {job.point.id: job.point for job in [*self.waiting, *self.running]}
        left = sum(point.own_flops for point in jobs.values())
        begun = sum(run_progress(job.point, self.folder).share * job.point.own_flops for job in self.running)
        bar.n = max(bar.n, 1.0 - (left - begun) / self.total_flops)
        counts = f"{len(self.finished)} finished, {len(self.running)} running, {len(self.waiting)} waiting"
        bar.set_postfix_str(counts + (f", {len(self.failures)} failed" if self.failures else ""), refresh=True)


@contextmanager
def _handled(handler):
    """Call `handler` for SIGTERM and Ctrl-C."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _end_with_parent() -> None:
    """Have the kernel send SIGTERM to this new process when the queue dies, however it dies: the run saves and ends."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(1)


def _signal_session(process: subprocess.Popen, number: int) -> None:
    """Signal a process and all its descendants that are in its session."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
