"""Training configurations whose peak memory is measured: small models on the CPU, sizes of the ladder on a GPU."""

from dataclasses import dataclass

from megatron.config.sections import Config
from megatron.config.sizes import GPT2_VOCABULARY
from megatron.config.vocabulary import Vocabulary
from megatron.objectives.registry import capabilities
from megatron.parallel.memory_estimate import Memory, peak_memory
from megatron.training.command_line import parse


@dataclass(frozen=True)
class Case:
    """A training configuration: flags, world size, micro-batches per step and rank, vocabulary size, teachers.

    The teachers have the model of the student.
    """

    flags: str
    processes: int = 1
    micro_batches: int = 1
    vocabulary_size: int = 2000
    num_teachers: int = 0

    @property
    def config(self) -> Config:
        """Return the configuration, with the global batch size that `micro_batches` implies."""
        flags = self.flags.split()
        config = parse("ar", flags)
        samples = config.training.micro_batch_size * config.parallel.data_size(self.processes) * self.micro_batches
        return parse("ar", [*flags, "--global-batch-size", str(samples)])

    def formula(self, device: str) -> Memory:
        """Return the memory that the formula predicts on "cpu" or "cuda"."""
        config = self.config
        precision = "fp32" if config.training.fp32 else "bf16"
        return peak_memory(
            config,
            Vocabulary(self.vocabulary_size),
            capabilities(config.objective.objective),
            world_size=self.processes,
            precision=precision,
            device=device,
            teachers=[config.model] * self.num_teachers,
        )


SMALL = "--num-layers 4 --hidden-size 256 --num-attention-heads 4 --seq-length 256 --micro-batch-size 4 --bf16"
# parameters take more memory than activations
SHORT = "--num-layers 4 --hidden-size 256 --num-attention-heads 4 --seq-length 64 --micro-batch-size 1 --bf16"
RICH = (
    "--num-layers 3 --hidden-size 192 --num-attention-heads 6 --group-query-attention --num-query-groups 2 "
    "--qk-layernorm --add-bias-linear --hidden-dropout 0.1 --mlp-dropout 0.1 --untie-embeddings-and-output-weights "
    "--seq-length 256 --micro-batch-size 4 --bf16"
)
DROPOUT = "--hidden-dropout 0.1 --mlp-dropout 0.1 --attention-dropout 0.1"
GELU = "--no-swiglu --normalization layernorm"
TENSOR, PIPELINE = "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"
INTERLEAVED = f"{PIPELINE} --num-layers-per-virtual-pipeline-stage 1"
LOOPS = "--num-loops 3 --loop-layers 1-2"
FULL, SELECTIVE = "--recompute-granularity full", "--recompute-granularity selective"
CPU_CASES = [
    Case(SMALL),
    Case(SMALL, 1, 2),
    Case(SHORT, 1, 4),
    Case(f"{SMALL.replace('--bf16', '--fp32')}"),
    Case(f"{SMALL} {GELU}"),
    Case(SHORT, 1, 1, 20000, num_teachers=2),
    Case(f"{SMALL} {TENSOR}", 2, num_teachers=2),
    Case(f"{SMALL} {FULL}"),
    Case(f"{SMALL} {SELECTIVE}"),
    Case(f"{SMALL} {LOOPS}"),
    Case(f"{SMALL} {LOOPS} {FULL}"),
    *(Case(f"{SHORT} {LOOPS} --zero-stage {stage}", 2) for stage in (1, 3)),
    *(Case(f"{SMALL} --zero-stage {stage}", 2, 2) for stage in (0, 1, 2, 3)),
    *(Case(f"{SHORT} --zero-stage {stage}", 2) for stage in (0, 1, 3)),
    Case(f"{SMALL} {TENSOR}", 2),
    Case(f"{SHORT} {TENSOR}", 2),
    Case(f"{SMALL} {PIPELINE}", 2, 4),
    Case(f"{SHORT} {PIPELINE}", 2, 4),
    Case(f"{SMALL} {PIPELINE} --zero-stage 3", 2, 4),
    Case(f"{SMALL} {INTERLEAVED}", 2, 4),
    Case(f"{SMALL} {PIPELINE} {FULL}", 2, 4),
    Case(RICH, 2, 1, 20000),
    Case(f"{RICH} {TENSOR}", 2, 1, 20000),
    Case(f"{RICH} {PIPELINE}", 2, 3, 20000),
    Case(f"{RICH} --zero-stage 3 {FULL}", 2, 1, 20000),
    Case(f"{SMALL} --zero-stage 3", 4),
    Case(f"{SHORT} --num-distributed-optimizer-instances 2", 4, 2),
    Case(f"{SMALL} {TENSOR} {PIPELINE}", 4, 4),
    Case(f"{SMALL} {TENSOR} {PIPELINE} {FULL}", 4, 4),
    Case(f"{SMALL} {TENSOR} {INTERLEAVED}", 4, 8),
    Case(f"{SMALL} {TENSOR} --zero-stage 3 {SELECTIVE}", 4, 2),
    Case(f"{SMALL} --pipeline-model-parallel-size 4", 4, 8),
    Case(f"{SMALL} {PIPELINE} {FULL} --recompute-num-layers 1", 4, 2),
]
# sizes of the ladder, chosen after the formula was finished: it was not tuned on them
WIDE = "--seq-length 512 --micro-batch-size 2 --bf16"
CPU_CASES += [
    Case(f"--model-size 35M {WIDE}", 1, 3, GPT2_VOCABULARY),
    Case(f"--model-size 35M {WIDE} --micro-batch-size 4 {FULL} --zero-stage 2", 2, 2, GPT2_VOCABULARY),
    Case(f"--model-size 44M {WIDE} {INTERLEAVED} {SELECTIVE} --zero-stage 3", 2, 6, 8000),
    Case(f"--model-size 44M {WIDE} {TENSOR} {FULL} --zero-stage 3 --qk-layernorm {GELU}", 2, 2, 8000),
    Case(f"--model-size 57M {WIDE} {PIPELINE} --untie-embeddings-and-output-weights --hidden-dropout 0.1", 2, 3, 30000),
    Case(
        f"--model-size 20M {WIDE.replace('--bf16', '--fp32')} --zero-stage 3 "
        f"--num-distributed-optimizer-instances 2 {GELU} --add-bias-linear",
        4,
        1,
        GPT2_VOCABULARY,
    ),
    Case(f"--model-size 44M {WIDE} --micro-batch-size 1 {TENSOR} {PIPELINE} {SELECTIVE}", 4, 5, GPT2_VOCABULARY),
]
LADDER_140M = "--model-size 140M --micro-batch-size 8 --bf16"
CUDA_CASES = [
    Case(f"{flags} {extra_flags}", 1, micro_batches, GPT2_VOCABULARY)
    for flags, extra_flags, micro_batches in (
        (LADDER_140M, "", 1),
        (LADDER_140M, "", 4),
        (LADDER_140M, "--zero-stage 3", 4),
        (LADDER_140M, FULL, 1),
        (LADDER_140M, SELECTIVE, 1),
        (LADDER_140M, DROPOUT, 1),
        (LADDER_140M, GELU, 1),
        (LADDER_140M.replace("--bf16", "--fp32"), "", 1),
        ("--model-size 425M --micro-batch-size 8 --bf16", "", 2),
        ("--model-size 1018M --micro-batch-size 4 --bf16", "", 2),
        ("--model-size 1018M --micro-batch-size 8 --bf16", FULL, 2),
        ("--model-size 2283M --micro-batch-size 4 --bf16", FULL, 1),
    )
]
