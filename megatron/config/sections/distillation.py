"""The distillation section."""

from dataclasses import dataclass

from megatron.config.flags import Section, flag


@dataclass(frozen=True, kw_only=True)
class DistillationConfig(Section):
    """Distillation: probabilities of earlier runs as soft targets, in training, never in validation."""

    teacher: tuple[str, ...] = flag(
        (),
        "run folders, whose newest checkpoint is taken, or checkpoint folders: add the KL divergence from the mean of "
        "their probabilities to the training loss",
        metavar="RUN",
    )
    distill_weight: float = flag(
        0.5,
        "training loss = (1 - W) times the loss with the target + W T^2 times the divergence",
        metavar="W",
        within="[0, 1]",
        needs="teacher",
    )
    distill_temperature: float = flag(
        1.0,
        "temperature of the probabilities of teachers and student in the divergence",
        metavar="T",
        within="(0, inf)",
        needs="teacher",
    )
