"""A training step to time: its name and how it is built; and ours. All share model, weights, batches and optimizer."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megatron.batch import Batch
from megatron.config.sections import ModelConfig, OptimizerConfig, ParallelConfig
from megatron.config.vocabulary import Vocabulary
from megatron.model.initialise import initialise
from megatron.model.transformer import Transformer
from megatron.parallel.apply import build_engine
from megatron.parallel.mesh import ParallelContext
from megatron.training.optimizer import build_optimizer
from megatron.training.step import train_step

OPTIMIZER = OptimizerConfig()
SEED = 1  # of the initial weights

# one optimizer step: (micro-batches, learning rate) -> (mean loss, gradient norm before clipping)
Step = Callable[[list[Batch], float], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """One implementation of the training step. The model is built at the first use of `step`."""

    system: str
    objective: str
    compiled: bool
    build: Callable[[], Step]
    dropout: float = 0.0
    full_head: bool = False  # logits at every position, whatever the weights

    @property
    def batches(self) -> str:
        """Return the key of the batches that the step reads."""
        return f"{self.objective} full head" if self.full_head else self.objective

    @property
    def name(self) -> str:
        """Return the name in tables and for --only, such as "ours MDM full head compiled"."""
        head = " full head" if self.full_head else ""
        dropout = " dropout" if self.dropout else ""
        return f"{self.system} {self.objective.upper()}{head}{dropout} {'compiled' if self.compiled else 'eager'}"

    @cached_property
    def step(self) -> Step:
        """Return the training step; builds the model once."""
        return self.build()


@dataclass(frozen=True)
class Shape:
    """The model and sequence length that all implementations share."""

    model: ModelConfig
    vocabulary: Vocabulary
    seq_length: int

    def ours(self) -> Transformer:
        """Return our model, unsharded; the weights are the same at every call."""
        model = Transformer(self.model, self.vocabulary)
        initialise(model, self.model, SEED)
        return model


def ours(shape: Shape, compile: bool, ranks: ParallelContext) -> Step:
    """Return the step of our trainer, with world size 1."""
    engine = build_engine(shape.model, shape.vocabulary, ranks, ParallelConfig(), seed=SEED, bf16=True, compile=compile)
    optimizer = build_optimizer(engine, OPTIMIZER)

    def step(batches: list[Batch], learning_rate: float) -> tuple[Tensor, Tensor]:
        result = train_step(
            engine,
            optimizer,
            batches,
            learning_rate=learning_rate,
            weight_decay=OPTIMIZER.weight_decay,
            clip_grad=OPTIMIZER.clip_grad,
        )
        return result.loss, result.grad_norm

    return step


def accumulate(batches: list[Batch], device: torch.device, loss, backward=Tensor.backward) -> Tensor:
    """Accumulate the gradients of equally weighted micro-batches and return the mean loss."""
    mean_loss = torch.zeros((), device=device)
    for batch in batches:
        scaled_loss = loss(batch.to(device)) / len(batches)
        backward(scaled_loss)
        mean_loss += scaled_loss.detach()
    return mean_loss


def update(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Take an optimizer step with `learning_rate` and zero the gradients."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad()


def packed_weights(
    shape: Shape, block: dict, pattern: str, ends: dict[str, str], *, first_block: int = 0
) -> dict[str, Tensor]:
    """Return our weights as a state dict of another model.

    `block` maps its module names within a block to ours, `pattern` makes a parameter name of layer and module name,
    `ends` maps its parameter names outside the blocks to ours. Its first block has the index `first_block`.
    """
    weights = shape.ours().state_dict()
    state_dict = {their_name: weights[our_name] for their_name, our_name in ends.items()}
    for layer in range(shape.model.num_layers):
        for their_name, our_names in block.items():
            matrices = [weights[f"layers.{layer}.{our_name}.weight"] for our_name in our_names]
            state_dict[pattern.format(layer=layer + first_block, name=their_name)] = torch.cat(matrices)
    return state_dict
