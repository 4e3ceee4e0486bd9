"""The sections of a run's configuration. Each field is one command-line flag; each section checks its own fields.

`resolve.py` and `layout_checks.py` have the checks that need several sections.
"""

from dataclasses import dataclass, fields

from megatron.config.flags import REQUIRED, one_namespace
from megatron.config.sections.checkpoint import CheckpointConfig
from megatron.config.sections.data import DataConfig
from megatron.config.sections.distillation import DistillationConfig
from megatron.config.sections.model import ModelConfig
from megatron.config.sections.objective import ObjectiveConfig
from megatron.config.sections.optimizer import OptimizerConfig
from megatron.config.sections.parallel import ParallelConfig
from megatron.config.sections.tracking import TrackingConfig
from megatron.config.sections.training import TrainingConfig
from megatron.config.sections.validation import ValidationConfig
from megatron.errors import ConfigurationError

__all__ = [
    "SECTIONS",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DistillationConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "TrackingConfig",
    "TrainingConfig",
    "ValidationConfig",
]

SECTIONS = one_namespace(
    {
        "model": ModelConfig,
        "data": DataConfig,
        "objective": ObjectiveConfig,
        "distillation": DistillationConfig,
        "optimizer": OptimizerConfig,
        "training": TrainingConfig,
        "parallel": ParallelConfig,
        "validation": ValidationConfig,
        "checkpoint": CheckpointConfig,
        "tracking": TrackingConfig,
    }
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run's configuration, by section."""

    model: ModelConfig
    data: DataConfig
    objective: ObjectiveConfig
    distillation: DistillationConfig
    optimizer: OptimizerConfig
    training: TrainingConfig
    parallel: ParallelConfig
    validation: ValidationConfig
    checkpoint: CheckpointConfig
    tracking: TrackingConfig

    @classmethod
    def from_recorded(cls, recorded: dict) -> "Config":
        """Return the configuration in a run's config.json, whose keys are sections among others.

        Fields that an older run does not have get their defaults.

        Raises: ConfigurationError for an unknown or missing field, or an invalid value.
        """
        values = {name: recorded.get(name, {}) for name in SECTIONS}
        if "objective_name" in recorded:  # runs older than --objective have only this key
            values["objective"] = {"objective": recorded["objective_name"]} | values["objective"]
        return cls(**{name: _section(name, values[name]) for name in SECTIONS})


def _section(name: str, values: dict):
    """Return the section `name` with the recorded `values`; JSON made lists of tuples."""
    section = SECTIONS[name]
    defaults = {field.name: field.default for field in fields(section)}
    for field in values.keys() - defaults.keys():
        raise ConfigurationError(
            f"config.json: {name}.{field} is no setting of this version; use the version that trained the run"
        )
    for field in [field for field, default in defaults.items() if default is REQUIRED and field not in values]:
        raise ConfigurationError(f"config.json: {name}.{field} is missing; restore the file")
    for field in fields(section):
        choices, value = field.metadata["choices"], values.get(field.name)
        if choices and value is not None and value not in choices:
            raise ConfigurationError(
                f"config.json: {name}.{field.name} {value}: is not one of {', '.join(choices)}; use the version that "
                "trained the run"
            )
    return section(**{field: tuple(value) if isinstance(value, list) else value for field, value in values.items()})
