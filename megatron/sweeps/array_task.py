"""One task of a SLURM job array: trains its point with srun, and requeues itself where the run should go on.

What SLURM does not do: srun does not end when a slurmstepd of its step is killed, a job stays RUNNING when that of its
batch script is, and a job that met its time limit or whose preempted run saved in time is not requeued.
"""

import logging
import os
import re
import signal
import stat
import subprocess
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron import parent_process
from megatron.errors import ConfigurationError
from megatron.parallel.failure_detector import listen
from megatron.sweeps.branches import needs_trunk
from megatron.sweeps.launch import LOCKED, training_command
from megatron.sweeps.points import Point
from megatron.sweeps.slurm import queued_runs
from megatron.sweeps.states import State, last_change, lock_holder, run_state
from megatron.sweeps.task_log import TaskLog
from megatron.training.run_folder import RunFolder

logger = logging.getLogger(__name__)

POLL = 2.0  # seconds between looks at the run
END_SECONDS = 60.0  # that srun may take after its run has released the lock
KILL_SECONDS = 90.0  # that srun may take after SIGTERM; it waits for KillWait
REQUEUE_SECONDS = 120.0  # for the controller to requeue this task and to end it
PORTS = range(20000, 32000)  # below Linux's ephemeral ports
# SIGUSR1 in the first moments of Python, before the handlers of the run: nothing was trained, nothing failed
KILLED_AT_START = 128 + signal.SIGUSR1
STARTS = 3  # in a row, without a new record or checkpoint, after which a task stops


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """How a task treats its run."""

    retries: int = 2  # after passing failures
    wait_for_lock: float = 10.0  # minutes
    hang_minutes: float = 30.0  # without any output, after which a run is ended and retried
    retry_failed: bool = False  # start a run again that failed for a reason of its own before this job


class ArrayTask:
    """This start of a task of a job array."""

    def __init__(self) -> None:
        """Read SLURM's variables and catch the signals that it sends to the batch script."""
        # as scontrol takes it: the plain job id of one task of an array would name all of them
        self.name = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
        self.restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        self.nodes = os.environ.get("SLURM_JOB_NODELIST", "")
        self.terminated = False  # by scancel, the time limit, a preemption or a requeue
        self._slurmstepd = parent_process.started_by()
        # caught, not ignored: srun, which inherits ignored signals, must still get and forward them
        signal.signal(signal.SIGTERM, self._terminate)
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, lambda *_: None)

    def _terminate(self, *_) -> None:
        self.terminated = True

    @property
    def is_orphan(self) -> bool:
        """Whether the slurmstepd of the batch script was killed: SLURM no longer sees this process end."""
        return self._slurmstepd.is_gone

    @property
    def met_time_limit(self) -> bool:
        """Whether SLURM ends this task at its time limit."""
        return self._fields().get("Reason") == "TimeLimit"

    @property
    def is_current(self) -> bool:
        """Whether this start may still requeue the task.

        It may not after scancel, of which an orphan hears nothing, nor after SLURM has started the task again, as
        after a node that did not respond.
        """
        fields = self._fields()
        if not fields:
            return True
        runs = fields["JobState"] == "RUNNING" or fields["Reason"] == "TimeLimit"
        return runs and int(fields["Restarts"]) == self.restarts

    @property
    def excluded_nodes(self) -> list[str]:
        """The nodes on which this task may not start: those of `--exclude`, and of its failures so far."""
        nodes = self._fields().get("ExcNodeList", "(null)")
        return [] if nodes == "(null)" else _output(f"scontrol show hostnames {nodes}").split()

    def _fields(self) -> dict[str, str]:
        """Return the fields of `scontrol show job` of this task, none if the controller does not answer."""
        words = _output(f"scontrol --oneliner show job {self.name}").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def requeue(self, code: int, exclude: Iterable[str] = ()) -> int:
        """Requeue this task and wait until SLURM ends it; return `code`.

        `exclude` are the nodes on which it should not start again.
        """
        if not self.is_current:
            logger.info("task %s: was cancelled or started again; not requeued", self.name)
            return code
        deadline = time.monotonic() + REQUEUE_SECONDS
        while subprocess.run(["scontrol", "requeue", self.name]).returncode and time.monotonic() < deadline:
            time.sleep(5)  # the controller does not answer
        if names := ",".join(exclude):
            # only a pending task can be changed
            subprocess.run(["scontrol", "update", f"JobId={self.name}", f"ExcNodeList={names}"], check=False)
        while not self.terminated and not self.is_orphan and time.monotonic() < deadline:
            time.sleep(0.2)
        return code


def run_task(folder: Path, points: Sequence[Point], point_id: str, options: TaskOptions) -> int:
    """Train one point with srun; requeue the task where the run should go on. Return the exit code of the task.

    Raises: ConfigurationError if the plan no longer has the point.
    """
    point = {point.id: point for point in points}.get(point_id)
    if point is None:
        raise ConfigurationError(
            f"{folder}: the plan no longer has the point {point_id} of this task; submit the changed sweep again"
        )
    state = run_state(point.folder(folder))
    if state.name == "finished":
        logger.info("%s: is finished", point.label)
        return 0
    task = ArrayTask()
    if state.has_own_fault and (not options.retry_failed or state.job == f"job-{task.name}"):
        logger.error("%s: has failed: %s; not started again", point.label, state.reason)
        return 1
    log = TaskLog(folder, point.id, task=task.name, restarts=task.restarts)
    if needs_trunk(point, folder) and _may_be_queued(point.trunk, folder):
        logger.info("%s: its trunk %s has no checkpoint yet; requeued until then", point.label, point.trunk)
        return task.requeue(LOCKED)
    starts = log.start()
    if starts >= max(STARTS, options.retries + 1):
        return _give_up(log, point, folder, starts)
    logger.info("%s: starts", point.label)
    # a stopped run exits with 0: srun returns the highest code of its ranks, and stops the others when one has failed
    extra = ["--exit-code-when-stopped", "0", "--wait-for-lock", f"{options.wait_for_lock:g}"]
    command = ["srun", "--kill-on-bad-exit=1", *training_command(point, folder), *extra]
    end = _train(command, point.folder(folder), options.hang_minutes)
    code = _next(task, point, log, end=end, started_from=state, options=options)
    # else the job of an orphan would stay RUNNING; its next start sees how the run has ended
    return task.requeue(code) if task.is_orphan else code


def _may_be_queued(run_id: str | None, folder: Path) -> bool:
    """Return whether a run is in the queue, as far as the controller answers."""
    try:
        return run_id in queued_runs(folder)
    except ConfigurationError as error:
        logger.warning("%s", error)
        return True


def _give_up(log: TaskLog, point: Point, folder: Path, starts: int) -> int:
    """Set the state of a run that never gets past its start to failed; return the exit code of the task."""
    run = point.folder(folder)
    state = run_state(run)
    last = f"{state.name}, {state.reason}" if state.reason else state.name
    reason = (
        f"{starts} starts of job {log.task} brought neither a record nor a checkpoint (last state: {last}); read its "
        "log, remove the cause and resubmit"
    )
    logger.error("%s: failed: %s", point.label, reason)
    log.stop()
    try:
        RunFolder(str(run)).status("failed", reason, state.iteration, state.consumed_samples)
    except (OSError, ConfigurationError) as error:  # another process holds the lock, or the disk is full
        logger.warning("%s: the state could not be written (%s)", point.label, error)
    return 1


def _next(
    task: ArrayTask, point: Point, log: TaskLog, *, end: "SrunEnd", started_from: State, options: TaskOptions
) -> int:
    """Requeue the task after the end of srun if the run should go on; return the exit code of the task."""
    state, code = run_state(log.run), end.code
    if state.name == "finished":
        return 0
    if state.is_stopped_by_kill_switch:
        logger.info("%s: stopped by %s; not requeued", point.label, state.reason)
        return code or 1
    if task.terminated:
        return task.requeue(code or 1) if task.met_time_limit else code or 1
    if code == LOCKED and state.name == "running" and state.silent_seconds < 60 * options.hang_minutes:
        log.wait()
    if code in (0, LOCKED, KILLED_AT_START) or (state.name == "stopped" and state != started_from):
        return task.requeue(code)
    if code == 2 or state.has_own_fault:
        return code or 1
    failing = failing_nodes(_output(f"scontrol show hostnames {task.nodes}").split(), state, end)
    failures, failed_nodes = log.failure(nodes=task.nodes, failing=failing, code=code)
    if failures > options.retries:
        return code or 1
    excluded = sorted({*failed_nodes, *task.excluded_nodes})  # SLURM replaces its list
    if len(excluded) > _nodes_of_partition() - point.nodes:
        excluded = []  # SLURM would never start it
    without = f" without {', '.join(excluded)}" if excluded else ""
    logger.warning("%s: failed with exit code %d; requeued%s", point.label, code, without)
    return task.requeue(code or 1, excluded)


@dataclass(frozen=True)
class SrunEnd:
    """How an srun has ended."""

    code: int
    rank_0_wrote: bool  # to the run folder, in this start
    messages: str = ""  # of srun and the ranks, as far as standard error is a file
    hung: bool = False  # and was ended here


def _train(command: list[str], run: Path, hang_minutes: float) -> SrunEnd:
    """Run srun until it ends; end it if its run has ended, or hangs, without its notice."""
    started, released, held = time.time(), 0.0, False
    changed, log_offset = last_change(run), os.fstat(2).st_size
    process = subprocess.Popen(command, env=os.environ | {"MASTER_PORT": str(free_port())})
    while True:
        with suppress(subprocess.TimeoutExpired):
            return SrunEnd(process.wait(POLL), last_change(run) != changed, _standard_error(log_offset))
        holder = lock_holder(run)  # a finished run holds its lock until its trackers have uploaded
        held = held or bool(holder)
        released = 0.0 if holder or not held else released or time.monotonic()
        # standard output is the log of the task, which the run writes too
        silent = time.time() - max(started, last_change(run), os.fstat(1).st_mtime)
        if released and time.monotonic() > released + END_SECONDS:
            logger.warning("srun has not ended %g seconds after its run; it is ended", END_SECONDS)
        elif silent > 60 * hang_minutes:
            logger.warning("no output for %g minutes; the run is ended", hang_minutes)
        else:
            continue
        process.terminate()  # srun kills its step
        with suppress(subprocess.TimeoutExpired):
            process.wait(KILL_SECONDS)
        process.kill()
        process.wait()
        return SrunEnd(1, last_change(run) != changed, hung=True)  # its own exit code is then 0


def _standard_error(offset: int) -> str:
    """Return what was written to the log of this task after `offset`; "" if standard error is no file."""
    with suppress(OSError):
        if stat.S_ISREG(os.fstat(2).st_mode):
            with open("/proc/self/fd/2", "rb") as log:
                log.seek(offset)
                return log.read().decode(errors="replace")
    return ""


def failing_nodes(nodes: list[str], state: State, end: SrunEnd) -> list[str]:
    """Return the nodes of a task that its failure may be due to.

    1. The only node, or those that the run's reason names.
    2. The first node if the run is lost: rank 0, which SLURM starts there, has died before it could write a reason.
    3. The node of the rank that ended first by srun's messages if rank 0 wrote nothing at all.
    """
    if len(nodes) == 1:
        return nodes
    named = [node for node in nodes if re.search(rf"(?<![\w-]){re.escape(node)}(?![\w-])", state.reason)]
    if end.rank_0_wrote and named:
        return named
    if end.hung or "did not connect" in end.messages:  # by the ranks that did
        return []
    if end.rank_0_wrote:
        return nodes[:1] if state.name == "lost" else []
    first = re.search(r"^srun: error: ([\w.-]+): tasks? [\d,-]+: ", end.messages, re.M)
    return [node for node in nodes if first and node == first[1]]


def _nodes_of_partition() -> int:
    partition = os.environ.get("SLURM_JOB_PARTITION", "")
    counts = _output(f"sinfo --noheader --responding --partition {partition} --format %D").split()
    return sum(map(int, counts)) if partition else 0


def free_port() -> int:
    """Return a port of this node, on which rank 0 runs, that nothing listens on.

    Jobs that share a node and start at once try different ports.
    """
    job = int(os.environ.get("SLURM_JOB_ID", "0"))
    for attempt in range(len(PORTS)):
        with suppress(OSError):
            port = PORTS[(job + 1009 * attempt) % len(PORTS)]
            listen(port).close()
            return port
    raise OSError(f"none of the ports {PORTS.start} to {PORTS.stop - 1} is free")


def _output(command: str) -> str:
    """Return the output of a SLURM command, "" if the controller does not answer."""
    return subprocess.run(command.split(), capture_output=True, text=True).stdout
