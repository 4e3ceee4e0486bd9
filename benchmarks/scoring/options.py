"""Flags of the scoring benchmark."""

from dataclasses import dataclass

from benchmarks.harness import output_flag, require_positive
from megatron.config.flags import flag, require


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of this benchmark."""

    mdm: str | None = flag(None, "a masked-diffusion run", metavar="RUN")
    ar: str | None = flag(None, "an autoregressive run with a trained tokenizer (HFTokenizer)", metavar="RUN")
    folder: str = flag("runs/scoring", "where to train the runs that are not given", metavar="DIR")
    train_iters: int = flag(600, "iterations to train them for")
    texts: int = flag(6, "texts of each length whose variance is measured")
    draws: int = flag(40, "estimates of each text")
    questions: int = flag(12, "multiple-choice documents, each with four choices")
    context: int = flag(24, "tokens of a context")
    answer: int = flag(12, "tokens of a choice, plus or minus a third")
    rounds: int = flag(3, "rounds of the comparison with transformers")
    output: str | None = output_flag()

    def __post_init__(self):
        require_positive(self, ("train_iters", "texts", "questions", "context", "answer", "rounds"))
        require(self.draws >= 2, "draws", self.draws, "must be at least 2, to estimate a variance")
