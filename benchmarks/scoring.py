#!/usr/bin/env python3
"""Scoring beside the published estimator, and beside lm-eval's own model of transformers.

    python benchmarks/scoring.py --output scoring.json

Without --mdm and --ar two small models are trained first, on the source of Python's standard library, by the tools' own
commands. Three tables: how many times less variance the bound has than the published estimator (times u + k / K mod 1,
tokens hidden independently, nll over time) at as many rows; what a question with four answers costs and which answer
wins, beside the published 32 rows and 1,024 of ours; and requests a second of the AR model under lm-eval, ours and
transformers' (CPU time of the process, in turns, the same weights and requests).
"""

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from benchmarks.contestants import version
from benchmarks.options import read_options
from megatron.config.flags import flag, require
from megatron.data.indexed import IndexedDataset
from megatron.evaluation.batched_forward import Limits, Row, ask
from megatron.evaluation.requests import Request, Scoring
from megatron.evaluation.score import score
from megatron.training.load_run import Trained, open_trained

PUBLISHED_ROWS, PUBLISHED_TOKENS = 32, 2048  # of every request, filled up with masks
TARGETS = (1, 4, 16, 64)
REFERENCE = 1024


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured."""

    mdm: str | None = flag(None, "a masked-diffusion run", metavar="RUN")
    ar: str | None = flag(None, "an autoregressive run of a trained tokenizer (HFTokenizer)", metavar="RUN")
    folder: str = flag("runs/scoring", "where models are trained that are not named", metavar="DIR")
    train_iters: int = flag(600, "steps that they are trained for")
    texts: int = flag(6, "texts of each length whose variance is measured")
    draws: int = flag(40, "estimates of each")
    questions: int = flag(12, "questions of four answers")
    context: int = flag(24, "tokens of a context")
    answer: int = flag(12, "tokens of an answer, give or take a third")
    rounds: int = flag(3, "rounds of the race with transformers")
    output: str | None = flag(None, "write the JSON to a file too", metavar="FILE")

    def __post_init__(self):
        for name in ("train_iters", "texts", "questions", "context", "answer", "rounds"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        require(self.draws >= 2, "draws", self.draws, "must be at least 2, as a variance is taken of them")


def main() -> None:
    options = read_options(Options, __doc__)
    torch.set_num_threads(1)
    mdm = open_trained(options.mdm or trained(options, "mdm"))
    report = {
        "date": str(date.today()),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "lm_eval")},
        "settings": vars(options),
        "mdm": {"parameters": mdm.recorded["parameters"], "iteration": mdm.meta["iteration"]},
        "variance": variances(options, mdm),
        "questions": questions(options, mdm),
        "race": race(options, open_trained(options.ar or trained(options, "ar"))),
    }
    print(table(report))
    if options.output:
        Path(options.output).write_text(json.dumps(report, indent=1) + "\n")


def trained(options: Options, objective: str) -> str:
    """Return a run, which is trained if it is not there yet."""
    folder, run = Path(options.folder), Path(options.folder) / objective
    _command("tools/preprocess_data.py", "--output-dir", folder / "data", "--train-tokenizer", 512)
    flags = "--num-layers 2 --hidden-size 64 --num-attention-heads 2 --seq-length 128 --fp32 --no-compile --lr 4e-3 "
    flags += f"--micro-batch-size 16 --global-batch-size 16 --train-iters {options.train_iters} --eval-samples 32"
    data = ["--train-data-path", folder / "data" / "train", "--valid-data-path", folder / "data" / "validation"]
    entry = {"ar": "pretrain_gpt.py", "mdm": "pretrain_mdm.py"}[objective]
    _command(entry, *flags.split(), *data, "--save", run)
    return str(run)


def _command(program: str, *arguments) -> None:
    done = subprocess.run([sys.executable, ROOT / program, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{program} failed: {done.stderr[-1000:]}")


def passages(run: Trained, sizes: list[int], seed: int) -> list[list[int]]:
    """Return passages of the validation text of a run, each within one document."""
    dataset = IndexedDataset(run.config.data.valid_data_path[-1].split("=")[-1], run.vocabulary.size)
    documents = [np.asarray(dataset[index])[:-1].tolist() for index in range(len(dataset))]
    draw, found = np.random.default_rng(seed), []
    for size in sizes:
        long = [document for document in documents if len(document) >= size]
        document = long[draw.integers(len(long))]
        begin = draw.integers(len(document) - size + 1)
        found.append(document[begin : begin + size])
    return found


def published(run: Trained, model, texts: list[tuple[list[int], list[int]]], rows: int, seed: int) -> list[float]:
    """Return the published estimate of the negative log-likelihood of each (context, answer)."""
    draw, asked, owners, shares = np.random.default_rng(seed), [], [], []
    for owner, (context, answer) in enumerate(texts):
        for share in (draw.random() + np.arange(rows) / rows) % 1:
            places = len(context) + np.flatnonzero(draw.random(len(answer)) < share)
            if len(places):
                tokens = np.array([*context, *answer])
                targets, tokens[places] = tokens[places], run.vocabulary.mask_id
                asked.append(Row(tokens, places, targets))
                owners.append(owner)
                shares.append(share)
    sums = [said.nll.sum() for said in ask(model, asked, Limits(16384))]
    return np.bincount(owners, np.array(sums) / shares / rows, minlength=len(texts)).tolist()


def variances(options: Options, run: Trained) -> list[dict]:
    """Return, of each length, the variance of the published estimator and of ours, at 32 rows."""
    model, longest, found = run.model(), run.config.data.seq_length, []
    for size in (*TARGETS, longest - 1):
        context = min(options.context, longest - size)
        texts = [(text[:context], text[context:]) for text in passages(run, [context + size] * options.texts, size)]
        theirs = np.array([published(run, model, texts, PUBLISHED_ROWS, seed) for seed in range(options.draws)])
        asked = [Request(*text, f"{draw}/{index}") for draw in range(options.draws) for index, text in enumerate(texts)]
        scoring = Scoring(num_mc=PUBLISHED_ROWS, decide_at=0.0, only_mc_nll=True)
        scores = score(model, "mdm", asked, scoring, run.tokenizer().eod, longest)
        ours = -np.array([one.log_likelihood for one in scores]).reshape(theirs.shape)
        before, after = theirs.var(axis=0, ddof=1).mean(), ours.var(axis=0, ddof=1).mean()
        exact = all(one.standard_error == 0 for one in scores)
        found.append(
            {
                "tokens": size,
                "published_variance": before,
                "variance": 0.0 if exact else after,
                "times": None if exact else before / after,
                "samples": max(one.samples for one in scores),
                "reported_variance": np.mean([one.standard_error**2 for one in scores]),
            }
        )
    return found


def questions(options: Options, run: Trained) -> dict:
    """Return what four answers to each question cost, and how often the best is that of 1,024 samples."""
    model, draw = run.model(), np.random.default_rng(1)
    longest, eod = run.config.data.seq_length, run.tokenizer().eod
    sizes = draw.integers(
        options.answer - options.answer // 3, options.answer + options.answer // 3 + 1, 4 * options.questions
    )
    true = passages(run, [options.context + int(size) for size in sizes[::4]], 2)
    other = iter(passages(run, [int(size) for index, size in enumerate(sizes) if index % 4], 3))
    asked = []
    for index, text in enumerate(true):
        context, answers = text[: options.context], [text[options.context :], *(next(other) for _ in range(3))]
        asked += [Request(context, answer, f"question {index}") for answer in answers]

    def ours(**settings):
        return score(model, "mdm", asked, Scoring(only_mc_nll=True, **settings), eod, longest)

    def best(nats) -> np.ndarray:
        return np.array(nats).reshape(-1, 4).argmin(1)

    exact, few = ours(num_mc=REFERENCE, decide_at=0.0, eval_seed=1), ours()
    reference = best([-one.log_likelihood for one in exact])
    texts = [(request.context, request.continuation) for request in asked]
    theirs = np.array([published(run, model, texts, PUBLISHED_ROWS, seed) for seed in range(5)])
    within = options.context + np.array(sizes)
    return {
        "questions": options.questions,
        "published": {
            "tokens_per_request": PUBLISHED_ROWS * PUBLISHED_TOKENS,
            "tokens_per_request_unpadded": float(PUBLISHED_ROWS * within.mean()),
            "error": float(np.sqrt(((theirs - [-one.log_likelihood for one in exact]) ** 2).mean())),
            "same_best": float(np.mean([best(each) == reference for each in theirs]) * options.questions),
        },
        "ours": {
            "tokens_per_request": float(np.mean([one.forward_tokens for one in few])),
            "samples": float(np.mean([one.samples for one in few])),
            "error": float(np.sqrt(np.mean([one.standard_error**2 for one in few]))),
            "same_best": int((best([-one.log_likelihood for one in few]) == reference).sum()),
        },
        "reference_error": float(np.sqrt(np.mean([one.standard_error**2 for one in exact]))),
        "true_answer_is_best": int((reference == 0).sum()),
    }


def race(options: Options, run: Trained) -> dict:
    """Return requests a second of both under lm-eval, in rounds that take turns, and how far their answers differ."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    from megatron.convert.huggingface import hugging_face_config, hugging_face_model
    from megatron.evaluation.language_model import MegatronLM

    tokenizer = run.tokenizer()
    file = tokenizer.named.removeprefix("--tokenizer-model ")
    library = PreTrainedTokenizerFast(tokenizer_file=file, eos_token="<|endoftext|>")
    rows = 16
    ours = MegatronLM(pretrained=run.name, batch_size=rows, device="cpu")
    as_theirs = hugging_face_config(run.config.model, rows=run.vocabulary.size, positions=run.config.data.seq_length)
    twin = hugging_face_model(run.model(), as_theirs)
    theirs = HFLM(pretrained=twin, tokenizer=library, batch_size=rows, device="cpu", backend="causal")
    asked = []
    for index, text in enumerate(passages(run, [options.context + 4 * options.answer] * 4 * options.questions, 4)):
        parts = [text[options.context + options.answer * place :][: options.answer] for place in range(4)]
        for place, part in enumerate(parts):
            pair = (tokenizer.decode(text[: options.context]), tokenizer.decode(part))
            asked.append(Instance("loglikelihood", {"index": index}, pair, place, ("race", index, 1)))
    answer: dict[str, Callable] = {
        "ours": lambda: ours.loglikelihood(asked, disable_tqdm=True),
        "transformers": lambda: theirs.loglikelihood(asked, disable_tqdm=True),
    }
    seconds, found = {name: [] for name in answer}, {}
    for turn in range(options.rounds + 1):
        for name in list(answer)[:: 1 if turn % 2 else -1]:
            begin = time.process_time()
            found[name] = answer[name]()
            seconds[name] += [time.process_time() - begin] if turn else []  # the first warms up
    gaps = [abs(one[0] - other[0]) for one, other in zip(*found.values(), strict=True)]
    ratios = [theirs / ours for ours, theirs in zip(*seconds.values(), strict=True)]
    return {
        "requests": len(asked),
        "requests_per_second": {name: len(asked) / median(times) for name, times in seconds.items()},
        "times": {"median": median(ratios), "lowest": min(ratios), "highest": max(ratios)},
        "largest_difference": max(gaps),
    }


def table(report: dict) -> str:
    """Return the report as Markdown tables."""
    lines = [
        "| target tokens | published variance, nats² | ours | times less | ours as reported |",
        "|---|---|---|---|---|",
    ]
    for row in report["variance"]:
        times = "exact" if row["times"] is None else f"{row['times']:.0f}"
        lines.append(
            f"| {row['tokens']} | {row['published_variance']:.3g} | {row['variance']:.3g} | {times} | "
            f"{row['reported_variance']:.3g} |"
        )
    found = report["questions"]
    lines += [
        "",
        "| four answers | forward tokens a request | error, nats | same best as 1,024 samples |",
        "|---|---|---|---|",
    ]
    for name in ("published", "ours"):
        row = found[name]
        lines.append(
            f"| {name} | {row['tokens_per_request']:,.0f} | {row['error']:.2f} | {row['same_best']:g} of "
            f"{found['questions']} |"
        )
    lines += ["", "| AR under lm-eval | requests a second |", "|---|---|"]
    lines += [f"| {name} | {speed:.0f} |" for name, speed in report["race"]["requests_per_second"].items()]
    times, gap = report["race"]["times"], report["race"]["largest_difference"]
    lines.append(f"\nours is {times['median']:.2f} times as fast ({times['lowest']:.2f} - {times['highest']:.2f}); ")
    lines[-1] += f"largest difference of a log-likelihood {gap:.1e}"
    return "\n".join(lines)


if __name__ == "__main__":
    main()
