"""WSD branches: runs that differ only in their budget share the constant part of a longer one, their trunk.

With warm-up, constant rate and decay (WSD, 2404.06395) two runs of different budgets are equal up to the start of the
earlier decay. Either continues from a checkpoint of the other that lies before it, and trains only the rest. Branching
is exact, so the id of a run does not depend on it.

1. A run that has started keeps the trunk that it started from, whatever else the sweep has now.
2. The others, the longest first, take the latest checkpoint that a run has, or will have, before both decays begin. In
   a new sweep this is the longest run, at the last step before their own decay.
3. The longest run also keeps its last checkpoint before the decay, so that a longer budget can be added later.

A checkpoint on disk is verified before a run takes it, by the plan and again when the run starts; one that is damaged
is named, and no run branches from it.
"""

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from megatron.config.resolve import Plan
from megatron.config.sections import Config, DataConfig
from megatron.data.paths import requested_sets
from megatron.errors import ConfigurationError
from megatron.sweeps.points import Point
from megatron.sweeps.run_costs import PRUNED_TO
from megatron.sweeps.states import run_state
from megatron.training.checkpoint_store import CheckpointStore, damage, read_meta
from megatron.training.run_folder import read_json
from megatron.training.schedule import learning_rate, weight_decay

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resolved:
    """A point with what it was resolved from; points with equal `family` differ only in their budget."""

    point: Point
    config: Config
    plan: Plan
    family: str


@dataclass(frozen=True, kw_only=True)
class History:
    """Where a run started, and the steps at which it has checkpoints that stay, or can still save some."""

    has_started: bool = False  # it has checkpoints, is running, or has finished (without any: restored records)
    trunk: str | None = None
    trunk_iteration: int = 0  # of the checkpoint of `trunk` that it started from
    permanent: frozenset[int] = frozenset()  # checkpoints on disk, and those that a running process will save
    open_after: int | None = 0  # any later checkpoint can be requested with --keep-iterations; None if none can

    def latest(self, limit: int) -> int:
        """Return the latest step up to `limit` with a checkpoint, on disk or to come; 0 if there is none."""
        can_save = self.open_after is not None and limit > self.open_after
        return limit if can_save else max((step for step in self.permanent if step <= limit), default=0)


def assign_trunks(resolved: Sequence[Resolved], folder: Path) -> tuple[list[Point], list[str]]:
    """Return the points of the sweep in `folder`, as branches of other runs of their family where that is exact.

    The second result says, once for each reason, why points with a WSD schedule are trained in full.
    """
    families: dict[str, dict[str, Resolved]] = defaultdict(dict)
    for item in resolved:
        if item.config.optimizer.lr_decay_style == "WSD":
            families[item.family].setdefault(item.point.id, item)
    changes: dict[str, dict] = {}
    reasons: dict[str, int] = {}
    for members in families.values():
        family = _Family(members.values(), folder)
        changes |= family.changes()
        for reason in family.reasons:
            reasons[reason] = reasons.get(reason, 0) + 1
    points = [replace(item.point, **changes.get(item.point.id, {})) for item in resolved]
    return points, [f"{count} WSD points are trained in full: {reason}" for reason, count in reasons.items()]


def needs_trunk(point: Point, sweep: Path) -> bool:
    """Return whether a run can only start from a checkpoint that its trunk has not saved yet."""
    checkpoint = point.trunk_checkpoint(sweep)
    if checkpoint is None or checkpoint.is_dir():
        return False
    return not CheckpointStore.of_run(point.folder(sweep)).has_any()  # else it resumes from its own


class _Family:
    """The runs that differ only in their budget, with the trunk of each."""

    def __init__(self, members: Iterable[Resolved], folder: Path):
        self.folder = folder
        self.members = sorted(members, key=lambda item: -item.plan.train_samples)
        self.histories = {item.point.id: _history(item.point.folder(folder)) for item in self.members}
        self.reasons: list[str] = []
        sources = [item for item in self.members if self.histories[item.point.id].has_started]
        for item in self.members:
            if not self.histories[item.point.id].has_started:
                self.histories[item.point.id] = self._start(item, sources)
                sources.append(item)

    def changes(self) -> dict[str, dict]:
        """Return the fields of each point that depend on the family, by id."""
        requested: dict[str, set[int]] = defaultdict(set)
        for history in self.histories.values():
            if history.trunk is not None:
                requested[history.trunk].add(history.trunk_iteration)
        longest = self.members[0]
        if _obstacle(longest) is None:
            requested[longest.point.id].add(_last_constant_step(longest))
        changes = {}
        for item in self.members:
            history = self.histories[item.point.id]
            steps = sorted(requested[item.point.id].union(item.config.checkpoint.keep_iterations))
            changes[item.point.id] = {
                "trunk": history.trunk,
                "trunk_iteration": history.trunk_iteration,
                "trunk_samples": history.trunk_iteration * item.config.training.global_batch_size,
                "keep_iterations": steps,
                "disk_bytes": item.point.disk_bytes + len(steps) * (item.point.disk_bytes // PRUNED_TO),
            }
        return changes

    def _start(self, item: Resolved, sources: Sequence[Resolved]) -> History:
        """Return the history of a run that has not started, with its trunk among `sources`."""
        reason = _obstacle(item)
        steps = {source.point.id: self._shared_step(item, source) for source in sources}
        for source in sorted(sources, key=lambda source: -steps[source.point.id]) if reason is None else ():
            step = steps[source.point.id]
            difference = _difference(item, source, step) if step else "no checkpoint is left on their constant part"
            if difference is None:
                if self._is_damaged(source.point, step):
                    return self._start(item, sources)
                return History(trunk=source.point.id, trunk_iteration=step, open_after=step)
            reason = reason or difference
        if sources and reason:
            self.reasons.append(reason)
        return History()

    def _is_damaged(self, source: Point, step: int) -> bool:
        """Return whether a source has a damaged checkpoint at a step, which then leaves its history."""
        history, checkpoint = self.histories[source.id], source.checkpoint(self.folder, step)
        if not history.has_started or not checkpoint.is_dir() or (fault := damage(checkpoint)) is None:
            return False
        logger.warning("%s: %s is damaged (%s); no run branches from it", source.label, checkpoint, fault)
        after = None if history.open_after is None else max(history.open_after, step)
        self.histories[source.id] = replace(history, permanent=history.permanent - {step}, open_after=after)
        return True

    def _shared_step(self, item: Resolved, source: Resolved) -> int:
        limit = min(_last_constant_step(item), _last_constant_step(source))
        return self.histories[source.point.id].latest(limit)


def _history(run: Path) -> History:
    """Return the history of a run folder."""
    state = run_state(run)
    checkpoints = CheckpointStore.of_run(run).complete()
    if state.name not in ("running", "finished") and not checkpoints:
        return History()
    recorded: dict = {}
    with suppress(ConfigurationError):  # a run that starts at this moment has none yet
        recorded = read_json(run / "config.json")
    has_ended = state.name == "finished" or state.has_own_fault
    steps, newest = set(), 0
    for path in checkpoints:
        with suppress(ConfigurationError, KeyError, TypeError):  # damaged
            meta = read_meta(path)
            newest = max(newest, meta["iteration"])
            steps |= {meta["iteration"]} if has_ended or meta["permanent"] else set()
    if state.name == "running":
        requested = recorded.get("checkpoint", {}).get("keep_iterations", ())
        steps |= {step for step in requested if step > newest}  # earlier ones are on disk, or will never be
    source = Path(recorded.get("branched_from") or "")  # .../ID/checkpoints/iter_0000012
    return History(
        has_started=True,
        trunk=source.parent.parent.name or None,
        trunk_iteration=int(source.name.removeprefix("iter_") or 0),
        permanent=frozenset(steps),
        open_after=None if has_ended or state.name == "running" else newest,
    )


def _last_constant_step(item: Resolved) -> int:
    """Return the last step before the decay of a run."""
    constant = item.plan.lr_decay_samples - item.plan.lr_wsd_decay_samples
    return min(constant, item.plan.train_samples - 1) // item.config.training.global_batch_size


def _obstacle(item: Resolved) -> str | None:
    """Return why a run neither continues from a run of another budget nor is continued by one, or None."""
    config = item.config
    if _last_constant_step(item) < 1:
        return "their decay begins in the first step"
    if config.data.epoch_order == "megatron":
        return "--epoch-order megatron depends on the budget; take another one"
    if _is_blend(config.data):
        return "a blend's order may depend on the budget; give one data set in train-data-path"
    if config.validation.eval_interval is None:
        return "their validations lie at other steps; give eval-interval"
    if config.optimizer.lr_warmup_samples is None:
        return "their warm-up depends on the budget; give lr-warmup-samples"
    if config.optimizer.weight_decay_incr_style != "constant":
        return "their weight decay depends on the budget; leave out weight-decay-incr-style"
    return None


def _difference(item: Resolved, source: Resolved, step: int) -> str | None:
    """Return in what two runs of a family differ up to `step`, before both decays; None if they are equal.

    Rates are compared at both ends: warm-ups of different lengths differ in the first step, decays in the last.
    """
    if item.plan.eval_interval != source.plan.eval_interval:
        return "their validations lie at other steps; give one eval-interval"
    size = item.config.training.global_batch_size
    if any(_rates(item, samples) != _rates(source, samples) for samples in (size, step * size)):
        return "their learning rate or weight decay depends on the budget"
    return None


def _is_blend(data: DataConfig) -> bool:
    try:
        train, _ = requested_sets(data, with_test=False)
    except ConfigurationError:
        return False  # the data are not on this machine; training refuses an inexact branch
    return len(train.prefixes) > 1


def _rates(item: Resolved, samples: int) -> tuple[float, float]:
    optimizer, plan = item.config.optimizer, item.plan
    return learning_rate(optimizer, plan, samples), weight_decay(optimizer, plan, samples)
