"""States of runs from their folders, and their environment."""

import json

import pytest

from megatron.sweeps.points import same_value
from megatron.sweeps.states import last_record, run_state


@pytest.mark.parametrize("content", [None, "{}", "[]", "{", '{"state": "running"}'])
def test_a_missing_or_damaged_status_is_no_error(content, tmp_path):
    if content is not None:
        (tmp_path / "status.json").write_text(content)
    assert run_state(tmp_path).name == ("lost" if content == '{"state": "running"}' else "waiting")


@pytest.mark.parametrize(
    "reason, own",
    [
        ("step 4: loss or gradient norm is not finite", True),
        ("rank 1 failed with OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", True),
        ("data loader worker (process 7) was killed by SIGKILL: the machine may have run out of memory", False),
        ("disk", False),
    ],
)
def test_a_run_that_would_fail_again_is_told_from_one_that_may_not(reason, own, tmp_path):
    status = {"state": "failed", "reason": reason, "iteration": 3, "consumed_samples": 24}
    (tmp_path / "status.json").write_text(json.dumps(status))
    state = run_state(tmp_path)
    assert (state.name, state.iteration, state.has_own_fault) == ("failed", 3, own)


def test_the_last_complete_record_is_read_from_the_end_of_the_file(tmp_path):
    assert last_record(tmp_path) == {}
    lines = [json.dumps({"iteration": number, "padding": "x" * 500}) for number in range(100)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"iteration": 100, "pad')
    assert last_record(tmp_path)["iteration"] == 99


def test_equal_flag_values_are_equal_however_they_are_written():
    assert same_value(4, "4.0") and same_value("1e-3", 0.001) and same_value("ar", "ar")
    assert not same_value(4, 5) and not same_value(True, 1) and not same_value("ar", "mdm")
