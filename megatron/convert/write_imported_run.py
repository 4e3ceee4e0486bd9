"""A run whose weights come from elsewhere: config.json and a checkpoint of step 0, written by the saver of training.

Moments are zero and nothing was consumed, so that a branch of it (--load RUN --save NEW) starts with a fresh optimizer.
"""

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.config.flags import typed
from megatron.config.resolve import resolve
from megatron.config.sections import Config, ModelConfig, Vocabulary
from megatron.convert.huggingface import TABLES
from megatron.errors import ConfigurationError
from megatron.model.initialise import initialise
from megatron.model.transformer import Transformer
from megatron.parallel.mesh import ParallelContext, destroy_parallel, initialize_parallel
from megatron.training.datasets import Sources
from megatron.training.environment import describe
from megatron.training.load_run import trained_config
from megatron.training.optimizer import parameter_groups
from megatron.training.run_folder import RunFolder, write_json
from megatron.training.saver import Saver


def write_run(folder: Path, recorded: dict, weights: dict[str, Tensor], time_block: int) -> None:
    """Write a run into the empty `folder`: `recorded` as its config.json, `weights` as its checkpoint of step 0.

    `weights` are whole, fp32, by our names, and checked; an average that `recorded` asks for begins at them.
    """
    run = RunFolder(str(folder))
    run.start(recorded, [], folder)
    config = trained_config(str(folder))
    state = {f"model.{name}": tensor for name, tensor in weights.items()}
    state |= _moments(config, Vocabulary(recorded["vocabulary_size"]))
    if config.optimizer.averages:
        state |= {f"average.{name}": tensor for name, tensor in weights.items()}
    meta = {"iteration": 0, "consumed_samples": 0, "seconds": 0.0, "time_block": time_block, "averaged_steps": 0}
    meta |= {"permanent": False, "config": recorded}
    with one_process() as ranks, Saver(run.checkpoints, ranks) as saver:
        saver.save(state, meta, then=lambda: None)
    pointer = {"folder": "iter_0000000", "iteration": 0, "consumed_samples": 0, "loss": None, "set": None}
    write_json(run.checkpoints / "latest.json", pointer)
    run.status("stopped", f"imported from {recorded['imported']['source']}", 0, 0)


def _moments(config: Config, vocabulary: Vocabulary) -> dict[str, Tensor]:
    """Return zeros for what the optimizer keeps of each parameter, by the names of a checkpoint."""
    model = empty_model(config.model, vocabulary)
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"optimizer.{moment}.{names[parameter]}": torch.zeros(parameter.shape)
        for group in parameter_groups(model, config.optimizer)
        for parameter in group["params"]
        for moment in group["moments"]
    }


def describe_import(config: Config, vocabulary: Vocabulary, source: str, precision: str = "fp32") -> dict:
    """Return what config.json says of a run that was trained elsewhere, of which only the network is known."""
    plan = resolve(config, vocabulary, unique_tokens=0)
    unknown = Sources(None, None, (), [], None, source, None, {}, {})  # there is no data yet
    command = shlex.join(sys.argv)
    with one_process() as ranks:
        described = describe(
            config.objective.objective, config, plan, unknown, vocabulary, ranks, precision, False, command
        )
    return described | {"branched_from": None, "imported": {"source": source}}


def empty_model(config: ModelConfig, vocabulary: Vocabulary) -> Transformer:
    """Return the network without memory: the names and shapes of what it needs."""
    with torch.device("meta"):
        return Transformer(config, vocabulary)


def check_weights(weights: dict[str, Tensor], config: ModelConfig, vocabulary: Vocabulary, source: str) -> None:
    """Refuse weights that lack something, have something more, or are of another shape than the network's.

    Embedding and head may have any number of rows.
    """
    needed = {name: tuple(each.shape) for name, each in empty_model(config, vocabulary).named_parameters()}
    for what, names in (
        ("lacks", [name for name in needed if name not in weights]),
        ("has what this network has no place for:", [name for name in weights if name not in needed]),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ConfigurationError(f"{source}: {what} {names[0]}{more}; give a whole copy, and its own sizes")
    for name, shape in needed.items():
        found, rows = tuple(weights[name].shape), name in TABLES
        if len(found) != len(shape) or found[rows:] != shape[rows:]:
            raise ConfigurationError(
                f"{source}: {name} has the shape {list(found)}, and this network needs {list(shape)}; give its own "
                "sizes"
            )


def fill_tables(
    weights: dict[str, Tensor], config: ModelConfig, vocabulary: Vocabulary, seed: int, mask_row: int | None = None
) -> dict[str, Tensor]:
    """Return `weights` whose tables, of R rows, have all rows of the padded vocabulary.

    They keep the rows they have up to there, but for V, the one of [MASK], which is `mask_row` of theirs where that is
    given. Rows that they lack are those of a new model of `seed`.
    """
    sizes = {name: weights[name].shape for name in TABLES if name in weights}
    fresh = nn.ModuleDict(
        {name.removesuffix(".weight"): nn.Embedding(vocabulary.padded_size, shape[1]) for name, shape in sizes.items()}
    )
    initialise(fresh, config, seed)
    filled = {}
    for name, parameter in fresh.named_parameters():
        table, given = parameter.detach().clone(), weights[name]
        rows = min(len(given), vocabulary.padded_size)
        table[:rows] = given[:rows]
        if mask_row is not None and mask_row < len(given):
            table[vocabulary.mask_id] = given[mask_row]
        filled[name] = table
    return weights | filled


def network_flags(config: ModelConfig) -> str:
    """Return the flags that name the network to a branch: those that are not their defaults."""
    usual = {name: field.default for name, field in ModelConfig.__dataclass_fields__.items()}
    return " ".join(typed(name, value) for name, value in asdict(config).items() if value not in (usual[name], None))


@contextmanager
def one_process() -> Iterator[ParallelContext]:
    """Yield the place of this process in a group of one, which ends with the context where it began with it."""
    begun = not dist.is_initialized()
    ranks = initialize_parallel()
    try:
        yield ranks
    finally:
        if begun:
            destroy_parallel()
