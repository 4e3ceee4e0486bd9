"""Downstream tasks: lm-eval's own command line, with trained runs as its model `megatron`.

    python -m megatron.evaluation.harness --pretrained runs/mdm --checkpoint best --tasks arc_easy,hellaswag --num-mc 32
    python -m megatron.evaluation.harness --model megatron --model_args pretrained=runs/ar --tasks lambada_standard
    torchrun --standalone --nproc-per-node 8 -m megatron.evaluation.harness --pretrained runs/mdm --tasks piqa

All options of `lm_eval run` are taken beside the ones below: --tasks, --limit, --num_fewshot, --log_samples,
--output_path, --use_cache, --include_path, --gen_kwargs, --batch_size (rows; default auto: --batch-tokens). Spellings
of the published scorers are understood: --eval_method ar|mc, --only_mc_nll, --only_generate, --load, --task_list,
--results_path, --eval_fp32; docs/scoring.md describes what they computed otherwise. Flags of the model and its training
have no effect, as a run records them; one that contradicts the run is refused.
"""

import argparse
import logging
import sys
import time
from dataclasses import fields
from pathlib import Path

from megatron.training.main import say, start

# isort: split
# libgomp has been told how to wait: before that nothing may load torch
from megatron.config.flags import DescribedFormatter, Parser, add_section, spelling
from megatron.config.sections import Config
from megatron.errors import ConfigurationError
from megatron.evaluation.lm_eval_errors import check_include_path, faults_of_tasks, leave_without_lm_eval
from megatron.evaluation.published_flags import check_training_flags, split_training_flags, translate_published
from megatron.evaluation.requests import Scoring
from megatron.log import configure_logging
from megatron.parallel.launch import adopt_launcher, rank
from megatron.parallel.mesh import initialize_parallel
from megatron.training.load_run import trained_config

try:
    from lm_eval._cli import HarnessCLI
    from lm_eval.api.registry import model_registry
    from lm_eval.utils import sanitize_model_name, setup_logging

    from megatron.evaluation.language_model import MegatronLM, Source, read_arguments, read_generation
except ImportError as missing:
    leave_without_lm_eval(missing)

logger = logging.getLogger(__name__)

NAME = "megatron"
NO_TASKS = "--tasks: required and not given; name tasks, `ls tasks` lists them"
SECTIONS = (Source, Scoring)


def parser() -> Parser:
    """Return the parser of the flags that are not lm-eval's."""
    made = Parser(
        prog="python -m megatron.evaluation.harness",
        description=__doc__,
        formatter_class=DescribedFormatter,
        allow_abbrev=False,
    )
    for section in SECTIONS:
        add_section(made, section, {})
    return made


def translate(arguments: list[str]) -> list[str]:
    """Return a command line in our spellings and lm-eval's, of which other spellings are understood."""
    ours = {field.name: spelling(field.name) for section in SECTIONS for field in fields(section)}
    words = [part for word in arguments for part in (word.split("=", 1) if word.startswith("--") else [word])]
    words = translate_published(words)
    return [ours.get(word.removeprefix("--"), word) if word.startswith("--") else word for word in words]


def read(arguments: list[str]) -> argparse.Namespace:
    """Return lm-eval's own namespace of a command line; raise ConfigurationError for flags of ours that are wrong."""
    arguments = translate(arguments)
    scoring_parser, lm_eval_cli = parser(), HarnessCLI()
    ours, rest = scoring_parser.parse_some(arguments)
    typed = {
        field.name: getattr(ours, field.name)
        for section in SECTIONS
        for field in fields(section)
        if getattr(ours, field.name) != field.default
    }
    command, *words = rest if rest[:1] in (["run"], ["ls"], ["validate"]) else ["run", *rest]
    training_words = []
    if command == "run":
        lm_eval_flags = set(lm_eval_cli._subparsers.choices["run"]._option_string_actions)
        scoring_flags = set(scoring_parser._option_string_actions)
        words, training_words = split_training_flags(words, lm_eval_flags, scoring_flags)
        if not words:
            raise ConfigurationError(NO_TASKS)
    sys.argv = [sys.argv[0], command, *words]  # which lm-eval reads
    asked = lm_eval_cli.parse_args()
    if asked.command == "run":
        asked.model = asked.model or NAME
        if asked.model == NAME:
            given = asked.model_args or {}
            if "run" in given:
                given["pretrained"] = given.pop("run")
            asked.model_args = given | typed
            asked.device = asked.device or "auto"  # its own default is the first GPU, on every process
            if not hasattr(asked, "batch_size"):
                asked.batch_size = "auto"  # its own default is one row
            if training_words and asked.model_args.get("pretrained"):
                check_training_flags(asked.model_args["pretrained"], training_words)
        elif typed or training_words:
            name = spelling(next(iter(typed))) if typed else training_words[0]
            raise ConfigurationError(f"{name}: acts on --model {NAME}, and --model {asked.model} was given")
    return asked


def prepare(asked: argparse.Namespace) -> Config:
    """Return the configuration of the run that is scored, once nothing speaks against the command.

    Raises ConfigurationError for a run, checkpoint, tokenizer or setting that is wrong.
    """
    source, scoring = read_arguments(asked.model_args)
    trained = source.open()
    objective = trained.recorded["objective_name"]
    scoring.check(objective)
    trained.tokenizer()
    if not asked.tasks and not asked.config:
        raise ConfigurationError(NO_TASKS)
    if asked.output_path and not source.records:
        folder = Path(asked.output_path)
        folder = folder.parent if folder.suffix == ".json" else folder / sanitize_model_name(source.pretrained)
        asked.model_args["records"] = str(folder / f"scores_{time.strftime('%Y-%m-%dT%H-%M-%S')}.jsonl")
    check_include_path(asked.include_path)
    # a length that tasks say themselves is known when they are loaded
    read_generation({"max_gen_toks": 1} | (asked.gen_kwargs or {}), objective, trained.config.data.seq_length)
    if asked.use_cache:  # ours, not lm-eval's own
        asked.model_args["use_cache"], asked.use_cache = asked.use_cache, None
    return trained_config(source.pretrained)


def main(arguments: list[str] | None = None) -> None:
    """Run lm-eval. Leaves with 0, 2 (user's mistake, said in one line before anything is scored) or 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if NAME not in model_registry:
        model_registry.register(NAME, target=MegatronLM)
    try:
        adopt_launcher()
        configure_logging()  # before flags are read: some are named as without effect
        setup_logging(logging.INFO if rank() == 0 else logging.WARNING)
        asked = read(arguments)
    except ConfigurationError as error:
        sys.exit(say(error, 2))
    if asked.command != "run" or asked.model != NAME:
        asked.func(asked)  # lm-eval alone
        return

    def work(config: Config, watch) -> None:
        if watch:
            initialize_parallel(minutes=config.parallel.distributed_timeout_minutes)
        with faults_of_tasks(asked.tasks or []):
            asked.func(asked)

    start(lambda: prepare(asked), work)


if __name__ == "__main__":
    main()
