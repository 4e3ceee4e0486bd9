#!/usr/bin/env python3
"""Compare runs on one HTML page: a table, paired differences, plots and conclusions.

python tools/report.py runs/quickstart/ar runs/quickstart/mdm --output runs/quickstart/report
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.errors import ConfigurationError
from megatron.reporting.report import write_report
from megatron.reporting.runs import load_runs


def main() -> None:
    """Write the report and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders (--save)")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder for report.html and its plots"
    )
    parser.add_argument(
        "--tuning", default="tuning", metavar="SET", help="set on which best points are chosen (default: tuning)"
    )
    parser.add_argument(
        "--validation", default="validation", metavar="SET", help="set whose losses are reported (default: validation)"
    )
    options = parser.parse_args()
    try:
        print(write_report(load_runs(options.runs), options.output, options.tuning, options.validation))
        print(f"\nreport: {options.output / 'report.html'}")
    except ConfigurationError as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)


if __name__ == "__main__":
    main()
