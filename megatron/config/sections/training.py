"""The training section."""

from dataclasses import dataclass

from megatron.config.flags import Section, flag, require, typed
from megatron.config.recipes import RECIPES


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Section):
    """Training: budget, batch size, precision, and when to stop."""

    recipe: str = flag(
        "default",
        "defaults of all flags: this project's, those of the published system (2507.15857), or what was best on "
        "repeated data in the study; with --help it shows them",
        choices=tuple(RECIPES),
    )
    train_epochs: float | None = flag(
        None,
        "budget in epochs over the unique tokens; give exactly one budget: epochs, samples, iterations or FLOPs",
        within="(0, inf)",
    )
    train_samples: int | None = flag(None, "budget in samples", within="(0, inf)")
    train_iters: int | None = flag(
        None, "budget in iterations, steps of --global-batch-size samples", within="(0, inf)"
    )
    train_flops: float | None = flag(
        None, "budget in FLOPs, 6ND with the embedding counted once", metavar="C", within="(0, inf)"
    )
    micro_batch_size: int = flag(8, "samples of one forward and backward pass on a rank", within="[1, inf)")
    global_batch_size: int = flag(
        256, "samples of one optimizer step over all ranks, with gradient accumulation as needed", within="[1, inf)"
    )
    seed: int = flag(1234, "seed of initial weights, sample order and training noise")
    bf16: bool | None = flag(None, "compute in bfloat16 with fp32 master weights; default where the device supports it")
    fp32: bool | None = flag(None, "compute in fp32; default where the device does not support bfloat16")
    fp8_recipe: str | None = flag(
        None,
        "FP8: compute the matrix products of the blocks in 8-bit floats (torchao), scaled per tensor or per row, the "
        "rest in bf16; faster from about 2B parameters; needs compute capability 8.9; emulated, slowly, on a CPU",
        choices=("tensorwise", "rowwise"),
    )
    flash_attention: str | None = flag(
        None,
        "use the installed FlashAttention 3 or 4 for attention without a mask (CUDA, bf16, no attention dropout); "
        "default the kernel that PyTorch chooses",
        choices=("FA3", "FA4"),
    )
    compile: bool | None = flag(
        None, "compile the blocks with torch.compile; default where the run is long enough to repay it"
    )
    deterministic: bool = flag(
        False, "bitwise reproducible results on CUDA, by slower kernels; on a CPU they always are"
    )
    log_interval: int = flag(10, "steps between training records in metrics.jsonl", within="[1, inf)")
    exit_interval: int | None = flag(None, "save and exit after a step divisible by N", metavar="N", within="(0, inf)")
    exit_duration_in_mins: float | None = flag(
        None,
        "save and exit this many minutes after the start of the command",
        metavar="MINUTES",
        within="(0, inf)",
    )
    kill_switch_file: str | None = flag(None, "save and exit when this file appears", metavar="FILE")
    exit_code_when_stopped: int = flag(
        0,
        "exit code of a run that a signal or one of the three flags above stopped before its end, such as 85, so that "
        "a batch script knows to start the run again; leave it at 0 under torchrun, which restarts a rank that exits "
        "with another code (--max-restarts) and then exits with 1 itself",
        metavar="CODE",
        within="[0, 255]",
    )
    dry_run: bool = flag(
        False, "print the resolved configuration and plan as JSON and exit, after all checks that need no device"
    )

    def __post_init__(self):
        super().__post_init__()
        clash = None not in (self.bf16, self.fp32) and self.bf16 == self.fp32
        require(not clash, "bf16", self.bf16, f"excludes {typed('fp32', self.fp32)}; give one of them")
        against = typed("fp32", True) if self.fp32 else typed("bf16", False) if self.bf16 is False else None
        for name in ("fp8_recipe", "flash_attention"):
            message = f"needs bf16; leave it out, or {against}"
            require(getattr(self, name) is None or against is None, name, getattr(self, name), message)
