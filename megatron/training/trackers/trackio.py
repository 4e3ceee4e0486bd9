"""Trackio: a local SQLite database, or a Hugging Face Space or server, with the fields of Weights & Biases."""

import io
import logging
from contextlib import redirect_stdout, suppress

from megatron.config.flags import typed
from megatron.config.sections import TrackingConfig
from megatron.training.trackers.base import TrackedRun, with_axes

logger = logging.getLogger(__name__)


class Trackio:
    """A Trackio run, resumed after every restart.

    Records go to TRACKIO_DIR/PROJECT.db on this machine; TRACKIO_SPACE_ID or TRACKIO_SERVER_URL send them elsewhere.
    Its history is append-only: steps that are repeated after a crash occur twice. It is written every half second, so a
    kill loses the records since. Runs are resumed by name, so a name that the project has already gets a number.
    """

    def __init__(self, settings: TrackingConfig, run: TrackedRun):
        """Resume the run of the run folder if it is in the same project; else start one. Log what it lacks."""
        import trackio

        project = settings.trackio_project
        assert project is not None
        recorded, missing = run.resume("trackio", {"project": project})
        name = recorded["name"] if recorded is not None else _unused(run.name, project)
        with redirect_stdout(io.StringIO()):
            self._run = trackio.init(  # pyright: ignore[reportAttributeAccessIssue]
                project=project,
                name=name,
                config=run.description,
                resume="never" if recorded is None else "allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        for record in missing:
            self.record(record)
        run.save_identity("trackio", {"project": project, "name": self._run.name})
        where = f"run {self._run.name}; to see it: trackio show --project {project}"
        logger.info("%s: %s", typed("trackio_project", project), where)

    def record(self, record: dict) -> None:
        """Log one record."""
        self._run.log(with_axes(record), step=record["iteration"])

    def close(self, failed: bool) -> None:
        """Write what is pending. Trackio has no state of a run."""
        with redirect_stdout(io.StringIO()):
            self._run.finish()


def _unused(name: str | None, project: str) -> str | None:
    """Return a name with the first number that makes it new on this machine; None lets Trackio choose."""
    import trackio

    names = set()
    with suppress(ValueError):  # there is no such project yet
        names = {other.name for other in trackio.Api().runs(project)}  # pyright: ignore[reportAttributeAccessIssue]
    if name is None or name not in names:
        return name
    return next(f"{name}-{number}" for number in range(2, len(names) + 3) if f"{name}-{number}" not in names)
