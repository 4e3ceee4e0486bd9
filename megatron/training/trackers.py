"""Trackers show the records of a run elsewhere. metrics.jsonl stays the truth: a tracker only repeats what it says.

TensorBoard        DIR/<axis>/events.out.tfevents.*, one folder an x axis: tags "train/loss vs tokens"
Weights & Biases   fields "train/loss" and "valid/<set>/loss" beside the clocks: iteration, consumed_samples, ...
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

WRITE_INTERVAL = 1.0  # seconds between two writes of the file of Weights & Biases, which are 15 by default
CLOCKS = ("iteration", "consumed_samples", "consumed_tokens", "epoch", "flops", "seconds")


def measures(record: dict) -> dict[str, float]:
    """Return the numbers of a record by name, "train/loss" or "valid/<set>/loss", without its clocks."""
    found = {name: value for name, value in record.items() if name not in CLOCKS and type(value) in (int, float)}
    if record["kind"] == "train":
        return {f"train/{name}": value for name, value in found.items()}
    found["perplexity"] = math.exp(min(20, record["loss"]))  # an upper bound where the loss is one
    return {f"valid/{record['set']}/{name}": value for name, value in found.items()}


# An event of TensorBoard has one integer step.
AXES = {
    "iterations": lambda record: record["iteration"],
    "samples": lambda record: record["consumed_samples"],
    "tokens": lambda record: record["consumed_tokens"],
    "epochs": lambda record: round(1000 * record["epoch"]),  # thousandths
    "flops": lambda record: round(record["flops"] / 1e9),  # GFLOPs
}


def curves(record: dict, axis: str) -> dict[str, float]:
    """Return what TensorBoard shows of a record on an axis: everything against iterations, else losses alone."""
    values = measures(record)
    if axis == "iterations":
        clocks = CLOCKS[1:] if record["kind"] == "train" else ()
        return values | {f"train/{name}": record[name] for name in clocks}
    return {name: value for name, value in values.items() if name.endswith(("/loss", "/perplexity"))}


class TensorBoard:
    """Event files. A restart hides events by their step, whatever their tag: each axis needs a folder of its own."""

    def __init__(self, settings: TrackingConfig, before: list[dict]):
        """Continue after the records `before`; a folder without events is given them all."""
        from torch.utils.tensorboard import SummaryWriter

        self._writers = {}
        for axis, step in AXES.items():
            folder = Path(settings.tensorboard_dir) / axis
            begun = any(folder.glob("events.out.tfevents.*"))
            # Steps are rounded: what was dropped may share one with the last record that is kept, so that this step
            # is hidden too and shown anew. Step 0 in a new folder hides nothing, but a later purge counts only then.
            purged = step(before[-1]) if before and begun else 0
            self._writers[axis] = SummaryWriter(folder, purge_step=purged, max_queue=settings.tensorboard_queue_size)
            for record in before:
                if step(record) >= purged:
                    self._add(record, axis)
        self._flush()

    def record(self, record: dict) -> None:
        for axis in AXES:
            self._add(record, axis)
        self._flush()  # a kill loses no event of a record that metrics.jsonl has

    def close(self, failed: bool) -> None:
        for writer in self._writers.values():
            writer.close()

    def _add(self, record: dict, axis: str) -> None:
        for name, value in curves(record, axis).items():
            self._writers[axis].add_scalar(f"{name} vs {axis}", value, AXES[axis](record))

    def _flush(self) -> None:
        for writer in self._writers.values():
            writer.flush()


class WeightsAndBiases:
    """A run of Weights & Biases, the same one after every restart; offline where nobody is logged in.

    Its history can only grow: steps that are repeated after a crash are in it twice. Its file is written every
    WRITE_INTERVAL seconds, so that a kill of the whole node loses what was recorded since. Its own step counts calls
    and is never set; curves are drawn against `iteration`, and can be drawn against every other clock.
    """

    def __init__(self, settings: TrackingConfig, folder: RunFolder | None, description: dict, before: list[dict]):
        """Continue the run whose id the run folder keeps; else begin one, with the records `before`."""
        import wandb

        # it prints nothing, captures nothing that we print, and waits at the end for a bad network only so long
        quiet = wandb.Settings(
            silent=True, console="off", finish_timeout=300, x_transaction_log_flush_interval=WRITE_INTERVAL
        )
        mode = wandb.setup(quiet).settings.mode
        if mode == "online" and not wandb.login(prompt=False, verify=False):
            mode = "offline"
        kept = folder.path / "wandb.json" if folder and mode != "disabled" else None
        begun = kept is not None and kept.exists()
        self._run = wandb.init(
            project=settings.wandb_project,
            name=settings.wandb_exp_name or (folder.path.resolve().name if folder else None),
            group=settings.wandb_group or None,
            dir=settings.wandb_save_dir or (folder.path if folder else None),
            id=read_json(kept)["id"] if begun else None,
            resume="allow",
            config=description,
            allow_val_change=True,
            mode=mode,
            settings=quiet,
        )
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")
        if not begun:
            for record in before:
                self.record(record)
        if kept and not begun:  # last: a beginning that failed is begun anew
            write_json(kept, {"id": self._run.id})
        self._say_where(mode)

    def record(self, record: dict) -> None:
        self._run.log({name: record[name] for name in CLOCKS} | measures(record))

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))

    def _say_where(self, mode: str) -> None:
        where = self._run.url or f"nothing is kept, as WANDB_MODE is {mode}"
        if self._run.offline:
            local = Path(self._run.dir).parents[1]  # every start leaves a folder there
            where = "offline, for want of a login or by WANDB_MODE; to send it: "
            where += f"wandb sync {local}/offline-run-*-{self._run.id}*"
        logger.info("%s: %s", typed("wandb_project", self._run.project), where)


class Trackers:
    """The trackers of a run, possibly none. One that fails is switched off: no run ends for its display."""

    def __init__(self, asked: dict[str, Callable]):
        """`asked` makes each tracker, by the flag as typed that asks for it."""
        self._running = {}
        for flag, start in asked.items():
            with self._surviving(flag):
                self._running[flag] = start()

    def record(self, record: dict) -> None:
        """Show one record."""
        for flag, tracker in list(self._running.items()):
            with self._surviving(flag):
                tracker.record(record)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Close the trackers; they may show whether the run failed."""
        for flag, tracker in list(self._running.items()):
            with self._surviving(flag):
                tracker.close(failed=kind is not None)

    @contextmanager
    def _surviving(self, flag: str):
        try:
            yield
        except Exception as error:  # whatever it is, of a package that is not ours
            self._running.pop(flag, None)
            reason = " ".join(str(error).split()) or type(error).__name__
            logger.warning("%s: is switched off (%s); the run goes on and metrics.jsonl has it all", flag, reason)


def check_packages(config: Config) -> None:
    """Check that what the trackers of a training need is installed; raise ConfigurationError with the remedy."""
    for name, package in {"tensorboard_dir": "tensorboard", "wandb_project": "wandb"}.items():
        value = None if config.validation.skip_train else getattr(config.tracking, name)
        rule = f"needs the package {package}; bash install.sh --with-{package} installs it"
        require(not value or find_spec(package) is not None, name, value, rule)


def start_trackers(config: Config, folder: RunFolder | None, description: dict, before: list[dict]) -> Trackers:
    """Return the trackers that `config` asks for; a run that only evaluates has none."""
    settings, asked = config.tracking, {}
    if settings.tensorboard_dir:
        asked[typed("tensorboard_dir", settings.tensorboard_dir)] = partial(TensorBoard, settings, before)
    if settings.wandb_project:
        begin = partial(WeightsAndBiases, settings, folder, description, before)
        asked[typed("wandb_project", settings.wandb_project)] = begin
    return Trackers({} if config.validation.skip_train else asked)
