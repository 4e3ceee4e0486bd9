#!/usr/bin/env python3
"""Evaluate all likelihoods of one run on the same windows: how loose is its bound?

    python tools/likelihoods.py runs/mdm --eval-windows 32
    python tools/likelihoods.py runs/mdm --orders confidence left-to-right --tokens-per-step 4 --num-orders 0
    python tools/likelihoods.py runs/mdm --against runs/ar/likelihoods/293.json
    torchrun --standalone --nproc-per-node 8 tools/likelihoods.py runs/mdm --json runs/mdm_likelihoods.json

chain: the exact likelihood of an unmasking order, one token after another; for masked diffusion that of
tools/generate.py with the same order at temperature 1. iwae: the importance-weighted bound of the mixture over all
orders, which tightens with the number of random orders. tangent bound: a lower bound of the negative log-likelihood of
the same mixture, so that it has an interval. Autoregressive runs have one exact likelihood. A chain costs as many
forward passes as a window has tokens; block diffusion, as a block has; an any-order model, one in an order that does
not depend on predictions.

The record is also in the run folder, where tools/report.py finds it. The same command resumes after a kill.
Data, noise and alignment are those that the run recorded; flags of data and validation override them.
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
from megatron.config.flags import require, typed_flags
from megatron.errors import ConfigurationError
from megatron.generation.sampling import ORDERS
from megatron.parallel.mesh import initialize_parallel
from megatron.reporting.ensemble import settings
from megatron.reporting.likelihood_records import comparison, read_likelihoods, record_path, table
from megatron.reporting.likelihoods import Policies, evaluate_likelihoods
from megatron.scoring.answer_cache import cache_files
from megatron.training.load_run import open_trained
from megatron.training.run_folder import prepare_output, write_json


def main() -> None:
    """Run the command."""
    options, flags = _parser().parse_known_args()

    def read():
        for name in ("eval_windows", "tokens_per_step", "block_length"):
            value = getattr(options, name)
            require(value is None or value >= 1, name, value, "must be at least 1")
        count = options.num_orders
        require(count is None or (count >= 0 and count % 2 == 0), "num_orders", count, "is an even number, or 0")
        if "--eval-samples" in typed_flags(flags):
            raise ConfigurationError("--eval-samples: --eval-windows is the number of windows here; give that")
        if options.against:
            read_likelihoods(options.against, "--against")
        return settings(options.run, flags)

    def work(config, detector) -> None:
        ranks = initialize_parallel(minutes=config.parallel.distributed_timeout_minutes)
        trained = ranks.from_rank_0(lambda: open_trained(options.run, options.checkpoint, flags))
        path = options.json or record_path(trained.checkpoint, trained.meta["iteration"], options.average)
        ranks.from_rank_0(lambda: prepare_output(path))  # fails before the evaluation, not after it
        progress = str(path.with_name(path.name + ".progress"))
        policies = Policies(
            orders=None if options.orders is None else tuple(options.orders),
            tokens_per_step=options.tokens_per_step,
            block_length=options.block_length,
            num_orders=options.num_orders,
        )
        settings = {"windows": options.eval_windows, "average": options.average, "progress": progress}
        record = evaluate_likelihoods(trained, policies, ranks, **settings)
        if ranks.rank == 0:
            write_json(path, record)
            for file in cache_files(progress):
                file.unlink()
            print(f"{table(record)}\n\nrecord: {path}")
            if options.against:
                print(f"\n{comparison(record, read_likelihoods(options.against, '--against'))}")

    launch(read, work)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", metavar="RUN", help="a folder that --save wrote, or a checkpoint in it")
    parser.add_argument(
        "--checkpoint",
        choices=("latest", "best"),
        default="latest",
        help="the newest checkpoint, or that of the lowest loss on the first set (default: latest)",
    )
    parser.add_argument("--average", action="store_true", help="use the averaged weights")
    parser.add_argument(
        "--eval-windows",
        type=int,
        default=32,
        metavar="N",
        help="windows of each validation set, spread evenly over it (default: 32)",
    )
    parser.add_argument(
        "--orders",
        nargs="*",
        choices=ORDERS,
        help="orders of unmasking with a likelihood each (default: all but random)",
    )
    parser.add_argument(
        "--tokens-per-step", type=int, default=1, metavar="K", help="unmask K tokens a step (default: 1)"
    )
    parser.add_argument("--block-length", type=int, metavar="N", help="unmask blocks of N tokens from left to right")
    parser.add_argument(
        "--num-orders", type=int, metavar="K", help="random orders of iwae, an even number; 0: none (default: 8)"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the record there (default: RUN/likelihoods/ITERATION.json)"
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="RECORD",
        help="also print differences to the first likelihood in the record of another run on the same windows, paired "
        "by document",
    )
    return parser


if __name__ == "__main__":
    stop_signals.run_tool(main)
