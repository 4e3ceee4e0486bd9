"""TensorBoard: DIR/<axis>/events.out.tfevents.*, one folder per x axis, with tags "train/loss vs tokens"."""

from pathlib import Path

from megatron.config.sections import TrackingConfig
from megatron.training.trackers.base import X_AXES, TrackedRun, measures

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

    def __init__(self, settings: TrackingConfig, run: TrackedRun):
        """Continue after the past records; write those that the folder lacks, all of them if it has no events."""
        from torch.utils.tensorboard import SummaryWriter

        assert settings.tensorboard_dir is not None
        past_records = run.past_records
        place = {"folder": str(Path(settings.tensorboard_dir).absolute())}
        _, missing = run.resume("tensorboard", place)
        shown = past_records[: len(past_records) - len(missing)]
        self._writers = {}
        for axis, step in AXES.items():
            folder = Path(settings.tensorboard_dir) / axis
            has_events = any(folder.glob("events.out.tfevents.*"))
            # Steps are rounded: a dropped record may share its step with the last one shown, so that step is purged
            # too and written again. In a new folder step 0 purges nothing, but later purges only work if it was set.
            purge_step = step(shown[-1]) if shown and has_events else 0
            self._writers[axis] = SummaryWriter(
                folder, purge_step=purge_step, max_queue=settings.tensorboard_queue_size
            )
            for record in past_records:
                if step(record) >= purge_step:
                    self._add(record, axis)
        self._flush()
        run.save_identity("tensorboard", place)

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
