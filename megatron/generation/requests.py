"""What to generate: the settings of a command, prompts, and texts with gaps."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron.config.flags import flag, require, spelling, typed
from megatron.data.text_files import check_encodable, decode_text, json_lines, open_text, read_text, text_kind
from megatron.data.tokenizer import Tokenizer
from megatron.errors import ConfigurationError
from megatron.generation.generate import check_empty_prompt, check_gaps, check_objective
from megatron.generation.sampling import MASKED, Sampling
from megatron.objectives.registry import capabilities
from megatron.training.load_run import Trained

GAP = re.compile(r"\{\{(\d+)\}\}")
SOURCES = ("prompt", "prompt_file", "infill")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to generate. Without any of the first three the prompt is read from standard input."""

    prompt: str | None = flag(None, 'the text to continue; "" is the start of a document', metavar="TEXT")
    prompt_file: str | None = flag(
        None,
        'a text file, which is one prompt, or a .jsonl file of {"prompt": ...} or {"infill": ...} lines; both may be '
        ".gz or .zst",
        metavar="FILE",
    )
    infill: str | None = flag(
        None, "masked diffusion: a text with gaps to fill; {{8}} is a gap of 8 tokens", metavar="TEXT"
    )
    suffix: str | None = flag(None, "masked diffusion: the text after --prompt and --gap", metavar="TEXT")
    gap: int | None = flag(None, "masked diffusion: tokens to fill between --prompt and --suffix", metavar="N")
    num_samples: int = flag(1, "texts per prompt, sampled independently")
    batch_size: int = flag(16, "texts that are generated at one time; no text depends on it")
    checkpoint: str = flag(
        "latest",
        "the newest checkpoint, or that of the lowest loss on the first validation set",
        choices=("latest", "best"),
    )
    average: bool = flag(False, "use the averaged weights of --ema-decay or --average-from-samples")
    dtype: str = flag("float32", "dtype of the computation", choices=("float32", "bfloat16"))
    device: str | None = flag(None, "cpu, cuda or cuda:N (default: a GPU where there is one)")
    output: str | None = flag(None, "also write prompts, texts, ids and settings to a file", metavar="FILE.jsonl")
    show_steps: bool = flag(False, "masked diffusion: show the text after each step, on standard error")

    def __post_init__(self):
        for name in ("num_samples", "batch_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        require(self.gap is None or self.gap >= 1, "gap", self.gap, "must be at least 1")
        sources = [spelling(name) for name in SOURCES if getattr(self, name) is not None]
        if len(sources) > 1:
            raise ConfigurationError(f"{sources[0]} and {sources[1]}: both are the text to continue; give one of them")
        if (self.suffix is None) != (self.gap is None) or (self.gap and self.prompt is None):
            raise ConfigurationError("--prompt, --gap and --suffix: are given together, or --prompt alone")
        self._check_device()

    def _check_device(self) -> None:
        kind, _, number = (self.device or "cpu").partition(":")
        count = torch.cuda.device_count()
        if kind == "cuda" and (not number or number.isdigit()):
            available = int(number or 0) < count
        else:
            available = self.device in (None, "cpu")
        problem = f"is not available; this machine has cpu and {count} cuda devices"
        require(available, "device", self.device, problem)

    @property
    def torch_device(self) -> str:
        """The device, by default a GPU where there is one."""
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Prompt:
    """A text to generate from: a text to continue, or a text with gaps."""

    text: str  # as the user wrote it
    pieces: tuple[str | int, ...]  # texts, and the number of tokens of each gap
    gaps: bool

    @classmethod
    def with_gaps(cls, text: str) -> "Prompt":
        """Return a text in which {{8}} is a gap of 8 tokens."""
        pieces = GAP.split(text)  # text, the length of a gap, text, ...
        return cls(text, tuple(int(piece) if turn % 2 else piece for turn, piece in enumerate(pieces)), True)

    @classmethod
    def to_continue(cls, text: str) -> "Prompt":
        """Return a text to continue, in which {{8}} has no meaning."""
        return cls(text, (text,), False)

    @property
    def gap_lengths(self) -> list[int]:
        """The number of tokens of each gap."""
        return [piece for piece in self.pieces if isinstance(piece, int)]

    def ids(self, tokenizer: Tokenizer, mask_id: int) -> list[int]:
        """Return its token ids, with [MASK] in the gaps."""
        pieces = [[mask_id] * piece if isinstance(piece, int) else tokenizer.encode(piece) for piece in self.pieces]
        return [token for piece in pieces for token in piece]


def read_request(request: Request) -> list[Prompt]:
    """Return the prompts of a request, each once.

    Raises: ConfigurationError for files that cannot be read or have another format.
    """
    for name in ("prompt", "infill", "suffix"):
        check_encodable(getattr(request, name) or "", spelling(name))
    if request.prompt is not None:
        if request.gap is None or request.suffix is None:
            return [Prompt.to_continue(request.prompt)]
        pieces = (request.prompt, request.gap, request.suffix)
        return [Prompt(f"{request.prompt}{{{{{request.gap}}}}}{request.suffix}", pieces, True)]
    if request.infill is not None:
        return [Prompt.with_gaps(request.infill)]
    if request.prompt_file is not None:
        return _read_file(Path(request.prompt_file))
    if sys.stdin is None or sys.stdin.isatty():
        raise ConfigurationError("--prompt: required and not given; give it, --prompt-file or standard input")
    return [Prompt.to_continue(decode_text(sys.stdin.buffer.read(), "standard input"))]  # line ends are unchanged


def _read_file(path: Path) -> list[Prompt]:
    named = f"--prompt-file {path}"
    if text_kind(path) != ".jsonl":
        return [Prompt.to_continue(read_text(path, named))]
    constructors = {"prompt": Prompt.to_continue, "infill": Prompt.with_gaps}
    prompts = []
    with open_text(path, named) as file:
        for number, value in json_lines(file, named):
            fields = value if isinstance(value, dict) else {}
            texts = {kind: fields[kind] for kind in constructors if isinstance(fields.get(kind), str)}
            if len(texts) != 1:
                raise ConfigurationError(
                    f'{named}: line {number} is neither {{"prompt": "..."}} nor {{"infill": "..."}}; fix it'
                )
            ((kind, text),) = texts.items()
            prompts.append(constructors[kind](check_encodable(text, f"{named}: line {number}")))
    if not prompts:
        raise ConfigurationError(f"{named}: has no line; give one for each prompt")
    return prompts


def check(
    trained: Trained, request: Request, prompts: list[Prompt], sampling: Sampling, *, typed_flags: set[str]
) -> None:
    """Check that prompts suit the model and that every flag on the command line acts.

    Raises: ConfigurationError otherwise.
    """
    objective = trained.recorded["objective_name"]
    gaps = {prompt.gaps for prompt in prompts}
    check_objective(objective, trained.config.objective)
    if len(gaps) == 2:
        raise ConfigurationError(
            f"--prompt-file {request.prompt_file}: has prompts and texts with gaps; give two files"
        )
    if True in gaps:
        check_gaps(objective)
    longest, seq_length = max(sum(prompt.gap_lengths) for prompt in prompts), trained.config.data.seq_length
    if longest > seq_length:  # before so many [MASK] take memory
        raise ConfigurationError(
            f"--infill: a text has {longest} tokens in its gaps, and this model was trained on {seq_length} "
            "(--seq-length); shorten it"
        )
    if "" in {prompt.text for prompt in prompts}:
        check_empty_prompt(trained.config.data)
    masked_only = {spelling(name) for name in (*MASKED, "show_steps", "no_show_steps")}
    masked = capabilities(objective).generation == "masked"
    for name in typed_flags:
        if not masked and name in masked_only:
            raise ConfigurationError(
                f"{name}: acts in masked diffusion, and {trained.name} was trained with --objective {objective}; leave "
                "it out"
            )
    if gaps == {True} and "--max-new-tokens" in typed_flags:
        raise ConfigurationError("--max-new-tokens: has no effect, the gaps have their own lengths; leave it out")
    if request.num_samples > 1 and not sampling.is_random:
        raise ConfigurationError(
            f"--num-samples {request.num_samples}: all would be equal, as decoding is greedy; give a --temperature"
        )
    if "--seed" in typed_flags and not sampling.is_random:
        raise ConfigurationError(
            f"{typed('seed', sampling.seed)}: has no effect on greedy decoding; give a --temperature"
        )
    num_texts = len(prompts) * request.num_samples
    if request.show_steps and num_texts > 1:
        raise ConfigurationError(f"--show-steps: shows one text, and this command generates {num_texts}")


def max_generated_tokens(prompts: list[Prompt], request: Request, sampling: Sampling) -> int:
    """Return the maximum number of tokens that are generated."""
    lengths = [sum(prompt.gap_lengths) if prompt.gaps else sampling.max_new_tokens for prompt in prompts]
    return request.num_samples * sum(lengths)
