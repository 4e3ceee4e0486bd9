"""The training steps that are compared: ours, a plain loop's, transformers', litgpt's and dLLM's, as users run them.

All have one architecture, start from the same weights and take the same `Batch`es in bf16 over fp32 weights with the
same AdamW, so that a check of loss and gradient norm can tell whether they compute the same. Every step moves its own
batches to the device.
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
from megatron.config.sections import ModelConfig, OptimizerConfig, ParallelConfig, Vocabulary
from megatron.convert.huggingface import hugging_face_config, hugging_face_model
from megatron.model.initialise import initialise
from megatron.model.transformer import Transformer
from megatron.parallel.apply import build_engine
from megatron.parallel.mesh import ParallelContext
from megatron.training.optimizer import build_optimizer
from megatron.training.step import train_step

IGNORED = -100  # what the peers take for a target that is not asked
OPTIMIZER = OptimizerConfig()
SEED = 1  # of the weights that all start from

# one optimizer step: (micro-batches, learning rate) -> (mean loss, gradient norm before clipping)
Step = Callable[[list[Batch], float], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Contestant:
    """One way to take a training step. Its model is built when the step is first asked for."""

    system: str
    objective: str
    compiled: bool
    build: Callable[[], Step]
    dropout: float = 0.0
    full_head: bool = False  # its batches ask for logits of every position, whatever the weights

    @property
    def batches(self) -> str:
        """Which batches it takes."""
        return f"{self.objective} full head" if self.full_head else self.objective

    @property
    def name(self) -> str:
        variant = " full head" * self.full_head + " dropout" * bool(self.dropout)
        return f"{self.system} {self.objective.upper()}{variant} {'compiled' if self.compiled else 'eager'}"

    @cached_property
    def step(self) -> Step:
        return self.build()


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


def contestants(shape: Shape, compile: bool, ranks: ParallelContext) -> list[Contestant]:
    """Return ours and the peers', eager or compiled."""
    # one model serves all batches, so that memory is there for the peers'
    build = cache(partial(ours, shape, compile, ranks))
    found = [Contestant("ours", objective, compile, build) for objective in ("ar", "mdm")]
    found.append(Contestant("ours", "mdm", compile, build, full_head=True))
    for peer, (objective, build) in PEERS.items():
        found.append(Contestant(peer, objective, compile, partial(build, shape, compile, ranks.device)))
    return found


def ours(shape: Shape, compile: bool, ranks: ParallelContext) -> Step:
    """Return the step of our trainer, in a group of one process."""
    settings = {"bf16": True, "compile": compile}
    engine = build_engine(shape.model, shape.vocabulary, SEED, ranks, ParallelConfig(), **settings)
    optimizer = build_optimizer(engine, OPTIMIZER)

    def step(batches: list[Batch], learning_rate: float) -> tuple[Tensor, Tensor]:
        clip = OPTIMIZER.clip_grad
        rates = {"learning_rate": learning_rate, "weight_decay": OPTIMIZER.weight_decay}
        result = train_step(engine, optimizer, batches, **rates, clip_grad=clip)
        return result.loss, result.grad_norm

    return step


def nanogpt(shape: Shape, compile: bool, device: torch.device) -> Step:
    """Return the step of a short loop in plain PyTorch: whole logits in fp32 under autocast."""
    model = PlainGPT(shape.model, shape.vocabulary.padded_size, shape.seq_length)
    model.load_state_dict(packed_weights(shape, PLAIN_BLOCK, "blocks.{layer}.{name}.weight", PLAIN_ENDS))
    forward = torch.compile(model) if compile else model

    def loss(batch: Batch) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            logits = forward(batch.tokens)
        return F.cross_entropy(logits.float().flatten(0, 1), _asked(batch).flatten(), ignore_index=IGNORED)

    return _step(model.to(device), loss, device)


def transformers(shape: Shape, compile: bool, device: torch.device) -> Step:
    """Return the step of transformers' Llama as its Trainer takes it: SDPA, autocast, the model's own loss."""
    model = transformers_model(shape).to(device)
    forward = torch.compile(model) if compile else model

    def loss(batch: Batch) -> Tensor:
        targets = _asked(batch)
        with torch.autocast(device.type, torch.bfloat16):
            # labels alone would be shifted once more, and the last target of the sequence lost
            return forward(input_ids=batch.tokens, labels=targets, shift_labels=targets, use_cache=False).loss

    return _step(model, loss, device)


def litgpt(shape: Shape, compile: bool, device: torch.device) -> Step:
    """Return the step of litgpt's pretrain.py: Fabric in bf16-mixed, its default, and its chunked loss."""
    from lightning import Fabric
    from litgpt.utils import chunked_cross_entropy

    fabric = Fabric(accelerator=device.type, devices=1, precision="bf16-mixed")
    plain = _litgpt_model(shape).to(device)
    model = fabric.setup(torch.compile(plain) if compile else plain)
    optimizer = fabric.setup_optimizers(build_optimizer(plain, OPTIMIZER))

    def loss(batch: Batch) -> Tensor:
        return chunked_cross_entropy(model(batch.tokens), _asked(batch))

    def step(batches: list[Batch], learning_rate: float) -> tuple[Tensor, Tensor]:
        mean = accumulate(batches, device, loss, fabric.backward)
        norm = fabric.clip_gradients(model, optimizer, max_norm=OPTIMIZER.clip_grad)
        update(optimizer, learning_rate)
        return mean, norm

    return step


def dllm(shape: Shape, compile: bool, device: torch.device) -> Step:
    """Return the step that dLLM's MDLM trainer takes with a Llama that sees both ways.

    Logits of all positions in fp32, as the Trainer's autocast hands them out, with ids along the second axis; then
    weights, which are 0 where nothing is hidden.
    """
    model = transformers_model(shape).to(device)
    model.config.is_causal = False  # makes no mask
    for block in model.model.layers:
        block.self_attn.is_causal = False  # what attention goes by where there is no mask
    forward = torch.compile(model) if compile else model

    def loss(batch: Batch) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            logits = forward(input_ids=batch.tokens, use_cache=False).logits
        nll = F.cross_entropy(logits.float().transpose(1, 2), batch.targets, reduction="none")
        return (nll * batch.weights).sum() / batch.count

    return _step(model, loss, device)


def _step(model: nn.Module, loss: Callable[[Batch], Tensor], device: torch.device) -> Step:
    """Return the step of a model that is on its device and of a loss of one micro-batch."""
    optimizer = build_optimizer(model, OPTIMIZER)

    def step(batches: list[Batch], learning_rate: float) -> tuple[Tensor, Tensor]:
        mean = accumulate(batches, device, loss)
        norm = nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_grad)
        update(optimizer, learning_rate)
        return mean, norm

    return step


def accumulate(batches: list[Batch], device: torch.device, loss, backward=Tensor.backward) -> Tensor:
    """Add the gradients of the mean loss of the micro-batches, which count equally much; return that mean."""
    total = torch.zeros((), device=device)
    for batch in batches:
        share = loss(batch.to(device)) / len(batches)
        backward(share)
        total += share.detach()
    return total


# by name: the objective that a peer trains, and its step
PEERS = {
    "nanogpt": ("ar", nanogpt),
    "transformers": ("ar", transformers),
    "litgpt": ("ar", litgpt),
    "dllm": ("mdm", dllm),
}
MODULES = {"nanogpt": (), "transformers": ("transformers",), "dllm": ("transformers",)}
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


# names elsewhere of what stands in a block; queries, keys and values are one matrix there
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
# and of what stands outside the blocks
LITGPT_ENDS = {"transformer.ln_f.weight": "norm.weight"}
LITGPT_ENDS |= dict.fromkeys(("lm_head.weight", "transformer.wte.weight"), "embed_tokens.weight")
PLAIN_ENDS = {"embedding.weight": "embed_tokens.weight", "norm.weight": "norm.weight"}


def packed_weights(shape: Shape, block: dict, pattern: str, ends: dict[str, str]) -> dict[str, Tensor]:
    """Return our weights by the names of another model: `block` and `pattern` name those of a block."""
    weights = shape.ours().state_dict()
    found = {name: weights[own] for name, own in ends.items()}
    for layer in range(shape.model.num_layers):
        for name, parts in block.items():
            rows = [weights[f"layers.{layer}.{part}.weight"] for part in parts]
            found[pattern.format(layer=layer, name=name)] = torch.cat(rows)
    return found


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
    model.transformer.wte.weight = model.lm_head.weight  # as its --train.tie_embeddings does
    model.load_state_dict(packed_weights(shape, LITGPT_BLOCK, "transformer.h.{layer}.{name}.weight", LITGPT_ENDS))
    return model


def _asked(batch: Batch) -> Tensor:
    return batch.targets.masked_fill(batch.weights == 0, IGNORED)


def update(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad()
