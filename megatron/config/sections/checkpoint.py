"""The checkpoint section."""

from dataclasses import dataclass

from megatron.config.flags import Section, flag, require


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
    """Checkpoints: one folder for each run; the same command resumes it."""

    save: str | None = flag(None, "run folder, created or resumed: configuration, records, checkpoints", metavar="DIR")
    load: str | None = flag(
        None,
        "run folder whose newest checkpoint to branch from, into --save, or to evaluate with --skip-train; the same "
        "folder as --save resumes that run",
        metavar="DIR",
    )
    exact_branch: bool = flag(
        False, "refuse to branch from a run with other data or in another precision, as sweeps do", needs="load"
    )
    exit_on_missing_checkpoint: bool = flag(
        False, "exit with an error if --load, or without it --save, holds no checkpoint"
    )
    save_interval: int | None = flag(None, "steps between checkpoints; default --eval-interval", within="(0, inf)")
    wait_for_lock: float = flag(
        0.0,
        "wait up to this long while another process, such as an earlier start of the same job, holds the lock of "
        "--save; then exit with code 75",
        metavar="MINUTES",
        within="[0, 720]",
        needs="save",
    )
    keep_every_epochs: float | None = flag(
        None,
        "also keep the first checkpoint of every N-th epoch, in addition to the newest two and the best",
        metavar="N",
        within="(0, inf)",
    )
    keep_iterations: tuple[int, ...] = flag((), "also save checkpoints after these steps, and keep them", metavar="N")

    def __post_init__(self):
        super().__post_init__()
        for iteration in self.keep_iterations:
            require(iteration >= 1, "keep_iterations", self.keep_iterations, "steps are counted from 1; change it")
