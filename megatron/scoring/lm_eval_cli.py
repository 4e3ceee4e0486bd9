"""Downstream tasks: lm-eval's command line, with training runs as its model `megatron`.

    python -m megatron.scoring.lm_eval_cli --pretrained runs/mdm --checkpoint best --tasks arc_easy,piqa --num-mc 32
    python -m megatron.scoring.lm_eval_cli --pretrained runs/any_order --tasks piqa --likelihood iwae --num-orders 16
    python -m megatron.scoring.lm_eval_cli --model megatron --model_args pretrained=runs/ar --tasks lambada_standard
    torchrun --standalone --nproc-per-node 8 -m megatron.scoring.lm_eval_cli --pretrained runs/mdm --tasks piqa

All options of `lm_eval run` but chat templates work in addition to those below: --tasks, --limit, --num_fewshot,
--log_samples, --output_path, --use_cache, --include_path, --gen_kwargs, --batch_size (sequences; default auto:
--batch-tokens). Flags of the published scorers are accepted: --eval_method ar|mc, --only_mc_nll, --only_generate,
--load, --task_list, --results_path, --eval_fp32; docs/scoring.md lists the differences in what they compute. Flags of
the model and its training have no effect, since a run records them; a flag that contradicts the run is refused.
"""

import argparse
import logging
import sys
import time
from dataclasses import fields
from pathlib import Path

from megatron.training.launcher import launch, report_error

# isort: split
# OMP_WAIT_POLICY is set by the import above and must precede torch
from megatron.config.flags import DescribedFormatter, Parser, add_section, spelling, typed_flags
from megatron.config.sections import Config
from megatron.errors import ConfigurationError
from megatron.log import configure_logging
from megatron.parallel.launch import adopt_launcher, rank
from megatron.parallel.mesh import initialize_parallel
from megatron.scoring.lm_eval_arguments import Source, read_arguments, read_generation
from megatron.scoring.lm_eval_errors import check_include_path, faults_of_tasks, leave_without_lm_eval
from megatron.scoring.published_flags import check_training_flags, split_training_flags, translate_published
from megatron.scoring.requests import Scoring
from megatron.training.load_run import trained_config

try:
    from lm_eval._cli import HarnessCLI
    from lm_eval.api.registry import model_registry
    from lm_eval.utils import sanitize_model_name, setup_logging

    from megatron.scoring.lm_eval_adapter import MegatronLM
except ImportError as missing:
    leave_without_lm_eval(missing)

logger = logging.getLogger(__name__)

NAME = "megatron"
NO_TASKS = "--tasks: required and not given; name tasks, `ls tasks` lists them"
SECTIONS = (Source, Scoring)


def parser() -> Parser:
    """Return the parser of the flags that are not lm-eval's."""
    scoring_parser = Parser(
        prog="python -m megatron.scoring.lm_eval_cli",
        description=__doc__,
        formatter_class=DescribedFormatter,
        allow_abbrev=False,
    )
    for section in SECTIONS:
        add_section(scoring_parser, section, {})
    return scoring_parser


def translate(arguments: list[str]) -> list[str]:
    """Return a command line with the published scorers' flags and field names replaced by our flags and lm-eval's."""
    ours = {field.name: spelling(field.name) for section in SECTIONS for field in fields(section)}
    words = [piece for word in arguments for piece in (word.split("=", 1) if word.startswith("--") else [word])]
    words = translate_published(words)
    return [ours.get(word.removeprefix("--"), word) if word.startswith("--") else word for word in words]


def read(arguments: list[str]) -> argparse.Namespace:
    """Return lm-eval's namespace of a command line, with our flags in its `model_args`.

    Raises: ConfigurationError for unknown flags, wrong values and flags that contradict the run.
    """
    arguments = translate(arguments)
    scoring_parser, lm_eval_cli = parser(), HarnessCLI()
    ours, remaining = scoring_parser.parse_some(arguments)
    typed_names = typed_flags(arguments)
    names = [field.name for section in SECTIONS for field in fields(section)]
    typed = {name: getattr(ours, name) for name in names if spelling(name) in typed_names}
    has_command = remaining[:1] in (["run"], ["ls"], ["validate"])
    command, *words = remaining if has_command else ["run", *remaining]
    training_words = []
    if command == "run":
        lm_eval_flags = set(lm_eval_cli._subparsers.choices["run"]._option_string_actions)
        scoring_flags = set(scoring_parser._option_string_actions)
        words, training_words = split_training_flags(words, lm_eval_flags, scoring_flags)
        if not words:
            raise ConfigurationError(NO_TASKS)
    sys.argv = [sys.argv[0], command, *words]  # read by lm-eval
    options = lm_eval_cli.parse_args()
    if options.command == "run":
        options.model = options.model or NAME
        if options.model == NAME:
            model_args = options.model_args or {}
            if "run" in model_args:
                model_args["pretrained"] = model_args.pop("run")
            options.model_args = model_args | typed
            options.device = options.device or "auto"  # lm-eval's default is the first GPU, on every rank
            if not hasattr(options, "batch_size"):
                options.batch_size = "auto"  # lm-eval's default is one sequence
            if training_words and options.model_args.get("pretrained"):
                check_training_flags(options.model_args["pretrained"], training_words)
        elif typed or training_words:
            name = spelling(next(iter(typed))) if typed else training_words[0]
            raise ConfigurationError(f"{name}: acts on --model {NAME}, and --model {options.model} was given")
    return options


def prepare(options: argparse.Namespace) -> Config:
    """Return the configuration of the run that is scored, after checking everything that needs no scoring.

    Raises: ConfigurationError for a wrong run, checkpoint, tokenizer or setting.
    """
    source, scoring = read_arguments(options.model_args)
    trained = source.open()
    objective, seq_length = trained.config.objective, trained.config.data.seq_length
    scoring.check(objective, seq_length)
    trained.tokenizer()
    if not options.tasks and not options.config:
        raise ConfigurationError(NO_TASKS)
    if "apply_chat_template" in options:
        raise ConfigurationError(
            "--apply_chat_template: a run has no chat template, since it was pretrained on plain text; leave it out"
        )
    if options.output_path and not source.records:
        folder = Path(options.output_path)
        folder = folder.parent if folder.suffix == ".json" else folder / sanitize_model_name(trained.name)
        options.model_args["records"] = str(folder / f"scores_{time.strftime('%Y-%m-%dT%H-%M-%S')}.jsonl")
    check_include_path(options.include_path)
    # a max_gen_toks of the tasks themselves is checked when they are loaded
    read_generation({"max_gen_toks": 1} | (options.gen_kwargs or {}), objective.objective, seq_length)
    if options.use_cache:  # our cache, not lm-eval's
        options.model_args["use_cache"] = options.use_cache
        options.use_cache = None
    return trained_config(trained.name)


def main(arguments: list[str] | None = None) -> None:
    """Run lm-eval. Exits with code 0, 2 (an error of the user, in one line before anything is scored) or 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if NAME not in model_registry:
        model_registry.register(NAME, target=MegatronLM)
    try:
        adopt_launcher()
        configure_logging()  # before flags are read, since no-op flags are logged
        setup_logging(logging.INFO if rank() == 0 else logging.WARNING)
        options = read(arguments)
    except ConfigurationError as error:
        sys.exit(report_error(error, 2))
    if options.command != "run" or options.model != NAME:
        options.func(options)  # lm-eval alone
        return

    def work(config: Config, detector) -> None:
        if detector:
            initialize_parallel(minutes=config.parallel.distributed_timeout_minutes)
        with faults_of_tasks(options.tasks or []):
            options.func(options)

    launch(lambda: prepare(options), work)


if __name__ == "__main__":
    main()
