"""Ensembles: the mean of probabilities by brute force, what cannot stand together, the command on real runs."""

import bisect
import inspect
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from megatron.config.sections import ModelConfig, ObjectiveConfig, ParallelConfig, Vocabulary
from megatron.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron.data.samples import ValidationWindows
from megatron.errors import ConfigurationError
from megatron.evaluation.ensemble import Ensemble, check_data, evaluate_members, open_members, settings, table
from megatron.model.initialise import initialise
from megatron.model.transformer import Transformer
from megatron.objectives import build_objective
from megatron.objectives.base import EvaluationNoise
from megatron.parallel.apply import build_engine
from megatron.training.datasets import open_sources
from megatron.training.main import main
from megatron.validation.evaluate import ValidationSet, evaluate
from tests.conftest import ROOT, changed, environment, records
from tests.distributed import joined

VOCABULARY, SEQ_LENGTH = Vocabulary(257), 16
SIZES = [dict(num_layers=1, hidden_size=16), dict(num_layers=2, hidden_size=24)]
CONFIGS = [ModelConfig(**size, num_attention_heads=2, init_method_std=0.5) for size in SIZES]
SETTINGS = {"seed": 1, "replicates": 2, "batch_size": 4, "alignment": "common"}


@pytest.fixture
def processes():
    with joined() as processes:
        yield processes


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    prefix = str(tmp_path_factory.mktemp("data") / "text")
    with IndexedDatasetWriter(prefix, VOCABULARY.size) as writer:
        for line in inspect.getsource(bisect).splitlines()[:12]:
            writer.add_document([*line.encode(), 256])
    dataset = IndexedDataset(prefix, VOCABULARY.size)
    return ValidationSet("text", ValidationWindows(dataset, SEQ_LENGTH), len(dataset), None)


def engine(processes, index: int):
    return build_engine(CONFIGS[index], VOCABULARY, index, processes, ParallelConfig(), bf16=False, compile=False)


@torch.no_grad()
def probabilities(index: int, tokens: torch.Tensor, causal: bool) -> torch.Tensor:
    """Return the softmax [B, S, V] of a plain model at the weights of `engine`."""
    model = Transformer(CONFIGS[index], VOCABULARY)
    initialise(model, CONFIGS[index], index)
    return model.eval().logits(tokens, causal).double().softmax(-1)


@pytest.mark.parametrize("name", ["ar", "mdm"])
def test_an_ensemble_is_the_mean_of_probabilities(processes, data, name):
    objective = build_objective(ObjectiveConfig(objective=name), VOCABULARY, time_block=8)
    windows = np.arange(len(data.windows))
    ids, owners = (np.stack(part) for part in zip(*(data.windows[int(window)] for window in windows)))
    owners = owners[:, objective.target_offset : objective.target_offset + SEQ_LENGTH]
    pair = Ensemble([engine(processes, 0), engine(processes, 1)])
    together = evaluate(pair, objective, data, **SETTINGS, models=4)
    for replicate in range(len(together[0].nats)):
        batch = objective.evaluation(ids, EvaluationNoise(1, "text", replicate), windows, "common")
        each = [probabilities(index, batch.tokens, batch.causal) for index in (0, 1)]
        for found, p in zip(together, [*each, each[0], sum(each) / 2], strict=True):
            nats = -p.gather(-1, batch.targets[..., None])[..., 0].log() * batch.weights
            expected = np.bincount(owners.ravel(), nats.numpy().ravel(), minlength=data.documents)
            np.testing.assert_allclose(found.nats[replicate], expected, rtol=1e-5)
    losses = [found.summary()["loss"] for found in together]
    assert losses[3] < (losses[0] + losses[1]) / 2  # -log is convex


@pytest.mark.parametrize("name", ["ar", "mdm"])
def test_copies_of_a_model_are_that_model(processes, data, name):
    objective = build_objective(ObjectiveConfig(objective=name), VOCABULARY, time_block=8)
    (alone,) = evaluate(engine(processes, 0), objective, data, **SETTINGS)
    for found in evaluate(Ensemble([engine(processes, 0)] * 3), objective, data, **SETTINGS, models=6):
        np.testing.assert_allclose(found.nats, alone.nats, rtol=1e-5, atol=1e-5)
        assert np.array_equal(found.tokens, alone.tokens)


def test_each_member_runs_once_a_batch(processes, data):
    objective = build_objective(ObjectiveConfig(objective="mdm"), VOCABULARY, time_block=8)
    members, calls = [engine(processes, 0), engine(processes, 1)], []
    for member in members:
        member.roots[0].register_forward_pre_hook(lambda *_: calls.append(1))
    evaluate(Ensemble(members), objective, data, **SETTINGS, models=4)
    assert len(calls) == 2 * SETTINGS["replicates"] * -(-len(data.windows) // SETTINGS["batch_size"])


# ------------------------------------------------------------------------------------ trained runs


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """Two MDM runs of different sizes and seeds and an AR run, one after another in this process."""
    root = tmp_path_factory.mktemp("runs")
    main("mdm", [*tiny, "--seed", "1", "--save", str(root / "one")])
    main("mdm", [*tiny, "--seed", "2", "--hidden-size", "48", "--save", str(root / "two")])
    main("ar", [*tiny, "--save", str(root / "ar")])
    return root


def command(*arguments, processes: int = 1) -> subprocess.CompletedProcess:
    words = [sys.executable, ROOT / "tools" / "ensemble.py", *arguments]
    if processes > 1:
        words[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run(list(map(str, words)), env=environment(), capture_output=True, text=True, timeout=300)


def test_two_runs_are_evaluated_by_one_process_and_by_two(runs, tmp_path):
    paths = [tmp_path / "new" / "found.json", tmp_path / "found.png"]
    done = command(runs / "one", runs / "two", "--json", paths[0], "--plot", paths[1])
    assert done.returncode == 0, done.stderr
    assert "≤ " in done.stdout and "average probabilities" in done.stdout and "the first 2 together" in done.stdout
    assert paths[1].read_bytes().startswith(b"\x89PNG") and not [*tmp_path.rglob("*.partial")]
    record = json.loads(paths[0].read_text())
    assert [*record["sets"]] == ["tuning", "validation"]
    assert all(found["upper_bound"] and found["num_mc"] == 4 for found in record["sets"].values())
    for name, found in record["sets"].items():
        for run, figures in zip(("one", "two"), found["members"], strict=True):
            last = [each for each in records(runs / run, "valid") if each["set"] == name][-1]
            assert figures == pytest.approx({key: last[key] for key in figures}, rel=1e-5)
        one, both = found["ensembles"]
        losses = [figures["loss"] for figures in found["members"]]
        assert {key: one[key] for key in found["members"][0]} == found["members"][0] and one["gain"] == 0
        assert both["size"] == 2 and both["loss"] < np.mean(losses) and both["gain_se"] > 0 and both["mc_se"] > 0
        assert both["gain"] == pytest.approx(np.mean(losses) - both["loss"])
    again = command(runs / "one", runs / "two", "--json", tmp_path / "two.json", processes=2)
    assert again.returncode == 0, again.stderr
    other = json.loads((tmp_path / "two.json").read_text())
    for name, found in record["sets"].items():
        for kind in ("members", "ensembles"):
            for figures, same in zip(found[kind], other["sets"][name][kind], strict=True):
                assert same == pytest.approx(figures, rel=1e-4, abs=1e-6)


def test_checkpoints_and_flags_of_an_evaluation(runs, processes):
    older = runs / "one" / "checkpoints" / "iter_0000008"
    names = [str(runs / "ar"), str(runs / "ar" / "checkpoints" / "iter_0000008")]
    record = evaluate_members(open_members(names, "latest", ["--eval-samples", "3"]), processes)
    assert [member["iteration"] for member in record["members"]] == [12, 8] and not record["sets"]["validation"][
        "upper_bound"
    ]
    last = [each["loss"] for each in records(runs / "ar", "valid")][-1]
    assert record["sets"]["validation"]["members"][0]["loss"] != last  # other windows
    assert "≤" not in table(record) and "mc" not in table(record)
    best = open_members([str(runs / "two"), str(older)], "best", [])[0]
    assert best.checkpoint.name == json.loads((runs / "two" / "checkpoints" / "best.json").read_text())["folder"]


def test_what_cannot_stand_together_is_refused(runs, tmp_path):
    one, two, ar = (str(runs / name) for name in ("one", "two", "ar"))
    sized = changed(runs / "two", tmp_path / "sized", vocabulary_size=300)
    aligned = changed(runs / "two", tmp_path / "aligned", validation={"eval_alignment": "published"})
    empty = changed(runs / "two", tmp_path / "empty")
    shutil.rmtree(tmp_path / "empty" / "checkpoints")
    blind = changed(runs / "two", tmp_path / "blind")
    (tmp_path / "blind" / "checkpoints" / "best.json").unlink()
    damaged = changed(runs / "two", tmp_path / "damaged") + "/checkpoints/iter_0000012"
    next((tmp_path / "damaged" / "checkpoints" / "iter_0000012").glob("*.safetensors")).unlink()
    newest = f"{one}/checkpoints/iter_0000012"
    for names, which, flags, said in (
        ([one], "latest", [], f"{one}: is one member, and an ensemble has two or more; name another run"),
        ([one, newest], "latest", [], f"{newest}: is the same checkpoint as {one}; name each member once"),
        ([one, ar], "latest", [], f"{ar}: has objective ar, and {one} has mdm; members agree in it, leave one out"),
        ([one, sized], "latest", [], f"{sized}: has vocabulary size 300, and {one} has 257; members agree"),
        ([one, aligned], "latest", [], f"{aligned}: has --eval-alignment published, and {one} has common; members"),
        ([one, str(tmp_path)], "latest", [], f"{tmp_path}: holds no run and is no checkpoint; give a folder that"),
        ([one, empty], "latest", [], f"{empty}: holds no checkpoint; train it first"),
        ([one, blind], "best", [], f"--checkpoint best: {blind} has no checkpoint that was validated; give"),
        ([one, damaged], "latest", [], f"{damaged}: is damaged ("),
        ([one, two], "latest", ["--num-layers", "3"], "--num-layers 3: is a flag of neither data nor validation"),
        ([one, two], "latest", ["--num-mcc", "3"], "unknown flag --num-mcc; did you mean --num-mc?"),
    ):
        with pytest.raises(ConfigurationError) as caught:
            open_members(names, which, flags)
        assert str(caught.value).startswith(said) and "\n" not in str(caught.value)
    assert len(open_members([one, aligned], "latest", ["--eval-alignment", "common"])) == 2  # now they agree
    done = command(one, ar)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {ar}: has objective ar") and not done.stdout


def test_other_data_than_a_member_knows_is_refused(runs, tmp_path):
    one = str(runs / "one")
    other = changed(runs / "two", tmp_path / "other", fingerprints={"validation": "another"})
    sized = [changed(runs / name, tmp_path / name, vocabulary_size=300) for name in ("one", "two")]
    for names, said in (
        ([one, other], f"{other}: was validated on other tokens under the name validation than are evaluated; leave"),
        (sized, f"{sized[0]}: knows 300 token ids, and this data has 257; give data of the same tokenizer"),
    ):
        with pytest.raises(ConfigurationError) as caught:
            check_data(open_members(names, "latest", []), open_sources(settings(one, [])))
        assert str(caught.value).startswith(said)
