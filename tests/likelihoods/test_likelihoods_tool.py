"""tools/likelihoods.py on real runs: equal to validation, equal over ranks, ordered as theory says; what it refuses."""

import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch

from megatron.errors import ConfigurationError
from megatron.generation.sampling import Sampling
from megatron.likelihoods.chains import MaskedChains
from megatron.likelihoods.windows import PolicyEngine, WholeWindows
from megatron.objectives.masked_diffusion import MaskedDiffusion
from megatron.reporting.likelihood_records import comparison, comparisons, likelihood_tables
from megatron.reporting.resumable import ResumableEngine
from megatron.reporting.runs import load_runs
from megatron.scoring.answer_cache import AnswerCache
from megatron.training.launcher import main
from tests.conftest import environment, records
from tests.forked import run_script, start_script
from tests.generation.test_generate import model
from tests.likelihoods.chain_reference import MASK, SIZE
from tests.likelihoods.test_policies import NOISE, OneRank


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """A run of every objective, and one with document rules, on windows of 31 scored tokens."""
    root = tmp_path_factory.mktemp("runs")
    for name, flags in (
        ("ar", []),
        ("mdm", []),
        ("dual", ["--objective", "dual"]),
        ("any-order", ["--objective", "any-order"]),
        ("blocks", ["--objective", "block-diffusion", "--diffusion-block-size", "4"]),
        ("rules", ["--objective", "mdm", "--reset-attention-mask"]),
    ):
        main("mdm" if name == "mdm" else "ar", [*tiny, *flags, "--save", str(root / name)])
    shutil.copytree(root / "mdm" / "checkpoints" / "iter_0000012", root / "loose")
    return root


def command(*words, world_size: int = 1):
    return run_script(["tools/likelihoods.py", *map(str, words)], environment(), 300, world_size)


def record(tmp_path, *words, world_size: int = 1) -> dict[str, list[dict]]:
    """Return the likelihoods of each set."""
    done = command(*words, "--json", tmp_path / "record.json", world_size=world_size)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "record.json").read_text())
    return {name: results["likelihoods"] for name, results in content["sets"].items()}


def test_every_likelihood_of_a_run(runs, tmp_path):
    results = record(tmp_path, runs / "mdm", "--eval-windows", "4", "--num-orders", "4")["validation"]
    names = [result["name"] for result in results]
    orders = ("left-to-right", "right-to-left", "confidence", "margin", "entropy")
    mixture = ["mean over 4 orders", "iwae, 2 orders", "iwae, 4 orders", "tangent bound"]
    assert names == ["mdm, bound", *(f"chain, {order}" for order in orders), *mixture]
    assert [result["kind"] for result in results] == ["upper", *["exact"] * 5, "upper", "upper", "upper", "lower"]
    assert [result["passes"] for result in results] == [4, *[31] * 5, *[4 * 31] * 4]
    losses = [result["loss"] for result in results]
    assert losses[6] >= losses[7] >= losses[8] >= losses[9] and len({*losses[1:6]}) == 5
    assert results[0]["difference"] == 0 and results[1]["difference"] == pytest.approx(losses[1] - losses[0])
    shared = record(tmp_path, runs / "mdm", "--eval-windows", "4", "--num-orders", "4", world_size=2)["validation"]
    for result, other in zip(results, shared, strict=True):
        assert other["loss"] == pytest.approx(result["loss"], rel=1e-5)
        assert other["difference_se"] == pytest.approx(result["difference_se"], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("name", ["ar", "dual", "blocks"])
def test_losses_are_those_of_validation(runs, tmp_path, name):
    results = record(tmp_path, runs / name, "--eval-windows", "12", "--orders", "--num-orders", "0")
    for record_of_set in records(runs / name, "valid"):
        if record_of_set["iteration"] == 12:
            set_name, _, _ = record_of_set["set"].partition(".")
            losses = [result["loss"] for result in results[set_name]]
            assert pytest.approx(record_of_set["loss"], rel=1e-5) in losses


def test_several_tokens_a_step_and_blocks(runs, tmp_path):
    words = (runs / "mdm", "--eval-windows", "2", "--orders", "confidence", "--num-orders", "0")
    _, single = record(tmp_path, *words)["validation"]
    _, several = record(tmp_path, *words, "--tokens-per-step", "31")["validation"]
    _, blocks = record(tmp_path, *words, "--block-length", "1")["validation"]
    _, short_last = record(tmp_path, *words, "--block-length", "30")["validation"]  # a block of 30, and one of 1
    _, forward = record(
        tmp_path, runs / "mdm", "--eval-windows", "2", "--orders", "left-to-right", "--num-orders", "0"
    )["validation"]
    assert (single["passes"], several["passes"]) == (31, 1) and single["loss"] != several["loss"]
    assert short_last["passes"] == 31 and short_last["loss"] not in (single["loss"], several["loss"], blocks["loss"])
    assert blocks["loss"] == pytest.approx(forward["loss"], rel=1e-6)  # blocks of one token leave no choice


def test_an_any_order_model_reads_a_window_at_once(runs, tmp_path):
    """Left to right, steps of one token each equal the exact likelihood of the whole text in one pass."""
    words = (runs / "any-order", "--eval-windows", "12", "--orders", "left-to-right", "confidence")
    bound, forward, confident, mean, _, iwae, lower, exact = record(tmp_path, *words)["validation"]
    assert forward["loss"] == pytest.approx(exact["loss"], rel=1e-6) and exact["name"] == "ar, exact"
    assert [row["passes"] for row in (bound, forward, confident, mean)] == [4, 1, 31, 8]
    assert abs(mean["loss"] - bound["loss"]) < 4 * np.hypot(mean["mc_se"], bound["mc_se"])
    assert mean["loss"] >= iwae["loss"] >= lower["loss"] and iwae["mc_se"] > 0


def test_blocks_of_a_window_advance_together(runs, tmp_path):
    words = (runs / "blocks", "--eval-windows", "12", "--orders", "left-to-right")
    bound, forward, mean, half, full, lower = record(tmp_path, *words, "--num-orders", "8")["validation"]
    assert [row["passes"] for row in (bound, forward, mean)] == [4, 4, 32]
    assert abs(mean["loss"] - bound["loss"]) < 4 * np.hypot(mean["mc_se"], bound["mc_se"])
    assert mean["loss"] >= half["loss"] >= full["loss"] >= lower["loss"]


def without_times(path) -> dict:
    content = json.loads(path.read_text())
    for results in content["sets"].values():
        for likelihood in results["likelihoods"]:
            assert likelihood.pop("seconds") > 0
    return content


@pytest.mark.slow
def test_a_killed_command_resumes_to_the_bit(runs, tmp_path):
    """Killed twice in the middle of a chain; two ranks resume it as well, and share what one rank has computed."""
    words = ["tools/likelihoods.py", *map(str, (runs / "mdm", "--eval-windows", "12", "--orders", "confidence"))]
    whole, path, shared = (tmp_path / name for name in ("whole.json", "killed.json", "shared.json"))
    assert run_script([*words, "--json", str(whole)], environment(), 300).returncode == 0
    progress = tmp_path / "killed.json.progress_rank0.jsonl"
    for num_batches in (5, 10):
        outputs = [tmp_path / "stdout", tmp_path / "stderr"]
        (process,) = start_script([*words, "--json", str(path)], environment(), outputs, [{}])
        deadline = time.monotonic() + 60
        while not progress.exists() or progress.read_text().count("\n") < num_batches:
            assert process.is_alive() and time.monotonic() < deadline, outputs[1].read_text()
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert not path.exists() and progress.exists()
    shutil.copy(progress, tmp_path / "shared.json.progress_rank0.jsonl")
    assert run_script([*words, "--json", str(path)], environment(), 300).returncode == 0
    assert without_times(path) == without_times(whole)
    assert run_script([*words, "--json", str(shared)], environment(), 300, 2).returncode == 0
    assert sorted(file.name for file in tmp_path.glob("*.json*")) == ["killed.json", "shared.json", "whole.json"]
    for name, results in without_times(shared)["sets"].items():
        losses = [likelihood["loss"] for likelihood in results["likelihoods"]]
        expected = [likelihood["loss"] for likelihood in without_times(whole)["sets"][name]["likelihoods"]]
        assert losses == pytest.approx(expected, rel=1e-9)


def test_a_stored_result_is_read_to_the_bit_for_its_batch_and_settings_only(tmp_path):
    """A model with other weights returns what the first one stored, unless anything differs."""
    ids, path = np.array([[1, 0, 2, 2, 0], [2, 2, 1, 0, 1]]), str(tmp_path / "progress")
    whole = WholeWindows(MaskedDiffusion(MASK, 1))
    batch, other_batch = (whole.evaluation(rows, NOISE, np.arange(2), "common") for rows in (ids, ids[::-1]))
    first, other = (
        PolicyEngine(MaskedChains(model(SIZE, init_method_std=std)), OneRank(), Sampling()) for std in (0.3, 0.6)
    )
    stored = ResumableEngine(first, AnswerCache(path, 0, {"step": 1}), "chain").nll(batch)
    assert torch.equal(stored, first.nll(batch))
    cache = AnswerCache(path, 1, {"step": 1})
    assert torch.equal(ResumableEngine(other, cache, "chain").nll(batch), stored)
    computed = other.nll(batch)
    assert torch.equal(ResumableEngine(other, cache, "iwae").nll(batch), computed) and not torch.equal(computed, stored)
    assert torch.equal(ResumableEngine(other, AnswerCache(path, 2, {"step": 2}), "chain").nll(batch), computed)
    assert torch.equal(ResumableEngine(other, cache, "chain").nll(other_batch), other.nll(other_batch))


def test_a_record_is_in_the_run_folder_and_in_its_report(runs):
    done = command(runs / "blocks", "--eval-windows", "4", "--orders", "confidence", "--num-orders", "0")
    path = runs / "blocks" / "likelihoods" / "12.json"
    assert done.returncode == 0 and f"record: {path}" in done.stdout
    assert [file.name for file in path.parent.iterdir()] == ["12.json"]
    (tuning, validation) = likelihood_tables(load_runs([runs / "blocks"]))
    assert validation.title == "Likelihoods of blocks at step 12: validation, 4 windows" and "tuning" in tuning.title
    name, loss, *_ = validation.lines[1]
    assert name == "chain, confidence" and loss in done.stdout
    path.write_text("{}")
    with pytest.raises(ConfigurationError, match="12.json: is no record of tools/likelihoods.py"):
        likelihood_tables(load_runs([runs / "blocks"]))


def test_differences_to_another_run_are_paired_by_document(runs):
    settings = ("--eval-windows", "12", "--num-orders", "0", "--orders")
    baseline, other = (runs / name / "likelihoods" / "12.json" for name in ("ar", "mdm"))
    assert command(runs / "ar", *settings[:2]).returncode == 0
    done = command(runs / "mdm", *settings, "--against", baseline)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads(path.read_text()) for path in (baseline, other))
    exact, bound = (record["sets"]["validation"] for record in (first, second))
    tokens, documents = np.array(exact["documents"]["tokens"]), len(exact["documents"]["indices"])
    nats = np.array(bound["likelihoods"][0]["nats"]) - np.array(exact["likelihoods"][0]["nats"])
    difference = bound["likelihoods"][0]["loss"] - exact["likelihoods"][0]["loss"]
    assert nats.sum() / tokens.sum() == pytest.approx(difference) and documents > 1
    error = np.sqrt(documents / (documents - 1) * ((nats - difference * tokens) ** 2).sum()) / tokens.sum()
    *_, table = likelihood_tables(load_runs([runs / "ar", runs / "mdm"]))
    assert table.title == "Likelihoods on the same windows: validation, 12 windows"
    (run, name, _, zero), (other_run, other_name, loss, cell) = table.lines
    assert (run, name, zero) == ("ar at step 12", "ar, exact", "+0.0000 ± 0.0000")
    assert (other_run, other_name, cell) == ("mdm at step 12", "mdm, bound", f"<= {difference:+.4f} ± {error:.4f}")
    (back,) = [table.lines[-1][-1] for table in comparisons(second, [first]) if "validation" in table.title]
    assert back == f">= {-difference:+.4f} ± {error:.4f}"  # of the exact loss to the bound
    assert loss in done.stdout and f"{cell}\n" in done.stdout and "difference to ar, exact" in done.stdout
    for results in first["sets"].values():
        results["documents"]["tokens"][0] += 1
    with pytest.raises(ConfigurationError, match="ar at step 12: has no set of the same scored tokens"):
        comparison(second, first)


def test_likelihoods_of_other_tokens_have_no_difference(runs, tmp_path):
    """The published alignment scores tokens 1..S of AR, 0..S-1 of masked diffusion, and 1..S-1 of dual's."""
    settings = "--eval-windows 4 --orders left-to-right --num-orders 0 --eval-alignment published".split()
    path, against = tmp_path / "dual.json", tmp_path / "mdm.json"
    assert command(runs / "mdm", *settings, "--json", against).returncode == 0
    done = command(runs / "dual", *settings, "--json", path, "--against", against)
    assert done.returncode == 2 and "mdm at step 12: has no set of the same scored tokens" in done.stderr
    dual = json.loads(path.read_text())
    exact, bound, chain = dual["sets"]["validation"]["likelihoods"]
    assert exact["difference"] == 0 and len(exact["nats"]) == len(dual["sets"]["validation"]["documents"]["tokens"])
    for result in (bound, chain):
        assert result["loss"] > 0 and result["difference"] is result["difference_se"] is result["nats"] is None
    assert {line[1] for table in comparisons(dual, [dual]) for line in table.lines} == {"ar, exact"}
    common = record(tmp_path, runs / "dual", *settings[:-2])["validation"]
    assert all(result["difference"] is not None for result in common)


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["ar", "--orders", "margin"],
            "ar: predicts the next token, from left to right, and has no choice of orders; leave out --orders",
        ),
        (["rules"], "rules: was trained with document rules, which unmasking one token after another does not have"),
        (["mdm", "--tokens-per-step", "32"], "--tokens-per-step 32: is more than the 31 scored tokens of a window"),
        (["blocks", "--tokens-per-step", "5"], "--tokens-per-step 5: is more than the 4 tokens of a block; give less"),
        (["blocks", "--block-length", "3"], "--block-length 3: does not divide the 4 tokens of a block"),
        (["loose"], "loose: is in no run folder, which would hold the record; give --json FILE"),
        (["mdm", "--num-orders", "3"], "--num-orders 3: is an even number, or 0"),
        (["mdm", "--against", "setup.py"], "setup.py: "),
        (["mdm", "--eval-samples", "5"], "--eval-samples: --eval-windows is the number of windows here; give that"),
        (["mdm", "--lr", "1"], "--lr 1.0: is neither a flag of data nor of validation"),
    ],
)
def test_what_does_not_fit_is_refused(runs, words, message):
    done = command(runs / words[0], *words[1:])
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_a_record_that_cannot_be_written_is_reported_before_the_evaluation(runs, tmp_path):
    done = command(runs / "mdm", "--json", tmp_path)
    assert done.returncode == 1 and f"error: {tmp_path}: could not be written (Is a directory)" in done.stderr
