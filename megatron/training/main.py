"""From a command line to a run: parse, resolve, put together, train, and say plainly what went wrong."""

import os

# libgomp reads this when torch is loaded: spinning threads make a busy machine many times slower
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import json
import logging
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron.config.flags import HelpFormatter, Parser, add_section, build
from megatron.config.resolve import Plan, check_processes, check_resume, resolve
from megatron.config.sections import SECTIONS, Config, Vocabulary
from megatron.errors import ConfigurationError
from megatron.log import configure_logging
from megatron.model.initialise import initialise
from megatron.model.transformer import Transformer
from megatron.objectives import build_objective, build_token_dropout
from megatron.parallel.apply import parallelise
from megatron.parallel.mesh import Processes, start_processes, stop_processes
from megatron.training import checkpoint
from megatron.training.environment import choose_compile, choose_precision, describe
from megatron.training.feed import MicroBatches
from megatron.training.optimizer import build_optimizer
from megatron.training.run_folder import RunFolder, read_json, read_records
from megatron.training.sources import open_sources
from megatron.training.trainer import DivergedError, Progress, Trainer

logger = logging.getLogger(__name__)


def main(objective: str, arguments: list[str] | None = None) -> None:
    """Run one training from the command line; leave with 0 (done or left as asked), 2 (user's mistake) or 1."""
    configure_logging()
    try:
        arguments = sys.argv[1:] if arguments is None else arguments
        config = parse(objective, arguments)
        run(objective, config, shlex.join([sys.argv[0], *arguments]))
    except ConfigurationError as error:
        sys.exit(_say(error, 2))
    except (DivergedError, OSError) as error:
        sys.exit(_say(error, 1))
    finally:
        stop_processes()


def _say(error: BaseException, code: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return code


def parser(objective: str) -> Parser:
    """Return the parser of one entry point, its flags generated from the sections."""
    what = {"ar": "autoregressive", "mdm": "masked-diffusion"}[objective]
    result = Parser(
        prog=f"pretrain_{'gpt' if objective == 'ar' else 'mdm'}.py",
        description=f"Train a transformer with the {what} objective. The same command resumes a run.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    for section in SECTIONS.values():
        add_section(result, section, defaults={})
    return result


def parse(objective: str, arguments: list[str]) -> Config:
    """Return the typed configuration of a command line; raise ConfigurationError for anything wrong in it."""
    namespace = parser(objective).parse_known(arguments)
    return Config(**{name: build(section, namespace) for name, section in SECTIONS.items()})


def run(objective: str, config: Config, command: str) -> None:
    """Put one run together and train it."""
    sources = open_sources(config)
    if config.validation.skip_train and not sources.validation:
        raise ConfigurationError("--skip-train: there is nothing to evaluate; give --valid-data-path")
    vocabulary = Vocabulary(sources.tokenizer.vocabulary_size)
    plan = resolve(config, vocabulary, sources.train.unique_tokens)
    dropout = build_token_dropout(objective, config.objective, vocabulary)
    if config.training.dry_run:
        print(json.dumps({"objective_name": objective, "plan": asdict(plan), **asdict(config)}, indent=1))
        return
    processes = start_processes()
    check_processes(config, processes.size)
    bf16, compiled = choose_precision(config, processes.device), choose_compile(config, plan, processes)
    folder, origin = open_run(config, plan, objective, processes)

    model = Transformer(config.model, vocabulary)
    initialise(model, config.model, config.training.seed)
    parallelise(model, processes, bf16=bf16, compile=compiled)
    optimizer = build_optimizer(model, config.optimizer)
    checkpoint.start_optimizer_state(optimizer, origin.meta["iteration"] if origin else 0)
    progress, time_block = Progress(), config.training.global_batch_size
    if origin:
        checkpoint.load(origin.folder, checkpoint.tensors(model, optimizer))
        progress = Progress(origin.meta["iteration"], origin.meta["consumed_samples"], origin.meta["seconds"])
        time_block = origin.meta["time_block"]
    if folder:
        description = describe(objective, config, plan, sources, vocabulary, processes, bf16, compiled, command)
        description |= {"branched_from": str(origin.folder)} if origin and origin.branched else {}
        folder.start(description, origin.records if origin else [])

    data = MicroBatches(
        sources.train,
        build_objective(objective, config.objective, vocabulary, time_block),
        dropout,
        config.training.seed,
        progress.consumed_samples,
        plan.train_samples,
        config.training.micro_batch_size,
        config.training.global_batch_size,
        processes.rank,
        processes.size,
    )
    trainer = Trainer(config, plan, processes, model, optimizer, data, sources.validation, folder, progress)
    if processes.rank == 0:
        _announce(objective, config, plan, processes, bf16, compiled, origin)
    if config.validation.skip_train:
        trainer.evaluate()
        return
    try:
        reason = trainer.train()
    except BaseException as error:
        if folder:
            folder.status("failed", str(error) or type(error).__name__, progress.iteration, progress.consumed_samples)
        raise
    if processes.rank == 0:
        logger.info("%s at step %d of %d", reason, progress.iteration, trainer.steps)


def _announce(objective, config, plan, processes, bf16, compiled, origin) -> None:
    if origin:
        logger.info("continuing from %s at step %d", origin.folder, origin.meta["iteration"])
    logger.info(
        "%s: %.2fM parameters, %s unique tokens, %d samples of %d tokens in %d steps (%.1f epochs), %s%s on %s x%d",
        objective, plan.parameters / 1e6, f"{plan.unique_tokens:,}", plan.train_samples, config.data.seq_length,
        plan.steps, plan.train_samples * config.data.seq_length / plan.unique_tokens,
        "bf16" if bf16 else "fp32", ", compiled" if compiled else "", processes.device.type, processes.size,
    )  # fmt: skip


@dataclass(frozen=True)
class Origin:
    """The checkpoint a run continues from, and what was recorded until then."""

    folder: Path
    meta: dict
    records: list[dict]
    branched: bool


def open_run(
    config: Config, plan: Plan, objective: str, processes: Processes
) -> tuple[RunFolder | None, Origin | None]:
    """Return the folder to write to, on the first process, and the origin, on all of them.

    Without --save, or to evaluate only, there is nothing to write to.
    """
    opened = []

    def find() -> Origin | None:
        if config.checkpoint.save and not config.validation.skip_train:
            opened.append(RunFolder(config.checkpoint.save))
        return find_origin(config, plan, objective)

    origin = processes.from_first(find)
    return (opened[0] if opened else None), origin


def find_origin(config: Config, plan: Plan, objective: str) -> Origin | None:
    """Return the checkpoint to continue from, or None to begin; raise ConfigurationError where it does not fit."""
    settings, only_evaluate = config.checkpoint, config.validation.skip_train
    source = Path(settings.load or settings.save or "")
    branched = bool(settings.load) and (not settings.save or source.resolve() != Path(settings.save).resolve())
    if branched and settings.save and checkpoint.newest(Path(settings.save) / "checkpoints"):
        source, branched = Path(settings.save), False  # the branch was begun already: resume it
    if not (settings.load or settings.save):
        if only_evaluate:
            raise ConfigurationError("--skip-train: there is no checkpoint to evaluate; name its run with --load DIR")
        return None
    if settings.load and not (source / "config.json").exists():
        raise ConfigurationError(f"--load {source}: holds no run (no config.json); give a folder that --save wrote")
    found = checkpoint.newest(source / "checkpoints")
    if found is None:
        if branched or only_evaluate:
            raise ConfigurationError(f"--load {source}: holds no checkpoint; train it first")
        return None
    # what is only evaluated may be evaluated in other ways than it was trained with
    check_resume(read_json(source / "config.json"), config, plan, objective, branched or only_evaluate)
    path, meta = found
    best = source / "checkpoints" / "best.json"
    if not (branched or only_evaluate) and best.exists() and read_json(best)["iteration"] > meta["iteration"]:
        best.unlink()  # it named a checkpoint that is lost
    return Origin(path, meta, read_records(source, meta["iteration"]), branched)
