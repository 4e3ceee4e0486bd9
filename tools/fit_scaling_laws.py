#!/usr/bin/env python3
"""Fit scaling laws of repeated data to a table of runs: values with intervals, a comparison of forms, answers.

    python tools/fit_scaling_laws.py runs/mine_sweep --set validation --where variant=ar \\
        --form repetition,overfitting --output runs/laws --unique-tokens 100M

TABLE is results.csv or results.parquet of a sweep, or any CSV or Parquet file with columns for parameters, unique
tokens, training tokens or epochs, and loss. --help lists the forms; docs/scaling-laws.md explains them, and what the
intervals mean. DIR/fit.json has everything that is printed, residuals and curves; plots are DIR/FORM_*.png and .svg.
A parameter that the rows do not determine gets no value.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron import stop_signals

if __name__ == "__main__":
    stop_signals.install_in_tool()  # before the imports, which take seconds

from tqdm import tqdm

from megatron.errors import ConfigurationError
from megatron.laws.base import Law
from megatron.laws.command import PUBLISHED, answers, check_flops, origin, requests
from megatron.laws.registry import FORMS, load_law
from megatron.laws.study import Study, comparison, comparison_table, study
from megatron.laws.table import add_table_arguments, parse_amount, read_table, selection_from
from megatron.reporting.law_plots import plot_fit
from megatron.training.run_folder import check_writable, write_json


def main() -> None:
    """Fit, print, and write fit.json and plots; exit with code 2 after a mistake."""
    options = _options()
    try:
        _run(options)
    except ConfigurationError as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
    except OSError as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 1)


def _run(options: argparse.Namespace) -> None:
    """Fit every form of the command line.

    Raises: ConfigurationError for a mistake, OSError for a failed write.
    """
    _check_output(options.output)
    wanted = requests(options.form, options.freeze, options.base)
    budgets = [parse_amount(text, "--unique-tokens") for text in options.unique_tokens]
    flops = [parse_amount(text, "--flops") for text in options.flops]
    other = load_law(options.critical_compute_against) if options.critical_compute_against else None
    if (flops or other) and not budgets:
        raise ConfigurationError("--flops and --critical-compute-against: need a data budget; give --unique-tokens")
    if not 0 < options.level < 1:
        raise ConfigurationError(f"--level {options.level}: must be between 0 and 1, such as 0.95")
    if options.bootstrap != 0 and options.bootstrap < 100:
        raise ConfigurationError(f"--bootstrap {options.bootstrap}: must be 0 (none) or at least 100 resamples")
    selection = selection_from(options)
    table = read_table(options.table, **{name: getattr(selection, name) for name in selection.__dataclass_fields__})
    check_flops(table, budgets, flops)
    studies = [
        study(
            request.form,
            table,
            request.frozen,
            base=request.base,
            level=options.level,
            resamples=options.bootstrap,
            seed=options.seed,
            progress=True,
        )
        for request in tqdm(wanted, desc="forms", disable=len(wanted) == 1, leave=False)
    ]
    print("\n\n".join(str(result) for result in studies))
    rows = comparison(studies)
    if len(studies) > 1:
        print(f"\nforms on the same {len(table)} rows; AIC and BIC of Huber's likelihood, errors on held-out budgets")
        print(comparison_table(rows))
    replies = _answer(studies, budgets, flops, other)
    options.output.mkdir(parents=True, exist_ok=True)
    fits = [result.to_json() for result in studies]
    write_json(
        options.output / "fit.json",
        {"table": table.source, "filters": list(table.filters), "fits": fits, "comparison": rows, "answers": replies},
    )
    for record in tqdm(fits, desc="plots", leave=False):
        plot_fit(record, options.output)
    print(f"\nfit: {options.output / 'fit.json'}")


def _check_output(folder: Path) -> None:
    """Check that the folder of --output can be written to.

    Raises: ConfigurationError if it cannot.
    """
    try:
        check_writable(folder)
    except ConfigurationError as error:
        raise ConfigurationError(str(error).replace("--save", "--output", 1)) from None


def _answer(studies: list[Study], budgets: list[float], flops: list[float], other: Law | None) -> list[dict]:
    """Print the answers of every law and return their records."""
    records = []
    for result in studies if budgets else ():
        name, law = result.fit.form.name, result.law
        if law is None:
            print(f"\n{name} answers nothing: it diverged")
            continue
        lines, answered = answers(law, budgets, flops, other, level=result.level, progress=True)
        print(f"\n{name} answers (compute 6 N D; {origin(law.notes)})\n" + "\n".join(lines))
        records += answered
    return records


def _options() -> argparse.Namespace:
    forms = "\n".join(f"  {form.name:20} {form.equation}" for form in FORMS.values())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"forms:\n{forms}\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("table", type=Path, metavar="TABLE", help="CSV or Parquet file, or the folder of a sweep")
    parser.add_argument("--form", required=True, metavar="NAME[,NAME]", help="forms to fit and compare, listed below")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for fit.json and plots")
    parser.add_argument(
        "--base",
        metavar=f"{PUBLISHED}|FILE[:FORM]",
        help="freeze E, A, B, alpha and beta at the published constants, or at those of a form in another fit.json",
    )
    parser.add_argument(
        "--freeze",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="hold a parameter, such as R_N*=5.3; repeatable, or separated by commas",
    )
    parser.add_argument(
        "--bootstrap", type=int, default=1000, metavar="N", help="resamples of seed groups; 0: none (default: 1000)"
    )
    parser.add_argument("--level", type=float, default=0.95, metavar="P", help="of all intervals (default: 0.95)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the bootstrap (default: 1)")
    add_table_arguments(parser)
    group = parser.add_argument_group("what the laws answer")
    group.add_argument(
        "--unique-tokens",
        action="append",
        default=[],
        metavar="U",
        help="best size and epochs for this data budget, such as 100M; repeatable",
    )
    group.add_argument(
        "--flops", action="append", default=[], metavar="C", help="best run at this compute, 6 N D; repeatable"
    )
    group.add_argument(
        "--critical-compute-against",
        metavar="FILE[:FORM]",
        help="a form in the fit.json of another table: the compute from which this table's law has the lower loss",
    )
    return parser.parse_args()


if __name__ == "__main__":
    stop_signals.run_tool(main)
