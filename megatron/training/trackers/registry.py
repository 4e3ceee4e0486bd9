"""The trackers by the flag that starts them. A tracker is one file with a class, and an entry here."""

import logging
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

from megatron.config.flags import require, typed
from megatron.config.sections import Config, TrackingConfig
from megatron.training.trackers.base import TrackedRun, Tracker
from megatron.training.trackers.mlflow import MLflow
from megatron.training.trackers.tensorboard import TensorBoard
from megatron.training.trackers.trackio import Trackio
from megatron.training.trackers.wandb import WeightsAndBiases

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """A tracker, and the package it needs, which is also the name of its extra in setup.py."""

    package: str
    start: Callable[[TrackingConfig, TrackedRun], Tracker]


# field of TrackingConfig that starts it -> tracker
TRACKERS = {
    "tensorboard_dir": Entry("tensorboard", TensorBoard),
    "wandb_project": Entry("wandb", WeightsAndBiases),
    "trackio_project": Entry("trackio", Trackio),
    "mlflow_experiment": Entry("mlflow", MLflow),
}


class Trackers:
    """The trackers of a run, possibly none. A tracker that fails is disabled; the run continues."""

    def __init__(self, factories: dict[str, Callable[[], Tracker]]):
        """Start the trackers; `factories` are keyed by the flag as typed."""
        self._running: dict[str, Tracker] = {}
        for flag, start in factories.items():
            with self._surviving(flag):
                self._running[flag] = start()

    def record(self, record: dict) -> None:
        """Pass one record to every tracker."""
        for flag, tracker in list(self._running.items()):
            with self._surviving(flag):
                tracker.record(record)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Close the trackers and pass on whether the run failed."""
        for flag, tracker in list(self._running.items()):
            with self._surviving(flag):
                tracker.close(failed=kind is not None)

    @contextmanager
    def _surviving(self, flag: str):
        try:
            yield
        except Exception as error:  # third-party packages may raise anything
            self._running.pop(flag, None)
            reason = " ".join(str(error).split()) or type(error).__name__
            logger.warning("%s: is disabled (%s); the run continues, and metrics.jsonl has all records", flag, reason)


def check_packages(config: Config) -> None:
    """Check that the packages of the configured trackers are installed.

    Raises: ConfigurationError if one is not.
    """
    for name, entry in TRACKERS.items():
        value = None if config.validation.skip_train else getattr(config.tracking, name)
        message = f"needs the package {entry.package}; bash install.sh --with-{entry.package} installs it"
        require(not value or find_spec(entry.package) is not None, name, value, message)


def start_trackers(config: Config, run: TrackedRun) -> Trackers:
    """Return the configured trackers, started; none with --skip-train."""
    settings = config.tracking
    values = {} if config.validation.skip_train else {name: getattr(settings, name) for name in TRACKERS}
    return Trackers(
        {typed(name, value): partial(TRACKERS[name].start, settings, run) for name, value in values.items() if value}
    )
