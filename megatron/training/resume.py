"""Where a run begins: anew, at a checkpoint of its own, or at another run's (a branch)."""

import math
from dataclasses import dataclass
from pathlib import Path

from megatron.config.flags import require, typed
from megatron.config.resolve import Plan, check_resume
from megatron.config.sections import Config
from megatron.errors import ConfigurationError
from megatron.parallel.mesh import ParallelContext
from megatron.training import checkpoint
from megatron.training.datasets import Sources
from megatron.training.run_folder import RunFolder, check_writable, read_json, read_records


@dataclass(frozen=True)
class Origin:
    """The checkpoint a run continues from, and what was recorded until then."""

    run: Path
    checkpoint: Path
    meta: dict
    records: list[dict]
    branched_from: str | None


def open_run(
    config: Config, plan: Plan, objective: str, sources: Sources, precision: str, ranks: ParallelContext
) -> tuple[RunFolder | None, Origin | None]:
    """Return the folder to write to, on the first process, and the origin, on all of them.

    Without --save, or to evaluate only, there is nothing to write to. Raises LockError where another process writes
    there, and StopRequested where a signal ends the wait for it.
    """
    opened = []

    def find() -> Origin | None:
        _source(config)  # refuses before a folder is made
        if config.checkpoint.save and not config.validation.skip_train:
            opened.append(RunFolder(config.checkpoint.save, config.checkpoint.wait_for_lock))
        return find_origin(config, plan, objective, sources, precision)

    origin = ranks.from_rank_0(find)
    return (opened[0] if opened else None), origin


def recorded_config(path: Path) -> dict | None:
    """Return the configuration of a run's folder, or of one of its checkpoints; None where there is no such thing."""
    if (path / "meta.json").exists():
        return read_json(path / "meta.json")["config"]
    return read_json(path / "config.json") if (path / "config.json").exists() else None


def check_run(config: Config, plan: Plan, objective: str, sources: Sources, precision: str | None) -> None:
    """Raise the ConfigurationError of `open_run`, if any, but for a lock that another job holds; nothing is written.

    `precision` is None where only the device decides it.
    """
    if config.checkpoint.save and not config.validation.skip_train:
        check_writable(Path(config.checkpoint.save))
    find_origin(config, plan, objective, sources, precision, read_only=True)


def find_origin(
    config: Config, plan: Plan, objective: str, sources: Sources, precision: str | None, read_only: bool = False
) -> Origin | None:
    """Return the checkpoint to continue from, or None to begin; raise ConfigurationError where it does not fit."""
    only_evaluate = config.validation.skip_train
    source, branched = _source(config)
    found = source and _checkpoint(source, mend=not (branched or only_evaluate or read_only))
    if not found:
        return None
    run, folder, meta = found
    recorded = recorded_config(source)
    if recorded is None:
        raise ConfigurationError(
            f"--save {source}: holds checkpoints and no config.json; restore it from meta.json of the newest, whose "
            '"config" it is, or choose another folder'
        )
    # what is only evaluated may be evaluated in other ways than it was trained with
    check_resume(recorded, config, plan, objective, branched or only_evaluate)
    if only_evaluate:
        split = recorded["data"].get("split")
        rule = f"the run in {source} was begun with {typed('split', split)}; leave the flag out"
        require(config.data.split == split, "split", config.data.split, rule)
    if branched and not only_evaluate:
        _check_branch(recorded, meta, config, plan, source)
    elif not only_evaluate:
        _check_surroundings(recorded, sources, precision, config, source)
    if objective == "dual" and not only_evaluate:
        _check_kinds(meta, config, source)
    return Origin(
        run, folder, meta, read_records(run, meta["iteration"]), str(folder) if branched else recorded["branched_from"]
    )


def _source(config: Config) -> tuple[Path | None, bool]:
    """Return the folder to start from, and whether it is another run's (a branch).

    None without --load and --save. The same folder for both, or --save alone, may hold nothing yet, unless
    --exit-on-missing-checkpoint is given.
    """
    settings, only_evaluate = config.checkpoint, config.validation.skip_train
    if not (settings.load or settings.save):
        flag = "--skip-train" if only_evaluate else "--exit-on-missing-checkpoint"
        if only_evaluate or settings.exit_on_missing_checkpoint:
            purpose = "evaluate" if only_evaluate else "start from"
            raise ConfigurationError(f"{flag}: there is no checkpoint to {purpose}; name its run with --load DIR")
        return None, False
    source, save = Path(settings.load or settings.save), Path(settings.save or "")
    branched = bool(settings.load) and not (settings.save and source.resolve() == save.resolve())
    if branched and recorded_config(source) is None:
        raise ConfigurationError(
            f"--load {source}: holds no run (no config.json) and is no checkpoint; give a folder that --save wrote"
        )
    if branched and settings.save and checkpoint.begun(save / "checkpoints"):
        return save, False  # the branch has checkpoints of its own: resume it
    required = branched or only_evaluate or settings.exit_on_missing_checkpoint
    if required and not ((source / "meta.json").exists() or checkpoint.begun(source / "checkpoints")):
        remedy = "" if branched or only_evaluate else ", or leave out --exit-on-missing-checkpoint"
        flag = "--load" if settings.load else "--save"
        raise ConfigurationError(f"{flag} {source}: holds no checkpoint; train it first{remedy}")
    return source, branched


def _checkpoint(source: Path, mend: bool) -> tuple[Path, Path, dict] | None:
    """Return run, folder and meta.json of the checkpoint that `source` is, or of the newest that the run has."""
    if (source / "meta.json").exists():
        fault = checkpoint.damage(source)
        if fault:
            raise ConfigurationError(f"--load {source}: is damaged ({fault}); give another checkpoint of that run")
        return source.resolve().parents[1], source, read_json(source / "meta.json")
    found = checkpoint.newest(source / "checkpoints", mend)
    return found and (source, *found)


def _check_branch(recorded: dict, meta: dict, config: Config, plan: Plan, source: Path) -> None:
    """Refuse a branch whose clock, which counts samples, would lie or has already run out."""
    before = recorded["data"]["seq_length"]
    require(
        config.data.seq_length == before,
        "seq_length",
        config.data.seq_length,
        f"the run in {source} counts samples of {before} tokens, and a branch goes on counting; give {before}",
    )
    if config.data.epoch_order == "megatron" and plan.train_samples != recorded["plan"]["train_samples"]:
        raise ConfigurationError(
            f"--epoch-order megatron: depends on the budget, {recorded['plan']['train_samples']} samples in {source} "
            f"and {plan.train_samples} here; keep the budget or begin anew with another order"
        )
    if meta["consumed_samples"] >= plan.train_samples:
        raise ConfigurationError(
            f"--load {source}: has seen {meta['consumed_samples']} samples, and the budget of the branch is "
            f"{plan.train_samples} in all; raise it above that"
        )


def _check_kinds(meta: dict, config: Config, source: Path) -> None:
    """Refuse to go on with the dual objective where a micro-batch would be of both kinds: a last batch may be short."""
    micro, block, seen = config.training.micro_batch_size, meta["time_block"], meta["consumed_samples"]
    causal = config.objective.causal_samples(block)
    require(
        not any(count % micro for count in (seen, block, causal)),
        "micro_batch_size",
        micro,
        f"the run in {source} has seen {seen} samples, of each {block} of which {causal} predict the next token, and a "
        f"micro-batch is of one kind; give {math.gcd(seen, block, causal)} or a divisor of it",
    )


def _check_surroundings(recorded: dict, sources: Sources, precision: str | None, config: Config, source: Path) -> None:
    """Refuse other data under the same name, and a device that would silently compute otherwise."""
    remedy = f"or branch: --load {source} --save ANOTHER_DIR"
    for name, before in recorded["fingerprints"].items():
        if sources.fingerprints.get(name, before) != before:
            named = _data_flag(name, config)
            raise ConfigurationError(
                f"{named}: holds other tokens, or in other shares, than the run in {source} was begun with; "
                f"give the same data, {remedy}"
            )
    if precision and recorded["precision"] != precision:
        raise ConfigurationError(
            f"--{precision}: is asked for, or this device's default; the run in {source} was begun in "
            f"{recorded['precision']}; give --{recorded['precision']}, {remedy}"
        )


def _data_flag(name: str, config: Config) -> str:
    """Return the flag that names the training data ("--train-data-path") or a validation set."""
    data, kind = config.data, "train" if name.startswith("--") else "valid"
    path = getattr(data, f"{kind}_data_path_file")
    if path:
        return f"--{kind}-data-path-file {path}"
    if kind == "valid" and not data.valid_data_path:
        return f"--split {data.split}"
    return name if kind == "train" else f"--valid-data-path {name}="
