"""Entry point of training runs, with the likelihoods of unmasking policies in --skip-train."""

from megatron.training import launcher

# isort: split
# OMP_WAIT_POLICY is set by the import above and must precede torch
from megatron.likelihoods.validation import evaluate_run


def main(objective: str, arguments: list[str] | None = None) -> None:
    """Start a training run from the command line as `launcher.main` does."""
    launcher.main(objective, arguments, evaluate_run)
