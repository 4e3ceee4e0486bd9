"""The training loop: read micro-batches, step, record, validate, save, exit. It is independent of the objective."""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm.contrib.logging import logging_redirect_tqdm

from megatron.objectives.base import Likelihood
from megatron.parallel.meta_gradient import MetaGradient
from megatron.training.build import RunParts
from megatron.training.checkpoint_store import CheckpointStore
from megatron.training.exit_conditions import ExitConditions, on_any_rank, signal_reason
from megatron.training.microbatches import Loader
from megatron.training.recorder import Recorder
from megatron.training.saver import Saver
from megatron.training.schedule import learning_rate, weight_decay
from megatron.training.step import StepResult, reseed, train_step
from megatron.validation.evaluate import Evaluation, ValidationSet, evaluate


class DivergedError(RuntimeError):
    """The loss or the gradient norm is not finite."""


class EvaluationStopped(Exception):
    """A signal stopped an evaluation before its end."""


class Trainer:
    """Trains or evaluates a run; `train` runs it to the end."""

    _saver: Saver  # set by `train`

    def __init__(self, parts: RunParts):
        self.parts, self.config, self.plan, self.ranks = parts, parts.config, parts.plan, parts.ranks
        self.engine, self.optimizer, self.average = parts.state.engine, parts.state.optimizer, parts.state.average
        self.progress = progress = parts.progress
        self.recorder = Recorder(parts)
        if parts.folder:
            self.store = CheckpointStore(parts.folder.checkpoints, parts.folder.check_lock)
        else:  # a rank other than 0 writes its shards to the same folder
            self.store = CheckpointStore.of_run(Path(parts.config.checkpoint.save or ""))
        self.steps = progress.iteration + parts.data.steps  # of the whole run
        self.diverged_at = torch.zeros((), dtype=torch.int64, device=parts.ranks.device)  # 0: never
        # of the newest checkpoint, which the saver may still be writing
        self.saved_at, self.saved_samples = progress.iteration or None, progress.consumed_samples
        self.rate = self.decay = 0.0  # learning rate and weight decay of the last step
        self.validated = parts.validated  # selects the best checkpoint
        # whether a signal stopped the evaluation of the last step, which the next start repeats
        self.evaluation_due = bool(parts.validation_sets and parts.origin and parts.origin.evaluation_due)

    def train(self, started: float) -> str:
        """Train until the budget is used up or an exit condition holds; return "finished" or the reason.

        The time limit counts from `started`, in seconds of `time.monotonic`.
        """
        exit_conditions, reason = ExitConditions(self.config.training, started), ""
        progress, data = self.progress, self.parts.data
        self.recorder.status("running", "")
        self._update_pointers()  # a kill may have come between a checkpoint and its pointers
        # on exit the saver waits for the checkpoint that is being written, however the run ends
        with (
            Loader(data, self.config.data.num_workers, self.ranks.device) as batches,  # forks before threads
            logging_redirect_tqdm(),
            self.recorder.progress_bar(self.steps) as bar,
            self._start_saver() as self._saver,
        ):
            if self.evaluation_due:
                self._evaluate_unless_stopped()
                reason = (self.evaluation_due and exit_conditions.reason(progress.iteration, self.ranks)) or ""
                self._update_pointers()
            last_time = time.monotonic()
            while progress.iteration < self.steps and not reason:
                result = self._step([batch for _ in range(data.per_step) for batch in next(batches)])
                bar.update()
                due = self._due()
                if due["log"] or due["evaluate"] or due["save"]:
                    self._check_finite()
                    progress.seconds += time.monotonic() - last_time
                    if due["log"]:
                        self.recorder.record_training(result, learning_rate=self.rate, weight_decay=self.decay)
                    if due["evaluate"]:
                        self._evaluate_unless_stopped()
                    if due["save"]:
                        self.save()
                    last_time = time.monotonic()
                reason = exit_conditions.reason(progress.iteration, self.ranks) or ""
            if self.saved_at != progress.iteration:
                self._check_finite()
                progress.seconds += time.monotonic() - last_time
                self.save()
        finished = progress.iteration == self.steps and not self.evaluation_due
        self.recorder.status("finished" if finished else "stopped", "finished" if finished else reason)
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
            meta_gradient=MetaGradient.at(self.config.optimizer, self.rate),
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
        interval, checkpoint = self.config.training.log_interval, self.config.checkpoint
        at_save = step % self.plan.save_interval == 0 or step in checkpoint.keep_iterations or last or self._is_snapshot
        return {
            "log": step % interval == 0 or step == 1 or last,
            "evaluate": bool(self.parts.validation_sets) and (step % self.plan.eval_interval == 0 or last),
            "save": checkpoint.save is not None and at_save,
        }

    def _check_finite(self) -> None:
        (step,) = self.ranks.sum(int(self.diverged_at))
        if step:
            step = int(self.diverged_at) or "unknown"
            newest, save, remedy = "no checkpoint was saved", self.config.checkpoint.save, ""
            if self.saved_at:
                newest = f"the newest checkpoint is from step {self.saved_at}"
                remedy = f" in a branch (--load {save} --save ANOTHER_DIR)" if save else ""
            raise DivergedError(
                f"step {step}: loss or gradient norm is not finite; nothing was overwritten, {newest}; "
                f"lower --lr or clip harder (--clip-grad){remedy}, or look at the data"
            )

    def evaluate(self) -> list[dict]:
        """Evaluate model and averaged weights on every validation set with every likelihood; return the records.

        The loss of the model weights on the first set with the first likelihood selects the best checkpoint.

        Raises: EvaluationStopped if a signal to a training run ends it: nothing is recorded then.
        """
        evaluations = list(self._evaluate_all(""))
        if self.average and self.average.steps:
            with self.average.swapped():
                evaluations += self._evaluate_all(".average")
        records = [
            self.recorder.record_validation(name, likelihood, evaluation, evaluation.summary())
            for name, likelihood, evaluation in evaluations
        ]
        self.validated[self.progress.iteration] = records[0]["loss"]
        return records

    def _evaluate_unless_stopped(self) -> None:
        """Evaluate; if a signal ends that, the checkpoint that follows says so, and the next start evaluates."""
        try:
            self.evaluate()
            self.evaluation_due = False
        except EvaluationStopped:
            self.evaluation_due = True

    def _evaluate_all(self, suffix: str) -> Iterator[tuple[str, Likelihood, Evaluation]]:
        for data in self.parts.validation_sets:
            for name, likelihood in self.parts.objective.evaluations(data.name):
                yield name + suffix, likelihood, self._evaluate(data, likelihood, name + suffix)

    def _evaluate(self, data: ValidationSet, likelihood: Likelihood, name: str) -> Evaluation:
        validation = self.config.validation
        (evaluation,) = evaluate(
            self.engine,
            likelihood,
            data,
            seed=validation.eval_seed,
            replicates=validation.num_mc,
            batch_size=validation.eval_batch_size or self.config.training.micro_batch_size,
            alignment=validation.eval_alignment,
            before_pass=self._check_signals,
        )
        if not math.isfinite(evaluation.summary()["loss"]):
            raise DivergedError(f"step {self.progress.iteration}: validation loss on {name} is not finite")
        return evaluation

    def _check_signals(self) -> None:
        """Raise EvaluationStopped if a signal reached any rank of a training run. A collective call.

        Raises: EvaluationStopped then; an evaluation alone ends by itself.
        """
        if not self.config.validation.skip_train and on_any_rank(signal_reason(), self.ranks):
            raise EvaluationStopped

    @property
    def _selecting_set(self) -> str | None:
        """The name of the validation set whose loss selects the best checkpoint."""
        return self.parts.validation_sets[0].name if self.parts.validation_sets else None

    def _start_saver(self) -> Saver:
        saver = self.store.start_saver(self.ranks)
        if self.config.checkpoint.save:
            saver.reserve(self._tensors())
        return saver

    def _tensors(self) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint by name."""
        return self.engine.tensors(self.optimizer) | (self.average.tensors() if self.average else {})

    def save(self) -> None:
        """Start saving a checkpoint; when it is complete, update latest.json and best.json and prune old checkpoints.

        Raises: OSError if the previous checkpoint could not be written.
        """
        if self.config.checkpoint.save is None:
            return
        if self.parts.folder:
            self.parts.folder.sync_records()
        progress = self.progress
        meta = asdict(progress) | {
            "averaged_steps": self.average.steps if self.average else 0,
            "evaluation_due": self.evaluation_due,
            "permanent": self._permanent(),
            "config": self.parts.description,
        }
        self.store.save(self._saver, self._tensors(), meta, losses=self.validated, validation_set=self._selecting_set)
        self.saved_at, self.saved_samples = progress.iteration, progress.consumed_samples

    def _update_pointers(self) -> None:
        if self.saved_at and self.parts.folder:
            self.store.update_pointers(self.validated, self._selecting_set)

    def _permanent(self) -> bool:
        """Return whether this checkpoint is never pruned.

        Kept are the first of an n-th epoch, those of --keep-iterations, and the last of each cycle.
        """
        interval, epoch = self.config.checkpoint.keep_every_epochs, self.parts.epoch
        if self._is_snapshot or self.progress.iteration in self.config.checkpoint.keep_iterations:
            return True
        return (
            bool(interval) and epoch(self.progress.consumed_samples) // interval > epoch(self.saved_samples) // interval
        )

    @property
    def _is_snapshot(self) -> bool:
        """Whether the last step is the last one of a cycle of the learning rate (1704.00109)."""
        samples = self.progress.consumed_samples
        next_samples = min(samples + self.config.training.global_batch_size, self.plan.train_samples)
        return any(samples == end or samples < end < next_samples for end in self.plan.lr_cycle_ends)
