"""What a resume or a branch must keep of a run's recorded configuration."""

from collections.abc import Iterator
from dataclasses import asdict, fields
from typing import Any

from megatron.config.flags import require, typed
from megatron.config.resolve import BUDGETS, Plan
from megatron.config.sections import SECTIONS, Config
from megatron.errors import ConfigurationError

# Fields that may change on resume: they affect neither data nor noise nor weights. The sections checkpoint and tracking
# may change entirely.
FREE_ON_RESUME = {
    "model_size", "objective",
    "num_workers", "micro_batch_size", "compile", "deterministic", "flash_attention", "log_interval", "exit_interval",
    "exit_duration_in_mins", "kill_switch_file", "exit_code_when_stopped", "eval_interval", "eval_batch_size",
    "skip_train", "dry_run",
    "train_data_path", "train_data_path_file", "valid_data_path", "valid_data_path_file", "tokenizer_model",
    "vocab_file", "merge_file", "bf16", "fp32", "teacher", *BUDGETS,
}  # fmt: skip
KEPT_SECTIONS = ("training", "model", "data", "objective", "distillation", "optimizer", "validation")
# Values of the plan that a resume must keep; a branch may change them.
BUDGET_PLAN = ("train_samples", "lr_decay_samples", "lr_warmup_samples", "unique_tokens")


def check_resume(recorded: dict, config: Config, plan: Plan, *, objective: str, branch: bool) -> None:
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
    for name, before, value in changes(recorded, config, ("model",) if branch else KEPT_SECTIONS):
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


def changes(
    recorded: dict, config: Config, sections: tuple[str, ...] = KEPT_SECTIONS
) -> Iterator[tuple[str, Any, Any]]:
    """Yield (name, before, now) of the fields that differ from a run's config.json and are not FREE_ON_RESUME."""
    for section in sections:
        defaults = {field.name: field.default for field in fields(SECTIONS[section])}
        for name, value in asdict(getattr(config, section)).items():
            # a run that started before a flag existed has its default
            before = _as_json(recorded.get(section, {}).get(name, defaults[name]))
            value = _as_json(value)
            if name not in FREE_ON_RESUME and before != value:
                yield name, before, value


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
