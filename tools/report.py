#!/usr/bin/env python3
"""Compare runs on one self-contained HTML page: tables, paired differences, interactive plots and conclusions.

    python tools/report.py runs/quickstart/ar runs/quickstart/mdm --output runs/quickstart/report
    python tools/report.py runs/epochs --output runs/epochs/report            a sweep, with means over seeds

DIR also gets every plot as SVG and PNG. docs/reports.md describes the page.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron import stop_signals

if __name__ == "__main__":
    stop_signals.install_in_tool()  # before the imports, which take seconds

from megatron.errors import ConfigurationError
from megatron.reporting.attachments import read_attachments
from megatron.reporting.report import Report, write_report
from megatron.reporting.sources import load


def main() -> None:
    """Write the report and print its table; exit with code 2 after a mistake, 1 where it cannot be written."""
    options = _options()
    try:
        source = load(options.runs, (options.tuning, options.validation), progress=True)
        report = Report(
            title=source.title,
            tuning=options.tuning,
            validation=options.validation,
            notes=source.notes,
            attachments=read_attachments(options.fit, options.multiplier, options.scores),
        )
        print(write_report(source.runs, options.output, report, progress=True))
        print(f"\nreport: {options.output / 'report.html'}")
    except ConfigurationError as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
    except OSError as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders (--save), or folders of sweeps")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder for report.html and its plots"
    )
    parser.add_argument(
        "--tuning", default="tuning", metavar="SET", help="set on which best points are chosen (default: tuning)"
    )
    parser.add_argument(
        "--validation", default="validation", metavar="SET", help="set whose losses are reported (default: validation)"
    )
    for flag, name, tool in (
        ("--fit", "fitted laws to include: fit.json", "tools/fit_scaling_laws.py"),
        ("--multiplier", "data multipliers to include: the JSON", "tools/data_multiplier.py"),
        ("--scores", "downstream scores to include: scores.json", "tools/score_checkpoints.py"),
    ):
        help = f"{name} of {tool}; repeatable"
        parser.add_argument(flag, type=Path, action="append", default=[], metavar="FILE", help=help)
    return parser.parse_args()


if __name__ == "__main__":
    stop_signals.run_tool(main)
