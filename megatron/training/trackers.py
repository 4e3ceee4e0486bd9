"""Experiment trackers. metrics.jsonl is the source of truth; trackers mirror its records.

TensorBoard        DIR/<axis>/events.out.tfevents.*, one folder per x axis: tags "train/loss vs tokens"
Weights & Biases   fields "train/loss" and "valid/<set>/loss" with the x axes: iteration, consumed_samples, ...
"""

import logging
import math
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from megatron.config.flags import require, typed
from megatron.config.sections import Config, TrackingConfig
from megatron.training.run_folder import RunFolder, read_json, write_json

logger = logging.getLogger(__name__)

WRITE_INTERVAL = 1.0  # seconds between writes of the Weights & Biases file; its default is 15
X_AXES = ("iteration", "consumed_samples", "consumed_tokens", "epoch", "flops", "seconds")


def measures(record: dict) -> dict[str, float]:
    """Return the metrics of a record by name, "train/loss" or "valid/<set>/loss", without the x axes."""
    values = {name: value for name, value in record.items() if name not in X_AXES and type(value) in (int, float)}
    if record["kind"] == "train":
        return {f"train/{name}": value for name, value in values.items()}
    values["perplexity"] = math.exp(min(20, record["loss"]))  # an upper bound if the loss is one
    return {f"valid/{record['set']}/{name}": value for name, value in values.items()}


# the step of a TensorBoard event is a single integer
AXES = {
    "iterations": lambda record: record["iteration"],
    "samples": lambda record: record["consumed_samples"],
    "tokens": lambda record: record["consumed_tokens"],
    "epochs": lambda record: round(1000 * record["epoch"]),  # thousandths
    "flops": lambda record: round(record["flops"] / 1e9),  # GFLOPs
}


def curves(record: dict, axis: str) -> dict[str, float]:
    """Return the TensorBoard scalars of a record on an axis: all metrics against iterations, else only losses."""
    values = measures(record)
    if axis == "iterations":
        axes = X_AXES[1:] if record["kind"] == "train" else ()
        return values | {f"train/{name}": record[name] for name in axes}
    return {name: value for name, value in values.items() if name.endswith(("/loss", "/perplexity"))}


class TensorBoard:
    """TensorBoard event files. A restart purges events by step, not by tag, so every x axis needs a separate folder."""

    def __init__(self, settings: TrackingConfig, past_records: list[dict]):
        """Continue after `past_records`; write all of them to a folder without events."""
        from torch.utils.tensorboard import SummaryWriter

        assert settings.tensorboard_dir is not None
        self._writers = {}
        for axis, step in AXES.items():
            folder = Path(settings.tensorboard_dir) / axis
            has_events = any(folder.glob("events.out.tfevents.*"))
            # Steps are rounded: a dropped record may share its step with the last past record, so that step is purged
            # too and written again. In a new folder step 0 purges nothing, but later purges only work if it was set.
            purge_step = step(past_records[-1]) if past_records and has_events else 0
            self._writers[axis] = SummaryWriter(
                folder, purge_step=purge_step, max_queue=settings.tensorboard_queue_size
            )
            for record in past_records:
                if step(record) >= purge_step:
                    self._add(record, axis)
        self._flush()

    def record(self, record: dict) -> None:
        """Write one record against every x axis."""
        for axis in AXES:
            self._add(record, axis)
        self._flush()  # after a kill, the events match metrics.jsonl

    def close(self, failed: bool) -> None:
        """Close the event files."""
        for writer in self._writers.values():
            writer.close()

    def _add(self, record: dict, axis: str) -> None:
        for name, value in curves(record, axis).items():
            self._writers[axis].add_scalar(f"{name} vs {axis}", value, AXES[axis](record))

    def _flush(self) -> None:
        for writer in self._writers.values():
            writer.flush()


class WeightsAndBiases:
    """A Weights & Biases run, resumed after every restart; offline without a login.

    Its history is append-only: steps that are repeated after a crash occur twice. Its file is written every
    WRITE_INTERVAL seconds, so a crash of the node loses the records since. Its own step counts calls and is never set;
    curves are plotted against `iteration`, and can be plotted against every other x axis.
    """

    def __init__(self, settings: TrackingConfig, folder: RunFolder | None, description: dict, past_records: list[dict]):
        """Resume the run whose id is in the run folder; else start one and log `past_records`."""
        import wandb

        # no output, no capture of ours, and at most 300 s of waiting for the network at the end
        quiet = wandb.Settings(
            silent=True, console="off", finish_timeout=300, x_transaction_log_flush_interval=WRITE_INTERVAL
        )
        mode = wandb.setup(quiet).settings.mode
        if mode == "online" and not wandb.login(prompt=False, verify=False):
            mode = "offline"
        id_path = folder.path / "wandb.json" if folder and mode != "disabled" else None
        recorded = read_json(id_path) if id_path and id_path.exists() else None
        self._run = wandb.init(
            project=settings.wandb_project,
            name=settings.wandb_exp_name or (folder.path.resolve().name if folder else None),
            group=settings.wandb_group or None,
            dir=settings.wandb_save_dir or (folder.path if folder else None),
            id=recorded["id"] if recorded is not None else None,
            resume="allow",
            config=description,
            allow_val_change=True,
            mode=mode,  # pyright: ignore[reportArgumentType]
            settings=quiet,
        )
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")
        if recorded is None:
            for record in past_records:
                self.record(record)
        if id_path and recorded is None:  # last: after a failed start, the next one starts from scratch
            write_json(id_path, {"id": self._run.id})
        self._log_location(mode)

    def record(self, record: dict) -> None:
        """Log one record."""
        self._run.log({name: record[name] for name in X_AXES} | measures(record))

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


class Trackers:
    """The trackers of a run, possibly none. A tracker that fails is disabled; the run continues."""

    def __init__(self, factories: dict[str, Callable]):
        """Start the trackers; `factories` are keyed by the flag as typed."""
        self._running = {}
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
    for name, package in {"tensorboard_dir": "tensorboard", "wandb_project": "wandb"}.items():
        value = None if config.validation.skip_train else getattr(config.tracking, name)
        message = f"needs the package {package}; bash install.sh --with-{package} installs it"
        require(not value or find_spec(package) is not None, name, value, message)


def start_trackers(config: Config, folder: RunFolder | None, description: dict, past_records: list[dict]) -> Trackers:
    """Return the configured trackers, started; none with --skip-train."""
    settings, factories = config.tracking, {}
    if settings.tensorboard_dir:
        factories[typed("tensorboard_dir", settings.tensorboard_dir)] = partial(TensorBoard, settings, past_records)
    if settings.wandb_project:
        factory = partial(WeightsAndBiases, settings, folder, description=description, past_records=past_records)
        factories[typed("wandb_project", settings.wandb_project)] = factory
    return Trackers({} if config.validation.skip_train else factories)
