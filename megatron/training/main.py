"""From a command line to a run: parse, resolve, put together, train, and say plainly what went wrong."""

import os

# libgomp reads this when torch is loaded: spinning threads make a busy machine many times slower
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import json
import logging
import platform
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch

import megatron
from megatron.config.flags import HelpFormatter, Parser, add_section, build
from megatron.config.resolve import Plan, check_processes, check_resume, resolve
from megatron.config.sections import SECTIONS, Config, Vocabulary
from megatron.data.indexed import IndexedDataset, read_metadata
from megatron.data.samples import TrainSamples, ValidationWindows
from megatron.data.tokenizer import Tokenizer, build_tokenizer
from megatron.errors import ConfigurationError
from megatron.log import configure_logging
from megatron.model.initialise import initialise
from megatron.model.transformer import Transformer
from megatron.objectives import build_objective, build_token_dropout
from megatron.parallel.apply import parallelise
from megatron.parallel.mesh import Processes, start_processes, stop_processes
from megatron.training import checkpoint
from megatron.training.evaluate import ValidationSet
from megatron.training.feed import MicroBatches
from megatron.training.optimizer import build_optimizer
from megatron.training.run_folder import RunFolder, read_json, read_records
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


@dataclass(frozen=True)
class Sources:
    """The data of a run, opened and checked."""

    tokenizer: Tokenizer
    train: TrainSamples
    validation: list[ValidationSet]
    corpus: dict  # hash and source of the training text


def open_sources(config: Config) -> Sources:
    """Open training and validation data and the tokenizer that made them."""
    data = config.data
    if not data.train_data_path:
        raise ConfigurationError("--train-data-path is required; tools/preprocess_data.py writes one from text")
    if len(data.train_data_path) > 1:
        raise ConfigurationError(
            f"--train-data-path {' '.join(data.train_data_path)}: blends of several data sets are not available yet; give one prefix"
        )
    prefix = data.train_data_path[0]
    made = read_metadata(prefix)
    model = data.tokenizer_model
    if model is None and made.get("tokenizer_model"):
        model = str(Path(prefix).parent / made["tokenizer_model"])
    tokenizer = build_tokenizer(data.tokenizer_type, model, data.vocab_size)
    _check_vocabulary(prefix, made, tokenizer)
    train = TrainSamples(
        IndexedDataset(prefix), data.seq_length, config.training.seed, data.epoch_order, data.train_unique_tokens
    )
    sets = [_validation_set(item, config, tokenizer) for item in data.valid_data_path]
    return Sources(tokenizer, train, sets, {"hash": made.get("corpus_hash"), "source": made.get("source")})


def _check_vocabulary(prefix: str, made: dict, tokenizer: Tokenizer) -> None:
    size = made.get("vocabulary_size", tokenizer.vocabulary_size)
    if size != tokenizer.vocabulary_size:
        raise ConfigurationError(
            f"{prefix}: was tokenised with {size} ids, the tokenizer has {tokenizer.vocabulary_size}; "
            "give the tokenizer that made the data (--tokenizer-type, --tokenizer-model, --vocab-size)"
        )


def _validation_set(item: str, config: Config, tokenizer: Tokenizer) -> ValidationSet:
    name, separator, prefix = item.rpartition("=")
    _check_vocabulary(prefix, read_metadata(prefix), tokenizer)
    dataset = IndexedDataset(prefix)
    windows = ValidationWindows(dataset, config.data.seq_length, config.validation.eval_samples)
    return ValidationSet(name if separator else "validation", windows, len(dataset), tokenizer.token_bytes())


def run(objective: str, config: Config, command: str) -> None:
    """Put one run together and train it."""
    sources = open_sources(config)
    vocabulary = Vocabulary(sources.tokenizer.vocabulary_size)
    plan = resolve(config, vocabulary, sources.train.unique_tokens)
    dropout = build_token_dropout(objective, config.objective, vocabulary)
    if config.training.dry_run:
        print(json.dumps({"objective_name": objective, "plan": asdict(plan), **asdict(config)}, indent=1))
        return
    processes = start_processes()
    check_processes(config, processes.size)
    bf16, compiled = choose_precision(config, processes.device), choose_compile(config, plan, processes)
    description = describe(objective, config, plan, sources, vocabulary, processes, bf16, compiled, command)
    folder = RunFolder(config.checkpoint.save) if config.checkpoint.save and processes.rank == 0 else None
    resumed = processes.from_first(lambda: find_checkpoint(config, plan, objective, folder))

    model = Transformer(config.model, vocabulary)
    initialise(model, config.model, config.training.seed)
    parallelise(model, processes, bf16=bf16, compile=compiled)
    optimizer = build_optimizer(model, config.optimizer)
    progress, time_block, records = Progress(), config.training.global_batch_size, []
    checkpoint.start_optimizer_state(optimizer, 0)
    if resumed:
        source, meta, records, branched = resumed
        checkpoint.start_optimizer_state(optimizer, meta["iteration"])
        checkpoint.load(source, checkpoint.tensors(model, optimizer))
        progress = Progress(meta["iteration"], meta["consumed_samples"], meta["seconds"])
        time_block = meta["time_block"]
        description |= {"branched_from": str(source)} if branched else {}
        if processes.rank == 0:
            logger.info("continuing from %s at step %d", source, progress.iteration)
    elif config.validation.skip_train:
        raise ConfigurationError("--skip-train: there is no checkpoint to evaluate; name its run with --load DIR")
    if folder:
        folder.start(description, records)

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
        logger.info(
            "%s: %.2fM parameters, %s unique tokens, %d samples of %d tokens in %d steps (%.1f epochs), %s%s on %s x%d",
            objective, plan.parameters / 1e6, f"{plan.unique_tokens:,}", plan.train_samples, config.data.seq_length,
            plan.steps, plan.train_samples * config.data.seq_length / plan.unique_tokens,
            "bf16" if bf16 else "fp32", ", compiled" if compiled else "", processes.device.type, processes.size,
        )  # fmt: skip
    try:
        if config.validation.skip_train:
            trainer.evaluate()
        else:
            reason = trainer.train()
            if processes.rank == 0:
                logger.info("%s at step %d of %d", reason, progress.iteration, trainer.steps)
    except BaseException as error:
        if folder:
            folder.status("failed", str(error) or type(error).__name__, progress.iteration, progress.consumed_samples)
        raise


def find_checkpoint(config: Config, plan: Plan, objective: str, folder: RunFolder | None):
    """Return (folder, meta, records so far, whether this is a branch) to continue from, or None to begin."""
    settings = config.checkpoint
    source = Path(settings.load or settings.save or "")
    branch = bool(settings.load) and (not settings.save or source.resolve() != Path(settings.save).resolve())
    if branch and folder and checkpoint.newest(folder.checkpoints):
        source, branch = folder.path, False  # the branch was begun already: resume it
    if not (settings.load or settings.save):
        return None
    if settings.load and not (source / "config.json").exists():
        raise ConfigurationError(f"--load {source}: holds no run (no config.json); give a folder that --save wrote")
    found = checkpoint.newest(source / "checkpoints")
    if found is None:
        if settings.load and branch:
            raise ConfigurationError(f"--load {source}: holds no checkpoint; train it first")
        return None
    check_resume(read_json(source / "config.json"), config, plan, objective, branch)
    path, meta = found
    best = source / "checkpoints" / "best.json"
    if not branch and best.exists() and read_json(best)["iteration"] > meta["iteration"]:
        best.unlink()  # it named a checkpoint that is lost
    return path, meta, read_records(source, meta["iteration"]), branch


def choose_precision(config: Config, device: torch.device) -> bool:
    """Return whether to compute in bf16: as asked, else where the device has it natively."""
    if config.training.bf16 or config.training.fp32:
        return config.training.bf16
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


# compiling a block costs seconds of warm-up: about a minute on CUDA, half of one on a CPU
COMPILE_PAYS_AFTER_FLOPS = {"cuda": 1e16, "cpu": 3e14}


def choose_compile(config: Config, plan: Plan, processes: Processes) -> bool:
    """Return whether to compile the blocks: as asked, else where a long run pays for the warm-up."""
    wanted = config.training.compile
    kind = processes.device.type
    if wanted is None:
        flops = plan.flops(plan.train_samples, config.data.seq_length) / processes.size
        wanted = flops > COMPILE_PAYS_AFTER_FLOPS[kind]
    if wanted and kind == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        logger.info("no C++ compiler is installed: training runs eager")
        return False
    return wanted


def describe(objective, config, plan, sources, vocabulary, processes, bf16, compiled, command) -> dict:
    """Return what config.json says: everything that is needed to repeat the run."""
    return {
        "objective_name": objective,
        "recipe": "default",
        **asdict(config),
        "plan": asdict(plan),
        "parameters": plan.parameters,
        "unique_tokens": plan.unique_tokens,
        "train_samples": plan.train_samples,
        "vocabulary_size": vocabulary.size,
        "corpus_hash": sources.corpus["hash"],
        "corpus_source": sources.corpus["source"],
        "precision": "bf16" if bf16 else "fp32",
        "compiled": compiled,
        "device": torch.cuda.get_device_name() if processes.device.type == "cuda" else platform.processor() or "cpu",
        "processes": processes.size,
        "command": command,
        "commit": _commit(),
        "versions": {
            "python": platform.python_version(),
            "megatron": megatron.__version__,
            **{name: metadata.version(name) for name in ("torch", "numpy", "tokenizers", "safetensors")},
        },
    }


def _commit() -> str | None:
    """Return the commit of this code, marked where the tree differs from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
