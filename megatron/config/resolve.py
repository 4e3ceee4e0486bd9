"""What follows from several sections at once: the budget, intervals, and the checks between sections."""

from dataclasses import asdict, dataclass

from megatron.config.flags import require, spelling
from megatron.config.sections import Config, Vocabulary
from megatron.config.sizes import parameter_count
from megatron.errors import ConfigurationError

BUDGETS = ("train_epochs", "train_samples", "train_iters", "train_flops")
# Flags that may differ between two starts of one run: they change neither the data, nor the noise, nor the weights.
FREE_ON_RESUME = {
    "num_workers", "micro_batch_size", "compile", "log_interval", "exit_interval", "exit_duration_in_mins",
    "kill_switch_file", "eval_interval", "eval_batch_size", "skip_train", "save", "load", "save_interval",
    "keep_every_epochs", "dry_run", "train_data_path", "valid_data_path", "tokenizer_model", *BUDGETS,
}  # fmt: skip
# Plan values that a plain resume must keep; a branch may change them.
BUDGET_PLAN = ("train_samples", "lr_decay_samples", "lr_warmup_samples", "unique_tokens")


@dataclass(frozen=True)
class Plan:
    """The numbers of one run, all derived here and nowhere else."""

    parameters: int  # N, the embedding counted once
    unique_tokens: int  # U
    train_samples: int
    steps: int
    lr_warmup_samples: int
    lr_decay_samples: int
    lr_wsd_decay_samples: int
    eval_interval: int
    save_interval: int

    def tokens(self, samples: int, seq_length: int) -> int:
        return samples * seq_length

    def flops(self, samples: int, seq_length: int) -> float:
        """Return 6ND of so many samples."""
        return 6.0 * self.parameters * samples * seq_length


def resolve(config: Config, vocabulary: Vocabulary, unique_tokens: int) -> Plan:
    """Return the plan of a run over `unique_tokens`; raise ConfigurationError where sections contradict."""
    training, optimizer, seq_length = config.training, config.optimizer, config.data.seq_length
    parameters = parameter_count(config.model, vocabulary)
    samples = _train_samples(training, seq_length, unique_tokens, parameters)
    steps = -(-samples // training.global_batch_size)
    warmup = samples // 100 if optimizer.lr_warmup_samples is None else optimizer.lr_warmup_samples
    decay = optimizer.lr_decay_samples or samples
    require(warmup <= decay, "lr_warmup_samples", warmup, f"is longer than the decay of {decay} samples")
    eval_interval = config.validation.eval_interval or max(1, steps // 20)
    return Plan(
        parameters=parameters,
        unique_tokens=unique_tokens,
        train_samples=samples,
        steps=steps,
        lr_warmup_samples=warmup,
        lr_decay_samples=decay,
        lr_wsd_decay_samples=optimizer.lr_wsd_decay_samples or decay // 10,
        eval_interval=eval_interval,
        save_interval=config.checkpoint.save_interval or eval_interval,
    )


def _train_samples(training, seq_length: int, unique_tokens: int, parameters: int) -> int:
    given = {name: getattr(training, name) for name in BUDGETS if getattr(training, name) is not None}
    if len(given) != 1:
        said = " and ".join(f"{spelling(name)} {value}" for name, value in given.items()) or "none"
        raise ConfigurationError(
            f"the budget is given by exactly one of {', '.join(map(spelling, BUDGETS))}; got {said}"
        )
    name, value = next(iter(given.items()))
    samples = {
        "train_epochs": lambda: int(unique_tokens * value / seq_length),
        "train_samples": lambda: value,
        "train_iters": lambda: value * training.global_batch_size,
        "train_flops": lambda: int(value / (6 * parameters * seq_length)),
    }[name]()
    require(samples >= 1, name, value, f"is less than one sample of {seq_length} tokens; raise it")
    return samples


def check_processes(config: Config, size: int) -> None:
    """Check that a step divides into whole micro-batches over `size` processes."""
    training = config.training
    share = training.micro_batch_size * size
    require(
        training.global_batch_size % share == 0,
        "global_batch_size",
        training.global_batch_size,
        f"is not a multiple of --micro-batch-size {training.micro_batch_size} times {size} processes = {share}",
    )


def check_resume(recorded: dict, config: Config, plan: Plan, objective: str, branch: bool) -> None:
    """Refuse to continue a run under another configuration.

    `recorded` is the config.json of the run. A resume keeps everything but FREE_ON_RESUME; a branch
    (--load A --save B) must only keep the objective and the network.
    """
    folder = config.checkpoint.load or config.checkpoint.save
    if recorded["objective_name"] != objective:
        raise ConfigurationError(
            f"--load {folder}: holds a run of objective {recorded['objective_name']}, not {objective}; use its own entry point"
        )
    sections = ("model",) if branch else ("model", "data", "objective", "optimizer", "training", "validation")
    for section in sections:
        for name, value in asdict(getattr(config, section)).items():
            value = list(value) if isinstance(value, tuple) else value
            before = recorded[section].get(name)
            if name not in FREE_ON_RESUME and before != value:
                raise ConfigurationError(
                    f"{spelling(name)} {value}: the run in {folder} was begun with {before}; "
                    + ("a branch keeps the network" if branch else _remedy(folder))
                )
    for name in () if branch else BUDGET_PLAN:
        if recorded["plan"][name] != getattr(plan, name):
            raise ConfigurationError(
                f"{name.replace('_', ' ')} {getattr(plan, name)}: the run in {folder} was begun with "
                f"{recorded['plan'][name]}; {_remedy(folder)}"
            )


def _remedy(folder: str) -> str:
    return f"resume with that, or branch: --load {folder} --save ANOTHER_DIR"
