"""What a report states in words: conclusions about the described groups, and caveats about all runs."""

from collections.abc import Sequence
from itertools import combinations

from megatron.reporting.groups import Group, Summary
from megatron.reporting.runs import Difference, Run, mean_difference

LISTED = 8  # runs that a caveat names; the others are counted


def compare(rows: Sequence[Summary]) -> list[tuple[str, str, Difference]]:
    """Return the paired differences of all pairs of rows at their best points.

    Raises: ConfigurationError if they scored different tokens.
    """
    return [
        (first.name, second.name, mean_difference(first.best.evaluations, second.best.evaluations))
        for first, second in combinations(rows, 2)
    ]


def conclusions(rows: Sequence[Summary], comparisons: list[tuple[str, str, Difference]]) -> list[str]:
    """Return the conclusions: overfitting, losses at equal compute, best points, paired differences."""
    lines = [_overfitting(row) for row in rows]
    max_flops = max(row.last.flops for row in rows)
    equal_compute = sorted((row for row in rows if row.last.flops > 0.99 * max_flops), key=lambda row: row.last.loss)
    if len(equal_compute) > 1:
        losses = ", ".join(f"{row.name} {row.sign}{row.last.loss:.2f}" for row in equal_compute)
        lines.append(f"After the same compute ({max_flops:.1e} FLOPs) the validation losses are: {losses}.")
    lowest = min(rows, key=lambda row: row.best.loss)
    lines.append(f"At their best points, chosen on the tuning set, {lowest.name} has the lowest validation loss.")
    for first, second, difference in comparisons:
        worse, better = (first, second) if difference.nats > 0 else (second, first)
        significance = "" if abs(difference.ratio) > 2 else ", within noise (2 standard errors)"
        lines.append(
            f"{worse} is {abs(difference.nats):.3f} ± {difference.se:.3f} nats per token above {better}{significance}."
        )
    return lines


def _overfitting(row: Summary) -> str:
    """Return whether the last loss of a group is above its best."""
    if row.best.is_last and not row.group.finished:
        return f"{row.name} is best at its last evaluation so far, at epoch {row.best.epoch:.1f}."
    if row.best.is_last:
        return f"{row.name} is best at the end of its budget: a longer one might lower its loss."
    if row.gap.nats > 0.05 and row.gap.ratio > 5:
        return (
            f"{row.name} overfits: its last loss is {row.gap.nats:.2f} nats ({row.gap.ratio:.0f} paired standard "
            f"errors) above its best, which it reached at epoch {row.best.epoch:.1f}."
        )
    return (
        f"{row.name} was best at epoch {row.best.epoch:.1f}; its last loss differs from that by {row.gap.nats:+.3f} ± "
        f"{row.gap.se:.3f} nats."
    )


def caveats(rows: Sequence[Summary]) -> list[str]:
    """Return the caveats: bounds, undecayed learning rates, unfinished runs, unequal compute, contamination, scope."""
    lines = []
    if any(row.bound for row in rows):
        lines.append(
            "MDM losses are upper bounds of the negative log-likelihood: the model may be better than its figure."
        )
    if not all(row.best.is_last for row in rows):
        lines.append(
            "At a best point inside a run the learning rate has not yet decayed; a run whose budget ends there may "
            "reach a lower loss."
        )
    groups = [row.group for row in rows]
    lines += _unfinished(groups)
    flops = [row.last.flops for row in rows]
    if max(flops) > 1.01 * min(flops):
        flops_by_run = ", ".join(f"{row.name} {row.last.flops:.1e}" for row in rows)
        if len(rows) > LISTED:
            flops_by_run = f"{min(flops):.1e} to {max(flops):.1e}"
        lines.append(f"The runs did not use the same compute (FLOPs: {flops_by_run}).")
    for name, shared in (groups[0].config["shared_13grams"] or {}).items():
        sample_note = "" if shared["sampled"] == 1 else f" (measured on {shared['sampled']:.1%} of its documents)"
        lines.append(
            f"Contamination: {shared['ngrams']:.1%} of the word 13-grams of the {name} set, in "
            f"{shared['documents']:.0%} of its documents, also occur in the training split{sample_note}."
        )
    return [*lines, _scope(groups)]


def _unfinished(groups: Sequence[Group]) -> list[str]:
    """Return a line for each run that is not finished; if they are many, the number of the others."""
    unfinished = [run for group in groups for run in group.runs if not run.finished]
    lines = []
    for run in unfinished[:LISTED]:
        epochs = run.consumed_samples * run.config["data"]["seq_length"] / run.config["unique_tokens"]
        total_epochs = epochs * run.config["train_samples"] / max(1, run.consumed_samples)
        lines.append(f"{run.name} is not finished: this is epoch {epochs:.1f} of {total_epochs:.1f}.")
    if len(unfinished) > LISTED:
        lines.append(f"{len(unfinished) - LISTED} more runs are not finished.")
    return lines


def _scope(groups: Sequence[Group]) -> str:
    """Return what the standard errors cover."""

    def number(values: set, singular: str) -> str:
        return f"one {singular}" if len(values) == 1 else f"{len(values)} {singular}s"

    configs = [group.config for group in groups]
    seeds = {run.config["training"]["seed"] for group in groups for run in group.runs}
    sizes = number({config["parameters"] for config in configs}, "model size")
    unique = {config["unique_tokens"] for config in configs}
    unique_sets = "one set of unique tokens" if len(unique) == 1 else f"{len(unique)} sets of unique tokens"
    source = "source code, not prose" if is_source_code(groups[0].runs[0]) else "one corpus"
    count = number(seeds, "seed")
    return (
        f"{count[0].upper()}{count[1:]}, {sizes}, {unique_sets}, {source}: the errors cover the choice of documents "
        "and the evaluation noise, not another seed, size or tuning."
    )


def is_source_code(run: Run) -> bool:
    """Return whether the corpus is the source code of Python's standard library."""
    return run.config["corpus_source"] == "python-stdlib"
