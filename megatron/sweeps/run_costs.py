"""What a run needs: its data, its memory on the device and its checkpoints on disk."""

from megatron.config.resolve import Plan
from megatron.config.sections import Config, DataConfig
from megatron.config.vocabulary import Vocabulary
from megatron.data.indexed import data_files
from megatron.data.paths import requested_sets
from megatron.errors import ConfigurationError
from megatron.objectives.registry import capabilities
from megatron.parallel.memory_estimate import peak_memory
from megatron.sweeps.sweep_file import Sweep
from megatron.training.datasets import open_sources

STATE_BYTES = 12  # a parameter in a checkpoint: its fp32 weight and two moments
AVERAGE_BYTES = 4
PRUNED_TO = 3  # checkpoints that are always kept: the newest two and the best


class DataSizes:
    """Unique tokens and vocabulary size of a run's data, opened once for equal data flags.

    Where the data are not on this machine, those that the sweep file states are taken.
    """

    def __init__(self, sweep: Sweep):
        self._stated = sweep.data
        self._known: dict[DataConfig, tuple[int, int]] = {}

    def __call__(self, config: Config) -> tuple[int, int]:
        """Return both.

        Raises: ConfigurationError where the data are missing or damaged.
        """
        data = config.data
        if data not in self._known:
            if len(self._stated) == 2 and not _exist(data):
                unique_tokens = self._stated["unique_tokens"]
                sizes = min(unique_tokens, data.train_unique_tokens or unique_tokens), self._stated["vocabulary_size"]
            else:
                sources = open_sources(config)
                sizes = sources.train.unique_tokens, sources.tokenizer.vocabulary_size
            self._known[data] = sizes
        return self._known[data]


def _exist(data: DataConfig) -> bool:
    try:
        train, held_out = requested_sets(data, with_test=False)
        for prefix in (prefix for requested in (train, *held_out) for prefix in requested.prefixes):
            data_files(prefix)
    except ConfigurationError:
        return False
    return True


def disk_bytes(config: Config, plan: Plan, seq_length: int) -> int:
    """Return the size of a run's checkpoints: those that are always kept, and one every --keep-every-epochs."""
    interval = config.checkpoint.keep_every_epochs
    epochs = plan.train_samples * seq_length / plan.unique_tokens
    permanent = int(epochs // interval) if interval else 0
    size = plan.parameters * (STATE_BYTES + AVERAGE_BYTES * config.optimizer.averages)
    return size * (PRUNED_TO + permanent)


def memory_bytes(config: Config, vocabulary: Vocabulary, world_size: int) -> int | None:
    """Return the peak memory of the rank that needs most, on CUDA; None where no formula holds."""
    if config.parallel.deepspeed:
        return None  # the formula is FSDP2's
    settings = {"world_size": world_size, "precision": "fp32" if config.training.fp32 else "bf16"}
    return peak_memory(config, vocabulary, capabilities(config.objective.objective), **settings).total
