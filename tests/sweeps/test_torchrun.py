"""torchrun's exit code is that of the rank that failed first, so that a queue can tell what to do."""

import signal
import subprocess

import pytest

from megatron.sweeps.launch import FORWARDED, local_command, local_environment
from megatron.sweeps.plan import plan_sweep
from megatron.sweeps.points import read_plan
from megatron.sweeps.sweep_file import read_sweep
from tests.conftest import ROOT, environment
from tests.forked import run_script
from tests.sweeps.files import toy, write
from tests.sweeps.test_local_queue import finish

RANK = """
import os, signal, sys, time
rank, code = os.environ["RANK"], {code}
if rank == "0":
    time.sleep(60)  # until torchrun ends it
if code < 0:
    os.kill({pid}, -code)
    time.sleep(60)
sys.exit(code)
"""


@pytest.mark.parametrize(
    "code, pid, expected",
    [
        (2, "", 2),
        (-signal.SIGKILL, "os.getpid()", 128 + signal.SIGKILL),
        (-signal.SIGUSR1, "os.getppid()", 128 + signal.SIGUSR1),
    ],
    ids=["mistake", "killed", "stopped"],
)
def test_the_code_of_the_rank_that_failed_first_is_returned(code, pid, expected, tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(RANK.format(code=int(code), pid=pid or 0))
    options = ["--standalone", "--nproc-per-node", "2", "--signals-to-handle", FORWARDED]
    command = [str(ROOT / "megatron" / "sweeps" / "torchrun.py"), *options, str(script)]
    assert run_script(command, environment(), 60).returncode == expected


def test_another_clone_may_be_the_working_directory(corpus, tmp_path):
    path = write(tmp_path, toy(corpus), resources={"world_size": 2})
    point = plan_sweep(read_sweep(path), tmp_path / "out").points[0]
    other = tmp_path / "megatron" / "sweeps" / "torchrun.py"
    other.parent.mkdir(parents=True)
    other.write_text("import sys; sys.exit(9)")
    for folder in other.parents[:2]:
        (folder / "__init__.py").touch()
    (tmp_path / "rank.py").write_text("import sys; sys.exit(7)")
    command = local_command(point, tmp_path / "out")
    command = [*command[: command.index(str(ROOT / point.script))], "rank.py"]
    assert subprocess.run(command, cwd=tmp_path, env=local_environment([], 2)).returncode == 7


@pytest.mark.slow
def test_a_mistake_that_only_the_ranks_see_is_not_repeated(corpus, tmp_path):
    path = write(tmp_path, toy(corpus), variants=None, parameters={"train-epochs": [4]}, resources={"world_size": 2})
    finish("plan", path, tmp_path / "out")
    (point,) = read_plan(tmp_path / "out")
    run = point.folder(tmp_path / "out")
    run.parent.mkdir()
    run.write_text("a file in place of the run folder")
    output = finish("run", path, tmp_path / "out", "--slots", 2)
    assert output.count("started (") == 1 and "started again" not in output
    assert "failed: --save" in output and "cannot be written to (" in output
