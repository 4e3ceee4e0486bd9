"""Asynchronous checkpoints contain the state at the call of `save`, and are complete or absent."""

import itertools
import json
import signal
import subprocess
import threading
import zlib

import pytest
import torch
from safetensors import safe_open
from torch.distributed.tensor import Shard, distribute_tensor

from megatron.config.vocabulary import Vocabulary
from megatron.model.transformer import Transformer
from megatron.training import saver
from megatron.training.checkpoint_store import CheckpointStore, damage, load_checkpoint
from megatron.training.command_line import parse
from megatron.training.saver import BLOCK, Saver, folder_name, pack, write_safetensors
from tests.conftest import records, run, run_python
from tests.distributed import joined, spawn


def values(seed: int) -> dict[str, torch.Tensor]:
    """Tensors [N, 5] with N even, odd and 1."""
    generator = torch.Generator().manual_seed(seed)
    return {f"rows.{count}": torch.randn(count, 5, generator=generator) for count in (4, 3, 1)}


def sharded(ranks, whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: distribute_tensor(tensor.clone(), ranks.mesh["shard"], [Shard(0)]) for name, tensor in whole.items()}


def meta(iteration: int) -> dict:
    return {"iteration": iteration, "permanent": False}


def nothing() -> None:
    pass


# ---------------------------------------------------------------------------------------- two ranks


def save_and_train_on(ranks, root):
    """Save twice, change all tensors right after each call, and return what is loaded from each checkpoint."""
    state = sharded(ranks, values(0))
    if ranks.rank == 1:
        state["only of the second"] = torch.full((2, 3), 7.0)  # like the layers of a pipeline stage
    with Saver(root, ranks) as saving:
        saving.reserve(state)
        for iteration in (1, 2):
            saving.save(state, meta(iteration), nothing)
            for tensor in state.values():
                tensor.add_(1)  # the next step, while the thread writes
    loaded_states = []
    for iteration in (1, 2):
        loaded = sharded(ranks, {name: torch.zeros_like(tensor) for name, tensor in values(0).items()})
        loaded["only of the second"] = torch.zeros(2, 3)
        load_checkpoint(root / folder_name(iteration), loaded)
        whole = {name: loaded[name].full_tensor().tolist() for name in values(0)}
        loaded_states.append(whole | {"only of the second": loaded["only of the second"].tolist()})
    return loaded_states


def fail_once(ranks, root):
    """Simulate a full disk on rank 1 at the second save; return error messages, remaining files and completed saves."""
    state, messages, completed = sharded(ranks, values(0)), [], []
    write = saver.write_safetensors

    def full(path, tensors, offsets):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with Saver(root, ranks) as saving:
        saving.save(state, meta(1), lambda: completed.append(1))
        saving.wait()
        saver.write_safetensors = full if ranks.rank == 1 else write
        saving.save(state, meta(2), lambda: completed.append(2))
        try:
            saving.save(state, meta(3), lambda: completed.append(3))
        except OSError as error:
            messages.append(str(error))
        remaining = sorted(path.name for path in root.iterdir())
        saver.write_safetensors = write
        torch.distributed.barrier()  # both ranks have listed the folder
        saving.save(state, meta(4), lambda: completed.append(4))
    return messages, remaining, completed


def cases(ranks, folder):
    return save_and_train_on(ranks, folder / "equal"), fail_once(ranks, folder / "full")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return folder, spawn(cases, 2, folder)


def test_steps_after_the_call_are_not_in_the_checkpoint(two_ranks):
    for loaded_states, _ in two_ranks[1]:
        for number, loaded in enumerate(loaded_states):
            assert torch.equal(torch.tensor(loaded.pop("only of the second")), torch.full((2, 3), 7.0 + number))
            assert loaded == {name: (tensor + number).tolist() for name, tensor in values(0).items()}


def test_every_file_is_listed_with_its_size_and_checksum(two_ranks):
    for folder in CheckpointStore(two_ranks[0] / "equal").complete():
        listed = json.loads((folder / "meta.json").read_text())["files"]
        assert set(listed) == {path.name for path in folder.glob("*.safetensors")} and len(listed) == 2
        for name, (size, checksum) in listed.items():
            data = (folder / name).read_bytes()
            assert (size, checksum) == (len(data), zlib.crc32(data))


def test_a_full_disk_on_one_rank_is_raised_on_both_at_the_next_save(two_ranks):
    for rank, (_, (messages, remaining, completed)) in enumerate(two_ranks[1]):
        (line,) = messages
        assert "iter_0000002" in line and "No space left on device" in line and "older checkpoints" in line
        assert remaining == ["iter_0000001"]
        assert completed == ([1, 4] if rank == 0 else [])  # the third was never started
    names = [path.name for path in CheckpointStore(two_ranks[0] / "full").complete()]
    assert names == ["iter_0000001", "iter_0000004"]
    assert all(damage(two_ranks[0] / "full" / name) is None for name in names)


# ----------------------------------------------------------------------------------------- one rank


@pytest.fixture
def slow(monkeypatch):
    """A writer that waits to be released; each call appends "begin" and "end" to a list."""
    released, log = threading.Event(), []

    def write(path, tensors, offsets):
        log.append("begin")
        assert released.wait(60)
        log.append("end")
        return write_safetensors(path, tensors, offsets)

    monkeypatch.setattr(saver, "write_safetensors", write)
    return released, log


def test_a_save_returns_while_its_file_is_being_written_and_the_next_one_waits(slow, tmp_path):
    released, log = slow
    completed = []
    with joined() as ranks, Saver(tmp_path, ranks) as saving:
        state = values(0)
        saving.save(state, meta(1), lambda: completed.append(1))
        assert "end" not in log and not CheckpointStore(tmp_path).complete() and not completed
        threading.Timer(0.3, released.set).start()
        saving.save(state, meta(2), lambda: completed.append(2))
        assert completed[0] == 1 and next(path.name for path in CheckpointStore(tmp_path).complete()) == "iter_0000001"
    assert log == ["begin", "end"] * 2 and completed == [1, 2]


def test_memory_is_reused(tmp_path):
    with joined() as ranks, Saver(tmp_path, ranks) as saving:
        state = sharded(ranks, values(0))
        saving.reserve(state)
        saving.wait()
        reserved = {name: tensor.to_local().data_ptr() for name, tensor in saving._copies.items()}
        saving.save(state, meta(1), nothing)
        saving.save(state, meta(2), nothing)
        assert reserved == {name: tensor.to_local().data_ptr() for name, tensor in saving._copies.items()}


def test_what_killed_starts_left_at_other_steps_is_removed(tmp_path):
    for name in ("iter_0000003.partial", "iter_0000007.partial", "iter_0000002"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shard.safetensors").write_bytes(b"half")
    with joined() as ranks, Saver(tmp_path, ranks) as saving:
        saving.save(sharded(ranks, values(0)), meta(5), nothing)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000002", "iter_0000005"]


LIMITS = {"140M": 1.02, "425M": 1.02, "1018M": 1.02, "2283M": 1.02}  # model size: slabs as a multiple of the state


@pytest.mark.parametrize("model_size, limit", LIMITS.items())
def test_slabs_take_little_more_than_the_state(model_size, limit):
    """Pinned tensors of their own would take 1.3 to 1.7 times the state: each is rounded up to a power of two."""
    config = parse("ar", ["--model-size", model_size]).model
    with torch.device("meta"):
        sizes = [parameter.nbytes for parameter in Transformer(config, Vocabulary(50_258)).parameters()] * 3
    slab_sizes, places = pack(sizes)
    assert all(size.bit_count() == 1 for size in slab_sizes) and sum(slab_sizes) <= limit * sum(sizes)
    assert sum(1 << (size - 1).bit_length() for size in sizes) > 1.3 * sum(sizes)
    for slab, slab_size in enumerate(slab_sizes):
        ranges = sorted((start, start + size) for (at, start), size in zip(places, sizes, strict=True) if at == slab)
        assert ranges[-1][1] <= slab_size
        assert all(end <= start and start % 64 == 0 for (_, end), (start, _) in itertools.pairwise(ranges))


def test_copies_share_slabs(tmp_path):
    state = {f"{index}": torch.full((index % 7, 30), float(index)) for index in range(50)}
    state |= {"half": torch.ones(5, dtype=torch.bfloat16), "scalar": torch.tensor(3), "none": torch.zeros(0, 4)}
    with joined() as ranks, Saver(tmp_path, ranks) as saving:
        saving.save(state, meta(1), nothing)
        slabs = {copy.untyped_storage().data_ptr(): copy.untyped_storage().nbytes() for copy in saving._copies.values()}
    assert len(slabs) < 10 and all(size.bit_count() == 1 for size in slabs.values())
    loaded = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    load_checkpoint(tmp_path / folder_name(1), loaded)
    for name, tensor in state.items():
        assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize("ended_by", [None, KeyError("the run")])
def test_a_failed_write_is_reported_on_exit(ended_by, tmp_path, monkeypatch, caplog):
    def full(path, tensors, offsets):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saver, "write_safetensors", full)
    expected_error = pytest.raises(KeyError if ended_by else OSError)
    with joined() as ranks, expected_error as caught, Saver(tmp_path, ranks) as saving:
        saving.save(values(0), meta(1), nothing)
        if ended_by:
            raise ended_by
    text = caplog.text if ended_by else str(caught.value)
    assert "iter_0000001: could not be written ([Errno 28] No space left on device)" in text
    assert not any(tmp_path.iterdir())


def test_a_file_is_what_safetensors_reads(tmp_path):
    tensors = {
        "matrix": torch.randn(3, 5),
        "half": torch.randn(7).bfloat16(),
        "scalar": torch.tensor(2.0),
        "none": torch.zeros(0, 4),
        "large": torch.arange(BLOCK // 4 + 1).float(),
        "transposed": torch.randn(2, 3).T,
    }
    path = tmp_path / "a.safetensors"
    size, checksum = write_safetensors(path, tensors, {name: [0] * tensor.dim() for name, tensor in tensors.items()})
    assert (size, checksum) == (path.stat().st_size, zlib.crc32(path.read_bytes()))
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            loaded = file.get_tensor(name)
            assert loaded.dtype == tensor.dtype and torch.equal(loaded, tensor)


# ------------------------------------------------------------------------------------------ the run

BEFORE = """
import os, signal, sys, time
from pathlib import Path
from megatron.training import saver
from megatron.training.launcher import main

folder, write = Path(sys.argv[1]), saver.write_safetensors

def recorded(step):
    return f'"iteration": {step},' in (folder / "metrics.jsonl").read_text()
"""
SLOW = (
    BEFORE
    + """
def slow(path, tensors, offsets):
    if "iter_0000004" in str(path):
        end = time.monotonic() + 60
        while not recorded(7):
            assert time.monotonic() < end, "the run waits for its checkpoint"
            time.sleep(0.01)
        assert not (folder / "checkpoints" / "latest.json").exists()
    return write(path, tensors, offsets)

saver.write_safetensors = slow
main("ar", sys.argv[2:])
"""
)
KILLED = (
    BEFORE
    + """
def killed(path, tensors, offsets):
    written = write(path, tensors, offsets)
    if "iter_0000008" in str(path):
        while not recorded(10):
            time.sleep(0.01)
        os.truncate(path, written[0] // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    return written

saver.write_safetensors = killed
main("ar", sys.argv[2:])
"""
)


def run_with(planted: str, folder, flags) -> subprocess.CompletedProcess:
    return run_python("-c", planted, folder, *flags, "--save", folder, timeout=120)


def test_training_continues_while_a_checkpoint_is_written(tiny, tmp_path):
    """The checkpoint of step 4 is not written before the run has recorded step 7."""
    done = run_with(SLOW, tmp_path, tiny)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [record["iteration"] for record in records(tmp_path, "train")] == [*range(1, 13)]
    assert json.loads((tmp_path / "checkpoints" / "latest.json").read_text())["iteration"] == 12
    assert [path.name[5:] for path in CheckpointStore(tmp_path / "checkpoints").complete()] == ["0000008", "0000012"]


def test_a_run_killed_while_its_checkpoint_is_written_resumes_from_the_one_before(tiny, tmp_path):
    """When the run is killed, step 8 is half written and step 10 recorded."""
    assert run_with(KILLED, tmp_path / "killed", tiny).returncode == -signal.SIGKILL
    root = tmp_path / "killed" / "checkpoints"
    assert sorted(path.name for path in root.glob("iter_*")) == ["iter_0000004", "iter_0000008.partial"]
    assert json.loads((root / "latest.json").read_text())["iteration"] == 4
    assert "iter_0000004 at step 4" in run("ar", *tiny, "--save", tmp_path / "killed").stderr
    assert sorted(path.name for path in root.glob("iter_*")) == ["iter_0000008", "iter_0000012"]
    run("ar", *tiny, "--save", tmp_path / "whole")
    assert records(tmp_path / "killed") == records(tmp_path / "whole")
