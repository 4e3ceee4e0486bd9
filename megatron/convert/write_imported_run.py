"""Write imported weights as a run: config.json and a checkpoint at step 0, written by the training saver.

Optimizer moments are zero and no samples are consumed, so a branch (--load RUN --save NEW) starts with a fresh
optimizer.
"""

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.config.flags import typed
from megatron.config.resolve import resolve
from megatron.config.sections import Config, ModelConfig
from megatron.config.vocabulary import Vocabulary
from megatron.convert.huggingface import TABLES
from megatron.errors import ConfigurationError
from megatron.model.initialise import initialise
from megatron.model.transformer import Transformer
from megatron.objectives.registry import capabilities
from megatron.parallel.mesh import ParallelContext, destroy_parallel, initialize_parallel
from megatron.training.checkpoint_store import CheckpointStore
from megatron.training.environment import describe
from megatron.training.load_run import trained_config
from megatron.training.optimizer import parameter_groups
from megatron.training.progress import Progress
from megatron.training.run_folder import RunFolder
from megatron.training.saver import Saver


@dataclass(frozen=True)
class UnknownData:
    """The entries of config.json about the data of a run, as in `Sources`, where only the `corpus_source` is known."""

    corpus_source: str
    tokenizer_hash: None = None
    corpus_hash: None = None
    corpus_python_version: None = None
    fingerprints: dict[str, str] = field(default_factory=dict)
    shared_13grams: dict[str, dict] = field(default_factory=dict)

    def unique_tokens(self) -> dict[str, int]:
        """Return no counts: the data sets are unknown."""
        return {}


def write_run(folder: Path, recorded: dict, weights: dict[str, Tensor], time_block: int) -> None:
    """Write a run into the empty `folder`: `recorded` as its config.json, `weights` as its checkpoint at step 0.

    `weights` are unsharded, fp32, by our names, and checked; averaged weights, if `recorded` has them, start as a copy.
    """
    run = RunFolder(str(folder))
    run.start(recorded, [], folder)
    config = trained_config(str(folder))
    state = {f"model.{name}": tensor for name, tensor in weights.items()}
    state |= _moments(config, Vocabulary(recorded["vocabulary_size"]))
    if config.optimizer.averages:
        state |= {f"average.{name}": tensor for name, tensor in weights.items()}
    meta = asdict(Progress(time_block=time_block)) | {"averaged_steps": 0}
    meta |= {"permanent": False, "config": recorded}
    with one_process() as ranks, Saver(run.checkpoints, ranks) as saver:
        saver.save(state, meta, then=lambda: None)
    CheckpointStore(run.checkpoints, run.check_lock).update_pointers({}, None)
    run.status("stopped", f"imported from {recorded['imported']['source']}", 0, 0)


def _moments(config: Config, vocabulary: Vocabulary) -> dict[str, Tensor]:
    """Return zero optimizer moments of every parameter, by checkpoint name."""
    model = empty_model(config.model, vocabulary)
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"optimizer.{moment}.{names[parameter]}": torch.zeros(parameter.shape)
        for group in parameter_groups(model, config.optimizer)
        for parameter in group["params"]
        for moment in group["moments"]
    }


def describe_import(config: Config, vocabulary: Vocabulary, source: str, precision: str = "fp32") -> dict:
    """Return the config.json of a run that was trained elsewhere: only its model is known, not its data."""
    plan = resolve(config, vocabulary, 0, capabilities(config.objective.objective))
    command = shlex.join(sys.argv)
    with one_process() as ranks:
        description = describe(
            config,
            plan,
            UnknownData(source),
            vocabulary=vocabulary,
            ranks=ranks,
            precision=precision,
            compiled=False,
            command=command,
        )
    return description | {"branched_from": None, "imported": {"source": source}}


def empty_model(config: ModelConfig, vocabulary: Vocabulary) -> Transformer:
    """Return the model on the meta device: parameter names and shapes without memory."""
    with torch.device("meta"):
        return Transformer(config, vocabulary)


def check_weights(weights: dict[str, Tensor], config: ModelConfig, vocabulary: Vocabulary, source: str) -> None:
    """Check that `weights` have exactly the parameters of the model, in their shapes.

    Embedding and head may have any number of vocabulary rows.

    Raises: ConfigurationError if a parameter is missing, unknown or of another shape.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in empty_model(config, vocabulary).named_parameters()}
    for fault, names in (
        ("lacks", [name for name in shapes if name not in weights]),
        ("has a parameter that the model does not have:", [name for name in weights if name not in shapes]),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ConfigurationError(
                f"{source}: {fault} {names[0]}{more}; give a complete checkpoint, and the sizes of its model"
            )
    for name, expected in shapes.items():
        actual = tuple(weights[name].shape)
        first_dim = 1 if name in TABLES else 0  # dim 0 of a table is the vocabulary
        if len(actual) != len(expected) or actual[first_dim:] != expected[first_dim:]:
            raise ConfigurationError(
                f"{source}: {name} has shape {list(actual)}, and the model needs {list(expected)}; give the sizes of "
                "the checkpoint's model"
            )


def fill_tables(
    weights: dict[str, Tensor], config: ModelConfig, vocabulary: Vocabulary, *, seed: int, mask_row: int | None = None
) -> dict[str, Tensor]:
    """Return `weights` with embedding and head [R, H] truncated or extended to the padded vocabulary.

    Row i is copied for i < R, except row V of [MASK], which is a copy of row `mask_row` if that is given. Missing rows
    are initialised as in a new model with `seed`.
    """
    shapes = {name: weights[name].shape for name in TABLES if name in weights}
    initial = nn.ModuleDict(
        {name.removesuffix(".weight"): nn.Embedding(vocabulary.padded_size, shape[1]) for name, shape in shapes.items()}
    )
    initialise(initial, config, seed)
    tables = {}
    for name, parameter in initial.named_parameters():
        table = parameter.detach().clone()  # [V padded, H]
        source = weights[name]  # [R, H]
        num_copied = min(len(source), vocabulary.padded_size)
        table[:num_copied] = source[:num_copied]
        if mask_row is not None and mask_row < len(source):
            table[vocabulary.mask_id] = source[mask_row]
        tables[name] = table
    return weights | tables


def model_flags(config: ModelConfig) -> str:
    """Return the model flags that a branch needs on its command line: those that are not at their default."""
    defaults = {name: field.default for name, field in ModelConfig.__dataclass_fields__.items()}
    return " ".join(typed(name, value) for name, value in asdict(config).items() if value not in (defaults[name], None))


@contextmanager
def one_process() -> Iterator[ParallelContext]:
    """Yield the parallel context of a single-rank job; destroy it at the end unless it existed before."""
    owned = not dist.is_initialized()
    ranks = initialize_parallel()
    try:
        yield ranks
    finally:
        if owned:
            destroy_parallel()
