"""A node that loses power keeps only what was synced: a checkpoint must not outlast the records before it."""

import json
import os

import pytest

from megatron.training.launcher import main


@pytest.fixture
def synced(monkeypatch):
    """The files that this process syncs from here on, in order: name and content."""
    files, fsync = [], os.fsync

    def record(descriptor):
        fsync(descriptor)
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        with open(path, "rb") as file:
            files.append((os.path.basename(path).removesuffix(".partial"), file.read()))

    monkeypatch.setattr(os, "fsync", record)
    return files


def steps(records: bytes) -> set[tuple]:
    lines = map(json.loads, records.splitlines())
    return {(line["kind"], line["iteration"]) for line in lines}


def test_a_checkpoint_is_complete_after_the_records_and_evaluations_up_to_it(synced, tiny, tmp_path):
    main("ar", [*tiny, "--save", str(tmp_path / "run")])
    names = [name for name, _ in synced]
    checkpoints = [index for index, name in enumerate(names) if name == "meta.json"]
    iterations = [json.loads(synced[index][1])["iteration"] for index in checkpoints]
    assert iterations == [4, 8, 12]
    for index, iteration in zip(checkpoints, iterations, strict=True):
        (*_, records) = [content for name, content in synced[:index] if name == "metrics.jsonl"]
        assert {("train", iteration), ("valid", iteration)} <= steps(records)
        assert f"{iteration}.npz" in names[:index]


def test_a_resume_replaces_the_records_by_synced_ones(synced, tiny, tmp_path):
    main("ar", [*tiny, "--save", str(tmp_path / "run"), "--exit-interval", "4"])
    synced.clear()
    main("ar", [*tiny, "--save", str(tmp_path / "run"), "--exit-interval", "5"])
    first = next(content for name, content in synced if name == "metrics.jsonl")
    assert ("valid", 4) in steps(first) and ("train", 5) not in steps(first)
