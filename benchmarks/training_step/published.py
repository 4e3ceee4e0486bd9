"""The training step of the published system: `DiffGPTModelPipe` and `GPTModelPipe` from a clone of its repository.

Its package is called `megatron`, like ours. The clone is imported into this process while `megatron` refers to it (see
`_clone_modules`), so that all implementations share clock, allocator and process group. Its steps import nothing later.
A separate process would need a protocol and another clock.

Flags are those of its training scripts. Batches are prepared in advance, as for all implementations; the original step
also draws times and masks and moves them. What differs from a run of its scripts:

* `--no-masked-softmax-fusion` and `--no-gradient-accumulation-fusion`: those kernels are for CUDA only. The fallbacks
  are an in-place fill and a softmax in bf16, one pass more than the kernel; what the second flag turns off is commented
  out in its code. The same flags are set on CUDA, where the kernels would have to be built: with them the step would be
  faster by that pass.

Every other difference can only make it faster:

* RMSNorm is one PyTorch operator, like NVIDIA apex's on CUDA, instead of its Python fallback for other devices.
* The layers of the pipe run in sequence, without the DeepSpeed engine and its flat buffers, timers and checks. As in
  its bf16 optimizer, parameters and gradients are bf16 with fp32 master weights; the optimizer of the master weights is
  that of all implementations.
* The attention mask of AR is built once, as its MDM does, instead of for every batch.
"""

import contextlib
import io
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

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
from megatron.batch import Batch
from megatron.errors import ConfigurationError
from megatron.parallel.deepspeed import import_deepspeed
from megatron.parallel.mesh import ParallelContext

REPOSITORY = "wmn-231314/diffusion-data-constraint"
DROPOUT = 0.1  # of attention, residual stream and embedding: the default, which its scripts do not change
SHARED_PACKAGES = ("megatron", "tools")  # package names that both repositories use
MODELS = {"ar": ("gpt_model", "GPTModelPipe"), "mdm": ("diff_gpt_model", "DiffGPTModelPipe")}
FIRST_BLOCK = 2  # index of the first block in the pipe, after a cast and the embedding

# its module name -> ours, of one block; query, key and value are packed into one matrix, and so is SwiGLU's input
BLOCK = {
    "input_layernorm": ("input_layernorm",),
    "self_attention.query_key_value": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention.dense": ("self_attn.o_proj",),
    "post_attention_layernorm": ("post_attention_layernorm",),
    "mlp.dense_h_to_4h": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.dense_4h_to_h": ("mlp.down_proj",),
}


def missing(folder: str, device: torch.device) -> str | None:
    """Return the reason why the clone cannot run here, or None; imports it. A collective call."""
    if not (Path(folder) / "megatron" / "model" / "diff_gpt_model.py").is_file():
        return f"not a clone of {REPOSITORY}"
    if find_spec("einops") is None:
        return "cannot run, No module named 'einops'"
    try:
        _load(folder, device)
    except (ConfigurationError, ImportError) as error:
        return f"cannot run, {error}"
    return None


def implementations(shape: Shape, folder: str, compiled: bool, ranks: ParallelContext) -> list[Implementation]:
    """Return the published steps, with and without dropout, and ours with the same dropout."""
    dropouts = dict.fromkeys(("attention_dropout", "hidden_dropout", "embedding_dropout"), DROPOUT)
    shape_with_dropout = replace(shape, model=replace(shape.model, **dropouts))
    steps = []
    for objective in MODELS:
        for dropout in (0.0, DROPOUT):
            build = partial(published, shape, objective, dropout=dropout, folder=folder, device=ranks.device)
            steps.append(
                Implementation(system="published", objective=objective, compiled=False, build=build, dropout=dropout)
            )
    for compile in (False, True) if compiled else (False,):
        build = cache(partial(ours, shape_with_dropout, compile, ranks))  # one model for both objectives
        steps += [
            Implementation(system="ours", objective=objective, compiled=compile, build=build, dropout=DROPOUT)
            for objective in MODELS
        ]
    return steps


def published(shape: Shape, objective: str, *, dropout: float, folder: str, device: torch.device) -> Step:
    """Return the published step of an objective, with our initial weights."""
    clone = _load(folder, device)
    with _clone_modules(folder), contextlib.redirect_stdout(io.StringIO()):
        args = _arguments(clone, shape, dropout)
        clone.globals.set_args(args)
        model = clone.models[objective](clone.arguments.core_transformer_config_from_args(args), parallel_output=True)
        clone.utils.update_rotary_pos_emb(shape.seq_length)
    score_matrix = shape.seq_length, shape.seq_length
    causal_mask = torch.ones(score_matrix, dtype=torch.bool, device=device).triu(1)  # [query, key], True: masked out
    args.attn_mask = (causal_mask if objective == "ar" else torch.zeros_like(causal_mask))[None, None]

    initial_weights = _weights(shape)
    parameters = []  # bf16
    master_weights = []  # fp32
    for name, parameter in model.named_parameters():
        parameters.append(parameter)
        master_weights.append(nn.Parameter(initial_weights.pop(name).to(device, copy=True)))
    assert not initial_weights, f"the published model lacks {list(initial_weights)}"
    model_weights = [parameter.data for parameter in parameters]
    torch._foreach_copy_(model_weights, [master.data for master in master_weights])
    optimizer = torch.optim.AdamW(
        master_weights,
        betas=(OPTIMIZER.adam_beta1, OPTIMIZER.adam_beta2),
        eps=OPTIMIZER.adam_eps,
        weight_decay=OPTIMIZER.weight_decay,
        fused=True,
    )

    def loss(batch: Batch) -> Tensor:
        position_ids = torch.arange(shape.seq_length, device=device).expand_as(batch.tokens)  # [B, S]
        return model.loss_fn(model((batch.tokens, position_ids)), LABELS[objective](batch))

    def backward(scaled_loss: Tensor) -> None:
        scaled_loss.backward()
        for parameter, master in zip(parameters, master_weights, strict=True):
            master.grad = parameter.grad.float() if master.grad is None else master.grad.add_(parameter.grad)
            parameter.grad = None

    def step(batches: list[Batch], learning_rate: float) -> tuple[Tensor, Tensor]:
        clone.globals.set_args(args)  # the model reads its global args
        mean_loss = accumulate(batches, device, loss, backward)
        grad_norm = nn.utils.clip_grad_norm_(master_weights, OPTIMIZER.clip_grad)
        update(optimizer, learning_rate)
        torch._foreach_copy_(model_weights, [master.data for master in master_weights])
        return mean_loss, grad_norm

    return step


def _ar_labels(batch: Batch) -> tuple[Tensor, ...]:
    """Return targets and loss mask."""
    return batch.targets, batch.weights


def _mdm_labels(batch: Batch) -> tuple[Tensor, ...]:
    """Return targets, loss mask, masked positions and mask probabilities.

    The published loss divides by the number of all positions. The mask probabilities are scaled to undo that if the
    batch divides by fewer.
    """
    counted_share = batch.count / batch.weights.numel()
    return batch.targets, torch.ones_like(batch.weights), batch.weights > 0, counted_share / batch.weights


LABELS: dict[str, Callable[[Batch], tuple[Tensor, ...]]] = {"ar": _ar_labels, "mdm": _mdm_labels}


def _weights(shape: Shape) -> dict[str, Tensor]:
    """Return our weights as a state dict of the pipe."""
    ends = {"tied_modules.embed.word_embeddings.weight": "embed_tokens.weight"}
    ends[f"{shape.model.num_layers + FIRST_BLOCK}.weight"] = "norm.weight"
    return packed_weights(shape, BLOCK, "{layer}.{name}.weight", ends, first_block=FIRST_BLOCK)


def _arguments(clone: SimpleNamespace, shape: Shape, dropout: float):
    """Return the arguments that its parser derives from the flags of its training scripts."""
    model, length = shape.model, shape.seq_length
    flags = {
        "num-layers": model.num_layers,
        "hidden-size": model.hidden_size,
        "ffn-hidden-size": model.mlp_size,
        "num-attention-heads": model.num_attention_heads,
        "kv-channels": model.head_size,
        "layernorm-epsilon": model.norm_epsilon,
        "rotary-position-embeddings-theta": int(model.rotary_base),
        "seq-length": length,
        "max-position-embeddings": length,
        "micro-batch-size": 1,
        "attention-dropout": dropout,
        "hidden-dropout": dropout,
        "normalization": "rmsnorm",
    }
    switches = "use-rotary-position-embeddings disable-bias-linear swiglu bf16 deepspeed".split()
    switches += ["no-masked-softmax-fusion", "no-gradient-accumulation-fusion"]
    our_argv = sys.argv
    sys.argv = ["", *(str(word) for name, value in flags.items() for word in (f"--{name}", value))]
    sys.argv += [f"--{name}" for name in switches]
    try:
        args = clone.arguments.validate_args(clone.arguments.parse_args())
    finally:
        sys.argv = our_argv
    args.padded_vocab_size = shape.vocabulary.padded_size
    return args


@cache
def _load(folder: str, device: torch.device) -> SimpleNamespace:
    """Import the modules of the clone and initialise its parallel state on the process group of this process."""
    deepspeed = import_deepspeed(device)
    deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", verbose=False)
    with _clone_modules(folder), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it uses deprecated names of torch
        clone = SimpleNamespace(
            arguments=import_module("megatron.arguments"),
            globals=import_module("megatron.global_vars"),
            utils=import_module("megatron.utils"),
            models={
                objective: getattr(import_module(f"megatron.model.{module}"), name)
                for objective, (module, name) in MODELS.items()
            },
        )
        import_module("megatron.core.parallel_state").initialize_model_parallel()
        import_module("megatron.core.tensor_parallel").model_parallel_cuda_manual_seed(1)
        norm = import_module("megatron.model").RMSNorm
    norm.forward = lambda self, x: F.rms_norm(x, self.weight.shape, self.weight, self.eps)
    return clone


@contextlib.contextmanager
def _clone_modules(folder: str) -> Iterator[None]:
    """Within this context the shared package names refer to the clone."""
    our_modules = _pop_shared_modules()
    sys.modules.update(_imported_modules(folder))
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
        _imported_modules(folder).update(_pop_shared_modules())
        sys.modules.update(our_modules)


@cache
def _imported_modules(folder: str) -> dict:
    """Return the modules of the clone imported so far, by name; `_clone_modules` fills it."""
    return {}


def _pop_shared_modules() -> dict:
    """Remove the modules of the shared packages from `sys.modules` and return them by name."""
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in SHARED_PACKAGES}
