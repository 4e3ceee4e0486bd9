"""The objective section."""

from dataclasses import dataclass

from megatron.config.flags import Section, flag, require


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(Section):
    """Objective: prediction targets, and noise on the inputs. Noise applies in training, never in validation."""

    objective: str = flag("ar", "what to train")  # objectives/registry.py adds the choices
    mask_times: str = flag(
        "stratified",
        "masked diffusion: how the diffusion time t ~ U(0, 1) of a sequence is drawn; stratified: consecutive samples "
        "cover [0, 1) evenly; iid: independently",
        choices=("stratified", "iid"),
    )
    mask_time_distribution: str = flag(
        "uniform",
        "masked diffusion: density of the diffusion time in training; window: uniform on [--mask-time-low, "
        "--mask-time-high]; bell: normal, truncated to (0, 1)",
        choices=("uniform", "window", "bell"),
    )
    mask_time_low: float = flag(
        0.25, "masked diffusion: first time of the window", within="[0, 1)", needs="mask_time_distribution window"
    )
    mask_time_high: float = flag(
        0.75, "masked diffusion: last time of the window", within="(0, 1]", needs="mask_time_distribution window"
    )
    mask_time_center: float = flag(
        0.5, "masked diffusion: most frequent time of the bell", within="[0, 1]", needs="mask_time_distribution bell"
    )
    mask_time_std: float = flag(
        0.2,
        "masked diffusion: standard deviation of the bell before it is truncated",
        within="(0, inf)",
        needs="mask_time_distribution bell",
    )
    mask_time_uniform_share: float | None = flag(
        None,
        "masked diffusion: share R of the times that is uniform on (0, 1), which limits importance weights to 1 / R; "
        "default 0.1 with --mask-time-weighting importance, else 0",
        metavar="R",
        within="[0, 1)",
        needs="mask_time_distribution",
    )
    mask_time_weighting: str = flag(
        "importance",
        "masked diffusion: importance: the loss of a sequence is weighted by the uniform density over that of its "
        "time, which keeps the bound; none: it is not, and the loss is another one",
        choices=("importance", "none"),
        needs="mask_time_distribution",
    )
    mdm_loss: str = flag(
        "bound",
        "masked diffusion: bound: a token masked with probability p weighs 1 / p; simple: all masked tokens weigh the "
        "same, 1 / E[p]",
        choices=("bound", "simple"),
    )
    mask_eps: float = flag(
        1e-3, "masked diffusion: a token is masked with probability (1 - EPS) t + EPS", metavar="EPS", within="(0, 1)"
    )
    ar_ratio: float = flag(
        0.0,
        "masked diffusion: share of sequences whose masked tokens are a suffix instead of random positions",
        within="[0, 1]",
    )
    low_noise_samples: int = flag(
        0, "masked diffusion: multiply t by --low-noise-ratio in the first N samples", metavar="N", within="[0, inf)"
    )
    low_noise_ratio: float = flag(
        0.5,
        "masked diffusion: factor of t in the first --low-noise-samples samples",
        within="[0, 1]",
        needs="low_noise_samples",
    )
    causal_ratio: float = flag(
        0.5, "dual: share of the samples of a step with the next-token objective", within="[0, 1]"
    )
    diffusion_block_size: int = flag(16, "block diffusion: tokens per block", within="[1, inf)")
    num_order_list: int = flag(
        1,
        "ar: read each sequence in one of N token orders, the first of them left to right",
        metavar="N",
        within="[1, inf)",
    )
    use_predefined_order: bool = flag(
        False,
        "ar: the k-th order sorts positions i by i + k N(0, 1); otherwise it is a uniform permutation",
        needs="num_order_list",
    )
    right_to_left_ratio: float = flag(
        0.0, "ar: share of sequences that are read right to left", within="[0, 1]", excludes="num_order_list"
    )
    target_offset_max: int = flag(
        1, "ar: predict the i-th next token, i drawn from 1..N for each sequence", metavar="N", within="[1, inf)"
    )
    target_positions: bool = flag(
        False, "ar: give the model the position of the target token, as the rotary position of the queries"
    )
    token_dropout: float = flag(
        0.0,
        "autoregressive: replace this share of the input tokens by [MASK]; the targets stay",
        within="[0, 1]",
        excludes="token_dropout_max",
    )
    token_dropout_max: float = flag(
        0.0,
        "autoregressive: token dropout with a share drawn from U(0, R) for each sequence",
        metavar="R",
        within="[0, 1]",
    )
    random_replacement: float = flag(
        0.0, "autoregressive: replace this share of the input tokens by random tokens", within="[0, 1]"
    )
    masked_input_weight: float = flag(
        0.0,
        "autoregressive: add W times the loss on masked inputs, by a second pass, which doubles the compute",
        metavar="W",
        within="[0, inf)",
        excludes=("token_dropout", "token_dropout_max"),
    )
    masked_input_max: float = flag(
        0.5,
        "autoregressive: the share of masked inputs in that pass is drawn from U(0, R)",
        metavar="R",
        within="[0, 1]",
        needs="masked_input_weight",
    )
    randmask_ratio: float = flag(
        0.0,
        "autoregressive: share of queries whose attention mask drops a random share, U(0, 1), of the visible keys",
        within="[0, 1]",
    )
    stochastic_depth: float = flag(
        0.0,
        "share of sequences that skip the last block; the share falls linearly towards the first block",
        within="[0, 1)",
    )

    def __post_init__(self):
        super().__post_init__()
        offset = self.target_offset_max
        message = "needs --target-positions, or the model cannot know which token to predict; give both"
        require(offset == 1 or self.target_positions, "target_offset_max", offset, message)
        low, high = self.mask_time_low, self.mask_time_high
        require(low < high, "mask_time_low", low, f"must be below --mask-time-high {high}; change one of them")
        is_positive = self.mask_time_distribution != "window" or not self.importance_weighted_times
        message = "leaves out times outside the window, which importance weights need; give more, or "
        message += "--mask-time-weighting none"
        share = self.mask_time_uniform_share
        require(is_positive or share != 0, "mask_time_uniform_share", share, message)

    @property
    def importance_weighted_times(self) -> bool:
        """Whether times are weighted by the uniform density over their own."""
        return self.mask_time_distribution != "uniform" and self.mask_time_weighting == "importance"

    @property
    def uniform_time_share(self) -> float:
        """The share of uniform times in a window or bell: --mask-time-uniform-share or its default."""
        if self.mask_time_uniform_share is None:
            return 0.1 if self.importance_weighted_times else 0.0
        return self.mask_time_uniform_share

    def passes(self, positions_per_token: int) -> int:
        """Return how often each token of a sample passes through the model, forward and backward."""
        return positions_per_token * (2 if self.masked_input_weight else 1)

    def causal_samples(self, block: int) -> int:
        """Return how many of `block` samples predict the next token, where an objective has two kinds."""
        return round(self.causal_ratio * block)
