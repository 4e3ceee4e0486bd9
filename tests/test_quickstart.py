"""The quickstart as a user runs it: at toy size in the fast tier, complete in the slow one."""

import json
import os
import signal
import subprocess
import time

import pytest

from megatron.reporting.runs import best_point, curve, load_run, paired_difference
from tests.conftest import ROOT, environment, records

SCRIPT = "examples_scaling/quickstart/run.sh"
LONG = ("ar", "mdm", "ar_regularised")
RUNS = (*LONG, "ar_short")


def variables(folder, data) -> dict:
    """Return a user's environment variables, with runs below `folder`."""
    inherited = {name: value for name, value in environment().items() if name not in ("OMP_NUM_THREADS", "PYTHONPATH")}
    return inherited | {"OUT": str(folder / "my runs"), "DATA": str(data)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The folder of the data, which the first script that runs prepares."""
    return tmp_path_factory.mktemp("quickstart") / "my data"


def quickstart(folder, data, *flags):
    """Run the script and return its output."""
    command = ["bash", SCRIPT, *flags]
    result = subprocess.run(command, cwd=ROOT, env=variables(folder, data), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_the_quickstart_runs_end_to_end(data, tmp_path):
    small = ["--train-epochs", "1", "--eval-samples", "4", "--eval-interval", "6"]
    printed = quickstart(tmp_path, data, *small)
    page = (tmp_path / "my runs" / "report" / "report.html").read_text()
    assert "source code of Python" in page and "also occur in the training split" in page
    for name in RUNS:
        status = json.loads((tmp_path / "my runs" / name / "status.json").read_text())
        assert (status["state"], status["consumed_samples"]) == ("finished", 390)
        assert name in printed


def test_dry_run_prints_commands_and_does_nothing(tmp_path):
    command = ["bash", SCRIPT, "--seed", "2"]
    # the script uses the environment of install.sh, not the active one
    env = variables(tmp_path, tmp_path / "my data") | {"DRY_RUN": "1", "VIRTUAL_ENV": "/another/environment"}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert all(line.startswith(".venv/bin/python ") for line in result.stdout.splitlines())
    assert len(result.stdout.splitlines()) == 6 and result.stdout.count("--seed 2") == 4
    assert not any(tmp_path.iterdir())


def test_a_background_job_that_fails_while_others_run_fails_the_script(tmp_path):
    """The job has ended before the script waits for it."""
    script = f"""source {ROOT}/examples_scaling/lib/run.sh
in_background slow sleep 1
in_background fast bash -c "exit 3"
wait_all
echo the report would follow"""
    result = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 3 and "report" not in result.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_command_gets_the_signal_of_its_script_and_the_script_ends_after_it(number):
    script = f"""source {ROOT}/examples_scaling/lib/run.sh
execute bash -c 'trap "sleep 0.3; echo saved; exit 0" TERM; echo started; for _ in {{1..99}}; do sleep 0.05; done'
echo the next command would follow"""
    with subprocess.Popen(["bash", "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert [process.stdout.readline().split()[0], process.stdout.readline()] == ["bash", "started\n"]
        process.send_signal(number)
        assert process.stdout.read() == "saved\n" and process.wait() > 128


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_makes_all_runs_save_and_exit(number, data, tmp_path):
    """Ctrl-C goes to the process group, the SIGTERM of a cancelled job to the script only."""
    log = open(tmp_path / "log", "w")  # noqa: SIM115 (open while the script runs)
    command = ["bash", SCRIPT, "--num-workers", "1", "--no-compile"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=variables(tmp_path, data), stdout=log, stderr=log, start_new_session=True
    )
    folders = [tmp_path / "my runs" / name for name in RUNS]
    while not all((folder / "metrics.jsonl").exists() and records(folder) for folder in folders):
        assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
        time.sleep(0.1)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    assert process.wait(120) != 0
    for folder in folders:
        wait_for(lambda folder=folder: json.loads((folder / "status.json").read_text())["state"] != "running")
        status = json.loads((folder / "status.json").read_text())
        assert (status["state"], status["reason"]) == ("stopped", f"signal {number.name}"), (
            tmp_path / "log"
        ).read_text()
        assert (folder / "checkpoints" / "latest.json").exists()


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_repetition_hurts_the_autoregressive_model(tmp_path):
    """Within 15 minutes, AR's last validation loss is 0.05 nats and 5 paired standard errors above its best.

    The same command then adds nothing.
    """
    start = time.monotonic()
    quickstart(tmp_path, tmp_path / "my data")
    assert time.monotonic() - start < 15 * 60
    before = {name: records(tmp_path / "my runs" / name) for name in RUNS}
    assert "holds this corpus already" in quickstart(tmp_path, tmp_path / "my data")
    assert {name: records(tmp_path / "my runs" / name) for name in RUNS} == before
    runs = {name: load_run(tmp_path / "my runs" / name) for name in RUNS}
    assert len({runs[name].valid["validation"][-1]["flops"] for name in LONG}) == 1
    ar = runs["ar"]
    gap = paired_difference((ar, curve(ar, "validation")[-1]), (ar, best_point(ar, "tuning", "validation")))
    assert gap.nats > 0.05 and gap.ratio > 5
