"""Local probes: labels follow from the text, choices do not reveal them, lm-eval scores them for all objectives."""

import ast
import json
import re
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron.data.copy_documents import Source
from megatron.data.indexed import IndexedDatasetWriter
from megatron.data.tokenizer import HFTokenizer, train_tokenizer
from megatron.randomness import stream
from megatron.scoring.encoding import encode_pair
from megatron.scoring.probe_items import (
    CLOSING,
    Document,
    indentation_candidates,
    matching_brackets,
)
from megatron.scoring.probe_tasks import TASKS, ProbeOptions, write_probes
from megatron.training.launcher import main as train
from tests.conftest import run_python
from tools import probe_tasks

SEQ_LENGTH = 192
PYTHON = "cmd code contextlib csv gzip heapq queue shelve".split()
PROSE = (
    "A {list [of] (nested\nthings)} and more.\n\nA smile :) here (and\nthere).\n\nThe range [0, 1) of (numbers).\n\n"
    "It [is] {fine} (too).\n\n"
)


def write_data(prefix: Path, texts: list[str], vocabulary_size: int = 300) -> HFTokenizer:
    """Write a token file with a tokenizer of its own; return the tokenizer."""
    train_tokenizer(texts, vocabulary_size, prefix.with_name("tokenizer.json"))
    tokenizer = HFTokenizer(prefix.with_name("tokenizer.json"))
    with IndexedDatasetWriter(prefix, tokenizer.vocabulary_size) as writer:
        for text in texts:
            writer.add_document([*tokenizer.encode(text), tokenizer.eod])
    metadata = {"tokenizer_type": "HFTokenizer", "tokenizer_model": "tokenizer.json", "eod": tokenizer.eod}
    prefix.with_suffix(".json").write_text(json.dumps(metadata))
    return tokenizer


@pytest.fixture(scope="module")
def texts():
    """Modules of the standard library, and prose."""
    library = Path(sysconfig.get_path("stdlib"))
    return [*((library / f"{name}.py").read_text() for name in PYTHON), PROSE * 8]


@pytest.fixture(scope="module")
def probes(texts, tmp_path_factory):
    """The tokenizer of the data, and the probes by name of the task; their folder has the data `held_out`, too."""
    folder = tmp_path_factory.mktemp("probes")
    tokenizer = write_data(folder / "held_out", texts)
    options = ProbeOptions(
        data=str(folder / "held_out"), output_dir=str(folder), seq_length=SEQ_LENGTH, items_per_task=200
    )
    written = write_probes(Source.open(options.data), tokenizer, options)
    return folder, tokenizer, {probe.name.removeprefix("probes_"): probe for probe in written}


@pytest.fixture(scope="module")
def python_documents(texts):
    """The numbers of the documents that are Python."""
    return {number for number, text in enumerate(texts) if parses(text)}


def right_and_wrong(item, text: str) -> tuple[str, list[str]]:
    """Return the text, rebuilt with the right choice, and with each wrong one."""
    before, after = text[: item.offset], text[item.offset + len(item.choices[item.label]) :]
    rebuilt = [before + choice + after for choice in item.choices]
    return rebuilt.pop(item.label), rebuilt


def parses(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def without_pairs(text: str) -> str:
    """Return the brackets of a text without those that match."""
    brackets = re.sub(r"[^()\[\]{}]", "", text)
    while (shorter := re.sub(r"\(\)|\[\]|\{\}", "", brackets)) != brackets:
        brackets = shorter
    return brackets


@pytest.mark.parametrize("task", TASKS)
def test_items_are_text_that_fits(probes, texts, task):
    _, tokenizer, written = probes
    items = written[task].items
    assert len(items) >= 40
    for item in items:
        text = texts[item.document]
        start = item.offset - len(item.context)
        assert text[start : item.offset] == item.context and text[:start][-1:] in ("", "\n")
        assert right_and_wrong(item, text)[0] == text and len(set(item.choices)) == len(item.choices)
        for choice in item.choices:
            assert len(tokenizer.encode(item.context + choice)) <= SEQ_LENGTH
        ids = tokenizer.encode(text[start : text.index("\n", item.offset + 1)])  # as models were trained to read it
        pair = encode_pair(tokenizer, item.context, item.choices[item.label])
        assert ids[: len(pair.context) + len(pair.continuation)] == pair.context + pair.continuation
        # the context is as long as it may be: another line has no room
        line = text.rfind("\n", 0, max(0, start - 1)) + 1
        assert start == 0 or len(tokenizer.encode(text[line : text.index("\n", item.offset)])) > SEQ_LENGTH * 0.7


def test_another_bracket_or_indentation_is_no_python(probes, texts, python_documents):
    written = probes[2]
    for item in written["brackets"].items[::5] + written["indentation"].items[::5]:
        if item.document in python_documents:
            assert not any(map(parses, right_and_wrong(item, texts[item.document])[1])), item


def test_brackets_of_prose_close_what_is_open(probes, texts, python_documents):
    items = [item for item in probes[2]["brackets"].items if item.document not in python_documents]
    assert {item.choices[item.label] for item in items} == {")", "]", "}"}
    for item in items:
        paragraph = texts[item.document][: item.offset].rpartition("\n\n")[2]
        *_, opening = without_pairs(paragraph)
        assert CLOSING[opening] == item.choices[item.label] and not re.search("smile|range", paragraph)
        assert opening in without_pairs(item.context)


def test_cloze_has_lines_of_the_split_that_look_alike(probes, texts):
    lines = Counter(line.strip() for text in texts for line in text.split("\n"))
    items = probes[2]["cloze"].items
    assert len({choice for item in items for choice in item.choices}) == 4 * len(items)
    for item in items:
        contents = [choice.strip() for choice in item.choices]
        assert [lines[content] for content in contents] == [1, 1, 1, 1]
        assert len({len(choice) - len(content) for choice, content in zip(item.choices, contents, strict=True)}) == 1
        assert max(map(len, contents)) <= 1.1 * min(map(len, contents))
        assert not any(content in item.context for content in contents)


def test_choices_alone_do_not_reveal_the_right_one(probes):
    written = probes[2]
    for task in ("brackets", "indentation"):
        items = written[task].items
        assert len(items) % 2 == 0
        for first, second in zip(items[::2], items[1::2], strict=True):  # in every order of the two choices
            answers = {first.choices[first.label], second.choices[second.label]}
            assert answers == set(first.choices) == set(second.choices)
        assert (written[task].chance, written[task].longest, written[task].unigram) == (0.5, 0.5, 0.5)
    for probe in written.values():
        share_of_first = np.mean([item.label == 0 for item in probe.items])
        error = (probe.chance * (1 - probe.chance) / len(probe.items)) ** 0.5
        for accuracy in (share_of_first, probe.longest, probe.unigram):
            assert abs(accuracy - probe.chance) < 4 * error


def test_baselines_are_those_of_plain_python(probes, texts):
    _, tokenizer, written = probes
    counts = Counter(index for text in texts for index in [*tokenizer.encode(text), tokenizer.eod])
    hits = {"longest": 0, "unigram": 0}
    for item in (items := written["cloze"].items):
        lengths = [len(choice) for choice in item.choices]
        likelihoods = [
            sum(np.log(counts[index] + 1) - np.log(sum(counts.values()) + 300) for index in tokenizer.encode(choice))
            for choice in item.choices
        ]
        hits["longest"] += (lengths[item.label] == max(lengths)) / lengths.count(max(lengths))
        hits["unigram"] += int(np.argmax(likelihoods)) == item.label
    assert written["cloze"].longest == pytest.approx(hits["longest"] / len(items))
    assert written["cloze"].unigram == pytest.approx(hits["unigram"] / len(items), abs=1e-3)


@pytest.mark.parametrize(
    "text, pairs",
    [
        ('a = f("(", [")}", f"{x[0]}"])  # )\nb = {1: "]"}  # ([\n', ["[]", "()", "{}"]),
        (PROSE, ["[]", "()", "{}", "[]", "{}", "()"]),  # those of smile and range are left out
        ("def f(a:\n    (b)\n\n[c]\n", ["[]"]),  # no Python
        ('f"""\n{(1)}"""\nf(\n)\n', ["()"]),
    ],
)
def test_which_brackets_match(text, pairs):
    assert [text[opening] + text[closing] for opening, closing in matching_brackets(text)] == pairs


CODE = """\
def f(a,
      b):  # of two lines
    first = (a +
  b)
    second = 1
    # a comment
    third = 2
    if a:
        "a string"
        fourth = {1:
            2}
    fifth = a[1:
        2]; sixth = 3
    for x in b: pass
    return 4

class A: pass
"""
INDENTATIONS = [  # right and wrong, of the first words of lines
    ("    first", "first"),
    ("    second", "        second"),
    ("    if", "        if"),
    ("        fourth", "            fourth"),
    ("    for", "        for"),
    ("    return", "        return"),
]


def test_where_the_indentation_is_determined(tmp_path):
    tokenizer = write_data(tmp_path / "held_out", [CODE, PROSE])

    def candidates(text: str) -> list:
        return list(indentation_candidates([Document(0, text, tokenizer, SEQ_LENGTH)], stream(0, "test")))

    items = candidates(CODE)
    assert [(item.right, set(item.choices) - {item.right}) for item in items] == [
        (f"\n{right}", {f"\n{wrong}"}) for right, wrong in INDENTATIONS
    ]
    assert all(CODE.startswith(item.right, item.offset) for item in items)
    assert [CODE[item.needed :].split()[0] for item in items] == ["def", "first", "third", '"a', "fifth", "for"]
    for other in (CODE.replace("    for x in b: pass\n", "    for x in b:\n      pass\n"), f"{CODE} )", PROSE):
        assert candidates(other) == []  # two units, no Python


def written_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("probes*")}


@pytest.fixture
def tool(monkeypatch, capsys):
    """Return a function that runs the tool; it returns what it prints, or the line of its error."""

    def run(*words) -> str:
        monkeypatch.setattr("sys.argv", ["probe_tasks.py", *map(str, words)])
        try:
            probe_tasks.main()
        except SystemExit as end:
            assert end.code == 2
            return capsys.readouterr().err.splitlines()[-1]
        return capsys.readouterr().out

    return run


def test_the_tool_writes_the_same_again_and_replaces_tasks(probes, tool, tmp_path):
    words = ["--output-dir", tmp_path, "--seq-length", SEQ_LENGTH, "--items-per-task", 40]
    lines = tool("--data", probes[0] / "held_out", *words).splitlines()
    assert [line.split()[0:2] for line in lines[1:]] == [[f"probes_{task}", "40"] for task in TASKS]
    first = written_files(tmp_path)
    all_items = (probes[0] / "probes_indentation.jsonl").read_bytes()
    assert all_items.startswith(first["probes_indentation.jsonl"])  # fewer are the first of all
    for seed, same in ((0, True), (1, False)):
        tool("--data", probes[0] / "held_out", *words, "--seed", seed)
        assert (written_files(tmp_path) == first) is same
    (tmp_path / "data").mkdir()
    write_data(tmp_path / "data" / "prose", [PROSE * 4])
    lines = tool("--data", tmp_path / "data" / "prose", *words).splitlines()
    assert lines[-1] == "no item, left out: cloze, indentation"
    assert set(written_files(tmp_path)) == {"probes.yaml", "probes_brackets.yaml", "probes_brackets.jsonl"}


def test_what_gives_no_item_is_refused(tool, tmp_path):
    write_data(tmp_path / "held_out", ["no line of this has a pair\n" * 20], 257)
    words = ["--data", tmp_path / "held_out", "--output-dir", tmp_path / "out"]
    assert tool(*words) == (
        f"error: --data {tmp_path}/held_out: gives no item of any probe with --seq-length 128; name a split with more "
        "text, or give a greater length"
    )
    (tmp_path / "held_out.json").unlink()
    assert tool(*words).startswith(f"error: --data {tmp_path}/held_out: no tokenizer is known for it; give the ")
    assert tool(*words[:2]) == "error: --output-dir: required and not given; --help describes them"
    assert "--items-per-task 1: " in tool(*words, "--items-per-task", 1)
    assert not (tmp_path / "out").exists()


OBJECTIVES = {"ar": (), "mdm": (), "dual": (), "any-order": (), "block-diffusion": ("--diffusion-block-size", "16")}


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_lm_eval_scores_the_probes(objective, probes, tmp_path):
    folder, _, written = probes
    flags = "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --fp32 --no-compile --lr 1e-2 --eval-samples 4 "
    flags += f"--seq-length {SEQ_LENGTH} --micro-batch-size 2 --global-batch-size 4 --train-iters 12"
    data = ["--train-data-path", f"{folder}/held_out", "--valid-data-path", f"{folder}/held_out"]
    words = ["--objective", objective, *OBJECTIVES[objective], *flags.split(), *data, "--save", str(tmp_path / "run")]
    train("ar", words)
    scoring = ["--pretrained", tmp_path / "run", "--include_path", folder, "--tasks", "probes", "--limit", 20]
    module = ["-m", "megatron.scoring.lm_eval_cli", *scoring, "--log_samples", "--output_path", tmp_path / "out"]
    done = run_python(*module, "--only-mc-nll", timeout=3000, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    (results,) = (json.loads(path.read_text()) for path in (tmp_path / "out").rglob("results_*.json"))
    assert results["group_subtasks"] == {"probes": [f"probes_{task}" for task in TASKS]}
    for task in TASKS:
        (path,) = (tmp_path / "out").rglob(f"samples_probes_{task}_*.jsonl")
        samples = [json.loads(line) for line in path.read_text().splitlines()]
        hits = []
        for sample, item in zip(samples, written[task].items[:20], strict=True):
            assert [argument["arg_0"] for argument in sample["arguments"].values()] == [item.context] * len(
                item.choices
            )
            assert [argument["arg_1"] for argument in sample["arguments"].values()] == item.choices
            likelihoods = [float(response[0][0]) for response in sample["resps"]]
            hits.append(int(np.argmax(likelihoods)) == item.label)
        assert results["results"][f"probes_{task}"]["acc,none"] == pytest.approx(np.mean(hits))
