"""The sections of a run's configuration. Each field is one command-line flag; each section checks its own fields.

Checks that need two sections stand in `resolve.py`.
"""

from dataclasses import dataclass
from math import isfinite

from megatron.config.flags import flag, one_namespace, require, spelling, typed
from megatron.config.recipes import RECIPES


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Model: a decoder of the Llama family, causal or bidirectional."""

    model_size: str | None = flag(
        None, "a size of the published ladder, such as 140M: layers, width, heads; flags beside it win", metavar="NAME"
    )
    num_layers: int = flag(help="number of transformer blocks")
    hidden_size: int = flag(help="width of the residual stream")
    num_attention_heads: int = flag(help="number of query heads")
    kv_channels: int | None = flag(
        None, "width of one head, any even number; default --hidden-size / --num-attention-heads"
    )
    group_query_attention: bool = flag(
        False, "let several query heads share one key/value head; how many: --num-query-groups"
    )
    num_query_groups: int | None = flag(None, "number of key/value heads; needs --group-query-attention")
    ffn_hidden_size: int | None = flag(
        None,
        "width of the MLP; default floor(8h/3/64)*64 (at least 64) with SwiGLU and 4h with GELU, h = --hidden-size",
    )
    swiglu: bool = flag(True, "SwiGLU MLP; --no-swiglu is GELU")
    normalization: str = flag("rmsnorm", "normalisation layer", choices=("rmsnorm", "layernorm"))
    norm_epsilon: float = flag(1e-5, "epsilon of the normalisation")
    qk_layernorm: bool = flag(False, "normalise queries and keys per head before the rotation, as Qwen3 does")
    rotary_base: float = flag(10000.0, "base of the rotary frequencies")
    add_bias_linear: bool = flag(False, "biases in the linear layers")
    untie_embeddings_and_output_weights: bool = flag(False, "give the output head its own matrix")
    softmax_over_padding: bool = flag(
        False,
        "let [MASK] and the unused rows of the padded vocabulary take part in the softmax of training and validation",
    )
    init_method_std: float = flag(
        0.02, "standard deviation of initial weights; output projections take it / sqrt(2 * --num-layers)"
    )
    attention_dropout: float = flag(0.0, "dropout of attention probabilities")
    hidden_dropout: float = flag(0.0, "dropout of what attention and MLP add to the residual stream")
    mlp_dropout: float = flag(0.0, "dropout inside the MLP, after its activation")
    embedding_dropout: float = flag(0.0, "dropout of the embedded tokens")
    label_smoothing: float = flag(
        0.0, "share E of the training loss that asks for all ids alike: (1 - E) nll + E mean of -log p", metavar="E"
    )
    z_loss: float = flag(0.0, "add this times log(Z)^2 to the training loss, Z the normaliser of the softmax")

    def __post_init__(self):
        for name in ("num_layers", "hidden_size", "num_attention_heads"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        for name in ("kv_channels", "num_query_groups", "ffn_hidden_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "must be at least 1; leave it out for the default")
        for name in ("norm_epsilon", "rotary_base", "init_method_std"):
            require(getattr(self, name) > 0, name, getattr(self, name), "must be positive")
        for name in ("attention_dropout", "hidden_dropout", "mlp_dropout", "embedding_dropout"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "a dropout probability lies in [0, 1)")
        require(0 <= self.label_smoothing < 1, "label_smoothing", self.label_smoothing, "is a share in [0, 1)")
        require(self.z_loss >= 0, "z_loss", self.z_loss, "must not be negative")
        require(
            self.kv_channels is not None or self.hidden_size % self.num_attention_heads == 0,
            "hidden_size",
            self.hidden_size,
            f"is not a multiple of --num-attention-heads {self.num_attention_heads}; change one or give --kv-channels",
        )
        require(
            self.head_size % 2 == 0,
            "kv_channels" if self.kv_channels else "hidden_size",
            self.kv_channels or self.hidden_size,
            f"makes heads of width {self.head_size}, and rotary embeddings need an even one; change it",
        )
        groups = self.num_query_groups
        require(
            groups is None or self.group_query_attention,
            "num_query_groups",
            groups,
            "needs --group-query-attention; give both or neither",
        )
        require(
            groups is not None or not self.group_query_attention,
            "group_query_attention",
            True,
            "needs --num-query-groups; give both or neither",
        )
        require(
            self.num_attention_heads % self.key_value_heads == 0,
            "num_query_groups",
            groups,
            f"does not divide --num-attention-heads {self.num_attention_heads}; change one",
        )

    @property
    def head_size(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def key_value_heads(self) -> int:
        return self.num_query_groups or self.num_attention_heads

    @property
    def mlp_size(self) -> int:
        if self.ffn_hidden_size:
            return self.ffn_hidden_size
        # the published ladder's rule; see "What Makes ... Data-Constrained Settings", 2507.15857, appendix 8
        return max(64, 8 * self.hidden_size // 3 // 64 * 64) if self.swiglu else 4 * self.hidden_size


SENTENCE_PIECE = ("GPTSentencePieceTokenizer", "SentencePieceTokenizer")
TOKENIZERS = ("HFTokenizer", "GPT2BPETokenizer", *SENTENCE_PIECE, "ByteTokenizer", "NullTokenizer")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Data: tokenised documents, how often they are seen and in which order."""

    train_data_path: tuple[str, ...] = flag(
        (),
        "training data: a prefix of PREFIX.bin and PREFIX.idx, or weight prefix weight prefix ... to blend several",
        metavar="[WEIGHT] PREFIX",
    )
    train_data_path_file: str | None = flag(
        None, 'the same in a file: one line of "weight prefix" "weight prefix", or one a line', metavar="FILE"
    )
    valid_data_path: tuple[str, ...] = flag(
        (),
        "held-out data: the same, or name=prefix for each of several sets; the first decides which checkpoint is best",
        metavar="[NAME=]PREFIX",
    )
    valid_data_path_file: str | None = flag(None, "the same in a file", metavar="FILE")
    split: str | None = flag(
        None,
        "hold out documents of the training data, in file order: shares of training, validation and test, such as "
        "969,30,1; test is read by --skip-train only, and neither is where --valid-data-path names other data",
        metavar="A,B,C",
    )
    seq_length: int = flag(2048, "tokens of one sample")
    train_unique_tokens: int | None = flag(None, "train on the first N tokens only, the last document cut; default all")
    epoch_order: str = flag(
        "documents",
        "documents: shuffled and packed anew every epoch; windows: fixed cuts at an offset redrawn every epoch; "
        "megatron: as Megatron orders them, which mixes the epochs and depends on the budget",
        choices=("documents", "windows", "megatron"),
    )
    blend_order: str = flag(
        "due-time",
        "how a training blend deals samples to its members, in their shares either way; due-time: the next sample of "
        "each is due after 1/share samples; megatron: to the member furthest behind its share, as Megatron",
        choices=("due-time", "megatron"),
    )
    reset_attention_mask: bool = flag(False, "let documents of one sample not see one another")
    reset_position_ids: bool = flag(False, "count positions from the begin of each document")
    eod_mask_loss: bool = flag(False, "do not ask for the first token of a document, which follows another one's end")
    tokenizer_type: str = flag(
        "HFTokenizer",
        f"the tokenizer that made the data: {', '.join(TOKENIZERS)}",
        choices=TOKENIZERS,
        metavar="NAME",
    )
    tokenizer_model: str | None = flag(
        None,
        "tokenizer.json of an HFTokenizer or tokenizer.model of a SentencePiece one; default the one beside the data",
        metavar="FILE",
    )
    vocab_size: int | None = flag(None, "number of ids of a NullTokenizer, which adds one for end-of-document")
    vocab_file: str | None = flag(
        None, "vocab.json of a GPT2BPETokenizer, which it implies where no --tokenizer-type is given", metavar="FILE"
    )
    merge_file: str | None = flag(None, "merges.txt of a GPT2BPETokenizer, likewise", metavar="FILE")
    num_workers: int = flag(0, "data loader processes; 0 reads in the training process")

    def __post_init__(self):
        require(self.seq_length >= 2, "seq_length", self.seq_length, "must be at least 2")
        require(self.num_workers >= 0, "num_workers", self.num_workers, "must not be negative")
        unique = self.train_unique_tokens
        require(unique is None or unique > 0, "train_unique_tokens", unique, "must be positive")
        for name in ("train_data_path", "valid_data_path"):
            path = getattr(self, f"{name}_file")
            both = path is not None and getattr(self, name)
            require(not both, f"{name}_file", path, f"excludes {typed(name, getattr(self, name))}; give one of them")
        shares = self.split_shares
        sound = 1 <= len(shares) <= 3 and all(isfinite(share) and share >= 0 for share in shares) and shares[0] > 0
        rule = "give up to three shares, none negative, the first positive: 969,30,1"
        require(self.split is None or sound, "split", self.split, rule)
        check_tokenizer(self)

    @property
    def holds_out(self) -> bool:
        """Whether there is a set to validate on."""
        return bool(self.valid_data_path or self.valid_data_path_file or any(self.split_shares[1:2]))

    @property
    def split_shares(self) -> list[float]:
        """The numbers of --split, [] without it or where it holds something else."""
        try:
            return [float(share) for share in self.split.split(",")] if self.split else []
        except ValueError:
            return []


def check_tokenizer(section) -> None:
    """Check the tokenizer's flags, which training and preprocessing share: each type has its own."""
    kind = section.tokenizer_type
    needed = {"NullTokenizer": ("vocab_size",), "GPT2BPETokenizer": ("vocab_file", "merge_file")}
    owners = {
        "tokenizer_model": ("HFTokenizer", *SENTENCE_PIECE),
        "vocab_size": ("NullTokenizer",),
        "vocab_file": ("GPT2BPETokenizer",),
        "merge_file": ("GPT2BPETokenizer",),
    }
    required = needed.get(kind, ())
    absent = [name for name in required if getattr(section, name) is None]
    for name in required:  # the type may be implied by one of its two files: name what was given
        value = getattr(section, name)
        require(value is None or not absent, name, value, f"needs {' and '.join(map(spelling, absent))}; give both")
    rule = f"needs {' and '.join(map(spelling, required))}; give {'both' if len(required) > 1 else 'it'}"
    require(not absent, "tokenizer_type", kind, rule)
    for name, kinds in owners.items():
        value = getattr(section, name)
        rule = f"belongs to {', '.join(kinds)}, and --tokenizer-type is {kind}; leave it out, or give "
        require(value is None or kind in kinds, name, value, f"{rule}--tokenizer-type {kinds[0]}")
    size = section.vocab_size
    require(size is None or size >= 1, "vocab_size", size, "must be at least 1")


def implied_tokenizer(given: set[str]) -> dict:
    """Return the settings that --vocab-file and --merge-file imply among the flags `given`: GPT-2's tokenizer."""
    if "--tokenizer-type" in given or not given & {"--vocab-file", "--merge-file"}:
        return {}
    return {"tokenizer_type": "GPT2BPETokenizer", "tokenizer_model": None, "vocab_size": None}


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Objective: what the network is asked, and noise on what it reads. Noise acts in training, never in validation."""

    objective: str = flag(
        "ar",
        "ar: the next token; mdm: masked diffusion; dual: both, on one network; any-order: the next token of a random "
        "order; block-diffusion: blocks in order, each by masked diffusion",
        choices=("ar", "mdm", "dual", "any-order", "block-diffusion"),
    )
    mask_times: str = flag(
        "stratified",
        "masked diffusion: how the time t of a sequence, its share of masked tokens, is drawn from U(0, 1)",
        choices=("stratified", "iid"),
    )
    mask_eps: float = flag(1e-3, "masked diffusion: a token is masked with probability (1 - eps) t + eps")
    ar_ratio: float = flag(0.0, "masked diffusion: share of sequences that mask as many tokens at their end instead")
    low_noise_samples: int = flag(0, "masked diffusion: multiply t by --low-noise-ratio in the first N samples")
    low_noise_ratio: float = flag(0.5, "masked diffusion: factor of t in the first --low-noise-samples")
    causal_ratio: float = flag(0.5, "dual: share of the samples of a step that predict the next token")
    diffusion_block_size: int = flag(16, "block diffusion: tokens of a block")
    num_order_list: int = flag(1, "ar: read each sequence in one of N orders, the first of them left to right")
    use_predefined_order: bool = flag(False, "ar: the k-th order sorts places i by i + k N(0, 1); else it is uniform")
    right_to_left_ratio: float = flag(0.0, "ar: share of sequences that are read from right to left")
    target_offset_max: int = flag(1, "ar: ask each sequence for the i-th next token, i drawn from 1..N")
    target_positions: bool = flag(
        False, "ar: tell the network the place of the token it must say, as the rotary position of its queries"
    )
    token_dropout: float = flag(
        0.0, "autoregressive: replace this share of input tokens by [MASK] and keep the targets"
    )
    token_dropout_max: float = flag(
        0.0, "autoregressive: the same with a share drawn from U(0, R) for every sequence", metavar="R"
    )
    random_replacement: float = flag(0.0, "autoregressive: replace this share of input tokens by random ones")
    masked_input_weight: float = flag(
        0.0, "autoregressive: add the loss on masked inputs, times this weight, by a second pass; doubles the compute"
    )
    masked_input_max: float = flag(0.5, "autoregressive: its share of masked inputs is drawn from U(0, R)", metavar="R")
    randmask_ratio: float = flag(
        0.0, "autoregressive: share of positions that miss a random share, U(0, 1), of the keys they could see"
    )
    stochastic_depth: float = flag(0.0, "share of sequences that skip the last block; linearly fewer skip earlier ones")

    def __post_init__(self):
        require(0 < self.mask_eps < 1, "mask_eps", self.mask_eps, "lies in (0, 1)")
        shares = ("token_dropout", "token_dropout_max", "random_replacement", "masked_input_max", "randmask_ratio")
        for name in (*shares, "ar_ratio", "right_to_left_ratio", "causal_ratio", "low_noise_ratio"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "is a share in [0, 1]")
        require(0 <= self.stochastic_depth < 1, "stochastic_depth", self.stochastic_depth, "lies in [0, 1)")
        for name in ("low_noise_samples", "masked_input_weight"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        for name in ("diffusion_block_size", "num_order_list", "target_offset_max"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        for name, other in (
            ("token_dropout", "token_dropout_max"),
            ("masked_input_weight", "token_dropout"),
            ("masked_input_weight", "token_dropout_max"),
            ("right_to_left_ratio", "num_order_list"),
        ):
            value, beside = getattr(self, name), getattr(self, other)
            both = value and beside != getattr(ObjectiveConfig, other)
            require(not both, name, value, f"excludes {typed(other, beside)}; give one of them")
        for name, needed in (
            ("use_predefined_order", "num_order_list"),
            ("low_noise_ratio", "low_noise_samples"),
            ("masked_input_max", "masked_input_weight"),
        ):
            value, usual = getattr(self, name), getattr(ObjectiveConfig, name)
            met = value == usual or getattr(self, needed) != getattr(ObjectiveConfig, needed)
            require(met, name, value, f"does nothing without {spelling(needed)}; give both or neither")
        offset, told = self.target_offset_max, self.target_positions
        rule = "needs --target-positions, or the network cannot know which token it is asked for; give both"
        require(offset == 1 or told, "target_offset_max", offset, rule)

    @property
    def passes(self) -> int:
        """How often the tokens of a sample go through the network, forward and backward."""
        return 2 if self.masked_input_weight or self.objective == "block-diffusion" else 1

    def positions(self, seq_length: int) -> int:
        """Return the positions of one pass: block diffusion reads a sample and its masked form at once."""
        return seq_length * (2 if self.objective == "block-diffusion" else 1)

    def causal_samples(self, block: int) -> int:
        """Return how many of `block` samples predict the next token under the dual objective."""
        return round(self.causal_ratio * block)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer and schedule: AdamW or Muon, with the clock in samples."""

    optimizer: str = flag(
        "adamw",
        "muon: orthogonal updates of the matrices of the blocks, of AdamW's size, so that --lr serves both; AdamW for "
        "embedding, head and vectors",
        choices=("adamw", "muon"),
    )
    lr: float = flag(2e-4, "peak learning rate")
    min_lr: float | None = flag(None, "final learning rate; default a tenth of the peak")
    lr_decay_style: str = flag(
        "cosine",
        "shape of the learning rate after the warm-up; WSD stays at the peak and decays at the end",
        choices=("cosine", "linear", "constant", "WSD"),
    )
    lr_warmup_samples: int | None = flag(None, "samples of linear warm-up; default 1% of the budget")
    lr_decay_samples: int | None = flag(None, "samples until the final rate; default the whole budget")
    lr_wsd_decay_samples: int | None = flag(None, "samples of the final decay of WSD; default 10% of the budget")
    weight_decay: float = flag(0.1, "decoupled weight decay")
    weight_decay_incr_style: str = flag(
        "constant",
        "constant: --weight-decay; linear, cosine: from --start-weight-decay to --end-weight-decay over the budget",
        choices=("constant", "linear", "cosine"),
    )
    start_weight_decay: float | None = flag(None, "weight decay at the start, where it changes")
    end_weight_decay: float | None = flag(None, "weight decay at the end, where it changes")
    weight_decay_parameters: str = flag(
        "matrices",
        "what decays; hidden: matrices of the blocks; matrices: embedding and head too; all: biases and norms too",
        choices=("hidden", "matrices", "all"),
    )
    adam_beta1: float = flag(0.9, "decay of the first moment")
    adam_beta2: float = flag(0.95, "decay of the second moment")
    adam_eps: float = flag(1e-8, "epsilon of AdamW")
    muon_momentum: float = flag(0.95, "Nesterov momentum of Muon")
    clip_grad: float = flag(1.0, "scale gradients down to this global norm; 0 does not clip")
    ema_decay: float | None = flag(
        None, "evaluate an exponential moving average of the weights too, which keeps D of itself a step", metavar="D"
    )
    average_from_samples: int | None = flag(
        None, "evaluate the mean of the weights after every step from N consumed samples on too", metavar="N"
    )

    def __post_init__(self):
        require(self.lr > 0, "lr", self.lr, "must be positive")
        require(
            self.min_lr is None or 0 <= self.min_lr <= self.lr, "min_lr", self.min_lr, f"lies in [0, --lr {self.lr}]"
        )
        for name in ("weight_decay", "start_weight_decay", "end_weight_decay", "clip_grad"):
            value = getattr(self, name)
            require(value is None or value >= 0, name, value, "must not be negative")
        self._check_changing_weight_decay()
        for name in ("adam_beta1", "adam_beta2", "muon_momentum"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "lies in [0, 1)")
        momentum = self.muon_momentum
        idle = self.optimizer != "muon" and momentum != OptimizerConfig.muon_momentum
        require(not idle, "muon_momentum", momentum, "does nothing without --optimizer muon; give both or neither")
        decay, begin = self.ema_decay, self.average_from_samples
        require(decay is None or 0 < decay < 1, "ema_decay", decay, "lies in (0, 1)")
        require(begin is None or begin >= 0, "average_from_samples", begin, "must not be negative")
        rule = f"excludes --average-from-samples {begin}; give one of them"
        require(decay is None or begin is None, "ema_decay", decay, rule)
        require(self.adam_eps > 0, "adam_eps", self.adam_eps, "must be positive")
        warmup = self.lr_warmup_samples
        require(warmup is None or warmup >= 0, "lr_warmup_samples", warmup, "must not be negative")
        for name in ("lr_decay_samples", "lr_wsd_decay_samples"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "must be at least 1; leave it out for the default")
        for name in ("min_lr", "lr_decay_samples"):
            idle = getattr(self, name) is not None and self.lr_decay_style == "constant"
            require(not idle, name, getattr(self, name), "does nothing with --lr-decay-style constant; drop one")
        wsd = self.lr_wsd_decay_samples
        rule = "needs --lr-decay-style WSD; give both or neither"
        require(wsd is None or self.lr_decay_style == "WSD", "lr_wsd_decay_samples", wsd, rule)

    def _check_changing_weight_decay(self) -> None:
        style, decay = self.weight_decay_incr_style, self.weight_decay
        constant, ends = style == "constant", ("start_weight_decay", "end_weight_decay")
        for name, value in ((name, getattr(self, name)) for name in ends):
            rule = "does nothing with --weight-decay-incr-style constant; give linear or cosine, or leave it out"
            require(value is None or not constant, name, value, rule)
            needed = f"needs {spelling(name)}; give it"
            require(value is not None or constant, "weight_decay_incr_style", style, needed)
        rule = f"does nothing with --weight-decay-incr-style {style}, which has a start and an end; leave it out"
        require(constant or decay == OptimizerConfig.weight_decay, "weight_decay", decay, rule)

    @property
    def averages(self) -> bool:
        """Whether an average of the weights is kept."""
        return self.ema_decay is not None or self.average_from_samples is not None

    @property
    def final_lr(self) -> float:
        return self.lr / 10 if self.min_lr is None else self.min_lr


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Training: budget, batch, precision, and when to leave."""

    recipe: str = flag(
        "default",
        "defaults of all flags: ours, or those of the published system (2507.15857); --help beside it shows them",
        choices=tuple(RECIPES),
    )
    train_epochs: float | None = flag(
        None, "budget in epochs of the unique tokens; the budget is given by exactly one --train-X"
    )
    train_samples: int | None = flag(None, "budget in samples")
    train_iters: int | None = flag(None, "budget in steps of --global-batch-size samples")
    train_flops: float | None = flag(None, "budget in FLOPs, 6ND with the embedding counted once")
    micro_batch_size: int = flag(8, "samples one process computes at a time")
    global_batch_size: int = flag(256, "samples of one optimizer step over all processes")
    seed: int = flag(1234, "seed of weights, order and training noise")
    bf16: bool | None = flag(None, "compute in bfloat16 over fp32 master weights; default where the device has it")
    fp32: bool | None = flag(None, "compute in fp32; default where the device has no bfloat16")
    fp8_recipe: str | None = flag(
        None,
        "compute the matrix products of the blocks in 8-bit floats (torchao), scaled by tensor or by row, over bf16; "
        "pays from about 2B parameters; needs compute capability 8.9, and is emulated, slowly, on a CPU",
        choices=("tensorwise", "rowwise"),
    )
    flash_attention: str | None = flag(
        None,
        "compute attention without a mask by the FlashAttention 3 or 4 that is installed (CUDA, bf16, no dropout in "
        "attention); default the kernel PyTorch chooses",
        choices=("FA3", "FA4"),
    )
    compile: bool | None = flag(None, "compile the blocks; default where the length of the run pays for it")
    deterministic: bool = flag(
        False, "on CUDA too, equal results to the last bit at every start, by slower kernels; a CPU always gives them"
    )
    log_interval: int = flag(10, "steps between two training records in metrics.jsonl")
    exit_interval: int | None = flag(None, "save and leave after a step divisible by N", metavar="N")
    exit_duration_in_mins: float | None = flag(None, "save and leave after so many minutes")
    kill_switch_file: str | None = flag(None, "save and leave when this file appears", metavar="FILE")
    exit_code_when_stopped: int = flag(
        0,
        "exit code of a run that a signal or one of the three flags above stopped before its end, such as 85, by which "
        "a batch script knows that it has to start the run again; leave it at 0 under torchrun, which restarts a rank "
        "that exits with another code (--max-restarts) and then exits with 1 itself",
        metavar="N",
    )
    dry_run: bool = flag(False, "print the resolved run as JSON and exit, after all checks that need no device")

    def __post_init__(self):
        for name in ("micro_batch_size", "global_batch_size", "log_interval"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        positive = ("train_epochs", "train_samples", "train_iters", "train_flops")
        for name in (*positive, "exit_interval", "exit_duration_in_mins"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "must be positive")
        code = self.exit_code_when_stopped
        require(0 <= code <= 255, "exit_code_when_stopped", code, "is not an exit code from 0 to 255")
        clash = None not in (self.bf16, self.fp32) and self.bf16 == self.fp32
        require(not clash, "bf16", self.bf16, f"excludes {typed('fp32', self.fp32)}; give one of them")
        against = typed("fp32", True) if self.fp32 else typed("bf16", False) if self.bf16 is False else None
        for name in ("fp8_recipe", "flash_attention"):
            rule = f"needs bf16; leave it out, or {against}"
            require(getattr(self, name) is None or against is None, name, getattr(self, name), rule)


WITHOUT_DEEPSPEED = "leave it out, or --deepspeed and --deepspeed-config"


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Parallel layout: how the processes share one model. It changes speed and memory, not the run."""

    tensor_model_parallel_size: int = flag(
        1, "processes that share each layer, and the sequence between layers; divides heads and --seq-length"
    )
    pipeline_model_parallel_size: int = flag(
        1, "stages of consecutive layers; a step needs at least as many micro-batches"
    )
    num_layers_per_virtual_pipeline_stage: int | None = flag(
        None, "layers of one of several stages that a process has (interleaved 1F1B); default one stage a process"
    )
    zero_stage: int | None = flag(
        None,
        "what the data-parallel processes share: 0 nothing, 1 optimizer states and master weights, 2 gradients too, "
        "3 the weights in use too; default 1, or what --deepspeed-config says",
    )
    num_distributed_optimizer_instances: int = flag(
        1,
        "replicas of what --zero-stage shares, such as one a node; each is shared by data-parallel size / N",
        metavar="N",
    )
    cpu_offload: bool = flag(
        False,
        "keep master weights, gradients and optimizer states in the host's memory (CUDA); with --deepspeed its "
        "offload_optimizer, which --deepspeed-config can configure further",
    )
    deepspeed: bool = flag(False, "share the model by DeepSpeed in place of FSDP2; bash install.sh --with-deepspeed")
    deepspeed_config: str | None = flag(
        None, "DeepSpeed's JSON file; what it says beside flags here must agree with them", metavar="FILE"
    )
    recompute_granularity: str | None = flag(
        None,
        "full: compute whole blocks again in the backward pass; selective: all but matrix products and attention; "
        "default nothing",
        choices=("full", "selective"),
    )
    recompute_num_layers: int | None = flag(None, "blocks of each stage that recompute, from its first; default all")
    distributed_timeout_minutes: float = flag(
        10.0, "how long processes wait for one another, at the start and in a collective, before all of them leave"
    )

    def __post_init__(self):
        for name in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "num_layers_per_virtual_pipeline_stage",
            "num_distributed_optimizer_instances",
            "recompute_num_layers",
        ):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "must be at least 1")
        minutes = self.distributed_timeout_minutes
        require(minutes > 0, "distributed_timeout_minutes", minutes, "must be positive")
        stage, staged = self.zero_stage, self.pipeline_model_parallel_size > 1
        require(stage is None or 0 <= stage <= 3, "zero_stage", stage, "is not one of 0, 1, 2 and 3")
        rule = "reduces gradients at every micro-batch, and a pipeline once a step; give --zero-stage 1 or 3"
        require(not (staged and stage == 2), "zero_stage", stage, rule)
        replicas = self.num_distributed_optimizer_instances
        rule = "shares nothing at --zero-stage 0; leave one of them out"
        require(replicas == 1 or stage != 0, "num_distributed_optimizer_instances", replicas, rule)
        virtual = self.num_layers_per_virtual_pipeline_stage
        rule = "does nothing without --pipeline-model-parallel-size; give both or neither"
        require(virtual is None or staged, "num_layers_per_virtual_pipeline_stage", virtual, rule)
        blocks = self.recompute_num_layers
        rule = "does nothing without --recompute-granularity; give both or neither"
        require(blocks is None or self.recompute_granularity is not None, "recompute_num_layers", blocks, rule)

        file = self.deepspeed_config
        rule = "does nothing without --deepspeed; give both or neither"
        require(file is None or self.deepspeed, "deepspeed_config", file, rule)
        single = {"tensor_model_parallel_size", "pipeline_model_parallel_size", "num_distributed_optimizer_instances"}
        for name in sorted(single if self.deepspeed else ()):
            rule = f"is not supported with --deepspeed, whose ZeRO is data-parallel only; {WITHOUT_DEEPSPEED}"
            require(getattr(self, name) == 1, name, getattr(self, name), rule)
        rule = "needs --zero-stage 1 or more with --deepspeed; leave one of them out"
        require(not (self.deepspeed and self.cpu_offload and stage == 0), "cpu_offload", True, rule)

    @property
    def fsdp_stage(self) -> int:
        """The ZeRO stage of FSDP2."""
        return 1 if self.zero_stage is None else self.zero_stage

    @property
    def compiles(self) -> bool:
        """Whether blocks can be compiled: torch 2.13 cannot where split layers recompute."""
        return self.tensor_model_parallel_size == 1 or self.recompute_granularity is None

    def chunks(self, num_layers: int) -> int:
        """Return how many stages of a model of `num_layers` layers one process has."""
        virtual = self.num_layers_per_virtual_pipeline_stage
        return num_layers // (self.pipeline_model_parallel_size * virtual) if virtual else 1

    def replicas(self, data_size: int) -> int:
        """Return how many replicas of the sharded state `data_size` data-parallel processes hold."""
        replicated = self.zero_stage == 0 and not self.deepspeed  # which arranges its processes itself
        return data_size if replicated else self.num_distributed_optimizer_instances

    @property
    def fewest_ranks(self) -> int:
        """The smallest world size that the layout can have."""
        groups = self.tensor_model_parallel_size * self.pipeline_model_parallel_size
        return groups * self.num_distributed_optimizer_instances

    def data_size(self, processes: int) -> int:
        """Return the number of data-parallel processes among `processes` in all."""
        return processes // (self.tensor_model_parallel_size * self.pipeline_model_parallel_size)


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Validation: the same windows with the same noise at every evaluation."""

    eval_interval: int | None = flag(None, "steps between two evaluations; default a twentieth of the run")
    eval_samples: int | None = flag(None, "windows read of each set, spread evenly over it; default all of them")
    eval_batch_size: int | None = flag(None, "windows one process evaluates at a time; default --micro-batch-size")
    eval_seed: int = flag(1, "seed of the evaluation noise")
    eval_alignment: str = flag(
        "common",
        "common: tokens 1..S-1 of each window given token 0, the same for every objective; "
        "published: AR scores tokens 1..S, masked diffusion 0..S-1",
        choices=("common", "published"),
    )
    num_mc: int = flag(4, "independent noise replicates of a masked-diffusion evaluation")
    skip_train: bool = flag(False, "evaluate the newest checkpoint of --load or --save and leave")

    def __post_init__(self):
        require(self.num_mc >= 1, "num_mc", self.num_mc, "must be at least 1")
        for name in ("eval_interval", "eval_samples", "eval_batch_size"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "must be positive")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints: one run, one folder; the same command resumes."""

    save: str | None = flag(None, "run folder, made or resumed: configuration, records, checkpoints", metavar="DIR")
    load: str | None = flag(
        None,
        "run folder whose newest checkpoint to branch from, into --save, or to evaluate with --skip-train; or the same "
        "folder as --save, to resume there",
        metavar="DIR",
    )
    exit_on_missing_checkpoint: bool = flag(False, "refuse to start where --load, else --save, holds no checkpoint")
    save_interval: int | None = flag(None, "steps between two checkpoints; default --eval-interval")
    wait_for_lock: float = flag(
        0.0,
        "wait so many minutes while another process, such as an earlier start of the same job, writes the run of "
        "--save; exit code 75 where it still does after that",
        metavar="MINUTES",
    )
    keep_every_epochs: float | None = flag(
        None, "keep the first checkpoint of every N-th epoch too, beside the newest two and the best", metavar="N"
    )

    def __post_init__(self):
        for name in ("save_interval", "keep_every_epochs"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "must be positive")
        minutes = self.wait_for_lock
        require(0 <= minutes <= 720, "wait_for_lock", minutes, "is not a number of minutes from 0 to 720 (12 hours)")
        require(minutes == 0 or self.save, "wait_for_lock", minutes, "does nothing without --save; give both")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Tracking: where the records of a run are shown, beside metrics.jsonl."""

    tensorboard_dir: str | None = flag(
        None, "TensorBoard: folder of the events of this run and of no other; default off", metavar="DIR"
    )
    tensorboard_queue_size: int = flag(100, "TensorBoard: events that may wait to be written")
    wandb_project: str | None = flag(
        None, "Weights & Biases: project to show the run in, offline without a login; default off", metavar="NAME"
    )
    wandb_exp_name: str | None = flag(
        None, "Weights & Biases: name of the run; default that of its folder", metavar="NAME"
    )
    wandb_group: str | None = flag(None, "Weights & Biases: group of the run", metavar="NAME")
    wandb_save_dir: str | None = flag(
        None, "Weights & Biases: folder of its local files; default the run folder", metavar="DIR"
    )

    def __post_init__(self):
        size, project = self.tensorboard_queue_size, self.wandb_project
        require(size >= 1, "tensorboard_queue_size", size, "must be at least 1")
        forbidden = set(project or "") & set("/\\#?%:")
        require(not forbidden, "wandb_project", project, "a project's name has none of / \\ # ? % : in it; change it")
        partners = {"tensorboard_queue_size": "tensorboard_dir"}
        partners |= dict.fromkeys(("wandb_exp_name", "wandb_group", "wandb_save_dir"), "wandb_project")
        for name, partner in partners.items():
            value = getattr(self, name)
            idle = value != getattr(TrackingConfig, name) and not getattr(self, partner)
            require(not idle, name, value, f"does nothing without {spelling(partner)}; give both or neither")


SECTIONS = one_namespace(
    {
        "model": ModelConfig,
        "data": DataConfig,
        "objective": ObjectiveConfig,
        "optimizer": OptimizerConfig,
        "training": TrainingConfig,
        "parallel": ParallelConfig,
        "validation": ValidationConfig,
        "checkpoint": CheckpointConfig,
        "tracking": TrackingConfig,
    }
)


@dataclass(frozen=True)
class Vocabulary:
    """Ids: the tokenizer's 0..size-1, then [MASK], then unused rows up to a multiple of 128.

    Only the tokenizer's ids enter the softmax; text can never encode to [MASK].
    """

    size: int

    @property
    def mask_id(self) -> int:
        return self.size

    @property
    def padded_size(self) -> int:
        return (self.size + 1 + 127) // 128 * 128


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run's configuration, by section."""

    model: ModelConfig
    data: DataConfig
    objective: ObjectiveConfig
    optimizer: OptimizerConfig
    training: TrainingConfig
    parallel: ParallelConfig
    validation: ValidationConfig
    checkpoint: CheckpointConfig
    tracking: TrackingConfig
