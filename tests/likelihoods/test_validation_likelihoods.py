"""--skip-train with --likelihood: equal to tools/likelihoods.py, under its own name, data-parallel; what it refuses."""

import json

import pytest

from megatron.errors import ConfigurationError
from megatron.likelihoods.pretrain import main
from megatron.parallel.mesh import destroy_parallel, initialize_parallel
from megatron.reporting.likelihoods import Policies, evaluate_likelihoods
from megatron.training.launcher import main as train
from megatron.training.load_run import open_trained
from tests.conftest import environment, records
from tests.forked import run_script


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """Runs on windows of 31 scored tokens; blocks of 8."""
    root = tmp_path_factory.mktemp("runs")
    for name, flags in (
        ("ar", []),
        ("mdm", ["--ema-decay", "0.9"]),
        ("dual", ["--objective", "dual"]),
        ("any-order", ["--objective", "any-order"]),
        ("blocks", ["--objective", "block-diffusion", "--diffusion-block-size", "8"]),
        ("rules", ["--objective", "mdm", "--reset-attention-mask"]),
    ):
        train(
            "mdm" if name == "mdm" else "ar",
            [*tiny, "--train-samples", "16", "--eval-samples", "4", *flags, "--save", str(root / name)],
        )
    return root


def evaluated(capsys, run, *flags) -> dict[str, dict]:
    """Return the records of an evaluation by the name of their set."""
    capsys.readouterr()
    main("mdm", ["--skip-train", "--load", str(run), "--eval-samples", "4", *flags])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return {record["set"]: record for record in lines}


def likelihoods(run, *flags, **policies) -> dict[str, dict]:
    """Return the same likelihoods on the set "validation" from tools/likelihoods.py, by name."""
    trained = open_trained(str(run), "latest", flags)
    ranks = initialize_parallel()
    policies = {"orders": (), "tokens_per_step": 1, "block_length": None, "num_orders": 0} | policies
    record = evaluate_likelihoods(trained, Policies(**policies), ranks, windows=4)
    destroy_parallel()
    return {result["name"]: result for result in record["sets"]["validation"]["likelihoods"]}


@pytest.mark.parametrize("name, inner", [("mdm", ""), ("dual", ".mdm"), ("any-order", ""), ("blocks", "")])
def test_a_chain_is_that_of_the_tool(runs, capsys, name, inner):
    flags = ("--likelihood", "chain", "--chain-order", "confidence", "--tokens-per-step", "3")
    results = evaluated(capsys, runs / name, *flags)
    averages = {"validation.chain.average", "tuning.chain.average"} if name == "mdm" else set()
    assert results.keys() - averages == {f"tuning{inner}.chain", f"validation{inner}.chain"}
    record = results[f"validation{inner}.chain"]
    expected = likelihoods(runs / name, orders=("confidence",), tokens_per_step=3)["chain, confidence"]
    assert record["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert record["likelihood"].endswith(" chain") and not record["bound"]
    assert record["chain_order"] == "confidence" and record["tokens_per_step"] == 3 and record["num_mc"] == 1
    assert averages <= results.keys()


def test_a_random_order_has_the_seed_of_the_evaluation(runs, capsys):
    flags = ("--likelihood", "chain", "--chain-order", "random", "--tokens-per-step", "4", "--eval-seed")
    losses = []
    for seed in ("1", "7"):
        losses.append(evaluated(capsys, runs / "blocks", *flags, seed)["validation.chain"]["loss"])
        expected = likelihoods(runs / "blocks", "--eval-seed", seed, orders=("random",), tokens_per_step=4)
        assert losses[-1] == pytest.approx(expected["chain, random"]["loss"], rel=1e-6)
    assert losses[0] != losses[1]


@pytest.mark.parametrize("name", [pytest.param("mdm", marks=pytest.mark.slow), "blocks"])
def test_iwae_is_that_of_the_tool(runs, capsys, name):
    record = evaluated(capsys, runs / name, "--likelihood", "iwae", "--num-orders", "8")["validation.iwae"]
    expected = likelihoods(runs / name, num_orders=8)
    assert record["loss"] == pytest.approx(expected["iwae, 8 orders"]["loss"], rel=1e-6)
    assert record["loss_of_half_the_orders"] == pytest.approx(expected["iwae, 4 orders"]["loss"], rel=1e-6)
    assert record["mc_se"] == pytest.approx(expected["iwae, 8 orders"]["mc_se"], rel=1e-5)
    assert record["likelihood"].endswith(" iwae") and record["bound"] and record["num_orders"] == 8


def test_the_bound_is_that_of_validation(runs, capsys):
    record = evaluated(capsys, runs / "mdm", "--likelihood", "bound")["validation"]
    recorded = [line for line in records(runs / "mdm", "valid") if line["set"] == "validation"][-1]
    assert record["loss"] == pytest.approx(recorded["loss"], rel=1e-6) and record["likelihood"] == "mdm"


def test_ranks_share_the_windows(runs, capsys):
    flags = ("--likelihood", "chain", "--chain-order", "margin", "--tokens-per-step", "8")
    expected = evaluated(capsys, runs / "mdm", *flags)
    words = ["pretrain_mdm.py", "--skip-train", "--load", str(runs / "mdm"), "--eval-samples", "4", *flags]
    done = run_script(words, environment(), 300, 2)
    assert done.returncode == 0, done.stderr
    shared = [json.loads(line) for line in done.stdout.splitlines()]
    assert {record["set"] for record in shared} == expected.keys()
    for record in shared:
        assert record["loss"] == pytest.approx(expected[record["set"]]["loss"], rel=1e-5)


@pytest.mark.parametrize(
    "name, flags, message",
    [
        ("ar", "--likelihood chain", "--likelihood chain: acts on models that have a choice of orders, and this one"),
        ("rules", "--likelihood iwae", "--likelihood iwae: unmasking one token after another has no document rules"),
        (
            "mdm",
            "--likelihood chain --tokens-per-step 32",
            "--tokens-per-step 32: is more than the 31 scored tokens of a window; give less",
        ),
        (
            "blocks",
            "--likelihood chain --tokens-per-step 9",
            "--tokens-per-step 9: is more than the 8 tokens of a block; give less",
        ),
        (
            "blocks",
            "--likelihood chain --block-length 3",
            "--block-length 3: does not divide the 8 tokens of a block; give a divisor, or leave it out",
        ),
        ("mdm", "--chain-order margin", "--chain-order margin: does nothing without --likelihood chain; give both"),
    ],
)
def test_what_does_not_fit_is_refused(runs, capsys, name, flags, message):
    with pytest.raises(SystemExit) as caught:
        evaluated(capsys, runs / name, *flags.split())
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert f"error: {message}" in error and "Traceback" not in error


def test_a_model_ensemble_refuses_it(runs):
    from megatron.reporting.ensemble import settings

    with pytest.raises(ConfigurationError, match="--likelihood chain: acts in --skip-train of pretrain_"):
        settings(str(runs / "mdm"), ["--likelihood", "chain"])
