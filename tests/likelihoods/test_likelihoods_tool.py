"""tools/likelihoods.py on real runs: equal to validation, equal over ranks, ordered as theory says; what it refuses."""

import json

import pytest

from megatron.training.launcher import main
from tests.conftest import environment, records
from tests.forked import run_script


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """A run of AR, of masked diffusion, of both, and with document rules, on windows of 31 scored tokens."""
    root = tmp_path_factory.mktemp("runs")
    for name, flags in (
        ("ar", []),
        ("mdm", []),
        ("dual", ["--objective", "dual"]),
        ("rules", ["--objective", "mdm", "--reset-attention-mask"]),
    ):
        main("mdm" if name == "mdm" else "ar", [*tiny, *flags, "--save", str(root / name)])
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


@pytest.mark.parametrize("name", ["ar", "dual"])
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
    _, forward = record(
        tmp_path, runs / "mdm", "--eval-windows", "2", "--orders", "left-to-right", "--num-orders", "0"
    )["validation"]
    assert (single["passes"], several["passes"]) == (31, 1) and single["loss"] != several["loss"]
    assert blocks["loss"] == pytest.approx(forward["loss"], rel=1e-6)  # blocks of one token leave no choice


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["ar", "--orders", "margin"],
            "ar: predicts the next token, from left to right, and has no choice of orders; leave out --orders",
        ),
        (["rules"], "rules: was trained with document rules, which unmasking one token after another does not have"),
        (["mdm", "--tokens-per-step", "32"], "--tokens-per-step 32: is more than the 31 scored tokens of a window"),
        (["mdm", "--block-length", "4"], "--block-length 4: does not divide the 31 scored tokens of a window"),
        (["mdm", "--num-orders", "3"], "--num-orders 3: is an even number, or 0"),
        (["mdm", "--lr", "1"], "--lr 1.0: is neither a flag of data nor of validation"),
    ],
)
def test_what_does_not_fit_is_refused(runs, words, message):
    done = command(runs / words[0], *words[1:])
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
