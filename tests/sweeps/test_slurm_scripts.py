"""Batch scripts of a sweep: one array for each resource class, valid bash, and clear errors for site files."""

import os
import re
import subprocess

import pytest

from megatron.errors import ConfigurationError
from megatron.parallel.failure_detector import listen
from megatron.sweeps.array_task import SrunEnd, failing_nodes, free_port
from megatron.sweeps.plan import plan_sweep
from megatron.sweeps.slurm import queued_runs, read_site, submit_array, write_arrays
from megatron.sweeps.states import State
from megatron.sweeps.sweep_file import read_sweep
from tests.conftest import ROOT
from tests.sweeps.files import toy, write


@pytest.fixture
def planned(corpus, tmp_path):
    rules = [{"where": {"variant": "mdm"}, "world_size": 4, "nodes": 2, "minutes": 90}]
    flags = toy(corpus)["flags"] | {"micro-batch-size": 1}
    path = write(tmp_path, toy(corpus), flags=flags, resources={"rules": rules})
    return plan_sweep(read_sweep(path), tmp_path / "out").points


def test_every_resource_class_is_an_array_whose_script_is_valid_bash(planned, tmp_path):
    (tmp_path / "site.yaml").write_text(
        "partition: long\naccount: 17\nsbatch: [--mem=0, --constraint=h100]\nsetup: module load cuda\nthrottle: 3\n"
    )
    site = read_site(tmp_path / "site.yaml")
    single, double = write_arrays(tmp_path / "out", planned, site)
    assert [point.variant for point in single.points] == ["ar", "ar"] and len(double.points) == 2
    assert [point.axes["train-epochs"] for point in single.points] == [8, 4]  # the longest first
    text = double.script.read_text()
    for line in (
        "#SBATCH --array 0-1%3",
        "#SBATCH --nodes 2 --ntasks-per-node 2 --cpus-per-task 8",
        "#SBATCH --gpus-per-node 2",
        "#SBATCH --time 90 --signal USR1@300 --requeue --open-mode append",
        "#SBATCH --partition long",
        "#SBATCH --account 17",
        "#SBATCH --constraint=h100",
        "module load cuda",
    ):
        assert line in text.splitlines(), text
    assert double.tasks.read_text().split() == [point.id for point in double.points]
    for array in (single, double):
        subprocess.run(["bash", "-n", array.script], check=True)
    assert text.splitlines()[-1].endswith(f"--tasks {double.tasks} --retries 2 --wait-for-lock 10 --hang-minutes 30")
    again, _ = write_arrays(tmp_path / "out", planned, site)
    assert again.script != single.script and single.script.exists()  # a submitted script never changes


def test_a_class_of_more_points_than_an_array_holds_is_several_arrays(planned, tmp_path):
    (tmp_path / "site.yaml").write_text("array_size: 1")
    arrays = write_arrays(tmp_path / "out", planned, read_site(tmp_path / "site.yaml"))
    assert [point.id for array in arrays for point in array.points] == [
        array.tasks.read_text().strip() for array in arrays
    ]
    assert len({array.script for array in arrays}) == len(planned)
    assert all("#SBATCH --array 0-0" in array.script.read_text() for array in arrays)


def test_the_site_comes_from_the_environment_too(monkeypatch, tmp_path):
    monkeypatch.setenv("SITE_PARTITION", "gpu")
    monkeypatch.setenv("SITE_GPUS", "false")
    monkeypatch.setenv("SITE_SBATCH", "[--mem=0]")
    site = read_site(None)
    assert (site.partition, site.gpus, site.sbatch) == ("gpu", False, ("--mem=0",))
    monkeypatch.setenv("SITE_THROTTLE", "-1")
    with pytest.raises(ConfigurationError, match="environment: SITE_THROTTLE: -1: must be a whole number"):
        read_site(None)


def test_the_example_site_file_is_read():
    site = read_site(ROOT / "examples_scaling" / "sweeps" / "site.yaml")
    assert site.partition == "gpu" and site.account is None and site.sbatch == ("--mem=0",)


REFUSED = {
    "partitoin: gpu": "partitoin: is an unknown key; did you mean partition?",
    "gpus: 8": "gpus: 8: is neither true nor false",
    "retries: 1.5": "retries: 1.5: must be a whole number of at least 0",
    "throttle: many": "throttle: many: is not a number",
    "throttle: -3": "throttle: -3: must be a whole number of at least 0",
    "ranks_per_node: 0": "ranks_per_node: 0: must be a whole number of at least 1",
    "hang_minutes: .nan": "hang_minutes: nan: is not a number",
    "wait_for_lock_minutes: -1": "wait_for_lock_minutes: -1: must not be negative",
    "partition: a b": "partition: a b: is not a single name",
    'account: "a\\nb"': r"account: 'a\nb': is not one line of text",
    "qos: [a]": "qos: ['a']: is not text",
    "sbatch: --mem=0": "sbatch: --mem=0: is not a list",
    'sbatch: ["--mem=0\\nrm x"]': r"sbatch[0]: '--mem=0\nrm x': is not one line of text",
    "retries: 1\nretries: 2": "is not YAML: retries is given twice",
    "hang_minutes: 10": "wait_for_lock_minutes: 10: must be less than hang_minutes (10)",
    "- gpu": "is not a mapping",
    "a: [": "is not YAML",
}


@pytest.mark.parametrize("text", REFUSED)
def test_a_mistake_in_a_site_file_is_one_line(text, tmp_path):
    (tmp_path / "site.yaml").write_text(text)
    with pytest.raises(ConfigurationError, match=re.escape(REFUSED[text])) as caught:
        read_site(tmp_path / "site.yaml")
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_the_site_and_a_machine_without_slurm_are_named(planned, monkeypatch, tmp_path):
    (tmp_path / "site.yaml").write_text("ranks_per_node: 1")
    with pytest.raises(ConfigurationError, match="needs 2 ranks on a node, and the site has ranks_per_node 1"):
        write_arrays(tmp_path / "out", planned, read_site(tmp_path / "site.yaml"))
    (tmp_path / "site.yaml").write_text("signal_seconds: 3600\nsetup:\npython:\n")
    with pytest.raises(ConfigurationError, match="has minutes 90, and the site's signal_seconds 3600 leave no time"):
        write_arrays(tmp_path / "out", planned, read_site(tmp_path / "site.yaml"))
    array, _ = write_arrays(tmp_path / "out", planned, read_site(None))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigurationError, match="there is no sbatch on this machine"):
        submit_array(array)


def test_branches_are_arrays_of_their_own_after_those_of_the_trunks(corpus, tmp_path):
    flags = toy(corpus)["flags"] | {"lr-decay-style": "WSD", "lr-warmup-samples": 16}
    path = write(tmp_path, toy(corpus), flags=flags)
    points = plan_sweep(read_sweep(path), tmp_path / "out").points
    trunks, branches = write_arrays(tmp_path / "out", points, read_site(None), retry_failed=True)
    assert not trunks.are_branches and branches.are_branches and "branches" in branches.script.name
    assert {point.trunk for point in branches.points} == {point.id for point in trunks.points}
    assert "--retry-failed" in trunks.script.read_text()


def test_a_job_id_that_slurm_gave_to_a_longer_array_is_no_error(planned, monkeypatch, tmp_path):
    array, _ = write_arrays(tmp_path / "out", planned, read_site(None))
    array.job_file.write_text("7\n")
    command(tmp_path, "squeue", "printf '1\\n9\\nN/A\\n'")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert queued_runs(tmp_path / "out") == {array.points[1].id: "7"}


WROTE, SILENT = SrunEnd(1, True), SrunEnd(1, False)
SRUN = """srun: error: n2: task 1: Killed
srun: Terminating StepId=7.0
srun: error: n1: tasks 0,2: Exited with exit code 143
"""


@pytest.mark.parametrize(
    "nodes, state, end, failing",
    [
        (["n1"], State("failed"), WROTE, ["n1"]),
        (["n1", "n10"], State("failed", "rank 3 (process 7 on n10) is gone: it was killed"), WROTE, ["n10"]),
        (["a-1", "a-1b", "a"], State("failed", "rank 0 (process 7 on a-1.cluster) is gone"), WROTE, ["a-1"]),
        (["n1", "n2"], State("failed", "rank 1 failed with OSError: disk"), WROTE, []),
        (["n1", "n2"], State("lost"), WROTE, ["n1"]),  # rank 0, which writes the status, was killed
        (["n1", "n2"], State("lost"), SrunEnd(1, True, hung=True), []),  # all ranks were, since they hung
        (["n1", "n2"], State("lost"), SILENT, []),
        (["n1", "n2"], State("lost"), SrunEnd(143, False, SRUN), ["n2"]),
        (["n1", "n2"], State("failed", "rank 3 (process 7 on n1) is gone"), SrunEnd(137, False, SRUN), ["n2"]),  # stale
        (["n1", "n2"], State("waiting"), SrunEnd(1, False, f"rank 1 of 2 did not connect\n{SRUN}"), []),
    ],
)
def test_the_nodes_of_a_failure_are_the_only_one_or_those_that_the_run_or_srun_names(nodes, state, end, failing):
    assert failing_nodes(nodes, state, end) == failing


def command(folder, name, script) -> None:
    """Write a command in place of one of SLURM's."""
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_tasks_of_a_node_take_different_free_ports(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "100")
    port = free_port()
    with listen(port):
        other = free_port()
        monkeypatch.setenv("SLURM_JOB_ID", "101")
        assert len({port, other, free_port()}) == 3
