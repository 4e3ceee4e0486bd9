"""The sections of a run's configuration. Each field is one command-line flag; each section checks its own fields.

`resolve.py` has the checks that need several sections.
"""

from dataclasses import dataclass, fields
from math import isfinite

from megatron.config.flags import REQUIRED, flag, one_namespace, require, spelling, typed
from megatron.config.recipes import RECIPES
from megatron.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Model: a Llama-style decoder, causal or bidirectional."""

    model_size: str | None = flag(
        None,
        "model size from the published ladder, such as 140M: sets layers, hidden size, heads and head dimension; "
        "explicit flags win",
        metavar="NAME",
    )
    num_layers: int = flag(help="number of transformer blocks")
    hidden_size: int = flag(help="hidden size: width of the residual stream")
    num_attention_heads: int = flag(help="number of query heads")
    kv_channels: int | None = flag(
        None, "dimension of each head, an even number; default --hidden-size / --num-attention-heads"
    )
    group_query_attention: bool = flag(False, "grouped-query attention (GQA) with --num-query-groups key/value heads")
    num_query_groups: int | None = flag(None, "number of key/value heads; requires --group-query-attention")
    ffn_hidden_size: int | None = flag(
        None,
        "hidden size of the MLP; default floor(8h/3/64)*64 (at least 64) with SwiGLU, 4h with GELU, h = --hidden-size",
    )
    swiglu: bool = flag(True, "SwiGLU MLP; --no-swiglu is GELU")
    normalization: str = flag("rmsnorm", "normalisation layer", choices=("rmsnorm", "layernorm"))
    norm_epsilon: float = flag(1e-5, "epsilon of RMSNorm or LayerNorm")
    qk_layernorm: bool = flag(
        False, "normalise queries and keys per head before the rotary embedding (QK-norm), as in Qwen3"
    )
    rotary_base: float = flag(10000.0, "base (theta) of the rotary position embedding (RoPE)")
    add_bias_linear: bool = flag(False, "add biases to the linear layers")
    untie_embeddings_and_output_weights: bool = flag(
        False, "give the output head its own weights instead of those of the token embedding"
    )
    softmax_over_padding: bool = flag(
        False,
        "include [MASK] and the padding rows of the vocabulary in the softmax, in training and in validation",
    )
    init_method_std: float = flag(
        0.02,
        "standard deviation of the initial weights; the output projections of attention and MLP use STD / sqrt(2 * "
        "--num-layers)",
        metavar="STD",
    )
    attention_dropout: float = flag(0.0, "dropout of attention probabilities", metavar="P")
    hidden_dropout: float = flag(
        0.0, "dropout of the attention and MLP outputs, before they are added to the residual stream", metavar="P"
    )
    mlp_dropout: float = flag(0.0, "dropout inside the MLP, after the activation", metavar="P")
    embedding_dropout: float = flag(0.0, "dropout of the token embeddings", metavar="P")
    label_smoothing: float = flag(
        0.0, "label smoothing of the training loss: (1 - E) nll + E times the mean of -log p over the ids", metavar="E"
    )
    z_loss: float = flag(
        0.0, "z-loss: add C log(Z)^2 to the training loss, Z the normaliser of the softmax", metavar="C"
    )

    def __post_init__(self):
        for name in ("num_layers", "hidden_size", "num_attention_heads"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        for name in ("kv_channels", "num_query_groups", "ffn_hidden_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "must be at least 1; leave it out for the default")
        for name in ("norm_epsilon", "rotary_base", "init_method_std"):
            require(getattr(self, name) > 0, name, getattr(self, name), "must be positive")
        for name in ("attention_dropout", "hidden_dropout", "mlp_dropout", "embedding_dropout"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "must be a probability in [0, 1)")
        require(0 <= self.label_smoothing < 1, "label_smoothing", self.label_smoothing, "must be in [0, 1)")
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
            f"gives heads of dimension {self.head_size}, and rotary embeddings need an even one; change it",
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
        """Dimension of each attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def key_value_heads(self) -> int:
        """Number of key/value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def mlp_size(self) -> int:
        """Hidden size of the MLP: --ffn-hidden-size or its default."""
        if self.ffn_hidden_size:
            return self.ffn_hidden_size
        # as in the published ladder; see "What Makes ... Data-Constrained Settings", 2507.15857, appendix 8
        return max(64, 8 * self.hidden_size // 3 // 64 * 64) if self.swiglu else 4 * self.hidden_size


SENTENCE_PIECE = ("GPTSentencePieceTokenizer", "SentencePieceTokenizer")
TOKENIZERS = ("HFTokenizer", "GPT2BPETokenizer", *SENTENCE_PIECE, "ByteTokenizer", "NullTokenizer")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Data: tokenised documents, the order of samples, and the tokenizer."""

    train_data_path: tuple[str, ...] = flag(
        (),
        "training data: a data prefix (of PREFIX.bin and PREFIX.idx), or pairs of weight and data prefix for a blend",
        metavar="[WEIGHT] PREFIX",
    )
    train_data_path_file: str | None = flag(
        None,
        'file with the arguments of --train-data-path: one line of "WEIGHT PREFIX" "WEIGHT PREFIX", or one pair a line',
        metavar="FILE",
    )
    valid_data_path: tuple[str, ...] = flag(
        (),
        "validation data: a data prefix or a blend, or NAME=PREFIX for each of several sets; the first set decides "
        "which checkpoint is best",
        metavar="[NAME=]PREFIX",
    )
    valid_data_path_file: str | None = flag(None, "file with the arguments of --valid-data-path", metavar="FILE")
    split: str | None = flag(
        None,
        "split the documents of the training data, in file order, into training, validation and test sets by these "
        "proportions, such as 969,30,1; test is read by --skip-train only, and with --valid-data-path neither held-out "
        "set is read",
        metavar="TRAIN,VALID,TEST",
    )
    seq_length: int = flag(2048, "sequence length: tokens per sample")
    train_unique_tokens: int | None = flag(
        None, "train on the first N tokens only, the last document cut; default all", metavar="N"
    )
    epoch_order: str = flag(
        "documents",
        "documents: shuffle and pack the documents again every epoch; windows: shuffle windows of --seq-length "
        "tokens, cut at an offset drawn every epoch; megatron: Megatron's order, which mixes epochs and depends on "
        "the budget",
        choices=("documents", "windows", "megatron"),
    )
    blend_order: str = flag(
        "due-time",
        "how a training blend interleaves its data sets, in proportion to their weights either way; due-time: the next "
        "sample of each is due after 1/share samples; megatron: the data set furthest below its share, as Megatron",
        choices=("due-time", "megatron"),
    )
    reset_attention_mask: bool = flag(False, "mask attention across document boundaries")
    reset_position_ids: bool = flag(False, "restart position ids at every document")
    eod_mask_loss: bool = flag(False, "exclude the first token of each document from the loss")
    tokenizer_type: str = flag(
        "HFTokenizer",
        f"tokenizer of the data: {', '.join(TOKENIZERS)}",
        choices=TOKENIZERS,
        metavar="NAME",
    )
    tokenizer_model: str | None = flag(
        None,
        "tokenizer.json of an HFTokenizer, or tokenizer.model of a SentencePiece tokenizer; default the file next to "
        "the data",
        metavar="FILE",
    )
    vocab_size: int | None = flag(
        None, "vocabulary size of a NullTokenizer, without the end-of-document id that it adds", metavar="V"
    )
    vocab_file: str | None = flag(
        None, "vocab.json of a GPT2BPETokenizer; implies that type if --tokenizer-type is not given", metavar="FILE"
    )
    merge_file: str | None = flag(None, "merges.txt of a GPT2BPETokenizer; likewise", metavar="FILE")
    num_workers: int = flag(0, "worker processes of the data loader; 0 loads data in the training process")

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
        valid = 1 <= len(shares) <= 3 and all(isfinite(share) and share >= 0 for share in shares) and shares[0] > 0
        message = "give up to three proportions, none negative, the first positive: 969,30,1"
        require(self.split is None or valid, "split", self.split, message)
        check_tokenizer(self)

    @property
    def holds_out(self) -> bool:
        """Whether there is a set to validate on."""
        return bool(self.valid_data_path or self.valid_data_path_file or any(self.split_shares[1:2]))

    @property
    def split_shares(self) -> list[float]:
        """The numbers of --split; [] without the flag or if they are not numbers."""
        try:
            return [float(share) for share in self.split.split(",")] if self.split else []
        except ValueError:
            return []


def check_tokenizer(section) -> None:
    """Check that the flags fit --tokenizer-type; training and preprocessing share them."""
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
    for name in required:  # one of the two files may have implied the type, so the message starts with the given flag
        value = getattr(section, name)
        require(value is None or not absent, name, value, f"needs {' and '.join(map(spelling, absent))}; give both")
    message = f"needs {' and '.join(map(spelling, required))}; give {'both' if len(required) > 1 else 'it'}"
    require(not absent, "tokenizer_type", kind, message)
    for name, kinds in owners.items():
        value = getattr(section, name)
        message = f"belongs to {', '.join(kinds)}, and --tokenizer-type is {kind}; leave it out, or give "
        require(value is None or kind in kinds, name, value, f"{message}--tokenizer-type {kinds[0]}")
    size = section.vocab_size
    require(size is None or size >= 1, "vocab_size", size, "must be at least 1")


def implied_tokenizer(given: set[str]) -> dict:
    """Return the settings that --vocab-file and --merge-file imply among the flags `given`: GPT-2's tokenizer."""
    if "--tokenizer-type" in given or not given & {"--vocab-file", "--merge-file"}:
        return {}
    return {"tokenizer_type": "GPT2BPETokenizer", "tokenizer_model": None, "vocab_size": None}


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Objective: prediction targets, and noise on the inputs. Noise applies in training, never in validation."""

    objective: str = flag("ar", "what to train")  # objectives/registry.py adds the choices
    mask_times: str = flag(
        "stratified",
        "masked diffusion: how the diffusion time t ~ U(0, 1) of a sequence is drawn; stratified: consecutive samples "
        "cover [0, 1) evenly; iid: independently",
        choices=("stratified", "iid"),
    )
    mask_eps: float = flag(
        1e-3, "masked diffusion: a token is masked with probability (1 - EPS) t + EPS", metavar="EPS"
    )
    ar_ratio: float = flag(
        0.0, "masked diffusion: share of sequences whose masked tokens are a suffix instead of random positions"
    )
    low_noise_samples: int = flag(
        0, "masked diffusion: multiply t by --low-noise-ratio in the first N samples", metavar="N"
    )
    low_noise_ratio: float = flag(0.5, "masked diffusion: factor of t in the first --low-noise-samples samples")
    causal_ratio: float = flag(0.5, "dual: share of the samples of a step with the next-token objective")
    diffusion_block_size: int = flag(16, "block diffusion: tokens per block")
    num_order_list: int = flag(
        1, "ar: read each sequence in one of N token orders, the first of them left to right", metavar="N"
    )
    use_predefined_order: bool = flag(
        False, "ar: the k-th order sorts positions i by i + k N(0, 1); otherwise it is a uniform permutation"
    )
    right_to_left_ratio: float = flag(0.0, "ar: share of sequences that are read right to left")
    target_offset_max: int = flag(
        1, "ar: predict the i-th next token, i drawn from 1..N for each sequence", metavar="N"
    )
    target_positions: bool = flag(
        False, "ar: give the model the position of the target token, as the rotary position of the queries"
    )
    token_dropout: float = flag(
        0.0, "autoregressive: replace this share of the input tokens by [MASK]; the targets stay"
    )
    token_dropout_max: float = flag(
        0.0, "autoregressive: token dropout with a share drawn from U(0, R) for each sequence", metavar="R"
    )
    random_replacement: float = flag(0.0, "autoregressive: replace this share of the input tokens by random tokens")
    masked_input_weight: float = flag(
        0.0,
        "autoregressive: add W times the loss on masked inputs, by a second pass, which doubles the compute",
        metavar="W",
    )
    masked_input_max: float = flag(
        0.5, "autoregressive: the share of masked inputs in that pass is drawn from U(0, R)", metavar="R"
    )
    randmask_ratio: float = flag(
        0.0, "autoregressive: share of queries whose attention mask drops a random share, U(0, 1), of the visible keys"
    )
    stochastic_depth: float = flag(
        0.0, "share of sequences that skip the last block; the share falls linearly towards the first block"
    )

    def __post_init__(self):
        require(0 < self.mask_eps < 1, "mask_eps", self.mask_eps, "must be in (0, 1)")
        shares = ("token_dropout", "token_dropout_max", "random_replacement", "masked_input_max", "randmask_ratio")
        for name in (*shares, "ar_ratio", "right_to_left_ratio", "causal_ratio", "low_noise_ratio"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "must be in [0, 1]")
        require(0 <= self.stochastic_depth < 1, "stochastic_depth", self.stochastic_depth, "must be in [0, 1)")
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
            value, other_value = getattr(self, name), getattr(self, other)
            both = value and other_value != getattr(ObjectiveConfig, other)
            require(not both, name, value, f"excludes {typed(other, other_value)}; give one of them")
        for name, needed in (
            ("use_predefined_order", "num_order_list"),
            ("low_noise_ratio", "low_noise_samples"),
            ("masked_input_max", "masked_input_weight"),
        ):
            value, default = getattr(self, name), getattr(ObjectiveConfig, name)
            effective = value == default or getattr(self, needed) != getattr(ObjectiveConfig, needed)
            require(effective, name, value, f"does nothing without {spelling(needed)}; give both or neither")
        offset = self.target_offset_max
        message = "needs --target-positions, or the model cannot know which token to predict; give both"
        require(offset == 1 or self.target_positions, "target_offset_max", offset, message)

    def passes(self, positions_per_token: int) -> int:
        """Return how often each token of a sample passes through the model, forward and backward."""
        return positions_per_token * (2 if self.masked_input_weight else 1)

    def causal_samples(self, block: int) -> int:
        """Return how many of `block` samples predict the next token, where an objective has two kinds."""
        return round(self.causal_ratio * block)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer and schedule: AdamW or Muon; schedules are functions of the consumed samples."""

    optimizer: str = flag(
        "adamw",
        "muon: orthogonalised updates of the matrices of the blocks, scaled to the size of AdamW's so that --lr serves "
        "both; AdamW for embedding, head and vectors",
        choices=("adamw", "muon"),
    )
    lr: float = flag(2e-4, "peak learning rate")
    min_lr: float | None = flag(None, "final learning rate; default --lr / 10")
    lr_decay_style: str = flag(
        "cosine",
        "learning-rate schedule after the warm-up; WSD (warm-up, stable, decay) decays only at the end",
        choices=("cosine", "linear", "constant", "WSD"),
    )
    lr_warmup_samples: int | None = flag(None, "samples of linear warm-up; default 1% of the budget")
    lr_decay_samples: int | None = flag(None, "samples until the final learning rate; default the whole budget")
    lr_wsd_decay_samples: int | None = flag(None, "samples of the decay phase of WSD; default 10% of the schedule")
    weight_decay: float = flag(0.1, "decoupled weight decay")
    weight_decay_incr_style: str = flag(
        "constant",
        "constant: --weight-decay; linear, cosine: from --start-weight-decay to --end-weight-decay over the budget",
        choices=("constant", "linear", "cosine"),
    )
    start_weight_decay: float | None = flag(None, "first weight decay of a linear or cosine schedule")
    end_weight_decay: float | None = flag(None, "last weight decay of a linear or cosine schedule")
    weight_decay_parameters: str = flag(
        "matrices",
        "parameters with weight decay; hidden: matrices of the blocks; matrices: also embedding and head; all: also "
        "biases and norms",
        choices=("hidden", "matrices", "all"),
    )
    adam_beta1: float = flag(0.9, "beta1 of AdamW: decay of the first moment", metavar="BETA")
    adam_beta2: float = flag(0.95, "beta2 of AdamW: decay of the second moment", metavar="BETA")
    adam_eps: float = flag(1e-8, "epsilon of AdamW", metavar="EPS")
    muon_momentum: float = flag(0.95, "Nesterov momentum of Muon")
    clip_grad: float = flag(1.0, "clip gradients to this global norm; 0 disables clipping")
    ema_decay: float | None = flag(
        None, "also evaluate an exponential moving average (EMA) of the weights, with decay D a step", metavar="D"
    )
    average_from_samples: int | None = flag(
        None, "also evaluate the mean of the weights over all steps from N consumed samples on", metavar="N"
    )

    def __post_init__(self):
        require(self.lr > 0, "lr", self.lr, "must be positive")
        require(
            self.min_lr is None or 0 <= self.min_lr <= self.lr, "min_lr", self.min_lr, f"must be in [0, --lr {self.lr}]"
        )
        for name in ("weight_decay", "start_weight_decay", "end_weight_decay", "clip_grad"):
            value = getattr(self, name)
            require(value is None or value >= 0, name, value, "must not be negative")
        self._check_changing_weight_decay()
        for name in ("adam_beta1", "adam_beta2", "muon_momentum"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "must be in [0, 1)")
        momentum = self.muon_momentum
        no_op = self.optimizer != "muon" and momentum != OptimizerConfig.muon_momentum
        require(not no_op, "muon_momentum", momentum, "does nothing without --optimizer muon; give both or neither")
        decay, start = self.ema_decay, self.average_from_samples
        require(decay is None or 0 < decay < 1, "ema_decay", decay, "must be in (0, 1)")
        require(start is None or start >= 0, "average_from_samples", start, "must not be negative")
        message = f"excludes --average-from-samples {start}; give one of them"
        require(decay is None or start is None, "ema_decay", decay, message)
        require(self.adam_eps > 0, "adam_eps", self.adam_eps, "must be positive")
        warmup = self.lr_warmup_samples
        require(warmup is None or warmup >= 0, "lr_warmup_samples", warmup, "must not be negative")
        for name in ("lr_decay_samples", "lr_wsd_decay_samples"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "must be at least 1; leave it out for the default")
        for name in ("min_lr", "lr_decay_samples"):
            no_op = getattr(self, name) is not None and self.lr_decay_style == "constant"
            require(not no_op, name, getattr(self, name), "does nothing with --lr-decay-style constant; drop one")
        wsd = self.lr_wsd_decay_samples
        message = "needs --lr-decay-style WSD; give both or neither"
        require(wsd is None or self.lr_decay_style == "WSD", "lr_wsd_decay_samples", wsd, message)

    def _check_changing_weight_decay(self) -> None:
        style, decay = self.weight_decay_incr_style, self.weight_decay
        constant, ends = style == "constant", ("start_weight_decay", "end_weight_decay")
        for name, value in ((name, getattr(self, name)) for name in ends):
            message = "does nothing with --weight-decay-incr-style constant; give linear or cosine, or leave it out"
            require(value is None or not constant, name, value, message)
            needed = f"needs {spelling(name)}; give it"
            require(value is not None or constant, "weight_decay_incr_style", style, needed)
        message = f"does nothing with --weight-decay-incr-style {style}, which has a start and an end; leave it out"
        require(constant or decay == OptimizerConfig.weight_decay, "weight_decay", decay, message)

    @property
    def averages(self) -> bool:
        """Whether the run averages its weights."""
        return self.ema_decay is not None or self.average_from_samples is not None

    @property
    def final_lr(self) -> float:
        """Learning rate at the end of the schedule: --min-lr or its default."""
        return self.lr / 10 if self.min_lr is None else self.min_lr


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Training: budget, batch size, precision, and when to stop."""

    recipe: str = flag(
        "default",
        "defaults of all flags: this project's, or those of the published system (2507.15857); with --help it shows "
        "them",
        choices=tuple(RECIPES),
    )
    train_epochs: float | None = flag(
        None, "budget in epochs over the unique tokens; give exactly one budget: epochs, samples, iterations or FLOPs"
    )
    train_samples: int | None = flag(None, "budget in samples")
    train_iters: int | None = flag(None, "budget in iterations, steps of --global-batch-size samples")
    train_flops: float | None = flag(None, "budget in FLOPs, 6ND with the embedding counted once", metavar="C")
    micro_batch_size: int = flag(8, "samples of one forward and backward pass on a rank")
    global_batch_size: int = flag(
        256, "samples of one optimizer step over all ranks, with gradient accumulation as needed"
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
    log_interval: int = flag(10, "steps between training records in metrics.jsonl")
    exit_interval: int | None = flag(None, "save and exit after a step divisible by N", metavar="N")
    exit_duration_in_mins: float | None = flag(None, "save and exit after this many minutes", metavar="MINUTES")
    kill_switch_file: str | None = flag(None, "save and exit when this file appears", metavar="FILE")
    exit_code_when_stopped: int = flag(
        0,
        "exit code of a run that a signal or one of the three flags above stopped before its end, such as 85, so that "
        "a batch script knows to start the run again; leave it at 0 under torchrun, which restarts a rank that exits "
        "with another code (--max-restarts) and then exits with 1 itself",
        metavar="CODE",
    )
    dry_run: bool = flag(
        False, "print the resolved configuration and plan as JSON and exit, after all checks that need no device"
    )

    def __post_init__(self):
        for name in ("micro_batch_size", "global_batch_size", "log_interval"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        positive = ("train_epochs", "train_samples", "train_iters", "train_flops")
        for name in (*positive, "exit_interval", "exit_duration_in_mins"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "must be positive")
        code = self.exit_code_when_stopped
        require(0 <= code <= 255, "exit_code_when_stopped", code, "is not an exit code; give one from 0 to 255")
        clash = None not in (self.bf16, self.fp32) and self.bf16 == self.fp32
        require(not clash, "bf16", self.bf16, f"excludes {typed('fp32', self.fp32)}; give one of them")
        against = typed("fp32", True) if self.fp32 else typed("bf16", False) if self.bf16 is False else None
        for name in ("fp8_recipe", "flash_attention"):
            message = f"needs bf16; leave it out, or {against}"
            require(getattr(self, name) is None or against is None, name, getattr(self, name), message)


WITHOUT_DEEPSPEED = "leave it out, or --deepspeed and --deepspeed-config"


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Parallel layout: how ranks share the model. It changes speed and memory, results only by rounding and dropout."""

    tensor_model_parallel_size: int = flag(
        1,
        "tensor-parallel ranks: they split each layer, and the sequence between layers; divides heads and --seq-length",
    )
    pipeline_model_parallel_size: int = flag(
        1, "pipeline stages of consecutive layers; a step needs at least as many micro-batches"
    )
    num_layers_per_virtual_pipeline_stage: int | None = flag(
        None, "layers of each of the several stages of a rank (interleaved 1F1B); default one stage a rank"
    )
    zero_stage: int | None = flag(
        None,
        "what data-parallel ranks shard: 0 nothing, 1 optimizer states and master weights, 2 also gradients, 3 also "
        "the model weights; default 1, or the stage of --deepspeed-config",
    )
    num_distributed_optimizer_instances: int = flag(
        1,
        "replicas of what --zero-stage shards (hybrid sharding), such as one a node; data-parallel size / N ranks "
        "share each",
        metavar="N",
    )
    cpu_offload: bool = flag(
        False,
        "keep master weights, gradients and optimizer states in host memory (CUDA); with --deepspeed by its "
        "offload_optimizer, which --deepspeed-config can configure further",
    )
    deepspeed: bool = flag(
        False, "shard with DeepSpeed's ZeRO in place of FSDP2; to install it: bash install.sh --with-deepspeed"
    )
    deepspeed_config: str | None = flag(
        None, "DeepSpeed's JSON file; keys that repeat a flag must agree with it", metavar="FILE"
    )
    recompute_granularity: str | None = flag(
        None,
        "activation checkpointing; full: recompute whole blocks in the backward pass; selective: all but matrix "
        "products and attention; default none",
        choices=("full", "selective"),
    )
    recompute_num_layers: int | None = flag(
        None, "blocks of each stage that are recomputed, from its first; default all"
    )
    distributed_timeout_minutes: float = flag(
        10.0,
        "timeout of the rendezvous and of collectives, after which all ranks exit",
        metavar="MINUTES",
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
        stage, pipelined = self.zero_stage, self.pipeline_model_parallel_size > 1
        require(stage is None or 0 <= stage <= 3, "zero_stage", stage, "is not one of 0, 1, 2 and 3")
        message = "reduces gradients at every micro-batch, and a pipeline once a step; give --zero-stage 1 or 3"
        require(not (pipelined and stage == 2), "zero_stage", stage, message)
        replicas = self.num_distributed_optimizer_instances
        message = "has no effect at --zero-stage 0, which shards nothing; leave one of them out"
        require(replicas == 1 or stage != 0, "num_distributed_optimizer_instances", replicas, message)
        virtual = self.num_layers_per_virtual_pipeline_stage
        message = "does nothing without --pipeline-model-parallel-size; give both or neither"
        require(virtual is None or pipelined, "num_layers_per_virtual_pipeline_stage", virtual, message)
        blocks = self.recompute_num_layers
        message = "does nothing without --recompute-granularity; give both or neither"
        require(blocks is None or self.recompute_granularity is not None, "recompute_num_layers", blocks, message)

        file = self.deepspeed_config
        message = "does nothing without --deepspeed; give both or neither"
        require(file is None or self.deepspeed, "deepspeed_config", file, message)
        unsupported = {
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "num_distributed_optimizer_instances",
        }
        for name in sorted(unsupported if self.deepspeed else ()):
            message = f"is not supported with --deepspeed, whose ZeRO is data-parallel only; {WITHOUT_DEEPSPEED}"
            require(getattr(self, name) == 1, name, getattr(self, name), message)
        message = "needs --zero-stage 1 or more with --deepspeed; leave one of them out"
        require(not (self.deepspeed and self.cpu_offload and stage == 0), "cpu_offload", True, message)

    @property
    def fsdp_stage(self) -> int:
        """The ZeRO stage with FSDP2."""
        return 1 if self.zero_stage is None else self.zero_stage

    @property
    def compiles(self) -> bool:
        """Whether blocks can be compiled: torch 2.13 cannot compile tensor-parallel layers that are recomputed."""
        return self.tensor_model_parallel_size == 1 or self.recompute_granularity is None

    def chunks(self, num_layers: int) -> int:
        """Return how many stages of a model of `num_layers` layers each rank has."""
        virtual = self.num_layers_per_virtual_pipeline_stage
        return num_layers // (self.pipeline_model_parallel_size * virtual) if virtual else 1

    def replicas(self, data_size: int) -> int:
        """Return how many replicas of the sharded state `data_size` data-parallel ranks hold."""
        replicated = self.zero_stage == 0 and not self.deepspeed  # DeepSpeed groups its ranks itself
        return data_size if replicated else self.num_distributed_optimizer_instances

    @property
    def fewest_ranks(self) -> int:
        """The smallest world size of the layout."""
        groups = self.tensor_model_parallel_size * self.pipeline_model_parallel_size
        return groups * self.num_distributed_optimizer_instances

    def data_size(self, world_size: int) -> int:
        """Return the data-parallel size."""
        return world_size // (self.tensor_model_parallel_size * self.pipeline_model_parallel_size)


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Validation: the same windows with the same noise at every evaluation."""

    eval_interval: int | None = flag(None, "steps between evaluations; default 1/20 of the run")
    eval_samples: int | None = flag(None, "windows of each validation set, spread evenly over it; default all of them")
    eval_batch_size: int | None = flag(None, "windows of one forward pass on a rank; default --micro-batch-size")
    eval_seed: int = flag(1, "seed of the evaluation noise")
    eval_alignment: str = flag(
        "common",
        "which tokens are scored; common: tokens 1..S-1 of each window given token 0, the same for every objective; "
        "published: AR scores tokens 1..S, masked diffusion 0..S-1",
        choices=("common", "published"),
    )
    num_mc: int = flag(4, "Monte-Carlo samples: independent noise replicates of a masked-diffusion evaluation")
    skip_train: bool = flag(False, "evaluate the newest checkpoint of --load or --save, then exit")

    def __post_init__(self):
        require(self.num_mc >= 1, "num_mc", self.num_mc, "must be at least 1")
        for name in ("eval_interval", "eval_samples", "eval_batch_size"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "must be positive")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints: one folder for each run; the same command resumes it."""

    save: str | None = flag(None, "run folder, created or resumed: configuration, records, checkpoints", metavar="DIR")
    load: str | None = flag(
        None,
        "run folder whose newest checkpoint to branch from, into --save, or to evaluate with --skip-train; the same "
        "folder as --save resumes that run",
        metavar="DIR",
    )
    exit_on_missing_checkpoint: bool = flag(
        False, "exit with an error if --load, or without it --save, holds no checkpoint"
    )
    save_interval: int | None = flag(None, "steps between checkpoints; default --eval-interval")
    wait_for_lock: float = flag(
        0.0,
        "wait up to this long while another process, such as an earlier start of the same job, holds the lock of "
        "--save; then exit with code 75",
        metavar="MINUTES",
    )
    keep_every_epochs: float | None = flag(
        None,
        "also keep the first checkpoint of every N-th epoch, in addition to the newest two and the best",
        metavar="N",
    )

    def __post_init__(self):
        for name in ("save_interval", "keep_every_epochs"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "must be positive")
        minutes = self.wait_for_lock
        require(0 <= minutes <= 720, "wait_for_lock", minutes, "is not from 0 to 720 minutes (12 hours); change it")
        require(minutes == 0 or bool(self.save), "wait_for_lock", minutes, "does nothing without --save; give both")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Tracking: TensorBoard and Weights & Biases, in addition to metrics.jsonl."""

    tensorboard_dir: str | None = flag(
        None, "TensorBoard: folder of event files, of this run only; default off", metavar="DIR"
    )
    tensorboard_queue_size: int = flag(100, "TensorBoard: size of the queue of pending events")
    wandb_project: str | None = flag(
        None, "Weights & Biases: project of the run; offline without a login; default off", metavar="NAME"
    )
    wandb_exp_name: str | None = flag(
        None, "Weights & Biases: name of the run; default the name of its folder", metavar="NAME"
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
            no_op = value != getattr(TrackingConfig, name) and not getattr(self, partner)
            require(not no_op, name, value, f"does nothing without {spelling(partner)}; give both or neither")


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
    """The padded vocabulary: the tokenizer's ids 0..size-1, then [MASK], then unused rows up to a multiple of 128.

    Only the tokenizer's ids enter the softmax; text can never encode to [MASK].
    """

    size: int

    @property
    def mask_id(self) -> int:
        """Id of [MASK]."""
        return self.size

    @property
    def padded_size(self) -> int:
        """Rows of the embedding and the head."""
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

    @classmethod
    def from_recorded(cls, recorded: dict) -> "Config":
        """Return the configuration in a run's config.json, whose keys are sections among others.

        Fields that an older run does not have get their defaults.

        Raises: ConfigurationError for an unknown or missing field, or an invalid value.
        """
        values = {name: recorded.get(name, {}) for name in SECTIONS}
        if "objective_name" in recorded:  # runs older than --objective have only this key
            values["objective"] = {"objective": recorded["objective_name"]} | values["objective"]
        return cls(**{name: _section(name, values[name]) for name in SECTIONS})


def _section(name: str, values: dict):
    """Return the section `name` with the recorded `values`; JSON made lists of tuples."""
    section = SECTIONS[name]
    defaults = {field.name: field.default for field in fields(section)}
    for field in values.keys() - defaults.keys():
        raise ConfigurationError(
            f"config.json: {name}.{field} is no setting of this version; use the version that trained the run"
        )
    for field in [field for field, default in defaults.items() if default is REQUIRED and field not in values]:
        raise ConfigurationError(f"config.json: {name}.{field} is missing; restore the file")
    return section(**{field: tuple(value) if isinstance(value, list) else value for field, value in values.items()})
