#!/usr/bin/env python3
"""Print how many times more unique data a baseline needs to reach the loss of a method: the data multiplier.

    python tools/data_multiplier.py runs/mine_sweep --set validation --baseline variant=ar --method variant=mdm
    python tools/data_multiplier.py --loss 3.402 --unique-tokens 100M --baseline fresh.csv depth=26 \\
        --interpolation linear

The baseline is measured runs on two or more data budgets: conditions on the rows of TABLE, or a table of its own and
conditions on that. TABLE is the folder of a collected sweep, or any CSV or Parquet file with unique tokens and losses
(docs/data-multiplier.md). At each budget the best recipe counts, epochs, sizes and trials included; narrow it with
conditions for a single recipe. The answer depends on the baseline: both are printed and written together.
"""

import argparse
import re
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron import stop_signals

if __name__ == "__main__":
    stop_signals.install_in_tool()  # before the imports, which take seconds

from megatron.errors import ConfigurationError
from megatron.laws.data_multiplier import INTERPOLATIONS, Curve, curve, measured_loss, multipliers, table, to_json
from megatron.laws.table import Selection, add_table_arguments, parse_amount, read_runs, selection_from
from megatron.training.run_folder import write_json


def main() -> None:
    """Run the command; exit with code 2 after a mistake, 1 if the answer cannot be written."""
    options = _options()
    try:
        selection = selection_from(options)
        baseline = _side(options.baseline, options.table, selection, "--baseline")
        method = _method(options, selection)
        settings = {"interpolation": options.interpolation, "extrapolate": options.extrapolate}
        answers = multipliers(baseline, method, **settings)
        if options.json:
            write_json(options.json, to_json(baseline, method, answers, **settings))
        print(table(baseline, method, answers, options.interpolation))
    except ConfigurationError as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
    except OSError as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("table", nargs="?", metavar="TABLE", help="runs of baseline and method")
    parser.add_argument(
        "--baseline",
        nargs="+",
        required=True,
        metavar="WORD",
        help="conditions such as variant=ar, after the path of a table if it is not TABLE",
    )
    parser.add_argument("--method", nargs="+", metavar="WORD", help="likewise; or give --loss and --unique-tokens")
    parser.add_argument("--loss", type=float, metavar="L", help="loss of the method in nats per token")
    parser.add_argument("--unique-tokens", metavar="U", help="its unique tokens: 100M, 1e8")
    parser.add_argument(
        "--interpolation",
        choices=tuple(INTERPOLATIONS),
        default="log",
        help="the baseline's loss is linear in the logarithm of the tokens, or in the tokens (default: log)",
    )
    parser.add_argument(
        "--extrapolate",
        type=float,
        default=1.0,
        metavar="FACTOR",
        help="continue the baseline up to this factor beyond its largest data budget (default: 1, not at all)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the answer as JSON")
    add_table_arguments(parser)
    return parser.parse_args()


def _method(options: argparse.Namespace, selection: Selection) -> Curve:
    """Return the method: runs of a table, or the given loss.

    Raises: ConfigurationError where neither or both are given.
    """
    if options.method:
        if options.loss is not None or options.unique_tokens is not None:
            raise ConfigurationError("--method: excludes --loss and --unique-tokens; give runs or a loss")
        return _side(options.method, options.table, selection, "--method")
    if options.loss is None or options.unique_tokens is None:
        raise ConfigurationError("give --method, or --loss together with --unique-tokens")
    if not 0 < options.loss < float("inf"):
        raise ConfigurationError(f"--loss {options.loss}: must be positive, in nats per token")
    return measured_loss(options.loss, parse_amount(options.unique_tokens, "--unique-tokens"))


def _side(words: list[str], table_path: str | None, selection: Selection, flag: str) -> Curve:
    """Return the runs that the words of a side name.

    Raises: ConfigurationError, naming the side, where no table is given or its rows are refused.
    """
    has_table = not re.search(r"[=<>]", words[0]) or Path(words[0]).exists()
    path, conditions = (words[0], words[1:]) if has_table else (table_path, words)
    if path is None:
        raise ConfigurationError(f"{flag} {' '.join(words)}: needs a table; name TABLE, or one before the conditions")
    selection = replace(selection, where=(*selection.where, *conditions), mixed=(*selection.mixed, "stage", "trial"))
    try:
        return curve(" ".join(words), read_runs(path, selection, required=("unique_tokens", "loss")))
    except ConfigurationError as error:
        raise ConfigurationError(f"{flag} {' '.join(words)}: {error}") from None


if __name__ == "__main__":
    stop_signals.run_tool(main)
