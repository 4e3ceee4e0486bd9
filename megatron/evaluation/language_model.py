"""A trained run as a language model of lm-eval: likelihoods, likelihoods of whole texts, and generation."""

import difflib
import hashlib
import json
import logging
import typing
from collections.abc import Sequence, Set
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from megatron.config.flags import flag, require
from megatron.errors import ConfigurationError
from megatron.evaluation.answer_cache import Kept
from megatron.evaluation.encoding import EncodingCounts, encode_pair
from megatron.evaluation.generate import CAUSAL, check_empty_prompt, check_objective, generate
from megatron.evaluation.requests import Request, Score, Scoring
from megatron.evaluation.sampling import MASKED, Sampling
from megatron.evaluation.score import score
from megatron.parallel.launch import device, world_size
from megatron.parallel.mesh import initialize_parallel
from megatron.training.load_run import Trained, open_trained
from megatron.training.run_folder import writing

logger = logging.getLogger(__name__)

NEW_TOKENS = 256  # of an answer whose task does not say how long it may be: lm-eval's own number
ANSWERS = 16  # that are generated at one time, unless --batch-rows says


@dataclass(frozen=True, kw_only=True)
class Source:
    """Which model. In lm-eval's own form: --model megatron --model_args pretrained=RUN,checkpoint=best,num_mc=16."""

    pretrained: str | None = flag(None, "the run: a folder that --save wrote, or a checkpoint in it", metavar="RUN")
    checkpoint: str = flag(
        "latest", "the newest one, or the one of lowest loss on the first set", choices=("latest", "best")
    )
    average: bool = flag(False, "take the average of the weights that --ema-decay or --average-from-samples kept")
    dtype: str | None = flag(
        None, "what is computed in (default: what the run was trained in)", choices=("float32", "bfloat16")
    )
    records: str | None = flag(
        None,
        "write a line for each request: its score, error and samples (default: scores_*.jsonl beside --output_path's "
        "samples)",
        metavar="FILE.jsonl",
    )

    def __post_init__(self):
        for name, choices in (("checkpoint", ("latest", "best")), ("dtype", (None, "float32", "bfloat16"))):
            value = getattr(self, name)
            require(value in choices, name, value, f"is not one of {', '.join(filter(None, choices))}")

    def open(self) -> Trained:
        """Return the run; raise ConfigurationError where it is none, is damaged, or cannot be scored."""
        if not self.pretrained:
            raise ConfigurationError("--pretrained: required and not given; name a folder that --save wrote")
        trained = open_trained(self.pretrained, self.checkpoint)
        check_objective(trained.recorded["objective_name"], trained.config.objective)
        return trained


def read_arguments(arguments: dict) -> tuple[Source, Scoring]:
    """Return what lm-eval's --model_args say; raise ConfigurationError for a name that is none."""
    sections, known = [], {}
    for section in (Source, Scoring):
        hints = typing.get_type_hints(section)
        mine = {field.name for field in fields(section)}
        known |= dict.fromkeys(mine)
        values = {name: _typed(name, arguments[name], hints[name]) for name in mine & set(arguments)}
        sections.append(section(**values))
    for name in arguments:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {close[0]}?" if close else f"it knows {', '.join(sorted(known))}"
            raise ConfigurationError(f"--model_args {name}={arguments[name]}: unknown name; {remedy}")
    return tuple(sections)


def _typed(name: str, value, hint):
    """Return a value as the type of its field: lm-eval reads 1 as a number wherever it stands."""
    kinds = [kind for kind in (typing.get_args(hint) or (hint,)) if kind is not type(None)]
    if value is None or kinds[0] is str:
        return value if value is None else str(value)
    kind = (int, float) if kinds[0] is float else kinds[0]
    if not isinstance(value, kind) or (isinstance(value, bool) and kinds[0] is not bool):
        raise ConfigurationError(f"--model_args {name}={value}: is no {kinds[0].__name__}; give one")
    return value


class MegatronLM(TemplateLM):
    """A trained run, as lm-eval calls it. Every process holds the whole model and scores its own share of a task.

    With `use_cache`, a path, answers are kept there and not asked for again.
    """

    def __init__(self, batch_size=None, max_batch_size=None, device=None, use_cache=None, **arguments):
        super().__init__()
        self.source, scoring = read_arguments(arguments)
        if batch_size not in (None, "auto"):
            scoring = replace(scoring, batch_rows=_rows(batch_size))
        if max_batch_size is not None:
            rows = int(max_batch_size)
            scoring = replace(scoring, batch_rows=min(scoring.batch_rows or rows, rows))
        self.scoring = scoring
        self.trained = self.source.open()
        self.objective = self.trained.recorded["objective_name"]
        scoring.check(self.objective)
        self._processes = initialize_parallel() if world_size() > 1 else None
        if self._processes:
            self._rank, self._world_size = self._processes.rank, self._processes.size
        self._device = _place(device)
        self._tokenizer = self.trained.tokenizer()
        self.dtype = self.source.dtype or {"bf16": "bfloat16"}.get(self.trained.recorded["precision"], "float32")
        self.model = self.trained.model(self.source.average, getattr(torch, self.dtype), str(self._device))
        self.seq_length = self.trained.config.data.seq_length
        self._figures = [0.0] * 5  # requests, samples, forward tokens, bounds, their squared errors
        self._totals = list(self._figures)
        self._encodings = EncodingCounts()  # of this rank, since the last report
        self._reported_encodings = EncodingCounts()  # of all ranks
        self._records = _records(self.source.records, self.rank, self.world_size)
        self._kept = Kept(use_cache, self.rank, self._settings())

    # ------------------------------------------------------------------------------------ what lm-eval asks for

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eod

    @property
    def max_length(self) -> int:
        return self.seq_length

    @property
    def tokenizer_name(self) -> str:
        return self._tokenizer.named

    def set_cache_hook(self, cache_hook) -> None:
        """Refuse lm-eval's own cache: it mixes up checkpoints, settings, and documents that ask for the same text."""
        raise ConfigurationError(
            "use_cache: lm-eval's own knows neither checkpoints nor settings; give --use_cache on the command line, or "
            "MegatronLM(use_cache=...)"
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Return the ids of a text: special tokens never come out of it, and none is added."""
        return self._tokenizer.encode(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the ids of a context and its continuation, as `loglikelihood` scores them."""
        pair = encode_pair(self._tokenizer, context, continuation)
        return pair.context, pair.continuation

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return of each continuation the log-likelihood, or the negative of its upper bound, and whether it is greedy.

        The answers of one document are rivals, even where their contexts differ.
        """
        asked, encoded_alone = [], set()
        for instance in requests:
            context, continuation = instance.args
            pair = encode_pair(self._tokenizer, context, continuation)
            self._check_tokens(instance, continuation, pair.continuation)
            if pair.encoded_alone:
                encoded_alone.add(id(instance))
            length = float(len(continuation.lstrip()))
            asked.append(Request(pair.context, pair.continuation, question_of(instance), length))
        return self._score("loglikelihood", requests, asked, self.scoring, encoded_alone)

    def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
        """Return the same of (strings, context ids, continuation ids): documents, and so rivals, are not known here."""
        found = self._ask([Request(context, continuation) for _, context, continuation in requests], self.scoring)
        return [_answer(one) for one in found]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood (or the negative of its upper bound) of each text, behind the end of another."""
        if self.scoring.only_generate:
            raise ConfigurationError(
                "--only_generate: a task asks for the likelihood of whole texts, which that leaves out; drop one"
            )
        asked = [Request([], self.tok_encode(instance.args[0]), question_of(instance)) for instance in requests]
        for instance, request in zip(requests, asked, strict=True):
            self._check_tokens(instance, instance.args[0], request.continuation)
        scoring = replace(self.scoring, only_mc_nll=True)
        return [nats for nats, _ in self._score("loglikelihood_rolling", requests, asked, scoring)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what each context is followed by, up to the first of the texts in `until`."""
        prompts = [self.tok_encode(instance.args[0]) for instance in requests]
        if not all(prompts):
            check_empty_prompt(self.trained.config.data)
        equal: dict[str, list[int]] = {}  # draws tell equal requests apart by their number: they stay together
        for index, instance in enumerate(requests):
            equal.setdefault(self._kept.key("generate_until", instance.args), []).append(index)
        groups: dict[tuple[Sampling, tuple[str, ...]], list[tuple[str, list[int]]]] = {}
        for content, indices in equal.items():
            settings = read_generation(requests[indices[0]].args[1], self.objective, self.seq_length)
            groups.setdefault(settings, []).append((self._kept.key(content, len(indices)), indices))
        found, noted = [""] * len(requests), set()
        for (sampling, until), asked in groups.items():
            room = self.seq_length - sampling.max_new_tokens
            for key, indices, texts in self._written(sampling, until, asked, [prompt[-room:] for prompt in prompts]):
                self._kept.add(key, texts)
                for index, text in zip(indices, texts, strict=True):
                    found[index] = text
                    if id(requests[index]) not in noted:  # lm-eval repeats some, so that all ranks have as many
                        noted.add(id(requests[index]))
                        truncated_tokens = max(0, len(prompts[index]) - room)
                        self._encodings += EncodingCounts.of_request(truncated_tokens)
                        self._record("generate_until", requests[index], {"truncated_tokens": truncated_tokens})
        self._report_encodings()
        return found

    def _written(
        self, sampling: Sampling, until: tuple[str, ...], asked: list[tuple[str, list[int]]], prompts: list[list[int]]
    ):
        """Yield (key, indices, texts) of equal requests: those that are kept, then as many at a time as are read."""
        fresh = []
        for key, indices in asked:
            texts = self._kept.get(key)
            if texts is None:
                fresh.append((key, indices))
            else:
                yield key, indices, texts
        fresh.sort(key=lambda each: -len(prompts[each[1][0]]))  # rows of a batch are about as long
        size = self.scoring.batch_rows or ANSWERS
        for start in range(0, len(fresh), size):
            part = fresh[start : start + size]
            texts = iter(self._texts(sampling, until, [prompts[index] for _, indices in part for index in indices]))
            for key, indices in part:
                yield key, indices, [next(texts) for _ in indices]

    def _texts(self, sampling: Sampling, until: tuple[str, ...], prompts: list[list[int]]) -> list[str]:
        """Return what each prompt is followed by, written no further than the first of `until`."""
        rows = self.scoring.batch_rows or ANSWERS

        def finished(tokens: list[int]) -> bool:
            text = self._tokenizer.decode(tokens)
            return cut(text, until) != text

        settings = {"batch_size": rows, "seq_length": self.seq_length, "finished": finished}
        made = generate(self.model, self.objective, prompts, sampling, self.eot_token_id, **settings)
        return [cut(self._tokenizer.decode(tokens), until) for tokens in made]

    # ------------------------------------------------------------------------------------ several processes

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensors of all processes one after another."""
        gathered = self._gather(tensor.cpu())
        return torch.stack(gathered) if tensor.dim() == 0 else torch.cat(gathered)

    def gather_object(self, obj, dst: int = 0) -> list | None:
        """Return the objects of all processes on `dst`, None elsewhere."""
        gathered = self._gather(obj)
        return gathered if self.rank == dst else None

    def barrier(self) -> None:
        """Wait for all processes, which takes as long as the slowest has requests, and add up their figures."""
        self._totals = [sum(column) for column in zip(*self._gather(self._figures))]
        self._report_encodings(all_ranks=True)

    def _gather(self, value) -> list:
        if self._processes is None:
            return [value]
        gathered = [None] * self.world_size
        dist.all_gather_object(gathered, value, group=self._processes.patient)
        return gathered

    def _report_encodings(self, all_ranks: bool = False) -> None:
        """Log how many requests were truncated or encoded alone; of several ranks, once all have scored theirs."""
        if self._processes is not None and not all_ranks:
            return
        counts = sum(self._gather(self._encodings), EncodingCounts())
        self._encodings = EncodingCounts()
        self._reported_encodings += counts
        for line in counts.lines(self.seq_length) if self.rank == 0 else ():
            logger.warning(line)

    def _check_tokens(self, instance: Instance, text: str, ids: list[int]) -> None:
        """Raise ConfigurationError where the tokenizer drops a whole text: it would count as certain."""
        if text and not ids:
            raise ConfigurationError(
                f"--tasks {instance.task_name}: the tokenizer ({self._tokenizer.named}) drops all of {text[:40]!r} in "
                f"document {instance.doc_id}, so that it has no likelihood; leave the task out, or score a run whose "
                "tokenizer encodes such text"
            )

    # ------------------------------------------------------------------------------------ scores and their record

    def get_model_info(self) -> dict:
        """Return what lm-eval writes into the results beside its own settings: what was scored, how, and how well."""
        counts = self._figures if self._processes is None else self._totals
        requests, samples, tokens, bounds, squares = counts
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
        if self.objective == "mdm":
            settings = (
                "method",
                "num_mc",
                "eval_seed",
                "decide_at",
                "chain_order",
                "cfg",
                "only_mc_nll",
                "only_generate",
            )
            info |= {name: getattr(self.scoring, name) for name in settings}
            info["samples_per_request"] = samples / requests if requests else None
            # of the negative log-likelihoods, which are upper bounds
            info["standard_error_per_request"] = (squares / bounds) ** 0.5 if bounds else None
        return info

    def _settings(self) -> dict:
        """Return all that decides an answer beside the request."""
        scoring = {name: value for name, value in asdict(self.scoring).items() if not name.startswith("batch_")}
        return {"checkpoint": self.trained.meta, "average": self.source.average, "dtype": self.dtype, **scoring}

    def _score(
        self,
        kind: str,
        instances: Sequence[Instance],
        asked: list[Request],
        scoring: Scoring,
        encoded_alone: Set[int] = frozenset(),
    ):
        """Return the answers, kept ones and new ones. Those of a document are kept together: rivals decide on samples,
        and the rest of them alone would be told otherwise. `encoded_alone` are the `id`s of instances."""
        documents: dict[str, dict[tuple, tuple]] = {}  # what is asked of each, and its token ids
        places = [(request.question, instance.args) for request, instance in zip(asked, instances, strict=True)]
        for (question, arguments), request in zip(places, asked, strict=True):
            documents.setdefault(question, {})[arguments] = (request.context, request.continuation)
        # with the ids, so that what another tokenisation gave is no answer
        keys = {question: self._kept.key(kind, question, list(each.items())) for question, each in documents.items()}
        found: dict[tuple, Score] = {}
        for question, every in documents.items():
            for arguments, kept in zip(every, self._kept.get(keys[question]) or ()):
                found[question, arguments] = Score(**kept)
        noted = set()

        def note(index: int) -> None:
            instance = instances[index]
            if id(instance) not in noted:  # lm-eval repeats some, so that all processes have as many
                noted.add(id(instance))
                score = found[places[index]]
                self._encodings += EncodingCounts.of_request(score.truncated_tokens, id(instance) in encoded_alone)
                self._note(kind, instance, score)

        fresh = [index for index, place in enumerate(places) if place not in found]
        for index, place in enumerate(places):
            if place in found:
                note(index)

        def finished(number: int, one: Score) -> None:
            index = fresh[number]
            question, _ = places[index]
            found[places[index]] = one
            answers = [found.get((question, arguments)) for arguments in documents[question]]
            if None not in answers:
                self._kept.add(keys[question], [asdict(answer) for answer in answers])
            note(index)

        if fresh:
            self._ask([asked[index] for index in fresh], scoring, finished)
        self._report_encodings()
        return [_answer(found[place]) for place in places]

    def _ask(self, asked: list[Request], scoring: Scoring, finished=lambda *_: None) -> list[Score]:
        data = self.trained.config.data
        return score(self.model, self.objective, asked, scoring, self.eot_token_id, self.seq_length, data, finished)

    def _note(self, kind: str, instance: Instance, one: Score) -> None:
        bound = int(one.upper_bound)
        added = (1, one.samples, one.forward_tokens, bound, bound * one.standard_error**2)
        self._figures = [before + more for before, more in zip(self._figures, added, strict=True)]
        self._record(kind, instance, {name: None if value != value else value for name, value in vars(one).items()})

    def _record(self, kind: str, instance: Instance, values: dict) -> None:
        if self._records:
            place = {"task": instance.task_name, "doc_id": instance.doc_id, "index": instance.idx, "request": kind}
            with writing(self._records), open(self._records, "a", encoding="utf-8") as file:
                file.write(json.dumps(place | values) + "\n")


def question_of(instance: Instance) -> str:
    """Return what the noise of a request is keyed by: the document that it belongs to, not its place in a run."""
    content = json.dumps([instance.task_name, instance.doc], sort_keys=True, default=str)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def read_generation(arguments: dict, objective: str, seq_length: int) -> tuple[Sampling, tuple[str, ...]]:
    """Return how a task asks for text, and what ends it; raise ConfigurationError for what cannot be done.

    Without do_sample it is greedy unless a temperature is given, and with it the temperature is 1 unless one is.
    """
    given = dict(arguments)
    until = given.pop("until", None) or ()
    until = (until,) if isinstance(until, str) else tuple(until)
    length = int(given.pop("max_gen_toks", NEW_TOKENS))
    if length >= seq_length:
        raise ConfigurationError(
            f"max_gen_toks {length} of a task: leaves no room for a prompt in the {seq_length} tokens of --seq-length "
            f"that this model was trained on; give --gen_kwargs max_gen_toks={seq_length // 2} or fewer"
        )
    sample = given.pop("do_sample", None)
    temperature = float(given.pop("temperature", 1.0 if sample else 0.0)) if sample is not False else 0.0
    if sample is False:
        given.pop("temperature", None)
    names = {field.name for field in fields(Sampling)} - {"max_new_tokens"}
    for name in given:
        if name not in names or (objective in CAUSAL and name in MASKED):
            rule = "acts in masked diffusion only" if name in names else "is nothing that these models know"
            raise ConfigurationError(f"--gen_kwargs {name}={given[name]}: {rule}; leave it out")
    if not temperature:  # nothing is drawn, and these act on what is
        for name in ("top_k", "top_p"):
            given.pop(name, None)
    return Sampling(max_new_tokens=length, temperature=temperature, **given), until


def cut(text: str, until: Sequence[str]) -> str:
    """Return a text up to where the first of `until` begins."""
    ends = [text.find(stop) for stop in until if stop and stop in text]
    return text[: min(ends)] if ends else text


def _answer(one: Score) -> tuple[float, bool]:
    return one.log_likelihood, bool(one.is_greedy)


def _rows(batch_size) -> int:
    """Return lm-eval's --batch_size, in rows; its auto is the number of tokens that --batch-tokens says."""
    if not str(batch_size).isdigit() or not int(batch_size):
        raise ConfigurationError(f"--batch_size {batch_size}: is neither auto nor a number of rows; give one of them")
    return int(batch_size)


def _place(name: str | None) -> torch.device:
    try:
        asked = device() if name in (None, "auto") else torch.device(name)
        torch.empty(0, device=asked)
    except (RuntimeError, AssertionError):
        raise ConfigurationError(f"--device {name}: there is no such device here; leave it out") from None
    return asked


def _records(path: str | None, rank: int, size: int) -> Path | None:
    """Return the file of this process's records, whose folder is there."""
    if path is None:
        return None
    file = Path(path)
    if size > 1:
        file = file.with_name(f"{file.stem}_rank{rank}{file.suffix}")
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    return file
