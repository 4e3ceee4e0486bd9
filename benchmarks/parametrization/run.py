#!/usr/bin/env python3
"""Compare the best learning rate of every width in a finished sweep, with the standard parametrization and with muP.

    python benchmarks/parametrization/run.py --sweep runs/learning_rate_by_width --output learning_rate_by_width.json

It reads the runs of examples_scaling/techniques/learning_rate_by_width.yaml, or of another sweep over --lr and
--hidden-size, and prints the final validation loss of each, the mean over seeds. A standard run of the base width is
also one of muP. --output also writes a figure, as .svg and .png.
"""

import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from benchmarks.harness import environment, markdown_table, output_flag, publish, read_options, refuse
from megatron.config.flags import flag
from megatron.errors import ConfigurationError
from megatron.reporting.figures import LOSS, SEED_BAND, Figure, seed_curve
from megatron.reporting.plots import draw
from megatron.reporting.runs import Run, curve, distinct_runs
from megatron.reporting.sources import load_sweep


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of this benchmark."""

    sweep: str = flag(help="folder of the sweep", metavar="DIR")
    validation: str = flag("validation", "validation set of the losses")
    output: str | None = output_flag()


Losses = dict[tuple[str, int], dict[float, list[float]]]  # by parametrization and width, then by learning rate


def final_losses(runs: list[Run], validation: str) -> Losses:
    """Return the final losses of all seeds; standard runs of a base width count for the other parametrizations, too."""
    base = {run.config["model"]["base_hidden_size"]: run.config["model"]["parametrization"] for run in runs}
    losses: Losses = defaultdict(lambda: defaultdict(list))
    for run in runs:
        model, rate = run.config["model"], run.config["optimizer"]["lr"]
        names = {model["parametrization"], base.get(model["hidden_size"], model["parametrization"])}
        for name in names:
            losses[name, model["hidden_size"]][rate].append(curve(run, validation)[-1]["loss"])
    return losses


def best_rate(by_rate: dict[float, list[float]]) -> float:
    """Return the learning rate with the lowest mean loss."""
    return min(by_rate, key=lambda rate: np.mean(by_rate[rate]))


def tables(losses: Losses) -> str:
    """Return the mean losses by learning rate as a Markdown table, with the best rate of each row."""
    rates = sorted({rate for by_rate in losses.values() for rate in by_rate})
    rows = []
    for (name, width), by_rate in sorted(losses.items(), key=lambda item: (item[0][0] != "standard", item[0])):
        means = [f"{np.mean(by_rate[rate]):.3f}" if rate in by_rate else "" for rate in rates]
        rows.append([name, width, *means, f"{best_rate(by_rate):g}"])
    return markdown_table(["parametrization", "width", *(f"{rate:g}" for rate in rates), "best rate"], rows)


def figure(losses: Losses, name: str, seeds: int) -> Figure:
    """Return the losses against the learning rate, a colour for each width; the standard parametrization is dashed."""
    curves = []
    for (parametrization, width), by_rate in sorted(losses.items(), key=lambda item: item[0][1]):
        rates = sorted(by_rate)
        count = min(map(len, by_rate.values()))
        values = np.array([by_rate[rate][:count] for rate in rates]).T  # [seeds, rates]
        label, series = f"{parametrization}, width {width}", f"width {width}"
        curve_of_width = seed_curve(np.array(rates), values, label=label, series=series, markers=True)
        curves.append(replace(curve_of_width, dashed=parametrization == "standard"))
    return Figure(
        name=name,
        title="Final validation loss against the learning rate (dashed: standard)",
        x_label="peak learning rate, of the base width with muP",
        y_label=LOSS,
        curves=curves,
        note=SEED_BAND if seeds > 1 else "",
        x_ticks=tuple(sorted({rate for by_rate in losses.values() for rate in by_rate})),
    )


def main() -> None:
    """Read one sweep."""
    options = read_options(Options, __doc__ or "")
    try:
        runs, missing = load_sweep(Path(options.sweep), [options.validation])
        if missing or not runs:
            raise ConfigurationError(
                f"--sweep {options.sweep}: {missing} runs have no validation yet; finish the sweep"
            )
        losses = final_losses(distinct_runs(runs), options.validation)
    except ConfigurationError as error:
        refuse(error)
    seeds = {run.config["training"]["seed"] for run in runs}
    report = {
        "environment": environment(torch.device("cpu"), "numpy"),
        "seeds": sorted(seeds),
        "losses": [
            {"parametrization": name, "width": width, "lr": rate, "losses": values}
            for (name, width), by_rate in losses.items()
            for rate, values in sorted(by_rate.items())
        ],
        "best": {f"{name} {width}": best_rate(by_rate) for (name, width), by_rate in losses.items()},
    }
    publish(report, tables(losses), options.output)
    if options.output:
        draw(figure(losses, Path(options.output).stem, len(seeds)), Path(options.output).parent)


if __name__ == "__main__":
    main()
