"""Where a run begins: anew, at a checkpoint of its own, or at another run's (a branch)."""

from dataclasses import dataclass
from pathlib import Path

from megatron.config.resolve import Plan, check_resume
from megatron.config.sections import Config
from megatron.errors import ConfigurationError
from megatron.parallel.mesh import Processes
from megatron.training import checkpoint
from megatron.training.run_folder import RunFolder, read_json, read_records
from megatron.training.sources import Sources


@dataclass(frozen=True)
class Origin:
    """The checkpoint a run continues from, and what was recorded until then."""

    folder: Path
    meta: dict
    records: list[dict]
    branched_from: str | None


def open_run(
    config: Config, plan: Plan, objective: str, sources: Sources, precision: str, processes: Processes
) -> tuple[RunFolder | None, Origin | None]:
    """Return the folder to write to, on the first process, and the origin, on all of them.

    Without --save, or to evaluate only, there is nothing to write to.
    """
    opened = []

    def find() -> Origin | None:
        if config.checkpoint.save and not config.validation.skip_train:
            opened.append(RunFolder(config.checkpoint.save))
        return find_origin(config, plan, objective, sources.corpus_hash, precision)

    origin = processes.from_first(find)
    return (opened[0] if opened else None), origin


def find_origin(config: Config, plan: Plan, objective: str, corpus_hash: str | None, precision: str) -> Origin | None:
    """Return the checkpoint to continue from, or None to begin; raise ConfigurationError where it does not fit."""
    settings, only_evaluate = config.checkpoint, config.validation.skip_train
    if not (settings.load or settings.save):
        if only_evaluate:
            raise ConfigurationError("--skip-train: there is no checkpoint to evaluate; name its run with --load DIR")
        return None
    source, branched = Path(settings.load or settings.save), False
    if settings.load:
        if not (source / "config.json").exists():
            raise ConfigurationError(f"--load {source}: holds no run (no config.json); give a folder that --save wrote")
        branched = not settings.save or source.resolve() != Path(settings.save).resolve()
    if branched and settings.save and checkpoint.newest(Path(settings.save) / "checkpoints", mend=not only_evaluate):
        source, branched = Path(settings.save), False  # the branch was begun already: resume it
    found = checkpoint.newest(source / "checkpoints", mend=not (branched or only_evaluate))
    if found is None:
        if branched or only_evaluate:
            flag = "--load" if settings.load else "--save"
            raise ConfigurationError(f"{flag} {source}: holds no checkpoint; train it first")
        return None
    folder, meta = found
    # what is only evaluated may be evaluated in other ways than it was trained with
    lenient = branched or only_evaluate
    recorded = read_json(source / "config.json")
    check_resume(recorded, config, plan, objective, lenient)
    if not lenient:
        _check_surroundings(recorded, corpus_hash, precision, config, source)
        _forget_lost_best(source / "checkpoints" / "best.json", meta["iteration"])
    records = read_records(source, meta["iteration"])
    return Origin(folder, meta, records, str(folder) if branched else recorded["branched_from"])


def _check_surroundings(recorded: dict, corpus_hash: str | None, precision: str, config: Config, source: Path) -> None:
    """Refuse other data under the same name, and a device that would silently compute otherwise."""
    if recorded["corpus_hash"] != corpus_hash:
        raise ConfigurationError(
            f"--train-data-path {' '.join(config.data.train_data_path)}: holds the corpus {corpus_hash}, the run in "
            f"{source} was begun on {recorded['corpus_hash']}; give the same data, or branch: "
            f"--load {source} --save ANOTHER_DIR"
        )
    if recorded["precision"] != precision:
        raise ConfigurationError(
            f"--{precision}: is asked for, or this device's default; the run in {source} was begun in "
            f"{recorded['precision']}; give --{recorded['precision']}, or branch: --load {source} --save ANOTHER_DIR"
        )


def _forget_lost_best(best: Path, iteration: int) -> None:
    """Remove the pointer to a best checkpoint that is newer than the one the run falls back to."""
    if best.exists() and read_json(best)["iteration"] > iteration:
        best.unlink()
