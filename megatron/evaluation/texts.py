"""What a user asks a trained run to write, and what it wrote: prompts and texts with gaps in, records out."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from megatron.config.flags import flag, require, spelling, typed
from megatron.data.text_files import check_encodable, decode_text, json_lines, open_text, read_text, text_kind
from megatron.data.tokenizer import Tokenizer
from megatron.errors import ConfigurationError
from megatron.evaluation.generate import check_empty_prompt, check_gaps, check_objective, generate, infill
from megatron.evaluation.generate_diffusion import OnStep
from megatron.evaluation.sampling import MASKED, Sampling
from megatron.training.load_run import Trained
from megatron.training.run_folder import writing

GAP = re.compile(r"\{\{(\d+)\}\}")
HIDDEN = "░"  # how a place without a token is shown
SOURCES = ("prompt", "prompt_file", "infill")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is written. Without any of the first three the prompt is read from standard input."""

    prompt: str | None = flag(None, 'the text to go on from; "" stands for the start of a document', metavar="TEXT")
    prompt_file: str | None = flag(
        None,
        'a text file, which is one prompt as it is, or a .jsonl file of {"prompt": ...} or {"infill": ...} lines; '
        "each also .gz or .zst",
        metavar="FILE",
    )
    infill: str | None = flag(
        None, "masked diffusion: a text whose gaps are filled, {{8}} standing for one of 8 tokens", metavar="TEXT"
    )
    suffix: str | None = flag(None, "masked diffusion: what stands behind --prompt and --gap", metavar="TEXT")
    gap: int | None = flag(None, "masked diffusion: tokens to fill in between --prompt and --suffix", metavar="N")
    num_samples: int = flag(1, "texts of each prompt, drawn independently")
    batch_size: int = flag(16, "texts that are written at one time; no text depends on it")
    checkpoint: str = flag(
        "latest", "the newest one, or the one of lowest loss on the first set", choices=("latest", "best")
    )
    average: bool = flag(False, "take the average of the weights that --ema-decay or --average-from-samples kept")
    dtype: str = flag("float32", "what is computed in", choices=("float32", "bfloat16"))
    device: str | None = flag(None, "cpu, cuda or cuda:N (by default a GPU where there is one)")
    output: str | None = flag(None, "write prompts, texts, ids and settings to a file too", metavar="FILE.jsonl")
    show_steps: bool = flag(False, "masked diffusion: show on standard error how the text is filled in, step by step")

    def __post_init__(self):
        for name in ("num_samples", "batch_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        require(self.gap is None or self.gap >= 1, "gap", self.gap, "must be at least 1")
        given = [spelling(name) for name in SOURCES if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigurationError(f"{given[0]} and {given[1]}: both say what to write; give one of them")
        if (self.suffix is None) != (self.gap is None) or (self.gap and self.prompt is None):
            raise ConfigurationError("--prompt, --gap and --suffix: are given together, or --prompt alone")

        self._check_device()

    def _check_device(self) -> None:
        kind, _, number = (self.device or "cpu").partition(":")
        count = torch.cuda.device_count()
        there = (
            int(number or 0) < count if kind == "cuda" and (not number or number.isdigit()) else self.device == "cpu"
        )
        require(
            self.device is None or there,
            *("device", self.device, f"is not here, where there are cpu and {count} cuda devices; give another"),
        )

    @property
    def place(self) -> str:
        """The device."""
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Asked:
    """One text to write: a prompt, or a text with gaps."""

    text: str  # as the user wrote it
    pieces: tuple[str | int, ...]  # what stands there, and the tokens of each gap
    gaps: bool

    @classmethod
    def infill(cls, text: str) -> "Asked":
        """Return what a text asks for in which {{8}} is a gap of 8 tokens."""
        pieces = GAP.split(text)  # text, the length of a gap, text, ...
        return cls(text, tuple(int(piece) if turn % 2 else piece for turn, piece in enumerate(pieces)), True)

    @classmethod
    def prompt(cls, text: str) -> "Asked":
        return cls(text, (text,), False)

    @property
    def lengths(self) -> list[int]:
        """How many tokens each gap holds."""
        return [piece for piece in self.pieces if isinstance(piece, int)]

    def ids(self, tokenizer: Tokenizer, mask_id: int) -> list[int]:
        """Return its token ids, [MASK] in the gaps."""
        found = [[mask_id] * piece if isinstance(piece, int) else tokenizer.encode(piece) for piece in self.pieces]
        return [index for piece in found for index in piece]


def read_request(request: Request) -> list[Asked]:
    """Return what is asked for, without its samples; raise ConfigurationError for files that are none."""
    for name in ("prompt", "infill", "suffix"):
        check_encodable(getattr(request, name) or "", spelling(name))
    if request.gap is not None:
        pieces = (request.prompt, request.gap, request.suffix)
        return [Asked(f"{request.prompt}{{{{{request.gap}}}}}{request.suffix}", pieces, True)]
    if request.prompt is not None:
        return [Asked.prompt(request.prompt)]
    if request.infill is not None:
        return [Asked.infill(request.infill)]
    if request.prompt_file is not None:
        return _read_file(Path(request.prompt_file))
    if sys.stdin is None or sys.stdin.isatty():
        raise ConfigurationError("--prompt: required and not given; give it, --prompt-file or standard input")
    return [Asked.prompt(decode_text(sys.stdin.buffer.read(), "standard input"))]  # line ends stay as they are


def _read_file(path: Path) -> list[Asked]:
    named = f"--prompt-file {path}"
    if text_kind(path) != ".jsonl":
        return [Asked.prompt(read_text(path, named))]
    makers = {"prompt": Asked.prompt, "infill": Asked.infill}
    prompts = []
    with open_text(path, named) as file:
        for number, value in json_lines(file, named):
            kinds = [kind for kind in makers if isinstance(value, dict) and isinstance(value.get(kind), str)]
            if len(kinds) != 1:
                raise ConfigurationError(
                    f'{named}: line {number} is neither {{"prompt": "..."}} nor {{"infill": "..."}}; fix it'
                )
            text = check_encodable(value[kinds[0]], f"{named}: line {number}")
            prompts.append(makers[kinds[0]](text))
    if not prompts:
        raise ConfigurationError(f"{named}: holds no line; give one for each prompt")
    return prompts


def check(trained: Trained, request: Request, asked: list[Asked], sampling: Sampling, given: set[str]) -> None:
    """Raise ConfigurationError for flags that would not act; `given` are the flags that were typed."""
    objective, gaps = trained.recorded["objective_name"], {each.gaps for each in asked}
    check_objective(objective, trained.config.objective)
    if len(gaps) == 2:
        raise ConfigurationError(
            f"--prompt-file {request.prompt_file}: has prompts and texts with gaps; give two files"
        )
    if True in gaps:
        check_gaps(objective)
    if "" in {each.text for each in asked}:
        check_empty_prompt(trained.config.data)
    idle = {spelling(name): objective != "mdm" for name in (*MASKED, "show_steps", "no_show_steps")}
    for name in given:
        if idle.get(name):
            rule = (
                f"acts in masked diffusion, and {trained.name} was trained with --objective {objective}; leave it out"
            )
            raise ConfigurationError(f"{name}: {rule}")
    if gaps == {True} and "--max-new-tokens" in given:
        raise ConfigurationError("--max-new-tokens: a gap says itself how many tokens it holds; leave it out")
    if request.num_samples > 1 and not sampling.draws:
        raise ConfigurationError(
            f"--num-samples {request.num_samples}: all would be the same, as nothing is drawn; give a --temperature"
        )
    if "--seed" in given and not sampling.draws:
        raise ConfigurationError(f"{typed('seed', sampling.seed)}: nothing is drawn; give a --temperature")
    if request.show_steps and len(asked) * request.num_samples > 1:
        raise ConfigurationError(f"--show-steps: shows one text, and {len(asked) * request.num_samples} are asked for")


def tokens_to_come(asked: list[Asked], request: Request, sampling: Sampling) -> int:
    """Return how many tokens are generated at most."""
    lengths = [sum(each.lengths) if each.gaps else sampling.max_new_tokens for each in asked]
    return request.num_samples * sum(lengths)


def write_texts(
    trained: Trained,
    request: Request,
    asked: list[Asked],
    sampling: Sampling,
    advance: Callable[[int], None] = lambda tokens: None,
    show: Callable[[str], None] = print,
) -> list[dict]:
    """Return a record a text: what was asked, what was written, its ids, whole text, and all that decided it.

    `advance` is told of each token, and `show` given a line a step where --show-steps asks for it.
    """
    tokenizer, mask_id = trained.tokenizer(), trained.vocabulary.mask_id
    model = trained.model(request.average, getattr(torch, request.dtype), request.place)
    asked = [each for each in asked for _ in range(request.num_samples)]
    ids = [each.ids(tokenizer, mask_id) for each in asked]
    told: OnStep | None = None
    if request.show_steps:

        def told(step, rows, tokens):
            show(f"step {step:4}: {visible(tokens[0].tolist(), tokenizer, mask_id)}")

    objective = trained.recorded["objective_name"]
    settings = {"batch_size": request.batch_size, "seq_length": trained.config.data.seq_length}
    make = infill if asked[0].gaps else generate
    made = make(model, objective, ids, sampling, tokenizer.eod, **settings, advance=advance, on_step=told)
    idle = [*(() if objective == "mdm" else MASKED), *(["max_new_tokens"] if asked[0].gaps else ())]
    source = {
        "run": trained.name,
        "checkpoint": str(trained.checkpoint),
        "iteration": trained.meta["iteration"],
        "objective": objective,
        "average": request.average,
        "dtype": request.dtype,
        "device": request.place,
        **{name: value for name, value in asdict(sampling).items() if name not in idle},
    }
    return [
        _record(each, index % request.num_samples, known, new, tokenizer, mask_id) | {"settings": source}
        for index, (each, known, new) in enumerate(zip(asked, ids, made, strict=True))
    ]


def _record(asked: Asked, sample: int, known: list[int], new: list[int], tokenizer: Tokenizer, mask_id: int) -> dict:
    """Return what is written down of one text: `text` and `ids` are new, `whole` is the text to read."""
    if not asked.gaps:
        whole = tokenizer.decode([*known, *new])
        return {"prompt": asked.text, "sample": sample, "text": tokenizer.decode(new), "ids": new, "whole": whole}
    filled = [token for token, before in zip(new, known, strict=True) if before == mask_id]
    gaps = []
    for length in asked.lengths:
        gaps.append(tokenizer.decode(filled[:length]))
        filled = filled[length:]
    whole = tokenizer.decode(new)
    return {"infill": asked.text, "sample": sample, "text": whole, "ids": new, "whole": whole, "gaps": gaps}


def visible(ids: list[int], tokenizer: Tokenizer, mask_id: int) -> str:
    """Return a text of which not all is there yet, in one line."""
    runs: list[list[int]] = [[]]
    for index in ids:
        if index == mask_id or (runs[-1] and runs[-1][-1] == mask_id):
            runs.append([])
        runs[-1].append(index)
    shown = [HIDDEN if run == [mask_id] else tokenizer.decode(run) for run in runs]
    return "".join(shown).replace("\n", "\\n")


def write_records(path: Path, records: list[dict]) -> None:
    """Write a line a record; the file is there whole or not at all."""
    aside = path.with_name(path.name + ".partial")
    with writing(path):
        aside.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        aside.replace(path)
