"""MLflow: metrics "train/loss" and "valid/<set>/loss" against iterations, settings as parameters."""

import logging
import os
import time
from collections.abc import Iterator
from typing import Any

from megatron.config.flags import typed
from megatron.config.sections import TrackingConfig
from megatron.training.trackers.base import X_AXES, TrackedRun, measures

logger = logging.getLogger(__name__)

BATCH = 100  # parameters of a request, MLflow's limit
METRICS = 1000  # of a request, MLflow's limit
# Defaults of environment variables: a server that does not answer delays a run by half a minute, then the tracker is
# disabled; nothing else is sent or printed.
VARIABLES = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}


class MLflow:
    """An MLflow run, resumed after every restart, in --mlflow-experiment at --mlflow-tracking-uri.

    Metrics are append-only: steps that are repeated after a crash occur twice.
    """

    def __init__(self, settings: TrackingConfig, run: TrackedRun):
        """Resume the run of the run folder if it is in the same experiment; else start one. Log what it lacks."""
        for name, value in VARIABLES.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient, get_tracking_uri  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

        experiment = settings.mlflow_experiment
        assert experiment is not None
        uri = absolute_uri(settings.mlflow_tracking_uri or get_tracking_uri())
        self._client = MlflowClient(tracking_uri=uri)
        place = {"tracking_uri": uri, "experiment": experiment}
        recorded, missing = run.resume("mlflow", place)
        if recorded is not None:
            self._id = recorded["run_id"]
            self._client.update_run(self._id, status="RUNNING")
        else:
            self._id = self._create(experiment, run)
        self._log(missing)
        run.save_identity("mlflow", {"run_id": self._id} | place)
        logger.info("%s: run %s at %s", typed("mlflow_experiment", experiment), self._id, uri)

    def record(self, record: dict) -> None:
        """Log one record."""
        self._log([record])

    def close(self, failed: bool) -> None:
        """Mark the run as finished or failed."""
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")

    def _create(self, experiment: str, run: TrackedRun) -> str:
        """Create a run with its settings, and the experiment if there is none of this name; return the run's id."""
        from mlflow.entities import Param  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]
        from mlflow.exceptions import MlflowException  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

        existing = self._client.get_experiment_by_name(experiment)
        try:
            identity = existing.experiment_id if existing else self._client.create_experiment(experiment)
        except MlflowException:  # another run has just created it
            existing = self._client.get_experiment_by_name(experiment)
            if existing is None:
                raise
            identity = existing.experiment_id
        created = self._client.create_run(identity, run_name=run.name).info.run_id
        parameters = [Param(name, str(value)) for name, value in _flat(run.description)]
        for start in range(0, len(parameters), BATCH):
            self._client.log_batch(created, params=parameters[start : start + BATCH])
        return created

    def _log(self, records: list[dict]) -> None:
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

        now = round(1000 * time.time())
        metrics = [
            Metric(name, value, now, record["iteration"])
            for record in records
            for name, value in scalars(record).items()
        ]
        for start in range(0, len(metrics), METRICS):
            self._client.log_batch(self._id, metrics=metrics[start : start + METRICS])


def absolute_uri(uri: str) -> str:
    """Return a tracking URI with an absolute path if it is that of an SQLite database, which may be relative."""
    scheme, separator, path = uri.partition(":///")
    is_file = scheme.startswith("sqlite") and path and not path.startswith((":memory:", "file:"))
    return f"{scheme}{separator}{os.path.abspath(path)}" if is_file else uri


def scalars(record: dict) -> dict[str, float]:
    """Return the metrics of a record by name; training records add the x axes, which MLflow plots against steps."""
    axes = X_AXES[1:] if record["kind"] == "train" else ()
    return {name: record[name] for name in axes} | measures(record)


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested settings with dotted names."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
