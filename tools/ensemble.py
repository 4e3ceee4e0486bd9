#!/usr/bin/env python3
"""Evaluate ensembles of training runs: each run alone, and the first 1, 2, ... of them together.

    python tools/ensemble.py runs/seed_1 runs/seed_2 runs/seed_3
    python tools/ensemble.py runs/seed_* --checkpoint best --json runs/ensemble.json --plot runs/ensemble.png
    python tools/ensemble.py runs/cyclic@snapshots
    python tools/ensemble.py runs/seed_* --select 4 --select-on tuning
    torchrun --standalone --nproc-per-node 8 tools/ensemble.py runs/seed_1 runs/seed_2 --num-mc 32

An ensemble averages probabilities, token by token: p = mean of p_k, so nll = log K - logsumexp(-nll_k). The loss of
autoregressive runs is exact. That of masked diffusion is an upper bound, as for a single run: the mean of the denoisers
is a denoiser, evaluated with the same masks for all members.

RUN@snapshots stands for the checkpoints that a run keeps for good, the newest first: the last of each cycle of
--lr-decay-style cyclic, and those of --keep-iterations and --keep-every-epochs. --select adds members one by one, each
time the one that lowers the loss of the ensemble most on one validation set, and reports on the others.

Data, noise and alignment are those that the first run recorded, as with --skip-train; flags of data and validation
after the runs override them: --num-mc, --eval-seed, --eval-samples, --eval-batch-size, --eval-alignment,
--valid-data-path, --train-data-path, --tokenizer-model (see pretrain_gpt.py --help). Members share objective,
tokenizer, alignment and validation text; sizes, budgets, regularisers and parallel layouts may differ. All members are
in memory at once, sharded over the ranks of torchrun.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron import stop_signals

if __name__ == "__main__":
    stop_signals.install_in_tool()  # before the imports, which take seconds

from megatron.training.launcher import launch

# isort: split
# OMP_WAIT_POLICY is set by the import above and must precede torch
from megatron.errors import ConfigurationError
from megatron.parallel.mesh import initialize_parallel
from megatron.reporting.ensemble import evaluate_members, expand_snapshots, open_members, settings, table
from megatron.reporting.member_selection import Selection
from megatron.reporting.plots import plot_ensembles
from megatron.training.run_folder import prepare_output, write_json, writing


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="folders that --save wrote, checkpoints, or RUN@snapshots"
    )
    parser.add_argument(
        "--checkpoint",
        choices=("latest", "best"),
        default="latest",
        help="the newest checkpoint of each run, or that of the lowest loss on the first set (default: latest)",
    )
    parser.add_argument("--select", type=int, metavar="K", help="select K members greedily")
    parser.add_argument("--select-on", metavar="SET", help="validation set of the selection (default: the first)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the record as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="plot loss against the number of members")
    options, flags = parser.parse_known_args()
    selection = Selection(options.select, options.select_on) if options.select is not None else None

    def work(config, detector) -> None:
        ranks = initialize_parallel(minutes=config.parallel.distributed_timeout_minutes)
        members = ranks.from_rank_0(lambda: open_members(runs(), options.checkpoint, flags))
        ranks.from_rank_0(make_folders)
        record = evaluate_members(members, ranks, selection)
        if ranks.rank == 0:
            print(table(record))
            if options.json:
                write_json(options.json, record)
            if options.plot:
                with writing(options.plot):
                    plot_ensembles(record, options.plot)

    def runs() -> list[str]:
        return expand_snapshots(options.runs)

    def first_settings():
        if options.select_on and selection is None:
            raise ConfigurationError(f"--select-on {options.select_on}: does nothing without --select; give both")
        return settings(runs()[0], flags)

    def make_folders() -> None:
        for path in filter(None, (options.json, options.plot)):
            prepare_output(path)  # fails before the evaluation, not after it

    launch(first_settings, work)


if __name__ == "__main__":
    stop_signals.run_tool(main)
