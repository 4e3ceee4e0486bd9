"""What is saved beside training is what was there when it was asked for, complete or not there at all."""

import json
import signal
import subprocess
import sys
import threading
import zlib

import pytest
import torch
from safetensors import safe_open
from torch.distributed.tensor import Shard, distribute_tensor

from megatron.training import checkpoint, saver
from megatron.training.saver import Saver, write_safetensors
from tests.conftest import ROOT, environment, records, run
from tests.distributed import joined, spawn


def values(seed: int) -> dict[str, torch.Tensor]:
    """Rows that divide by two, that do not, and a single one."""
    generator = torch.Generator().manual_seed(seed)
    return {f"rows.{rows}": torch.randn(rows, 5, generator=generator) for rows in (4, 3, 1)}


def sharded(ranks, whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: distribute_tensor(tensor.clone(), ranks.mesh["shard"], [Shard(0)]) for name, tensor in whole.items()}


def meta(iteration: int) -> dict:
    return {"iteration": iteration, "permanent": False}


def nothing() -> None:
    pass


# ------------------------------------------------------------------------------------ two processes


def save_and_train_on(ranks, root):
    """Save twice, change everything right after each call, and return what a load of each finds."""
    state = sharded(ranks, values(0))
    if ranks.rank == 1:
        state["only of the second"] = torch.full((2, 3), 7.0)  # as a stage of a pipeline holds its own layers
    with Saver(root, ranks) as saving:
        saving.reserve(state)
        for iteration in (1, 2):
            saving.save(state, meta(iteration), nothing)
            for tensor in state.values():
                tensor.add_(1)  # the next step, while the thread writes
    found = []
    for iteration in (1, 2):
        loaded = sharded(ranks, {name: torch.zeros_like(tensor) for name, tensor in values(0).items()})
        loaded["only of the second"] = torch.zeros(2, 3)
        checkpoint.load(root / checkpoint.folder_name(iteration), loaded)
        whole = {name: loaded[name].full_tensor().tolist() for name in values(0)}
        found.append(whole | {"only of the second": loaded["only of the second"].tolist()})
    return found


def fail_once(ranks, root):
    """Let the second process meet a full disk at the second save; return what is told where, and what is left."""
    state, told, completed = sharded(ranks, values(0)), [], []
    write = saver.write_safetensors

    def full(path, tensors, begins):
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
            told.append(str(error))
        left = sorted(path.name for path in root.iterdir())
        saver.write_safetensors = write
        torch.distributed.barrier()  # both have looked
        saving.save(state, meta(4), lambda: completed.append(4))
    return told, left, completed


def cases(ranks, folder):
    return save_and_train_on(ranks, folder / "equal"), fail_once(ranks, folder / "full")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return folder, spawn(cases, 2, folder)


def test_steps_after_the_call_are_not_in_the_checkpoint(two):
    for found, _ in two[1]:
        for number, loaded in enumerate(found):
            assert torch.equal(torch.tensor(loaded.pop("only of the second")), torch.full((2, 3), 7.0 + number))
            assert loaded == {name: (tensor + number).tolist() for name, tensor in values(0).items()}


def test_every_file_is_listed_with_its_size_and_checksum(two):
    for folder in checkpoint.complete(two[0] / "equal"):
        listed = json.loads((folder / "meta.json").read_text())["files"]
        assert set(listed) == {path.name for path in folder.glob("*.safetensors")} and len(listed) == 2
        for name, (size, checksum) in listed.items():
            data = (folder / name).read_bytes()
            assert (size, checksum) == (len(data), zlib.crc32(data))


def test_a_full_disk_of_one_process_is_told_to_both_at_the_next_save(two):
    for rank, (_, (told, left, completed)) in enumerate(two[1]):
        (line,) = told
        assert "iter_0000002" in line and "No space left on device" in line and "older checkpoints" in line
        assert left == ["iter_0000001"]
        assert completed == ([1, 4] if rank == 0 else [])  # the third was never begun
    names = [path.name for path in checkpoint.complete(two[0] / "full")]
    assert names == ["iter_0000001", "iter_0000004"]
    assert all(checkpoint.damage(two[0] / "full" / name) is None for name in names)


# -------------------------------------------------------------------------------------- one process


@pytest.fixture
def slow(monkeypatch):
    """A writer that waits to be released; each call begins a list entry and ends one."""
    released, log = threading.Event(), []

    def write(path, tensors, begins):
        log.append("begin")
        assert released.wait(60)
        log.append("end")
        return write_safetensors(path, tensors, begins)

    monkeypatch.setattr(saver, "write_safetensors", write)
    return released, log


def test_a_save_returns_while_its_file_is_being_written_and_the_next_one_waits(slow, tmp_path):
    released, log = slow
    completed = []
    with joined() as ranks, Saver(tmp_path, ranks) as saving:
        state = values(0)
        saving.save(state, meta(1), lambda: completed.append(1))
        assert "end" not in log and not checkpoint.complete(tmp_path) and not completed
        threading.Timer(0.3, released.set).start()
        saving.save(state, meta(2), lambda: completed.append(2))
        assert completed[0] == 1 and [path.name for path in checkpoint.complete(tmp_path)][0] == "iter_0000001"
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


@pytest.mark.parametrize("ended_by", [None, KeyError("the run")])
def test_what_cannot_be_written_is_told_on_leaving(ended_by, tmp_path, monkeypatch, caplog):
    def full(path, tensors, begins):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saver, "write_safetensors", full)
    with joined() as ranks:
        with pytest.raises(KeyError if ended_by else OSError) as caught:
            with Saver(tmp_path, ranks) as saving:
                saving.save(values(0), meta(1), nothing)
                if ended_by:
                    raise ended_by
    said = caplog.text if ended_by else str(caught.value)
    assert "iter_0000001: could not be written ([Errno 28] No space left on device)" in said
    assert not any(tmp_path.iterdir())


def test_a_file_is_what_safetensors_reads(tmp_path):
    tensors = {
        "matrix": torch.randn(3, 5),
        "half": torch.randn(7).bfloat16(),
        "scalar": torch.tensor(2.0),
        "none": torch.zeros(0, 4),
        "large": torch.arange(checkpoint.BLOCK // 4 + 1).float(),
        "transposed": torch.randn(2, 3).T,
    }
    path = tmp_path / "a.safetensors"
    size, checksum = write_safetensors(path, tensors, {name: [0] * tensor.dim() for name, tensor in tensors.items()})
    assert (size, checksum) == (path.stat().st_size, zlib.crc32(path.read_bytes()))
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            found = file.get_tensor(name)
            assert found.dtype == tensor.dtype and torch.equal(found, tensor)


# ------------------------------------------------------------------------------------------ the run

BEFORE = """
import os, signal, sys, time
from pathlib import Path
from megatron.training import saver
from megatron.training.main import main

folder, write = Path(sys.argv[1]), saver.write_safetensors

def recorded(step):
    return f'"iteration": {step},' in (folder / "metrics.jsonl").read_text()
"""
SLOW = (
    BEFORE
    + """
def slow(path, tensors, begins):
    if "iter_0000004" in str(path):
        end = time.monotonic() + 60
        while not recorded(7):
            assert time.monotonic() < end, "the run waits for its checkpoint"
            time.sleep(0.01)
        assert not (folder / "checkpoints" / "latest.json").exists()
    return write(path, tensors, begins)

saver.write_safetensors = slow
main("ar", sys.argv[2:])
"""
)
KILLED = (
    BEFORE
    + """
def killed(path, tensors, begins):
    written = write(path, tensors, begins)
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
    command = [sys.executable, "-c", planted, str(folder), *map(str, flags), "--save", str(folder)]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)


def test_training_goes_on_while_a_checkpoint_is_written(tiny, tmp_path):
    """The checkpoint of step 4 is not written before the run has recorded step 7."""
    done = run_with(SLOW, tmp_path, tiny)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [record["iteration"] for record in records(tmp_path, "train")] == [*range(1, 13)]
    assert json.loads((tmp_path / "checkpoints" / "latest.json").read_text())["iteration"] == 12
    assert [path.name[5:] for path in checkpoint.complete(tmp_path / "checkpoints")] == ["0000008", "0000012"]


def test_a_run_killed_while_its_checkpoint_is_written_resumes_from_the_one_before(tiny, tmp_path):
    """Step 8 is half written, and step 10 recorded, when the kill comes."""
    assert run_with(KILLED, tmp_path / "killed", tiny).returncode == -signal.SIGKILL
    root = tmp_path / "killed" / "checkpoints"
    assert sorted(path.name for path in root.glob("iter_*")) == ["iter_0000004", "iter_0000008.partial"]
    assert json.loads((root / "latest.json").read_text())["iteration"] == 4
    assert "iter_0000004 at step 4" in run("ar", *tiny, "--save", tmp_path / "killed").stderr
    assert sorted(path.name for path in root.glob("iter_*")) == ["iter_0000008", "iter_0000012"]
    run("ar", *tiny, "--save", tmp_path / "whole")
    assert records(tmp_path / "killed") == records(tmp_path / "whole")
