"""Where a run starts: from scratch, at its own newest checkpoint, or at another run's checkpoint (a branch)."""

import math
from dataclasses import dataclass
from pathlib import Path

from megatron.config.flags import require, typed
from megatron.config.resolve import Plan
from megatron.config.sections import Config
from megatron.errors import ConfigurationError
from megatron.objectives.registry import capabilities
from megatron.parallel.mesh import ParallelContext
from megatron.training.checkpoint_store import CheckpointStore, damage, is_checkpoint, read_meta
from megatron.training.datasets import Sources, check_tokenizer
from megatron.training.exit_conditions import on_any_rank, signal_reason
from megatron.training.resume_checks import check_resume
from megatron.training.run_folder import RunFolder, check_writable, read_records, recorded_config

WAITING = "waiting"  # what rank 0 sends instead of an origin while it waits for the lock


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The checkpoint that a run resumes from, and the records up to it."""

    run: Path  # its run folder
    checkpoint: Path
    meta: dict  # meta.json of the checkpoint
    records: list[dict]
    branched_from: str | None  # the other run's checkpoint; None if no branch

    @property
    def evaluation_due(self) -> bool:
        """Whether a signal stopped the evaluation of the checkpoint's step; earlier versions finished it."""
        return self.meta.get("evaluation_due", False)


def open_run(
    config: Config, plan: Plan, sources: Sources, *, precision: str, ranks: ParallelContext
) -> tuple[RunFolder | None, Origin | None]:
    """Return the run folder (on rank 0; None on other ranks, without --save and with --skip-train) and the origin.

    Raises: LockError if another process writes to the folder; StopRequested if a signal to any rank ends the wait for
    its lock; ConfigurationError if the checkpoint does not fit the configuration.
    """
    folders = []

    def stop_reason() -> str | None:
        """Return why to stop; rank 0 calls this while it waits, and the loop below makes the same collective calls."""
        ranks.from_rank_0(lambda: WAITING)
        return on_any_rank(signal_reason(), ranks)

    def find() -> Origin | None:
        _source(config)  # fails before a folder is created
        if config.checkpoint.save and not config.validation.skip_train:
            folders.append(RunFolder(config.checkpoint.save, config.checkpoint.wait_for_lock, stop_reason))
        return find_origin(config, plan, sources, precision=precision)

    while (origin := ranks.from_rank_0(find)) == WAITING:
        on_any_rank(signal_reason(), ranks)
    return (folders[0] if folders else None), origin


def check_run(config: Config, plan: Plan, sources: Sources, precision: str | None) -> Origin | None:
    """Make the checks of `open_run` without writing anything, except for the lock of the run folder; return the origin.

    `precision` is None if the device decides it.

    Raises: ConfigurationError as `open_run` does.
    """
    if config.checkpoint.save and not config.validation.skip_train:
        check_writable(Path(config.checkpoint.save))
    return find_origin(config, plan, sources, precision=precision, read_only=True)


def find_origin(
    config: Config, plan: Plan, sources: Sources, *, precision: str | None, read_only: bool = False
) -> Origin | None:
    """Return the checkpoint to resume from, or None to start from scratch.

    Raises: ConfigurationError if it does not fit the configuration.
    """
    objective, only_evaluate = config.objective.objective, config.validation.skip_train
    source, branched = _source(config)
    if source is None:
        return None
    start = _checkpoint(source, rename_damaged=not (branched or only_evaluate or read_only))
    if start is None:
        return None
    run, folder, meta = start
    recorded = recorded_config(source)
    if recorded is None:
        raise ConfigurationError(
            f"--save {source}: has checkpoints but no config.json; restore it from meta.json of the newest one (key "
            '"config"), or choose another folder'
        )
    # an evaluation may use other settings than the training run
    check_resume(recorded, config, plan, objective=objective, branch=branched or only_evaluate)
    flag = "load" if config.checkpoint.load else "save"
    check_tokenizer(recorded, sources.tokenizer, typed(flag, source))
    if only_evaluate:
        split = recorded["data"].get("split")
        message = f"the run in {source} was started with {typed('split', split)}; leave the flag out"
        require(config.data.split == split, "split", config.data.split, message)
    if branched and not only_evaluate:
        _check_branch(recorded, meta, config, plan=plan, source=source)
    if not only_evaluate and (config.checkpoint.exact_branch or not branched):
        remedy = "or leave out --exact-branch" if branched else f"or branch: --load {source} --save ANOTHER_DIR"
        _check_surroundings(recorded, sources, precision, config=config, source=source, remedy=remedy)
    if capabilities(objective).mixes_kinds and not only_evaluate:
        _check_kinds(meta, config, source)
    records = read_records(run, meta["iteration"])
    if meta.get("evaluation_due"):  # an evaluation since then is repeated
        records = [
            record for record in records if (record["kind"], record["iteration"]) != ("valid", meta["iteration"])
        ]
    return Origin(
        run=run,
        checkpoint=folder,
        meta=meta,
        records=records,
        branched_from=str(folder) if branched else recorded["branched_from"],
    )


def _source(config: Config) -> tuple[Path | None, bool]:
    """Return the folder to start from, and whether it is another run's (a branch).

    None without --load and --save. The same folder for both, or --save alone, may hold nothing yet, unless
    --exit-on-missing-checkpoint is given. An evaluation reads --load if both are given.

    Raises: ConfigurationError if --load holds nothing, or --save holds a run that did not start from it.
    """
    settings, only_evaluate = config.checkpoint, config.validation.skip_train
    start = settings.load or settings.save
    if not start:
        flag = "--skip-train" if only_evaluate else "--exit-on-missing-checkpoint"
        if only_evaluate or settings.exit_on_missing_checkpoint:
            purpose = "evaluate" if only_evaluate else "start from"
            raise ConfigurationError(f"{flag}: there is no checkpoint to {purpose}; name its run with --load DIR")
        return None, False
    source, save = Path(start), Path(settings.save or "")
    branched = bool(settings.load) and not (settings.save and source.resolve() == save.resolve())
    if branched and settings.save and not only_evaluate and CheckpointStore.of_run(save).has_any():
        _check_branched_from(source, save)
        return save, False  # the branch already has checkpoints: resume it, even if its origin was pruned
    if branched and recorded_config(source) is None:
        raise ConfigurationError(
            f"--load {source}: holds no run (no config.json) and is no checkpoint; give a folder that --save wrote"
        )
    required = branched or only_evaluate or settings.exit_on_missing_checkpoint
    if required and not (is_checkpoint(source) or CheckpointStore.of_run(source).has_any()):
        remedy = "" if branched or only_evaluate else ", or leave out --exit-on-missing-checkpoint"
        flag = "--load" if settings.load else "--save"
        raise ConfigurationError(f"{flag} {source}: holds no checkpoint; train it first{remedy}")
    return source, branched


def _check_branched_from(source: Path, save: Path) -> None:
    """Refuse --load where --save holds a run that did not start from it, and would be resumed without it.

    A run whose origin is no longer at its recorded path may have moved with it.
    """
    recorded = recorded_config(save)
    if recorded is None:
        return
    origin = recorded.get("branched_from")
    run = None if origin is None else _run_of(Path(origin))
    if run is None or (run.exists() and source.exists() and run != _run_of(source)):
        raise ConfigurationError(
            f"--load {source}: the run in --save {save} has checkpoints and started from {origin or 'no other run'}; "
            "leave --load out to resume it, or branch into another --save"
        )


def _run_of(folder: Path) -> Path:
    """Return the run folder of a run or of one of its checkpoints, which may be pruned."""
    folder = folder.resolve()
    return folder.parents[1] if folder.parent.name == "checkpoints" else folder


def _checkpoint(source: Path, rename_damaged: bool) -> tuple[Path, Path, dict] | None:
    """Return run, folder and meta.json of a run's newest checkpoint, or of `source` if it is a checkpoint."""
    if is_checkpoint(source):
        fault = damage(source)
        if fault:
            raise ConfigurationError(f"--load {source}: is damaged ({fault}); give another checkpoint of that run")
        return source.resolve().parents[1], source, read_meta(source)
    newest = CheckpointStore.of_run(source).newest(rename_damaged=rename_damaged)
    return newest and (source, newest, read_meta(newest))


def _check_branch(recorded: dict, meta: dict, config: Config, *, plan: Plan, source: Path) -> None:
    """Reject a branch whose sample count would be wrong or has already reached the budget."""
    recorded_length = recorded["data"]["seq_length"]
    require(
        config.data.seq_length == recorded_length,
        "seq_length",
        config.data.seq_length,
        f"the run in {source} counts samples of {recorded_length} tokens, and a branch continues its count; "
        f"give {recorded_length}",
    )
    if config.data.epoch_order == "megatron" and plan.train_samples != recorded["plan"]["train_samples"]:
        raise ConfigurationError(
            f"--epoch-order megatron: depends on the budget, {recorded['plan']['train_samples']} samples in {source} "
            f"and {plan.train_samples} here; keep the budget or start a new run with another order"
        )
    if meta["consumed_samples"] >= plan.train_samples:
        raise ConfigurationError(
            f"--load {source}: has trained on {meta['consumed_samples']} samples, and the branch has a total "
            f"budget of {plan.train_samples}; raise it above that"
        )


def _check_kinds(meta: dict, config: Config, source: Path) -> None:
    """Reject a run that would mix both kinds of samples in a micro-batch, as after a short last batch."""
    micro = config.training.micro_batch_size
    block, consumed = meta["time_block"], meta["consumed_samples"]
    causal = config.objective.causal_samples(block)
    require(
        not any(count % micro for count in (consumed, block, causal)),
        "micro_batch_size",
        micro,
        f"the run in {source} has trained on {consumed} samples, {causal} of every {block} predict the next token, and "
        f"a micro-batch is of one kind; give {math.gcd(consumed, block, causal)} or a divisor of it",
    )


def _check_surroundings(
    recorded: dict, sources: Sources, precision: str | None, *, config: Config, source: Path, remedy: str
) -> None:
    """Reject other data under the same name, and a device whose default precision differs from the run's."""
    for name, fingerprint in recorded["fingerprints"].items():
        if sources.fingerprints.get(name, fingerprint) != fingerprint:
            flag = _data_flag(name, config)
            raise ConfigurationError(
                f"{flag}: has other tokens or other shares than the data that the run in {source} was started with; "
                f"give the same data, {remedy}"
            )
    if precision and recorded["precision"] != precision:
        raise ConfigurationError(
            f"--{precision}: is given, or this device's default; the run in {source} was started in "
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
