"""The validation section."""

from dataclasses import dataclass

from megatron.config.flags import flag, require
from megatron.config.policies import LikelihoodFlags


@dataclass(frozen=True, kw_only=True)
class ValidationConfig(LikelihoodFlags):
    """Validation: the same windows with the same noise at every evaluation. --likelihood needs --skip-train."""

    eval_interval: int | None = flag(None, "steps between evaluations; default 1/20 of the run", within="(0, inf)")
    eval_samples: int | None = flag(
        None, "windows of each validation set, spread evenly over it; default all of them", within="(0, inf)"
    )
    eval_batch_size: int | None = flag(
        None, "windows of one forward pass on a rank; default --micro-batch-size", within="(0, inf)"
    )
    eval_seed: int = flag(1, "seed of the evaluation noise")
    eval_alignment: str = flag(
        "common",
        "which tokens are scored; common: tokens 1..S-1 of each window given token 0, the same for every objective; "
        "published: AR scores tokens 1..S, masked diffusion 0..S-1, in a dual run 1..S-1",
        choices=("common", "published"),
    )
    num_mc: int = flag(
        4, "Monte-Carlo samples: independent noise replicates of a masked-diffusion evaluation", within="[1, inf)"
    )
    skip_train: bool = flag(False, "evaluate the newest checkpoint of --load or --save, then exit")

    def __post_init__(self):
        super().__post_init__()
        message = "is evaluated without training, since it may cost a forward pass for each token; give --skip-train"
        require(self.likelihood is None or self.skip_train, "likelihood", self.likelihood, message)
        message = "is an odd number, and validation compares two halves of the orders; give an even one"
        require(self.num_orders % 2 == 0, "num_orders", self.num_orders, message)
