"""WSD branches: runs that differ only in their budget share the constant part of the longest one, their trunk.

With warm-up, constant rate and decay (WSD, 2404.06395) a shorter run equals a longer one up to the start of its own
decay. It continues from the trunk's checkpoint there and trains only its decay. Branching is exact, so the id of a run
does not depend on it.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron.config.resolve import Plan
from megatron.config.sections import Config, DataConfig
from megatron.data.paths import requested_sets
from megatron.errors import ConfigurationError
from megatron.sweeps.points import Point
from megatron.sweeps.run_costs import PRUNED_TO
from megatron.training.schedule import learning_rate, weight_decay

CHECKED_STEPS = 1000  # at which the schedules of trunk and branch are compared


@dataclass(frozen=True)
class Resolved:
    """A point with what it was resolved from; points with equal `family` differ only in their budget."""

    point: Point
    config: Config
    plan: Plan
    family: str


def assign_trunks(resolved: Sequence[Resolved]) -> tuple[list[Point], list[str]]:
    """Return the points, shorter ones as branches of the longest of their family where that is exact.

    The second result says, once for each reason, why points with a WSD schedule are trained in full.
    """
    families: dict[str, dict[str, Resolved]] = defaultdict(dict)
    for item in resolved:
        if item.config.optimizer.lr_decay_style == "WSD":
            families[item.family].setdefault(item.point.id, item)
    changes: dict[str, dict] = {}
    reasons: dict[str, int] = {}
    for members in families.values():
        trunk = max(members.values(), key=lambda item: item.plan.train_samples)
        branch_steps: set[int] = set()
        for item in members.values():
            if item is trunk:
                continue
            iteration = _last_common_step(item)
            obstacle = _obstacle(item, trunk, iteration)
            if obstacle:
                reasons[obstacle] = reasons.get(obstacle, 0) + 1
                continue
            branch_steps.add(iteration)
            samples = iteration * item.config.training.global_batch_size
            changes[item.point.id] = {
                "trunk": trunk.point.id,
                "trunk_iteration": iteration,
                "trunk_samples": samples,
            }
        size = trunk.point.disk_bytes // PRUNED_TO
        disk = trunk.point.disk_bytes + len(branch_steps) * size
        changes[trunk.point.id] = {"keep_iterations": sorted(branch_steps), "disk_bytes": disk}
    points = [replace(item.point, **changes.get(item.point.id, {})) for item in resolved]
    return points, [f"{count} WSD points are trained in full: {reason}" for reason, count in reasons.items()]


def _last_common_step(item: Resolved) -> int:
    """Return the last step before the decay of a run."""
    constant = item.plan.lr_decay_samples - item.plan.lr_wsd_decay_samples
    return min(constant, item.plan.train_samples - 1) // item.config.training.global_batch_size


def _obstacle(item: Resolved, trunk: Resolved, iteration: int) -> str | None:
    """Return why a run cannot continue from the trunk after `iteration` steps, or None."""
    if iteration < 1:
        return "their decay begins in the first step"
    if item.config.data.epoch_order == "megatron":
        return "--epoch-order megatron depends on the budget; take another one"
    if _is_blend(item.config.data):
        return "a blend's order may depend on the budget; give one data set in train-data-path"
    if item.plan.eval_interval != trunk.plan.eval_interval:
        return "their validations lie at other steps; give eval-interval"
    size = item.config.training.global_batch_size
    stride = max(1, iteration // CHECKED_STEPS)
    for step in {*range(1, iteration, stride), iteration}:
        if _rates(item, step * size) != _rates(trunk, step * size):
            return "their learning rate or weight decay differs from the first steps on; give lr-warmup-samples"
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
