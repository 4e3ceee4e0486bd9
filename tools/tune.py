#!/usr/bin/env python3
"""Find the fastest --micro-batch-size, --compile and --recompute-granularity for a training run on this machine.

    python tools/tune.py --objective mdm --model-size 140M --seq-length 2048
    python tools/tune.py --model-size 7M --seq-length 512 --global-batch-size 16 --trial-steps 3      # a CPU
    torchrun --standalone --nproc-per-node 8 tools/tune.py --model-size 2283M --zero-stage 3

It takes the flags of a training run (pretrain_gpt.py, pretrain_mdm.py) but no data: steps run on random text, at the
same cost. It starts with uncompiled blocks without activation checkpointing and doubles the micro-batch size as long as
that is faster and fits in memory. Around the best size it then tries compiled blocks, and activation checkpointing:
its cost, and the gain of a larger micro-batch that fits only with it. It prints all trials with time and memory, and
the fastest flags last; none affects results beyond rounding and dropout RNG.

A step of a trial has as many samples as the largest micro-batch and accumulates gradients over smaller ones. Memory is
the peak of the GPU; on a CPU, the peak of the process so far. Times are wall-clock: leave the machine idle otherwise.
About ten trials of eight steps each, plus up to a minute of compilation per compiled trial.
"""

import sys
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron import stop_signals

if __name__ == "__main__":
    stop_signals.install_in_tool()  # before the imports, which take seconds

import torch

from megatron.config.flags import flag, require, typed
from megatron.config.sections import Config
from megatron.config.sizes import GPT2_VOCABULARY
from megatron.config.vocabulary import Vocabulary
from megatron.errors import ConfigurationError
from megatron.log import configure_logging
from megatron.objectives.registry import capabilities
from megatron.parallel.memory_estimate import peak_memory
from megatron.parallel.mesh import destroy_parallel, initialize_parallel
from megatron.training.command_line import parse_with
from megatron.training.device_info import device_memory
from megatron.training.environment import choose_precision, cpp_compiler, device_name, prepare_device
from megatron.training.load_run import teacher_models
from megatron.training.run_folder import write_json
from megatron.training.step_benchmark import WARM_UP, Trial, attempt

GAIN = 1.02  # minimum speedup of a micro-batch size for trying the next larger one
MAX_MICRO_BATCH = {"cuda": 64, "cpu": 8}  # default of --micro-batch-max
RECOMPUTE = ("selective", "full")
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Options:
    """Trials: number of steps, largest micro-batch size."""

    trial_steps: int = flag(5, f"timed steps of a trial, after {WARM_UP} untimed ones")
    micro_batch_max: int | None = flag(
        None,
        f"largest size to try; default {MAX_MICRO_BATCH['cuda']} on a GPU, {MAX_MICRO_BATCH['cpu']} on a CPU",
    )
    vocabulary_size: int = flag(GPT2_VOCABULARY, "number of token ids; the default is GPT-2's")
    output: str | None = flag(None, "also write all trials as JSON", metavar="FILE")

    def __post_init__(self):
        for name in ("trial_steps", "micro_batch_max", "vocabulary_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "must be at least 1")
        folder = Path(self.output or ".").parent
        require(folder.is_dir(), "output", self.output, f"{folder} is not a folder; create it first")


class Choice(NamedTuple):
    """The tuned settings."""

    micro_batch: int
    recompute: str | None
    compile: bool

    def __str__(self) -> str:
        flags = [typed("micro_batch_size", self.micro_batch), "--compile" if self.compile else "--no-compile"]
        return " ".join([*flags, typed("recompute_granularity", self.recompute)] if self.recompute else flags)


class Tuner:
    """The trials of one configuration, each run once; all ranks run the same trials."""

    def __init__(self, options: Options, config: Config):
        self.config, self.steps = config, options.trial_steps
        self.vocabulary = Vocabulary(options.vocabulary_size)
        self.ranks = ranks = initialize_parallel()
        prepare_device(config, ranks.device)  # fails if no trial could run
        self.memory = device_memory(ranks.device)
        self.data_size = config.parallel.data_size(ranks.size)
        samples = config.training.global_batch_size // self.data_size
        largest = options.micro_batch_max or MAX_MICRO_BATCH[ranks.device.type]
        self.samples = max(size for size in range(1, largest + 1) if samples % size == 0)
        self.trials: dict[Choice, Trial | str] = {}

    def search(self) -> None:
        """Run the trials in the order that the module docstring describes."""
        training, parallel = self.config.training, self.config.parallel
        as_typed = Choice(training.micro_batch_size, parallel.recompute_granularity, bool(training.compile))
        if self.samples % as_typed.micro_batch == 0:
            self.trial(as_typed)
        speed = 0.0
        for size in self.sizes():
            result = self.trial(Choice(size, None, False))
            if isinstance(result, str) or result.tokens_per_second < GAIN * speed:
                break
            speed = result.tokens_per_second
        if not speed:  # even a single sample needs activation checkpointing
            for kind in RECOMPUTE:
                self.trial(Choice(1, kind, False))
        if self.best and self.ranks.sum(cpp_compiler() is None) == [0]:  # on every node
            sizes, best = self.sizes(), self.best
            index = sizes.index(best.micro_batch) if best.micro_batch in sizes else 0
            for size in [best.micro_batch, *sizes[index + 1 : index + 2], *sizes[max(0, index - 1) : index]]:
                self.trial(best._replace(micro_batch=size, compile=True))
        if self.best:
            best = self.best
            larger = [size for size in self.sizes() if size > best.micro_batch][:1]
            # the next larger size is worth a trial only if it does not fit without activation checkpointing
            if any(isinstance(self.trials.get(best._replace(micro_batch=size)), Trial) for size in larger):
                larger = []
            for kind in RECOMPUTE:
                for size in [best.micro_batch, *larger]:
                    self.trial(best._replace(micro_batch=size, recompute=kind))

    def sizes(self) -> list[int]:
        """Return the micro-batch sizes to try: divisors of a step, each at least twice the previous one."""
        sizes = [1]
        for size in range(2, self.samples + 1):
            if self.samples % size == 0 and size >= 2 * sizes[-1]:
                sizes.append(size)
        return sizes

    @property
    def best(self) -> Choice | None:
        """The fastest choice so far."""
        successful = {choice: trial for choice, trial in self.trials.items() if isinstance(trial, Trial)}
        return max(successful, key=lambda choice: successful[choice].tokens_per_second, default=None)

    def trial(self, choice: Choice) -> Trial | str:
        """Return the trial of a choice, or why it failed; run and print it the first time."""
        if choice not in self.trials:
            self.trials[choice] = self._attempt(choice)
            if self.ranks.rank == 0:
                print(row(choice, self.trials[choice]), flush=True)
        return self.trials[choice]

    def _attempt(self, choice: Choice) -> Trial | str:
        changed = {"micro_batch_size": choice.micro_batch, "compile": choice.compile}
        changed["global_batch_size"] = self.samples * self.data_size
        config = replace(
            self.config,
            training=replace(self.config.training, **changed),
            parallel=replace(self.config.parallel, recompute_granularity=choice.recompute),
        )
        if not config.parallel.deepspeed:
            precision, kind = choose_precision(config, self.ranks.device), self.ranks.device.type
            settings = {"world_size": self.ranks.size, "precision": precision, "device": kind}
            settings |= {"teachers": teacher_models(config)}
            declared = capabilities(config.objective.objective)
            needed = peak_memory(config, self.vocabulary, declared, **settings).total
            if needed > self.memory:
                return f"does not fit: {needed / GIB:.1f} GiB of {self.memory / GIB:.1f}"
        return attempt(config, self.vocabulary, self.steps)


def row(choice: Choice, trial: Trial | str) -> str:
    """Return the table row of a trial."""
    blocks = "compiled" if choice.compile else "eager"
    start = f"{choice.micro_batch:>11}  {choice.recompute or '-':9}  {blocks:8}  "
    if isinstance(trial, str):
        return start + trial
    columns = f"{trial.tokens_per_second:>10,.0f}  {trial.memory_bytes / GIB:>6.1f}"
    return f"{start}{columns}  {trial.first_step_seconds:>10.1f}"


def verdict(tuner: Tuner) -> str:
    """Return the fastest flags and their speedup."""
    best, config = tuner.best, tuner.config
    if best is None:
        return "nothing fits; see tools/estimate_memory.py --search for layouts of more ranks"
    trial, lines = tuner.trials[best], []
    # the first trial is that of the flags as typed
    first, before = next(iter(tuner.trials.items()))
    gain = f"{trial.tokens_per_second / before.tokens_per_second:.2f} times {first}" if first != best else "as typed"
    lines.append(f"fastest: {best}  ({gain if isinstance(before, Trial) else f'{first} {before}'})")
    eager = tuner.trials.get(best._replace(compile=False))
    if best.compile and isinstance(eager, Trial):
        trial_steps_per_step = config.training.global_batch_size / (tuner.samples * tuner.data_size)
        saved = (eager.seconds_per_step - trial.seconds_per_step) * trial_steps_per_step  # s per step
        spent = trial.first_step_seconds - eager.first_step_seconds
        if saved > 0:
            lines.append(
                f"compiling takes {spent:.0f} s and saves {saved:.2f} s of a step of "
                f"{config.training.global_batch_size} samples: it pays after {spent / saved:.0f} steps"
            )
    return "\n".join(lines)


def main() -> None:
    """Tune one configuration."""
    configure_logging()
    try:
        options, config = parse_with(Options, __doc__, sys.argv[1:], shown=("model", "training", "parallel"))
        tuner = Tuner(options, config)
        if tuner.ranks.rank == 0:
            print(f"{device_name(tuner.ranks.device)} x{tuner.ranks.size}, {tuner.samples} samples a step each")
            print("micro-batch  recompute  blocks      tokens/s     GiB  first step")
        tuner.search()
        if tuner.ranks.rank == 0:
            print(verdict(tuner))
            if options.output:
                write(Path(options.output), tuner)
    except ConfigurationError as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        sys.exit(f"error: out of memory on one of several ranks, give --micro-batch-max: {reason}")
    finally:
        destroy_parallel()


def write(path: Path, tuner: Tuner) -> None:
    """Write all trials and the best choice as JSON."""
    trials = [
        choice._asdict() | (asdict(trial) if isinstance(trial, Trial) else {"failed": trial})
        for choice, trial in tuner.trials.items()
    ]
    report = {"date": str(date.today()), "device": device_name(tuner.ranks.device), "torch": torch.__version__}
    report |= {"processes": tuner.ranks.size, "samples": tuner.samples, "best": tuner.best and tuner.best._asdict()}
    write_json(path, report | {"config": asdict(tuner.config), "trials": trials})


if __name__ == "__main__":
    stop_signals.run_tool(main)
