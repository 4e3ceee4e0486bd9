"""A step is the same for any micro-batch size and number of ranks: loss, gradient norm and every gradient."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron.objectives.masked_diffusion import MaskedDiffusion
from megatron.parallel import engine
from megatron.parallel.mesh import ParallelContext
from megatron.training.step import reseed
from tests.distributed import joined, spawn
from tests.steps import LEARNING_RATE, WEIGHT_DECAY, Case, Step, check_equal, dropout_shared_by_ranks, patched, take

CASES = {
    "ar": Case("ar"),
    "mdm": Case("mdm"),
    "ar-token-dropout": Case("ar", {"token_dropout": 0.4}),
    "ar-short": Case("ar", samples=5),
    "mdm-short": Case("mdm", samples=5),
    "mdm-padding-only": Case("mdm", samples=3),  # rank 1 gets only padding
    "mdm-nothing-masked": Case("mdm", nothing_masked=True),
    "mdm-untied": Case("mdm", model={"untie_embeddings_and_output_weights": True}),
    "mdm-clipped": Case("mdm", clip=0.05),
}
CUT = ("ar", "mdm", "ar-token-dropout", "mdm-short")  # also run with several micro-batches on two ranks
# both ranks read the same text, so that only dropout differs
DROPOUT = Case("ar", period=4, model={"hidden_dropout": 0.3, "attention_dropout": 0.2})


def noise_of_the_local_index():
    """All ranks mask the same positions: noise is keyed by the index in the local batch."""
    prepare = MaskedDiffusion.prepare
    return patched(
        MaskedDiffusion, "prepare", lambda self, ids, indices, seed: prepare(self, ids, np.arange(len(indices)), seed)
    )


def mean_of_local_means():
    """Each rank divides by its local count, and the results are averaged."""
    return patched(ParallelContext, "sum", lambda self, *values: [value * self.size for value in values])


def local_count():
    """The count is not summed over ranks."""
    return patched(ParallelContext, "sum", lambda self, *values: list(values))


def local_norm():
    """The gradient norm is that of the local shards and not reduced."""
    return patched(engine.dist, "all_reduce", lambda tensor, *_, **__: tensor)


PLANTED = [
    (noise_of_the_local_index, "mdm"),
    (mean_of_local_means, "mdm-short"),
    (mean_of_local_means, "ar-short"),
    (local_count, "mdm"),
    (local_count, "ar"),
    (local_count, "ar-short"),
    (local_norm, "mdm"),
    (local_norm, "mdm-clipped"),
]


def all_steps(ranks: ParallelContext) -> dict:
    """Return all steps of this module on two ranks, by case and variation or fault."""
    steps = {name: take(ranks, case) for name, case in CASES.items()}
    steps |= {(name, "cut"): take(ranks, replace(CASES[name], micro_batch=2)) for name in CUT}
    for fault, name in PLANTED:
        with fault():
            steps[name, fault.__name__] = take(ranks, CASES[name])
    steps["dropout"], steps["dropout", "again"] = take(ranks, DROPOUT), take(ranks, DROPOUT)
    with dropout_shared_by_ranks():
        steps["dropout", "shared"] = take(ranks, DROPOUT)
    return steps


@pytest.fixture(scope="module")
def two_ranks():
    """The steps on two ranks: name -> [step of rank 0, step of rank 1]."""
    ranks = spawn(all_steps, 2)
    return {name: [steps[name] for steps in ranks] for name in ranks[0]}


@pytest.fixture(scope="module")
def single_rank():
    """The steps on one rank: name -> [step]."""
    with joined() as ranks:
        steps = {name: [take(ranks, case)] for name, case in CASES.items()}
        for micro_batch in (1, 8):
            for name, case in CASES.items():
                steps[name, micro_batch] = [take(ranks, replace(case, micro_batch=micro_batch))]
    return steps


def check_dropout_differs(ranks: list[Step]) -> None:
    assert ranks[0].loss != ranks[1].loss, "two ranks dropped the same units"


@pytest.mark.parametrize("name", CASES)
def test_micro_batches_change_nothing(single_rank, name):
    assert single_rank[name][0].norm > 0.1
    check_equal(single_rank[name], single_rank[name, 1])
    check_equal(single_rank[name], single_rank[name, 8])


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_take_the_step_of_one(single_rank, two_ranks, name):
    check_equal(single_rank[name], two_ranks[name])
    if name in CUT:
        check_equal(single_rank[name], two_ranks[name, "cut"])


@pytest.mark.parametrize("fault, name", PLANTED)
def test_a_planted_fault_is_found(single_rank, two_ranks, fault, name):
    with pytest.raises(AssertionError):
        check_equal(single_rank[name], two_ranks[name, fault.__name__])


def test_clipping_uses_the_global_norm(single_rank, two_ranks):
    free, clip = single_rank["mdm"][0], CASES["mdm-clipped"].clip
    norm = np.sqrt(sum((gradient.astype(np.float64) ** 2).sum() for gradient in free.gradients.values()))
    assert norm > 2 * clip
    for step in (*single_rank["mdm-clipped"], *two_ranks["mdm-clipped"]):
        assert step.norm == pytest.approx(norm, rel=1e-5)
        for name, gradient in free.gradients.items():
            np.testing.assert_allclose(step.gradients[name], gradient * clip / norm, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["ar", "mdm-untied", "mdm-clipped"])
def test_the_update_is_adamw_with_decay_on_matrices_only(single_rank, two_ranks, name):
    for step in (*single_rank[name], *two_ranks[name]):
        for parameter, before in step.before.items():
            decay = WEIGHT_DECAY if before.ndim == 2 else 0.0
            gradient = step.gradients[parameter]
            # both moments of the first step, corrected for their start, are the gradient and its square
            expected = before * (1 - LEARNING_RATE * decay) - LEARNING_RATE * gradient / (np.abs(gradient) + 1e-8)
            np.testing.assert_allclose(step.after[parameter], expected, rtol=1e-4, atol=1e-5, err_msg=parameter)


def test_dropout_differs_between_ranks_and_is_reproducible(two_ranks):
    check_dropout_differs(two_ranks["dropout"])
    assert [step.loss for step in two_ranks["dropout"]] == [step.loss for step in two_ranks["dropout", "again"]]
    with pytest.raises(AssertionError):
        check_dropout_differs(two_ranks["dropout", "shared"])


def test_the_global_generator_is_keyed_by_seed_iteration_and_rank():
    def draw(*key) -> float:
        seed, iteration, rank = key
        reseed(seed, iteration, SimpleNamespace(rank=rank))
        return float(torch.rand(()))

    keys = [(1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1), (1, 1, 1)]
    assert len({draw(*key) for key in keys}) == len(keys)
    assert draw(1, 1, 1) == draw(1, 1, 1)


def fail_on_the_second(ranks: ParallelContext) -> None:
    if ranks.rank == 1:
        raise ValueError("as planted")
    torch.distributed.barrier()


def test_a_failing_process_is_named():
    with pytest.raises(RuntimeError, match="(?s)^error of rank 1\n.*as planted"):
        spawn(fail_on_the_second, 2)
