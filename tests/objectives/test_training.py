"""Each option trains 200 steps on real text, the source of Python's standard library, and learns from it.

Bytes, 64 at a time, and a network of 34,000 parameters: a few seconds each, and enough to tell an option that learns
from one that does not. The thresholds are nats per byte on held-out text.
"""

import pytest

from megatron.training.main import main
from tests.conftest import records

SETTINGS = "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --init-method-std 0.1 --seq-length 64 --lr 1e-2 "
SETTINGS += "--fp32 --no-compile --micro-batch-size 16 --global-batch-size 16 --train-iters 200 --log-interval 100 "
SETTINGS += "--tokenizer-type ByteTokenizer --eval-interval 200 --eval-samples 128 --eval-batch-size 32 --num-mc 2"
UNIGRAM = 3.3  # of bytes drawn by their frequencies alone
CASES = {
    "--objective ar": {"validation": 2.6},
    "--objective mdm": {"validation": 3.2},
    "--objective dual": {"validation": 2.7, "validation.mdm": 3.2},
    "--objective any-order": {"validation": 3.2, "validation.ar": 3.2},
    "--objective block-diffusion --diffusion-block-size 4": {"validation": 3.2},
    "--objective mdm --ar-ratio 0.5": {"validation": 3.2},
    "--objective mdm --low-noise-samples 1600": {"validation": 3.2},
    "--num-order-list 4 --target-positions": {"validation": 3.2},
    "--num-order-list 4 --use-predefined-order": {"validation": 3.2},
    "--right-to-left-ratio 0.5": {"validation": 3.2},
    "--target-offset-max 3 --target-positions": {"validation": 3.2},
    "--token-dropout 0.2": {"validation": 3.2},
    "--token-dropout-max 0.4": {"validation": 3.2},
    "--random-replacement 0.1": {"validation": 3.2},
    "--masked-input-weight 0.4": {"validation": 3.2},
    "--randmask-ratio 0.3": {"validation": 3.2},
    "--stochastic-depth 0.2": {"validation": 3.2},
    "--reset-attention-mask --reset-position-ids --eod-mask-loss": {"validation": 3.2},
    "--attention-dropout 0.1 --hidden-dropout 0.1 --mlp-dropout 0.1 --embedding-dropout 0.1": {"validation": 3.2},
    "--label-smoothing 0.1 --z-loss 1e-3": {"validation": 3.2},
    "--optimizer muon --weight-decay-parameters hidden": {"validation": 3.2},
    "--weight-decay-incr-style linear --start-weight-decay 0 --end-weight-decay 1": {"validation": 3.2},
    "--ema-decay 0.95": {"validation": 3.2, "validation.average": 3.2},
    "--average-from-samples 2400": {"validation": 3.2, "validation.average": 3.2},
}


@pytest.mark.parametrize("flags", CASES)
def test_two_hundred_steps_of_real_text(corpus, tmp_path, flags):
    data = f"--train-data-path {corpus}/train --valid-data-path {corpus}/validation --save {tmp_path}"
    main("ar", f"{SETTINGS} {data} {flags}".split())
    found = {record["set"]: record["loss"] for record in records(tmp_path, "valid")}
    print(flags, found)
    assert found.keys() == CASES[flags].keys()
    assert all(loss < CASES[flags][name] < UNIGRAM for name, loss in found.items())
