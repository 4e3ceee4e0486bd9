"""Reasons to save and exit before the end: a signal, a time limit, a kill switch, a given step."""

import time
from pathlib import Path

from megatron import stop_signals
from megatron.config.sections import TrainingConfig
from megatron.parallel.mesh import ParallelContext

ON_ANOTHER_RANK = "requested on another rank"


class ExitConditions:
    """Checks once per step whether to exit early; all ranks get the same answer."""

    def __init__(self, config: TrainingConfig, started: float):
        """Check the conditions of `config`; its time limit counts from `started`, in seconds of `time.monotonic`."""
        self.config, self.started = config, started

    def reason(self, iteration: int, ranks: ParallelContext) -> str | None:
        """Return why to exit after this step, or None; only a signal is known by name to its rank alone.

        A collective call.
        """
        conditions = self._conditions(iteration)
        counts = ranks.sum(*conditions.values())
        return next((reason for reason, count in zip(conditions, counts, strict=True) if count), None)

    def _conditions(self, iteration: int) -> dict[str, bool]:
        """Return by reason whether to exit after this step, as far as this rank knows."""
        config, signal = self.config, signal_reason()
        limit, interval, kill_switch = config.exit_duration_in_mins, config.exit_interval, config.kill_switch_file
        return {
            signal or ON_ANOTHER_RANK: signal is not None,
            f"--kill-switch-file {kill_switch}": Path(kill_switch).exists() if kill_switch else False,
            f"--exit-duration-in-mins {limit}": limit is not None and time.monotonic() > self.started + 60 * limit,
            f"--exit-interval {interval}": bool(interval) and iteration % interval == 0,
        }


def signal_reason() -> str | None:
    """Return the stop signal that this rank received as a reason, or None."""
    name = stop_signals.requested()
    return name and f"signal {name}"


def on_any_rank(reason: str | None, ranks: ParallelContext) -> str | None:
    """Return this rank's `reason`, or that another rank has one; None if no rank has. A collective call."""
    (count,) = ranks.sum(reason is not None)
    return (reason or ON_ANOTHER_RANK) if count else None
