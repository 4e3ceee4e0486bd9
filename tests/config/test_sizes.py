"""The ladder against the published table, to its rounding, and the FLOPs conventions."""

import json

import pytest

from megatron.config.resolve import resolve
from megatron.config.sections import ModelConfig
from megatron.config.sizes import (
    BEST_ON_100M,
    COMPUTE_OPTIMAL,
    LADDER,
    flops_per_token,
    ladder_model,
    non_embedding_count,
    parameter_count,
    published_count,
)
from megatron.config.subsets import DATA_VALUE_EPOCHS, DATA_VALUE_TOKENS, UNIQUE_TOKENS
from megatron.config.vocabulary import Vocabulary
from megatron.errors import ConfigurationError
from megatron.objectives.registry import capabilities
from megatron.training.command_line import parse
from tests.conftest import ROOT, run

GPT2 = Vocabulary(50257)
# name: hidden size of the MLP; parameters by the published scripts, all and non-embedding ones, in millions
PUBLISHED = {
    "7M": (320, 7.0, 7.0, 0.6),
    "14M": (576, 13.6, 13.6, 2.4),
    "20M": (768, 19.5, 19.1, 4.6),
    "35M": (1152, 36.6, 34.2, 11.7),
    "44M": (1344, 50.7, 50.7, 24.9),
    "57M": (1536, 64.8, 64.8, 35.8),
    "74M": (1664, 80.5, 80.5, 48.3),
    "90M": (1664, 95.0, 95.0, 62.8),
    "106M": (1664, 109.6, 109.5, 77.4),
    "117M": (2048, 123.6, 123.6, 85.0),
    "140M": (2048, 144.8, 144.8, 106.2),
    "163M": (2048, 166.1, 166.1, 127.4),
    "175M": (2368, 179.2, 179.2, 134.1),
    "196M": (2368, 198.3, 198.3, 153.3),
    "217M": (2368, 217.5, 217.5, 172.4),
    "251M": (2688, 250.8, 250.8, 199.3),
    "278M": (2688, 275.7, 275.7, 224.2),
    "306M": (2688, 300.6, 300.6, 249.1),
    "425M": (3392, 416.9, 416.9, 352.5),
    "489M": (3392, 475.6, 475.6, 411.2),
    "509M": (3712, 495.9, 495.8, 425.0),
    "552M": (3392, 534.4, 534.3, 470.0),
    "587M": (3712, 566.7, 566.7, 495.9),
    "632M": (4096, 615.3, 615.2, 538.0),
    "664M": (3712, 637.6, 637.5, 566.7),
    "724M": (4096, 700.3, 700.2, 622.9),
    "816M": (4096, 785.2, 785.1, 707.9),
    "893M": (4736, 856.4, 856.3, 766.2),
    "1018M": (4736, 971.3, 971.3, 881.1),
    "1143M": (4736, 1086.3, 1086.2, 996.0),
    "1266M": (5440, 1207.6, 1207.5, 1104.5),
    "1424M": (5760, 1353.6, 1353.5, 1244.0),
    "1429M": (5440, 1358.2, 1358.1, 1255.1),
    "1593M": (5440, 1508.9, 1508.8, 1405.7),
    "1609M": (5760, 1523.2, 1523.1, 1413.6),
    "1731M": (6144, 1644.9, 1644.8, 1528.9),
    "1794M": (5760, 1692.9, 1692.7, 1583.3),
    "2007M": (6144, 1899.8, 1899.7, 1783.8),
    "2283M": (6144, 2154.7, 2154.5, 2038.6),
    "2298M": (6784, 2165.3, 2165.1, 2036.3),
    "2639M": (6784, 2478.6, 2478.4, 2349.6),
    "2980M": (6784, 2791.9, 2791.7, 2662.9),
    "3530M": (7168, 3257.0, 3256.8, 3121.5),
    "3802M": (7488, 3561.3, 3561.1, 3419.4),
    "4084M": (7808, 3879.2, 3878.9, 3730.9),
    "4516M": (8192, 4231.9, 4231.6, 4077.1),
    "6796M": (9536, 6337.4, 6337.0, 6156.7),
    "9293M": (10880, 8640.6, 8640.1, 8434.0),
    "11452M": (11584, 10889.0, 10678.9, 10460.0),
    "12295M": (12288, 11444.2, 11443.6, 11211.8),
    "12569M": (12288, 12208.7, 11764.5, 11532.7),
    "13735M": (12928, 13560.0, 12857.0, 12612.3),
    "14940M": (13312, 14905.3, 14027.9, 13776.8),
    "16183M": (13632, 15028.3, 15027.6, 14770.0),
}


def test_the_ladder_has_the_published_sizes():
    assert list(LADDER) == list(PUBLISHED) and len(LADDER) == 54


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_equal_the_published_table(name):
    model, (width, published, whole, inner) = ladder_model(name), PUBLISHED[name]
    assert model.mlp_size == width
    assert published_count(model) / 1e6 == pytest.approx(published, abs=0.051)
    assert parameter_count(model, GPT2) / 1e6 == pytest.approx(whole, abs=0.051)
    assert non_embedding_count(model, GPT2) / 1e6 == pytest.approx(inner, abs=0.051)


def test_flops_by_every_convention():
    model = ModelConfig(num_layers=2, hidden_size=8, num_attention_heads=2, kv_channels=6, ffn_hidden_size=64)
    flops = flops_per_token(model, Vocabulary(100), seq_length=10)
    # one block: q, k, v, o of 8 x 12, three matrices of 8 x 64, attention over 10 positions of 12
    products = 2 * (4 * 96 + 3 * 512 + 2 * 120) + 128 * 8
    assert flops["hardware"] == 6 * products
    weights = 2 * (4 * 96 + 3 * 512 + 16) + 8
    assert flops["6nd_no_embedding"] == 6 * weights and flops["6nd"] == 6 * (weights + 128 * 8)
    assert flops["6nd_published"] == 6 * (2 * (4 * 64 + 3 * 512 + 48) + 50257 * 8)


@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_the_published_budgets(objective):
    """50 and 500 epochs of 100M tokens are 2,440,244 and 24,402,441 samples; 4.34e18 and 1.25e20 FLOPs."""
    size, epochs, _ = BEST_ON_100M[objective]
    config = parse(objective, f"--model-size {size} --train-epochs {epochs} --train-data-path data".split())
    plan = resolve(config, GPT2, UNIQUE_TOKENS["100M"], capabilities(config.objective.objective))
    samples, steps, flops = {"ar": (2440244, 9532 + 1, 4.34e18), "mdm": (24402441, 95322 + 1, 1.25e20)}[objective]
    # the published runs drop a short last batch; here it is trained on
    assert (plan.train_samples, plan.steps) == (samples, steps)
    assert plan.train_samples * 2048 * 6 * published_count(config.model) == pytest.approx(flops, rel=2e-3)
    assert {size for (named, _), size in COMPUTE_OPTIMAL.items() if named == objective} <= set(LADDER)


@pytest.mark.parametrize("key", DATA_VALUE_TOKENS)
def test_the_sets_of_a_compute_scale_spend_it(key):
    """At the optimal size the epochs over each set take the given compute in 6ND, up to whole documents."""
    (_, flops), sets = key, DATA_VALUE_TOKENS[key]
    size = published_count(ladder_model(COMPUTE_OPTIMAL[key]))
    assert len(sets) == len(DATA_VALUE_EPOCHS)
    for epochs, tokens in zip(DATA_VALUE_EPOCHS, sets):
        assert tokens is None or 6 * size * tokens * epochs == pytest.approx(flops, rel=5e-3)


@pytest.mark.parametrize("name", LADDER)
def test_every_size_resolves(name):
    config = parse("mdm", f"--model-size {name} --train-flops 1e19 --train-data-path data".split())
    plan = resolve(config, GPT2, 10**8, capabilities(config.objective.objective))
    assert config.model.hidden_size == LADDER[name][1] and config.model.kv_channels == LADDER[name][3]
    assert plan.train_samples == int(1e19 / (6 * plan.parameters * 2048))


def test_explicit_flags_win_and_a_name_off_the_ladder_is_refused():
    flags = "--train-iters 1 --train-data-path data --model-size".split()
    config = parse("ar", [*flags, "140M", "--num-layers", "1"])
    assert (config.model.num_layers, config.model.hidden_size, config.model.model_size) == (1, 768, "140M")
    assert parse("ar", [*flags[:-1], "--model-size=20M"]).model.head_size == 32
    with pytest.raises(ConfigurationError, match="--model-size 150M: is not on the ladder; the nearest is 140M"):
        parse("ar", [*flags, "150M"])


def test_dry_run_says_what_a_run_amounts_to(tiny):
    dry_run = json.loads(run("mdm", *tiny, "--train-unique-tokens", 400, "--dry-run").stdout)
    amounts = dry_run["plan"]
    assert (amounts["train_samples"], amounts["steps"], amounts["train_tokens"]) == (93, 12, 93 * 32)
    assert amounts["epochs"] == pytest.approx(93 * 32 / 400)
    assert amounts["flops"]["6nd"] == 6 * amounts["parameters"] * 93 * 32


@pytest.mark.parametrize("width", [128, 768, pytest.param(1280, marks=pytest.mark.slow)])
def test_five_steps_of_one_layer(width, tiny, tmp_path):
    size = {128: "7M", 768: "140M", 1280: "425M"}[width]
    small = [flag for flag in tiny if flag not in ("--num-layers", "--hidden-size", "--num-attention-heads", "2", "32")]
    small[small.index("--seq-length") : small.index("--seq-length") + 1] = ["--seq-length", "32"]
    small[small.index("--train-samples") + 1] = "40"
    run("mdm", *small, "--model-size", size, "--num-layers", 1, "--save", tmp_path)
    assert json.loads((tmp_path / "status.json").read_text())["iteration"] == 5


@pytest.mark.parametrize("words", ["--train-flops nan", "--train-flops -5", "--train-flops 0", "--unique-tokens 0"])
def test_the_tool_refuses_what_is_no_amount(words, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "tools")
    from sizes import main

    monkeypatch.setattr("sys.argv", ["sizes.py", *words.split()])
    with pytest.raises(SystemExit) as ended:
        main()
    output, error = capsys.readouterr()
    assert ended.value.code == 2 and not output
    assert error.startswith(f"error: {words.split()[0]}") and error.count("\n") == 1


def test_every_use_of_a_block_is_counted():
    """A model with loops computes as much per token as an unrolled one, and has fewer parameters."""
    shape = {"hidden_size": 8, "num_attention_heads": 2}
    looped = ModelConfig(num_layers=4, num_loops=3, loop_layers="1-2", **shape)
    unrolled, plain = ModelConfig(num_layers=8, **shape), ModelConfig(num_layers=4, **shape)
    assert flops_per_token(looped, GPT2, 10) == flops_per_token(unrolled, GPT2, 10)
    assert parameter_count(looped, GPT2) == parameter_count(plain, GPT2)
