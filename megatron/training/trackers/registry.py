"""The trackers by the flag that starts them. A tracker is one file with a class, and an entry here."""

import logging
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

from megatron.config.flags import require, typed
from megatron.config.sections import Config, TrackingConfig
from megatron.errors import ConfigurationError
from megatron.training.trackers.base import TrackedRun, Tracker
from megatron.training.trackers.mlflow import MLflow
from megatron.training.trackers.tensorboard import TensorBoard
from megatron.training.trackers.trackio import Trackio
from megatron.training.trackers.wandb import WeightsAndBiases

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """A tracker, and the package it needs, which also names its extra in setup.py and its file in the run folder."""

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

    def __init__(
        self,
        factories: dict[str, Callable[[], Tracker]],
        save_missing: Callable[[str, int | None], None] = lambda flag, iteration: None,
    ):
        """Start the trackers; `factories` are keyed by the flag as typed.

        `save_missing` gets the flag of a tracker that fails and the iteration of the record at which it does, or None
        at the start.
        """
        self._running: dict[str, Tracker] = {}
        self._save_missing = save_missing
        for flag, start in factories.items():
            with self._surviving(flag, partial(save_missing, flag, None)):
                self._running[flag] = start()

    def record(self, record: dict) -> None:
        """Pass one record to every tracker."""
        for flag, tracker in list(self._running.items()):
            with self._surviving(flag, partial(self._save_missing, flag, record["iteration"])):
                tracker.record(record)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Close the trackers and pass on whether the run failed."""
        for flag, tracker in list(self._running.items()):
            with self._surviving(flag):
                tracker.close(failed=kind is not None)

    @contextmanager
    def _surviving(self, flag: str, save_missing: Callable[[], None] = lambda: None):
        try:
            yield
        except Exception as error:  # third-party packages may raise anything
            self._running.pop(flag, None)
            reason = " ".join(str(error).split()) or type(error).__name__
            logger.warning("%s: is disabled (%s); the run continues, and metrics.jsonl has all records", flag, reason)
            save_missing()


def check_packages(config: Config) -> None:
    """Check that the packages of the configured trackers are installed.

    Raises: ConfigurationError if one is not.
    """
    for name, entry in TRACKERS.items():
        value = None if config.validation.skip_train else getattr(config.tracking, name)
        message = f"needs the package {entry.package}; bash install.sh --with-{entry.package} installs it"
        require(not value or find_spec(entry.package) is not None, name, value, message)


def start_trackers(config: Config, run: TrackedRun) -> Trackers:
    """Return the configured trackers, started; none with --skip-train.

    A tracker that is not configured now, or fails, gets the records that it lacks when it next starts.
    """
    settings, factories, packages = config.tracking, {}, {}
    if config.validation.skip_train:
        return Trackers({})

    def save_missing(package: str, iteration: int | None = None) -> None:
        with suppress(OSError, ConfigurationError):  # the next record or start reports them
            run.save_missing(package, iteration)

    for name, entry in TRACKERS.items():
        if value := getattr(settings, name):
            factories[typed(name, value)] = partial(entry.start, settings, run)
            packages[typed(name, value)] = entry.package
        else:
            save_missing(entry.package)
    return Trackers(factories, lambda flag, iteration: save_missing(packages[flag], iteration))
