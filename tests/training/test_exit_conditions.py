"""Every exit condition saves, is recorded in status.json, and exits with --exit-code-when-stopped (default 0)."""

import json
import time

import pytest

from megatron.config.sections import TrainingConfig
from megatron.training.exit_conditions import ExitConditions
from tests.conftest import run, run_python
from tests.distributed import spawn


@pytest.mark.parametrize(
    "flags, reason, step",
    [
        (["--kill-switch-file", "{folder}/stop"], "--kill-switch-file", 1),
        (["--exit-duration-in-mins", "1e-9"], "--exit-duration-in-mins", 1),
        (["--exit-interval", "3"], "--exit-interval 3", 3),
    ],
)
def test_reasons_to_leave(flags, reason, step, tiny, tmp_path):
    (tmp_path / "stop").touch()
    flags = [*[flag.format(folder=tmp_path) for flag in flags], "--exit-code-when-stopped", 85]
    assert run("mdm", *tiny, *flags, "--save", tmp_path / "run", check=False).returncode == 85
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "stopped" and status["reason"].startswith(reason) and status["iteration"] == step
    latest = json.loads((tmp_path / "run" / "checkpoints" / "latest.json").read_text())
    assert latest["iteration"] == step


def test_the_time_limit_counts_from_the_start_of_the_command(tiny, tmp_path):
    """Not from the first step: checking and loading a checkpoint, or a wait for the lock, may take most of it."""
    planted = """
import sys, time
from megatron.training import launcher, resume

def slow(*arguments, **options):
    time.sleep(3)
    return find(*arguments, **options)

find, resume.find_origin = resume.find_origin, slow
launcher.main("ar", sys.argv[1:])
"""
    flags = [*tiny, "--exit-duration-in-mins", "0.05", "--save", tmp_path / "run"]
    assert run_python("-c", planted, *flags).returncode == 0
    assert json.loads((tmp_path / "run" / "status.json").read_text())["iteration"] == 1


def reasons(ranks, folder) -> list[str | None]:
    """Return the reasons to exit where rank 1 alone sees the kill switch, has reached its time limit, or neither."""
    now, minutes = time.monotonic(), 5
    kill_switch = TrainingConfig(kill_switch_file=str(folder / str(ranks.rank)))
    limited = TrainingConfig(exit_duration_in_mins=minutes)
    conditions = ((kill_switch, now), (limited, now - 120 * minutes * ranks.rank), (limited, now))
    return [ExitConditions(config, started).reason(1, ranks) for config, started in conditions]


def test_every_rank_gives_the_reason_that_one_of_them_has(tmp_path):
    """Over NFS a file appears at different times; and no two ranks reach a time limit in the same moment."""
    (tmp_path / "1").touch()
    expected = [[f"--kill-switch-file {tmp_path}/{rank}", "--exit-duration-in-mins 5", None] for rank in range(2)]
    assert spawn(reasons, 2, tmp_path) == expected


def test_two_processes_leave_together_when_one_is_asked(tiny, tmp_path):
    (tmp_path / "stop").touch()
    run("ar", *tiny, "--kill-switch-file", tmp_path / "stop", "--save", tmp_path / "run", processes=2)
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "stopped"
