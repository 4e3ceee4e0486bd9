"""Reports distinguish runs by their weight-shared loops."""

from pathlib import Path

import numpy as np
import pytest

from megatron.reporting.runs import Run, TrainingCurve


@pytest.mark.parametrize("model, text", [
    ({}, "weight decay 0.1"),
    ({"num_loops": 1, "loop_layers": None}, "weight decay 0.1"),
    ({"num_loops": 4, "loop_layers": None}, "4 loops of all blocks, weight decay 0.1"),
    ({"num_loops": 2, "loop_layers": "1-2", "mlp_dropout": 0.2},
     "MLP dropout 0.2, 2 loops of blocks 1-2, weight decay 0.1"),
])  # fmt: skip
def test_regularisers_of_a_run_name_its_loops(model, text):
    config = {"model": model, "objective": {}, "optimizer": {"weight_decay": 0.1}}
    train = TrainingCurve(np.zeros(0), np.zeros(0))
    run = Run(name="run", folder=Path("run"), config=config, train=train, valid={}, consumed_samples=0)
    assert run.regularisers() == text
