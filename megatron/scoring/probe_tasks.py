"""Local probes as tasks of lm-eval: items of held-out documents, balanced, written as JSON lines and YAML.

Every set of choices is in as many items with one of its members right as with any other, or the right one is drawn at
random. So a model that looks at the choices alone, whatever it knows of them, has the accuracy of chance.
"""

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import yaml
from tqdm import tqdm

from megatron.config.flags import Section, flag
from megatron.data.copy_documents import Source
from megatron.data.inspection.excerpts import REMEDY, decode
from megatron.data.tokenizer import Tokenizer
from megatron.errors import ConfigurationError
from megatron.randomness import stream
from megatron.scoring.encoding import encode_pair
from megatron.scoring.probe_items import (
    Document,
    Item,
    bracket_candidates,
    build_item,
    cloze_candidates,
    indentation_candidates,
)
from megatron.training.run_folder import write_records, writing

GROUP = "probes"
TASKS = {"cloze": cloze_candidates, "brackets": bracket_candidates, "indentation": indentation_candidates}
READ_TOKENS = 2_000_000  # of the split, in random documents


@dataclass(frozen=True, kw_only=True)
class ProbeOptions(Section):
    """Probes."""

    data: str = flag(help="data prefix of a held-out split, of PREFIX.bin and PREFIX.idx", metavar="PREFIX")
    output_dir: str = flag(help="folder of the tasks; probes in it are replaced", metavar="DIR")
    items_per_task: int = flag(500, "at most this many items (docs of lm-eval) per task", within="[2, inf)")
    seq_length: int = flag(
        128, "--seq-length of the runs; contexts have at most three quarters of its tokens", within="[16, inf)"
    )
    seed: int = flag(0, "seed of the choice of items", within="[0, inf)")


@dataclass(frozen=True)
class Probe:
    """The items of a task, and accuracies without a context; where choices tie, the mean over them."""

    name: str  # of the task in lm-eval
    items: list[Item]
    longest: float  # of the choice with most characters
    unigram: float  # of the choice with the highest unigram likelihood, by the frequencies of the documents' tokens

    @classmethod
    def measure(cls, name: str, items: list[Item], tokenizer: Tokenizer, counts: np.ndarray) -> "Probe":
        """Return the items of a task with the accuracies of the baselines; `counts` are those of the tokens, [V]."""
        log_frequencies = np.log(counts / counts.sum())
        lengths = [[len(choice) for choice in item.choices] for item in items]
        pairs = [[encode_pair(tokenizer, item.context, choice) for choice in item.choices] for item in items]
        likelihoods = [[float(log_frequencies[pair.continuation].sum()) for pair in row] for row in pairs]
        return cls(name, items, longest=_accuracy(lengths, items), unigram=_accuracy(likelihoods, items))

    @property
    def chance(self) -> float:
        """The accuracy of a random choice."""
        return 1 / len(self.items[0].choices)


def write_probes(source: Source, tokenizer: Tokenizer | None, options: ProbeOptions) -> list[Probe]:
    """Write the tasks of a data set to a folder; return those that have items.

    Raises: ConfigurationError if there are none, or no tokenizer; OSError if a file cannot be written.
    """
    if tokenizer is None:
        raise ConfigurationError(f"--data {options.data}: no tokenizer is known for it; {REMEDY}")
    documents, counts = read_documents(source, tokenizer, options)
    items = {task: balanced_items(task, documents, options) for task in TASKS}
    probes = [Probe.measure(f"{GROUP}_{task}", items[task], tokenizer, counts) for task in TASKS if items[task]]
    if not probes:
        raise ConfigurationError(
            f"--data {options.data}: gives no item of any probe with --seq-length {options.seq_length}; name a split "
            "with more text, or give a greater length"
        )
    _write(Path(options.output_dir), probes, options)
    return probes


def read_documents(source: Source, tokenizer: Tokenizer, options: ProbeOptions) -> tuple[list[Document], np.ndarray]:
    """Return documents in random order, READ_TOKENS tokens or all, and the smoothed counts of their tokens, [V].

    Raises: ConfigurationError for an id that the tokenizer does not have.
    """
    dataset, documents = source.dataset, []
    order = stream(options.seed, "probe documents").permutation(len(dataset))
    last = int(np.searchsorted(np.cumsum(dataset.sizes[order], dtype=np.int64), READ_TOKENS)) + 1
    counts = np.ones(tokenizer.vocabulary_size, np.int64)
    for number in tqdm(order[:last].tolist(), desc="documents", disable=None, leave=False):
        ids = dataset[number]
        texts = decode(source, tokenizer, ids, f"--data {options.data}")
        documents += [Document(number, text, tokenizer, options.seq_length) for text in texts if text]
        counts += np.bincount(ids, minlength=len(counts))
    return documents, counts


def balanced_items(task: str, documents: list[Document], options: ProbeOptions) -> list[Item]:
    """Return at most --items-per-task items of a task.

    An item waits for items with the same choices of which the others are right. Those of `cloze` do not: which of their
    choices is right was drawn.
    """
    generator = stream(options.seed, f"probe {task}")
    candidates = list(TASKS[task](documents, generator))
    waiting: dict[tuple, deque[Item]] = defaultdict(deque)  # by choices and right choice
    items = []
    with tqdm(total=options.items_per_task, desc=task, disable=None, leave=False) as bar:
        for index in generator.permutation(len(candidates)):
            item = build_item(candidates[index], generator)
            if item is None:
                continue
            choices = tuple(sorted(item.choices))
            right_choices = [item.right] if task == "cloze" else choices
            if len(items) + len(right_choices) > options.items_per_task:
                break
            waiting[choices, item.right].append(item)
            if all(waiting[choices, right] for right in right_choices):
                items += [waiting[choices, right].popleft() for right in right_choices]
                bar.update(len(right_choices))
    return items


def _accuracy(scores: Sequence[Sequence[float]], items: list[Item]) -> float:
    """Return how often the right choice has the highest score; where k choices tie for it, as 1 / k."""
    return sum(
        (row[item.label] == max(row)) / row.count(max(row)) for row, item in zip(scores, items, strict=True)
    ) / len(items)


def _write(folder: Path, probes: list[Probe], options: ProbeOptions) -> None:
    """Write the group and, for each task, its items and YAML file; tasks of an earlier call are removed."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name in (GROUP, *(f"{GROUP}_{task}" for task in TASKS)):
            (folder / f"{name}.yaml").unlink(missing_ok=True)
            (folder / f"{name}.jsonl").unlink(missing_ok=True)
    for probe in probes:
        path = folder / f"{probe.name}.jsonl"
        write_records(path, [asdict(item) for item in probe.items])
        _write_yaml(folder / f"{probe.name}.yaml", _task(probe.name, path.resolve(), options))
    _write_yaml(folder / f"{GROUP}.yaml", {"group": GROUP, "task": [probe.name for probe in probes]})


def _task(name: str, path: Path, options: ProbeOptions) -> dict:
    """Return the configuration of a task in lm-eval, whose items are the lines of `path`."""
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(path)}},
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "target_delimiter": "",
        "num_fewshot": 0,
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
        ],
        "metadata": {"version": 1.0, "data": options.data, "seq_length": options.seq_length, "seed": options.seed},
    }


def _write_yaml(path: Path, value: dict) -> None:
    with writing(path):
        path.write_text(yaml.safe_dump(value, sort_keys=False, allow_unicode=True), encoding="utf-8")
