"""The training loop: read micro-batches, step, record, validate, save, exit. It is independent of the objective."""

import logging
import math
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from megatron.config.resolve import Plan
from megatron.config.sections import Config
from megatron.objectives.base import Likelihood
from megatron.parallel.engine import Engine
from megatron.parallel.mesh import ParallelContext
from megatron.training import checkpoint
from megatron.training.averaging import Average
from megatron.training.device_info import peak_flops, peak_memory
from megatron.training.exit_conditions import ExitConditions
from megatron.training.microbatches import Loader, MicroBatches
from megatron.training.run_folder import RunFolder, read_json, write_json
from megatron.training.saver import Saver
from megatron.training.schedule import learning_rate, weight_decay
from megatron.training.step import StepResult, reseed, train_step
from megatron.training.trackers import Trackers
from megatron.validation.evaluate import ValidationSet, evaluate

logger = logging.getLogger(__name__)


class DivergedError(RuntimeError):
    """The loss or the gradient norm is not finite."""


@dataclass
class Progress:
    """Progress of a run. Schedules are functions of `consumed_samples`."""

    iteration: int = 0
    consumed_samples: int = 0
    seconds: float = 0.0  # of training, without validation and saving
    time_block: int = 1  # consecutive sample indices with stratified times: the first start's global batch size


class Trainer:
    """All components of a run, assembled by `main`; `train` runs it to the end."""

    _bar: tqdm  # set by `train`

    def __init__(
        self,
        config: Config,
        plan: Plan,
        ranks: ParallelContext,
        engine: Engine,
        optimizer: torch.optim.Optimizer,
        average: Average | None,
        data: MicroBatches,
        validation_sets: list[ValidationSet],
        folder: RunFolder | None,
        trackers: Trackers,
        progress: Progress,
        description: dict,
        validated: dict[int, float],
    ):
        self.config, self.plan, self.ranks = config, plan, ranks
        self.engine, self.optimizer, self.average, self.data = engine, optimizer, average, data
        self.validation_sets, self.folder, self.progress = validation_sets, folder, progress
        self.trackers = trackers
        self.description = description  # contents of config.json; also in every checkpoint's meta.json
        self.objective = data.objective
        self.steps = progress.iteration + data.steps  # of the whole run
        self.diverged_at = torch.zeros((), dtype=torch.int64, device=ranks.device)  # 0: never
        # of the newest checkpoint, which the saver may still be writing
        self.saved_at, self.saved_samples = progress.iteration or None, progress.consumed_samples
        self.rate = self.decay = 0.0  # learning rate and weight decay of the last step
        self.validated = validated  # loss on the first set by iteration; selects the best checkpoint
        self._last_record = (progress.consumed_samples, progress.seconds)  # at the last training record

    def train(self) -> str:
        """Train until the budget is used up or an exit condition holds; return "finished" or the reason."""
        exit_conditions, reason = ExitConditions(self.config.training), ""
        progress = self.progress
        self._status("running", "")
        if self.saved_at:
            self._point(self.validated)  # a kill may have come between a checkpoint and its pointers
        # on exit the saver waits for the checkpoint that is being written, however the run ends
        with (
            Loader(self.data, self.config.data.num_workers, self.ranks.device) as batches,  # forks before threads
            logging_redirect_tqdm(),
            self._progress_bar() as self._bar,
            self._start_saver() as self._saver,
        ):
            last_time = time.monotonic()
            while progress.iteration < self.steps and not reason:
                result = self._step([batch for _ in range(self.data.per_step) for batch in next(batches)])
                self._bar.update()
                due = self._due()
                if due["log"] or due["evaluate"] or due["save"]:
                    self._check_finite()
                    progress.seconds += time.monotonic() - last_time
                    if due["log"]:
                        self._record_training(result)
                    if due["evaluate"]:
                        self.evaluate()
                    if due["save"]:
                        self.save()
                    last_time = time.monotonic()
                reason = exit_conditions.reason(progress.iteration, self.ranks) or ""
            if self.saved_at != progress.iteration:
                self._check_finite()
                progress.seconds += time.monotonic() - last_time
                self.save()
        finished = progress.iteration == self.steps
        self._status("finished" if finished else "stopped", "finished" if finished else reason)
        return "finished" if finished else reason

    def _step(self, micro_batches) -> StepResult:
        progress, training = self.progress, self.config.training
        reseed(training.seed, progress.iteration, self.ranks)
        samples = min(progress.consumed_samples + training.global_batch_size, self.plan.train_samples)
        self.rate = learning_rate(self.config.optimizer, self.plan, samples)
        self.decay = weight_decay(self.config.optimizer, self.plan, samples)
        result = train_step(
            self.engine,
            self.optimizer,
            micro_batches,
            learning_rate=self.rate,
            weight_decay=self.decay,
            clip_grad=self.config.optimizer.clip_grad,
        )
        if self.average:
            self.average.update(samples)
        progress.iteration, progress.consumed_samples = progress.iteration + 1, samples
        # stored on the device, so that no step synchronises
        diverged = ~(torch.isfinite(result.loss) & torch.isfinite(result.grad_norm)) & (self.diverged_at == 0)
        self.diverged_at = torch.where(diverged, progress.iteration, self.diverged_at)
        return result

    def _due(self) -> dict[str, bool]:
        step, last = self.progress.iteration, self.progress.iteration == self.steps
        interval = self.config.training.log_interval
        return {
            "log": step % interval == 0 or step == 1 or last,
            "evaluate": bool(self.validation_sets) and (step % self.plan.eval_interval == 0 or last),
            "save": self.config.checkpoint.save is not None and (step % self.plan.save_interval == 0 or last),
        }

    def _check_finite(self) -> None:
        (step,) = self.ranks.sum(int(self.diverged_at))
        if step:
            step = int(self.diverged_at) or "unknown"
            newest = (
                f"the newest checkpoint is from step {self.saved_at}" if self.saved_at else "no checkpoint was saved"
            )
            raise DivergedError(
                f"step {step}: loss or gradient norm is not finite; nothing was overwritten, {newest}; "
                "lower --lr, clip harder (--clip-grad) or look at the data"
            )

    def _record(self, record: dict) -> dict:
        """Add the x axes to a record, write it and return it; other tools rely on the keys."""
        progress, seq_length = self.progress, self.config.data.seq_length
        tokens = progress.consumed_samples * seq_length
        axes = {
            "iteration": progress.iteration,
            "consumed_samples": progress.consumed_samples,
            "consumed_tokens": tokens,
            "epoch": self._epoch(progress.consumed_samples),
            "flops": self.plan.flops(progress.consumed_samples, seq_length),
            "seconds": progress.seconds,
        }
        record = {"kind": record.pop("kind"), **axes, **record}
        if self.folder:
            self.folder.record(record)
        self.trackers.record(record)
        return record

    def _record_training(self, result: StepResult) -> None:
        progress, seq_length = self.progress, self.config.data.seq_length
        (loss,) = self.ranks.sum(float(result.loss))
        last_samples, last_seconds = self._last_record
        samples, seconds = progress.consumed_samples - last_samples, progress.seconds - last_seconds
        self._last_record = (progress.consumed_samples, progress.seconds)
        speed = samples * seq_length / seconds
        # no MFU with fp8: relative to the bf16 peak it would be too high
        peak = 0 if self.config.training.fp8_recipe else peak_flops(self.ranks.device) * self.ranks.size
        record = {
            "kind": "train",
            "loss": loss,
            "grad_norm": float(result.grad_norm),
            "learning_rate": self.rate,
            "weight_decay": self.decay,
            "tokens_per_second": speed,
            "mfu": self.plan.flops(1, 1) * speed / peak if peak else None,
            "memory_bytes": peak_memory(self.ranks.device),
        }
        mfu = f"  MFU {record['mfu']:.1%}" if peak else ""
        self._bar.set_postfix_str(f"loss {loss:.3f}, {speed / 1000:.1f}k tok/s{mfu}")
        self._log(
            f"step {progress.iteration}  samples {progress.consumed_samples}  loss {loss:.4f}  "
            f"norm {record['grad_norm']:.2f}  lr {self.rate:.1e}  {speed / 1000:.1f}k tok/s{mfu}"
        )
        self._record(record)

    def evaluate(self) -> list[dict]:
        """Evaluate model and averaged weights on every validation set with every likelihood; return the records.

        The loss of the model weights on the first set with the first likelihood selects the best checkpoint.
        """
        records = self._evaluate_all("")
        self.validated[self.progress.iteration] = records[0]["loss"]
        if self.average and self.average.steps:
            with self.average.swapped():
                records += self._evaluate_all(".average")
        return records

    def _evaluate_all(self, suffix: str) -> list[dict]:
        return [
            self._evaluate(data, likelihood, name + suffix)
            for data in self.validation_sets
            for name, likelihood in self.objective.evaluations(data.name)
        ]

    def _evaluate(self, data: ValidationSet, likelihood: Likelihood, name: str) -> dict:
        validation, iteration = self.config.validation, self.progress.iteration
        (evaluation,) = evaluate(
            self.engine,
            likelihood,
            data,
            seed=validation.eval_seed,
            replicates=validation.num_mc,
            batch_size=validation.eval_batch_size or self.config.training.micro_batch_size,
            alignment=validation.eval_alignment,
        )
        summary = evaluation.summary()
        if not math.isfinite(summary["loss"]):
            raise DivergedError(f"step {iteration}: validation loss on {name} is not finite")
        if self.folder:
            self.folder.save_evaluation(name, iteration, evaluation)
        replicates = 1 if likelihood.exact else validation.num_mc
        record = {"kind": "valid", "set": name, "likelihood": likelihood.name, "bound": not likelihood.exact}
        record |= {"alignment": validation.eval_alignment, "num_mc": replicates}
        error = "" if summary["mc_se"] is None else f", mc_se {summary['mc_se']:.4f}"
        bound = "" if likelihood.exact else f" (upper bound{error})"
        self._log(f"step {iteration}  {name} loss {summary['loss']:.4f}{bound}")
        return self._record(record | summary)

    def _start_saver(self) -> Saver:
        root = Path(self.config.checkpoint.save or "") / "checkpoints"
        saver = Saver(root, self.ranks, self.folder.check_lock if self.folder else None)
        if self.config.checkpoint.save:
            saver.reserve(self._tensors())
        return saver

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors of a checkpoint by name."""
        return self.engine.tensors(self.optimizer) | (self.average.tensors() if self.average else {})

    def save(self) -> None:
        """Start saving a checkpoint; when it is complete, update latest.json and best.json and prune old checkpoints.

        Raises: OSError if the previous checkpoint could not be written.
        """
        progress = self.progress
        if self.config.checkpoint.save is None:
            return
        meta = {
            "iteration": progress.iteration,
            "consumed_samples": progress.consumed_samples,
            "seconds": progress.seconds,
            "time_block": progress.time_block,
            "averaged_steps": self.average.steps if self.average else 0,
            "permanent": self._permanent(),
            "config": self.description,
        }
        # a copy: the run may be validated again before the checkpoint is written
        point = partial(self._point, dict(self.validated))
        self._saver.save(self._tensors(), meta, then=point)
        self.saved_at, self.saved_samples = progress.iteration, progress.consumed_samples

    def _point(self, validated: dict[int, float]) -> None:
        """Point latest.json at the newest checkpoint and best.json at the best one left; prune other checkpoints."""
        if self.folder is None:
            return
        self.folder.check_lock()
        root = self.folder.checkpoints
        folders = {int(path.name[5:]): path for path in checkpoint.complete(root)}
        pointers = {"latest": max(folders, default=None)}
        pointers["best"] = min(validated.keys() & folders.keys(), key=validated.__getitem__, default=None)
        for name, iteration in pointers.items():
            if iteration is not None:
                meta = read_json(folders[iteration] / "meta.json")
                pointer = {"folder": folders[iteration].name, "iteration": iteration}
                pointer |= {"consumed_samples": meta["consumed_samples"], "loss": validated.get(iteration)}
                pointer |= {"set": self.validation_sets[0].name if iteration in validated else None}
                write_json(root / f"{name}.json", pointer)
        checkpoint.prune(root, keep={pointers["latest"], pointers["best"]})

    def _permanent(self) -> bool:
        """Return whether this is the first checkpoint of an n-th epoch, which is never pruned."""
        interval = self.config.checkpoint.keep_every_epochs
        return (
            bool(interval)
            and self._epoch(self.progress.consumed_samples) // interval > self._epoch(self.saved_samples) // interval
        )

    def _epoch(self, samples: int) -> float:
        return samples * self.config.data.seq_length / self.plan.unique_tokens

    def _progress_bar(self) -> tqdm:
        return tqdm(
            initial=self.progress.iteration,
            total=self.steps,
            desc=self.objective.name,
            unit="step",
            dynamic_ncols=True,
            disable=self.ranks.rank != 0 or not sys.stderr.isatty(),
        )

    def _log(self, line: str) -> None:
        if self.ranks.rank == 0:
            logger.info(line)

    def _status(self, state: str, reason: str) -> None:
        if self.folder:
            self.folder.status(state, reason, self.progress.iteration, self.progress.consumed_samples)
