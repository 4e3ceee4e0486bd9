"""The training steps to compare: ours and those of a plain PyTorch loop, transformers, litgpt and dLLM.

All implementations have the same architecture, initial weights, batches and AdamW, and compute in bf16 with fp32 master
weights, so that loss and gradient norm must agree. Every step moves its own batches to the device.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from importlib import import_module, metadata

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.plain import GPT as PlainGPT
from megatron.batch import Batch
from megatron.config.sections import ModelConfig, OptimizerConfig, ParallelConfig
from megatron.config.vocabulary import Vocabulary
from megatron.convert.huggingface import hugging_face_config, hugging_face_model
from megatron.model.initialise import initialise
from megatron.model.transformer import Transformer
from megatron.parallel.apply import build_engine
from megatron.parallel.mesh import ParallelContext
from megatron.training.optimizer import build_optimizer
from megatron.training.step import train_step

IGNORE_INDEX = -100  # target of an unscored position in the peers
OPTIMIZER = OptimizerConfig()
SEED = 1  # of the initial weights

# one optimizer step: (micro-batches, learning rate) -> (mean loss, gradient norm before clipping)
Step = Callable[[list[Batch], float], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
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


def implementations(shape: Shape, compile: bool, ranks: ParallelContext) -> list[Implementation]:
    """Return our implementations and those of the peers, eager or compiled."""
    # our objectives share one model, which leaves memory for the peers
    build_ours = cache(partial(ours, shape, compile, ranks))
    steps = [Implementation("ours", objective, compile, build_ours) for objective in ("ar", "mdm")]
    steps.append(Implementation("ours", "mdm", compile, build_ours, full_head=True))
    for peer, (objective, build) in PEERS.items():
        steps.append(Implementation(peer, objective, compile, partial(build, shape, compile, ranks.device)))
    return steps


def ours(shape: Shape, compile: bool, ranks: ParallelContext) -> Step:
    """Return the step of our trainer, with world size 1."""
    engine = build_engine(shape.model, shape.vocabulary, SEED, ranks, ParallelConfig(), bf16=True, compile=compile)
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


def nanogpt(shape: Shape, compile: bool, device: torch.device) -> Step:
    """Return the step of a plain PyTorch loop under autocast, with fp32 logits at every position."""
    model = PlainGPT(shape.model, shape.vocabulary.padded_size, shape.seq_length)
    model.load_state_dict(packed_weights(shape, PLAIN_BLOCK, "blocks.{layer}.{name}.weight", PLAIN_ENDS))
    forward = torch.compile(model) if compile else model

    def loss(batch: Batch) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            logits = forward(batch.tokens)
        return F.cross_entropy(logits.float().flatten(0, 1), _labels(batch).flatten(), ignore_index=IGNORE_INDEX)

    return _step(model.to(device), loss, device)


def transformers(shape: Shape, compile: bool, device: torch.device) -> Step:
    """Return the step of transformers' Llama as `Trainer` runs it: SDPA, autocast, the loss of the model."""
    model = transformers_model(shape).to(device)
    forward = torch.compile(model) if compile else model

    def loss(batch: Batch) -> Tensor:
        labels = _labels(batch)
        with torch.autocast(device.type, torch.bfloat16):
            # `labels` alone are shifted inside, which would lose the last target of the sequence
            return forward(input_ids=batch.tokens, labels=labels, shift_labels=labels, use_cache=False).loss

    return _step(model, loss, device)


def litgpt(shape: Shape, compile: bool, device: torch.device) -> Step:
    """Return the step of litgpt's pretrain.py: Fabric in bf16-mixed (the default), chunked cross-entropy."""
    from lightning import Fabric
    from litgpt.utils import chunked_cross_entropy

    fabric = Fabric(accelerator=device.type, devices=1, precision="bf16-mixed")
    plain = _litgpt_model(shape).to(device)
    model = fabric.setup(torch.compile(plain) if compile else plain)
    optimizer = fabric.setup_optimizers(build_optimizer(plain, OPTIMIZER))

    def loss(batch: Batch) -> Tensor:
        return chunked_cross_entropy(model(batch.tokens), _labels(batch))

    def step(batches: list[Batch], learning_rate: float) -> tuple[Tensor, Tensor]:
        mean_loss = accumulate(batches, device, loss, fabric.backward)
        grad_norm = fabric.clip_gradients(model, optimizer, max_norm=OPTIMIZER.clip_grad)
        update(optimizer, learning_rate)
        return mean_loss, grad_norm

    return step


def dllm(shape: Shape, compile: bool, device: torch.device) -> Step:
    """Return the step of dLLM's MDLM trainer with a bidirectional Llama.

    Logits are fp32 [B, V, S] at every position, as under `Trainer`'s autocast; weights are 0 at unmasked tokens.
    """
    model = transformers_model(shape).to(device)
    model.config.is_causal = False  # no mask is built
    for block in model.model.layers:
        block.self_attn.is_causal = False  # decides if there is no mask
    forward = torch.compile(model) if compile else model

    def loss(batch: Batch) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            logits = forward(input_ids=batch.tokens, use_cache=False).logits
        nll = F.cross_entropy(logits.float().transpose(1, 2), batch.targets, reduction="none")
        return (nll * batch.weights).sum() / batch.count

    return _step(model, loss, device)


def _step(model: nn.Module, loss: Callable[[Batch], Tensor], device: torch.device) -> Step:
    """Return the step of `model`, which is on `device`; `loss` is the mean loss of one micro-batch."""
    optimizer = build_optimizer(model, OPTIMIZER)

    def step(batches: list[Batch], learning_rate: float) -> tuple[Tensor, Tensor]:
        mean_loss = accumulate(batches, device, loss)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_grad)
        update(optimizer, learning_rate)
        return mean_loss, grad_norm

    return step


def accumulate(batches: list[Batch], device: torch.device, loss, backward=Tensor.backward) -> Tensor:
    """Accumulate the gradients of equally weighted micro-batches and return the mean loss."""
    mean_loss = torch.zeros((), device=device)
    for batch in batches:
        scaled_loss = loss(batch.to(device)) / len(batches)
        backward(scaled_loss)
        mean_loss += scaled_loss.detach()
    return mean_loss


# peer -> (objective, builder of its step)
PEERS = {
    "nanogpt": ("ar", nanogpt),
    "transformers": ("ar", transformers),
    "litgpt": ("ar", litgpt),
    "dllm": ("mdm", dllm),
}
MODULES = {"nanogpt": (), "transformers": ("transformers",), "dllm": ("transformers",)}
MODULES |= {"litgpt": ("litgpt.utils", "litgpt.model", "lightning")}


def missing(peer: str) -> str | None:
    """Return the import error of a peer that cannot run here, or None."""
    try:
        for module in MODULES[peer]:
            import_module(module)
    except ImportError as error:
        return str(error)
    return None


def version(package: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def transformers_model(shape: Shape) -> nn.Module:
    """Return transformers' model with our weights, in training mode."""
    padded_vocab_size = shape.vocabulary.padded_size
    return hugging_face_model(
        shape.ours(), hugging_face_config(shape.model, rows=padded_vocab_size, positions=shape.seq_length)
    ).train()


# their module name -> ours, of one block; query, key and value projections are packed into one matrix there
LITGPT_BLOCK = {
    "norm_1": ("input_layernorm",),
    "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.proj": ("self_attn.o_proj",),
    "norm_2": ("post_attention_layernorm",),
    "mlp.fc_1": ("mlp.gate_proj",),
    "mlp.fc_2": ("mlp.up_proj",),
    "mlp.proj": ("mlp.down_proj",),
}
PLAIN_BLOCK = {
    "attention_norm": ("input_layernorm",),
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mix": ("self_attn.o_proj",),
    "mlp_norm": ("post_attention_layernorm",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
# the same outside the blocks
LITGPT_ENDS = {"transformer.ln_f.weight": "norm.weight"}
LITGPT_ENDS |= dict.fromkeys(("lm_head.weight", "transformer.wte.weight"), "embed_tokens.weight")
PLAIN_ENDS = {"embedding.weight": "embed_tokens.weight", "norm.weight": "norm.weight"}


def packed_weights(shape: Shape, block: dict, pattern: str, ends: dict[str, str]) -> dict[str, Tensor]:
    """Return our weights as a state dict of another model.

    `block` maps its module names within a block to ours, `pattern` makes a parameter name of layer and module name,
    `ends` maps its parameter names outside the blocks to ours.
    """
    weights = shape.ours().state_dict()
    state_dict = {their_name: weights[our_name] for their_name, our_name in ends.items()}
    for layer in range(shape.model.num_layers):
        for their_name, our_names in block.items():
            matrices = [weights[f"layers.{layer}.{our_name}.weight"] for our_name in our_names]
            state_dict[pattern.format(layer=layer, name=their_name)] = torch.cat(matrices)
    return state_dict


def _litgpt_model(shape: Shape) -> nn.Module:
    from litgpt.config import Config
    from litgpt.model import GPT

    config = shape.model
    model = GPT(
        Config(
            block_size=shape.seq_length,
            n_layer=config.num_layers,
            n_embd=config.hidden_size,
            n_head=config.num_attention_heads,
            head_size=config.head_size,
            padded_vocab_size=shape.vocabulary.padded_size,
            norm_class_name="RMSNorm",
            norm_eps=config.norm_epsilon,
            mlp_class_name="LLaMAMLP",
            intermediate_size=config.mlp_size,
            rotary_percentage=1.0,
            rope_base=config.rotary_base,
            parallel_residual=False,
            bias=False,
        )
    )
    model.transformer.wte.weight = model.lm_head.weight  # as with --train.tie_embeddings
    model.load_state_dict(packed_weights(shape, LITGPT_BLOCK, "transformer.h.{layer}.{name}.weight", LITGPT_ENDS))
    return model


def _labels(batch: Batch) -> Tensor:
    return batch.targets.masked_fill(batch.weights == 0, IGNORE_INDEX)


def update(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Take an optimizer step with `learning_rate` and zero the gradients."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad()
