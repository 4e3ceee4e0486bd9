"""What a run needs: its data, its memory on the device and its checkpoints on disk."""

from dataclasses import fields

from megatron.config.resolve import BUDGETS, Plan
from megatron.config.sections import SECTIONS, Config, DataConfig
from megatron.config.vocabulary import Vocabulary
from megatron.data.indexed import data_files
from megatron.data.paths import requested_sets
from megatron.errors import ConfigurationError
from megatron.objectives.registry import capabilities
from megatron.parallel.memory_estimate import peak_memory
from megatron.sweeps.sweep_file import Sweep
from megatron.training.datasets import open_sources
from megatron.training.environment import stated_precision
from megatron.training.load_run import teacher_models

STATE_BYTES = 12  # a parameter in a checkpoint: its fp32 weight and two moments
AVERAGE_BYTES = 4
# the sections that decide a run's memory, and their fields that do not
MEMORY_SECTIONS = ("model", "parallel", "data", "training", "optimizer")
NOT_IN_MEMORY = {*BUDGETS, "seed", "lr", "weight_decay"}
MEMORY_FIELDS = [
    (section, field.name)
    for section in MEMORY_SECTIONS
    for field in fields(SECTIONS[section])
    if field.name not in NOT_IN_MEMORY
]
PRUNED_TO = 3  # checkpoints that are always kept: the newest two and the best


class RunCosts:
    """What the points of a sweep need; what many of them share is computed once."""

    def __init__(self, sweep: Sweep):
        self._stated = sweep.data
        self._sizes: dict[DataConfig, tuple[int, int]] = {}
        self._peaks: dict[tuple, int] = {}

    def data_sizes(self, config: Config) -> tuple[int, int]:
        """Return the unique tokens and the vocabulary size of a run's data.

        Where the data are not on this machine, those that the sweep file states are taken.

        Raises: ConfigurationError where the data are missing or damaged.
        """
        data = config.data
        if data not in self._sizes:
            if len(self._stated) == 2 and not exist(data):
                unique_tokens = self._stated["unique_tokens"]
                sizes = min(unique_tokens, _cut(data) or unique_tokens), self._stated["vocabulary_size"]
            else:
                sources = open_sources(config)
                sizes = sources.train.unique_tokens, sources.tokenizer.vocabulary_size
            self._sizes[data] = sizes
        return self._sizes[data]

    def memory_bytes(self, config: Config, vocabulary: Vocabulary, world_size: int) -> int | None:
        """Return the peak memory of the rank that needs most, on CUDA; None where no formula holds.

        Raises: ConfigurationError where a teacher is no run.
        """
        if config.parallel.deepspeed:
            return None  # the formula is FSDP2's
        settings = [getattr(getattr(config, section), name) for section, name in MEMORY_FIELDS]
        teachers = teacher_models(config)
        key = (*settings, config.objective.objective, vocabulary, world_size, teachers)
        if key not in self._peaks:
            precision = stated_precision(config) or "bf16"
            declared = capabilities(config.objective.objective)
            options = {"world_size": world_size, "precision": precision, "teachers": teachers}
            peak = peak_memory(config, vocabulary, declared, **options)
            self._peaks[key] = peak.total
        return self._peaks[key]


def _cut(data: DataConfig) -> int | None:
    """Return the unique tokens to which flags cut the training data; None if they leave a data set whole."""
    try:
        cuts = requested_sets(data, with_test=False)[0].cuts()
    except ConfigurationError:
        return data.train_unique_tokens  # the path file is not on this machine
    return None if None in cuts else sum(filter(None, cuts))


def exist(data: DataConfig) -> bool:
    """Return whether all data sets of a run are on this machine."""
    try:
        train, held_out = requested_sets(data, with_test=False)
        for prefix in (prefix for requested in (train, *held_out) for prefix in requested.prefixes):
            data_files(prefix)
    except ConfigurationError:
        return False
    return True


def disk_bytes(config: Config, plan: Plan, seq_length: int) -> int:
    """Return the size of a run's checkpoints: those that are always kept, one every --keep-every-epochs and cycle."""
    interval = config.checkpoint.keep_every_epochs
    epochs = plan.train_samples * seq_length / plan.unique_tokens
    permanent = (int(epochs // interval) if interval else 0) + (config.optimizer.lr_cycles or 0)
    size = plan.parameters * (STATE_BYTES + AVERAGE_BYTES * config.optimizer.averages)
    return size * (PRUNED_TO + permanent)
