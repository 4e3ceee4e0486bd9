"""How often the bytes of a checkpoint are read: each is checksummed once by a process and loaded once."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from megatron.errors import ConfigurationError
from megatron.training import checkpoint_store
from megatron.training.checkpoint_store import CheckpointStore, damage, find_checkpoint
from megatron.training.launcher import main
from megatron.training.load_run import open_trained
from tests.conftest import run


@pytest.fixture(scope="module")
def stopped(tiny, tmp_path_factory):
    """A run with averaged weights that stopped after step 10 of 12, with checkpoints of steps 8 and 10."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    run("ar", *tiny, "--ema-decay", "0.9", "--save", folder, "--exit-interval", 10)
    return folder


class Reads:
    """Bytes that this process read of each file by now: to compute checksums, and to load tensors."""

    def __init__(self, monkeypatch):
        self.checksummed, self.loaded = Counter(), Counter()
        reads = self

        class CountedFile:
            def __init__(self, path, *mode, **options):
                self.path, self.file = Path(path), open(path, *mode, **options)  # noqa: SIM115

            def __enter__(self):
                return self

            def __exit__(self, *error):
                self.file.close()

            def readinto(self, block):
                count = self.file.readinto(block)
                reads.checksummed[self.path] += count
                return count

        process_request = HuggingFaceStorageReader._process_read_request

        def counted_request(reader, file, request, planner):
            process_request(reader, file, request, planner)
            tensor = planner.resolve_tensor(request)
            reads.loaded[Path(reader.storage_data[request.storage_index].relative_path)] += tensor.nbytes

        monkeypatch.setattr(checkpoint_store, "open", CountedFile, raising=False)
        monkeypatch.setattr(HuggingFaceStorageReader, "_process_read_request", counted_request)


@pytest.fixture
def reads(monkeypatch):
    """The reads of this test, in a process that remembers no checksum."""
    checkpoint_store._checksum_of_version.cache_clear()
    return Reads(monkeypatch)


def sizes(folders: list[Path]) -> dict[Path, int]:
    """Return the size of every shard in `folders`."""
    return {shard: shard.stat().st_size for folder in folders for shard in folder.glob("*.safetensors")}


def tensor_bytes(shard: Path, *prefixes: str) -> int:
    """Return the bytes of the tensors in a shard whose names start with one of `prefixes`."""
    data = shard.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    offsets = [entry["data_offsets"] for name, entry in header.items() if name.startswith(prefixes)]
    return sum(end - start for start, end in offsets)


def newest(run: Path) -> Path:
    return CheckpointStore.of_run(run).complete()[-1]


def check_read_once(reads: Reads, folder: Path, *prefixes: str) -> None:
    """Check that the shards of one checkpoint were checksummed once and the tensors with `prefixes` loaded once."""
    expected = sizes([folder])
    assert expected and reads.checksummed == expected
    assert reads.loaded == {shard: tensor_bytes(shard, *prefixes) for shard in expected}


def test_a_resume_reads_a_checkpoint_once(tiny, stopped, tmp_path, reads):
    shutil.copytree(stopped, tmp_path / "run")
    folder = newest(tmp_path / "run")
    main("ar", [*tiny, "--ema-decay", "0.9", "--save", str(tmp_path / "run")])
    assert newest(tmp_path / "run").name == "iter_0000012"
    check_read_once(reads, folder, "model.", "optimizer.", "average.")


def test_an_evaluation_reads_a_checkpoint_once(stopped, reads, capsys):
    main("ar", ["--skip-train", "--load", str(stopped)])
    assert capsys.readouterr().out.count('"kind": "valid"') == 4
    check_read_once(reads, newest(stopped), "model.", "optimizer.", "average.")


@pytest.mark.parametrize("which", ["latest", "best"])
def test_loading_a_run_reads_its_checkpoint_once(stopped, reads, which):
    """A scorer opens a run first to check it, then to load it."""
    open_trained(str(stopped), which)
    trained = open_trained(str(stopped), which)
    trained.model()
    check_read_once(reads, trained.checkpoint, "model.")


def test_scoring_all_checkpoints_reads_each_once(stopped, reads):
    folders = CheckpointStore.of_run(stopped).intact()
    for folder in folders:
        open_trained(str(folder)).model(average=True)
    assert len(folders) == 2 and reads.checksummed == sizes(folders)
    assert reads.loaded == {shard: tensor_bytes(shard, "average.") for shard in sizes(folders)}


def test_a_changed_file_is_read_again(stopped, tmp_path, reads):
    shutil.copytree(stopped, tmp_path / "run")
    folder = find_checkpoint(tmp_path / "run", "latest")
    (shard,) = sizes([folder])
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert damage(folder) == f"{shard.name} does not match its checksum"
    assert reads.checksummed == {shard: 2 * len(data)}
    with pytest.raises(ConfigurationError, match="is damaged"):
        find_checkpoint(folder, "latest")
    assert find_checkpoint(tmp_path / "run", "latest").name == "iter_0000008"
