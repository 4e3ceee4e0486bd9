"""Flags of the published scorers: their translation, and flags of the model and its training, which a run records."""

import argparse
import difflib
import logging
from dataclasses import asdict

from megatron.config.compatibility import translate
from megatron.config.compatibility_entries import NoOp, Same, no_op, no_op_value, one_table, refused
from megatron.config.compatibility_table import TABLE
from megatron.config.flags import spelling, typed
from megatron.config.sections import Config
from megatron.config.sizes import ladder_settings
from megatron.errors import ConfigurationError
from megatron.training.command_line import parser as training_parser
from megatron.training.load_run import trained_config

logger = logging.getLogger(__name__)

EVAL_METHODS = {"ar": "chain", "mc": "bound"}
PUBLISHED = one_table(
    {
        "--load": Same("--pretrained"),
        "--run": Same("--pretrained"),
        "--task_list": Same("--tasks"),
        "--results_path": Same("--output_path"),
        "--eval_fp32": Same("--dtype float32"),
        "--method": Same("--likelihood"),  # its earlier name here
    },
    refused("--dry-run", "not supported, only training has a dry run; leave it out"),
    no_op("--adaptive_seq_len", "a sequence ends with its answer"),
    no_op("--inference", "scoring never trains"),
    no_op("--no-load-optim", "scoring reads no optimizer state"),
    no_op_value("--max_chunk_size", "all later tokens of an answer are masked; batches are --batch-tokens"),
    no_op_value("--inference-batch-times-seqlen-threshold --max-tokens-to-oom", "batches are --batch-tokens"),
    no_op_value(
        "--sampling_eps", "mask ratios begin at 0", "0 0.0", "not supported, mask ratios begin at 0; leave it out"
    ),
    no_op_value(
        "--load-tag",
        "--checkpoint latest is the default",
        "latest",
        "not supported, --load also takes the folder of a checkpoint; give that, or --checkpoint best",
    ),
)


def translate_published(arguments: list[str]) -> list[str]:
    """Return a command line with the published scorers' flags replaced by ours and lm-eval's.

    No-op flags are logged and dropped.

    Raises: ConfigurationError for missing and unknown values.
    """
    words = []
    remaining = list(arguments)
    while remaining:
        word = remaining.pop(0)
        if word == "--eval_method":
            method = remaining.pop(0) if remaining and not remaining[0].startswith("--") else None
            if method not in EVAL_METHODS:
                problem = "is not followed by a value" if method is None else "is not one of ar, mc"
                flag = word if method is None else f"{word} {method}"
                raise ConfigurationError(f"{flag}: {problem}; give one, or --likelihood chain or bound")
            words += ["--likelihood", EVAL_METHODS[method]]
        else:
            words.append(word)
    return translate(words, 1, PUBLISHED)


def split_training_flags(
    words: list[str], lm_eval_flags: set[str], scoring_flags: set[str]
) -> tuple[list[str], list[str]]:
    """Return the words of a command line for lm-eval, and those of flags, with their values, of training alone.

    Raises: ConfigurationError for unknown flags; prefixes of lm-eval's flags are valid.
    """
    training_flags = set(training_parser("ar")._option_string_actions) | set(TABLE)
    training_flags -= {spelling(name.removeprefix("--")) for name in lm_eval_flags}  # --batch-size is lm-eval's
    lm_eval_words = []
    training_words = []
    target = lm_eval_words
    for word in words:
        if word in lm_eval_flags:
            target = lm_eval_words
        elif word in training_flags:
            target = training_words
        elif word.startswith("--"):
            target = lm_eval_words
            if not any(flag.startswith(word) for flag in lm_eval_flags):
                close = difflib.get_close_matches(word, sorted(lm_eval_flags | scoring_flags | training_flags), n=1)
                remedy = f"did you mean {close[0]}?" if close else "--help and `lm-eval run --help` list every flag"
                raise ConfigurationError(f"unknown flag {word}; {remedy}")
        target.append(word)
    return lm_eval_words, training_words


def check_training_flags(run: str, words: list[str]) -> None:
    """Log that training flags have no effect in scoring.

    Raises: ConfigurationError where their values are invalid, or the run has another model, sequence length or
    objective.
    """
    parser = training_parser("ar")
    for action in parser._actions:
        action.default = argparse.SUPPRESS  # keep only flags on the command line
    flags = vars(parser.parse_known(translate(words, 1)))
    size = ladder_settings(flags["model_size"]) if "model_size" in flags else {}
    recorded = _recorded_values(trained_config(run))
    for name, value in (size | flags).items():
        if name in recorded and value != recorded[name]:
            raise ConfigurationError(
                f"{typed(name, value)}: {run} was trained with {typed(name, recorded[name])}; leave the flag out, or "
                "score another run"
            )
    names = [word for word in words if word.startswith("--") and not isinstance(TABLE.get(word), NoOp)]
    if names:
        verb = "has" if len(names) == 1 else "have"
        logger.info("%s: %s no effect, a run records its own model, data and training", ", ".join(names), verb)


def _recorded_values(config: Config) -> dict:
    """Return the values that a flag must not contradict, by field, with derived values filled in."""
    model = config.model
    values = asdict(model) | {
        "kv_channels": model.head_size,
        "num_query_groups": model.key_value_heads,
        "ffn_hidden_size": model.mlp_size,
        "seq_length": config.data.seq_length,
        "objective": config.objective.objective,
    }
    return {name: value for name, value in values.items() if name not in ("model_size", "group_query_attention")}
