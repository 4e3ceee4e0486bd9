"""The validation section."""

from dataclasses import dataclass

from megatron.config.flags import Section, flag


@dataclass(frozen=True, kw_only=True)
class ValidationConfig(Section):
    """Validation: the same windows with the same noise at every evaluation."""

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
        "published: AR scores tokens 1..S, masked diffusion 0..S-1",
        choices=("common", "published"),
    )
    num_mc: int = flag(
        4, "Monte-Carlo samples: independent noise replicates of a masked-diffusion evaluation", within="[1, inf)"
    )
    skip_train: bool = flag(False, "evaluate the newest checkpoint of --load or --save, then exit")
