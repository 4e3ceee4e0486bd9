"""Settings that depend on the machine (precision, kernels, compilation), and the description in config.json."""

import logging
import os
import platform
import shutil
import subprocess
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import torch

import megatron
from megatron.config.capabilities import mask_flags
from megatron.config.flags import require, typed
from megatron.config.resolve import Plan
from megatron.config.sections import Config
from megatron.errors import ConfigurationError
from megatron.model.attention import disable_cudnn_attention
from megatron.objectives.registry import capabilities
from megatron.parallel.float8 import check_float8
from megatron.parallel.mesh import ParallelContext
from megatron.torch_private import cpu_has_bf16, inductor_config

logger = logging.getLogger(__name__)


def choose_precision(config: Config, device: torch.device) -> str:
    """Return "bf16" or "fp32": as the flags state, else bf16 if the device supports it natively."""
    return stated_precision(config) or ("bf16" if native_bf16(device) else "fp32")


def stated_precision(config: Config) -> str | None:
    """Return "bf16" or "fp32" as the flags state, or None if the device decides."""
    training = config.training
    if training.fp8_recipe:
        return "bf16"  # the output type of fp8 matrix products
    if training.bf16 is None and training.fp32 is None:
        return None
    return "bf16" if (not training.fp32 if training.bf16 is None else training.bf16) else "fp32"


def native_bf16(device: torch.device) -> bool:
    """Return whether the device has native bf16 arithmetic."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    return cpu_has_bf16()


def cpp_compiler() -> str | None:
    """Return the C++ compiler that torch.compile would call, or None."""
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def prepare_device(config: Config, device: torch.device) -> None:
    """Make PyTorch use the kernels that `config` requests.

    Raises: ConfigurationError if this device does not support them.
    """
    message = "moves states between a GPU and the host, and there is no GPU; leave it out"
    offloads = config.parallel.cpu_offload and not config.parallel.deepspeed  # DeepSpeed offloads without a GPU too
    require(not offloads or device.type == "cuda", "cpu_offload", True, message)
    check_float8(config, device)
    if mask_flags(config, capabilities(config.objective.objective)):
        disable_cudnn_attention()
    if config.training.deterministic:
        _use_deterministic_kernels(device)
    if config.training.flash_attention:
        _use_flash_attention(config.training.flash_attention, config, device)


def _use_deterministic_kernels(device: torch.device) -> None:
    """Use CUDA kernels with a fixed summation order, so that equal inputs give equal bits; on a CPU they always do.

    PyTorch later raises a RuntimeError that names the operator if one has no deterministic kernel.
    """
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first matrix product
        torch.use_deterministic_algorithms(True)
        # no kernel here reads uninitialised memory
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
        inductor = inductor_config()
        if hasattr(inductor, "deterministic"):
            inductor.deterministic = True  # disables autotuning by timing


# major compute capabilities on which PyTorch supports each version
FLASH_ATTENTION = {"FA3": (9,), "FA4": (9, 10)}


def _use_flash_attention(version: str, config: Config, device: torch.device) -> None:
    """Replace PyTorch's FlashAttention with `version` and disable cuDNN attention, which takes precedence."""
    name = "flash_attention"
    message = "needs an NVIDIA GPU, and this is a CPU; leave it out"
    require(device.type == "cuda", name, version, message)
    generation = torch.cuda.get_device_capability(device)[0]
    message = f"has no kernels for compute capability {generation}.x; leave it out"
    require(generation in FLASH_ATTENTION[version], name, version, message)
    message = f"needs --bf16, and this GPU's default is fp32; give --bf16, or leave {typed(name, version)} out"
    require(choose_precision(config, device) == "bf16", name, version, message)
    check_kernels(config)
    try:
        torch.nn.attention.activate_flash_attention_impl(version)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        fault = str(error).strip().partition("\n")[0]
        message = f"cannot be loaded ({fault}); install its package for this GPU, or leave the flag out"
        raise ConfigurationError(f"{typed(name, version)}: {message}") from None
    disable_cudnn_attention()


def check_kernels(config: Config) -> None:
    """Check that the kernels of --flash-attention support this model; no device is needed.

    Raises: ConfigurationError if they do not.
    """
    name, version = "flash_attention", config.training.flash_attention
    if version is None:
        return
    size = config.model.head_size
    message = f"needs a head size of 8 to 256, a multiple of 8, not {size}; leave it out"
    require(size % 8 == 0 and size <= 256, name, version, message)
    unsupported = mask_flags(config, capabilities(config.objective.objective))
    if config.model.attention_dropout:
        unsupported = {"attention_dropout": config.model.attention_dropout, **unsupported}
    reasons = [typed(flag, value) for flag, value in unsupported.items()]
    message = f"has no dropout and no masks, which {' and '.join(reasons)} needs; leave it out"
    require(not reasons, name, version, message)


# On two CPU cores compiling took 9 to 15 s and shortened a step by an eighth (0.46M parameters, bf16, torch 2.13),
# so it pays off in runs of several minutes; for CUDA, one minute of one device is assumed.
COMPILE_PAYS_AFTER_FLOPS = {"cuda": 1e16, "cpu": 3e13}


def choose_compile(config: Config, plan: Plan, ranks: ParallelContext) -> bool:
    """Return whether to compile the blocks: as --compile states, else if the run is long enough to pay for it."""
    compile = config.training.compile
    if compile is None:
        flops = plan.flops(plan.train_samples, config.data.seq_length) / ranks.size
        compile = flops > COMPILE_PAYS_AFTER_FLOPS[ranks.device.type] and config.parallel.compiles
    if compile and ranks.sum(cpp_compiler() is None) != [0]:  # missing on any node
        logger.info("no C++ compiler is installed: training runs uncompiled; install g++ to compile")
        return False
    return compile


def describe(config, plan, sources, *, vocabulary, ranks, precision, compiled, command) -> dict:
    """Return the contents of config.json: everything that is needed to repeat the run."""
    packages = ["torch", "numpy", "tokenizers", "safetensors"]
    if config.parallel.deepspeed:
        packages.append("deepspeed")
    if config.training.fp8_recipe is not None:
        packages.append("torchao")
    return {
        "objective_name": config.objective.objective,
        "recipe": config.training.recipe,
        **asdict(config),
        "plan": asdict(plan),
        "parameters": plan.parameters,
        "unique_tokens": plan.unique_tokens,
        "unique_tokens_by_data_set": sources.unique_tokens(),
        "train_samples": plan.train_samples,
        "vocabulary_size": vocabulary.size,
        "tokenizer_hash": sources.tokenizer_hash,
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
    """Return the model name of the device; for a CPU, with its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.machine()


def _commit() -> str | None:
    """Return the git commit of this code, with "-dirty" if the tree has changes; None outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
