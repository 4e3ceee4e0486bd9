"""What a run reports: records with their x axes, status.json, log lines and the progress bar.

A record goes to metrics.jsonl first; trackers show the same record. Only rank 0 has a run folder and trackers.
"""

import logging
import sys
from contextlib import suppress

from tqdm import tqdm

from megatron.objectives.base import Likelihood
from megatron.training.build import RunParts
from megatron.training.device_info import peak_flops, peak_memory
from megatron.training.step import StepResult
from megatron.validation.evaluate import Evaluation

logger = logging.getLogger(__name__)


class Recorder:
    """Reports the progress of a run; every method that writes raises LockError if another process writes the run."""

    _bar: tqdm  # set by `progress_bar`

    def __init__(self, parts: RunParts):
        self.parts, self.config, self.progress = parts, parts.config, parts.progress
        self._last = (self.progress.consumed_samples, self.progress.seconds)  # at the last training record

    def record_training(self, result: StepResult, *, learning_rate: float, weight_decay: float) -> None:
        """Record the last step, with the speed since the last training record. A collective call."""
        progress, ranks = self.progress, self.parts.ranks
        (loss,) = ranks.sum(float(result.loss))
        last_samples, last_seconds = self._last
        samples, seconds = progress.consumed_samples - last_samples, progress.seconds - last_seconds
        self._last = (progress.consumed_samples, progress.seconds)
        speed = samples * self.config.data.seq_length / seconds
        # no MFU with fp8: relative to the bf16 peak it would be too high
        peak = 0 if self.config.training.fp8_recipe else peak_flops(ranks.device) * ranks.size
        record = {
            "kind": "train",
            "loss": loss,
            "grad_norm": float(result.grad_norm),
            "learning_rate": learning_rate,
            "weight_decay": weight_decay,
            "tokens_per_second": speed,
            "mfu": self.parts.plan.flops(1, 1) * speed / peak if peak else None,
            "memory_bytes": peak_memory(ranks.device),
        }
        mfu = f"  MFU {record['mfu']:.1%}" if peak else ""
        self._bar.set_postfix_str(f"loss {loss:.3f}, {speed / 1000:.1f}k tok/s{mfu}")
        self._log(
            f"step {progress.iteration}  samples {progress.consumed_samples}  loss {loss:.4f}  "
            f"norm {record['grad_norm']:.2f}  lr {learning_rate:.1e}  {speed / 1000:.1f}k tok/s{mfu}"
        )
        self._record(record)

    def record_validation(self, name: str, likelihood: Likelihood, evaluation: Evaluation, summary: dict) -> dict:
        """Save the sums by document of an evaluation, record its `summary` and return the record."""
        validation, iteration = self.config.validation, self.progress.iteration
        if self.parts.folder:
            self.parts.folder.save_evaluation(name, iteration, evaluation)
        replicates = 1 if likelihood.exact else validation.num_mc
        record = {"kind": "valid", "set": name, "likelihood": likelihood.name, "bound": not likelihood.exact}
        record |= {"alignment": validation.eval_alignment, "num_mc": replicates}
        error = "" if summary["mc_se"] is None else f", mc_se {summary['mc_se']:.4f}"
        bound = "" if likelihood.exact else f" (upper bound{error})"
        self._log(f"step {iteration}  {name} loss {summary['loss']:.4f}{bound}")
        return self._record(record | summary)

    def _record(self, record: dict) -> dict:
        """Add the x axes to a record, write it and return it; other tools rely on the keys."""
        progress, seq_length = self.progress, self.config.data.seq_length
        axes = {
            "iteration": progress.iteration,
            "consumed_samples": progress.consumed_samples,
            "consumed_tokens": progress.consumed_samples * seq_length,
            "epoch": self.parts.epoch(progress.consumed_samples),
            "flops": self.parts.plan.flops(progress.consumed_samples, seq_length),
            "seconds": progress.seconds,
        }
        record = {"kind": record.pop("kind"), **axes, **record}
        if self.parts.folder:
            self.parts.folder.record(record)
        self.parts.trackers.record(record)
        return record

    def status(self, state: str, reason: str) -> None:
        """Write status.json: `state` is running, finished, stopped or failed, and `reason` says why."""
        if self.parts.folder:
            self.parts.folder.status(state, reason, self.progress.iteration, self.progress.consumed_samples)

    def failed(self, reason: str) -> None:
        """Write status.json of a run that ends with an error."""
        with suppress(OSError):  # a full disk; or another process writes the run now. The error itself is reported
            self.status("failed", reason)

    def progress_bar(self, steps: int) -> tqdm:
        """Return the progress bar over the `steps` of the whole run, on rank 0 in a terminal; it is closed on exit."""
        self._bar = tqdm(
            initial=self.progress.iteration,
            total=steps,
            desc=self.parts.objective.name,
            unit="step",
            dynamic_ncols=True,
            disable=self.parts.ranks.rank != 0 or not sys.stderr.isatty(),
        )
        return self._bar

    def _log(self, line: str) -> None:
        if self.parts.ranks.rank == 0:
            logger.info(line)
