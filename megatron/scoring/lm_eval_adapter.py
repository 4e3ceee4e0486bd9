"""A training run as a model of lm-eval: log-likelihoods, rolling log-likelihoods and generation."""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from megatron.errors import ConfigurationError
from megatron.generation.generate import check_empty_prompt, generate
from megatron.generation.sampling import Sampling
from megatron.parallel.launch import device, world_size
from megatron.parallel.mesh import initialize_parallel
from megatron.scoring.answer_cache import AnswerCache
from megatron.scoring.encoding import EncodingCounts, encode_pair
from megatron.scoring.lm_eval_arguments import read_arguments, read_batch_size, read_generation
from megatron.scoring.requests import Request, Score, Scoring
from megatron.scoring.score import score
from megatron.training.run_folder import writing

logger = logging.getLogger(__name__)

GENERATION_BATCH = 16  # texts that are generated at one time, without --batch-rows


class MegatronLM(TemplateLM):
    """A training run with lm-eval's interface. Every rank has the whole model and scores its share of the requests.

    With `use_cache`, a path, answers are written there and not computed again.
    """

    def __init__(self, batch_size=None, max_batch_size=None, device=None, use_cache=None, **arguments):
        super().__init__()
        self.source, scoring = read_arguments(arguments)
        if batch_size not in (None, "auto"):
            scoring = replace(scoring, batch_rows=read_batch_size(batch_size))
        if max_batch_size is not None:
            limit = int(max_batch_size)
            scoring = replace(scoring, batch_rows=min(scoring.batch_rows or limit, limit))
        self.scoring = scoring
        self.trained = self.source.open()
        self.objective = self.trained.recorded["objective_name"]
        self.seq_length = self.trained.config.data.seq_length
        scoring.check(self.trained.config.objective, self.seq_length)
        self._ranks = initialize_parallel() if world_size() > 1 else None
        if self._ranks:
            self._rank, self._world_size = self._ranks.rank, self._ranks.size
        self._device = _torch_device(device)
        self._tokenizer = self.trained.tokenizer()
        self.dtype = self.source.dtype or {"bf16": "bfloat16"}.get(self.trained.recorded["precision"], "float32")
        self.model = self.trained.model(self.source.average, getattr(torch, self.dtype), str(self._device))
        self._sums = [0.0] * 5  # requests, samples, forward tokens, bounds, their squared errors
        self._global_sums = list(self._sums)
        self._encodings = EncodingCounts()  # of this rank, since the last report
        self._reported_encodings = EncodingCounts()  # of all ranks
        self._records_path = _records_path(self.source.records, self.rank, self.world_size)
        self._cache = AnswerCache(use_cache, self.rank, self._cache_settings())

    # ------------------------------------------------------------------------------------ lm-eval's interface

    @property
    def eot_token_id(self) -> int:
        """The id of the end-of-document token."""
        return self._tokenizer.eod

    @property
    def max_length(self) -> int:
        """The sequence length of the training run."""
        return self.seq_length

    @property
    def tokenizer_name(self) -> str:
        """The flag and value that name the tokenizer."""
        return self._tokenizer.flag

    def set_cache_hook(self, cache_hook) -> None:
        """Refuse lm-eval's own cache: it mixes up checkpoints, settings, and documents with the same request."""
        raise ConfigurationError(
            "use_cache: lm-eval's own cache ignores checkpoints and settings; give --use_cache on the command line, or "
            "MegatronLM(use_cache=...)"
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Return the ids of a text, without special tokens."""
        return self._tokenizer.encode(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the ids of a context and its continuation, as `loglikelihood` scores them."""
        pair = encode_pair(self._tokenizer, context, continuation)
        return pair.context, pair.continuation

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log-likelihood, is greedy) of each continuation; in masked diffusion the negative of an upper bound.

        The requests of one document are its choices, even where their contexts differ.
        """
        encoded = []
        encoded_alone = set()
        for instance in requests:
            context, continuation = instance.args  # pyright: ignore[reportAssignmentType]
            pair = encode_pair(self._tokenizer, context, continuation)
            self._check_tokens(instance, continuation, pair.continuation)
            if pair.encoded_alone:
                encoded_alone.add(id(instance))
            length = float(len(continuation.lstrip()))
            encoded.append(Request(pair.context, pair.continuation, doc_key(instance), length))
        return self._score("loglikelihood", requests, encoded, scoring=self.scoring, encoded_alone=encoded_alone)

    def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
        """Return the same for (strings, context ids, continuation ids), whose documents are unknown."""
        scores = self._compute([Request(context, continuation) for _, context, continuation in requests], self.scoring)
        return [_loglikelihood(score) for score in scores]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text after an end-of-document token, or the negative of its bound."""
        if self.scoring.only_generate:
            raise ConfigurationError(
                "--only_generate: evaluates no likelihood, and a task needs that of whole texts; leave one of them out"
            )
        encoded = [Request([], self.tok_encode(instance.args[0]), doc_key(instance)) for instance in requests]
        for instance, request in zip(requests, encoded, strict=True):
            self._check_tokens(instance, instance.args[0], request.continuation)
        scoring = replace(self.scoring, only_mc_nll=True)
        return [nats for nats, _ in self._score("loglikelihood_rolling", requests, encoded, scoring=scoring)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return a continuation of each context, up to the first of the stop strings in `until`.

        1. Equal requests form one group: their draws differ by number, so they are generated and cached together.
        2. Groups are batched by their generation settings; cached texts come first.
        """
        prompts = [self.tok_encode(instance.args[0]) for instance in requests]
        if not all(prompts):
            check_empty_prompt(self.trained.config.data)
        equal_requests: dict[str, list[int]] = {}
        for index, instance in enumerate(requests):
            equal_requests.setdefault(self._cache.key("generate_until", instance.args), []).append(index)
        groups: dict[tuple[Sampling, tuple[str, ...]], list[tuple[str, list[int]]]] = {}
        for content, indices in equal_requests.items():
            arguments = requests[indices[0]].args[1]  # pyright: ignore[reportGeneralTypeIssues]
            settings = read_generation(arguments, self.objective, self.seq_length)
            groups.setdefault(settings, []).append((self._cache.key(content, len(indices)), indices))
        texts = [""] * len(requests)
        recorded = set()
        for (sampling, until), group in groups.items():
            room = self.seq_length - sampling.max_new_tokens
            truncated_prompts = [prompt[-room:] for prompt in prompts]
            for key, indices, group_texts in self._generate_groups(sampling, until, group, truncated_prompts):
                self._cache.add(key, group_texts)
                for index, text in zip(indices, group_texts, strict=True):
                    texts[index] = text
                    if id(requests[index]) not in recorded:  # lm-eval repeats requests to give all ranks as many
                        recorded.add(id(requests[index]))
                        truncated_tokens = max(0, len(prompts[index]) - room)
                        self._encodings += EncodingCounts.of_request(truncated_tokens)
                        self._record("generate_until", requests[index], {"truncated_tokens": truncated_tokens})
        self._report_encodings()
        return texts

    def _generate_groups(
        self, sampling: Sampling, until: tuple[str, ...], groups: list[tuple[str, list[int]]], prompts: list[list[int]]
    ) -> Iterator[tuple[str, list[int], list[str]]]:
        """Yield (key, indices, texts) of groups of equal requests: cached ones, then new ones batch by batch."""
        uncached = []
        for key, indices in groups:
            texts = self._cache.get(key)
            if texts is None:
                uncached.append((key, indices))
            else:
                yield key, indices, texts
        uncached.sort(key=lambda group: -len(prompts[group[1][0]]))  # prompts of a batch have similar lengths
        size = self.scoring.batch_rows or GENERATION_BATCH
        for start in range(0, len(uncached), size):
            batch = uncached[start : start + size]
            texts = iter(self._generate(sampling, until, [prompts[index] for _, indices in batch for index in indices]))
            for key, indices in batch:
                yield key, indices, [next(texts) for _ in indices]

    def _generate(self, sampling: Sampling, until: tuple[str, ...], prompts: list[list[int]]) -> list[str]:
        """Return a continuation of each prompt; generation ends at the first stop string."""

        def finished(tokens: list[int]) -> bool:
            text = self._tokenizer.decode(tokens)
            return cut(text, until) != text

        settings = {
            "eod": self.eot_token_id,
            "batch_size": self.scoring.batch_rows or GENERATION_BATCH,
            "seq_length": self.seq_length,
            "finished": finished,
        }
        new_tokens = generate(self.model, self.objective, prompts, sampling, **settings)
        return [cut(self._tokenizer.decode(tokens), until) for tokens in new_tokens]

    # ------------------------------------------------------------------------------------ several ranks

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensors of all ranks, stacked where they are scalars, else concatenated."""
        gathered = self._gather(tensor.cpu())
        return torch.stack(gathered) if tensor.dim() == 0 else torch.cat(gathered)

    def gather_object(self, obj: Any, dst: int = 0) -> list | None:
        """Return the objects of all ranks on rank `dst`, None elsewhere."""
        gathered = self._gather(obj)
        return gathered if self.rank == dst else None

    def barrier(self) -> None:
        """Wait for all ranks, which takes as long as the slowest one has requests, and sum their statistics."""
        self._global_sums = [sum(column) for column in zip(*self._gather(self._sums))]
        self._report_encodings(all_ranks=True)

    def _gather(self, value: Any) -> list:
        if self._ranks is None:
            return [value]
        gathered = [None] * self.world_size
        dist.all_gather_object(gathered, value, group=self._ranks.patient)
        return gathered

    def _report_encodings(self, all_ranks: bool = False) -> None:
        """Log how many requests were truncated or encoded alone; with several ranks, once all have scored theirs."""
        if self._ranks is not None and not all_ranks:
            return
        counts = sum(self._gather(self._encodings), EncodingCounts())
        self._encodings = EncodingCounts()
        self._reported_encodings += counts
        for line in counts.lines(self.seq_length) if self.rank == 0 else ():
            logger.warning(line)

    def _check_tokens(self, instance: Instance, text: str, ids: Sequence[int]) -> None:
        """Raise ConfigurationError where the tokenizer drops a whole text: its log-likelihood would be 0."""
        if text and not ids:
            raise ConfigurationError(
                f"--tasks {instance.task_name}: the tokenizer ({self._tokenizer.flag}) drops all of {text[:40]!r} in "
                f"document {instance.doc_id}, so that it has no likelihood; leave the task out, or score a run whose "
                "tokenizer encodes such text"
            )

    # ------------------------------------------------------------------------------------ scores and their records

    def get_model_info(self) -> dict:
        """Return what lm-eval adds to the results: checkpoint, settings of scoring, and statistics of the requests."""
        requests, samples, tokens, bounds, squares = self._sums if self._ranks is None else self._global_sums
        info = {
            "objective": self.objective,
            "checkpoint": str(self.trained.checkpoint),
            "iteration": self.trained.meta["iteration"],
            "consumed_samples": self.trained.meta["consumed_samples"],
            "dtype": self.dtype,
            "seq_length": self.seq_length,
            "requests": int(requests),
            "forward_tokens": int(tokens),
            "upper_bound": bounds > 0,
            "truncated_contexts": self._reported_encodings.truncated,
            "truncated_tokens": self._reported_encodings.truncated_tokens,
            "max_truncated_tokens": self._reported_encodings.max_truncated_tokens,
            "answers_encoded_alone": self._reported_encodings.encoded_alone,
        }
        if self.scoring.form(self.objective) != "causal":
            info |= {name: value for name, value in asdict(self.scoring).items() if not name.startswith("batch_")}
            info["likelihood"] = self.scoring.likelihood or "bound"
            info["samples_per_request"] = samples / requests if requests else None
            # root mean square over the requests whose score is a bound
            info["standard_error_per_request"] = (squares / bounds) ** 0.5 if bounds else None
        return info

    def _cache_settings(self) -> dict:
        """Return everything that determines an answer, apart from the request."""
        scoring = {name: value for name, value in asdict(self.scoring).items() if not name.startswith("batch_")}
        return {"checkpoint": self.trained.meta, "average": self.source.average, "dtype": self.dtype, **scoring}

    def _score(
        self,
        kind: str,
        instances: Sequence[Instance],
        requests: list[Request],
        *,
        scoring: Scoring,
        encoded_alone: Set[int] = frozenset(),
    ) -> list[tuple[float, bool]]:
        """Return the answers to lm-eval's `instances`, whose token ids are in `requests`, cached and new ones.

        The answers of a document are cached together, since its choices decide about one another's samples: some of
        them alone would be sampled differently. `encoded_alone` has the `id`s of instances.
        """
        documents: dict[str | None, dict[tuple, tuple]] = {}  # arguments and token ids of the choices of each document
        keys = [(request.doc_key, instance.args) for request, instance in zip(requests, instances, strict=True)]
        for (document, arguments), request in zip(keys, requests, strict=True):
            documents.setdefault(document, {})[arguments] = (request.context, request.continuation)
        # token ids are in the key, so that answers to another tokenization do not match
        cache_keys = {
            document: self._cache.key(kind, document, list(choices.items())) for document, choices in documents.items()
        }
        scores: dict[tuple, Score] = {}
        for document, choices in documents.items():
            for arguments, values in zip(choices, self._cache.get(cache_keys[document]) or ()):
                scores[document, arguments] = Score(**values)
        recorded = set()

        def record(index: int) -> None:
            instance = instances[index]
            if id(instance) not in recorded:  # lm-eval repeats requests to give all ranks as many
                recorded.add(id(instance))
                score = scores[keys[index]]
                self._encodings += EncodingCounts.of_request(score.truncated_tokens, id(instance) in encoded_alone)
                self._add_score(kind, instance, score)

        uncached = [index for index, key in enumerate(keys) if key not in scores]
        for index, key in enumerate(keys):
            if key in scores:
                record(index)

        def finished(number: int, score: Score) -> None:
            index = uncached[number]
            document, _ = keys[index]
            scores[keys[index]] = score
            choice_keys = [(document, arguments) for arguments in documents[document]]
            if all(key in scores for key in choice_keys):
                self._cache.add(cache_keys[document], [asdict(scores[key]) for key in choice_keys])
            record(index)

        if uncached:
            self._compute([requests[index] for index in uncached], scoring, finished)
        self._report_encodings()
        return [_loglikelihood(scores[key]) for key in keys]

    def _compute(
        self, requests: list[Request], scoring: Scoring, finished: Callable[[int, Score], None] = lambda *_: None
    ) -> list[Score]:
        settings = {
            "eod": self.eot_token_id,
            "seq_length": self.seq_length,
            "data": self.trained.config.data,
            "finished": finished,
        }
        return score(self.model, self.trained.config.objective, requests, scoring, **settings)

    def _add_score(self, kind: str, instance: Instance, score: Score) -> None:
        """Add a score to the statistics and the records."""
        bound = int(score.upper_bound)
        squared_error = score.standard_error**2 if score.upper_bound else 0.0
        terms = (1, score.samples, score.forward_tokens, bound, squared_error)
        self._sums = [total + term for total, term in zip(self._sums, terms, strict=True)]
        values = {name: None if value != value else value for name, value in vars(score).items()}  # nan is null
        self._record(kind, instance, values)

    def _record(self, kind: str, instance: Instance, values: dict) -> None:
        if self._records_path:
            request = {"task": instance.task_name, "doc_id": instance.doc_id, "index": instance.idx, "request": kind}
            with writing(self._records_path), open(self._records_path, "a", encoding="utf-8") as file:
                file.write(json.dumps(request | values) + "\n")


def doc_key(instance: Instance) -> str:
    """Return the key of a document's Monte-Carlo noise: a hash of task and document, not of its index in a run."""
    content = json.dumps([instance.task_name, instance.doc], sort_keys=True, default=str)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def cut(text: str, until: Sequence[str]) -> str:
    """Return a text up to the first of the stop strings `until`."""
    ends = [text.find(stop) for stop in until if stop and stop in text]
    return text[: min(ends)] if ends else text


def _loglikelihood(score: Score) -> tuple[float, bool]:
    return score.log_likelihood, bool(score.is_greedy)


def _torch_device(name: str | None) -> torch.device:
    try:
        chosen = device() if name in (None, "auto") else torch.device(name)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError):
        raise ConfigurationError(f"--device {name}: this machine has no such device; leave it out") from None
    return chosen


def _records_path(path: str | None, rank: int, size: int) -> Path | None:
    """Return the path of this rank's records; its folder is created, and the files of an earlier command removed."""
    if path is None:
        return None
    plain = Path(path)
    ranks = [plain.with_name(f"{plain.stem}_rank{number}{plain.suffix}") for number in range(size)]
    files = ranks if size > 1 else [plain]
    with writing(plain):
        plain.parent.mkdir(parents=True, exist_ok=True)
        files[rank].unlink(missing_ok=True)
        pattern = re.compile(f"{re.escape(plain.stem)}(_rank[0-9]+)?{re.escape(plain.suffix)}")
        for file in plain.parent.iterdir() if rank == 0 else ():
            if pattern.fullmatch(file.name) and file not in files:  # of a command on another number of ranks
                file.unlink()
    return files[rank]
