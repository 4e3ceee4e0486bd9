"""Kills at random moments; test_resume.py and test_jobs.py have single kills."""

import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT, environment


@pytest.mark.slow
def test_runs_killed_at_random_moments_equal_uninterrupted_ones(corpus):
    seed = str(int(time.time()))  # other moments in every test run; the output names them
    command = [sys.executable, "tests/training/kill_loop.py", "--data", str(corpus), "--moments", "20", "--seed", seed]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_run_on_four_processes_that_is_killed_three_times_equals_an_uninterrupted_one(corpus):
    seed = str(int(time.time()))
    command = [sys.executable, "tests/training/kill_loop.py", "--data", str(corpus), "--processes", "4", "--kills", "3"]
    done = subprocess.run(
        [*command, "--seed", seed], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
