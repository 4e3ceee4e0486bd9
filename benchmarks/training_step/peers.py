"""The training steps to compare: ours and those of a plain PyTorch loop, transformers, litgpt and dLLM.

All implementations have the same architecture, initial weights, batches and AdamW, and compute in bf16 with fp32 master
weights, so that loss and gradient norm must agree. Every step moves its own batches to the device.
"""

from collections.abc import Callable
from functools import cache, partial
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.training_step.implementations import (
    OPTIMIZER,
    Implementation,
    Shape,
    Step,
    accumulate,
    ours,
    packed_weights,
    update,
)
from benchmarks.training_step.plain import GPT as PlainGPT
from megatron.batch import Batch
from megatron.convert.huggingface import hugging_face_config, hugging_face_model
from megatron.parallel.mesh import ParallelContext
from megatron.training.optimizer import build_optimizer

IGNORE_INDEX = -100  # target of an unscored position in the peers

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


def implementations(shape: Shape, compile: bool, ranks: ParallelContext) -> list[Implementation]:
    """Return our implementations and those of the peers, eager or compiled."""
    # our objectives share one model, which leaves memory for the peers
    build_ours = cache(partial(ours, shape, compile, ranks))
    steps = [
        Implementation(system="ours", objective=objective, compiled=compile, build=build_ours)
        for objective in ("ar", "mdm")
    ]
    steps.append(Implementation(system="ours", objective="mdm", compiled=compile, build=build_ours, full_head=True))
    for peer, (objective, build) in PEERS.items():
        build_peer = partial(build, shape, compile, ranks.device)
        steps.append(Implementation(system=peer, objective=objective, compiled=compile, build=build_peer))
    return steps


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


def transformers_model(shape: Shape) -> nn.Module:
    """Return transformers' model with our weights, in training mode."""
    padded_vocab_size = shape.vocabulary.padded_size
    sizes = {"vocabulary_rows": padded_vocab_size, "max_positions": shape.seq_length}
    return hugging_face_model(shape.ours(), hugging_face_config(shape.model, **sizes)).train()


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
