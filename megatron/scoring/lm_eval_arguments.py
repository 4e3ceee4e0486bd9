"""What lm-eval passes to a model: --model_args, --batch_size and the generation settings of a task."""

import difflib
import typing
from dataclasses import dataclass, fields
from typing import Any

from megatron.config.flags import flag, require
from megatron.errors import ConfigurationError
from megatron.generation.sampling import MASKED, Sampling
from megatron.objectives.registry import capabilities
from megatron.scoring.requests import Scoring
from megatron.training.load_run import Trained, open_trained

MAX_GEN_TOKS = 256  # where a task does not set max_gen_toks: lm-eval's default


@dataclass(frozen=True, kw_only=True)
class Source:
    """Which model. In lm-eval's own form: --model megatron --model_args pretrained=RUN,checkpoint=best,num_mc=16."""

    pretrained: str | None = flag(None, "the run: a folder that --save wrote, or a checkpoint in it", metavar="RUN")
    checkpoint: str = flag(
        "latest",
        "the newest checkpoint, or that of the lowest loss on the first validation set",
        choices=("latest", "best"),
    )
    average: bool = flag(False, "use the averaged weights of --ema-decay or --average-from-samples")
    dtype: str | None = flag(
        None, "dtype of the computation (default: that of the training run)", choices=("float32", "bfloat16")
    )
    records: str | None = flag(
        None,
        "write one line per request: its score, standard error and samples; replaces the file (default: "
        "scores_*.jsonl next to the samples of --output_path)",
        metavar="FILE.jsonl",
    )

    def __post_init__(self):
        for name, choices in (("checkpoint", ("latest", "best")), ("dtype", (None, "float32", "bfloat16"))):
            value = getattr(self, name)
            require(value in choices, name, value, f"is not one of {', '.join(filter(None, choices))}")

    def open(self) -> Trained:
        """Return the run.

        Raises: ConfigurationError where there is no run, or its checkpoint is damaged.
        """
        if not self.pretrained:
            raise ConfigurationError("--pretrained: required and not given; name a folder that --save wrote")
        return open_trained(self.pretrained, self.checkpoint)


def read_arguments(arguments: dict) -> tuple[Source, Scoring]:
    """Return the sections of lm-eval's --model_args; `method` is the earlier name of `likelihood`.

    Raises: ConfigurationError for unknown names and values of another type.
    """
    arguments = {"likelihood" if name == "method" else name: value for name, value in arguments.items()}
    sections = []
    known = {}
    for section in (Source, Scoring):
        hints = typing.get_type_hints(section)
        names = {field.name for field in fields(section)}
        known |= dict.fromkeys(names)
        values = {name: _convert(name, arguments[name], hints[name]) for name in names & set(arguments)}
        sections.append(section(**values))
    for name in arguments:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {close[0]}?" if close else f"the names are {', '.join(sorted(known))}"
            raise ConfigurationError(f"--model_args {name}={arguments[name]}: unknown name; {remedy}")
    return tuple(sections)


def _convert(name: str, value: Any, hint: Any) -> Any:
    """Return a value of --model_args in the type of its field; lm-eval parses every number as a number."""
    kinds = [kind for kind in (typing.get_args(hint) or (hint,)) if kind is not type(None)]
    if value is None or kinds[0] is str:
        return value if value is None else str(value)
    kind = (int, float) if kinds[0] is float else kinds[0]
    if not isinstance(value, kind) or (isinstance(value, bool) and kinds[0] is not bool):
        raise ConfigurationError(f"--model_args {name}={value}: is not of type {kinds[0].__name__}; give such a value")
    return value


def read_batch_size(batch_size: Any) -> int:
    """Return the sequences of lm-eval's --batch_size."""
    if not str(batch_size).isdigit() or not int(batch_size):
        raise ConfigurationError(
            f"--batch_size {batch_size}: is neither auto nor a number of sequences; give one of them"
        )
    return int(batch_size)


def read_generation(arguments: dict, objective: str, seq_length: int) -> tuple[Sampling, tuple[str, ...]]:
    """Return the generation settings of a task and its stop strings.

    Without do_sample decoding is greedy unless there is a temperature; with do_sample the temperature defaults to 1.

    Raises: ConfigurationError for unknown settings and for lengths that leave no room for a prompt.
    """
    settings = dict(arguments)
    until = settings.pop("until", None) or ()
    until = (until,) if isinstance(until, str) else tuple(until)
    length = int(settings.pop("max_gen_toks", MAX_GEN_TOKS))
    if length >= seq_length:
        raise ConfigurationError(
            f"max_gen_toks {length} of a task: leaves no room for a prompt in the {seq_length} tokens of --seq-length "
            f"that this model was trained on; give --gen_kwargs max_gen_toks={seq_length // 2} or fewer"
        )
    sample = settings.pop("do_sample", None)
    temperature = float(settings.pop("temperature", 1.0 if sample else 0.0)) if sample is not False else 0.0
    if sample is False:
        settings.pop("temperature", None)
    names = {field.name for field in fields(Sampling)} - {"max_new_tokens"}
    for name in settings:
        if name not in names or (capabilities(objective).generation == "causal" and name in MASKED):
            problem = "acts in masked diffusion only" if name in names else "is not supported by these models"
            raise ConfigurationError(f"--gen_kwargs {name}={settings[name]}: {problem}; leave it out")
    if not temperature:  # these act on random draws only
        for name in ("top_k", "top_p"):
            settings.pop(name, None)
    return Sampling(max_new_tokens=length, temperature=temperature, **settings), until
