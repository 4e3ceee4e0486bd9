"""What a report states in words: conclusions about the described groups, and caveats about all runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from megatron.reporting.groups import Group, Summary
from megatron.reporting.runs import Difference, Run, distinct_runs, has_documents, mean_difference

LISTED = 8  # runs that a caveat names; the others are counted
# (is the first loss an upper bound, is the second) -> sign of their difference, the difference in words
_BOUNDS = {
    (False, False): ("", ""),
    (True, False): ("≤ ", "at most "),
    (False, True): ("≥ ", "at least "),
    (True, True): ("", ""),  # of the bounds, not of the losses
}


@dataclass(frozen=True)
class Comparison:
    """The paired difference of two rows at their best points."""

    first: Summary
    second: Summary
    difference: Difference  # first - second

    def cells(self) -> tuple[str, str, str, str]:
        """Return the pair, nats per token, standard error and ratio as text; ≤ or ≥ where one side is a bound."""
        sign = _BOUNDS[self.first.bound, self.second.bound][0]
        nats, se, ratio = self.difference.nats, self.difference.se, self.difference.ratio
        return (
            f"{self.first.name} - {self.second.name}",
            f"{sign}{nats:+.4f}",
            "-" if se is None else f"{se:.4f}",
            "-" if ratio is None else f"{ratio:+.1f}",
        )

    def sentence(self) -> str:
        """Return which row has the higher loss, by how much, and whether that is within noise."""
        nats = self.difference.nats
        worse, better = (self.first, self.second) if nats > 0 else (self.second, self.first)
        if nats == 0:
            return f"{self.first.name} and {self.second.name} have equal losses."
        error = " (one document: no standard error)"
        if self.difference.se is not None:
            error = "" if self.difference.exceeds(2) else ", within noise (2 standard errors)"
        limit = _BOUNDS[worse.bound, better.bound][1]
        both = ", both upper bounds" if worse.bound and better.bound else ""
        return f"{worse.name} is {limit}{absolute(self.difference)} nats per token above {better.name}{both}{error}."


def absolute(difference: Difference) -> str:
    """Return the absolute value of a difference with its standard error, if it has any, as text."""
    error = "" if difference.se is None else f" ± {difference.se:.3f}"
    return f"{abs(difference.nats):.3f}{error}"


def compare(rows: Sequence[Summary], all_pairs: bool) -> list[Comparison]:
    """Return the paired differences of rows at their best points, of all pairs or those with equal unique tokens.

    Rows without sums by document are in none.

    Raises: ConfigurationError if they scored different tokens.
    """
    return [
        Comparison(first, second, mean_difference(first.best.evaluations, second.best.evaluations))
        for first, second in combinations([row for row in rows if has_documents(row.best.evaluations)], 2)
        if all_pairs or first.unique_tokens == second.unique_tokens
    ]


def conclusions(rows: Sequence[Summary], comparisons: Sequence[Comparison]) -> list[str]:
    """Return the conclusions: overfitting, losses at equal compute, best points, paired differences."""
    lines = [_overfitting(row) for row in rows]
    max_flops = max(row.last.flops for row in rows)
    equal_compute = sorted((row for row in rows if row.last.flops > 0.99 * max_flops), key=lambda row: row.last.loss)
    if len(equal_compute) > 1:
        losses = ", ".join(f"{row.name} {row.sign}{row.last.loss:.2f}" for row in equal_compute)
        reported = equal_compute[0].reported
        lines.append(f"After the same compute ({max_flops:.1e} FLOPs) the losses on the {reported} set are: {losses}.")
    if len(rows) > 1:
        lowest = min(rows, key=lambda row: row.best.loss)
        bounds = ", upper bounds compared as they are" if any(row.bound for row in rows) else ""
        lines.append(
            f"At their best points, chosen on the {lowest.tuning} set, {lowest.name} has the lowest loss on the "
            f"{lowest.reported} set{bounds}."
        )
    return [*lines, *(comparison.sentence() for comparison in comparisons)]


def _overfitting(row: Summary) -> str:
    """Return whether the last loss of a group is above its best."""
    if row.best.is_last and not row.group.finished:
        return f"{row.name} is best at its last evaluation so far, at epoch {row.best.epoch:.1f}."
    if row.best.is_last:
        return f"{row.name} is best at the end of its budget: a longer one might lower its loss."
    if row.gap.nats > 0.05 and row.gap.exceeds(5):
        return (
            f"{row.name} overfits: its last loss is {row.gap.nats:.2f} nats ({row.gap.ratio:.0f} paired standard "
            f"errors) above its best, which it reached at epoch {row.best.epoch:.1f}."
        )
    side = "above" if row.gap.nats >= 0 else "below"
    return f"{row.name} was best at epoch {row.best.epoch:.1f}; its last loss is {absolute(row.gap)} nats {side} that."


def caveats(rows: Sequence[Summary]) -> list[str]:
    """Return the caveats: bounds, undecayed learning rates, unfinished runs, missing records, compute, text, scope."""
    lines = []
    if any(row.bound for row in rows):
        objectives = " and ".join(dict.fromkeys(row.objective for row in rows if row.bound))
        lines.append(
            f"Losses of {objectives} are upper bounds of the negative log-likelihood: the model may be better than its "
            "figure."
        )
    if rows[0].tuning == rows[0].reported:
        lines.append(
            f"Best points are selected and reported on the same set ({rows[0].tuning}), so their losses are "
            "optimistic; name another set with --tuning."
        )
    if not all(row.best.is_last for row in rows):
        lines.append(
            "At a best point inside a run the learning rate has not yet decayed; a run whose budget ends there may "
            "reach a lower loss."
        )
    groups = [row.group for row in rows]
    lines += _unfinished(groups)
    lines += _without_documents(rows)
    flops = [row.last.flops for row in rows]
    if max(flops) > 1.01 * min(flops):
        flops_by_run = ", ".join(f"{row.name} {row.last.flops:.1e}" for row in rows)
        if len(rows) > LISTED:
            flops_by_run = f"{min(flops):.1e} to {max(flops):.1e}"
        lines.append(f"The runs did not use the same compute (FLOPs: {flops_by_run}).")
    if any(group.config.get("teachers") for group in groups):
        lines.append(
            "FLOPs of distilled runs are the student's: they contain neither the training of its teachers nor their "
            "forward passes."
        )
    contamination = (_contamination(run) for group in groups for run in group.runs)
    lines += dict.fromkeys(line for run_lines in contamination for line in run_lines)
    return [*lines, _scope(groups)]


def _contamination(run: Run) -> list[str]:
    """Return a line for each set of a run whose overlap with the training split was measured."""
    lines = []
    for name, shared in (run.config["shared_13grams"] or {}).items():
        documents = "" if shared["documents"] is None else f", in {shared['documents']:.0%} of its documents,"
        product = f"share of its documents times share of the training split's 13-grams {shared['sampled']:.1%}"
        sample_note = "" if shared["sampled"] == 1 else f" (estimated from samples: {product})"
        lines.append(
            f"Contamination: {shared['ngrams']:.1%} of the word 13-grams of the {name} set{documents} also occur in "
            f"the training split{sample_note}."
        )
    return lines


def _unfinished(groups: Sequence[Group]) -> list[str]:
    """Return a line for each run that is not finished; if they are many, the number of the others."""
    unfinished = distinct_runs(run for group in groups for run in group.runs if not run.finished)
    lines = []
    for run in unfinished[:LISTED]:
        epochs = run.consumed_samples * run.config["data"]["seq_length"] / run.config["unique_tokens"]
        total_epochs = epochs * run.config["train_samples"] / max(1, run.consumed_samples)
        lines.append(f"{run.name} is not finished: this is epoch {epochs:.1f} of {total_epochs:.1f}.")
    if len(unfinished) > LISTED:
        lines.append(f"{len(unfinished) - LISTED} more runs are not finished.")
    return lines


def _without_documents(rows: Sequence[Summary]) -> list[str]:
    """Return a line on the runs whose sums by document are missing, if there are any."""
    evaluations = [pair for row in rows for pair in (*row.best.evaluations, *row.last.evaluations)]
    missing = distinct_runs(run for run, record in evaluations if not has_documents([(run, record)]))
    if not missing:
        return []
    return [
        f"{len(missing)} of {len(distinct_runs(run for run, _ in evaluations))} runs have no sums by document "
        "(validation/*/*.npz), which archives leave out: they are in no paired difference, equal tokens are not "
        "verified, and the errors of means over their seeds are upper bounds, the means of the seeds' errors."
    ]


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
