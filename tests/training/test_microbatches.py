"""Noise is a function of the sample index: new in every epoch, equal after a resume and for any micro-batch size."""

import bisect
import fnmatch
import heapq
import inspect
import os
import resource
import signal
import time
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from itertools import chain, islice
from multiprocessing import active_children

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data._utils import signal_handling

from megatron import stop_signals
from megatron.batch import Batch
from megatron.config.sections import ObjectiveConfig
from megatron.config.vocabulary import Vocabulary
from megatron.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron.data.samples import TrainSamples
from megatron.errors import ConfigurationError
from megatron.objectives.input_noise import build_input_noise
from megatron.objectives.masked_diffusion import MaskedDiffusion
from megatron.objectives.registry import build_objective
from megatron.objectives.token_dropout import TokenDropout
from megatron.training import microbatches
from megatron.training.microbatches import Loader, MicroBatches, _Message

VOCABULARY, SEQ_LENGTH, SEED = Vocabulary(257), 32, 1234
GLOBAL_BATCH, BUDGET = 8, 29  # four steps, the last one of 5 samples
VARIANTS = {
    "ar": ("ar", {}),
    "ar-token-dropout": ("ar", {"token_dropout_max": 0.8}),
    "mdm": ("mdm", {}),
    "mdm-iid": ("mdm", {"mask_times": "iid"}),
    "mdm-bell": ("mdm", {"mask_time_distribution": "bell", "mdm_loss": "simple"}),
}
NOISY = [name for name in VARIANTS if name != "ar"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A few modules of the standard library: one document per module, one token per byte."""
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
    """Samples of a truncated document of four windows: the ids of sample i occur again at i + 4."""
    return TrainSamples(dataset, SEQ_LENGTH, SEED, unique_tokens=4 * SEQ_LENGTH)


@dataclass(frozen=True)
class Stretch:
    """The model inputs of a run from sample index `first` on, gathered over ranks and ordered by sample index."""

    first: int
    tokens: Tensor  # [N, S], N a multiple of the global batch size
    targets: Tensor  # [N, S]
    weights: Tensor  # [N, S]
    counts: list[int]  # of each step, over all ranks


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
    """Read a run to its end like `size` data-parallel ranks, one after another."""
    name, settings = VARIANTS[variant]
    config = ObjectiveConfig(objective=name, **settings)
    objective = build_objective(config, VOCABULARY, time_block=GLOBAL_BATCH)
    noise = build_input_noise(config, VOCABULARY, num_layers=2)
    samples_by_index, counts = {}, []
    for rank in range(size):
        data = MicroBatches(
            samples,
            objective,
            noise,
            seed=SEED,
            first_sample=first,
            train_samples=budget,
            micro_batch_size=micro_batch,
            global_batch_size=global_batch,
            rank=rank,
            size=size,
        )
        counts = counts or [0] * data.steps
        with Loader(data, workers, torch.device("cpu")) as batches:
            for index, (batch,) in enumerate(batches):
                counts[index // data.per_step] += batch.count
                assert torch.equal(batch.scored_positions, batch.weights.flatten().nonzero().flatten())
                indices = data.sample_indices(index)
                for sample_index, *sample in zip(indices, batch.tokens, batch.targets, batch.weights):
                    assert sample_index not in samples_by_index, f"sample index {sample_index} occurs twice"
                    samples_by_index[int(sample_index)] = sample
    indices = sorted(samples_by_index)
    assert indices == list(range(first, first + len(counts) * global_batch)), "sample indices are missing"
    tensors = (torch.stack(tensors) for tensors in zip(*(samples_by_index[i] for i in indices)))
    return Stretch(first, *tensors, counts)


def check_same(expected: Stretch, actual: Stretch, budget: int = BUDGET) -> None:
    """Check that two stretches are bitwise equal where they overlap, and that padding has no weight and no count."""
    start = max(expected.first, actual.first)
    assert start < budget
    for name in ("tokens", "targets", "weights"):
        left, right = (getattr(s, name)[start - s.first : budget - s.first] for s in (expected, actual))
        assert torch.equal(left, right), f"{name} differ"
    for stretch in (expected, actual):
        assert not stretch.weights[budget - stretch.first :].any(), "padding has weight"
        assert sum(stretch.counts) == (budget - stretch.first) * SEQ_LENGTH, "padding counts"


def check_new_noise_every_epoch(samples, variant: str) -> None:
    """Check that the same ids occur again in the next epoch, every sequence with other masked tokens."""
    read = feed(samples, variant, budget=8, micro_batch=4)
    assert torch.equal(read.targets[:4], read.targets[4:])
    assert len({tuple(row.tolist()) for row in read.targets[:4]}) == 4
    masked = read.tokens == VOCABULARY.mask_id
    for window in range(4):
        assert not torch.equal(masked[window], masked[window + 4]), f"window {window} has the same mask in both epochs"


@pytest.mark.parametrize("variant", NOISY)
def test_a_sequence_gets_new_masks_in_every_epoch(recurring, variant):
    check_new_noise_every_epoch(recurring, variant)


@pytest.mark.parametrize("size, micro_batch", [(1, 8), (1, 2), (1, 1), (2, 4), (2, 1), (4, 2), (4, 1)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_processes_and_micro_batches_change_nothing(samples, variant, size, micro_batch):
    whole, cut = feed(samples, variant), feed(samples, variant, size=size, micro_batch=micro_batch)
    check_same(whole, cut)
    assert whole.counts == cut.counts == [8 * SEQ_LENGTH] * 3 + [5 * SEQ_LENGTH]


def test_a_micro_batch_of_all_ranks_is_one_stretch_of_sample_indices(samples):
    """Times of consecutive samples are nearly stratified, so every global micro-batch covers all of [0, 1)."""
    sizes = {"micro_batch_size": 2, "global_batch_size": GLOBAL_BATCH, "size": 2}
    data = [
        MicroBatches(samples, None, None, seed=SEED, first_sample=5, train_samples=BUDGET, rank=rank, **sizes)
        for rank in (0, 1)
    ]
    assert [rank.sample_indices(1).tolist() for rank in data] == [[9, 10], [11, 12]]
    assert [rank.sample_indices(2).tolist() for rank in data] == [[13, 14], [15, 16]]
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
    """A branch may change the batch size; the block of stratified times stays that of the first start."""
    check_same(feed(samples, variant), feed(samples, variant, global_batch=4, micro_batch=2))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_branch_from_a_short_last_batch_loses_and_repeats_nothing(samples, variant):
    longer = 45
    whole, branch = feed(samples, variant, budget=longer), feed(samples, variant, first=BUDGET, budget=longer)
    assert branch.counts == [8 * SEQ_LENGTH] * 2
    check_same(whole, branch, budget=longer)
    trunk = feed(samples, variant)
    assert torch.equal(torch.cat([trunk.tokens[:BUDGET], branch.tokens]), whole.tokens[:longer])


def test_positions_beyond_32_bits(samples):
    first = 2**40 + 3
    far = feed(samples, first=first, budget=first + 13, size=2, micro_batch=2)
    check_same(feed(samples, first=first, budget=first + 13), far, budget=first + 13)
    near = feed(samples, first=3, budget=16)  # 2**40 lower: the same low words of the key
    assert not torch.equal(near.tokens == VOCABULARY.mask_id, far.tokens[:13] == VOCABULARY.mask_id)


def rekey(monkeypatch, key) -> None:
    """Plant a fault: noise is keyed by key(indices) in place of the sample indices."""
    prepare, drop = MaskedDiffusion.prepare, TokenDropout.__call__
    monkeypatch.setattr(
        MaskedDiffusion, "prepare", lambda self, ids, indices, seed: prepare(self, ids, key(indices), seed)
    )
    monkeypatch.setattr(
        TokenDropout, "__call__", lambda self, batch, indices, seed: drop(self, batch, key(indices), seed)
    )


@pytest.mark.parametrize("variant", NOISY)
def test_a_mask_shared_by_ranks_is_found(samples, variant, monkeypatch):
    rekey(monkeypatch, lambda indices: np.arange(len(indices)))
    with pytest.raises(AssertionError, match="tokens differ"):
        check_same(feed(samples, variant), feed(samples, variant, size=2, micro_batch=4))


@pytest.mark.parametrize("variant", NOISY)
def test_noise_keyed_by_the_index_in_the_data_set_is_found(recurring, variant, monkeypatch):
    rekey(monkeypatch, lambda indices: indices % 4)
    with pytest.raises(AssertionError, match="the same mask"):
        check_new_noise_every_epoch(recurring, variant)


def test_noise_keyed_by_the_index_since_the_resume_is_found(samples, monkeypatch):
    whole = feed(samples)
    rekey(monkeypatch, lambda indices: indices - 8)
    with pytest.raises(AssertionError, match="tokens differ"):
        check_same(whole, feed(samples, first=8))


def test_padding_with_weight_is_found(samples, monkeypatch):
    monkeypatch.setattr("megatron.training.microbatches.without_padding", lambda batch, real: batch)
    with pytest.raises(AssertionError, match="padding"):
        check_same(feed(samples), feed(samples))


# ------------------------------------------------------------------------------------ workers that fail


class Failing:
    """Samples that cannot be read from index 40 on: there `fault` is raised or called."""

    def __init__(self, fault=None):
        self.fault = fault

    def __getitem__(self, index: int) -> np.ndarray:
        if index >= 40 and callable(self.fault):
            self.fault()
        elif index >= 40 and self.fault:
            raise self.fault
        return np.arange(SEQ_LENGTH + 1)


def open_loader(samples, workers: int) -> Loader:
    config = ObjectiveConfig()
    objective = build_objective(config, VOCABULARY, time_block=8)
    noise = build_input_noise(config, VOCABULARY, num_layers=2)
    sizes = {"micro_batch_size": 4, "global_batch_size": 8, "rank": 0, "size": 1}
    data = MicroBatches(samples, objective, noise, seed=SEED, first_sample=0, train_samples=10**6, **sizes)
    return Loader(data, workers, torch.device("cpu"))


@contextmanager
def limit(name: int, value: int):
    before = resource.getrlimit(name)
    resource.setrlimit(name, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(name, before)


def read_to_the_fault(samples, workers: int) -> tuple[Exception, float]:
    """Return the error that ends reading, and after how many seconds; no worker may be left."""
    children, start = set(active_children()), time.monotonic()
    with pytest.raises(Exception) as caught, open_loader(samples, workers) as batches:
        for _ in batches:
            pass
    assert set(active_children()) == children
    return caught.value, time.monotonic() - start


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS, signal.SIGSEGV])
def test_a_worker_that_is_killed_ends_the_reading_with_its_signal(number):
    error, seconds = read_to_the_fault(Failing(lambda: os.kill(os.getpid(), number)), 2)
    assert isinstance(error, ChildProcessError) and seconds < 10
    assert f" was killed by {number.name}: " in str(error) and "lower --num-workers 2 and start" in str(error)
    assert "\n" not in str(error) and ("/dev/shm" in str(error)) == (number == signal.SIGBUS)


def test_a_worker_that_ends_by_itself_is_named_with_its_code():
    error, _ = read_to_the_fault(Failing(lambda: os._exit(3)), 1)
    assert isinstance(error, ChildProcessError) and " exited with code 3: lower --num-workers 1 " in str(error)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_the_micro_batches_before_an_error_are_returned(workers):
    count, refused = 0, pytest.raises(OSError, match="Input/output error")
    with refused, open_loader(Failing(OSError(5, "Input/output error")), workers) as loader:
        for _ in loader:
            count += 1
    assert count == 10  # of 4 samples, up to index 39


def test_a_message_holds_as_many_micro_batches_as_its_bytes_allow(monkeypatch):
    with open_loader(Failing(), 0) as loader:
        size = _Message.pack([next(loader)]).block.numel()
    monkeypatch.setattr(microbatches, "MESSAGE_BYTES", 12 * size - 1)
    counts = []
    with open_loader(Failing(), 2) as loader:
        for _ in range(20):
            loader._receive()
            counts.append(len(loader._received))
            loader._received.clear()
    assert counts == [1] * 9 + [11] * 11  # nine are requested before the first arrives


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fault", [ConfigurationError("a.bin: holds the token id 7"), OSError(5, "Input/output error")])
def test_errors_are_the_same_with_and_without_workers(fault, workers):
    error, _ = read_to_the_fault(Failing(fault), workers)
    assert type(error) is type(fault) and str(error) == str(fault)


def test_too_little_shared_memory_is_named():
    class Long:
        def __getitem__(self, index):
            return np.zeros(20_000, dtype=np.int64)

    with limit(resource.RLIMIT_FSIZE, 100_000):  # also limits files in /dev/shm
        error, seconds = read_to_the_fault(Long(), 2)
    assert isinstance(error, OSError) and seconds < 10 and "\n" not in str(error)
    assert "--num-workers 2: a batch could not be copied to shared memory" in str(error) and "/dev/shm" in str(error)


def test_too_few_open_files_are_named(monkeypatch):
    monkeypatch.setattr(microbatches, "MESSAGE_BYTES", 1)  # a file for each micro-batch
    opened = len(os.listdir("/proc/self/fd"))
    refused = pytest.raises(OSError, match="raise ulimit -n, or lower it")
    with limit(resource.RLIMIT_NOFILE, opened + 60), refused, open_loader(Failing(), 2) as batches:
        list(islice(batches, 100))  # batches that are referenced keep their files open


def patch_fork(monkeypatch, before=lambda forked: None, in_worker=lambda: None) -> None:
    """Call `before` with the process ids of the workers so far before a fork, and `in_worker` first in every worker."""
    forked, fork = [], os.fork

    def patched():
        before(forked)
        forked.append(fork())
        if forked[-1] == 0:
            in_worker()
        return forked[-1]

    monkeypatch.setattr(os, "fork", patched)


def kill_and_wait(pid: int) -> None:
    """Kill a process and wait for its end, but leave its exit code to multiprocessing."""
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


@pytest.mark.parametrize(
    "fault, expected",
    [
        (BlockingIOError(11, "Resource temporarily unavailable"), ChildProcessError),
        (RuntimeError("can't start new thread\n..."), ChildProcessError),
        (KeyboardInterrupt("can't"), KeyboardInterrupt),
    ],
)
def test_workers_that_cannot_start_leave_none_behind(monkeypatch, fault, expected):
    def third_fails(forked):
        if len(forked) == 2:
            raise fault

    children = set(active_children())
    patch_fork(monkeypatch, before=third_fails)
    with pytest.raises(expected) as caught:
        open_loader(Failing(), 4)
    assert set(active_children()) == children
    if expected is ChildProcessError:
        reason = getattr(fault, "strerror", None) or "can't start new thread"
        assert str(caught.value) == f"--num-workers 4: a data loader worker cannot start ({reason}); lower it"


def test_a_worker_that_dies_while_others_start_is_named(monkeypatch):
    """multiprocessing forgets such a worker when it starts the next one."""
    patch_fork(monkeypatch, before=lambda forked: kill_and_wait(forked[0]) if len(forked) == 1 else None)
    error, seconds = read_to_the_fault(Failing(), 2)
    assert isinstance(error, ChildProcessError) and " was killed by SIGKILL: " in str(error) and seconds < 10


def test_a_worker_that_dies_after_torch_sets_its_handler_is_named(monkeypatch):
    """torch's handler of SIGCHLD would raise in the constructor, which has no __exit__ to end the other workers."""
    before, set_handler = signal.getsignal(signal.SIGCHLD), signal_handling._set_SIGCHLD_handler
    forked = []

    def set_handler_and_kill():
        set_handler()
        kill_and_wait(forked[0])

    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)  # as in a new process
    monkeypatch.setattr(signal_handling, "_set_SIGCHLD_handler", set_handler_and_kill)
    patch_fork(monkeypatch, before=lambda pids: forked.extend(pids[:1]))
    error, seconds = read_to_the_fault(Failing(), 2)
    assert isinstance(error, ChildProcessError) and " was killed by SIGKILL: " in str(error) and seconds < 10
    assert signal.getsignal(signal.SIGCHLD) == before


def test_stop_signals_while_workers_start_reach_only_the_training_process(monkeypatch):
    def stop_worker():
        for number in stop_signals.SIGNALS:
            os.kill(os.getpid(), number)

    received = []
    handler = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    patch_fork(monkeypatch, before=lambda forked: os.kill(os.getpid(), signal.SIGTERM), in_worker=stop_worker)
    try:
        with open_loader(Failing(), 2) as batches:
            assert signal.SIGTERM in received
            assert len(list(islice(batches, 20))) == 20
    finally:
        signal.signal(signal.SIGTERM, handler)


@pytest.mark.parametrize("raised", [None, OSError("the disk is full")])
def test_no_worker_outlives_the_loop_though_it_blocks_signals(raised):
    children = set(active_children())
    try:
        with open_loader(Failing(), 2) as batches:
            list(islice(batches, 4))  # of both workers
            workers = set(active_children()) - children
            for worker in workers:
                for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                    os.kill(worker.pid, number)
            list(islice(batches, 20))
            assert len(workers) == 2 and all(worker.is_alive() for worker in workers)
            if raised:
                raise raised
    except OSError as error:
        assert error is raised
    assert set(active_children()) == children


def test_a_packed_micro_batch_is_the_same_to_the_bit():
    """Every field and both passes, whatever their element sizes."""
    torch.manual_seed(0)
    tokens, blocked = torch.randint(257, (3, 5)), torch.rand(1, 5, 5) < 0.5
    weights = torch.rand(3, 5) * (torch.rand(3, 5) < 0.5)
    first = Batch(tokens, tokens + 1, weights, np.array([1.0, 2.0, 0.5]), causal=True, blocked=blocked)
    second = replace(first, causal=False, documents=tokens // 7, residual_scales=torch.rand(3, 2), blocked=None)
    empty = Batch.unscored(tokens, causal=True)
    restored = _Message.pack([[first, second], [empty]]).micro_batches()
    assert [len(batches) for batches in restored] == [2, 1]
    for batch, other in zip((first, second, empty), chain(*restored), strict=True):
        for field in fields(Batch):
            value, packed = getattr(batch, field.name), getattr(other, field.name)
            assert type(value) is type(packed)
            if torch.is_tensor(value):
                assert value.dtype == packed.dtype and torch.equal(value, packed)
            else:
                assert np.array_equal(value, packed)
