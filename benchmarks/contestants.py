"""The training steps that are compared: ours, transformers', litgpt's and dLLM's, each as its own users run it.

All have one architecture, start from the same weights and take the same `Batch`es in bf16 over fp32 weights with the
same AdamW, so that a check of loss and gradient norm can tell whether they compute the same.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, metadata

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.batch import Batch
from megatron.config.sections import ModelConfig, OptimizerConfig, ParallelConfig, Vocabulary
from megatron.convert.huggingface import hugging_face_config, hugging_face_model
from megatron.model.initialise import initialise
from megatron.model.transformer import Transformer
from megatron.parallel.apply import build_engine
from megatron.parallel.mesh import Processes
from megatron.training.optimizer import build_optimizer
from megatron.training.step import train_step

IGNORED = -100  # what both peers take for a target that is not asked
OPTIMIZER = OptimizerConfig()
SEED = 1  # of the weights that all start from

# one optimizer step: (batch, learning rate) -> (loss, gradient norm before clipping)
Step = Callable[[Batch, float], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Contestant:
    """One way to take a training step."""

    system: str
    objective: str
    compiled: bool
    step: Step
    dropout: float = 0.0

    @property
    def name(self) -> str:
        dropout = " dropout" if self.dropout else ""
        return f"{self.system} {self.objective.upper()}{dropout} {'compiled' if self.compiled else 'eager'}"


@dataclass(frozen=True)
class Shape:
    """The one network of all contestants."""

    model: ModelConfig
    vocabulary: Vocabulary
    seq_length: int

    def ours(self) -> Transformer:
        """Return our model, unsharded; every call gives the same weights."""
        model = Transformer(self.model, self.vocabulary)
        initialise(model, self.model, SEED)
        return model


def ours(shape: Shape, compile: bool, processes: Processes) -> Step:
    """Return the step of our trainer, in a group of one process."""
    settings = {"bf16": True, "compile": compile}
    engine = build_engine(shape.model, shape.vocabulary, SEED, processes, ParallelConfig(), **settings)
    optimizer = build_optimizer(engine, OPTIMIZER)

    def step(batch: Batch, learning_rate: float) -> tuple[Tensor, Tensor]:
        clip = OPTIMIZER.clip_grad
        rates = {"learning_rate": learning_rate, "weight_decay": OPTIMIZER.weight_decay}
        result = train_step(engine, optimizer, [batch], **rates, clip_grad=clip)
        return result.loss, result.grad_norm

    return step


def transformers(shape: Shape, compile: bool) -> Step:
    """Return the step of transformers' Llama as its Trainer takes it: SDPA, autocast, the model's own loss."""
    model = transformers_model(shape)
    optimizer = build_optimizer(model, OPTIMIZER)
    forward = torch.compile(model) if compile else model

    def step(batch: Batch, learning_rate: float) -> tuple[Tensor, Tensor]:
        targets = _asked(batch)
        with torch.autocast("cpu", torch.bfloat16):
            # labels alone would be shifted once more, and the last target of the sequence lost
            loss = forward(input_ids=batch.tokens, labels=targets, shift_labels=targets, use_cache=False).loss
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_grad)
        update(optimizer, learning_rate)
        return loss.detach(), norm

    return step


def litgpt(shape: Shape, compile: bool) -> Step:
    """Return the step of litgpt's pretrain.py: Fabric in bf16-mixed, its CPU default, and its chunked loss."""
    from lightning import Fabric
    from litgpt.utils import chunked_cross_entropy

    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    plain = _litgpt_model(shape)
    model = fabric.setup(torch.compile(plain) if compile else plain)
    optimizer = fabric.setup_optimizers(build_optimizer(plain, OPTIMIZER))

    def step(batch: Batch, learning_rate: float) -> tuple[Tensor, Tensor]:
        loss = chunked_cross_entropy(model(batch.tokens), _asked(batch))
        fabric.backward(loss)
        norm = fabric.clip_gradients(model, optimizer, max_norm=OPTIMIZER.clip_grad)
        update(optimizer, learning_rate)
        return loss.detach(), norm

    return step


def dllm(shape: Shape, compile: bool) -> Step:
    """Return the step that dLLM's MDLM trainer takes with a Llama that sees both ways.

    Logits of all positions in fp32, as the Trainer's autocast hands them out, with ids along the second axis; then
    weights, which are 0 where nothing is hidden.
    """
    model = transformers_model(shape)
    model.config.is_causal = False  # makes no mask
    for block in model.model.layers:
        block.self_attn.is_causal = False  # what attention goes by where there is no mask
    optimizer = build_optimizer(model, OPTIMIZER)
    forward = torch.compile(model) if compile else model

    def step(batch: Batch, learning_rate: float) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            logits = forward(input_ids=batch.tokens, use_cache=False).logits
        nll = F.cross_entropy(logits.float().transpose(1, 2), batch.targets, reduction="none")
        loss = (nll * batch.weights).sum() / batch.count
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_grad)
        update(optimizer, learning_rate)
        return loss.detach(), norm

    return step


# by name: the objective that a peer trains, and its step
PEERS = {"transformers": ("ar", transformers), "litgpt": ("ar", litgpt), "dllm": ("mdm", dllm)}
MODULES = {name: ("transformers",) for name in ("transformers", "dllm")}
MODULES |= {"litgpt": ("litgpt.utils", "litgpt.model", "lightning")}


def missing(peer: str) -> str | None:
    """Return what keeps a peer from running here, or None."""
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
    rows = shape.vocabulary.padded_size
    return hugging_face_model(
        shape.ours(), hugging_face_config(shape.model, rows=rows, positions=shape.seq_length)
    ).train()


# litgpt's names of what stands in a block; queries, keys and values are one matrix there
LITGPT_BLOCK = {
    "norm_1": ("input_layernorm",),
    "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.proj": ("self_attn.o_proj",),
    "norm_2": ("post_attention_layernorm",),
    "mlp.fc_1": ("mlp.gate_proj",),
    "mlp.fc_2": ("mlp.up_proj",),
    "mlp.proj": ("mlp.down_proj",),
}


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
    model.transformer.wte.weight = model.lm_head.weight  # as its --train.tie_embeddings does
    weights, packed = shape.ours().state_dict(), {}
    for layer in range(config.num_layers):
        for name, parts in LITGPT_BLOCK.items():
            rows = [weights[f"layers.{layer}.{part}.weight"] for part in parts]
            packed[f"transformer.h.{layer}.{name}.weight"] = torch.cat(rows)
    packed |= {"transformer.ln_f.weight": weights["norm.weight"]}
    packed |= dict.fromkeys(("lm_head.weight", "transformer.wte.weight"), weights["embed_tokens.weight"])
    model.load_state_dict(packed)
    return model


def _asked(batch: Batch) -> Tensor:
    return batch.targets.masked_fill(batch.weights == 0, IGNORED)


def update(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad()
