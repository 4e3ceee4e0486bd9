"""The 18 published argument lists, unchanged: each means the published configuration, field by field."""

import json
import logging
import sys
from dataclasses import asdict

import pytest

from megatron.config.layout_checks import check_batch, check_layout
from megatron.config.resolve import resolve
from megatron.config.vocabulary import Vocabulary
from megatron.objectives.registry import capabilities
from megatron.parallel.deepspeed_config import deepspeed_config
from megatron.scoring.lm_eval_arguments import read_arguments
from megatron.training.command_line import parse, parse_run
from tests.config.published_lists import (
    ABSENT,
    DOWNSTREAM,
    OFFLOAD,
    QUICKSTART,
    SCRIPTS,
    published_configuration,
)

GPUS = 8


def by_field(config) -> dict:
    """Return the values of a configuration, whose fields have different names in all sections."""
    return {name: value for section in asdict(config).values() for name, value in section.items()}


def test_there_are_18_lists():
    assert len(SCRIPTS) + len(DOWNSTREAM) == 18


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_list_with_the_published_recipe_is_the_published_configuration(name, tmp_path):
    script = SCRIPTS[name]
    config = parse(script.objective, [*script.flags(tmp_path), "--recipe", "published"])
    values, expected = by_field(config), published_configuration(script, tmp_path) | ABSENT
    assert {field: values[field] for field in expected} == expected
    assert set(values) == set(expected), "a new flag: what is its value in the published system?"
    plan = resolve(config, Vocabulary(50257), script.unique_tokens, capabilities(config.objective.objective))
    assert (plan.train_samples, plan.lr_warmup_samples) == (script.samples, script.warmup)
    assert (plan.eval_interval, plan.save_interval) == (1 if script.evaluates else 1000, 1000)


@pytest.mark.parametrize("name", ["quickstart/train_mdm", "training/mdm/data_value"])
def test_a_flag_of_another_value_is_noticed(name, tmp_path):
    """The comparison above would fail if a list had another value."""
    script = SCRIPTS[name]
    expected = published_configuration(script, tmp_path)
    for flag, value in (("--adam-beta2", "0.999"), ("--min-lr", "1e-5"), ("--lr-warmup-samples", "7")):
        config = parse(script.objective, [*script.flags(tmp_path), "--recipe", "published", flag, value])
        differing = [
            field for field, value in by_field(config).items() if field in expected and expected[field] != value
        ]
        assert differing == [flag.removeprefix("--").replace("-", "_")]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_list_becomes_a_plan_with_its_deepspeed_file(name, tmp_path):
    script = SCRIPTS[name]
    config = parse(script.objective, script.flags(tmp_path))
    check_layout(config, GPUS)
    check_batch(config, GPUS, capabilities(config.objective.objective))
    parallel = config.parallel
    settings = deepspeed_config(
        parallel.deepspeed_config,
        config.training,
        config.optimizer,
        world_size=GPUS,
        bf16=True,
        zero_stage=parallel.zero_stage,
        cpu_offload=parallel.cpu_offload,
    )
    offloaded = {"offload_optimizer": OFFLOAD, "contiguous_gradients": True, "overlap_comm": True}
    assert settings["zero_optimization"] == ({"stage": 1} | offloaded if script.multi_node else {"stage": 0})


# what the published scorers compute, by field
SOURCE = {"checkpoint": "latest", "average": False, "dtype": "float32", "records": None}
SCORING = {
    "downstream/downstream_arm": {},
    "downstream/downstream_mdm": {"likelihood": "chain"},
    "downstream/downstream_mdm_mc": {"likelihood": "bound", "num_mc": 32, "only_mc_nll": True},
    "downstream/downstream_mdm_onlygen": {"only_generate": True},
}
DEFAULTS = {"likelihood": None, "chain_order": "left-to-right", "num_mc": 32, "eval_seed": 0, "cfg": 0.0}
DEFAULTS |= {"tokens_per_step": 1, "block_length": None, "num_orders": 8, "only_mc_nll": False, "only_generate": False}
# the published scorers take all samples of every choice, in batches of 32 sequences
OWN = {"decide_at", "batch_tokens", "batch_rows"}


@pytest.mark.parametrize("name", DOWNSTREAM)
def test_a_downstream_list_is_the_published_scoring(name, tmp_path, monkeypatch):
    from megatron.scoring.lm_eval_cli import read  # imports lm-eval

    monkeypatch.setattr(sys, "argv", ["lm-eval"])
    script = DOWNSTREAM[name]
    trained = QUICKSTART[script.objective]
    config = parse(script.objective, [*trained.flags(tmp_path), "--recipe", "published"])
    recorded = {"objective_name": script.objective, "precision": "bf16", **asdict(config)}
    run = tmp_path / "recorded"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(recorded))
    options = read(script.flags(tmp_path, str(run)))
    assert (options.tasks, options.output_path) == (script.tasks.split(","), script.results)
    assert options.num_fewshot in (None, 0) and options.limit is None
    source, scoring = map(asdict, read_arguments(options.model_args))
    assert source == SOURCE | {"pretrained": str(run)}
    assert {field: value for field, value in scoring.items() if field not in OWN} == DEFAULTS | SCORING[name]


# ------------------------------------------------------- differences without --recipe published


def published_line(caplog, objective, flags) -> str | None:
    """Return the line that lists the defaults that are not published."""
    caplog.clear()
    with caplog.at_level(logging.INFO, "megatron"):
        parse_run(objective, flags)
    lines = [line for line in caplog.messages if line.startswith("without --recipe published")]
    assert len(lines) <= 1
    return lines[0] if lines else None


def test_one_line_lists_the_defaults_that_are_not_published(caplog, tmp_path):
    flags = SCRIPTS["quickstart/train_mdm"].flags(tmp_path)
    assert published_line(caplog, "mdm", flags) == (
        "without --recipe published, defaults differ from the published system's: --no-softmax-over-padding "
        "(published: on), --attention-dropout 0.0 (published: 0.1), --hidden-dropout 0.0 (published: 0.1), "
        "--embedding-dropout 0.0 (published: 0.1), --epoch-order documents (published: megatron), --num-workers 0 "
        "(published: 2), --mask-times stratified (published: iid), --eval-alignment common (published: published), "
        "--num-mc 4 (published: 1)"
    )
    given = "--softmax-over-padding --attention-dropout 0 --hidden-dropout 0.1 --embedding-dropout=0.1 --num-mc 1"
    rest = published_line(caplog, "mdm", [*flags, *given.split(), "--epoch-order", "megatron", "--num-workers", "2"])
    assert rest.endswith(": --mask-times stratified (published: iid), --eval-alignment common (published: published)")
    everything = [*given.split(), "--epoch-order", "windows", "--num-workers", "2", "--eval-alignment", "published"]
    assert published_line(caplog, "ar", [*flags, *everything]) is None  # AR draws no mask times
    assert published_line(caplog, "mdm", [*flags, "--recipe", "published"]) is None


def test_an_evaluation_differs_in_what_it_evaluates_only(caplog, tmp_path):
    line = published_line(caplog, "mdm", SCRIPTS["quickstart/eval_mdm"].flags(tmp_path))
    assert line.endswith(": --no-softmax-over-padding (published: on), --eval-alignment common (published: published)")


def test_a_command_line_in_our_own_spellings_is_not_compared(caplog):
    flags = "--model-size 140M --train-epochs 1 --deepspeed --vocab-file v --merge-file m --optimizer=adamw".split()
    assert published_line(caplog, "ar", flags) is None
    assert published_line(caplog, "ar", [*flags, "--disable-bias-linear"])
