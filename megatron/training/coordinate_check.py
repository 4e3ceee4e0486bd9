"""The coordinate check: how much hidden states and logits change in the first steps, by the size of the model.

Under a parametrization whose learning rates transfer, the change of a coordinate is the same at every size; where it
grows, larger models need lower rates (Yang et al., 2203.03466, appendix D.1). `tools/coordinate_check.py` prints it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megatron.batch import Batch
from megatron.config.flags import require
from megatron.config.sections import Config, ModelConfig
from megatron.config.vocabulary import Vocabulary
from megatron.model.transformer import Transformer
from megatron.objectives.documents import DocumentRules
from megatron.objectives.input_noise import build_input_noise
from megatron.objectives.registry import build_objective
from megatron.parallel.engine import Engine
from megatron.parallel.mesh import ParallelContext
from megatron.parallel.meta_gradient import MetaGradient
from megatron.training.build_engine import start_engine
from megatron.training.environment import choose_precision
from megatron.training.microbatches import MicroBatches
from megatron.training.step import reseed, train_step
from megatron.training.step_benchmark import RandomText

ACTIVATIONS = (
    "embedding",
    "half of the blocks",
    "all blocks",
    "logits",
)  # the first three are states of the residual stream


@dataclass(frozen=True)
class RepeatedText(RandomText):
    """Random samples that repeat after `period` samples, so that there is something to learn."""

    period: int

    def __getitem__(self, sample_index: int) -> np.ndarray:
        return super().__getitem__(sample_index % self.period)


def with_width(model: ModelConfig, width: int) -> ModelConfig:
    """Return the model at another hidden size, with a multiple of its heads and of the hidden size of its MLP.

    With --base-kv-channels the dimension of its heads grows, and not their number.

    Raises: ConfigurationError if the width is no multiple that gives whole numbers.
    """

    def scaled(size: int, name: str) -> int:
        message = f"is not a width at which {name}, {size} at --hidden-size {model.hidden_size}, is a whole number"
        require(size * width % model.hidden_size == 0, "widths", width, f"{message}; give multiples")
        return size * width // model.hidden_size

    if model.base_kv_channels:
        heads = {"kv_channels": scaled(model.head_size, "the head dimension")}
    else:
        heads = {"num_attention_heads": scaled(model.num_attention_heads, "the number of heads")}
        heads |= {"kv_channels": model.head_size}
        if model.num_query_groups:
            heads |= {"num_query_groups": scaled(model.num_query_groups, "the number of key/value heads")}
    mlp_size = scaled(model.mlp_size, "the hidden size of the MLP")
    return replace(model, hidden_size=width, ffn_hidden_size=mlp_size, **heads)


def changes(
    config: Config, vocabulary: Vocabulary, ranks: ParallelContext, *, documents: DocumentRules | None, steps: int
) -> np.ndarray:
    """Return the root mean square change of a coordinate since initialisation, [steps, activations], after each step.

    All steps train on the same sequences of random text at the full learning rate; masks and other noise differ. The
    changes are those at the first micro-batch, without dropout. On one rank.
    """
    training = config.training
    bf16 = choose_precision(config, ranks.device) == "bf16"
    engine, optimizer = start_engine(config, vocabulary, ranks, bf16=bf16, compile=bool(training.compile), steps=0)
    data = MicroBatches(
        RepeatedText(vocabulary.size, config.data.seq_length, training.global_batch_size),
        build_objective(config.objective, vocabulary, training.global_batch_size, documents),
        build_input_noise(config.objective, vocabulary, config.model.depth),
        seed=training.seed,
        first_sample=0,
        train_samples=steps * training.global_batch_size,
        micro_batch_size=training.micro_batch_size,
        global_batch_size=training.global_batch_size,
        rank=0,
        size=1,
    )
    with torch.device(ranks.device):
        probe = Transformer(config.model, vocabulary).eval()
    first = data[0][0].to(ranks.device)
    before = _activations(engine, probe, first)
    result = []
    for step in range(steps):
        batches = [batch for index in range(data.per_step) for batch in data[step * data.per_step + index]]
        reseed(training.seed, step, ranks)
        train_step(
            engine,
            optimizer,
            batches,
            learning_rate=config.optimizer.lr,
            weight_decay=config.optimizer.weight_decay,
            clip_grad=config.optimizer.clip_grad,
            meta_gradient=MetaGradient.at(config.optimizer, config.optimizer.lr),
        )
        after = _activations(engine, probe, first)
        result.append([float((new - old).square().mean().sqrt()) for new, old in zip(after, before, strict=True)])
    return np.array(result)


@torch.no_grad()
def _activations(engine: Engine, probe: Transformer, batch: Batch) -> list[Tensor]:
    """Return the activations of the engine's weights at ACTIVATIONS, fp32, computed by the plain model `probe`."""
    weights = {name: cast(DTensor, parameter).full_tensor() for name, parameter in engine.named_parameters()}
    probe.load_state_dict(weights)
    blocks = list(probe.layers.values())
    modules: list[nn.Module] = [probe.embed_tokens, blocks[(len(blocks) - 1) // 2], blocks[-1]]
    outputs: dict[nn.Module, Tensor] = {}  # of the last use of a block in a loop

    def keep(module: nn.Module, _inputs: tuple, output: Tensor) -> None:
        outputs[module] = output

    hooks = [module.register_forward_hook(keep) for module in set(modules)]
    hidden = probe.hidden_states(batch)
    for hook in hooks:
        hook.remove()
    return [*(outputs[module] for module in modules), probe.head(hidden)]


def slope(sizes: Sequence[int], change: np.ndarray) -> float:
    """Return the exponent p of the power law change ~ size^p, by least squares of the logarithms; `change` [sizes]."""
    return float(np.polyfit(np.log(sizes), np.log(change), 1)[0])
