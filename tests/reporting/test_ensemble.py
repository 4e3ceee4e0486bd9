"""Ensembles: the mean of probabilities by brute force, incompatible members, the command on real runs."""

import bisect
import inspect
import json
import shutil
import subprocess
from itertools import combinations

import numpy as np
import pytest
import torch

from megatron.config.sections import ModelConfig, ObjectiveConfig, ParallelConfig
from megatron.config.vocabulary import Vocabulary
from megatron.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron.data.samples import ValidationWindows
from megatron.errors import ConfigurationError
from megatron.model.initialise import initialise
from megatron.model.transformer import Transformer
from megatron.objectives.base import EvaluationNoise
from megatron.objectives.registry import build_objective
from megatron.parallel.apply import build_engine
from megatron.reporting.ensemble import (
    Ensemble,
    check_data,
    evaluate_members,
    expand_snapshots,
    open_members,
    settings,
    table,
)
from megatron.reporting.member_selection import Selection, select_greedily
from megatron.training.datasets import open_sources
from megatron.training.launcher import main
from megatron.validation.evaluate import ValidationSet, evaluate
from tests.conftest import ROOT, changed, environment, records
from tests.distributed import joined
from tests.forked import run_script

VOCABULARY, SEQ_LENGTH = Vocabulary(257), 16
SIZES = [dict(num_layers=1, hidden_size=16), dict(num_layers=2, hidden_size=24)]
CONFIGS = [ModelConfig(**size, num_attention_heads=2, init_method_std=0.5) for size in SIZES]
SETTINGS = {"seed": 1, "replicates": 2, "batch_size": 4, "alignment": "common"}


@pytest.fixture
def ranks():
    with joined() as ranks:
        yield ranks


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    prefix = str(tmp_path_factory.mktemp("data") / "text")
    with IndexedDatasetWriter(prefix, VOCABULARY.size) as writer:
        for line in inspect.getsource(bisect).splitlines()[:12]:
            writer.add_document([*line.encode(), 256])
    dataset = IndexedDataset(prefix, VOCABULARY.size)
    return ValidationSet("text", ValidationWindows(dataset, SEQ_LENGTH), len(dataset), None)


def engine(ranks, index: int):
    return build_engine(CONFIGS[index], VOCABULARY, ranks, ParallelConfig(), seed=index, bf16=False, compile=False)


@torch.no_grad()
def probabilities(index: int, tokens: torch.Tensor, causal: bool) -> torch.Tensor:
    """Return the softmax [B, S, V] of an uncompiled model with the weights of `engine`."""
    model = Transformer(CONFIGS[index], VOCABULARY)
    initialise(model, CONFIGS[index], index)
    return model.eval().logits(tokens, causal).double().softmax(-1)


@pytest.mark.parametrize("name", ["ar", "mdm"])
def test_an_ensemble_is_the_mean_of_probabilities(ranks, data, name):
    objective = build_objective(ObjectiveConfig(objective=name), VOCABULARY, time_block=8)
    windows = np.arange(len(data.windows))
    ids, owners = (np.stack(column) for column in zip(*(data.windows[int(window)] for window in windows)))
    owners = owners[:, objective.target_offset : objective.target_offset + SEQ_LENGTH]
    ensemble = Ensemble([engine(ranks, 0), engine(ranks, 1)])
    evaluations = evaluate(ensemble, objective, data, **SETTINGS, models=4)
    for replicate in range(len(evaluations[0].nats)):
        batch = objective.evaluation(ids, EvaluationNoise(1, "text", replicate), windows, "common")
        members = [probabilities(index, batch.tokens, batch.causal) for index in (0, 1)]
        for evaluation, p in zip(evaluations, [*members, members[0], sum(members) / 2], strict=True):
            nats = -p.gather(-1, batch.targets[..., None])[..., 0].log() * batch.weights
            expected = np.bincount(owners.ravel(), nats.numpy().ravel(), minlength=data.documents)
            np.testing.assert_allclose(evaluation.nats[replicate], expected, rtol=1e-5)
    losses = [evaluation.summary()["loss"] for evaluation in evaluations]
    assert losses[3] < (losses[0] + losses[1]) / 2  # -log is convex


@pytest.mark.parametrize("name", ["ar", "mdm"])
def test_copies_of_a_model_are_that_model(ranks, data, name):
    objective = build_objective(ObjectiveConfig(objective=name), VOCABULARY, time_block=8)
    (expected,) = evaluate(engine(ranks, 0), objective, data, **SETTINGS)
    for evaluation in evaluate(Ensemble([engine(ranks, 0)] * 3), objective, data, **SETTINGS, models=6):
        np.testing.assert_allclose(evaluation.nats, expected.nats, rtol=1e-5, atol=1e-5)
        assert np.array_equal(evaluation.tokens, expected.tokens)


def test_each_member_runs_once_a_batch(ranks, data):
    objective = build_objective(ObjectiveConfig(objective="mdm"), VOCABULARY, time_block=8)
    members, calls = [engine(ranks, 0), engine(ranks, 1)], []
    for member in members:
        member.roots[0].register_forward_pre_hook(lambda *_: calls.append(1))
    evaluate(Ensemble(members), objective, data, **SETTINGS, models=4)
    assert len(calls) == 2 * SETTINGS["replicates"] * -(-len(data.windows) // SETTINGS["batch_size"])


# ------------------------------------------------------------------------------------ trained runs


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """Two MDM runs of different sizes and seeds and an AR run, one after another in this process."""
    root = tmp_path_factory.mktemp("runs")
    main("mdm", [*tiny, "--seed", "1", "--save", str(root / "first")])
    main("mdm", [*tiny, "--seed", "2", "--hidden-size", "48", "--save", str(root / "second")])
    main("ar", [*tiny, "--save", str(root / "ar")])
    return root


def command(*arguments, world_size: int = 1) -> subprocess.CompletedProcess:
    words = [ROOT / "tools" / "ensemble.py", *arguments]
    return run_script(list(map(str, words)), environment(), 300, world_size)


def test_two_runs_are_evaluated_by_one_process_and_by_two(runs, tmp_path):
    paths = [tmp_path / "new" / "results.json", tmp_path / "results.png"]
    completed = command(runs / "first", runs / "second", "--json", paths[0], "--plot", paths[1])
    assert completed.returncode == 0, completed.stderr
    assert (
        "≤ " in completed.stdout
        and "average probabilities" in completed.stdout
        and "the first 2 together" in completed.stdout
    )
    assert paths[1].read_bytes().startswith(b"\x89PNG") and not [*tmp_path.rglob("*.partial")]
    record = json.loads(paths[0].read_text())
    assert [*record["sets"]] == ["tuning", "validation"]
    assert all(results["upper_bound"] and results["num_mc"] == 4 for results in record["sets"].values())
    for name, results in record["sets"].items():
        for run, summary in zip(("first", "second"), results["members"], strict=True):
            last = [record_of_set for record_of_set in records(runs / run, "valid") if record_of_set["set"] == name][-1]
            assert summary == pytest.approx({key: last[key] for key in summary}, rel=1e-5)
        single, both = results["ensembles"]
        losses = [summary["loss"] for summary in results["members"]]
        assert {key: single[key] for key in results["members"][0]} == results["members"][0] and single["gain"] == 0
        assert both["size"] == 2 and both["loss"] < np.mean(losses) and both["gain_se"] > 0 and both["mc_se"] > 0
        assert both["gain"] == pytest.approx(np.mean(losses) - both["loss"])
    again = command(runs / "first", runs / "second", "--json", tmp_path / "two.json", world_size=2)
    assert again.returncode == 0, again.stderr
    other_record = json.loads((tmp_path / "two.json").read_text())
    for name, results in record["sets"].items():
        for kind in ("members", "ensembles"):
            for summary, other_summary in zip(results[kind], other_record["sets"][name][kind], strict=True):
                assert other_summary == pytest.approx(summary, rel=1e-4, abs=1e-6)


def test_checkpoints_and_flags_of_an_evaluation(runs, ranks):
    older = runs / "first" / "checkpoints" / "iter_0000008"
    names = [str(runs / "ar"), str(runs / "ar" / "checkpoints" / "iter_0000008")]
    record = evaluate_members(open_members(names, "latest", ["--eval-samples", "3"]), ranks)
    assert [member["iteration"] for member in record["members"]] == [12, 8] and not record["sets"]["validation"][
        "upper_bound"
    ]
    last = [valid["loss"] for valid in records(runs / "ar", "valid")][-1]
    assert record["sets"]["validation"]["members"][0]["loss"] != last  # other windows
    assert "≤" not in table(record) and "mc" not in table(record)
    best = open_members([str(runs / "second"), str(older)], "best", [])[0]
    assert best.checkpoint.name == json.loads((runs / "second" / "checkpoints" / "best.json").read_text())["folder"]


def test_what_cannot_stand_together_is_refused(runs, tmp_path):
    first, second, ar = (str(runs / name) for name in ("first", "second", "ar"))
    sized = changed(runs / "second", tmp_path / "sized", vocabulary_size=300)
    aligned = changed(runs / "second", tmp_path / "aligned", validation={"eval_alignment": "published"})
    empty = changed(runs / "second", tmp_path / "empty")
    shutil.rmtree(tmp_path / "empty" / "checkpoints")
    blind = changed(runs / "second", tmp_path / "blind")
    (tmp_path / "blind" / "checkpoints" / "best.json").unlink()
    damaged = changed(runs / "second", tmp_path / "damaged") + "/checkpoints/iter_0000012"
    next((tmp_path / "damaged" / "checkpoints" / "iter_0000012").glob("*.safetensors")).unlink()
    newest = f"{first}/checkpoints/iter_0000012"
    for names, which, flags, message in (
        ([first], "latest", [], f"{first}: is one member, and an ensemble needs two or more; name another run"),
        ([first, newest], "latest", [], f"{newest}: is the same checkpoint as {first}; name each member once"),
        (
            [first, ar],
            "latest",
            [],
            f"{ar}: has objective ar, and {first} has mdm; members must share it, leave one out",
        ),
        ([first, sized], "latest", [], f"{sized}: has vocabulary size 300, and {first} has 257; members must share it"),
        ([first, aligned], "latest", [], f"{aligned}: has --eval-alignment published, and {first} has common; members"),
        ([first, str(tmp_path)], "latest", [], f"{tmp_path}: holds no run and is no checkpoint; give a folder that"),
        ([first, empty], "latest", [], f"{empty}: holds no checkpoint; train it first"),
        ([first, blind], "best", [], f"--checkpoint best: {blind} has no checkpoint that was validated; give"),
        ([first, damaged], "latest", [], f"{damaged}: is damaged ("),
        (
            [first, second],
            "latest",
            ["--num-layers", "3"],
            "--num-layers 3: is neither a flag of data nor of validation",
        ),
        ([first, second], "latest", ["--num-mcc", "3"], "unknown flag --num-mcc; did you mean --num-mc?"),
    ):
        with pytest.raises(ConfigurationError) as caught:
            open_members(names, which, flags)
        assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    assert (
        len(open_members([first, aligned], "latest", ["--eval-alignment", "common"])) == 2
    )  # the flag makes them equal
    completed = command(first, ar)
    assert (
        completed.returncode == 2
        and completed.stderr.startswith(f"error: {ar}: has objective ar")
        and not completed.stdout
    )


def test_other_data_than_a_member_knows_is_refused(runs, tmp_path):
    first = str(runs / "first")
    other = changed(runs / "second", tmp_path / "other", fingerprints={"validation": "another"})
    sized = [changed(runs / name, tmp_path / name, vocabulary_size=300) for name in ("first", "second")]
    for names, message in (
        ([first, other], f"{other}: was validated on other tokens named validation; leave"),
        (sized, f"{sized[0]}: holds a run over 300 token ids, and this data has 257"),
    ):
        with pytest.raises(ConfigurationError) as caught:
            check_data(open_members(names, "latest", []), open_sources(settings(first, [])))
        assert str(caught.value).startswith(message)


# ------------------------------------------------------------------------------------ snapshots and selection


@pytest.fixture(scope="module")
def snapshots(tiny, tmp_path_factory) -> str:
    """An AR run of three cycles, which saves no other checkpoint before the end."""
    folder = str(tmp_path_factory.mktemp("cyclic") / "run")
    cycles = "--lr-decay-style cyclic --lr-cycles 3 --lr-warmup-samples 0 --save-interval 100".split()
    main("ar", [*tiny, *cycles, "--save", folder])
    return folder


def test_a_run_keeps_the_last_checkpoint_of_each_cycle(snapshots):
    names = expand_snapshots([f"{snapshots}@snapshots", "other@run"])
    assert [name.rpartition("/")[2] for name in names[:-1]] == ["iter_0000012", "iter_0000008", "iter_0000004"]
    assert names[-1] == "other@run"
    rates = {record["iteration"]: record["learning_rate"] for record in records(snapshots, "train")}
    assert all(rates[step] == pytest.approx(1e-3) for step in (4, 8, 12))
    assert rates[5] == pytest.approx(rates[9], rel=0.1) and rates[5] > 8e-3  # restarted
    assert len(open_members(names[:-1], "latest", [])) == 3


def test_a_run_without_snapshots_is_refused(runs):
    name = f"{runs / 'first'}@snapshots"
    with pytest.raises(ConfigurationError, match="@snapshots: keeps no snapshot; train with --lr-decay-style cyclic"):
        expand_snapshots([name])


def test_selection_is_greedy_on_the_averaged_probabilities(ranks):
    generator = np.random.default_rng(0)
    probability, weights = generator.uniform(0.05, 0.9, (6, 40)), generator.uniform(0, 2, 40)

    def nats(members) -> float:
        return float(-(np.log(probability[list(members)].mean(axis=0)) * weights).sum())

    selected, losses = select_greedily(-np.log(probability), weights, 4, ranks)
    for size in range(1, 5):
        others = [index for index in range(6) if index not in selected[: size - 1]]
        assert nats(selected[:size]) == min(nats([*selected[: size - 1], index]) for index in others)
        assert losses[size - 1] == pytest.approx(nats(selected[:size]))
    assert sorted(select_greedily(-np.log(probability), weights, 6, ranks)[0]) == list(range(6))
    pairs = [nats(pair) for pair in combinations(range(6), 2)]
    assert min(pairs) <= losses[1] <= np.mean(pairs)


def test_selected_members_are_reported_on_the_other_set(snapshots, ranks):
    members = open_members(expand_snapshots([f"{snapshots}@snapshots"]), "latest", [])
    everything = evaluate_members(members, ranks)
    record = evaluate_members(members, ranks, Selection(2, "tuning"))
    assert [*record["sets"]] == ["validation"] and record["selection"]["set"] == "tuning"
    single = [summary["loss"] for summary in everything["sets"]["tuning"]["members"]]
    assert record["members"][0] == everything["members"][int(np.argmin(single))]
    assert record["selection"]["losses"][0] == pytest.approx(min(single), rel=1e-6)
    pair = evaluate_members([members[int(np.argmin(single))], *_named(members, record["members"][1:])], ranks)
    assert record["selection"]["losses"][1] == pytest.approx(pair["sets"]["tuning"]["ensembles"][1]["loss"], rel=1e-6)
    assert record["sets"]["validation"] == pair["sets"]["validation"]
    assert "selected on tuning, in this order" in table(record)


def _named(members, descriptions):
    return [member for description in descriptions for member in members if member.name == description["name"]]


def test_a_set_that_selects_is_not_reported(runs, ranks):
    members = open_members([str(runs / "first"), str(runs / "second")], "latest", [])
    sources = open_sources(settings(members[0].name, []))
    (tuning, validation) = sources.validation
    assert Selection(2).split(sources, 2) == (tuning, [validation])
    data = [f"{name}={members[0].config.data.valid_data_path[0].partition('=')[2]}" for name in ("a", "b")]
    for selection, flags, message in (
        (Selection(3), [], "--select 3: there are 2 members; give 1 to 2"),
        (Selection(1, "test"), [], "--select-on test: is no validation set; give one of tuning, validation"),
        (Selection(1), data[:1], "--select-on a: is the only validation set, and an ensemble is not reported on the"),
        (Selection(1, "a"), data, "--select-on a: is the same text as b, and an ensemble is not reported on the text"),
    ):
        words = ["--valid-data-path", *flags] if flags else []
        with pytest.raises(ConfigurationError) as caught:
            selection.split(open_sources(settings(members[0].name, words)), 2)
        assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.slow
def test_two_processes_select_the_members_of_one(snapshots, tmp_path):
    selected = []
    for world_size in (1, 2):
        path = tmp_path / f"{world_size}.json"
        completed = command(f"{snapshots}@snapshots", "--select", "2", "--json", path, world_size=world_size)
        assert completed.returncode == 0, completed.stderr
        selected.append(json.loads(path.read_text()))
    first, second = selected
    assert first["members"] == second["members"] and [*first["sets"]] == ["validation"]
    assert first["selection"]["losses"] == pytest.approx(second["selection"]["losses"], rel=1e-4)
    refused = command(f"{snapshots}@snapshots", "--select-on", "tuning")
    assert refused.returncode == 2 and "--select-on tuning: does nothing without --select" in refused.stderr
