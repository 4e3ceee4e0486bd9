"""The optimizer section."""

from dataclasses import dataclass

from megatron.config.flags import Section, flag, require, spelling


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
    """Optimizer and schedule: AdamW or Muon; schedules are functions of the consumed samples."""

    optimizer: str = flag(
        "adamw",
        "muon: orthogonalised updates of the matrices of the blocks, scaled to the size of AdamW's so that --lr serves "
        "both; AdamW for embedding, head and vectors",
        choices=("adamw", "muon"),
    )
    lr: float = flag(2e-4, "peak learning rate", within="(0, inf)")
    min_lr: float | None = flag(None, "final learning rate; default --lr / 10", excludes="lr_decay_style constant")
    lr_decay_style: str = flag(
        "cosine",
        "learning-rate schedule after the warm-up; WSD (warm-up, stable, decay) decays only at the end; cyclic: a "
        "cosine in each of --lr-cycles cycles, whose last checkpoints are kept",
        choices=("cosine", "linear", "constant", "WSD", "cyclic"),
    )
    lr_warmup_samples: int | None = flag(None, "samples of linear warm-up; default 1% of the budget", within="[0, inf)")
    lr_decay_samples: int | None = flag(
        None,
        "samples until the final learning rate; default the whole budget",
        within="[1, inf)",
        excludes="lr_decay_style constant",
    )
    lr_wsd_decay_samples: int | None = flag(
        None,
        "samples of the decay phase of WSD; default 10% of the schedule",
        within="[1, inf)",
        needs="lr_decay_style WSD",
    )
    lr_cycles: int | None = flag(
        None,
        "cycles of equal length of a cyclic schedule",
        metavar="N",
        within="[1, inf)",
        needs="lr_decay_style cyclic",
    )
    weight_decay: float = flag(0.1, "decoupled weight decay", within="[0, inf)")
    weight_decay_incr_style: str = flag(
        "constant",
        "constant: --weight-decay; linear, cosine: from --start-weight-decay to --end-weight-decay over the budget",
        choices=("constant", "linear", "cosine"),
    )
    start_weight_decay: float | None = flag(
        None, "first weight decay of a linear or cosine schedule", within="[0, inf)"
    )
    end_weight_decay: float | None = flag(None, "last weight decay of a linear or cosine schedule", within="[0, inf)")
    weight_decay_parameters: str = flag(
        "matrices",
        "parameters with weight decay; hidden: matrices of the blocks; matrices: also embedding and head; all: also "
        "biases and norms",
        choices=("hidden", "matrices", "all"),
    )
    adam_beta1: float = flag(0.9, "beta1 of AdamW: decay of the first moment", metavar="BETA", within="[0, 1)")
    adam_beta2: float = flag(0.95, "beta2 of AdamW: decay of the second moment", metavar="BETA", within="[0, 1)")
    adam_eps: float = flag(1e-8, "epsilon of AdamW", metavar="EPS", within="(0, inf)")
    muon_momentum: float = flag(0.95, "Nesterov momentum of Muon", within="[0, 1)", needs="optimizer muon")
    clip_grad: float = flag(1.0, "clip gradients to this global norm; 0 disables clipping", within="[0, inf)")
    meta_gradient_norm: float | None = flag(
        None,
        "compute the gradients of the second half of a rank's micro-batches after a trial move of L2 norm ETA against "
        "those of the first half",
        metavar="ETA",
        within="(0, inf)",
    )
    meta_gradient_parameters: str = flag(
        "matrices",
        "parameters of the trial move; matrices: those of the blocks; mlp: those of their MLPs",
        choices=("matrices", "mlp"),
        needs="meta_gradient_norm",
    )
    meta_gradient_style: str = flag(
        "constant",
        "norm of the trial move; constant: ETA; lr: ETA times the learning rate's share of its peak",
        choices=("constant", "lr"),
        needs="meta_gradient_norm",
    )
    ema_decay: float | None = flag(
        None,
        "also evaluate an exponential moving average (EMA) of the weights, with decay D a step",
        metavar="D",
        within="(0, 1)",
        excludes="average_from_samples",
    )
    average_from_samples: int | None = flag(
        None,
        "also evaluate the mean of the weights over all steps from N consumed samples on",
        metavar="N",
        within="[0, inf)",
    )

    def __post_init__(self):
        super().__post_init__()
        require(
            self.min_lr is None or 0 <= self.min_lr <= self.lr, "min_lr", self.min_lr, f"must be in [0, --lr {self.lr}]"
        )
        message = "needs --lr-cycles; give it"
        require(self.lr_decay_style != "cyclic" or bool(self.lr_cycles), "lr_decay_style", "cyclic", message)
        self._check_changing_weight_decay()

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
