"""Derives the plan of a run (budget, schedule, intervals), and checks sections against each other."""

from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from math import gcd

from megatron.config.capabilities import Capabilities
from megatron.config.flags import require, spelling, typed
from megatron.config.recipes import RECIPES
from megatron.config.sections import SECTIONS, WITHOUT_DEEPSPEED, Config, Vocabulary
from megatron.config.sizes import parameter_count
from megatron.errors import ConfigurationError

BUDGETS = ("train_epochs", "train_samples", "train_iters", "train_flops")
# Fields that may change on resume: they affect neither data nor noise nor weights. The sections checkpoint and tracking
# may change entirely.
FREE_ON_RESUME = {
    "model_size", "objective",
    "num_workers", "micro_batch_size", "compile", "deterministic", "flash_attention", "log_interval", "exit_interval",
    "exit_duration_in_mins", "kill_switch_file", "exit_code_when_stopped", "eval_interval", "eval_batch_size",
    "skip_train", "dry_run",
    "train_data_path", "train_data_path_file", "valid_data_path", "valid_data_path_file", "tokenizer_model",
    "vocab_file", "merge_file", "bf16", "fp32", *BUDGETS,
}  # fmt: skip
EVALUATION = ("eval_interval", "eval_samples", "eval_batch_size", "eval_seed", "eval_alignment", "num_mc")
# Values of the plan that a resume must keep; a branch may change them.
BUDGET_PLAN = ("train_samples", "lr_decay_samples", "lr_warmup_samples", "unique_tokens")


@dataclass(frozen=True)
class Plan:
    """The derived numbers of a run."""

    parameters: int  # N, embedding counted once
    vocabulary_size: int  # V, the tokenizer's ids
    unique_tokens: int  # U
    passes: int  # of every sample through the model
    train_samples: int
    steps: int
    lr_warmup_samples: int
    lr_decay_samples: int
    lr_wsd_decay_samples: int
    eval_interval: int
    save_interval: int

    def tokens(self, samples: int, seq_length: int) -> int:
        """Return the tokens of `samples` samples."""
        return samples * seq_length

    def flops(self, samples: int, seq_length: int) -> float:
        """Return 6ND of `samples` samples, D counted once for each pass."""
        return 6.0 * self.parameters * samples * seq_length * self.passes


def resolve(config: Config, vocabulary: Vocabulary, unique_tokens: int, capabilities: Capabilities) -> Plan:
    """Return the plan of a run over `unique_tokens` tokens; `capabilities` are those of its objective.

    Raises: ConfigurationError if sections contradict each other.
    """
    training, optimizer, seq_length = config.training, config.optimizer, config.data.seq_length
    _check_deepspeed(config)
    parameters = parameter_count(config.model, vocabulary)
    passes = config.objective.passes(capabilities.positions_per_token)
    samples = _train_samples(training, seq_length, unique_tokens, parameters * passes)
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
        parameters=parameters,
        vocabulary_size=vocabulary.size,
        unique_tokens=unique_tokens,
        passes=passes,
        train_samples=samples,
        steps=steps,
        lr_warmup_samples=warmup,
        lr_decay_samples=decay,
        lr_wsd_decay_samples=wsd_decay,
        eval_interval=eval_interval,
        save_interval=config.checkpoint.save_interval or eval_interval,
    )


def _check_deepspeed(config: Config) -> None:
    """Refuse options that DeepSpeed's flat partitions do not allow."""
    if not config.parallel.deepspeed:
        return
    optimizer = config.optimizer
    message = f"orthogonalises whole matrices, and DeepSpeed's ZeRO updates flat pieces of them; {WITHOUT_DEEPSPEED}"
    require(optimizer.optimizer != "muon", "optimizer", optimizer.optimizer, message)
    for name in ("ema_decay", "average_from_samples"):
        message = f"averages the fp32 weights, which DeepSpeed keeps in flat pieces of its own; {WITHOUT_DEEPSPEED}"
        require(getattr(optimizer, name) is None, name, getattr(optimizer, name), message)


def _train_samples(training, seq_length: int, unique_tokens: int, computed_parameters: int) -> int:
    """Return the budget in samples; `computed_parameters` is the parameter count times the passes."""
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
        "train_flops": lambda: int(value / (6 * computed_parameters * seq_length)),
    }[name]()
    require(samples >= 1, name, value, f"is less than one sample of {seq_length} tokens; raise it")
    return samples


def no_op_flags(config: Config, exact: bool) -> list[str]:
    """Return a line for each flag that has no effect in this run, with the reason.

    `exact`: whether the objective's likelihood is exact.
    """
    reasons, recipe = [], RECIPES[config.training.recipe]
    if exact:
        reasons.append(("validation", ("num_mc", "eval_seed"), "an exact likelihood has no evaluation noise"))
    if not config.checkpoint.save:
        reasons.append(("checkpoint", ("save_interval", "keep_every_epochs"), "no --save names a run folder"))
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


def check_layout(config: Config, size: int) -> None:
    """Check that the layout divides the world size `size`, and that it can divide the model."""
    parallel, model = config.parallel, config.model
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    require(
        size % (tensor * stages) == 0,
        "tensor_model_parallel_size" if tensor > 1 else "pipeline_model_parallel_size",
        tensor if tensor > 1 else stages,
        f"makes groups of {tensor * stages} ranks ({tensor} tensor-parallel x {stages} stages), and {size} "
        f"{'were' if size > 1 else 'was'} started; start a multiple of {tensor * stages}, or lower one of the two",
    )
    message = (
        "cannot compile layers that are tensor-parallel and recomputed; leave out --compile or --recompute-granularity"
    )
    require(parallel.compiles or not config.training.compile, "compile", True, message)
    dimensions = {
        "--num-attention-heads": model.num_attention_heads,
        "--num-query-groups": model.key_value_heads,
        "--ffn-hidden-size": model.mlp_size,
        "--seq-length": config.data.seq_length,
    }
    divisor = gcd(*dimensions.values())
    fits = [count for count in range(1, tensor) if size % (count * stages) == 0 and divisor % count == 0]
    for name, value in dimensions.items():
        message = f"does not divide {name} {value}; give {max(fits, default=1)}, or change {name}"
        require(value % tensor == 0, "tensor_model_parallel_size", tensor, message)
    virtual = parallel.num_layers_per_virtual_pipeline_stage
    require(
        virtual is None or model.num_layers % (stages * virtual) == 0,
        "num_layers_per_virtual_pipeline_stage",
        virtual,
        f"times {stages} stages does not divide --num-layers {model.num_layers}; change one",
    )
    chunks = parallel.chunks(model.num_layers)
    message = "gives every rank one stage, as without the flag; leave it out or lower it"
    require(virtual is None or chunks > 1, "num_layers_per_virtual_pipeline_stage", virtual, message)
    blocks, longest = parallel.recompute_num_layers, -(-model.num_layers // (stages * chunks))
    message = (
        f"is more than the {longest} layer{'s' if longest > 1 else ''} of a stage; lower it, or leave it out for all"
    )
    require(blocks is None or blocks <= longest, "recompute_num_layers", blocks, message)
    require(
        model.num_layers >= stages * chunks,
        "pipeline_model_parallel_size",
        stages,
        f"is more than --num-layers {model.num_layers}: every stage has at least one; lower it",
    )
    replicas, data_size = parallel.num_distributed_optimizer_instances, parallel.data_size(size)
    require(
        data_size % replicas == 0,
        "num_distributed_optimizer_instances",
        replicas,
        f"does not divide the {data_size} data-parallel rank{'s' if data_size > 1 else ''}; change one",
    )


def check_batch(config: Config, size: int, capabilities: Capabilities) -> None:
    """Check that a step divides into whole micro-batches over `size` ranks, enough of them for the pipeline."""
    training, parallel = config.training, config.parallel
    data_size, stages = parallel.data_size(size), parallel.pipeline_model_parallel_size
    samples = training.micro_batch_size * data_size  # of one micro-batch on every data-parallel rank
    steps, remainder = divmod(training.global_batch_size, samples)
    nearest = " or ".join(str(count * samples) for count in (steps, steps + 1) if count)
    kind = "data-parallel rank" if size > data_size else "rank"
    require(
        remainder == 0,
        "global_batch_size",
        training.global_batch_size,
        f"is not a multiple of --micro-batch-size {training.micro_batch_size} times {data_size} "
        f"{kind}{'s' if data_size > 1 else ''} = {samples}; take {nearest}",
    )
    causal, micro = config.objective.causal_samples(training.global_batch_size), training.micro_batch_size
    fits = [f"{count * micro / training.global_batch_size:.6g}" for count in (causal // micro, causal // micro + 1)]
    require(
        not capabilities.mixes_kinds or causal % micro == 0,
        "causal_ratio",
        config.objective.causal_ratio,
        f"is {causal} of the {training.global_batch_size} samples of a step, and all {micro} samples of a micro-batch "
        f"have one objective; take {' or '.join(fits)}, or another --micro-batch-size",
    )
    interleaved = parallel.chunks(config.model.num_layers) > 1
    needed = "a multiple of that" if interleaved else "at least as many"
    require(
        steps % stages == 0 if interleaved else steps >= stages,
        "global_batch_size",
        training.global_batch_size,
        f"makes {steps} micro-batch{'es' if steps > 1 else ''} a step, and --pipeline-model-parallel-size {stages} "
        f"needs {needed}; take {max(1, round(steps / stages)) * stages * samples}, or lower --micro-batch-size",
    )


def check_resume(recorded: dict, config: Config, plan: Plan, objective: str, branch: bool) -> None:
    """Refuse to resume a run with another configuration.

    `recorded` is the config.json of the run. A resume keeps everything but FREE_ON_RESUME; a branch
    (--load A --save B) keeps only the objective, the model with its vocabulary, and the optimizer, whose moments it
    continues with.

    Raises: ConfigurationError with the first difference.
    """
    folder_flag = "load" if branch and config.checkpoint.load else "save"
    folder = getattr(config.checkpoint, folder_flag)
    remedy = f"resume with that, or branch: --load {folder} --save ANOTHER_DIR"
    if recorded["objective_name"] != objective:
        raise ConfigurationError(
            f"{typed(folder_flag, folder)}: holds a run of objective {recorded['objective_name']}, not {objective}; "
            f"give --objective {recorded['objective_name']} or another folder"
        )
    if recorded["vocabulary_size"] != plan.vocabulary_size:
        raise ConfigurationError(
            f"{typed(folder_flag, folder)}: holds a run over {recorded['vocabulary_size']} token ids, and this data "
            f"has {plan.vocabulary_size}; give data of the same tokenizer, or start another run"
        )
    sections = ("model",) if branch else ("training", "model", "data", "objective", "optimizer", "validation")
    for section in sections:
        defaults = {field.name: field.default for field in fields(SECTIONS[section])}
        for name, value in asdict(getattr(config, section)).items():
            # a run that started before a flag existed has its default
            before = _as_json(recorded.get(section, {}).get(name, defaults[name]))
            value = _as_json(value)
            if name not in FREE_ON_RESUME and before != value:
                raise ConfigurationError(
                    f"{typed(name, value)}: the run in {folder} was started with {typed(name, before)}; "
                    + ("a branch keeps the model, so drop the change" if branch else remedy)
                )
    kind = recorded["optimizer"].get("optimizer", "adamw")
    message = f"the run in {folder} was started with --optimizer {kind}, whose moments a branch continues with; keep it"
    require(config.optimizer.optimizer == kind, "optimizer", config.optimizer.optimizer, message)
    for name in () if branch else BUDGET_PLAN:
        if recorded["plan"][name] != getattr(plan, name):
            raise ConfigurationError(
                f"{_cause(name, config)} makes {name.replace('_', ' ')} {getattr(plan, name)}, and the run in {folder} "
                f"was started with {recorded['plan'][name]}; {remedy}"
            )


def _as_json(value):
    """Return a tuple as the list that JSON makes of it, other values unchanged."""
    return list(value) if isinstance(value, tuple) else value


def _cause(name: str, config: Config) -> str:
    """Return the flag, as typed, that determines a number of the plan."""
    if name == "unique_tokens":
        names = ("train_unique_tokens", "train_data_path_file", "train_data_path")
        deciding = [(name, getattr(config.data, name) or None) for name in names]
    else:
        deciding = [(name, getattr(config.optimizer, name, None))]
        deciding += [(budget, getattr(config.training, budget)) for budget in BUDGETS]
    return next(typed(name, value) for name, value in deciding if value is not None)
