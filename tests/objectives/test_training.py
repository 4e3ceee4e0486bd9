"""Each option learns in 200 steps on real text, the source of Python's standard library.

Sequences of 64 bytes and a model of 34,000 parameters: a few seconds each, and enough to see whether an option learns.
All thresholds, in nats per byte of held-out text, are below the loss of a unigram model.
"""

import numpy as np
import pytest

from megatron.data.indexed import IndexedDataset
from megatron.training.launcher import main
from tests.conftest import records

SETTINGS = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --init-method-std 0.1 --qk-layernorm --seq-length 64 "
)
SETTINGS += (
    "--lr 1e-2 --fp32 --no-compile --micro-batch-size 8 --global-batch-size 8 --train-iters 200 --log-interval 100 "
)
SETTINGS += "--tokenizer-type ByteTokenizer --eval-interval 200 --eval-samples 96 --eval-batch-size 32 --num-mc 2 "
CASES = {
    "--objective ar": {"validation": 2.5},
    "--objective mdm": {"validation": 3.0},
    "--objective dual --micro-batch-size 4": {"validation": 2.6, "validation.mdm": 2.85},
    "--objective any-order --global-batch-size 16": {"validation": 2.95, "validation.ar": 2.95},
    "--objective block-diffusion --diffusion-block-size 4": {"validation": 2.97},
    "--token-dropout-max 0.4": {"validation": 2.7},
}
SLOW = {
    "--objective mdm --ar-ratio 0.2 --global-batch-size 16": {"validation": 3.0},
    "--objective mdm --low-noise-samples 800": {"validation": 3.0},
    "--objective mdm --mask-time-distribution window --mask-time-weighting none": {"validation": 3.0},
    "--objective mdm --mask-time-distribution bell --global-batch-size 16": {"validation": 3.0},
    "--objective mdm --mdm-loss simple": {"validation": 3.0},
    "--num-order-list 4 --use-predefined-order": {"validation": 2.9},
    "--target-offset-max 3 --target-positions": {"validation": 2.9},
    "--token-dropout 0.2": {"validation": 2.6},
    "--random-replacement 0.1": {"validation": 2.55},
    "--randmask-ratio 0.3": {"validation": 2.5},
    "--stochastic-depth 0.2": {"validation": 2.55},
    "--reset-attention-mask --reset-position-ids --eod-mask-loss": {"validation": 2.5},
    "--label-smoothing 0.1 --z-loss 1e-3": {"validation": 2.6},
    "--weight-decay-incr-style linear --start-weight-decay 0 --end-weight-decay 1": {"validation": 2.5},
    "--num-order-list 4 --target-positions": {"validation": 3.0},
    "--right-to-left-ratio 0.5": {"validation": 2.75},
    "--masked-input-weight 0.4": {"validation": 2.5},
    "--attention-dropout 0.1 --hidden-dropout 0.1 --mlp-dropout 0.1 --embedding-dropout 0.1": {"validation": 2.55},
    "--optimizer muon --weight-decay-parameters hidden": {"validation": 2.45},
    "--ema-decay 0.95": {"validation": 2.5, "validation.average": 2.5},
    "--average-from-samples 800": {"validation": 2.5, "validation.average": 2.5},
}


@pytest.fixture(scope="module")
def unigram(corpus) -> float:
    """Return the held-out loss of a unigram model of the training bytes."""
    train, held_out = (IndexedDataset(f"{corpus}/{name}", 257) for name in ("train", "validation"))
    counts = np.bincount(train.stream(0, train.total_tokens), minlength=257) + 1
    return float(-np.log(counts / counts.sum())[held_out.stream(0, held_out.total_tokens)].mean())


@pytest.mark.parametrize("flags", [*CASES, *(pytest.param(flags, marks=pytest.mark.slow) for flags in SLOW)])
def test_two_hundred_steps_of_real_text(corpus, unigram, tmp_path, flags):
    data = f"--train-data-path {corpus}/train --valid-data-path {corpus}/validation --save {tmp_path}"
    main("ar", f"{SETTINGS} {data} {flags}".split())
    limits = (CASES | SLOW)[flags]
    losses = {record["set"]: record["loss"] for record in records(tmp_path, "valid")}
    assert losses.keys() == limits.keys()
    assert all(loss < limits[name] < unigram for name, loss in losses.items()), f"{losses}, unigram {unigram}"
