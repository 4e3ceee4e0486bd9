"""Reasons to save and exit before the end: a signal, a time limit, a kill switch, a given step."""

import time
from pathlib import Path

from megatron import stop_signals
from megatron.config.sections import TrainingConfig
from megatron.parallel.mesh import ParallelContext


class ExitConditions:
    """Checks once per step whether to exit early; all ranks get the same answer."""

    def __init__(self, config: TrainingConfig, started: float):
        """Check the conditions of `config`; its time limit counts from `started`, in seconds of `time.monotonic`."""
        self.config, self.started = config, started

    def reason(self, iteration: int, ranks: ParallelContext) -> str | None:
        """Return why to exit after this step, or None. A collective call."""
        return on_any_rank(self._local_reason(iteration), ranks)

    def _local_reason(self, iteration: int) -> str | None:
        config = self.config
        minutes = (time.monotonic() - self.started) / 60
        if reason := signal_reason():
            return reason
        if config.exit_duration_in_mins is not None and minutes > config.exit_duration_in_mins:
            return f"--exit-duration-in-mins {config.exit_duration_in_mins}"
        if config.exit_interval and iteration % config.exit_interval == 0:
            return f"--exit-interval {config.exit_interval}"
        if config.kill_switch_file and Path(config.kill_switch_file).exists():
            return f"--kill-switch-file {config.kill_switch_file}"
        return None


def signal_reason() -> str | None:
    """Return the stop signal that this rank received as a reason, or None."""
    name = stop_signals.requested()
    return name and f"signal {name}"


def on_any_rank(reason: str | None, ranks: ParallelContext) -> str | None:
    """Return this rank's `reason`, or that another rank has one; None if no rank has. A collective call."""
    (count,) = ranks.sum(reason is not None)
    return (reason or "requested on another rank") if count else None
