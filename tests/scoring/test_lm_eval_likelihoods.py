"""Runs of every objective as lm-eval's model: likelihoods of policies, and answers cached by policy."""

import json

import pytest
from lm_eval.api.instance import Instance

from megatron.errors import ConfigurationError
from megatron.scoring.lm_eval_adapter import MegatronLM, doc_key
from megatron.scoring.requests import Request, Scoring
from megatron.scoring.score import score
from megatron.training.launcher import main as train

pytestmark = pytest.mark.slow
PAIRS = [("def f(", "x):"), ("def f(", "y, z):"), ("import ", "os")]
CHAIN = {"likelihood": "chain", "chain_order": "margin", "tokens_per_step": 2}


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for name, flags in (
        ("any-order", []),
        ("block-diffusion", ["--diffusion-block-size", "4"]),
        ("dual", []),
        ("targets", ["--target-positions"]),
    ):
        objective = [] if name == "targets" else ["--objective", name]
        train("ar", [*tiny, "--train-samples", "16", *objective, *flags, "--save", str(root / name)])
    return root


def instances(pairs=PAIRS, kind="loglikelihood"):
    return [Instance(kind, {"pair": pair}, pair, 0, ("task", index, 1)) for index, pair in enumerate(pairs)]


@pytest.mark.parametrize(
    "name, settings",
    [
        ("any-order", {}),
        ("any-order", {"likelihood": "iwae", "num_orders": 4}),
        ("targets", {}),
        ("block-diffusion", {}),
        ("block-diffusion", CHAIN),
        ("dual", {}),
        ("dual", CHAIN),
    ],
)
def test_requests_have_the_likelihood_of_the_settings(runs, name, settings):
    lm = MegatronLM(pretrained=str(runs / name), **settings)
    ids = [lm._encode_pair(*pair) for pair in PAIRS]
    keys = [doc_key(instance) for instance in instances()]
    requests = [Request(*pair, key) for pair, key in zip(ids, keys, strict=True)]
    options = {"eod": lm.eot_token_id, "seq_length": lm.max_length}
    expected = score(lm.model, lm.trained.config.objective, requests, Scoring(**settings), **options)
    for (value, is_greedy), result in zip(lm.loglikelihood(instances()), expected, strict=True):
        assert value == pytest.approx(result.log_likelihood, abs=1e-3) and is_greedy == result.is_greedy
    text = "x = [i for i in range(10)]; y = sum(x) / len(x)"  # longer than a window of 32 bytes
    (rolling,) = lm.loglikelihood_rolling(instances([(text,)], "loglikelihood_rolling"))
    assert rolling < -40
    info = lm.get_model_info()
    assert info["forward_tokens"] > 0 and info["objective"] == lm.objective
    assert ("likelihood" in info) == (settings != {} or name == "block-diffusion")
    assert all(info[setting] == value for setting, value in settings.items())


def test_answers_are_cached_by_policy(runs, tmp_path):
    file = tmp_path / "answers_rank0.jsonl"

    def answers(**settings):
        lm = MegatronLM(pretrained=str(runs / "block-diffusion"), use_cache=str(tmp_path / "answers"), **settings)
        return lm.loglikelihood(instances())

    first, second = answers(**CHAIN), answers(**CHAIN | {"tokens_per_step": 1})
    written = file.read_text()
    assert first != second and len({json.loads(line)["key"] for line in written.strip().splitlines()}) == 6
    assert answers(**CHAIN) == first and file.read_text() == written


def test_the_earlier_name_of_the_likelihood_is_read(runs):
    assert MegatronLM(pretrained=str(runs / "dual"), method="chain").scoring.likelihood == "chain"
    with pytest.raises(ConfigurationError, match="--tokens-per-step 5: is more than the 4 tokens of a block"):
        MegatronLM(pretrained=str(runs / "block-diffusion"), likelihood="chain", tokens_per_step=5)
