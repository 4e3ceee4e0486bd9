"""How far a run has come: what a checkpoint records and a resume restores."""

from dataclasses import dataclass, fields


@dataclass
class Progress:
    """Progress of a run. Schedules are functions of `consumed_samples`."""

    iteration: int = 0
    consumed_samples: int = 0
    seconds: float = 0.0  # of training, without validation and saving
    time_block: int = 1  # consecutive sample indices with stratified times: the first start's global batch size

    @classmethod
    def from_meta(cls, meta: dict) -> "Progress":
        """Return the progress that meta.json of a checkpoint records."""
        return cls(**{field.name: meta[field.name] for field in fields(cls)})
