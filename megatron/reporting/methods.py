"""The words of a method: what a run trains with, as its configuration has it, but for its size, data and learning rate.

Regularisers and techniques have names; all other options of an objective are the flags as typed. Settings at their
default are left out, and an older configuration may lack newer flags.
"""

from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any

from megatron.config.flags import typed
from megatron.config.sections import SECTIONS

REGULARISERS = {
    "token_dropout": "token dropout {}",
    "token_dropout_max": "token dropout U(0, {})",
    "mlp_dropout": "MLP dropout {}",
    "attention_dropout": "attention dropout {}",
    "hidden_dropout": "hidden dropout {}",
    "embedding_dropout": "embedding dropout {}",
    "random_replacement": "random replacement {}",
    "masked_input_weight": "masked input {}",
    "randmask_ratio": "row masking {}",
    "stochastic_depth": "stochastic depth {}",
    "label_smoothing": "label smoothing {}",
    "z_loss": "z-loss {}",
}
PARAMETRIZATIONS = {"mup": "muP", "completep": "CompleteP"}
TIMES = {"window": "times in [{mask_time_low}, {mask_time_high}]", "bell": "times {mask_time_center} ± {mask_time_std}"}
# fields that have words here, or that `objective_label` names
WORDED = {"objective", "mdm_loss", *REGULARISERS, *(f"mask_time_{name}" for name in ("low", "high", "center", "std"))}
WORDED |= {"mask_time_distribution", "mask_time_weighting"}
DATA = ("reset_attention_mask", "reset_position_ids", "eod_mask_loss")
DEFAULTS: dict[str, Any] = {
    field.name: field.default
    for section in SECTIONS.values()
    for field in fields(section)
    if field.default is not MISSING
}


def method_words(config: dict) -> str:
    """Return the regularisers and techniques of a recorded configuration and its weight decay, as text."""
    sections = ("data", "model", "objective", "optimizer", "distillation")
    settings = DEFAULTS | {name: value for section in sections for name, value in config.get(section, {}).items()}
    words = [text.format(settings[name]) for name, text in REGULARISERS.items() if settings[name]]
    words += [*_objective(settings), *_model(settings), *_optimizer(settings), *_teachers(settings)]
    return ", ".join([*words, f"weight decay {_weight_decay(settings)}"])


def _objective(settings: dict) -> Iterator[str]:
    density = settings["mask_time_distribution"]
    if density != "uniform":
        weighting = "" if settings["mask_time_weighting"] == "importance" else "unweighted "
        yield weighting + TIMES[density].format(**settings)
    if settings["mdm_loss"] == "simple":
        yield "unweighted cross-entropy"
    names = [field.name for field in fields(SECTIONS["objective"]) if field.name not in WORDED]
    yield from _flags(settings, (*names, *DATA))


def _model(settings: dict) -> Iterator[str]:
    if settings["num_loops"] > 1:
        blocks = f"blocks {settings['loop_layers']}" if settings["loop_layers"] else "all blocks"
        yield f"{settings['num_loops']} loops of {blocks}"
    if settings["parametrization"] != "standard":
        base = [f"width {settings['base_hidden_size']}"]
        base += [f"{settings['base_num_layers']} layers"] if settings["base_num_layers"] else []
        yield f"{PARAMETRIZATIONS[settings['parametrization']]} of {' and '.join(base)}"
        yield from _flags(settings, ("base_kv_channels", "weight_decay_scaling"))


def _optimizer(settings: dict) -> Iterator[str]:
    norm = settings["meta_gradient_norm"]
    if norm is not None:
        where = " of MLPs" if settings["meta_gradient_parameters"] == "mlp" else ""
        scaled = " times the learning rate's share" if settings["meta_gradient_style"] == "lr" else ""
        yield f"meta-gradient {norm}{scaled}{where}"
    if settings["lr_decay_style"] == "cyclic":
        yield f"{settings['lr_cycles']} cycles"
    if settings["optimizer"] == "muon":
        yield "Muon"
    yield from _flags(settings, ("weight_decay_parameters",))


def _teachers(settings: dict) -> Iterator[str]:
    count = len(settings["teacher"])
    if count:
        temperature = settings["distill_temperature"]
        softened = f" and temperature {temperature}" if temperature != 1 else ""
        yield f"{count} teacher{'s' if count > 1 else ''} at weight {settings['distill_weight']}{softened}"


def _flags(settings: dict, names: tuple[str, ...]) -> Iterator[str]:
    """Yield the fields of `names` that differ from their default as flags."""
    return (typed(name, settings[name]) for name in names if settings[name] != DEFAULTS[name])


def _weight_decay(settings: dict) -> str:
    if settings["weight_decay_incr_style"] == "constant":
        return f"{settings['weight_decay']}"
    return f"{settings['start_weight_decay']} to {settings['end_weight_decay']}"
