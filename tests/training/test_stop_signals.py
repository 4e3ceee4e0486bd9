"""Stop signals at every moment of a run: one request, no data lost, the configured exit code."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import entry, environment, records, run
from tests.forked import free_port, rank_variables, start_script
from tests.training.jobs import catches, lines, newest
from tests.training.runs import Run, contents, status

CODE = ("--exit-code-when-stopped", "85")
LINE = "stopped by {}: nothing was trained, nothing was written\n"


@pytest.fixture
def long(tiny):
    """A run that does not end by itself, with a checkpoint that takes some tenths of a second to write."""
    size = "--hidden-size 512 --num-layers 4 --micro-batch-size 1 --global-batch-size 2".split()
    return [*tiny, *size, *"--train-samples 1000000 --eval-interval 100000 --save-interval 100000".split(), *CODE]


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """A finished run: checkpoints of steps 8 and 12."""
    folder = tmp_path_factory.mktemp("whole")
    run("ar", *tiny, "--save", folder)
    return folder


# ------------------------------------------------------------------------ while it trains and saves


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(("SIGTERM", "SIGTERM", "SIGTERM"), marks=pytest.mark.slow),
        ("SIGUSR1", "SIGTERM", "SIGTERM"),
        pytest.param(("SIGUSR2", "SIGUSR2", "SIGUSR1"), marks=pytest.mark.slow),
        ("SIGTERM", "SIGINT", "SIGUSR2"),
    ],
    ids="-".join,
)
def test_repeated_signals_are_one_request_also_while_saving(names, long, tmp_path):
    folder = tmp_path / "run"
    with Run("ar", [*long, "--save", folder], tmp_path) as training:
        training.wait_until(lambda: lines(folder) >= 2)
        training.signal(*names[:2])  # as SLURM sends SIGTERM at a time limit
        training.wait_until(lambda: any(folder.glob("checkpoints/iter_*.partial")))
        training.signal(names[2])
        assert training.codes() == [85], training.stderr[-3000:]
    stopped = status(folder)
    assert (stopped["state"], stopped["reason"]) == ("stopped", f"signal {names[0]}")
    assert stopped["iteration"] == newest(folder) > 0 and not any(folder.glob("checkpoints/iter_*.partial"))


def test_a_second_ctrl_c_ends_a_run_that_is_saving(long, tmp_path):
    folder = tmp_path / "run"
    with Run("ar", [*long, "--save", folder], tmp_path) as training:
        training.wait_until(lambda: lines(folder) >= 2)
        training.signal("SIGINT")
        training.wait_until(lambda: any(folder.glob("checkpoints/iter_*.partial")))
        training.signal("SIGINT")
        assert training.codes() == [-signal.SIGINT]
    assert status(folder)["state"] == "running" and newest(folder) == 0


def test_a_signal_to_one_rank_stops_all_with_the_same_exit_code(long, tmp_path):
    folder = tmp_path / "run"
    with Run("ar", [*long, "--save", folder], tmp_path, size=2) as training:
        training.wait_until(lambda: lines(folder) >= 2)
        training.signal("SIGTERM", "SIGTERM", rank=1)
        assert training.codes() == [85, 85], training.stderr[-3000:]
    assert status(folder)["state"] == "stopped" and status(folder)["iteration"] == newest(folder) > 0


def test_a_signal_stops_an_evaluation_which_the_next_start_repeats(tiny, tmp_path):
    """At the last step, and again at the start of the next run; then the records are those of one run."""
    flags = [*tiny, *CODE, "--train-samples", 32, "--num-mc", 40, "--ema-decay", 0.5, "--save"]
    run("mdm", *flags, tmp_path / "whole")
    folder = tmp_path / "run"
    with Run("mdm", [*flags, folder], tmp_path, size=2) as training:
        training.wait_until(lambda: lines(folder) == 4)
        training.signal("SIGTERM", rank=1)
        assert training.codes() == [85, 85], training.stderr[-3000:]
    with Run("mdm", [*flags, folder], tmp_path) as training:
        training.wait_until(lambda: status(folder)["state"] == "running")
        training.signal("SIGTERM")
        assert training.codes() == [85], training.stderr[-3000:]
    assert (status(folder)["state"], status(folder)["iteration"], newest(folder)) == ("stopped", 4, 4)
    assert len(records(folder)) == 4 and not (folder / "checkpoints" / "best.json").exists()
    run("mdm", *flags, folder)
    run("mdm", *flags, folder)  # as after a kill: no checkpoint followed the evaluation
    assert status(folder)["state"] == "finished" and (folder / "checkpoints" / "best.json").exists()
    for expected, record in zip(records(tmp_path / "whole"), records(folder), strict=True):
        assert (record["kind"], record["iteration"]) == (expected["kind"], expected["iteration"])
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-4)


# ----------------------------------------------------------------------------- before the first step


def handles_signals(pid: int) -> bool:
    return all(catches(pid, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2"))  # Python itself handles SIGINT


def has_loaded_torch(pid: int) -> bool:
    return "libtorch_cpu" in Path(f"/proc/{pid}/maps").read_text()


@pytest.mark.parametrize(
    "moment, names",
    [
        (handles_signals, ("SIGTERM", "SIGTERM")),
        (handles_signals, ("SIGUSR1",)),
        (has_loaded_torch, ("SIGUSR2", "SIGTERM")),
        (has_loaded_torch, ("SIGINT",)),
    ],
)
def test_a_signal_while_torch_is_imported_ends_the_process_at_once(moment, names, long, tmp_path):
    command = [sys.executable, entry("mdm"), *map(str, long), "--save", str(tmp_path / "run")]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not moment(process.pid):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    for name in names:
        process.send_signal(signal.Signals[name])
    error = process.communicate(timeout=20)[1]
    assert (process.returncode, error) == (85, LINE.format(names[0]))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags, code", [([], 0), (["--exit-code-when-stopped=7"], 7), ([*CODE, *CODE[:1], "9"], 9)])
def test_the_exit_code_is_read_before_the_command_line_is_parsed(flags, code):
    stopped = "from megatron import stop_signals as s; s.install(); import os; os.kill(os.getpid(), 15)"
    command = [sys.executable, "-c", stopped, "--num-layers", "2", *flags, "--lr"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, LINE.format("SIGTERM"))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_while_a_rank_waits_for_the_others_ends_it_at_once(rank, long, tmp_path):
    variables = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": str(free_port())}
    with Run("ar", [*long, "--save", tmp_path / "run"], tmp_path, MASTER_ADDR="127.0.0.1", **variables) as training:
        training.wait_until(lambda: handles_signals(training.ranks[0].pid))
        time.sleep(1)  # usually it waits by then; before, the same must happen
        training.signal("SIGTERM", "SIGTERM")
        assert training.codes(10) == [85]
        assert training.stderr == LINE.format("SIGTERM")
    assert not (tmp_path / "run").exists()


def test_a_signal_while_a_rank_waits_for_the_address_of_the_first_one_ends_it_at_once(long, tmp_path):
    """With torchrun the store exists before rank 0 does."""
    store = "import sys, time, torch.distributed as d; s = d.TCPStore('127.0.0.1', 0, is_master=True); "
    store = [sys.executable, "-c", store + "print(s.port, flush=True); time.sleep(60)"]
    with subprocess.Popen(store, stdout=subprocess.PIPE, text=True) as agent:
        try:
            port = agent.stdout.readline().strip()
            variables = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": port}
            with Run(
                "ar", [*long, "--save", tmp_path / "run"], tmp_path, MASTER_ADDR="127.0.0.1", **variables
            ) as training:
                training.wait_until(lambda: handles_signals(training.ranks[0].pid))
                time.sleep(1)
                training.signal("SIGTERM")
                assert training.codes(10) == [85] and training.stderr == LINE.format("SIGTERM")
        finally:
            agent.kill()


def test_a_signal_before_the_first_step_ends_all_ranks_without_a_step(long, tmp_path):
    folder = tmp_path / "run"
    with Run("ar", [*long, "--save", folder], tmp_path, size=2) as training:
        training.wait_until((folder / "lock").exists)
        training.signal("SIGTERM", "SIGTERM", rank=1)
        assert training.codes() == [85, 85]
        assert "error" not in training.stderr and "nothing was trained" in training.stderr
    stopped = status(folder)
    assert (stopped["state"], stopped["iteration"]) == ("stopped", 0)
    assert sorted(contents(folder)) == ["lock", "status.json"]


def test_a_resumed_run_that_is_stopped_before_its_first_step_rewrites_nothing(tiny, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoints" / "iter_0000012")  # records of steps 9 to 12 are ahead of the checkpoint
    (folder / "lock").unlink()
    before = contents(folder, without=("status.json",))
    with Run("ar", [*tiny, *CODE, "--save", folder], tmp_path) as training:
        training.wait_until((folder / "lock").exists)
        training.signal("SIGUSR2", "SIGTERM")
        assert training.codes() == [85] and "nothing was trained" in training.stderr
    assert contents(folder, without=("status.json", "lock")) == before
    assert status(folder) | {"reason": "signal SIGUSR2", "state": "stopped", "iteration": 8} == status(folder)
    run("ar", *tiny, "--save", folder)
    assert records(folder) == records(whole)


def test_a_run_that_had_finished_exits_with_0_whatever_it_is_sent(tiny, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "lock").unlink()
    with Run("ar", [*tiny, *CODE, "--save", folder], tmp_path) as training:
        training.wait_until((folder / "lock").exists)
        training.signal("SIGTERM", "SIGTERM")
        assert training.codes() == [0]
    assert status(folder)["state"] == "finished"


# ------------------------------------------------------------------------------------- without a loop


@pytest.mark.parametrize("size", [1, 2])
def test_an_evaluation_ends_at_once(size, tiny, whole, tmp_path):
    flags = ["--skip-train", "--load", whole, "--num-mc", "1", "--eval-samples", "100000", "--seq-length", "32"]
    long = [*tiny, *flags, "--eval-batch-size", "1", *CODE]
    with Run("ar", long, tmp_path, size=size) as evaluation:
        evaluation.wait_until(lambda: "unique tokens" in evaluation.stderr)
        time.sleep(0.2)
        evaluation.signal("SIGTERM", "SIGTERM")
        assert evaluation.codes(20) == [85] * size
        assert evaluation.stderr.count(LINE.format("SIGTERM")) == 1 and "error" not in evaluation.stderr
        assert evaluation.stdout == ""


def test_a_training_run_within_another_program_leaves_its_signals_alone(tiny):
    from megatron.training.launcher import main

    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with pytest.raises(SystemExit) as stopped:
        main("ar", [*map(str, tiny), "--exit-interval", "1", *CODE])
    assert stopped.value.code == 85
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before
    assert os.environ.get("RANK") is None


# ------------------------------------------------------------------------ tools with ranks

RANK = """
import os, sys, time
from pathlib import Path
from megatron import stop_signals
from megatron.training.command_line import parse_run
from megatron.training.launcher import launch
def work(config, detector):
    Path(sys.argv[1], f"ready {os.environ.get('RANK', 0)}").touch()
    time.sleep(60)
flags = "--num-layers 1 --hidden-size 8 --num-attention-heads 1 --train-data-path none --train-iters 1".split()
stop_signals.install_in_tool()
stop_signals.run_tool(lambda: launch(lambda: parse_run("ar", flags), work))
"""


@pytest.mark.parametrize(("name", "size"), [("SIGINT", 1), ("SIGTERM", 2)])
def test_a_signal_to_one_rank_of_a_tool_ends_all_with_one_line(name, size, tmp_path):
    outputs = [tmp_path / "output", tmp_path / "errors"]
    ranks = start_script(["-c", RANK, str(tmp_path)], environment(), outputs, rank_variables(size))
    deadline = time.monotonic() + 60
    while not all((tmp_path / f"ready {rank}").exists() for rank in range(size)):
        assert time.monotonic() < deadline and all(rank.is_alive() for rank in ranks)
        time.sleep(0.05)
    os.kill(ranks[-1].pid, signal.Signals[name])
    for rank in ranks:
        rank.join(60)
    assert (tmp_path / "errors").read_text() == "error: interrupted\n"
    assert [rank.exitcode for rank in ranks] == [128 + signal.Signals[name]] * size
