"""What the machine decides, and what config.json says of it: precision, compilation, versions."""

import logging
import os
import platform
import shutil
import subprocess
from dataclasses import asdict
from importlib import import_module, metadata
from pathlib import Path

import torch

import megatron
from megatron.config.flags import require, typed
from megatron.config.resolve import Plan
from megatron.config.sections import Config
from megatron.errors import ConfigurationError
from megatron.parallel.float8 import check_float8
from megatron.parallel.mesh import ParallelContext

logger = logging.getLogger(__name__)


def choose_precision(config: Config, device: torch.device) -> str:
    """Return "bf16" or "fp32", what is computed in: by the flags, else bf16 where the device has it natively."""
    return stated_precision(config) or ("bf16" if native_bf16(device) else "fp32")


def stated_precision(config: Config) -> str | None:
    """Return "bf16" or "fp32" as the flags say, or None where the device decides."""
    training = config.training
    if training.fp8_recipe:
        return "bf16"  # what 8-bit products give
    if training.bf16 is None and training.fp32 is None:
        return None
    return "bf16" if (not training.fp32 if training.bf16 is None else training.bf16) else "fp32"


def native_bf16(device: torch.device) -> bool:
    """Return whether the device computes in bf16 itself."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def cpp_compiler() -> str | None:
    """Return the C++ compiler that torch.compile would call, or None."""
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def prepare_device(config: Config, device: torch.device) -> None:
    """Have PyTorch use the kernels that `config` asks for; raise ConfigurationError where this device has none."""
    rule = "moves states between a GPU and the host, and there is no GPU; leave it out"
    offloads = config.parallel.cpu_offload and not config.parallel.deepspeed  # which does without a GPU
    require(not offloads or device.type == "cuda", "cpu_offload", True, rule)
    check_float8(config, device)
    if config.training.deterministic:
        _be_deterministic(device)
    if config.training.flash_attention:
        _take_flash_attention(config, device)


def _be_deterministic(device: torch.device) -> None:
    """Have every kernel add up in a fixed order, so that equal inputs give equal bits; a CPU does so anyway.

    PyTorch raises RuntimeError, which names the operator, where there is no such kernel.
    """
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first product
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing reads what was not written
        if hasattr(inductor := import_module("torch._inductor.config"), "deterministic"):
            inductor.deterministic = True  # it chooses no kernel by the clock then


# generations of GPUs that PyTorch calls each version on
FLASH_ATTENTION = {"FA3": (9,), "FA4": (9, 10)}


def _take_flash_attention(config: Config, device: torch.device) -> None:
    """Put FlashAttention 3 or 4 in the place of PyTorch's own version, and before cuDNN's attention."""
    name, version = "flash_attention", config.training.flash_attention
    rule = "needs an NVIDIA GPU, and this is a CPU; leave it out"
    require(device.type == "cuda", name, version, rule)
    generation = torch.cuda.get_device_capability(device)[0]
    rule = f"has no kernels for compute capability {generation}.x; leave it out"
    require(generation in FLASH_ATTENTION[version], name, version, rule)
    rule = f"needs --bf16, and this GPU's default is fp32; give --bf16, or leave {typed(name, version)} out"
    require(choose_precision(config, device) == "bf16", name, version, rule)
    check_kernels(config)
    try:
        torch.nn.attention.activate_flash_attention_impl(version)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        fault = str(error).strip().partition("\n")[0]
        rule = f"cannot be loaded ({fault}); install its package for this GPU, or leave the flag out"
        raise ConfigurationError(f"{typed(name, version)}: {rule}") from None
    torch.backends.cuda.enable_cudnn_sdp(False)  # PyTorch would prefer it


def check_kernels(config: Config) -> None:
    """Raise ConfigurationError for a --flash-attention whose kernels cannot compute this model on any device."""
    name, version = "flash_attention", config.training.flash_attention
    if version is None:
        return
    size = config.model.head_size
    rule = f"needs heads of 8 to 256, in eights, not {size}; leave it out"
    require(size % 8 == 0 and size <= 256, name, version, rule)
    objective = config.objective
    asked = {
        "attention_dropout": config.model.attention_dropout,
        "reset_attention_mask": config.data.reset_attention_mask,
        "randmask_ratio": objective.randmask_ratio,
        "objective": objective.objective == "block-diffusion" and objective.objective,
    }
    reasons = [typed(flag, value) for flag, value in asked.items() if value]
    rule = f"has no dropout and no masks, which {' and '.join(reasons)} needs; leave it out"
    require(not reasons, name, version, rule)


# On two CPU cores compiling cost 9 to 15 s and then took an eighth off a step (0.46M parameters, bf16, torch 2.13),
# so a run of some minutes gets it back; for CUDA, a minute of one device is assumed.
COMPILE_PAYS_AFTER_FLOPS = {"cuda": 1e16, "cpu": 3e13}


def choose_compile(config: Config, plan: Plan, ranks: ParallelContext) -> bool:
    """Return whether to compile the blocks: as asked, else where a long run pays for the warm-up."""
    wanted = config.training.compile
    kind = ranks.device.type
    if wanted is None:
        flops = plan.flops(plan.train_samples, config.data.seq_length) / ranks.size
        wanted = flops > COMPILE_PAYS_AFTER_FLOPS[kind] and config.parallel.compiles
    if wanted and ranks.sum(cpp_compiler() is None) != [0]:  # on any node
        logger.info("no C++ compiler is installed: training runs eager; install g++ to compile")
        return False
    return wanted


def describe(objective, config, plan, sources, vocabulary, ranks, precision, compiled, command) -> dict:
    """Return what config.json says: everything that is needed to repeat the run."""
    packages = ("torch", "numpy", "tokenizers", "safetensors", *["deepspeed"] * config.parallel.deepspeed)
    packages += ("torchao",) * (config.training.fp8_recipe is not None)
    return {
        "objective_name": objective,
        "recipe": config.training.recipe,
        **asdict(config),
        "plan": asdict(plan),
        "parameters": plan.parameters,
        "unique_tokens": plan.unique_tokens,
        "train_samples": plan.train_samples,
        "vocabulary_size": vocabulary.size,
        "corpus_hash": sources.corpus_hash,
        "corpus_source": sources.corpus_source,
        "corpus_python_version": sources.corpus_python_version,
        "shared_13grams": sources.shared_13grams,
        "fingerprints": sources.fingerprints,
        "precision": precision,
        "compiled": compiled,
        "device": device_name(ranks.device),
        "processes": ranks.size,
        "command": command,
        "commit": _commit(),
        "versions": {
            "python": platform.python_version(),
            "megatron": megatron.__version__,
            **{name: metadata.version(name) for name in packages},
        },
    }


def device_name(device: torch.device) -> str:
    """Return what the device calls itself; for the CPU with the number of its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    told = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in told.splitlines() if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.machine()


def _commit() -> str | None:
    """Return the commit of this code, marked where the tree differs from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
