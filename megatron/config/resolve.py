"""Derives the plan of a run (budget, schedule, intervals), and checks sections against each other."""

from dataclasses import asdict, dataclass, fields
from fractions import Fraction

from megatron.config.capabilities import Capabilities
from megatron.config.flags import require, spelling, typed
from megatron.config.recipes import RECIPES, recipe_settings
from megatron.config.sections import SECTIONS, Config
from megatron.config.sections.parallel import WITHOUT_DEEPSPEED
from megatron.config.sizes import parameter_count
from megatron.config.vocabulary import Vocabulary
from megatron.errors import ConfigurationError

BUDGETS = ("train_epochs", "train_samples", "train_iters", "train_flops")
EVALUATION = ("eval_interval", "eval_samples", "eval_batch_size", "eval_seed", "eval_alignment", "num_mc")


@dataclass(frozen=True)
class Plan:
    """The derived numbers of a run."""

    parameters: int  # N, embedding counted once
    computed_parameters: int  # N, with a block counted once for each of its uses (--num-loops)
    vocabulary_size: int  # V, the tokenizer's ids
    unique_tokens: int  # U
    passes: int  # of every sample through the model
    train_samples: int
    steps: int
    lr_warmup_samples: int
    lr_decay_samples: int
    lr_wsd_decay_samples: int
    lr_cycle_ends: tuple[int, ...]  # samples at the end of each cycle of a cyclic schedule
    eval_interval: int
    save_interval: int

    def tokens(self, samples: int, seq_length: int) -> int:
        """Return the tokens of `samples` samples."""
        return samples * seq_length

    def flops(self, samples: int, seq_length: int) -> float:
        """Return 6ND of `samples` samples: D counted once for each pass, N with each use of a block in a loop."""
        return 6.0 * self.computed_parameters * samples * seq_length * self.passes


def resolve(config: Config, vocabulary: Vocabulary, unique_tokens: int, capabilities: Capabilities) -> Plan:
    """Return the plan of a run over `unique_tokens` tokens; `capabilities` are those of its objective.

    Raises: ConfigurationError if sections contradict each other.
    """
    training, optimizer, seq_length = config.training, config.optimizer, config.data.seq_length
    _check_deepspeed(config)
    stages = config.parallel.pipeline_model_parallel_size
    message = (
        "splits the student, and its last stage would run every --teacher as a whole; give 1, or leave out --teacher"
    )
    require(stages == 1 or not config.distillation.teacher, "pipeline_model_parallel_size", stages, message)
    offset = config.objective.target_offset_max
    message = f"leaves samples of --seq-length {seq_length} without a target; give at most {seq_length}"
    require(offset <= seq_length, "target_offset_max", offset, message)
    check_order_seed(config.data.epoch_order, training.seed)
    computed_parameters = parameter_count(config.model.unrolled, vocabulary)
    passes = config.objective.passes(capabilities.positions_per_token)
    samples = _train_samples(training, seq_length, unique_tokens, computed_parameters * passes)
    average_start = optimizer.average_from_samples
    message = f"is more than the budget of {samples} samples, so nothing would be averaged; lower it"
    require(average_start is None or average_start <= samples, "average_from_samples", average_start, message)
    steps = -(-samples // training.global_batch_size)
    warmup = samples // 100 if optimizer.lr_warmup_samples is None else optimizer.lr_warmup_samples
    decay = optimizer.lr_decay_samples or samples
    require(
        warmup <= decay,
        "lr_warmup_samples",
        warmup,
        f"is longer than the whole schedule of {decay} samples (--lr-decay-samples, else the budget); shorten it",
    )
    wsd_decay = optimizer.lr_wsd_decay_samples or decay // 10
    require(
        optimizer.lr_wsd_decay_samples is None or warmup + wsd_decay <= decay,
        "lr_wsd_decay_samples",
        wsd_decay,
        f"and a warm-up of {warmup} samples are longer than the whole schedule of {decay}; shorten one",
    )
    eval_interval = config.validation.eval_interval or max(1, steps // 20)
    return Plan(
        parameters=parameter_count(config.model, vocabulary),
        computed_parameters=computed_parameters,
        vocabulary_size=vocabulary.size,
        unique_tokens=unique_tokens,
        passes=passes,
        train_samples=samples,
        steps=steps,
        lr_warmup_samples=warmup,
        lr_decay_samples=decay,
        lr_wsd_decay_samples=wsd_decay,
        lr_cycle_ends=_cycle_ends(optimizer.lr_cycles, warmup, decay, training.global_batch_size),
        eval_interval=eval_interval,
        save_interval=config.checkpoint.save_interval or eval_interval,
    )


def check_order_seed(epoch_order: str, seed: int) -> None:
    """Check that --epoch-order can be drawn from --seed.

    Raises: ConfigurationError if it cannot.
    """
    message = "does not seed NumPy's RandomState, from which --epoch-order megatron draws; give 0 to 4294967295"
    require(epoch_order != "megatron" or 0 <= seed < 2**32, "seed", seed, message)


def _check_deepspeed(config: Config) -> None:
    """Refuse options that DeepSpeed's flat partitions do not allow."""
    if not config.parallel.deepspeed:
        return
    optimizer = config.optimizer
    message = f"orthogonalises whole matrices, and DeepSpeed's ZeRO updates flat pieces of them; {WITHOUT_DEEPSPEED}"
    require(optimizer.optimizer != "muon", "optimizer", optimizer.optimizer, message)
    message = f"moves whole weights along whole gradients, which DeepSpeed keeps in flat pieces; {WITHOUT_DEEPSPEED}"
    norm = optimizer.meta_gradient_norm
    require(norm is None, "meta_gradient_norm", norm, message)
    for name in ("ema_decay", "average_from_samples"):
        message = f"averages the fp32 weights, which DeepSpeed keeps in flat pieces of its own; {WITHOUT_DEEPSPEED}"
        require(getattr(optimizer, name) is None, name, getattr(optimizer, name), message)


def _train_samples(training, seq_length: int, unique_tokens: int, parameters_of_passes: int) -> int:
    """Return the budget in samples; `parameters_of_passes` is the parameter count of a pass times the passes."""
    budgets = {name: getattr(training, name) for name in BUDGETS if getattr(training, name) is not None}
    if len(budgets) != 1:
        typed_budgets = " and ".join(typed(name, value) for name, value in budgets.items()) or "no budget"
        raise ConfigurationError(
            f"{typed_budgets}: a run has one budget; give exactly one of {', '.join(map(spelling, BUDGETS))}"
        )
    name, value = next(iter(budgets.items()))
    samples = {
        # exact: in floats, 2.3 epochs of 700 tokens are less than 161 samples of 10 tokens
        "train_epochs": lambda: int(Fraction(str(value)) * unique_tokens / seq_length),
        "train_samples": lambda: value,
        "train_iters": lambda: value * training.global_batch_size,
        "train_flops": lambda: int(value / (6 * parameters_of_passes * seq_length)),
    }[name]()
    require(samples >= 1, name, value, f"is less than one sample of {seq_length} tokens; raise it")
    return samples


def _cycle_ends(cycles: int | None, warmup: int, decay: int, batch_size: int) -> tuple[int, ...]:
    """Return the samples at the end of each of `cycles` equal parts of `decay` samples, rounded to whole steps."""
    if cycles is None:
        return ()
    message = f"makes cycles of less than a step in a schedule of {decay} samples; give fewer"
    require(cycles * batch_size <= decay, "lr_cycles", cycles, message)
    ends = tuple(round(cycle * decay / (cycles * batch_size)) * batch_size for cycle in range(1, cycles))
    message = f"is not shorter than the first cycle, which ends at {(*ends, decay)[0]} samples; shorten it"
    require(warmup < (*ends, decay)[0], "lr_warmup_samples", warmup, message)
    return (*ends, decay)


def no_op_flags(config: Config, exact: bool) -> list[str]:
    """Return a line for each flag that has no effect in this run, with the reason.

    `exact`: whether the objective's likelihood is exact.
    """
    reasons, recipe = [], recipe_settings(config.training.recipe, config.objective.objective)
    if exact:
        reasons.append(("validation", ("num_mc", "eval_seed"), "an exact likelihood has no evaluation noise"))
    if not config.checkpoint.save:
        unsaved = ("save_interval", "keep_every_epochs", "keep_iterations")
        reasons.append(("checkpoint", unsaved, "no --save names a run folder"))
    if not config.data.holds_out:
        reasons.append(("validation", EVALUATION, "no --valid-data-path names a validation set"))
    if config.validation.skip_train:
        trackers = tuple(field.name for field in fields(SECTIONS["tracking"]))
        reasons.append(("tracking", trackers, "an evaluation is printed and not tracked"))
    return [
        f"{typed(name, getattr(getattr(config, section), name))}: has no effect, {reason}"
        for section, names, reason in reasons
        for name in names
        if getattr(getattr(config, section), name) != recipe.get(name, getattr(SECTIONS[section], name))
    ]


def unpublished_defaults(config: Config, typed_flags: set[str], unused: list[str]) -> str | None:
    """Return a line that lists the defaults that differ from --recipe published, None if there are none.

    `typed_flags` are the flags of the command line, `unused` the fields that the objective does not read. For an
    evaluation only defaults that change its result are listed.
    """
    values = {name: value for section in asdict(config).values() for name, value in section.items()}
    evaluated = (*EVALUATION, "softmax_over_padding")
    differing = [
        f"{typed(name, values[name])} (published: {'on' if value is True else value})"
        for name, value in RECIPES["published"].items()
        if values[name] != value and spelling(name) not in typed_flags and name not in unused
        if name in evaluated or not config.validation.skip_train
    ]
    if config.training.recipe == "published" or not differing:
        return None
    return f"without --recipe published, defaults differ from the published system's: {', '.join(differing)}"
