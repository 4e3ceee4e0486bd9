#!/usr/bin/env python3
"""Compare scoring with the published MDM estimator and, for AR, with lm-eval's transformers model.

    python benchmarks/scoring.py --output scoring.json

Without --mdm and --ar two small models are trained first, on the source of Python's standard library, with the usual
commands. Three tables:

1. the variance of the bound and of the published estimator (times u + k / K mod 1, tokens masked independently, NLL
   divided by time), with the same number of Monte-Carlo samples;
2. cost and best choice of multiple-choice documents with four choices, against 32 samples of the published estimator
   and 1,024 of ours;
3. requests per second of the AR model under lm-eval, ours and transformers', with the same weights and requests, in
   alternating rounds of CPU time.
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
from megatron.scoring.batched_forward import Limits, MaskedSequence, predict_sequences
from megatron.scoring.requests import Request, Score, Scoring
from megatron.scoring.score import score
from megatron.training.load_run import Trained, open_trained

PUBLISHED_SAMPLES = 32  # Monte-Carlo samples of every request
PUBLISHED_TOKENS = 2048  # of every sample, padded with [MASK]
TARGET_TOKENS = (1, 4, 16, 64)
REFERENCE_SAMPLES = 1024
NUM_CHOICES = 4


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of this benchmark."""

    mdm: str | None = flag(None, "a masked-diffusion run", metavar="RUN")
    ar: str | None = flag(None, "an autoregressive run with a trained tokenizer (HFTokenizer)", metavar="RUN")
    folder: str = flag("runs/scoring", "where to train the runs that are not given", metavar="DIR")
    train_iters: int = flag(600, "iterations to train them for")
    texts: int = flag(6, "texts of each length whose variance is measured")
    draws: int = flag(40, "estimates of each text")
    questions: int = flag(12, "multiple-choice documents, each with four choices")
    context: int = flag(24, "tokens of a context")
    answer: int = flag(12, "tokens of a choice, plus or minus a third")
    rounds: int = flag(3, "rounds of the comparison with transformers")
    output: str | None = flag(None, "also write the JSON to a file", metavar="FILE")

    def __post_init__(self):
        for name in ("train_iters", "texts", "questions", "context", "answer", "rounds"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        require(self.draws >= 2, "draws", self.draws, "must be at least 2, to estimate a variance")


def main() -> None:
    """Run the benchmark from the command line."""
    options = read_options(Options, __doc__)
    torch.set_num_threads(1)
    mdm = open_trained(options.mdm or train(options, "mdm"))
    report = {
        "date": str(date.today()),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "lm_eval")},
        "settings": vars(options),
        "mdm": {"parameters": mdm.recorded["parameters"], "iteration": mdm.meta["iteration"]},
        "variance": variances(options, mdm),
        "questions": questions(options, mdm),
        "race": race(options, open_trained(options.ar or train(options, "ar"))),
    }
    print(table(report))
    if options.output:
        Path(options.output).write_text(json.dumps(report, indent=1) + "\n")


def train(options: Options, objective: str) -> str:
    """Train a run if it does not exist yet, and return its folder."""
    folder = Path(options.folder)
    run = folder / objective
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
    """Return token sequences from the validation data of a run, each within one document."""
    dataset = IndexedDataset(run.config.data.valid_data_path[-1].split("=")[-1], run.vocabulary.size)
    documents = [np.asarray(dataset[index])[:-1].tolist() for index in range(len(dataset))]
    random = np.random.default_rng(seed)
    texts = []
    for size in sizes:
        candidates = [document for document in documents if len(document) >= size]
        document = candidates[random.integers(len(candidates))]
        start = random.integers(len(document) - size + 1)
        texts.append(document[start : start + size])
    return texts


def published(
    run: Trained, model, texts: list[tuple[list[int], list[int]]], num_samples: int, seed: int
) -> list[float]:
    """Return the published estimate of the negative log-likelihood of each (context, continuation), in nats.

    1. K = `num_samples` diffusion times, t_k = (u + k / K) mod 1 with u uniform in [0, 1).
    2. For each t_k, every token of the continuation is masked with probability t_k.
    3. The estimate is the mean over k of the summed NLL of the masked tokens divided by t_k.
    """
    random = np.random.default_rng(seed)
    sequences = []
    text_indices = []  # by sequence
    times = []  # by sequence
    for text_index, (context, continuation) in enumerate(texts):
        for t in (random.random() + np.arange(num_samples) / num_samples) % 1:
            masked = len(context) + np.flatnonzero(random.random(len(continuation)) < t)
            if len(masked):
                tokens = np.array([*context, *continuation])
                targets = tokens[masked]
                tokens[masked] = run.vocabulary.mask_id
                sequences.append(MaskedSequence(tokens, masked, targets))
                text_indices.append(text_index)
                times.append(t)
    sums = [prediction.nll.sum() for prediction in predict_sequences(model, sequences, Limits(16384))]
    return np.bincount(text_indices, np.array(sums) / times / num_samples, minlength=len(texts)).tolist()


def variances(options: Options, run: Trained) -> list[dict]:
    """Return, for each number of target tokens, the variance of the published estimator and of ours, at 32 samples."""
    model = run.model()
    seq_length = run.config.data.seq_length
    results = []
    for size in (*TARGET_TOKENS, seq_length - 1):
        context = min(options.context, seq_length - size)
        texts = [(text[:context], text[context:]) for text in passages(run, [context + size] * options.texts, size)]
        theirs = np.array([published(run, model, texts, PUBLISHED_SAMPLES, seed) for seed in range(options.draws)])
        # noise is a function of the document id: one id per draw and text
        requests = [
            Request(*text, f"{draw}/{index}") for draw in range(options.draws) for index, text in enumerate(texts)
        ]
        scoring = Scoring(num_mc=PUBLISHED_SAMPLES, decide_at=0.0, only_mc_nll=True)
        scores = score(model, "mdm", requests, scoring, eod=run.tokenizer().eod, seq_length=seq_length)
        ours = -np.array([estimate.log_likelihood for estimate in scores]).reshape(theirs.shape)  # [draws, texts]
        published_variance = theirs.var(axis=0, ddof=1).mean()
        variance = ours.var(axis=0, ddof=1).mean()
        exact = all(estimate.standard_error == 0 for estimate in scores)
        results.append(
            {
                "tokens": size,
                "published_variance": published_variance,
                "variance": 0.0 if exact else variance,
                "times": None if exact else published_variance / variance,
                "samples": max(estimate.samples for estimate in scores),
                "reported_variance": np.mean([estimate.standard_error**2 for estimate in scores]),
            }
        )
    return results


def questions(options: Options, run: Trained) -> dict:
    """Return cost and error of multiple-choice scoring, and how often the best choice is that of 1,024 samples."""
    model = run.model()
    requests = _choice_requests(options, run)

    def ours(**settings) -> list[Score]:
        scoring = Scoring(only_mc_nll=True, **settings)
        return score(model, "mdm", requests, scoring, eod=run.tokenizer().eod, seq_length=run.config.data.seq_length)

    def best(nlls) -> np.ndarray:
        return np.array(nlls).reshape(-1, NUM_CHOICES).argmin(1)

    reference_scores = ours(num_mc=REFERENCE_SAMPLES, decide_at=0.0, eval_seed=1)
    scores = ours()
    reference_nlls = [-estimate.log_likelihood for estimate in reference_scores]
    reference_best = best(reference_nlls)
    texts = [(request.context, request.continuation) for request in requests]
    theirs = np.array([published(run, model, texts, PUBLISHED_SAMPLES, seed) for seed in range(5)])
    lengths = np.array([len(context) + len(continuation) for context, continuation in texts])
    return {
        "questions": options.questions,
        "published": {
            "tokens_per_request": PUBLISHED_SAMPLES * PUBLISHED_TOKENS,
            "tokens_per_request_unpadded": float(PUBLISHED_SAMPLES * lengths.mean()),
            "error": float(np.sqrt(((theirs - reference_nlls) ** 2).mean())),
            "same_best": float(np.mean([best(nlls) == reference_best for nlls in theirs]) * options.questions),
        },
        "ours": {
            "tokens_per_request": float(np.mean([estimate.forward_tokens for estimate in scores])),
            "samples": float(np.mean([estimate.samples for estimate in scores])),
            "error": float(np.sqrt(np.mean([estimate.standard_error**2 for estimate in scores]))),
            "same_best": int((best([-estimate.log_likelihood for estimate in scores]) == reference_best).sum()),
        },
        "reference_error": float(np.sqrt(np.mean([estimate.standard_error**2 for estimate in reference_scores]))),
        "true_answer_is_best": int((reference_best == 0).sum()),
    }


def _choice_requests(options: Options, run: Trained) -> list[Request]:
    """Return the requests of all documents, `NUM_CHOICES` each; the first choice is the true continuation."""
    spread = options.answer // 3
    sizes = np.random.default_rng(1).integers(
        options.answer - spread, options.answer + spread + 1, NUM_CHOICES * options.questions
    )
    true_texts = passages(run, [options.context + int(size) for size in sizes[::NUM_CHOICES]], 2)
    distractors = iter(passages(run, [int(size) for index, size in enumerate(sizes) if index % NUM_CHOICES], 3))
    requests = []
    for index, text in enumerate(true_texts):
        context = text[: options.context]
        choices = [text[options.context :], *(next(distractors) for _ in range(NUM_CHOICES - 1))]
        requests += [Request(context, choice, f"question {index}") for choice in choices]
    return requests


def race(options: Options, run: Trained) -> dict:
    """Return requests per second of both models under lm-eval, and the largest difference of their log-likelihoods."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    from megatron.convert.huggingface import hugging_face_config, hugging_face_model
    from megatron.scoring.lm_eval_adapter import MegatronLM

    tokenizer = run.tokenizer()
    tokenizer_file = tokenizer.flag.removeprefix("--tokenizer-model ")
    hf_tokenizer = PreTrainedTokenizerFast(tokenizer_file=tokenizer_file, eos_token="<|endoftext|>")
    batch_size = 16
    ours = MegatronLM(pretrained=run.name, batch_size=batch_size, device="cpu")
    sizes = {"vocabulary_rows": run.vocabulary.size, "max_positions": run.config.data.seq_length}
    hf_config = hugging_face_config(run.config.model, **sizes)
    hf_model = hugging_face_model(run.model(), hf_config)
    theirs = HFLM(pretrained=hf_model, tokenizer=hf_tokenizer, batch_size=batch_size, device="cpu", backend="causal")
    text_length = options.context + NUM_CHOICES * options.answer
    instances = []
    for index, text in enumerate(passages(run, [text_length] * NUM_CHOICES * options.questions, 4)):
        context, choices = text[: options.context], text[options.context :]
        for choice_index in range(NUM_CHOICES):
            choice = choices[options.answer * choice_index :][: options.answer]
            arguments = (tokenizer.decode(context), tokenizer.decode(choice))
            instances.append(Instance("loglikelihood", {"index": index}, arguments, choice_index, ("race", index, 1)))
    loglikelihood: dict[str, Callable] = {
        "ours": lambda: ours.loglikelihood(instances, disable_tqdm=True),
        "transformers": lambda: theirs.loglikelihood(instances, disable_tqdm=True),
    }
    seconds = {name: [] for name in loglikelihood}
    results = {}
    for turn in range(options.rounds + 1):
        for name in list(loglikelihood)[:: 1 if turn % 2 else -1]:
            start = time.process_time()
            results[name] = loglikelihood[name]()
            if turn:  # the first one warms up
                seconds[name].append(time.process_time() - start)
    differences = [abs(our_result[0] - hf_result[0]) for our_result, hf_result in zip(*results.values(), strict=True)]
    ratios = [hf_seconds / our_seconds for our_seconds, hf_seconds in zip(*seconds.values(), strict=True)]
    return {
        "requests": len(instances),
        "requests_per_second": {name: len(instances) / median(times) for name, times in seconds.items()},
        "times": {"median": median(ratios), "lowest": min(ratios), "highest": max(ratios)},
        "largest_difference": max(differences),
    }


def table(report: dict) -> str:
    """Return the report as Markdown tables."""
    lines = [
        "| target tokens | published variance, nats² | ours | ratio | ours as reported |",
        "|---|---|---|---|---|",
    ]
    for row in report["variance"]:
        ratio = "exact" if row["times"] is None else f"{row['times']:.0f}"
        lines.append(
            f"| {row['tokens']} | {row['published_variance']:.3g} | {row['variance']:.3g} | {ratio} | "
            f"{row['reported_variance']:.3g} |"
        )
    results = report["questions"]
    lines += [
        "",
        "| four choices | forward tokens per request | error, nats | same best choice as 1,024 samples |",
        "|---|---|---|---|",
    ]
    for name in ("published", "ours"):
        row = results[name]
        lines.append(
            f"| {name} | {row['tokens_per_request']:,.0f} | {row['error']:.2f} | {row['same_best']:g} of "
            f"{results['questions']} |"
        )
    lines += ["", "| AR under lm-eval | requests/s |", "|---|---|"]
    lines += [f"| {name} | {speed:.0f} |" for name, speed in report["race"]["requests_per_second"].items()]
    speedup = report["race"]["times"]
    difference = report["race"]["largest_difference"]
    lines.append(f"\nspeedup over transformers {speedup['median']:.2f} ({speedup['lowest']:.2f} - ")
    lines[-1] += f"{speedup['highest']:.2f}); largest difference of a log-likelihood {difference:.1e}"
    return "\n".join(lines)


if __name__ == "__main__":
    main()
