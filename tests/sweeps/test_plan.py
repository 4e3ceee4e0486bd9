"""Plans: points, their ids and costs, stages, duplicates, impossible points."""

import json
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import pytest

from megatron.errors import ConfigurationError
from megatron.sweeps.choices import Choices
from megatron.sweeps.commands import costs
from megatron.sweeps.launch import training_command
from megatron.sweeps.plan import plan_sweep
from megatron.sweeps.points import read_plan, write_plan
from megatron.sweeps.sweep_file import read_sweep
from megatron.training import command_line
from megatron.training.command_line import parse
from tests.sweeps.files import toy, write


@pytest.fixture
def planned(corpus, tmp_path):
    """Return a function that plans the toy sweep with changed top-level keys."""

    def plan(**changes):
        return plan_sweep(read_sweep(write(tmp_path, toy(corpus), **changes)), tmp_path / "out")

    return plan


def ids(planned):
    return {point.label: point.id for point in planned.points}


def test_points_are_the_product_of_variants_axes_and_seeds(planned):
    points = planned(seeds=[1, 2]).points
    assert [(point.variant, point.axes["train-epochs"], point.seed) for point in points] == [
        (variant, epochs, seed) for variant in ("ar", "mdm") for epochs in (4, 8) for seed in (1, 2)
    ]
    point = points[-1]
    assert point.script == "pretrain_mdm.py" and point.label == "mdm, train-epochs 8, seed 2"
    config = parse("ar", point.arguments)
    assert (config.objective.objective, config.training.train_epochs, config.training.seed) == ("mdm", 8, 2)
    assert (point.train_samples, point.tokens, point.epochs, point.unique_tokens) == (128, 4096, 8.0, 512)
    assert point.flops == 6 * point.parameters * point.tokens


def test_an_axis_of_a_variant_replaces_the_shared_one_and_combinations_are_excluded(planned, corpus):
    variants = toy(corpus)["variants"]
    variants["mdm"]["parameters"] = {"train-epochs": [8, 16, 32]}
    points = planned(variants=variants, exclude=[{"variant": "mdm", "train-epochs": "16.0"}]).points
    assert [(point.variant, point.axes["train-epochs"]) for point in points] == [
        ("ar", 4), ("ar", 8), ("mdm", 8), ("mdm", 32),
    ]  # fmt: skip


def test_an_id_depends_on_what_decides_the_result_and_on_nothing_else(planned, corpus):
    before = ids(planned())
    more = ids(planned(parameters={"train-epochs": [2, 4, 8, 16]}))
    assert before.items() <= more.items() and len(set(more.values())) == 8
    flags = toy(corpus)["flags"]
    free = flags | {"save-interval": 8, "num-workers": 2, "micro-batch-size": 2, "log-interval": 5}
    assert ids(planned(flags=free, resources={"world_size": 2})) == before
    for changed in ({"lr": "2e-2"}, {"fp32": None, "bf16": True}, {"weight-decay": 0.2}, {"eval-samples": 12}):
        assert not set(ids(planned(flags=flags | changed)).values()) & set(before.values()), changed


def test_points_of_one_plan_equal_those_that_are_planned_alone(planned, corpus):
    axes = {"train-epochs": [4, 2.5], "model-size": ["7M", "14M"], "lr": [1e-3, 2e-3], "micro-batch-size": [1, 2]}
    tuned = {"hidden-dropout": {"min": 0, "max": 0.5}}
    variants = {
        "ar": {"flags": {"recipe": "published", "tokenizer-type": "ByteTokenizer"}},
        "muon": {"flags": {"optimizer": "muon"}, "parameters": {"num-layers": [2, 3]}},
        "mdm": {"flags": {"objective": "mdm", "ema-decay": 0.9, "lr-decay-iters": 100, "fp32": None, "bf16": True}},
    }
    flags = {name: value for name, value in toy(corpus)["flags"].items() if name not in ("num-layers", "hidden-size")}
    flags.pop("num-attention-heads")
    resources = {"rules": [{"where": {"lr": 2e-3, "micro-batch-size": 1}, "world_size": 4}]}
    changes = {"flags": flags, "parameters": axes, "variants": variants, "resources": resources, "seeds": [1, 2]}
    points = planned(**changes, tuning={"trials": 2, "parameters": tuned}).points
    assert len(points) == 2**6 * (1 + 2 + 1) and len({point.memory_bytes for point in points}) > 16
    for point in points[::17]:
        own = {"world_size": point.world_size}
        command_line._parser.cache_clear()
        variant = {"flags": variants[point.variant]["flags"] | point.axes | point.tuned}
        (alone,) = planned(
            flags=flags, parameters=None, variants={point.variant: variant}, resources=own, seeds=[point.seed]
        ).points
        assert asdict(alone) == asdict(point) | {"axes": {}, "tuned": {}, "trial": None}


def test_points_that_are_the_same_run_are_named(planned, corpus):
    variants = toy(corpus)["variants"] | {"again": {"flags": {"objective": "ar", "weight-decay": 0.1}}}
    points = planned(variants=variants).points
    shared = {point.label: point.id for point in points}
    assert shared["again, train-epochs 4, seed 1234"] == shared["ar, train-epochs 4, seed 1234"]
    assert "again, train-epochs 4, seed 1234: the same run as ar, train-epochs 4, seed 1234" in costs(points)
    assert "\n4 runs: " in costs(points)


def test_every_impossible_point_is_named_with_its_reason(planned, corpus):
    variants = toy(corpus)["variants"]
    variants["mdm"]["flags"] |= {"token-dropout": 0.1}
    with pytest.raises(ConfigurationError) as caught:
        planned(variants=variants)
    first, *points = str(caught.value).splitlines()
    assert "2 of 4 points cannot run" in first and len(points) == 2
    assert points[0].startswith("  mdm, train-epochs 4, seed 1234: --token-dropout 0.1: masked diffusion masks")
    with pytest.raises(ConfigurationError, match="every combination is excluded"):
        planned(exclude=[{"variant": "ar"}, {"variant": "mdm"}])


def test_resources_follow_their_rules_and_decide_hours(planned):
    rules = [{"where": {"train-epochs": 8}, "world_size": 2, "nodes": 2, "minutes": 5}]
    small, large = planned(variants=None, resources={"flops_per_second": 1e9, "rules": rules}).points
    assert (small.world_size, small.nodes, small.minutes) == (1, 1, None)
    assert (large.world_size, large.nodes, large.minutes) == (2, 2, 5)
    assert small.seconds == small.flops / 1e9 and large.seconds == large.flops / 2e9
    assert small.memory_bytes > large.memory_bytes // 2 > 0 and small.disk_bytes == 3 * 12 * small.parameters
    with pytest.raises(ConfigurationError, match="--global-batch-size 8: is not a multiple"):
        planned(resources={"world_size": 3})


def test_memory_is_that_of_the_precision(planned, corpus):
    precisions = ({"fp32": True}, {"fp32": None, "bf16": False}, {"fp32": None, "bf16": True}, {"fp32": None})
    sweeps = [planned(variants=None, flags=toy(corpus)["flags"] | flags) for flags in precisions]
    fp32, no_bf16, bf16, default = (sweep.points[0].memory_bytes for sweep in sweeps)
    assert fp32 == no_bf16 > bf16 == default


def test_a_rule_of_resources_that_holds_for_no_point_is_refused(planned):
    rules = [{"where": {"variant": "ar", "train-epochs": 8}, "nodes": 1}, {"where": {"train-epochs": 9}, "nodes": 1}]
    with pytest.raises(ConfigurationError, match=r"resources.rules: no point has {train-epochs: 9}; correct the rule"):
        planned(resources={"rules": rules})
    assert planned(resources={"rules": rules[:1]}, stages={"a": {}, "b": {"variants": ["mdm"]}}).points


def test_data_that_are_elsewhere_are_planned_with_the_stated_sizes(planned, corpus):
    flags = toy(corpus)["flags"] | {"train-data-path": "nowhere/train", "valid-data-path": None}
    with pytest.raises(ConfigurationError, match="nowhere/train"):
        planned(flags=flags)
    del flags["train-unique-tokens"]
    stated = {"unique_tokens": 100_000, "vocabulary_size": 50257}
    point = planned(flags=flags, data=stated).points[0]
    assert (point.unique_tokens, point.train_samples) == (100_000, 4 * 100_000 // 32)
    for blend, unique in (
        (("1", "nowhere/a", "2000", "1", "nowhere/b", "1e3"), 3000),
        (("1", "a", "2e3", "1", "b"), 1e5),
    ):
        point = planned(flags=flags | {"train-data-path": list(blend)}, data=stated).points[0]
        assert point.unique_tokens == unique
    point = planned(
        flags=flags | {"train-data-path": "nowhere/c4", "train-unique-tokens": "C4-25M"},
        data=stated | {"unique_tokens": 10**9},
    ).points[0]
    assert point.unique_tokens == 24_743_247


def test_a_stage_waits_for_the_trials_that_it_chooses_from(planned):
    tuning = {"trials": 2, "parameters": {"lr": {"min": 1e-3, "max": 1e-2}}}
    stages = {"tune": {"tuning": tuning}, "final": {"best_of": "tune", "seeds": [1, 2]}, "last": {}}
    result = planned(stages=stages)
    assert {point.stage for point in result.points} == {"tune", "last"}
    assert result.waiting == {"final": "waits for 8 of 8 points of stage tune"}
    with pytest.raises(ConfigurationError, match="8 of 12 points cannot run"):  # and not: no trial to choose from
        planned(stages=stages | {"tune": {"tuning": tuning, "flags": {"micro-batch-size": 3}}})


def test_students_wait_for_their_teachers_and_take_those_of_their_variant_and_axes(planned, monkeypatch):
    stages = {
        "members": {"seeds": [1, 2]},
        "students": {"teachers_of": "members", "seeds": [3], "parameters": {"distill-weight": [0.5, 0.9]}},
        "chain": {"teachers_of": "students", "seeds": [4], "parameters": {"distill-weight": [0.5, 0.9]}},
        "alone": {"teachers_of": "members", "teacher_seeds": [2], "seeds": [5]},
    }
    result = planned(stages=stages)
    members = len(result.points)
    assert {point.stage for point in result.points} == {"members"} and not any(p.teachers for p in result.points)
    assert result.waiting == {
        "students": f"waits for {members} of {members} points of stage members, its teachers",
        "chain": "waits for stage students",
        "alone": f"waits for {members} of {members} points of stage members, its teachers",
    }
    monkeypatch.setattr("megatron.sweeps.plan.unfinished_teachers", lambda *_: None)
    monkeypatch.setattr("megatron.sweeps.run_costs.teacher_models", lambda _: ())
    points = planned(stages=stages).points
    by_id = {point.id: point for point in points}
    assert len(by_id) == len(points)  # teachers enter the id
    for point in points:
        teachers = [by_id[teacher] for teacher in point.teachers]
        expected = {"members": [], "students": [1, 2], "chain": [3], "alone": [2]}
        assert [teacher.seed for teacher in teachers] == expected[point.stage]
        for teacher in teachers:
            assert teacher.variant == point.variant and teacher.axes.items() <= point.axes.items()
        folders = [str(Path("out/runs") / teacher.id) for teacher in teachers]
        words = training_command(point, Path("out"))
        assert (words[words.index("--teacher") + 1 :][: len(folders)] if folders else []) == folders
        assert folders or "--teacher" not in words
    stages = {"members": {"parameters": {"lr": [1e-3]}}, "students": {"teachers_of": "members"}}
    with pytest.raises(ConfigurationError, match="stages.students: stage members has no run for ar, train-epochs 4; "):
        planned(stages=stages, exclude=[{"variant": "ar", "lr": 1e-3}])


def test_a_stage_takes_no_defaults_where_an_earlier_one_was_not_tuned(planned, monkeypatch):
    tuning = {"trials": 2, "parameters": {"lr": {"min": 1e-3, "max": 1e-2}}}
    parameters = {"train-epochs": [4, 8]}
    tune = {"tuning": tuning, "parameters": {"train-epochs": [4]}}
    stages = {"tune": tune, "final": {"best_of": "tune", "by": ["train-epochs"], "parameters": parameters}}
    chosen = Choices({("ar", "4"): {"lr": 0.5}, ("mdm", "4"): {"lr": 0.5}}, [])
    monkeypatch.setattr("megatron.sweeps.plan.best_trials", lambda *_, **__: chosen)
    with pytest.raises(ConfigurationError, match="stages.final: stage tune has no trial for ar, 8; add the values"):
        planned(stages=stages)


def test_a_plan_is_read_back(planned, tmp_path):
    points = planned().points
    write_plan(tmp_path / "out", "name: demo\n", points)
    assert (tmp_path / "out/sweep.yaml").read_text() == "name: demo\n"
    assert read_plan(tmp_path / "out") == points
    assert [json.loads(line) for line in (tmp_path / "out/plan.jsonl").open()] == [asdict(point) for point in points]
    (tmp_path / "out/plan.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(ConfigurationError, match=r"plan.jsonl: is damaged"):
        read_plan(tmp_path / "out")
    (tmp_path / "out/plan.jsonl").write_text("")
    with pytest.raises(ConfigurationError, match=r"plan.jsonl: is empty"):
        read_plan(tmp_path / "out")
    with pytest.raises(ConfigurationError, match=r"holds no sweep \(no plan.jsonl\)"):
        read_plan(tmp_path)


def test_the_options_of_a_command_name_a_folder(tmp_path, corpus):
    from megatron.sweeps.commands import _folder

    path = write(tmp_path, toy(corpus), name="demo")
    assert str(_folder(Namespace(sweep=path, output=None))) == "runs/demo"
    assert _folder(Namespace(sweep=tmp_path, output=None)) == tmp_path


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"bf16": True, "fp32": True}, "--bf16"),
        ({"train-samples": 64}, "a run has one budget"),
        ({"lr": True}, "--lr: is not followed by a value"),
        ({"compile": "yes"}, "belongs to no flag"),
        ({"objective": "rnn"}, "--objective rnn: is not one of"),
    ],
)
def test_a_variant_that_contradicts_itself_is_named_with_the_flags(flags, message, planned):
    with pytest.raises(ConfigurationError) as caught:
        planned(variants={"good": {}, "bad": {"flags": flags}}, parameters={"train-epochs": [4]})
    first, point = str(caught.value).splitlines()
    assert "1 of 2 points cannot run" in first and point.startswith("  bad, train-epochs 4, seed 1234: ")
    assert message in point
