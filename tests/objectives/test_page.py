"""docs/objectives.md is taken at its word: its pictures are drawn again, its example of a new objective is trained."""

import re
import shlex
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT, environment, records

PAGE = (ROOT / "docs" / "objectives.md").read_text()
PICTURES = re.findall(r"^```text\n\$ python tools/show_batch.py(.*?)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def show(flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/show_batch.py", *shlex.split(flags)]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)


def test_the_pictures_are_what_the_code_draws():
    sys.path.insert(0, str(ROOT / "tools"))
    from show_batch import batches, picture

    assert len(PICTURES) >= 15
    for flags, drawn in PICTURES:
        words = shlex.split(flags)
        sample = int(words.pop(words.index("--sample") + 1)) if "--sample" in words else 0
        words = [word for word in words if word != "--sample"]
        assert drawn == "\n\n".join(map(picture, batches("yes.|now ", sample, words))) + "\n", flags


def test_the_command_draws_the_same_and_refuses_in_one_line():
    flags, drawn = PICTURES[1]
    assert show(flags).stdout == drawn
    for wrong, said in (
        ("--text ab", "--text 'ab': is not three"),
        ("--sample -1", "--sample -1: must not be negative"),
    ):
        done = show(wrong)
        assert done.returncode == 2 and done.stderr.startswith(f"error: {said}") and done.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A copy of the project with the objective that the page adds."""
    folder = tmp_path_factory.mktemp("extended")
    shutil.copytree(ROOT / "megatron", folder / "megatron", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pretrain_gpt.py", folder)
    section = PAGE[PAGE.index("## Adding an objective") :]
    name = re.search(r"`(megatron/objectives/\w+\.py)`:", section)[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    assert len(code.splitlines()) < 100
    (folder / name).write_text(code)
    diff = re.search(r"```diff\n(.*?)```", section, re.DOTALL)[1]
    for part in re.findall(r"^\+\+\+ b/(.*?)\n(.*?)(?=^---|\Z)", diff, re.DOTALL | re.MULTILINE):
        file, hunks = folder / part[0], re.split(r"^@@.*\n", part[1], flags=re.MULTILINE)[1:]
        for lines in (hunk.splitlines() for hunk in hunks):
            before, after = ("".join(f"{line[1:]}\n" for line in lines if line[0] in kept) for kept in (" -", " +"))
            text = file.read_text()
            assert text.count(before) == 1, before
            file.write_text(text.replace(before, after))
    return folder


def test_the_objective_that_the_page_adds_trains(extended, tiny, tmp_path):
    command = [
        sys.executable,
        str(extended / "pretrain_gpt.py"),
        *tiny,
        "--objective",
        "prefix",
        "--save",
        str(tmp_path),
    ]
    done = subprocess.run(command, env=environment() | {"PYTHONPATH": str(extended)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = records(tmp_path)
    trained, valid = ([record["loss"] for record in found if record["kind"] == kind] for kind in ("train", "valid"))
    assert trained[-1] < trained[0] - 0.5 and valid[-1] < valid[0]
    assert all(
        record["likelihood"] == "prefix" and not record["bound"] for record in found if record["kind"] == "valid"
    )


def test_a_prefix_is_seen_in_both_directions(extended):
    code = (
        "from show_batch import batches, picture; print(picture(*batches('yes.|now ', 1, ['--objective', 'prefix'])))"
    )
    paths = {"PYTHONPATH": f"{extended}:{ROOT / 'tools'}"}
    copied = shutil.copytree(ROOT / "tools", extended / "tools", dirs_exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=copied, env=environment() | paths, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    sees = [line[9:].split() for line in done.stdout.splitlines()[4:]]
    asked = [
        bool(word) for word in re.findall(r".{5}", done.stdout.splitlines()[2][9:].ljust(40)) for word in [word.strip()]
    ]
    prefix = sees[0].count("#")
    assert prefix > 1 and asked == [place + 1 >= prefix for place in range(8)]
    assert sees == [
        ["#" if key <= query or max(key, query) < prefix else "." for key in range(8)] for query in range(8)
    ]
