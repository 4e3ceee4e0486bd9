"""Weights & Biases: "train/loss" and "valid/<set>/loss" with the x axes: iteration, consumed_samples, ..."""

import logging
from pathlib import Path

from megatron.config.flags import typed
from megatron.config.sections import TrackingConfig
from megatron.training.trackers.base import TrackedRun, with_axes

logger = logging.getLogger(__name__)

WRITE_INTERVAL = 1.0  # seconds between writes of the Weights & Biases file; its default is 15


class WeightsAndBiases:
    """A Weights & Biases run, resumed after every restart; offline without a login.

    Its history is append-only: steps that are repeated after a crash occur twice. Its file is written every
    WRITE_INTERVAL seconds, so a crash of the node loses the records since. Its own step counts calls and is never set;
    curves are plotted against `iteration`, and can be plotted against every other x axis.
    """

    def __init__(self, settings: TrackingConfig, run: TrackedRun):
        """Resume the run of the run folder if it is in the same project; else start one. Log what it lacks."""
        import wandb

        # no output, no capture of ours, and at most 300 s of waiting for the network at the end
        quiet = wandb.Settings(
            silent=True, console="off", finish_timeout=300, x_transaction_log_flush_interval=WRITE_INTERVAL
        )
        defaults = wandb.setup(quiet).settings  # of the environment and of wandb's files
        mode = defaults.mode
        if mode == "online" and not wandb.login(prompt=False, verify=False):
            mode = "offline"
        place = {"project": settings.wandb_project, "entity": defaults.entity, "base_url": defaults.base_url}
        recorded, missing = run.resume("wandb", place)
        self._run = wandb.init(
            project=settings.wandb_project,
            name=settings.wandb_exp_name or run.name,
            group=settings.wandb_group or None,
            dir=settings.wandb_save_dir or (run.folder.path if run.folder else None),
            id=recorded["id"] if recorded is not None and mode != "disabled" else None,
            resume="allow",
            config=run.description,
            allow_val_change=True,
            mode=mode,  # pyright: ignore[reportArgumentType]
            settings=quiet,
        )
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")
        for record in missing:
            self.record(record)
        if mode == "disabled":
            run.save_missing("wandb")
        else:
            run.save_identity("wandb", {"id": self._run.id} | place)
        self._log_location(mode)

    def record(self, record: dict) -> None:
        """Log one record."""
        self._run.log(with_axes(record))

    def close(self, failed: bool) -> None:
        """Finish the run; its exit code is 1 if it failed."""
        self._run.finish(exit_code=int(failed))

    def _log_location(self, mode: str) -> None:
        location = self._run.url or f"nothing is saved, as WANDB_MODE is {mode}"
        if self._run.offline:
            local = Path(self._run.dir).parents[1]  # every start creates a folder there
            location = "offline (no login, or WANDB_MODE); to upload it: "
            location += f"wandb sync {local}/offline-run-*-{self._run.id}*"
        logger.info("%s: %s", typed("wandb_project", self._run.project), location)
