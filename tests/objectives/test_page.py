"""docs/objectives.md: its pictures equal the output of show_batch.py, its example of a new objective trains."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from megatron.errors import ConfigurationError
from tests.conftest import ROOT, environment, records, run_python

PAGE = (ROOT / "docs" / "objectives.md").read_text()
PICTURES = re.findall(r"^```text\n\$ python tools/show_batch.py(.*?)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def show(flags: str) -> subprocess.CompletedProcess:
    return run_python("tools/show_batch.py", *shlex.split(flags))


def test_the_pictures_are_what_the_code_draws():
    sys.path.insert(0, str(ROOT / "tools"))
    from show_batch import batches, picture

    assert len(PICTURES) >= 15
    for flags, output in PICTURES:
        words = shlex.split(flags)
        sample_index = int(words.pop(words.index("--sample") + 1)) if "--sample" in words else 0
        words = [word for word in words if word != "--sample"]
        assert output == "\n\n".join(map(picture, batches("yes.|now ", sample_index, words))) + "\n", flags


def test_flags_act_and_are_refused_as_in_training():
    sys.path.insert(0, str(ROOT / "tools"))
    from show_batch import batches

    with pytest.raises(ConfigurationError, match="--target-offset-max 9: leaves samples of --seq-length 8"):
        batches("yes.|now ", 0, ["--target-offset-max", "9", "--target-positions"])
    for budget in (["--train-epochs", "2"], ["--train-iters", "9"], ["--lr-warmup-samples", "100"]):
        assert len(batches("yes.|now ", 0, budget)) == 1
    alone, together = (
        batches("yes.|now ", 1, f"--objective mdm --global-batch-size {size}".split()) for size in (1, 4)
    )
    assert alone[0].weights.max() != together[0].weights.max()  # samples of a step share the shift of their times


def test_the_command_draws_the_same_and_refuses_in_one_line():
    flags, output = PICTURES[1]
    assert show(flags).stdout == output
    for wrong_flags, message in (
        ("--text ab", "--text 'ab': is not three"),
        ("--sample -1", "--sample -1: must not be negative"),
    ):
        result = show(wrong_flags)
        assert result.returncode == 2
        assert result.stderr.startswith(f"error: {message}") and result.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """Return a copy of the project with the objective that the page adds."""
    folder = tmp_path_factory.mktemp("extended")
    for name in ("megatron", "tools", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pretrain_gpt.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    section = PAGE[PAGE.index("## Adding an objective") :]
    name = re.search(r"`(megatron/objectives/\w+\.py)`:", section)[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    assert len(code.splitlines()) < 100
    (folder / name).write_text(code)
    diff = re.search(r"```diff\n(.*?)```", section, re.DOTALL)[1]
    for name, changes in re.findall(r"^\+\+\+ b/(.*?)\n(.*?)(?=^---|\Z)", diff, re.DOTALL | re.MULTILINE):
        file = folder / name
        hunks = re.split(r"^@@.*\n", changes, flags=re.MULTILINE)[1:]
        for lines in (hunk.splitlines() for hunk in hunks):
            before = "".join(f"{line[1:]}\n" for line in lines if line[0] in " -")
            after = "".join(f"{line[1:]}\n" for line in lines if line[0] in " +")
            text = file.read_text()
            assert text.count(before) == 1, before
            file.write_text(text.replace(before, after))
    return folder


SCORING = """
from megatron.scoring.requests import Request, Scoring
from megatron.scoring.score import score
from megatron.training.load_run import open_trained
trained = open_trained({folder!r}, "latest")
requests = [Request([100], [101, 102])]
print(score(trained.model(), "prefix", requests, Scoring(), eod=trained.tokenizer().eod, seq_length=32)[0].upper_bound)
"""
MASK = "import sys; sys.path.insert(0, 'tools'); from show_batch import batches, picture; "
MASK += "print(picture(*batches('yes.|now ', 1, ['--objective', 'prefix'])))"
# runs commands one after another in processes that are forked from one that has loaded torch and the copy
IN_COPY = """
import json, sys
from tests.conftest import run_python
results = {name: run_python(*words) for name, words in json.loads(sys.argv[1]).items()}
print(json.dumps({name: [done.returncode, done.stdout, done.stderr] for name, done in results.items()}))
"""


def in_copy(extended, *words) -> subprocess.CompletedProcess:
    """Run a Python command in the copy of the project."""
    paths = {"PYTHONPATH": str(extended)}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=extended, env=environment() | paths, capture_output=True, text=True)


@pytest.fixture(scope="module")
def prefix_run(tmp_path_factory):
    """Return the folder of the run of the objective that the page adds; `results` trains it."""
    return tmp_path_factory.mktemp("prefix")


@pytest.fixture(scope="module")
def results(extended, tiny, prefix_run):
    """Return exit code, stdout and stderr of the commands that train a run of the new objective and use it."""
    generate = ["tools/generate.py", prefix_run, "--max-new-tokens", 4]
    commands = {
        "train": ["pretrain_gpt.py", *tiny, "--objective", "prefix", "--save", prefix_run],
        "generate": [*generate, "--prompt", "def ", "--output", prefix_run / "texts.jsonl"],
        "score": ["-c", SCORING.format(folder=str(prefix_run))],
        "infill": [*generate[:2], "--infill", "a{{2}}b"],
        "export": ["tools/convert_checkpoint.py", "to-hf", prefix_run, "--output", prefix_run / "hf"],
        "show": ["-c", MASK],
    }
    done = in_copy(extended, "-c", IN_COPY, json.dumps(commands, default=str))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_objective_that_the_page_adds_trains_and_validates(results, prefix_run):
    assert results["train"][0] == 0, results["train"][2]
    train, valid = records(prefix_run, "train"), records(prefix_run, "valid")
    assert train[-1]["loss"] < train[0]["loss"] - 0.5 and valid[-1]["loss"] < valid[0]["loss"]
    assert all(record["likelihood"] == "prefix" and not record["bound"] for record in valid)


def test_it_has_the_uses_of_its_entry_and_no_others(results, prefix_run):
    assert results["generate"][0] == 0, results["generate"][2]
    assert len(json.loads((prefix_run / "texts.jsonl").read_text())["ids"]) <= 4
    assert results["score"][1] == "False\n", results["score"][2]
    for name, message in (
        ("infill", "--objective prefix: such a model predicts the next token from"),
        ("export", "reads a prefix in both"),
    ):
        code, _, error = results[name]
        assert code == 2 and message in error and error.count("\n") == 1, error


def test_the_contract_of_all_objectives_holds_for_it(extended):
    words = "-m pytest -v --no-header -p no:cacheprovider tests/objectives/test_contract.py".split()
    result = in_copy(extended, *words)
    assert result.returncode == 0, result.stdout
    outcomes = [line for line in result.stdout.splitlines() if "[prefix]" in line]
    assert len(outcomes) > 5 and all("PASSED" in line for line in outcomes), outcomes


def test_a_prefix_is_seen_in_both_directions(results):
    code, output, error = results["show"]
    assert code == 0, error
    lines = output.splitlines()
    has_target = [bool(cell.strip()) for cell in re.findall(r".{5}", lines[2][9:].ljust(40))]
    mask = [line[9:].split() for line in lines[4:]]
    prefix = mask[0].count("#")
    assert prefix > 1 and has_target == [position + 1 >= prefix for position in range(8)]
    assert mask == [
        ["#" if key <= query or max(key, query) < prefix else "." for key in range(8)] for query in range(8)
    ]
