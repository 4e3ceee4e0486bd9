"""A full disk: one line that names the file, and nothing that was there is lost."""

import json
import resource
import signal
from argparse import Namespace
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron.sweeps import commands
from megatron.sweeps.points import Point, read_plan, replace_file
from tests.conftest import ROOT, environment, records, run_python
from tests.forked import run_script
from tests.sweeps.files import toy, write
from tests.sweeps.test_local_queue import finish


@contextmanager
def full_disk(size):
    """Limit files to `size` bytes, which acts on larger files like a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def contents(folder) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def planned(corpus, tmp_path):
    """Options of a planned sweep, and its points."""
    options = Namespace(sweep=write(tmp_path, toy(corpus)), output=tmp_path / "full")
    commands.plan(options)
    return options, read_plan(options.output)


def validated(point: Point, folder: Path) -> None:
    """Write a run folder with validations, which its table lists."""
    run = point.folder(folder)
    run.mkdir(parents=True)
    record = {"kind": "valid", "set": "validation", "iteration": 4, "loss": 2.0, "likelihood": "x" * 60}
    (run / "metrics.jsonl").write_text((json.dumps(record) + "\n") * 20)


def test_each_file_of_a_sweep_is_the_old_one_or_the_new_one(planned, corpus, capsys):
    options, points = planned
    folder = options.output
    for point in points:
        validated(point, folder)
    commands.collect(options)
    commands.status(options)
    before = contents(folder)
    write(options.sweep.parent, toy(corpus), parameters={"train-epochs": [2, 4, 8]})
    failures = {
        "plan.jsonl": lambda: commands.plan(options),
        "results.csv": lambda: commands.collect(options),
        "status.html": lambda: commands.status(options),
        "choices.json": lambda: replace_file(folder / "choices.json", "x" * 3000),
    }
    for name, work in failures.items():
        with full_disk(1500), pytest.raises(OSError) as caught:
            work()
        message = str(caught.value)
        assert message == f"{folder / name}: could not be written (File too large); free space and start the same " + (
            "command again"
        )
        after = contents(folder)
        assert {path.name for path in after if after[path] != before.get(path)} <= {"sweep.yaml"}


def test_a_queue_on_a_full_disk_names_it_and_resumes_without_a_loss(corpus, tmp_path):
    path = write(tmp_path, toy(corpus), variants={"ar": {}}, parameters={"train-epochs": [4]})
    folder = tmp_path / "full"
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"  # less than a checkpoint
    code = f"import resource, runpy; {limit}; runpy.run_path('tools/sweep.py', run_name='__main__')"
    done = run_python("-c", code, "run", path, "--output", folder, "--slots", "1", "--retries", "0")
    (line,) = [line for line in done.stderr.splitlines() if "seed 1234: failed:" in line]
    assert done.returncode == 1 and "iter_0000004: could not be written" in line and "free space and start" in line
    (point,) = read_plan(folder)
    log = folder / "logs" / f"{point.id}.log"
    log.unlink()
    log.symlink_to("/dev/full")  # the run cannot write its log either, and trains all the same
    assert "1 runs: 1 finished" in finish("run", path, folder, "--slots", 1)
    command = [str(ROOT / point.script), *point.arguments, "--save", str(tmp_path / "whole")]
    assert run_script(command, environment(), 300).returncode == 0
    assert records(point.folder(folder)) == records(tmp_path / "whole")
    log.unlink()
    (folder / "logs").rmdir()
    (folder / "logs").write_text("")
    assert f"error: {folder / 'logs'}: could not be written (File exists)" in finish("run", path, folder)
