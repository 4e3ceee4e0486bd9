"""Training runs under lm-eval: scores equal to its own transformers model, its command line, several ranks."""

import json
import logging
import math
import os
import shutil
import sys
from functools import partialmethod

import lm_eval
import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer as Library
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from megatron.convert.huggingface import hugging_face_config, hugging_face_model
from megatron.data.tokenizer import END, HFTokenizer
from megatron.errors import ConfigurationError
from megatron.reporting.plots import plot_task_scores
from megatron.scoring.checkpoints import score_checkpoints
from megatron.scoring.encoding import encode_pair
from megatron.scoring.lm_eval_adapter import MegatronLM, _records_path, cut, doc_key
from megatron.scoring.lm_eval_arguments import read_generation
from megatron.scoring.lm_eval_cli import main as harness
from megatron.scoring.lm_eval_cli import prepare, read
from megatron.scoring.requests import Scoring
from megatron.training.launcher import main as train
from megatron.training.load_run import open_trained
from tests.conftest import ROOT, environment, run_python
from tests.distributed import spawn
from tests.forked import run_script

NINE = "arc_easy boolq copa hellaswag piqa race winogrande sciq lambada_standard".split()
SEQ_LENGTH = 512


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    """An AR and an MDM run of six steps, with a tokenizer that transformers can also load."""
    root = tmp_path_factory.mktemp("runs")
    command = ["tools/preprocess_data.py", "--output-dir", root / "data", "--input", corpus.parent / "text.jsonl"]
    done = run_python(*command, "--train-tokenizer", "300", "--splits", "90", "5", "5")
    assert done.returncode == 0, done.stderr
    flags = (
        "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --fp32 --no-compile --lr 1e-2 --init-method-std 0.3 "
    )
    flags += f"--seq-length {SEQ_LENGTH} --micro-batch-size 2 --global-batch-size 4 --train-iters 6 --eval-samples 4"
    data = ["--train-data-path", f"{root}/data/train", "--valid-data-path", f"{root}/data/validation"]
    for objective in ("ar", "mdm"):
        train(objective, [*flags.split(), *data, "--save", str(root / objective)])
    return root


@pytest.fixture(scope="module")
def twin(runs, tmp_path_factory):
    """The AR run in transformers' format."""
    pytest.importorskip("accelerate", reason="lm-eval's own model of transformers needs it: the extra test")
    folder, trained = tmp_path_factory.mktemp("twin"), open_trained(str(runs / "ar"))
    sizes = {"vocabulary_rows": trained.vocabulary.size, "max_positions": SEQ_LENGTH}
    hugging_face_model(trained.model(), hugging_face_config(trained.config.model, **sizes)).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(runs / "data" / "tokenizer.json"), eos_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _tasks_of_files_only(monkeypatch):
    """Leave lm-eval's own tasks out: listing their thousands of files takes seconds."""
    monkeypatch.setattr(TaskManager, "__init__", partialmethod(TaskManager.__init__, include_defaults=False))


TEXT = (ROOT / "LICENSE").read_text().lstrip()  # which nobody edits


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Three small tasks as files: choices, likelihoods of whole texts, generation."""
    folder = tmp_path_factory.mktemp("tasks")
    choices = [
        {
            "context": TEXT[start : start + 60],
            "choices": [TEXT[start + 60 : start + 80], " naïve 日本 🙂", " return"],
            "label": 0,
        }
        for start in range(0, 1500, 150)
    ]
    choices.append({"context": "def ", "choices": ["same", "same", "other"], "label": 1})  # a tie
    choices.append({"context": "", "choices": ["import os", "x"], "label": 0})
    _task(
        folder,
        "choices",
        choices,
        "multiple_choice",
        "doc_to_choice: '{{choices}}'\ndoc_to_target: label\n",
        "acc acc_norm",
    )
    texts = [{"context": text} for text in (TEXT[:200], "é", TEXT[:4000])]
    metrics = "word_perplexity byte_perplexity bits_per_byte"
    _task(folder, "rolling", texts, "loglikelihood_rolling", "doc_to_target: '{{context}}'\n", metrics, text="''")
    prompts = [{"context": TEXT[:100], "answer": "x"}, {"context": "import", "answer": "x"}]
    extra = "doc_to_target: '{{answer}}'\ngeneration_kwargs: {until: ['e'], max_gen_toks: 12}\n"
    _task(folder, "writing", prompts, "generate_until", extra, "exact_match")
    return folder


def _task(folder, name, documents, kind, extra, metrics, text="'{{context}}'"):
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, documents)))
    (folder / f"{name}.yaml").write_text(
        f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    validation: {folder / name}.jsonl\n"
        f"validation_split: validation\noutput_type: {kind}\ndoc_to_text: {text}\ntarget_delimiter: ''\n{extra}"
        "metric_list:\n" + "".join(f"  - metric: {metric}\n" for metric in metrics.split())
    )


def evaluated(model, tasks, names, **options):
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return lm_eval.simple_evaluate(model=model, tasks=names, task_manager=manager, bootstrap_iters=0, **options)


def instances_of(*pairs, kind="loglikelihood"):
    return [Instance(kind, {"pair": pair}, pair, 0, ("task", index, 1)) for index, pair in enumerate(pairs)]


# ------------------------------------------------------------------------------------ next-token prediction


@torch.no_grad()
def reference(model: MegatronLM, context: str, continuation: str) -> float:
    """Return the log-likelihood from the logits of one forward pass, normalised and summed in float64."""
    ids = ([], model.tok_encode(continuation)) if context == "" else model._encode_pair(context, continuation)
    text = [*(ids[0] or [model.eot_token_id]), *ids[1]][-SEQ_LENGTH - 1 :]
    logits = model.model.logits(torch.tensor([text[:-1]]), True)[0, -len(ids[1]) :]
    return float(logits.double().log_softmax(-1).gather(1, torch.tensor(ids[1])[:, None]).sum())


def test_likelihoods_equal_lm_eval_and_transformers(runs, twin):
    from lm_eval.models.huggingface import HFLM  # after the fixture, which skips where it cannot be imported

    ours, theirs = (
        MegatronLM(pretrained=str(runs / "ar")),
        HFLM(pretrained=str(twin), dtype="float32", batch_size=1, device="cpu"),
    )
    assert theirs.max_length == ours.max_length == SEQ_LENGTH and theirs.eot_token_id == ours.eot_token_id
    ids = ours.tok_encode(TEXT * 3)
    text = [ours._tokenizer.decode(ids[start:end]) for start, end in ((0, 33), (40, 540), (0, 900), (7, 8))]
    pairs = [
        ("import", " os"),
        ("", text[1]),
        ("x", "\ufeff\u200b\U0001d518\n\n\t"),
        ("import", " sys"),
        ("import", " sys"),  # a tie
        ("", "def"),
        ("naïve ", "日本語 🙂"),
        ("trailing spaces  ", "x"),
        (TEXT[:90], text[3]),
        (TEXT[:90], text[0]),
        ("x", text[1]),
        (text[2], text[0]),  # longer than the model
        (text[2], "y"),
    ]
    assert [len(ours.tok_encode(pairs[index][1])) for index in (8, 9, 10)] == [1, 33, 500]
    expected = theirs.loglikelihood(instances_of(*pairs), disable_tqdm=True)
    scores = ours.loglikelihood(instances_of(*pairs))
    for pair, (nats, _), (other, _) in zip(pairs, scores, expected, strict=True):
        assert nats == pytest.approx(reference(ours, *pair), rel=0, abs=1e-4)
        # lm-eval's model sums in fp32, whose spacing is 2.4e-4 at the sum of 500 tokens
        assert nats == pytest.approx(other, rel=0, abs=max(1e-4, 2 * float(np.spacing(np.float32(abs(nats))))))
    assert [greedy for _, greedy in scores] == [greedy for _, greedy in expected]
    assert scores[3] == scores[4]
    rolling = instances_of((TEXT[:300],), (TEXT * 2,), ("é",), kind="loglikelihood_rolling")
    expected = theirs.loglikelihood_rolling(rolling, disable_tqdm=True)
    np.testing.assert_allclose(ours.loglikelihood_rolling(rolling), expected, rtol=1e-5)


def test_tasks_equal_lm_eval_and_transformers(runs, twin, tasks):
    names = ["choices", "rolling", "writing"]
    theirs = evaluated("hf", tasks, names, model_args={"pretrained": str(twin), "dtype": "float32"}, device="cpu")
    model, spanning = MegatronLM(pretrained=str(runs / "ar")), []
    ours = evaluated(model, tasks, names)
    for name in names:
        for sample, reference_sample in zip(ours["samples"][name], theirs["samples"][name], strict=True):
            assert sample["doc_id"] == reference_sample["doc_id"]
            if name == "writing":
                assert sample["resps"] == reference_sample["resps"] and "e" not in sample["resps"][0][0]
                continue
            for arguments, response, expected in zip(
                sample["arguments"], sample["resps"], reference_sample["resps"], strict=True
            ):
                if name == "choices" and encode_pair(model._tokenizer, *arguments).encoded_alone:
                    spanning.append(arguments)  # lm-eval leaves out the token that spans context and continuation
                    response, expected = response[0][0], reference(model, *arguments)
                np.testing.assert_allclose(np.array(response, float), np.array(expected, float), atol=2e-3)
        for metric, value in theirs["results"][name].items():
            if isinstance(value, float):
                assert ours["results"][name][metric] == pytest.approx(value, rel=1e-4), (name, metric)
    assert len(spanning) == ours["config"]["answers_encoded_alone"] == 2


# ------------------------------------------------------------------------------------ tokens across the join


def spanning_pair(model: MegatronLM) -> tuple[str, str]:
    """Return a context and a continuation that together have no more tokens than the context."""
    tokens = sorted(token for token in model._tokenizer._library.get_vocab() if token.isascii() and token.isalpha())
    pairs = [(f"x {token[:cut]}", token[cut:]) for token in tokens for cut in range(1, len(token))]
    encode = model.tok_encode
    return next(pair for pair in pairs if len(encode("".join(pair))) <= len(encode(pair[0])))


def choices_of(context: str, *answers: str, doc_id: int = 0) -> list[Instance]:
    document = {"context": context, "answers": answers}
    return [
        Instance("loglikelihood", document, (context, answer), index, ("task", doc_id, 1))
        for index, answer in enumerate(answers)
    ]


@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_an_answer_that_merges_with_its_context_is_scored_by_its_own_tokens(runs, objective, caplog):
    model = MegatronLM(pretrained=str(runs / objective))
    context, answer = spanning_pair(model)
    instances = choices_of(context, answer, "zz")
    scores = model.loglikelihood([*instances, instances[0]])  # lm-eval repeats some requests
    (alone,) = model._loglikelihood_tokens([((), model.tok_encode(context), model.tok_encode(answer))])
    assert scores[0] == scores[2] and scores[0] != (0.0, True) and scores[0][0] < -0.01
    if len(model.tok_encode(answer)) == 1:  # exact in masked diffusion too
        assert scores[0] == pytest.approx(alone)
    assert model.get_model_info()["answers_encoded_alone"] == 1
    (line,) = [line for line in caplog.messages if "encoded alone" in line]
    assert line == (
        "1 of 2 requests have a token that spans context and continuation: their continuations are encoded alone"
    )
    (nats,) = model.loglikelihood_rolling(instances_of((answer[:1],), kind="loglikelihood_rolling"))
    assert nats < 0


@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_a_text_that_the_tokenizer_drops_is_refused(runs, objective, tmp_path):
    model = MegatronLM(pretrained=str(runs / objective))
    library = Library(models.BPE({"x": 0, "o": 1, " ": 2, END: 3}, []))
    library.add_special_tokens([END])
    library.save(str(tmp_path / "tokenizer.json"))
    model._tokenizer = HFTokenizer(str(tmp_path / "tokenizer.json"))
    for context in ("x", "x ", ""):
        with pytest.raises(ConfigurationError) as caught:
            model.loglikelihood(choices_of(context, "o", "日本", doc_id=7))
        line = str(caught.value)
        assert line.startswith("--tasks task: the tokenizer (--tokenizer-model ") and "\n" not in line
        assert "drops all of '日本' in document 7, so that it has no likelihood; leave the task out, or" in line
    with pytest.raises(ConfigurationError, match="drops all of '日本' in document 0"):
        model.loglikelihood_rolling(instances_of(("日本",), kind="loglikelihood_rolling"))
    assert model.loglikelihood_rolling(instances_of(("",), kind="loglikelihood_rolling")) == [0.0]


def test_what_an_older_tokenisation_left_in_a_cache_is_not_reused(runs, tmp_path):
    settings = {"pretrained": str(runs / "ar"), "use_cache": str(tmp_path / "cache")}
    model = MegatronLM(**settings)
    instances = choices_of(*spanning_pair(model))
    old_key = model._cache.key("loglikelihood", doc_key(instances[0]), [instances[0].args])
    model._cache.add(old_key, [{"log_likelihood": 0.0, "is_greedy": True}])
    (answer,) = MegatronLM(**settings).loglikelihood(instances)
    assert answer[0] < 0
    again = MegatronLM(**settings)
    again._compute = None  # the answer of the current tokenization is cached
    assert again.loglikelihood(instances) == [answer]


def test_records_of_a_command_on_more_ranks_do_not_stay(tmp_path):
    path = str(tmp_path / "scores.jsonl")
    for size, left in ((4, "0123"), (2, "01"), (1, "")):
        for rank in range(size):
            _records_path(path, rank, size).write_text("a score\n")
        (tmp_path / "scores_rank.jsonl").touch()  # of another name
        names = [f"scores_rank{rank}.jsonl" for rank in left] or ["scores.jsonl"]
        assert sorted(file.name for file in tmp_path.iterdir()) == sorted([*names, "scores_rank.jsonl"])


def test_a_command_that_resumes_replaces_its_records(runs, tmp_path):
    records = tmp_path / "scores.jsonl"
    settings = {"pretrained": str(runs / "ar"), "use_cache": str(tmp_path / "cache"), "records": str(records)}
    lines = []
    for _ in range(2):
        MegatronLM(**settings).loglikelihood(choices_of("import", " os", " sys"))
        lines.append(records.read_text().splitlines())
    assert len(lines[0]) == 2 and lines[1] == lines[0]


# ------------------------------------------------------------------------------------ contexts that do not fit


@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_contexts_that_lose_their_beginning_are_counted(runs, objective, tmp_path, caplog):
    settings = {"pretrained": str(runs / objective), "use_cache": str(tmp_path / "cache")}
    for name in ("first.jsonl", "cached.jsonl"):
        caplog.clear()
        model = MegatronLM(**settings, records=str(tmp_path / name), only_mc_nll=True)
        long, room = model.tok_encode(TEXT)[: SEQ_LENGTH + 90], SEQ_LENGTH + (objective == "ar")
        context, whole = (
            model._tokenizer.decode(long),
            model._tokenizer.decode(model.tok_encode(TEXT)[: SEQ_LENGTH + 9]),
        )
        short, answers = "import", (" os", " sys", f" {whole}")
        instances = [request for text in (context, short) for request in choices_of(text, *answers, doc_id=len(text))]
        model.loglikelihood([*instances, instances[0]])  # lm-eval repeats some requests
        expected = []
        for request in instances:
            before, after = model._encode_pair(*request.args)
            expected.append(max(0, len(before) - (room - len(after) if len(after) < room else 1)))
        assert expected[0] > 80 and expected[2] == len(model.tok_encode(context)) - 1 and expected[3:5] == [0, 0]
        truncated = [tokens for tokens in expected if tokens]
        lines = [line for line in caplog.messages if "truncated on the left" in line]
        assert lines == [
            f"{len(truncated)} of 6 requests have a context that is truncated on the left to fit --seq-length "
            f"512: {sum(truncated)} tokens in total, at most {max(truncated)} in one request"
        ]
        records = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        records.sort(key=lambda record: (-record["doc_id"], record["index"]))
        assert [record["truncated_tokens"] for record in records] == expected
        info = model.get_model_info()
        assert (info["truncated_contexts"], info["truncated_tokens"]) == (len(truncated), sum(truncated))
        assert info["max_truncated_tokens"] == max(truncated)


@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_prompts_that_lose_their_beginning_are_counted_and_whole_texts_are_not(runs, objective, tmp_path, caplog):
    settings = {"pretrained": str(runs / objective), "use_cache": str(tmp_path / "cache")}
    for name in ("first.jsonl", "cached.jsonl"):
        caplog.clear()
        model = MegatronLM(**settings, records=str(tmp_path / name))
        pairs = [(text, {"max_gen_toks": 2, "until": ["e"]}) for text in (TEXT, "import", TEXT[:3000])]
        model.generate_until(instances_of(*pairs, kind="generate_until"))
        expected = [max(0, len(model.tok_encode(text)) - (SEQ_LENGTH - 2)) for text, _ in pairs]
        (line,) = [line for line in caplog.messages if "truncated" in line]
        assert line.startswith("2 of 3 requests have a context that is truncated on the left") and expected[1] == 0
        assert f"{sum(expected)} tokens in total, at most {max(expected)} in one request" in line
        records = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        assert sorted(record["truncated_tokens"] for record in records) == sorted(expected)
        caplog.clear()
        model.loglikelihood_rolling(instances_of((TEXT[:3000],), kind="loglikelihood_rolling"))
        assert not any("truncated" in line for line in caplog.messages)
        assert model.get_model_info()["truncated_contexts"] == 2


# ------------------------------------------------------------------------------------ masked diffusion


def test_masked_diffusion_is_marked_as_a_bound(runs, tasks, tmp_path):
    model = MegatronLM(pretrained=str(runs / "mdm"), num_mc=9, records=str(tmp_path / "new" / "scores.jsonl"))
    results = evaluated(model, tasks, ["choices", "rolling", "writing"])
    config = results["config"]
    assert config["upper_bound"] and config["objective"] == "mdm" and config["num_mc"] == 9
    assert config["standard_error_per_request"] > 0 and 1 < config["samples_per_request"] <= 9 * 9  # in windows
    lines = [json.loads(line) for line in (tmp_path / "new" / "scores.jsonl").read_text().splitlines()]
    generated = [line for line in lines if line["request"] == "generate_until"]
    assert len(lines) - len(generated) == config["requests"] == 11 * 3 + 2 + 3 and len(generated) == 2
    assert all(line["truncated_tokens"] == 0 for line in lines)
    for sample in results["samples"]["choices"]:
        records = [line for line in lines if line["task"] == "choices" and line["doc_id"] == sample["doc_id"]]
        records.sort(key=lambda line: line["index"])
        assert [line["log_likelihood"] for line in records] == [float(answer[0][0]) for answer in sample["resps"]]
        assert all(line["upper_bound"] == (line["samples"] > 1) for line in records)
    rolling = [line for line in lines if line["request"] == "loglikelihood_rolling"]
    assert len(rolling) == 3 and all(line["is_greedy"] is None for line in rolling)
    # one token is exact, and a bound has an error
    assert all((line["standard_error"] > 0) <= line["upper_bound"] for line in lines if line not in generated)


def test_a_model_that_only_generates_gives_no_likelihood(runs, tasks):
    model = MegatronLM(pretrained=str(runs / "mdm"), only_generate=True)
    ((nats, greedy),) = model.loglikelihood(instances_of(("import", " os")))
    assert math.isnan(nats) and greedy in (True, False)
    with pytest.raises(
        ConfigurationError, match="--only_generate: evaluates no likelihood, and a task needs that of whole texts"
    ):
        model.loglikelihood_rolling(instances_of(("x",), kind="loglikelihood_rolling"))
    ((nats, greedy),) = MegatronLM(pretrained=str(runs / "mdm"), only_mc_nll=True).loglikelihood(
        instances_of(("a", "b"))
    )
    assert nats < 0 and greedy is False


def test_two_processes_give_what_one_gives(runs, tasks):
    names = ["choices", "rolling"]
    alone = evaluated(MegatronLM(pretrained=str(runs / "mdm"), num_mc=9, only_mc_nll=True), tasks, names)
    shared, nothing = spawn(_share, 2, str(runs / "mdm"), tasks, names)
    assert nothing is None
    for name in names:
        for metric, value in alone["results"][name].items():
            close = pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
            assert shared["results"][name][metric] == close, (name, metric)
    for key in ("requests", "forward_tokens", "samples_per_request", "standard_error_per_request"):
        assert shared["config"][key] == pytest.approx(alone["config"][key], rel=1e-4), key
    assert shared["config"]["answers_encoded_alone"] == alone["config"]["answers_encoded_alone"] == 2
    assert shared["truncated"] == (3, sum(shared["tokens"]), max(shared["tokens"]))  # 1 of rank 0, 2 of rank 1
    (line,) = [line for line in shared["lines"] if "truncated on the left" in line]
    assert line.startswith("3 of 5 requests have a context that is truncated")


def _share(ranks, run, tasks, names):
    os.environ |= {"RANK": str(ranks.rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(ranks.rank)}
    model, lines = MegatronLM(pretrained=run, num_mc=9, only_mc_nll=True), []
    results = evaluated(model, tasks, names)
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("megatron").addHandler(handler)
    texts = [TEXT, "a"] if ranks.rank == 0 else [TEXT * 2, "b", TEXT * 3]
    model.loglikelihood([request for text in texts for request in choices_of(text, " x")])
    model.barrier()
    info = model.get_model_info()
    truncated = tuple(
        info[f"{name}truncated_{unit}"] for name, unit in (("", "contexts"), ("", "tokens"), ("max_", "tokens"))
    )
    pairs = [model._encode_pair(TEXT * times, " x") for times in (1, 2, 3)]
    lengths = [len(context) + len(continuation) - SEQ_LENGTH for context, continuation in pairs]
    statistics = {"truncated": truncated, "tokens": lengths, "lines": lines}
    return results and {key: results[key] for key in ("results", "config")} | statistics


# ------------------------------------------------------------------------------------ the command line


def test_the_command_writes_what_lm_eval_writes_and_goes_on_from_its_cache(runs, tasks, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["harness"])
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    command = ["--load", str(runs / "mdm"), "--task_list", "choices", "--include_path", str(tasks), "--num-mc", "9"]
    command += [
        "--output_path",
        str(tmp_path / "first_results"),
        "--log_samples",
        "--use_cache",
        str(tmp_path / "cached" / "cache"),
    ]
    harness(command)
    first = capsys.readouterr().out
    assert "acc_norm" in first
    (folder,) = (tmp_path / "first_results").iterdir()
    (results,) = folder.glob("results_*.json")
    (samples,) = folder.glob("samples_choices_*.jsonl")
    (scores,) = folder.glob("scores_*.jsonl")
    first_results = json.loads(results.read_text())
    assert (
        first_results["config"]["upper_bound"]
        and first_results["config"]["model"] == "megatron"
        and "acc,none" in first_results["results"]["choices"]
    )
    assert len(samples.read_text().splitlines()) == 12 and len(scores.read_text().splitlines()) == 35
    monkeypatch.setattr(MegatronLM, "_compute", None)  # everything is cached
    harness(command)
    table = [line for line in first.splitlines() if "acc" in line]
    assert [line for line in capsys.readouterr().out.splitlines() if "acc" in line] == table
    repeated = max(folder.glob("results_*.json"), key=lambda path: path.stat().st_mtime_ns)
    figures = ("upper_bound", "requests", "forward_tokens", "samples_per_request", "standard_error_per_request")
    repeated_config = json.loads(repeated.read_text())["config"]
    assert repeated != results
    assert [repeated_config[name] for name in figures] == pytest.approx(
        [first_results["config"][name] for name in figures]
    )


@pytest.mark.parametrize("objective", [pytest.param("ar", marks=pytest.mark.slow), "mdm"])
def test_what_a_kill_left_in_a_cache_is_gone_on_from(runs, tasks, tmp_path, monkeypatch, objective):
    names, cache, scores = ["choices", "rolling", "writing"], tmp_path / "cached" / "cache", []
    settings = {"pretrained": str(runs / objective), "use_cache": str(cache)}
    whole = evaluated(MegatronLM(pretrained=settings["pretrained"]), tasks, names)
    plain = MegatronLM._add_score

    def stopped(self, *arguments):
        plain(self, *arguments)
        scores.append(arguments)
        if len(scores) == 20:  # between the choices of a document
            raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(MegatronLM, "_add_score", stopped)
        with pytest.raises(InterruptedError):
            evaluated(MegatronLM(**settings), tasks, names)
    (file,) = cache.parent.iterdir()
    assert file.name == "cache_rank0.jsonl" and len(file.read_text().splitlines()) > 4
    file.write_text(file.read_text()[:-20])  # the last line is truncated
    file.rename(file.with_name("cache_rank1.jsonl"))  # of another rank
    resumed = evaluated(MegatronLM(**settings), tasks, names)
    for name in names:
        for sample, whole_sample in zip(resumed["samples"][name], whole["samples"][name], strict=True):
            if name == "writing":
                assert sample["resps"] == whole_sample["resps"]
            else:
                np.testing.assert_allclose(
                    *(np.array(values["resps"], float) for values in (sample, whole_sample)), atol=1e-4
                )
    assert resumed["config"]["upper_bound"] == (objective == "mdm")
    assert resumed["config"]["requests"] == whole["config"]["requests"] == 38
    for name in ("samples_per_request", "standard_error_per_request") if objective == "mdm" else ():
        assert resumed["config"][name] == pytest.approx(whole["config"][name], rel=1e-4)
    for name in ("_compute", "_generate"):
        monkeypatch.setattr(MegatronLM, name, None)  # everything is cached
    assert evaluated(MegatronLM(**settings), tasks, names)["samples"].keys() == resumed["samples"].keys()


def test_a_cache_answers_for_its_own_model_and_settings_only(runs, tasks, tmp_path, monkeypatch):
    cache = {"use_cache": str(tmp_path / "cache")}
    evaluated(MegatronLM(pretrained=str(runs / "mdm"), **cache), tasks, ["choices"])
    retrained = tmp_path / "retrained"  # the same steps and name, different weights
    shutil.copytree(runs / "mdm", retrained)
    meta = retrained / "checkpoints" / "iter_0000006" / "meta.json"
    changed = json.loads(meta.read_text())
    changed["files"] = {name: [size, checksum ^ 1] for name, (size, checksum) in changed["files"].items()}
    meta.write_text(json.dumps(changed))
    monkeypatch.setattr("megatron.training.checkpoint_store.damage", lambda folder: None)
    moved = tmp_path / "moved"
    shutil.copytree(runs / "mdm", moved)
    computed = []
    monkeypatch.setattr(MegatronLM, "_compute", lambda self, requests, *_: computed.extend(requests))
    for changes in (
        {"num_mc": 31},
        {"eval_seed": 1},
        {"decide_at": 0.0},
        {"dtype": "bfloat16"},
        {"pretrained": str(retrained)},
        {"pretrained": str(runs / "mdm" / "checkpoints" / "iter_0000005")},
    ):
        computed.clear()
        with pytest.raises(KeyError):  # nothing is cached, and nothing was computed
            evaluated(MegatronLM(**{"pretrained": str(runs / "mdm"), **cache, **changes}), tasks, ["choices"])
        assert len(computed) == 35, changes
    computed.clear()
    evaluated(MegatronLM(pretrained=str(moved), batch_size=3, **cache), tasks, ["choices"])
    assert not computed


def test_the_cache_of_lm_eval_is_refused(runs, tasks, tmp_path):
    model = MegatronLM(pretrained=str(runs / "mdm"))
    with pytest.raises(ConfigurationError, match="use_cache: lm-eval's own cache ignores checkpoints and settings"):
        evaluated(model, tasks, ["choices"], use_cache=str(tmp_path / "cache"))


def test_checkpoints_are_scored_along_a_run(runs, tasks, tmp_path):
    record = score_checkpoints(str(runs / "ar"), ["choices", "rolling"], Scoring(), include_path=str(tasks), limit=3)
    assert [point["iteration"] for point in record["points"]] == [5, 6]
    unique = open_trained(str(runs / "ar")).recorded["unique_tokens"]
    for point in record["points"]:
        assert point["epoch"] == pytest.approx(4 * point["iteration"] * SEQ_LENGTH / unique)
        assert 0 <= point["results"]["choices"]["acc,none"] <= 1
    last = evaluated(MegatronLM(pretrained=str(runs / "ar")), tasks, ["choices"], limit=3)["results"]["choices"]
    assert record["points"][-1]["results"]["choices"]["acc,none"] == last["acc,none"]
    json.dumps(record)
    plot_task_scores(record, tmp_path / "scores.png")
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 1
    for run, names, message in (
        (tmp_path, ["choices"], f"{tmp_path}: has no intact checkpoint"),
        (runs / "ar", ["x"], "--tasks x: is"),
    ):
        with pytest.raises(ConfigurationError) as caught:
            score_checkpoints(str(run), names, Scoring(), include_path=str(tasks), limit=None)
        assert str(caught.value).startswith(message)
    missing = tmp_path / "tasks"
    missing.mkdir()
    (missing / "choices.yaml").write_text((tasks / "choices.yaml").read_text().replace("choices.jsonl", "gone.jsonl"))
    with pytest.raises(ConfigurationError, match="--tasks choices: .*gone.jsonl"):
        score_checkpoints(str(runs / "ar"), ["choices"], Scoring(), include_path=str(missing), limit=None)


def test_an_imported_run_has_no_epochs(runs, tasks, tmp_path):
    """Its configuration has no unique tokens, since its data are unknown."""
    shutil.copytree(runs / "ar", tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").glob("*/meta.json"):
        meta = json.loads(path.read_text())
        meta["config"]["unique_tokens"] = 0
        path.write_text(json.dumps(meta))
    record = score_checkpoints(str(tmp_path / "run"), ["choices"], Scoring(), include_path=str(tasks), limit=3)
    assert [(point["iteration"], point["epoch"]) for point in record["points"]] == [(5, None), (6, None)]


def test_a_damaged_checkpoint_is_named_and_the_others_are_scored(runs, tasks, tmp_path, caplog):
    shutil.copytree(runs / "ar", tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "iter_0000005"
    file = next(folder.glob("*.safetensors"))
    whole = file.read_bytes()
    settings = {"include_path": str(tasks), "limit": 3, "cache": tmp_path / "answers"}
    for damage in (lambda: file.write_bytes(whole[:1000]), lambda: _flip(file, whole), file.unlink):
        damage()
        caplog.clear()
        record = score_checkpoints(str(tmp_path / "run"), ["choices"], Scoring(), **settings)
        assert [point["iteration"] for point in record["points"]] == [6]
        (message,) = [line for line in caplog.messages if "is damaged (" in line]
        assert message.startswith(f"checkpoint {folder} is damaged ({file.name} ") and message.endswith(
            ") and left out"
        )
    file.write_bytes(whole)
    record = score_checkpoints(str(tmp_path / "run"), ["choices"], Scoring(), **settings)
    assert [point["iteration"] for point in record["points"]] == [5, 6]
    assert len((tmp_path / "answers_rank0.jsonl").read_text().split()) > 2  # of both checkpoints


def _flip(file, whole: bytes):
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))


PROGRAMS = ["-m megatron.scoring.lm_eval_cli", "tools/score_checkpoints.py"]


@pytest.mark.parametrize("program", PROGRAMS)
def test_without_lm_eval_one_line_says_what_installs_it(program, tmp_path):
    (tmp_path / "lm_eval.py").write_text("raise ImportError('not here')")
    completed = run_python(*program.split(), "--tasks", "x", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert completed.returncode == 2
    (message,) = completed.stderr.splitlines()
    assert message == "error: scoring needs the package lm-eval (not here); bash install.sh --with-eval"


def test_unknown_tasks_and_missing_data_are_said_in_one_line(runs, tasks, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["harness"])
    broken = tmp_path / "tasks"
    broken.mkdir()
    for name in ("choices.yaml",):
        text = (tasks / name).read_text().replace("choices.jsonl", "gone.jsonl")
        (broken / name).write_text(text)
    for name in ("choices", "chices"):
        with pytest.raises(SystemExit) as exit_info:
            harness(["--pretrained", str(runs / "ar"), "--tasks", name, "--include_path", str(broken)])
        assert exit_info.value.code == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert message.startswith(f"error: --tasks {name}: ") and (
            "gone.jsonl" in message or "Tasks not found: chices" in message
        )


@pytest.mark.slow  # lm-eval reads the files of all its tasks
def test_the_nine_published_tasks_are_known_without_a_network():
    manager = TaskManager(include_defaults=True)
    assert set(manager.match_tasks(NINE)) == set(NINE)


@pytest.fixture
def command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["harness"])
    return lambda *words: prepare(read(list(map(str, words))))


def test_what_is_wrong_is_said_before_any_work(runs, command, tmp_path):
    mdm, ar = runs / "mdm", runs / "ar"
    damaged = tmp_path / "damaged"
    shutil.copytree(mdm, damaged)
    damaged = damaged / "checkpoints" / "iter_0000006"
    next(damaged.glob("*.safetensors")).unlink()
    stranger = tmp_path / "stranger"
    shutil.copytree(mdm, stranger)
    recorded = json.loads((stranger / "config.json").read_text())
    (stranger / "config.json").write_text(json.dumps(recorded | {"vocabulary_size": 299}))
    for words, message in (
        (["--tasks", "x"], "--pretrained: required and not given; name a folder that --save wrote"),
        (["--pretrained", tmp_path, "--tasks", "x"], f"{tmp_path}: holds no run and is no checkpoint"),
        (["--pretrained", damaged, "--tasks", "x"], f"{damaged}: is damaged ("),
        (
            ["--pretrained", stranger, "--tasks", "x"],
            f"--tokenizer-model {runs}/data/tokenizer.json: is not the tokenizer",
        ),
        (["--pretrained", mdm], "--tasks: required and not given"),
        (["--pretrained", mdm, "--num-mc", "2", "--tasks", "x"], "--num-mc 2: must be at least 5"),
        (["--pretrained", ar, "--cfg", "1", "--tasks", "x"], "--cfg 1.0: acts in masked diffusion"),
        (["--pretrained", mdm, "--eval_method", "x", "--tasks", "x"], "--eval_method x: is not one of ar, mc"),
        (
            ["--model_args", f"pretrained={mdm},num_mcc=9", "--tasks", "x"],
            "--model_args num_mcc=9: unknown name; did you",
        ),
        (
            ["--model_args", f"pretrained={mdm},num_mc=many", "--tasks", "x"],
            "--model_args num_mc=many: is not of type int",
        ),
        (["--pretrained", mdm, "--method", "x", "--tasks", "x"], "--likelihood x: is not one of bound, chain"),
        (
            ["--pretrained", mdm, "--tasks", "x", "--include_path", tmp_path / "x"],
            f"--include_path {tmp_path}/x: is",
        ),
        (
            ["--pretrained", ar, "--tasks", "x", "--gen_kwargs", "max_gen_toks=600"],
            "max_gen_toks 600 of a task",
        ),
        (["--pretrained", ar, "--tasks", "x", "--gen_kwargs", "steps=2"], "--gen_kwargs steps=2: acts in masked"),
        (["--pretrained", ar, "--tasks", "x", "--apply_chat_template"], "--apply_chat_template: a run has no chat"),
        (["--model", "hf", "--cfg", "1", "--tasks", "x"], "--cfg: acts on --model megatron, and --model hf was given"),
    ):
        with pytest.raises(ConfigurationError) as caught:
            command(*words)
        assert str(caught.value).startswith(message) and "\n" not in str(caught.value), words


def test_spellings_of_the_published_scorers(runs, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["harness"])
    words = f"--load {runs}/mdm --task_list a,b --results_path out --eval_method=ar --eval_fp32 --adaptive_seq_len"
    options = read([*words.split(), "--max_chunk_size", "32", "--limit", "3"])
    assert (
        options.tasks == ["a", "b"]
        and options.output_path == "out"
        and options.limit == 3
        and options.batch_size == "auto"
    )
    assert options.model_args == {"pretrained": f"{runs}/mdm", "likelihood": "chain", "dtype": "float32"}
    options = read(f"--run {runs}/mdm --tasks a --eval_method mc --only_mc_nll --num_mc 64 --batch_size 8".split())
    assert (
        options.model_args == {"pretrained": f"{runs}/mdm", "likelihood": "bound", "only_mc_nll": True, "num_mc": 64}
        and options.batch_size == "8"
    )
    options = read(["--model_args", f"pretrained={runs}/mdm,num_mc=16", "--num-mc", "32", "--tasks", "a"])
    assert options.model_args["num_mc"] == 32  # a flag wins, also with its default
    options = read(["--model_args", f"run={runs}/mdm,checkpoint=best", "--tasks", "a"])
    assert options.model_args == {"pretrained": f"{runs}/mdm", "checkpoint": "best"} and options.model == "megatron"


def test_generation_is_read_as_tasks_write_it():
    greedy, until = read_generation(
        {"until": "\n", "max_gen_toks": 5, "do_sample": False, "temperature": 0.7, "top_p": 0.9}, "ar", 32
    )
    assert (greedy.max_new_tokens, greedy.temperature, greedy.top_p, until) == (5, 0.0, 1.0, ("\n",))
    random, until = read_generation({"do_sample": True, "top_k": 4, "max_gen_toks": 5, "until": ["a", "b"]}, "mdm", 32)
    assert (random.temperature, random.top_k, until) == (1.0, 4, ("a", "b"))
    assert read_generation({"steps": 2, "max_gen_toks": 5}, "mdm", 32)[0].steps == 2
    for settings, message in (
        ({"steps": 2, "max_gen_toks": 5}, "--gen_kwargs steps=2: acts in masked diffusion only"),
        ({"num_beams": 4, "max_gen_toks": 5}, "--gen_kwargs num_beams=4: is not supported by these models"),
        ({}, "max_gen_toks 256 of a task: leaves no room for a prompt in the 32 tokens of --seq-length"),
    ):
        with pytest.raises(ConfigurationError) as caught:
            read_generation(settings, "ar", 32)
        assert str(caught.value).startswith(message)
    assert cut("one two three", ["three", "two", ""]) == "one " and cut("one", ["x"]) == "one"


def test_devices_and_rows_that_are_none(runs):
    for options, message in (
        ({"device": "cuda:9"}, "--device cuda:9: this machine has no such device"),
        ({"batch_size": "auto:4"}, "--batch_size auto:4: is neither auto nor a number of sequences"),
    ):
        with pytest.raises(ConfigurationError) as caught:
            MegatronLM(pretrained=str(runs / "ar"), **options)
        assert str(caught.value).startswith(message)
    assert MegatronLM(pretrained=str(runs / "ar"), batch_size="8", max_batch_size=4).scoring.batch_rows == 4


TASKS_OF_FILES_ONLY = """
from functools import partialmethod
from lm_eval.tasks import TaskManager
from megatron.scoring.lm_eval_cli import main
TaskManager.__init__ = partialmethod(TaskManager.__init__, include_defaults=False)
main()
"""


def test_a_task_with_fewer_documents_than_ranks_is_refused(runs, tasks):
    """lm-eval fails on a rank without a document, which then ends the others."""
    flags = ["--pretrained", runs / "ar", "--tasks", "writing", "--limit", "1", "--include_path", tasks]
    completed = run_script(["-c", TASKS_OF_FILES_ONLY, *map(str, flags)], environment(), 200, size=2)
    message = "--tasks writing: a task has fewer documents than the 2 ranks; start fewer, or give a higher --limit"
    assert completed.returncode and f"error: {message}" in completed.stderr.splitlines()
