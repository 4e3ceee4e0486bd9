"""Noise follows the run position: new in every epoch, the same after a resume and however a step is cut."""

import bisect
import fnmatch
import heapq
import inspect
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron.config.sections import ObjectiveConfig, Vocabulary
from megatron.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron.data.samples import TrainSamples
from megatron.objectives import build_input_noise, build_objective
from megatron.objectives.masked_diffusion import MaskedDiffusion
from megatron.objectives.token_dropout import TokenDropout
from megatron.training.feed import MicroBatches, loader

VOCABULARY, SEQ_LENGTH, SEED = Vocabulary(257), 32, 1234
GLOBAL_BATCH, BUDGET = 8, 29  # four steps, the last one of 5 samples
VARIANTS = {
    "ar": ("ar", {}),
    "ar-token-dropout": ("ar", {"token_dropout_max": 0.8}),
    "mdm": ("mdm", {}),
    "mdm-iid": ("mdm", {"mask_times": "iid"}),
}
NOISY = [name for name in VARIANTS if name != "ar"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A few modules of the standard library, a document each, a byte a token."""
    prefix = str(tmp_path_factory.mktemp("data") / "text")
    with IndexedDatasetWriter(prefix, VOCABULARY.size) as writer:
        for module in (bisect, heapq, fnmatch):
            writer.add_document([*inspect.getsource(module).encode()[:700], 256])
    return IndexedDataset(prefix, VOCABULARY.size)


@pytest.fixture(scope="module")
def samples(dataset):
    return TrainSamples(dataset, SEQ_LENGTH, SEED)


@pytest.fixture(scope="module")
def recurring(dataset):
    """Samples of one cut document of four windows: the ids of position i come again at i + 4."""
    return TrainSamples(dataset, SEQ_LENGTH, SEED, unique_tokens=4 * SEQ_LENGTH)


@dataclass(frozen=True)
class Stretch:
    """What a run feeds to its model from `first` on, gathered over its processes in the order of run positions."""

    first: int
    tokens: Tensor  # [N, S], N a multiple of the global batch size
    targets: Tensor  # [N, S]
    weights: Tensor  # [N, S]
    counts: list[int]  # of each step, over all processes


def feed(
    samples,
    variant="mdm",
    *,
    first=0,
    budget=BUDGET,
    micro_batch=GLOBAL_BATCH,
    size=1,
    workers=0,
    global_batch=GLOBAL_BATCH,
) -> Stretch:
    """Read a run to its end as `size` processes do, one after another."""
    name, settings = VARIANTS[variant]
    config = ObjectiveConfig(objective=name, **settings)
    objective = build_objective(config, VOCABULARY, time_block=GLOBAL_BATCH)
    noise = build_input_noise(config, VOCABULARY, num_layers=2)
    rows, counts = {}, []
    for rank in range(size):
        data = MicroBatches(samples, objective, noise, SEED, first, budget, micro_batch, global_batch, rank, size)
        counts = counts or [0] * data.steps
        for index, (batch,) in enumerate(loader(data, workers, torch.device("cpu"))):
            counts[index // data.per_step] += batch.count
            assert torch.equal(batch.rows, batch.weights.flatten().nonzero().flatten())
            for position, *row in zip(data.positions(index), batch.tokens, batch.targets, batch.weights):
                assert position not in rows, f"run position {position} came twice"
                rows[int(position)] = row
    assert sorted(rows) == list(range(first, first + len(counts) * global_batch)), "run positions were lost"
    return Stretch(first, *(torch.stack(part) for part in zip(*(rows[i] for i in sorted(rows)))), counts)


def check_same(one: Stretch, other: Stretch, budget: int = BUDGET) -> None:
    """Check that two stretches are equal to the bit where they overlap, and that padding counts for nothing."""
    start = max(one.first, other.first)
    assert start < budget
    for name in ("tokens", "targets", "weights"):
        left, right = (getattr(s, name)[start - s.first : budget - s.first] for s in (one, other))
        assert torch.equal(left, right), f"{name} differ"
    for stretch in (one, other):
        assert not stretch.weights[budget - stretch.first :].any(), "padding has weight"
        assert sum(stretch.counts) == (budget - stretch.first) * SEQ_LENGTH, "padding counts"


def check_new_noise_every_epoch(samples, variant: str) -> None:
    """Check that the same ids come again in the next epoch, and every sequence with other tokens hidden."""
    read = feed(samples, variant, budget=8, micro_batch=4)
    assert torch.equal(read.targets[:4], read.targets[4:])
    assert len({tuple(row.tolist()) for row in read.targets[:4]}) == 4
    hidden = read.tokens == VOCABULARY.mask_id
    for window in range(4):
        assert not torch.equal(hidden[window], hidden[window + 4]), f"window {window} is hidden alike in both epochs"


@pytest.mark.parametrize("variant", NOISY)
def test_a_sequence_gets_new_masks_in_every_epoch(recurring, variant):
    check_new_noise_every_epoch(recurring, variant)


@pytest.mark.parametrize("size, micro_batch", [(1, 8), (1, 2), (1, 1), (2, 4), (2, 1), (4, 2), (4, 1)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_processes_and_micro_batches_change_nothing(samples, variant, size, micro_batch):
    whole, cut = feed(samples, variant), feed(samples, variant, size=size, micro_batch=micro_batch)
    check_same(whole, cut)
    assert whole.counts == cut.counts == [8 * SEQ_LENGTH] * 3 + [5 * SEQ_LENGTH]


def test_a_micro_batch_of_all_processes_is_one_stretch_of_run_positions(samples):
    """Any stretch is nearly stratified, so what is computed at one time holds times of all sizes."""
    data = [MicroBatches(samples, None, None, SEED, 5, BUDGET, 2, GLOBAL_BATCH, rank, 2) for rank in (0, 1)]
    assert [rank.positions(1).tolist() for rank in data] == [[9, 10], [11, 12]]
    assert [rank.positions(2).tolist() for rank in data] == [[13, 14], [15, 16]]
    assert (data[0].per_step, data[0].steps) == (2, 3)


@pytest.mark.parametrize("workers, size", [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("variant", ["mdm", "ar-token-dropout"])
def test_workers_change_nothing(samples, variant, workers, size):
    check_same(feed(samples, variant), feed(samples, variant, micro_batch=2, size=size, workers=workers))


@pytest.mark.parametrize("first", [8, 13, 28])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resume_changes_nothing(samples, variant, first):
    check_same(feed(samples, variant), feed(samples, variant, first=first, size=2, micro_batch=2, workers=first == 13))


@pytest.mark.parametrize("variant", VARIANTS)
def test_another_global_batch_keeps_the_noise(samples, variant):
    """A branch may change the batch; the block of stratified times is kept from the first start."""
    check_same(feed(samples, variant), feed(samples, variant, global_batch=4, micro_batch=2))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_branch_from_a_short_last_batch_loses_and_repeats_nothing(samples, variant):
    longer = 45
    whole, branch = feed(samples, variant, budget=longer), feed(samples, variant, first=BUDGET, budget=longer)
    assert branch.counts == [8 * SEQ_LENGTH] * 2
    check_same(whole, branch, budget=longer)
    begun = feed(samples, variant)
    assert torch.equal(torch.cat([begun.tokens[:BUDGET], branch.tokens]), whole.tokens[:longer])


def test_positions_beyond_32_bits(samples):
    first = 2**40 + 3
    far = feed(samples, first=first, budget=first + 13, size=2, micro_batch=2)
    check_same(feed(samples, first=first, budget=first + 13), far, budget=first + 13)
    near = feed(samples, first=3, budget=16)  # 2**40 less: the same low words of the key
    assert not torch.equal(near.tokens == VOCABULARY.mask_id, far.tokens[:13] == VOCABULARY.mask_id)


def rekey(monkeypatch, key) -> None:
    """Plant a fault: noise is keyed by key(positions) in place of the run positions."""
    prepare, drop = MaskedDiffusion.prepare, TokenDropout.__call__
    monkeypatch.setattr(MaskedDiffusion, "prepare", lambda self, ids, at, seed: prepare(self, ids, key(at), seed))
    monkeypatch.setattr(TokenDropout, "__call__", lambda self, batch, at, seed: drop(self, batch, key(at), seed))


@pytest.mark.parametrize("variant", NOISY)
def test_a_mask_shared_by_ranks_is_found(samples, variant, monkeypatch):
    rekey(monkeypatch, lambda positions: np.arange(len(positions)))
    with pytest.raises(AssertionError, match="tokens differ"):
        check_same(feed(samples, variant), feed(samples, variant, size=2, micro_batch=4))


@pytest.mark.parametrize("variant", NOISY)
def test_noise_keyed_by_the_index_in_the_data_set_is_found(recurring, variant, monkeypatch):
    rekey(monkeypatch, lambda positions: positions % 4)
    with pytest.raises(AssertionError, match="hidden alike"):
        check_new_noise_every_epoch(recurring, variant)


def test_noise_keyed_by_the_place_since_the_resume_is_found(samples, monkeypatch):
    whole = feed(samples)
    rekey(monkeypatch, lambda positions: positions - 8)
    with pytest.raises(AssertionError, match="tokens differ"):
        check_same(whole, feed(samples, first=8))


def test_padding_with_weight_is_found(samples, monkeypatch):
    monkeypatch.setattr("megatron.training.feed.without_padding", lambda batch, real: batch)
    with pytest.raises(AssertionError, match="padding"):
        check_same(feed(samples), feed(samples))
