"""Flags of the step benchmark, and the model that they describe."""

from dataclasses import dataclass
from math import sqrt

from benchmarks.harness import device_flag, output_flag, require_positive
from benchmarks.training_step import published
from benchmarks.training_step.implementations import Shape
from megatron.config.flags import flag, require, typed
from megatron.config.sections import ModelConfig
from megatron.config.sizes import GPT2_VOCABULARY, ladder_settings
from megatron.config.vocabulary import Vocabulary

CHECK_POSITIONS = 8  # scored per micro-batch of the check
DEFAULT_MODEL = {"num_layers": 6, "hidden_size": 256, "num_attention_heads": 4}
# divided by sqrt(hidden size): large enough that attention and MLP affect the loss of a few positions, not the
# embedding alone; with twice as much, bf16 rounding affects it too in models of 32 blocks
INIT_STD = 0.8


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of this benchmark."""

    model_size: str | None = flag(None, "a size of the ladder, instead of the three flags below", metavar="NAME")
    num_layers: int | None = flag(None, f"number of transformer blocks; default {DEFAULT_MODEL['num_layers']}")
    hidden_size: int | None = flag(
        None,
        f"width of the residual stream, default {DEFAULT_MODEL['hidden_size']}; the SwiGLU MLP has floor(8h/3/64)*64",
    )
    num_attention_heads: int | None = flag(None, f"number of heads; default {DEFAULT_MODEL['num_attention_heads']}")
    vocab_size: int = flag(
        GPT2_VOCABULARY, "vocabulary size of the tokenizer; [MASK] is added, then padded to a multiple of 128"
    )
    seq_length: int = flag(512, "tokens per sample")
    micro_batch_size: int = flag(2, "samples per micro-batch")
    micro_batches: int = flag(1, "micro-batches per step")
    rounds: int = flag(9, "rounds; a round times every implementation once")
    steps: int = flag(2, "steps of an implementation per round")
    device: str | None = device_flag()
    only: tuple[str, ...] = flag(
        (), 'implementations to run, names with wildcards, as in --only "ours *" "* AR compiled"', metavar="PATTERN"
    )
    compile: bool = flag(True, "also time the compiled implementations")
    require_peers: bool = flag(False, "fail if a peer is not installed, instead of skipping it")
    published: str | None = flag(
        None, f"folder of a clone of {published.REPOSITORY}; also time its model", metavar="DIR"
    )
    time_limit: float | None = flag(
        None,
        "seconds; after 70% of them no other implementation is warmed up, after 90% no other round begins",
        metavar="SECONDS",
    )
    output: str | None = output_flag()
    tables: bool = flag(True, "with --output, write the tables next to it as .md")

    def __post_init__(self):
        require_positive(self, ("vocab_size", "seq_length", "micro_batch_size", "micro_batches", "rounds", "steps"))
        tokens = self.micro_batch_size * self.seq_length
        require(
            tokens >= CHECK_POSITIONS,
            "seq_length",
            self.seq_length,
            f"gives fewer than {CHECK_POSITIONS} tokens per micro-batch; give more",
        )
        model_flags = [typed(name, getattr(self, name)) for name in DEFAULT_MODEL if getattr(self, name) is not None]
        conflict = f"sets layers, width and heads; leave out {' and '.join(model_flags)}"
        require(self.model_size is None or not model_flags, "model_size", self.model_size, conflict)


def shape_of(options: Options) -> Shape:
    """Return the model and sequence length that the flags describe."""
    if options.model_size is not None:
        settings = ladder_settings(options.model_size)
    else:
        flags = {name: getattr(options, name) for name in DEFAULT_MODEL}
        settings = DEFAULT_MODEL | {name: value for name, value in flags.items() if value is not None}
    model = ModelConfig(**settings, init_method_std=INIT_STD / sqrt(max(1, settings["hidden_size"])))
    return Shape(model, Vocabulary(options.vocab_size), options.seq_length)
