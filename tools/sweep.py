#!/usr/bin/env python3
"""Plan, run and collect a sweep: many runs over epochs, sizes, regularisers, seeds and tuning trials from one file.

    python tools/sweep.py plan SWEEP.yaml                        check every run; list tokens, FLOPs, memory, hours
    python tools/sweep.py run SWEEP.yaml                         train all runs on this machine; resumes
    python tools/sweep.py submit SWEEP.yaml --site SITE.yaml     train them as SLURM job arrays
    python tools/sweep.py status SWEEP.yaml                      what is done, running, waiting, failed
    python tools/sweep.py resubmit SWEEP.yaml --site SITE.yaml   submit again what failed or was lost
    python tools/sweep.py collect SWEEP.yaml                     one table of all validations: CSV and Parquet
    python tools/sweep.py compare DIR --baseline variant=NAME    differences to a baseline, paired by seed
    python tools/sweep.py archive SWEEP.yaml FILE                records of finished runs as one file
    python tools/sweep.py restore SWEEP.yaml FILE                finished runs from that file

SWEEP.yaml is described in docs/sweeps.md; the folder of the sweep, runs/NAME or --output, takes its place everywhere.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron import stop_signals

if __name__ == "__main__":
    stop_signals.install_in_tool()  # before the imports, which take seconds

from megatron.errors import ConfigurationError
from megatron.log import configure_logging
from megatron.sweeps.commands import archive, collect, compare, plan, restore, resubmit, run, run_task, status, submit


def main() -> None:
    """Run one command; exit with code 2 after a mistake, 1 if a run failed."""
    options = _options()
    configure_logging()
    try:
        sys.exit(options.command(options))
    except ConfigurationError as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
    except BrokenPipeError:
        os._exit(1)
    except OSError as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    def add(name: str, command, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        sub.add_argument("sweep", type=Path, metavar="SWEEP", help="a sweep file, or the folder of a planned sweep")
        sub.add_argument("--output", type=Path, metavar="DIR", help="folder of the sweep (default: runs/NAME)")
        sub.set_defaults(command=command)
        return sub

    add("plan", plan, "check every run of a sweep and list what it costs; nothing is started")
    local = add("run", run, "train all runs on this machine; the same command resumes")
    _add_stages(local)
    local.add_argument("--slots", type=int, metavar="N", help="ranks at a time (default: one per GPU, else per core)")
    local.add_argument("--retries", type=int, default=2, metavar="N", help="after passing failures (default: 2)")
    local.add_argument("--retry-failed", action="store_true", help="start diverged and too large runs again, too")
    local.add_argument(
        "--hang-minutes", type=float, default=30.0, metavar="M", help="end a run that records nothing (default: 30)"
    )
    for name, command, help in (
        ("submit", submit, "train all runs that are not finished as SLURM job arrays"),
        (
            "resubmit",
            resubmit,
            "submit again what is not finished, running or in the queue, whatever it failed of",
        ),
    ):
        sub = add(name, command, help)
        _add_stages(sub)
        sub.add_argument("--site", type=Path, metavar="FILE", help="YAML file of the cluster: partition, account, ...")
        sub.add_argument("--dry-run", action="store_true", help="write and print the scripts; submit nothing")
    add("status", status, "list the state of every run and write status.html")
    add("collect", collect, "write results.csv and results.parquet: a row per validation, all axes as columns")
    for name, command, help in (
        ("archive", archive, "write the records of all finished runs to one file, without checkpoints"),
        ("restore", restore, "make finished runs from such a file, so that they are not trained again"),
    ):
        sub = add(name, command, help)
        sub.add_argument("file", type=Path, metavar="FILE", help="JSON lines, a run each")
    _add_compare(commands)
    task = add("run-task", run_task, "train the point of a SLURM array task; called by the scripts of `submit`")
    task.add_argument("--tasks", type=Path, required=True, metavar="FILE", help="points of the tasks, an id a line")
    task.add_argument("--retries", type=int, default=2, metavar="N", help="after passing failures (default: 2)")
    task.add_argument("--retry-failed", action="store_true", help="start diverged and too large runs again, too")
    task.add_argument("--hang-minutes", type=float, default=30.0, metavar="M", help="end a run without output")
    task.add_argument("--wait-for-lock", type=float, default=10.0, metavar="M", help="minutes (default: 10)")
    return parser.parse_args()


def _add_stages(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--stages",
        nargs="+",
        metavar="STAGE",
        help="only these stages, and what their runs continue from (default: all)",
    )


def _add_compare(commands) -> None:
    difference = commands.add_parser(
        "compare",
        help="list the best losses of all points and their differences to a baseline, paired by seed",
        description="Take each run at its best step on the tuning set, and print its loss on the validation set and "
        "the difference to the baseline: mean over seeds and standard error of the mean.",
        epilog="example: python tools/sweep.py compare runs/epochs --baseline variant=ar",
        allow_abbrev=False,
    )
    difference.add_argument("table", type=Path, metavar="TABLE", help="results.csv of `collect`, or its folder")
    difference.add_argument(
        "--baseline", nargs="+", required=True, metavar="COLUMN=VALUE", help="variant or axis, and the baseline's value"
    )
    difference.add_argument("--variants", default="*", metavar="PATTERN", help="only these variants, such as 'mdm*'")
    difference.add_argument(
        "--where",
        nargs="+",
        default=(),
        metavar="COLUMN=VALUE",
        help="only rows with these values, such as stage=final",
    )
    difference.add_argument(
        "--best-over",
        nargs="+",
        default=(),
        metavar="COLUMN",
        help="take the best of these columns on the tuning set, such as train-epochs and tuned flags",
    )
    difference.add_argument("--tuning", default="tuning", metavar="SET", help="chooses the step (default: tuning)")
    difference.add_argument(
        "--validation", default="validation", metavar="SET", help="is reported (default: validation)"
    )
    difference.set_defaults(command=compare)


if __name__ == "__main__":
    stop_signals.run_tool(main)
