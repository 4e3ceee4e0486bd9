"""The training step of the published system: `DiffGPTModelPipe` and `GPTModelPipe` out of a clone of its repository.

Its package has the name of ours. It is imported into this process while `megatron` means the clone (see `_own`): then
one clock, one allocator and one process group serve all contestants. Its steps import nothing any more; a process of
its own would need a protocol, and a clock that the others do not have.

Flags are those of its training scripts, and batches are prepared before, as for all others: its own step would draw
times and masks and move them as well. What differs from a run of its scripts:

* `--no-masked-softmax-fusion` and `--no-gradient-accumulation-fusion`: those kernels are for CUDA only. Its own other
  branches take their place: one in-place fill and one softmax in bf16, which is a pass more than the kernel makes; what
  the second flag turns off is commented out in its code anyway. On CUDA it stays so, since its kernels would have to be
  built there: with them its step is faster by that pass.

All else can only make it faster:

* RMSNorm is one operator of PyTorch, as NVIDIA apex's is on CUDA, in place of its Python for other devices.
* The pipe's layers run in sequence, without DeepSpeed's engine, which adds flat buffers, timers and checks. As its
  optimizer for bf16 does, parameters and gradients are bf16 beside fp32 masters; the optimizer of the masters is that
  of all contestants.
* The attention mask of AR is made once, as its own MDM does, and not at every batch.
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

from benchmarks.contestants import OPTIMIZER, Contestant, Shape, Step, accumulate, ours, update
from megatron.batch import Batch
from megatron.errors import ConfigurationError
from megatron.parallel.deepspeed import import_deepspeed
from megatron.parallel.mesh import ParallelContext

REPOSITORY = "wmn-231314/diffusion-data-constraint"
DROPOUT = 0.1  # of attention, of the residual stream and of the embedding: the default that its scripts leave
SHARED = ("megatron", "tools")  # names that packages here and there have
MODELS = {"ar": ("gpt_model", "GPTModelPipe"), "mdm": ("diff_gpt_model", "DiffGPTModelPipe")}
FIRST = 2  # the place of the first block in the pipe, behind a cast and the embedding

# its names of what stands in a block; queries, keys and values are one matrix there, and so are the two of SwiGLU
BLOCK = {
    "input_layernorm": ("input_layernorm",),
    "self_attention.query_key_value": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention.dense": ("self_attn.o_proj",),
    "post_attention_layernorm": ("post_attention_layernorm",),
    "mlp.dense_h_to_4h": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.dense_4h_to_h": ("mlp.down_proj",),
}


def missing(folder: str, device: torch.device) -> str | None:
    """Return what keeps the clone from running here, or None."""
    if not (Path(folder) / "megatron" / "model" / "diff_gpt_model.py").is_file():
        return f"is no clone of {REPOSITORY}"
    if find_spec("einops") is None:
        return "cannot run, No module named 'einops'"
    try:
        import_deepspeed(device)
    except ConfigurationError as error:
        return f"cannot run, {error}"
    return None


def contestants(shape: Shape, folder: str, compiled: bool, ranks: ParallelContext) -> list[Contestant]:
    """Return the published steps, with and without their dropout, and ours with that dropout."""
    kinds = dict.fromkeys(("attention_dropout", "hidden_dropout", "embedding_dropout"), DROPOUT)
    dropping = replace(shape, model=replace(shape.model, **kinds))
    found = []
    for objective in MODELS:
        for dropout in (0.0, DROPOUT):
            build = partial(published, shape, objective, dropout, folder, ranks.device)
            found.append(Contestant("published", objective, False, build, dropout))
    for compile in (False, True) if compiled else (False,):
        build = cache(partial(ours, dropping, compile, ranks))  # one model for both objectives
        found += [Contestant("ours", objective, compile, build, DROPOUT) for objective in MODELS]
    return found


def published(shape: Shape, objective: str, dropout: float, folder: str, device: torch.device) -> Step:
    """Return the published step of an objective, from the weights that all start from."""
    clone = _load(folder, device)
    with _own(folder), contextlib.redirect_stdout(io.StringIO()):
        args = _arguments(clone, shape, dropout)
        clone.globals.set_args(args)
        model = clone.models[objective](clone.arguments.core_transformer_config_from_args(args), parallel_output=True)
        clone.utils.update_rotary_pos_emb(shape.seq_length)
    square = shape.seq_length, shape.seq_length
    hidden = torch.ones(square, dtype=torch.bool, device=device).triu(1)  # from which position, which
    args.attn_mask = (hidden if objective == "ar" else torch.zeros_like(hidden))[None, None]

    start, weights, masters = _weights(shape), [], []
    for name, weight in model.named_parameters():
        weights.append(weight)
        masters.append(nn.Parameter(start.pop(name).to(device, copy=True)))
    assert not start, f"the published model lacks {list(start)}"
    rounded = [weight.data for weight in weights]
    torch._foreach_copy_(rounded, [master.data for master in masters])
    betas = (OPTIMIZER.adam_beta1, OPTIMIZER.adam_beta2)
    options = {"betas": betas, "eps": OPTIMIZER.adam_eps, "weight_decay": OPTIMIZER.weight_decay}
    optimizer = torch.optim.AdamW(masters, **options, fused=True)

    def loss(batch: Batch) -> Tensor:
        positions = torch.arange(shape.seq_length, device=device).expand_as(batch.tokens)
        return model.loss_fn(model((batch.tokens, positions)), ANSWERS[objective](batch))

    def backward(share: Tensor) -> None:
        share.backward()
        for weight, master in zip(weights, masters, strict=True):
            master.grad = weight.grad.float() if master.grad is None else master.grad.add_(weight.grad)
            weight.grad = None

    def step(batches: list[Batch], learning_rate: float) -> tuple[Tensor, Tensor]:
        clone.globals.set_args(args)  # functions of the model ask for them
        mean = accumulate(batches, device, loss, backward)
        norm = nn.utils.clip_grad_norm_(masters, OPTIMIZER.clip_grad)
        update(optimizer, learning_rate)
        torch._foreach_copy_(rounded, [master.data for master in masters])
        return mean, norm

    return step


def _next_token(batch: Batch) -> tuple[Tensor, ...]:
    return batch.targets, batch.weights


def _hidden_tokens(batch: Batch) -> tuple[Tensor, ...]:
    """Return targets, weights of documents, what was hidden and with which probability.

    The published loss divides by all positions; the probabilities take that back where a batch counts fewer.
    """
    share = batch.count / batch.weights.numel()
    return batch.targets, torch.ones_like(batch.weights), batch.weights > 0, share / batch.weights


ANSWERS: dict[str, Callable[[Batch], tuple[Tensor, ...]]] = {"ar": _next_token, "mdm": _hidden_tokens}


def _weights(shape: Shape) -> dict[str, Tensor]:
    """Return our weights by the names of the pipe."""
    weights, layers = shape.ours().state_dict(), shape.model.num_layers
    found = {f"{layer + FIRST}.{name}.weight": [f"layers.{layer}.{part}.weight" for part in parts]
             for layer in range(layers) for name, parts in BLOCK.items()}  # fmt: skip
    found |= {"tied_modules.embed.word_embeddings.weight": ["embed_tokens.weight"]}
    found |= {f"{layers + FIRST}.weight": ["norm.weight"]}
    return {name: torch.cat([weights[part] for part in parts]) for name, parts in found.items()}


def _arguments(clone: SimpleNamespace, shape: Shape, dropout: float):
    """Return what its parser makes of the flags of its training scripts."""
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
    given = sys.argv
    sys.argv = ["", *(str(part) for name, value in flags.items() for part in (f"--{name}", value))]
    sys.argv += [f"--{name}" for name in switches]
    try:
        args = clone.arguments.validate_args(clone.arguments.parse_args())
    finally:
        sys.argv = given
    args.padded_vocab_size = shape.vocabulary.padded_size
    return args


@cache
def _load(folder: str, device: torch.device) -> SimpleNamespace:
    """Import the clone's modules, and have it take over the group of this process."""
    deepspeed = import_deepspeed(device)
    deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", verbose=False)
    with _own(folder), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # its names of what torch calls otherwise by now
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
def _own(folder: str) -> Iterator[None]:
    """Let the names that packages here and there share mean those of the clone meanwhile."""
    ours = _take_modules()
    sys.modules.update(_imported(folder))
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
        _imported(folder).update(_take_modules())
        sys.modules.update(ours)


@cache
def _imported(folder: str) -> dict:
    """Return the modules of the clone that are imported so far, by name."""
    return {}


def _take_modules() -> dict:
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in SHARED}
