"""Reasons to save and leave: a signal, a time limit, a kill switch, a chosen step."""

import signal
import time
from pathlib import Path

from megatron.config.sections import TrainingConfig
from megatron.parallel.mesh import Processes


class Stopping:
    """Collects the reasons; asked once a step, answered the same by every process."""

    def __init__(self, config: TrainingConfig):
        self.config = config
        self.began = time.monotonic()
        self.signal_name = None
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number, frame) -> None:
        self.signal_name = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)  # a second signal ends at once

    def reason(self, iteration: int, processes: Processes) -> str | None:
        """Return why to leave after this step, or None."""
        local = self._local_reason(iteration)
        (asked,) = processes.sum(local is not None)
        return (local or "another process was asked to stop") if asked else None

    def _local_reason(self, iteration: int) -> str | None:
        config, minutes = self.config, (time.monotonic() - self.began) / 60
        if self.signal_name:
            return f"signal {self.signal_name}"
        if config.exit_duration_in_mins is not None and minutes > config.exit_duration_in_mins:
            return f"--exit-duration-in-mins {config.exit_duration_in_mins}"
        if config.exit_interval and iteration % config.exit_interval == 0:
            return f"--exit-interval {config.exit_interval}"
        if config.kill_switch_file and Path(config.kill_switch_file).exists():
            return f"--kill-switch-file {config.kill_switch_file}"
        return None
