"""The loop: feed, step, record, validate, save, leave. It never asks which objective runs."""

import logging
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from megatron.config.resolve import Plan
from megatron.config.sections import Config
from megatron.parallel.mesh import Processes
from megatron.training import checkpoint
from megatron.training.evaluate import ValidationSet, evaluate
from megatron.training.feed import MicroBatches, loader
from megatron.training.metrics import peak_flops, peak_memory
from megatron.training.run_folder import RunFolder, read_json, write_json
from megatron.training.schedule import learning_rate
from megatron.training.step import StepResult, reseed, train_step
from megatron.training.stopping import Stopping

logger = logging.getLogger(__name__)


class DivergedError(RuntimeError):
    """The loss is no longer a number."""


@dataclass
class Progress:
    """Where a run stands. `consumed_samples` is the clock; the rest is kept for the records."""

    iteration: int = 0
    consumed_samples: int = 0
    seconds: float = 0.0  # of training, without validation and saving


class Trainer:
    """Everything one run needs, put together by `main`; `train` runs it to its end."""

    def __init__(
        self,
        config: Config,
        plan: Plan,
        processes: Processes,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        data: MicroBatches,
        validation_sets: list[ValidationSet],
        folder: RunFolder | None,
        progress: Progress,
    ):
        self.config, self.plan, self.processes = config, plan, processes
        self.model, self.optimizer, self.data = model, optimizer, data
        self.validation_sets, self.folder, self.progress = validation_sets, folder, progress
        self.objective = data.objective
        self.steps = progress.iteration + data.steps  # of the whole run
        self.diverged_at = torch.zeros((), dtype=torch.int64, device=processes.device)  # 0: never
        self.saved_at = progress.iteration if progress.iteration else None

    def train(self) -> str:
        """Run until the budget is spent or a reason to leave appears; return that reason, or "finished"."""
        stopping, reason = Stopping(self.config.training), None
        progress = self.progress
        batches = iter(loader(self.data, self.config.data.num_workers, self.processes.device))
        self._status("running", "")
        clock = time.monotonic()
        for _ in self._bar(range(progress.iteration, self.steps)):
            micro_batches = [next(batches) for _ in range(self.data.per_step)]
            result = self._step(micro_batches)
            due = self._due()
            if due["log"] or due["evaluate"] or due["save"]:
                self._check_finite()
                progress.seconds += time.monotonic() - clock
                if due["log"]:
                    self._record_training(result)
                if due["evaluate"]:
                    self.evaluate()
                if due["save"]:
                    self.save()
                clock = time.monotonic()
            reason = stopping.reason(progress.iteration, self.processes)
            if reason:
                break
        if self.saved_at != progress.iteration:
            self._check_finite()
            progress.seconds += time.monotonic() - clock
            self.save()
        finished = progress.iteration == self.steps
        reason = "finished" if finished else reason
        self._status("finished" if finished else "stopped", reason)
        return reason

    def _step(self, micro_batches) -> StepResult:
        progress, training = self.progress, self.config.training
        reseed(training.seed, progress.iteration, self.processes.rank)
        after = min(progress.consumed_samples + training.global_batch_size, self.plan.train_samples)
        self.rate = learning_rate(self.config.optimizer, self.plan, after)
        result = train_step(
            self.model,
            self.optimizer,
            micro_batches,
            self.processes,
            learning_rate=self.rate,
            clip_grad=self.config.optimizer.clip_grad,
        )
        progress.iteration, progress.consumed_samples = progress.iteration + 1, after
        # noted on the device, so that no step waits for it
        bad = ~(torch.isfinite(result.loss) & torch.isfinite(result.grad_norm)) & (self.diverged_at == 0)
        self.diverged_at = torch.where(bad, progress.iteration, self.diverged_at)
        return result

    def _due(self) -> dict[str, bool]:
        step, last = self.progress.iteration, self.progress.iteration == self.steps
        every = self.config.training.log_interval
        return {
            "log": step % every == 0 or step == 1 or last,
            "evaluate": bool(self.validation_sets) and (step % self.plan.eval_interval == 0 or last),
            "save": self.config.checkpoint.save is not None and (step % self.plan.save_interval == 0 or last),
        }

    def _check_finite(self) -> None:
        (step,) = self.processes.sum(int(self.diverged_at))
        if step:
            step = int(self.diverged_at) or "unknown"
            raise DivergedError(
                f"step {step}: loss or gradient norm is not finite; nothing was overwritten, the newest checkpoint is "
                f"from step {self.saved_at or 'none'}; lower --lr, clip harder (--clip-grad) or look at the data"
            )

    def _record(self, record: dict) -> None:
        """Add the clocks to a record and write it; the keys are a contract (docs: run folder)."""
        progress, seq_length = self.progress, self.config.data.seq_length
        tokens = progress.consumed_samples * seq_length
        clocks = {
            "iteration": progress.iteration,
            "consumed_samples": progress.consumed_samples,
            "consumed_tokens": tokens,
            "epoch": tokens / self.plan.unique_tokens,
            "flops": self.plan.flops(progress.consumed_samples, seq_length),
            "seconds": progress.seconds,
        }
        if self.folder:
            self.folder.record({"kind": record.pop("kind"), **clocks, **record})

    def _record_training(self, result: StepResult) -> None:
        progress, seq_length = self.progress, self.config.data.seq_length
        (loss,) = self.processes.sum(float(result.loss))
        samples, seconds = self._since_last_record()
        speed = samples * seq_length / seconds if seconds > 0 else None
        peak = peak_flops(self.processes.device) * self.processes.size
        record = {
            "kind": "train",
            "loss": loss,
            "grad_norm": float(result.grad_norm),
            "learning_rate": self.rate,
            "weight_decay": self.config.optimizer.weight_decay,
            "tokens_per_second": speed,
            "mfu": 6 * self.plan.parameters * speed / peak if speed and peak else None,
            "memory_bytes": peak_memory(self.processes.device),
        }
        self._say(
            f"step {progress.iteration}  samples {progress.consumed_samples}  loss {loss:.4f}  "
            f"norm {record['grad_norm']:.2f}  lr {self.rate:.1e}  {(speed or 0) / 1000:.1f}k tok/s"
        )
        self._record(record)

    def _since_last_record(self) -> tuple[int, float]:
        last = getattr(self, "_last_record", None) or (self.progress.consumed_samples, self.progress.seconds)
        now = (self.progress.consumed_samples, self.progress.seconds)
        self._last_record = now
        return now[0] - last[0], now[1] - last[1]

    def evaluate(self) -> None:
        """Evaluate every validation set; the first one decides which checkpoint is best."""
        validation = self.config.validation
        for index, data in enumerate(self.validation_sets):
            evaluation = evaluate(
                self.model,
                self.objective,
                data,
                self.processes,
                seed=validation.eval_seed,
                replicates=validation.num_mc,
                batch_size=validation.eval_batch_size or self.config.training.micro_batch_size,
                alignment=validation.eval_alignment,
            )
            summary = evaluation.summary()
            if not math.isfinite(summary["loss"]):
                raise DivergedError(f"step {self.progress.iteration}: validation loss on {data.name} is not finite")
            if index == 0:
                self.selection = (data.name, summary["loss"])
            if self.folder:
                self.folder.save_evaluation(data.name, self.progress.iteration, evaluation)
            replicates = 1 if self.objective.exact else validation.num_mc
            self._record(
                {
                    "kind": "valid",
                    "set": data.name,
                    "alignment": validation.eval_alignment,
                    "num_mc": replicates,
                    **summary,
                }
            )
            bound = "" if self.objective.exact else f" (upper bound, mc_se {summary['mc_se'] or 0:.4f})"
            self._say(f"step {self.progress.iteration}  {data.name} loss {summary['loss']:.4f}{bound}")

    def save(self) -> None:
        """Write a checkpoint, point latest.json (and best.json) at it, and prune."""
        settings, progress = self.config.checkpoint, self.progress
        if settings.save is None:
            return
        root = Path(settings.save) / "checkpoints"
        meta = {
            "iteration": progress.iteration,
            "consumed_samples": progress.consumed_samples,
            "seconds": progress.seconds,
            "time_block": getattr(self.objective, "time_block", self.config.training.global_batch_size),
            "permanent": self._permanent(),
        }
        target = checkpoint.save(root, checkpoint.tensors(self.model, self.optimizer), meta, self.processes)
        self.saved_at = progress.iteration
        if self.folder is None:
            return
        name, loss = getattr(self, "selection", (None, None))
        pointer = {
            "folder": target.name,
            "iteration": progress.iteration,
            "consumed_samples": progress.consumed_samples,
        }
        pointer |= {"set": name, "loss": loss}
        write_json(root / "latest.json", pointer)
        best = read_json(root / "best.json") if (root / "best.json").exists() else None
        evaluated_now = progress.iteration % self.plan.eval_interval == 0 or progress.iteration == self.steps
        if loss is not None and evaluated_now and (best is None or loss < best["loss"]):
            best = pointer
            write_json(root / "best.json", best)
        checkpoint.prune(root, keep={best["folder"]} if best else set())

    def _permanent(self) -> bool:
        """The first checkpoint of every n-th epoch stays."""
        every = self.config.checkpoint.keep_every_epochs
        if not every:
            return False
        seq_length, batch = self.config.data.seq_length, self.config.training.global_batch_size
        epoch = self.progress.consumed_samples * seq_length / self.plan.unique_tokens
        step = self.plan.save_interval * batch * seq_length / self.plan.unique_tokens
        return int(epoch / every) > int(max(0.0, epoch - step) / every)

    def _bar(self, steps):
        return tqdm(
            steps,
            initial=self.progress.iteration,
            total=self.steps,
            desc=self.objective.name,
            unit="step",
            dynamic_ncols=True,
            disable=self.processes.rank != 0 or not sys.stderr.isatty(),
        )

    def _say(self, line: str) -> None:
        if self.processes.rank == 0:
            logger.info(line)

    def _status(self, state: str, reason: str) -> None:
        if self.folder:
            self.folder.status(state, reason, self.progress.iteration, self.progress.consumed_samples)
